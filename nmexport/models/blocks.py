"""A causal language model whose decoder layers are run one after another, each over all samples.

Hidden states of all samples wait in a file between layers. Each layer computes exactly what it
computes in the whole model, in the same order of samples: results are the same bits.

The model's own forward is run twice with its layers stubbed: first to embed the samples and to
learn what each layer is called with (masks, rotary embeddings: the same for every sample, since
samples have one length and no padding), last to take the final hidden states to the logits.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import torch
from torch import nn

from nmexport.errors import ModelError, NmexportError
from nmexport.models.hidden_states import HiddenStates
from nmexport.models.last_logits import last_logits
from nmexport.models.swap import swapped

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from transformers import PreTrainedModel

    from nmexport.progress import Progress

WHOLE = "use --offload never on a machine with more memory, or place the model on a GPU"


Call: TypeAlias = "tuple[tuple[Any, ...], dict[str, object]]"
"""Arguments of a layer other than its hidden states."""


class _LayersDone(Exception):
    """All layers were called."""


class BlockWeights(Protocol):
    """Weights that are in memory only while they are used."""

    def loaded(self, name: str, module: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Hold the weights of the module of this name in memory."""
        ...


class _Resident:
    """Weights that always are in memory."""

    def loaded(self, name: str, module: nn.Module) -> contextlib.AbstractContextManager[None]:
        del name, module
        return contextlib.nullcontext()


