"""The table of where each weight of a model comes from: stored tensors, and what joins them.

Transformers renames stored tensors, splits and merges them, ties some, and fills what is missing
with random values. The table asks transformers for its renamings and conversions, runs them on
tensors without data, and accepts a model only where every parameter has exactly one source of the
right shape and a float type, and every stored tensor is used or known to be superfluous. Loading
whole, layer by layer and for export all read through it or are held against it.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from nmexport.errors import ModelError
from nmexport.models.families import is_text_part, text_name
from nmexport.models.integrity import StoredTensor, damage_error
from nmexport.models.quantised.decoding import decode, kept_of
from nmexport.models.quantised.gguf_file import GgufIntegers
from nmexport.models.quantised.layouts import find_packing
from nmexport.models.unsupported import FLOATS, quantised
from nmexport.models.weight_files import read_config, shorten, stored_tensors
from nmexport.sparsity.quantisation import QuantisedWeight

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from transformers import PreTrainedModel

    from nmexport.models.quantised.packing import PackedWeight
    from nmexport.store.kept import KeptWeights


_FLOAT32 = torch.float32
_DEQUANTISED = "F32"  # as what a quantised weight is read
_CAUSAL_MASK = re.compile(r"(^|\.)(attn|attention)\.(masked_)?bias$")
_MASK_RANKS = (0, 4)  # a mask has four axes, the value that it masks with none
_COMPUTED = re.compile(r"(rotary_emb\.inv_freq|(^|\.)position_ids)$")


@dataclass
class _Origin:
    """Stored tensors that make one parameter, or several."""

    converter: Any = None
    """Transformers' `WeightConverter`; None where one tensor is taken as it is."""
    sources: list[tuple[str, str]] = field(default_factory=list)
    """Pattern of the converter, and name in the files."""

    @property
    def names(self) -> list[str]:
        return [name for _, name in self.sources]


