"""A forward pass with one decoder layer in memory at a time, for models larger than the memory.

The weights stay in their safetensors files, which are mapped, not read. Hidden states of all
samples wait in a file between layers. Each layer computes exactly what it computes in the whole
model, in the same order of samples: results are the same bits.

The model's own forward is run twice with its layers stubbed: first to embed the samples and to
learn what each layer is called with (masks, rotary embeddings: the same for every sample, since
samples have one length and no padding), last to take the final hidden states to the logits.
"""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import nn

from nmexport.environment import return_freed_memory
from nmexport.errors import ModelError, NmexportError
from nmexport.models.last_logits import last_logits
from nmexport.models.skeleton import skeleton
from nmexport.models.swap import swapped
from nmexport.models.weights import WeightTable
from nmexport.store.scratch import scratch_array

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from transformers import PreTrainedModel

    from nmexport.models.source import ModelSource
    from nmexport.progress import Progress

_WHOLE = "use --offload never on a machine with more memory, or place the model on a GPU"


_Call: TypeAlias = "tuple[tuple[Any, ...], dict[str, Any]]"
"""What a layer is given beside its hidden states."""


class _LayersDone(Exception):
    """All layers were called."""


class LayerwiseModel:
    """A causal LM in float32 that is run layer by layer."""

    def __init__(
        self,
        source: ModelSource,
        *,
        folder: Path | None = None,
        rounded: torch.dtype = torch.float32,
    ) -> None:
        """Build the skeleton and find every weight; read none.

        Args:
            source: A model in safetensors files.
            folder: On a disk with room for the hidden states of all samples; None is the system's.
            rounded: Type that weights are rounded to before they are computed with in float32.

        Raises:
            ModelError: if it is stored in another format, its files do not make the model, or it
                has no list of decoder layers.
        """
        if source.packed:
            raise ModelError(
                f"{source.id} is a .gguf, which cannot be read layer by layer.",
                allowed="a model in safetensors files",
                fix=_WHOLE,
            )
        self.model = skeleton(source)
        self._backbone_name, self._layers = _decoder_layers(self.model)
        self._weights = _Weights(WeightTable(self.model, source.weights_folder), rounded)
        self._weights.table.fill_buffers(self.model)
        self._folder = folder

    def run(
        self,
        samples: torch.Tensor,
        *,
        progress: Progress,
        label: str,
        after: Callable[[], None] = lambda: None,
        logits_kept: int = 1,
        use_logits: Callable[[int, torch.Tensor], None] | None = None,
        substitutes: Mapping[str, Callable[[], nn.Module]] | None = None,
    ) -> None:
        """Run samples through all layers; hooks on the model's modules see what they always see.

        Args:
            samples: `[samples, length]` int64 token ids.
            progress: Counts layers.
            label: What it counts them under.
            after: Called after each sample in each layer.
            logits_kept: Positions at the end of a sample whose logits are computed; 0 is all.
            use_logits: Given each sample's index and logits `[kept, V]`.
            substitutes: Modules that stand in for linears, by name: made when their layer runs,
                or what follows the layers, and dropped after it.

        Raises:
            ModelError: if the layers of this architecture are not called as a list of layers is,
                or a weight cannot be read.
            OSError: if the disk has no room for the hidden states.
        """
        made = substitutes or {}
        spool = _Spool(samples, self._width, self._folder)
        with torch.inference_mode():
            calls = self._embed(samples, spool)
            layers = list(enumerate(self._layers))
            for index, layer in progress.track(layers, label=label, total=len(layers)):
                name = f"{self._backbone_name}.{index}"
                with self._weights.loaded(name, layer), _substitute(layer, name, made):
                    arguments, options = calls[index]
                    for number in range(len(samples)):
                        with self._explained():
                            hidden = _hidden(layer(spool[number], *arguments, **options))
                        spool[number] = hidden
                        after()
            with self._substitute_outside(made):
                self._finish(samples, spool, after, logits_kept, use_logits)

    @contextlib.contextmanager
    def loaded(self, linear: nn.Linear) -> Iterator[nn.Linear]:
        """One linear of the skeleton with its weight in memory, while this lasts.

        Raises:
            ModelError: if it cannot be read.
        """
        name = next(name for name, module in self.model.named_modules() if module is linear)
        with self._weights.loaded(name, linear):
            yield linear

    @property
    def _width(self) -> int:
        width: int = self.model.config.get_text_config().hidden_size
        return width

    def _embed(self, samples: torch.Tensor, spool: _Spool) -> list[_Call]:
        """Fill the spool with what the first layer is given; return how each layer is called."""
        calls: list[_Call] = []
        last = len(self._layers) - 1

        def stub(index: int, hidden: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
            if index == 0:
                spool[number] = hidden
            elif not torch.equal(hidden, spool[number]):
                raise self._not_a_list("something is computed between them")
            self._note_call(calls, index, (arguments, options))
            if index == last:
                raise _LayersDone
            return hidden

        head = self.model.get_output_embeddings()
        with contextlib.ExitStack() as stack:
            # The embedding, and what some families add to it: positions, a norm, a projection.
            for name, module in self._outside_layers():
                if module is not head:
                    stack.enter_context(self._weights.loaded(name, module))
            stack.enter_context(self._stub_attention(stub))
            for number, sample in enumerate(samples):  # noqa: B007 - the stub reads it
                with self._explained(), contextlib.suppress(_LayersDone):
                    self.model(input_ids=sample.unsqueeze(0), use_cache=False)
        if len(calls) != len(self._layers):
            raise self._not_a_list(f"{len(calls)} of {len(self._layers)} were called")
        return calls

    def _note_call(self, calls: list[_Call], index: int, call: _Call) -> None:
        """Remember how a layer is called for the first sample, and hold others against it."""
        if len(calls) <= index:
            calls.append(call)
        elif not _are_same(calls[index], call):
            raise self._not_a_list("they are given more of a text than its hidden states")

    def _not_a_list(self, why: str) -> ModelError:
        return ModelError(
            f"The layers of a model of type {self.model.config.model_type!r} cannot be run one by "
            f"one: {why}.",
            fix=_WHOLE,
        )

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Say what fails in the model's own code when its layers are not called as usual."""
        try:
            yield
        except (NmexportError, OSError, MemoryError, _LayersDone):
            raise
        except Exception as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise self._not_a_list(reason[:200].removesuffix(".")) from error

    def _finish(
        self,
        samples: torch.Tensor,
        spool: _Spool,
        after: Callable[[], None],
        logits_kept: int,
        use_logits: Callable[[int, torch.Tensor], None] | None,
    ) -> None:
        """From the final hidden states to the logits, as the model's own forward goes."""
        options = last_logits(self.model, logits_kept, samples.shape[1])
        options["use_cache"] = False

        def stub(index: int, hidden: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            return spool[number] if index == 0 else hidden

        with contextlib.ExitStack() as stack:
            embedding = self.model.get_input_embeddings()
            for name, module in self._outside_layers():
                if module is embedding:
                    continue
                stack.enter_context(self._weights.loaded(name, module))
            stack.enter_context(self._stub_attention(stub))
            for number in range(len(samples)):
                # Whatever is embedded here, the first layer returns the final hidden states.
                with self._explained():
                    logits = self.model(inputs_embeds=spool[number], **options).logits[0]
                after()
                if use_logits is not None:
                    use_logits(number, logits)

    def _outside_layers(self) -> Iterator[tuple[str, nn.Module]]:
        """Modules outside of the decoder layers whose weights are to be read."""
        for name, module in self.model.named_modules():
            read = any(parameter.is_meta for parameter in module.parameters(recurse=False))
            if read and not self._is_inside(name):
                yield name, module

    def _is_inside(self, name: str) -> bool:
        """Tell whether a module is part of a decoder layer."""
        return name.startswith(f"{self._backbone_name}.")

    @contextlib.contextmanager
    def _substitute_outside(
        self, substitutes: Mapping[str, Callable[[], nn.Module]]
    ) -> Iterator[None]:
        """The model with modules outside of its decoder layers exchanged, such as its head."""
        made = {name: make() for name, make in substitutes.items() if not self._is_inside(name)}
        with swapped(self.model, made):
            yield

    @contextlib.contextmanager
    def _stub_attention(self, stub: Callable[..., torch.Tensor]) -> Iterator[None]:
        """Layers that call `stub(index, hidden, ...)` in place of computing."""
        try:
            for index, layer in enumerate(self._layers):
                layer.forward = functools.partial(stub, index)
            yield
        finally:
            for layer in self._layers:
                del layer.forward


class _Weights:
    """Puts weights into modules of a skeleton and takes them out again."""

    def __init__(self, table: WeightTable, rounded: torch.dtype) -> None:
        self.table = table
        self._rounded = rounded

    @contextlib.contextmanager
    def loaded(self, name: str, module: nn.Module) -> Iterator[None]:
        """A module with its weights, in float32, while this lasts."""
        from accelerate.utils import set_module_tensor_to_device

        names = [own for own, _ in module.named_parameters()]
        try:
            for own in names:
                stored = self.table.read(f"{name}.{own}").to(self._rounded)
                # A copy, also of float32: a mapped file's alignment may change a product's bits.
                value = torch.empty(stored.shape, dtype=torch.float32).copy_(stored)
                set_module_tensor_to_device(module, own, "cpu", value=value)
                del stored, value
            yield
        finally:
            for own in names:
                set_module_tensor_to_device(module, own, "meta")
            return_freed_memory()


class _Spool:
    """Hidden states of all samples in a file of their own, `[samples, 1, length, width]`."""

    def __init__(self, samples: torch.Tensor, width: int, folder: Path | None) -> None:
        count, length = samples.shape
        self._states = torch.from_numpy(scratch_array((count, 1, length, width), folder))

    def __getitem__(self, number: int) -> torch.Tensor:
        return self._states[number].clone()

    def __setitem__(self, number: int, hidden: torch.Tensor) -> None:
        self._states[number].copy_(hidden)


def _decoder_layers(model: PreTrainedModel) -> tuple[str, Sequence[nn.Module]]:
    """Name and modules of the list of decoder layers."""
    layers = getattr(model.get_decoder(), "layers", None)
    for name, module in model.named_modules():
        if module is layers and isinstance(module, nn.ModuleList) and len(module):
            return name, list(module)
    raise ModelError(
        f"Model type {model.config.model_type} has no list of decoder layers to go through.",
        fix=_WHOLE,
    )


@contextlib.contextmanager
def _substitute(
    layer: nn.Module, name: str, substitutes: Mapping[str, Callable[[], nn.Module]]
) -> Iterator[None]:
    """The layer with modules of its own exchanged."""
    inside = f"{name}."
    made = {
        linear.removeprefix(inside): make()
        for linear, make in substitutes.items()
        if linear.startswith(inside)
    }
    with swapped(layer, made):
        yield


def _are_same(left: Any, right: Any) -> bool:
    """Tell whether all tensors among the arguments of two calls are the same."""
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(_are_same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(_are_same, left, right))
    return True


def _hidden(output: Any) -> torch.Tensor:
    """Hidden states among what a layer returns."""
    hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return hidden