@dataclass(frozen=True)
class Block:
    """One decoder layer with its weights in memory."""

    index: int
    name: str
    """The layer's module name in the model."""
    layer: nn.Module
    _call: Call
    _explained: Callable[[], contextlib.AbstractContextManager[None]]

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Run the layer on hidden states `[B, L, H]`.

        Raises:
            ModelError: if the layer is not called as a list of layers is.
        """
        arguments, options = self._call
        with self._explained():
            return _hidden(self.layer(hidden, *arguments, **options))


class DecoderBlocks:
    """A causal LM that is run layer by layer."""

    def __init__(
        self, model: Any, *, weights: BlockWeights | None = None, folder: Path | None = None
    ) -> None:
        """Find the decoder layers.

        Args:
            model: A Hugging Face causal language model in evaluation mode, or its skeleton.
            weights: Brings a skeleton's weights; None where they are in memory.
            folder: On a disk with room for the hidden states of all samples; None is the system's.

        Raises:
            ModelError: if it has no list of decoder layers.
        """
        self.model = model
        self._backbone_name, self._layers = _decoder_layers(model)
        self._weights = weights or _Resident()
        self.folder = folder
        """Folder of the files that hold hidden states between layers."""

    def __len__(self) -> int:
        """Return the number of decoder layers."""
        return len(self._layers)

    @property
    def device(self) -> torch.device:
        """The device that the layers compute on."""
        device = next(self.model.parameters()).device
        return torch.device("cpu") if device.type == "meta" else device

    def names(self) -> list[str]:
        """Names of the decoder layers in the model."""
        return [f"{self._backbone_name}.{index}" for index in range(len(self._layers))]

    def states(self, samples: torch.Tensor) -> HiddenStates:
        """Allocate the hidden states of samples `[samples, length]`.

        Raises:
            OSError: if the disk has no room for them.
        """
        return HiddenStates(samples, self.width, self.folder)

    def blocks(self, calls: Sequence[Call]) -> Iterator[Block]:
        """Yield each layer in turn, its weights in memory until the next one.

        Args:
            calls: What `embed` returned.

        Raises:
            ModelError: if a weight cannot be read.
        """
        for index in range(len(self)):
            with self.block(index, calls[index]) as block:
                yield block

    @contextlib.contextmanager
    def block(self, index: int, call: Call) -> Iterator[Block]:
        """Hold one layer's weights in memory; see `blocks`."""
        name, layer = f"{self._backbone_name}.{index}", self._layers[index]
        with self._weights.loaded(name, layer):
            yield Block(index, name, layer, call, self._explained)

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
        """Run samples through all layers; hooks on the model's modules run as usual.

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
        states = self.states(samples)
        with torch.inference_mode():
            blocks = self.blocks(self.embed(samples, states))
            for block in progress.track(blocks, label=label, total=len(self)):
                with _substitute(block.layer, block.name, made):
                    for number in range(len(samples)):
                        states[number] = block(states[number])
                        after()
            with self._substitute_outside(made):
                self.finish(states, logits_kept=logits_kept, use_logits=use_logits, after=after)

    @property
    def width(self) -> int:
        """Elements of a hidden state."""
        width: int = self.model.config.get_text_config().hidden_size
        return width

    def embed(self, samples: torch.Tensor, states: HiddenStates) -> list[Call]:
        """Store the first layer's input; return how each layer is called.

        Args:
            samples: `[samples, length]` int64 token ids.
            states: Filled.

        Raises:
            ModelError: if the layers of this architecture are not called as a list of layers is.
        """
        calls: list[Call] = []
        last = len(self._layers) - 1

        def stub(index: int, hidden: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
            if index == 0:
                states[number] = hidden
            elif not torch.equal(hidden.cpu(), states[number]):
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
                    self.model(input_ids=sample.unsqueeze(0).to(self.device), use_cache=False)
        if len(calls) != len(self._layers):
            raise self._not_a_list(f"{len(calls)} of {len(self._layers)} were called")
        return calls

    def _note_call(self, calls: list[Call], index: int, call: Call) -> None:
        """Record how a layer is called for the first sample; other samples must call it alike."""
        if len(calls) <= index:
            calls.append(call)
        elif not _are_same(calls[index], call):
            raise self._not_a_list("they are given more of a text than its hidden states")

    def _not_a_list(self, why: str) -> ModelError:
        return ModelError(
            f"The layers of a model of type {self.model.config.model_type!r} cannot be run one by "
            f"one: {why}.",
            fix=WHOLE,
        )

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Explain failures of the model's own code when its layers are not called as usual."""
        try:
            yield
        except (NmexportError, OSError, MemoryError, _LayersDone):
            raise
        except Exception as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise self._not_a_list(reason[:200].removesuffix(".")) from error

    def finish(
        self,
        states: HiddenStates,
        *,
        rows: Iterable[int] | None = None,
        logits_kept: int = 0,
        use_logits: Callable[[int, torch.Tensor], None] | None = None,
        after: Callable[[], None] = lambda: None,
    ) -> None:
        """Compute logits from the final hidden states, as the model's own forward does.

        Args:
            states: Of all samples, behind the last layer.
            rows: Samples to take; None takes all.
            logits_kept: Positions at the end of a sample whose logits are computed; 0 is all.
            use_logits: Given each sample's index and logits `[kept, V]`.
            after: Called after each sample.

        Raises:
            ModelError: as `embed`.
        """
        chosen = range(len(states)) if rows is None else rows
        for number, _, logits in self.logits(states, chosen, kept=logits_kept):
            after()
            if use_logits is not None:
                use_logits(number, logits)

    def logits(
        self, states: HiddenStates, rows: Iterable[int], *, kept: int
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Yield each sample, its final hidden states `[1, L, H]` and its logits `[kept, V]`.

        Where gradients are enabled, the hidden states are a leaf that takes one.
        """
        options = last_logits(self.model, kept, states[0].shape[1])
        options["use_cache"] = False

        def stub(index: int, hidden: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            return final if index == 0 else hidden

        with contextlib.ExitStack() as stack:
            embedding = self.model.get_input_embeddings()
            for name, module in self._outside_layers():
                if module is embedding:
                    continue
                stack.enter_context(self._weights.loaded(name, module))
            stack.enter_context(self._stub_attention(stub))
            for number in rows:
                # Whatever is embedded here, the first layer returns the final hidden states.
                final = states[number].to(self.device).requires_grad_(torch.is_grad_enabled())
                with self._explained():
                    logits = self.model(inputs_embeds=final, **options).logits[0]
                yield number, final, logits

    def _outside_layers(self) -> Iterator[tuple[str, nn.Module]]:
        """List modules outside of the decoder layers that have weights."""
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
        """Replace modules outside of the decoder layers, such as the head."""
        made = {name: make() for name, make in substitutes.items() if not self._is_inside(name)}
        with swapped(self.model, made):
            yield

    @contextlib.contextmanager
    def _stub_attention(self, stub: Callable[..., torch.Tensor]) -> Iterator[None]:
        """Make layers call `stub(index, hidden, ...)` instead of computing."""
        try:
            for index, layer in enumerate(self._layers):
                layer.forward = functools.partial(stub, index)
            yield
        finally:
            for layer in self._layers:
                del layer.forward


def _decoder_layers(model: PreTrainedModel) -> tuple[str, Sequence[nn.Module]]:
    """Name and modules of the list of decoder layers."""
    layers = getattr(model.get_decoder(), "layers", None)
    for name, module in model.named_modules():
        if module is layers and isinstance(module, nn.ModuleList) and len(module):
            return name, list(module)
    raise ModelError(
        f"Model type {model.config.model_type} has no list of decoder layers to go through.",
        fix=WHOLE,
    )


@contextlib.contextmanager
def _substitute(
    layer: nn.Module, name: str, substitutes: Mapping[str, Callable[[], nn.Module]]
) -> Iterator[None]:
    """Replace modules of the layer."""
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
    """Pick the hidden states from a layer's results."""
    hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return hidden