class WeightTable:
    """Map each parameter and stored buffer of a model to its files; reads them one by one."""

    def __init__(self, model: PreTrainedModel, folder: Path, *, keeps_float8: bool = False) -> None:
        """Find a source for every parameter, by the files' headers alone.

        Args:
            model: The model or its skeleton; kept, and not changed.
            folder: A folder of safetensors files.
            keeps_float8: See `quantised.decoding.decode`.

        Raises:
            ModelError: if a parameter has no source, two, or one of another shape or type, or if a
                stored tensor belongs to nothing.
        """
        self._model, self._folder = model, folder
        self._keeps_float8 = keeps_float8
        self._packing = find_packing(folder, read_config(folder), stored_tensors(folder))
        self._integers = GgufIntegers(folder) if GgufIntegers.are_in(folder) else None
        self._stored = dict(self._packing.plain)
        for name, weight in self._packing.weights.items():
            file = next(iter(weight.parts.values())).file
            self._stored[name] = StoredTensor(file, _DEQUANTISED, weight.shape)
        self._expected: dict[str, torch.Tensor] = dict(model.state_dict(keep_vars=True))
        origins, unexpected = self._rename()
        self._origins: dict[str, tuple[_Origin, str]] = {}
        for name, origin in origins.items():
            self._place(name, origin)
        self._tie()
        self._check_complete(unexpected)

    @property
    def names(self) -> list[str]:
        """Parameters and buffers that have a source, sorted."""
        return sorted(self._origins)

    def sources(self, name: str) -> list[str]:
        """List the stored tensors that make a parameter."""
        return self._origins[name][0].names

    def read(self, name: str, *, device: str = "cpu") -> torch.Tensor:
        """Read a parameter or stored buffer, in the type it is stored in.

        Args:
            name: Its name in the model.
            device: Where to; on the host it stays mapped from its file where it can.

        Raises:
            ModelError: if a file is damaged, or the weight is not finite.
        """
        origin, given = self._origins[name]
        read = {stored: self._tensor(stored) for stored in origin.names}
        value = (
            self._make(given, origin, read)[given]
            if origin.converter
            else next(iter(read.values()))
        ).to(device)
        if not is_finite(value):
            raise not_finite(name, self._folder, value.dtype)
        return value

    @property
    def is_dequantised(self) -> bool:
        """Tell whether weights are dequantised from integers by us, not by transformers."""
        return bool(self._packing.weights)

    @property
    def kept(self) -> KeptWeights | None:
        """The quantised weights that are kept; None where none are stored."""
        if self._integers is not None:
            return self._integers.kept
        if not self._packing.weights:
            return None
        return kept_of(self._packing, keeps_float8=self._keeps_float8)

    def quantised(self, name: str) -> QuantisedWeight | None:
        """Read a parameter's integers and scales, bit for bit; None where it is stored as floats.

        Raises:
            ModelError: if a file is damaged, or its tensors contradict each other.
        """
        origin, _ = made = self._origins[name]
        if self._integers is not None:
            same = (other for other in self._integers.names if self._origins.get(other) is made)
            other = next(same, None)  # the name itself, or one that it is tied to
            return None if other is None else self._integers.read(other)
        packed = self._packing.weights.get(origin.names[0])
        if packed is None or origin.converter is not None:
            return None
        value = decode(packed, self._parts(packed), keeps_float8=self._keeps_float8)
        return value if isinstance(value, QuantisedWeight) else None

    def fill_buffers(self, model: PreTrainedModel) -> None:
        """Give a skeleton the buffers that are stored in the files; others are computed."""
        for name, buffer in model.named_buffers():
            if name in self._origins:
                buffer.copy_(self.read(name))

    def _tensor(self, stored: str) -> torch.Tensor:
        packed = self._packing.weights.get(stored)
        if packed is None:
            return self._stored_tensor(stored, self._stored[stored].file)
        value = decode(packed, self._parts(packed))
        if isinstance(value, QuantisedWeight):
            return value.dequantised().t()
        return value

    def _parts(self, packed: PackedWeight) -> dict[str, torch.Tensor]:
        """Read the stored tensors of a quantised weight by role."""
        return {
            role: self._stored_tensor(packed.stored(role), tensor.file)
            for role, tensor in packed.parts.items()
        }

    def _stored_tensor(self, stored: str, path: Path) -> torch.Tensor:
        try:
            with safe_open(path, framework="pt") as stream:
                tensor: torch.Tensor = stream.get_tensor(stored)
                return tensor
        except (OSError, SafetensorError) as error:
            raise damage_error(path, str(error)) from error

    def _rename(self) -> tuple[dict[str, _Origin], list[str]]:
        """Map origins by the first parameter they make; return unused stored tensors too."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )

        mapping = get_model_conversion_mapping(self._model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        by_pattern = {
            pattern: converter for converter in converters for pattern in converter.source_patterns
        }
        prefix = self._model.base_model_prefix
        origins: dict[str, _Origin] = {}
        unexpected: list[str] = []
        # The order matters to merges (experts by number), and to renamings that wait for another.
        is_part = is_text_part(self._model.config, self._folder)
        for stored in sorted(self._stored, key=dot_natural_key):
            own = text_name(stored) if is_part else stored
            if own is None:
                continue  # another part's: the vision tower's
            name, pattern = rename_source_key(own, renamings, converters, prefix, self._expected)
            if name not in self._expected and own in self._expected:
                name, pattern = rename_source_key(own, [], [], prefix, self._expected)
            if name not in self._expected:
                if not self._is_superfluous(name, stored):
                    unexpected.append(stored)
                continue
            converter = None if pattern is None else by_pattern[pattern]
            origin = origins.setdefault(name, _Origin(converter))
            if origin.sources and (converter is None or origin.converter is None):
                raise self._two_sources(name, [*origin.names, stored])
            origin.sources.append((pattern or stored, stored))
        return origins, unexpected

    def _place(self, first: str, origin: _Origin) -> None:
        """Record what an origin makes, after checking its shapes and types."""
        empty = {name: self._empty(name) for name in origin.names}
        made = (
            self._make(first, origin, empty)
            if origin.converter
            else {first: empty[origin.names[0]]}
        )
        for name, value in made.items():
            if name not in self._expected:
                raise ModelError(
                    f"{shorten(origin.names)} of {self._folder} would make {name}, which "
                    f"{self._kind} does not have.",
                    fix=self._another_model,
                )
            if name in self._origins:
                raise self._two_sources(name, [*self.sources(name), *origin.names])
            self._check_fits(name, origin, tuple(value.shape))
            self._origins[name] = (origin, name)

    def _empty(self, stored: str) -> torch.Tensor:
        return torch.empty(self._stored[stored].shape, dtype=_FLOAT32, device="meta")

    def _make(
        self, first: str, origin: _Origin, read: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Let transformers' converter make parameters of stored tensors."""
        converter = copy.deepcopy(origin.converter)
        for pattern, stored in origin.sources:
            converter.add_tensor(first, stored, pattern, read[stored])
        try:
            made = converter.convert(first, model=self._model, config=self._model.config)
        except Exception as error:  # an op on tensors that do not fit raises what it pleases
            raise ModelError(
                f"{first} cannot be made of {shorten(origin.names)} of {self._folder}: {error}",
                fix=self._another_model,
            ) from error
        return {
            name: value[0] if isinstance(value, list) else value for name, value in made.items()
        }

    def _check_fits(self, name: str, origin: _Origin, shape: tuple[int, ...]) -> None:
        expected = self._expected[name]
        wanted = tuple(expected.shape)
        for stored in origin.names:
            kind = self._stored[stored].dtype
            if expected.is_floating_point() and kind not in FLOATS:
                raise quantised(self._folder, f"{stored} is stored as {kind}")
        if shape != wanted:
            raise ModelError(
                f"{shorten(origin.names)} of {self._folder} makes {name} {list(shape)}, and the "
                f"configuration asks for {list(wanted)}{self._vocabulary_hint(name)}.",
                fix="use the config.json that belongs to these weights",
            )

    def _vocabulary_hint(self, name: str) -> str:
        heads = (self._model.get_input_embeddings(), self._model.get_output_embeddings())
        weight = self._expected[name]
        is_vocabulary = any(
            head is not None and getattr(head, "weight", None) is weight for head in heads
        )
        return " (its vocab_size and hidden_size)" if is_vocabulary else ""

    def _tie(self) -> None:
        """Give a parameter without a source the source of its tie.

        Raises:
            ModelError: if both are stored and differ: nothing says whether they are tied.
        """
        for names in self._tied_sets():
            stored = [name for name in names if name in self._origins]
            if not stored:
                continue
            for other in stored[1:]:
                if not torch.equal(self.read(stored[0]), self.read(other)):
                    raise ModelError(
                        f"{self._folder} contradicts itself: its config ties {other} to "
                        f"{stored[0]} (tie_word_embeddings), and its files hold two that differ.",
                        fix="set tie_word_embeddings to false in config.json if the model was "
                        f"trained so, or remove {self.sources(other)[0]} from the files",
                    )
            for name in names:
                self._origins[name] = self._origins[stored[0]]

    def _tied_sets(self) -> Iterable[list[str]]:
        """List sets of tied parameters, the original of each first."""
        sets: dict[str, list[str]] = {}
        for target, original in getattr(self._model, "all_tied_weights_keys", {}).items():
            sets.setdefault(original, [original]).append(target)
        tied = {name for names in sets.values() for name in names}
        shared: dict[int, list[str]] = {}
        for name, value in self._expected.items():  # one module under two names
            if name not in tied:
                shared.setdefault(id(value), []).append(name)
        return [*sets.values(), *(names for names in shared.values() if len(names) > 1)]

    def _is_superfluous(self, name: str, stored: str) -> bool:
        """Tell whether a stored tensor is no weight: a mask, or what transformers ignores."""
        patterns = self._model._keys_to_ignore_on_load_unexpected or ()  # noqa: SLF001
        if any(re.search(pattern, name) for pattern in patterns) or _COMPUTED.search(name):
            return True
        if self._is_empty_bias(stored):
            return True
        is_mask = len(self._stored[stored].shape) in _MASK_RANKS
        computed = name in {buffer for buffer, _ in self._model.named_buffers()}
        return computed or (is_mask and _CAUSAL_MASK.search(name) is not None)

    def _is_empty_bias(self, stored: str) -> bool:
        """Tell whether a tensor is the bias of zeros that GPTQ gives every linear."""
        module, _, role = stored.rpartition(".")
        if role != "bias" or f"{module}.weight" not in self._packing.weights:
            return False
        return not bool(self._tensor(stored).any())

    def _check_complete(self, unexpected: list[str]) -> None:
        """Refuse a model that lacks a weight, and files with unknown tensors."""
        parameters = {name for name, _ in self._model.named_parameters(remove_duplicate=False)}
        optional = self._model._keys_to_ignore_on_load_missing or ()  # noqa: SLF001
        missing = [
            name
            for name in self._expected
            if name not in self._origins
            # A buffer that may be absent has the value it is made with; a parameter a random one.
            and (name in parameters or not any(re.search(pattern, name) for pattern in optional))
        ]
        if missing:
            also = (
                f" They hold {shorten(unexpected)}, which belongs to nothing." if unexpected else ""
            )
            raise ModelError(
                f"The files of {self._folder} hold no {shorten(missing)} of {self._kind}: random "
                f"values would take {'its' if len(missing) == 1 else 'their'} place.{also}",
                fix=self._missing_fix(missing),
            )
        if unexpected:
            raise ModelError(
                f"The files of {self._folder} hold {shorten(unexpected)}, which {self._kind} "
                "does not have: the model that they make would not be the one that was trained.",
                fix=self._another_model,
            )

    def _missing_fix(self, missing: list[str]) -> str:
        head = self._model.get_output_embeddings()
        weight = getattr(head, "weight", None)
        if len(missing) == 1 and weight is not None and self._expected[missing[0]] is weight:
            return (
                "complete the download; if the model uses its embedding as its head, set "
                "tie_word_embeddings to true in config.json"
            )
        return f"complete the download, or {self._another_model}"

    def _two_sources(self, name: str, stored: list[str]) -> ModelError:
        return ModelError(
            f"{name} has {len(stored)} sources in {self._folder}: {', '.join(stored)}. Nothing "
            "says which is meant.",
            fix="remove the one that does not belong to the model",
        )

    @property
    def _kind(self) -> str:
        return f"a model of type {self._model.config.model_type!r}"

    @property
    def _another_model(self) -> str:
        return "use the config.json that belongs to these weights, or a checkpoint of this type"


def is_finite(value: torch.Tensor) -> bool:
    """Tell whether no element is NaN or infinite."""
    if not value.is_floating_point() or not value.numel():
        return True
    low, high = torch.aminmax(value)  # both are NaN where one element is
    return bool(torch.isfinite(low) and torch.isfinite(high))


def not_finite(name: str, folder: Path, dtype: torch.dtype) -> ModelError:
    """Build the error that says a weight is NaN or infinite."""
    kind = str(dtype).removeprefix("torch.")
    return ModelError(
        f"{name} of {folder} holds NaN or infinite values in {kind}: nothing computed with it "
        "would be a number.",
        fix="check the file against the original"
        + (
            "; float16 ends at 65504, --dtype bfloat16 or float32 do not"
            if kind == "float16"
            else ""
        ),
    )
