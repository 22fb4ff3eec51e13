"""Forward passes of the dense model over samples, with hooks that feed observers.

One batch of activations lives at a time: hooks reduce each input to sums as it passes.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from nmexport.calibration.local_error import ErrorObserver, observe_error
from nmexport.calibration.observers import ChannelObserver, ChannelSums
from nmexport.calibration.products import fast_products
from nmexport.errors import ModelError
from nmexport.models.last_logits import last_logits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import nn
    from torch.utils.hooks import RemovableHandle

    from nmexport.models.layerwise import LayerwiseModel
    from nmexport.progress import Progress
    from nmexport.sparsity.linear import Behaviour, Constants
    from nmexport.sparsity.statistics import ChannelStatistics

# Positions of a sample whose logits are computed: the output embedding's input needs no more than
# this to be known.
_LOGITS_KEPT = 32


# Free GPU memory that a model is moved into, in sizes of the model: activations need room too.
_ROOM = 1.25


def on_best_device(model: Any) -> Any:
    """Move the model to a GPU, if there is one that it fits into."""
    if torch.cuda.is_available():
        size = sum(parameter.nbytes for parameter in model.parameters())
        free, _ = torch.cuda.mem_get_info()
        if free > _ROOM * size:
            return model.to("cuda")
    return model


class _SharedInput:
    """Sums of the last input: q, k and v read the same tensor."""

    def __init__(self) -> None:
        self._input: torch.Tensor | None = None
        self._sums: ChannelSums | None = None

    def sums(self, x: torch.Tensor) -> ChannelSums:
        if self._sums is None or x is not self._input:
            self._input, self._sums = x, ChannelSums.of(x)
        return self._sums

    def forget(self) -> None:
        self._input = self._sums = None


def run_samples(
    model: nn.Module,
    samples: torch.Tensor,
    *,
    progress: Progress,
    label: str,
    layerwise: LayerwiseModel | None = None,
    after: Callable[[], None] = lambda: None,
) -> None:
    """Run a model over samples, to feed its hooks.

    Args:
        model: A Hugging Face causal language model in evaluation mode.
        samples: `[samples, length]` int64 token ids.
        progress: Counts samples, or layers where they run one by one.
        label: What it counts them under.
        layerwise: Runs the model with one layer in memory at a time; None runs it whole.
        after: Called after each sample, and then in each layer.
    """
    if layerwise is not None:
        layerwise.run(
            samples,
            progress=progress,
            label=label,
            after=after,
            logits_kept=_LOGITS_KEPT,
        )
        return
    for sample in progress.track(samples, label=label, total=len(samples)):
        forward_sample(model, sample)
        after()


@dataclass(frozen=True, kw_only=True)
class DenseRun:
    """A dense model to run over text, and the linears that are watched."""

    model: nn.Module
    """A Hugging Face causal language model in evaluation mode."""
    linears: Mapping[str, nn.Linear]
    """Linears to watch, by name."""
    constants: Mapping[str, Constants]
    """Their constants of the first pass, by name."""
    behaviours: Mapping[str, Behaviour]
    """The behaviour of each sparse linear, by name."""
    samples: torch.Tensor
    """`[samples, length]` int64 token ids."""
    progress: Progress
    layerwise: LayerwiseModel | None = None
    """Runs the model with one layer in memory at a time; None runs it whole."""

    def forward(self, label: str) -> None:
        """Run the model over the samples, to feed its hooks."""
        run_samples(
            self.model,
            self.samples,
            progress=self.progress,
            label=label,
            layerwise=self.layerwise,
        )


def gather_channel_statistics(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    samples: torch.Tensor,
    *,
    progress: Progress,
    layerwise: LayerwiseModel | None = None,
) -> dict[str, ChannelStatistics]:
    """Run the first pass: statistics of each linear's input channels.

    Args:
        model: A dense Hugging Face causal language model in evaluation mode.
        linears: Its linears to watch, by name.
        samples: `[samples, length]` int64 token ids.
        progress: Counts samples.
        layerwise: Runs the model with one layer in memory at a time; None runs it whole.

    Returns:
        Statistics by name; a linear that no token reached is absent.

    Raises:
        ModelError: if activations are not finite.
    """
    observers = {name: ChannelObserver() for name in linears}
    shared = _SharedInput()

    def watch(name: str) -> RemovableHandle:
        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            del module
            observers[name].update(shared.sums(arguments[0]))

        return model.get_submodule(name).register_forward_pre_hook(hook)

    # What averages over so many tokens needs no float32 products.
    products = fast_products(model) if layerwise is None else contextlib.nullcontext()
    with products, hooked(watch(name) for name in linears):
        run_samples(
            model,
            samples,
            progress=progress,
            label="calibrate: statistics",
            layerwise=layerwise,
            after=shared.forget,
        )
    by_name = {name: observer.statistics() for name, observer in observers.items()}
    statistics = {name: gathered for name, gathered in by_name.items() if gathered is not None}
    _check_finite(statistics)
    return statistics


def gather_errors(run: DenseRun) -> dict[str, ErrorObserver]:
    """Run the second pass: the error of selection in each linear, and the static variance."""
    observers = {name: ErrorObserver() for name in run.linears}

    def watch(name: str, linear: nn.Linear) -> RemovableHandle:
        def hook(module: nn.Module, arguments: tuple[Any, ...], output: torch.Tensor) -> None:
            del module
            observers[name].merge(
                observe_error(
                    linear, run.behaviours[name], run.constants[name], arguments[0], output
                )
            )

        return linear.register_forward_hook(hook)

    with hooked(watch(name, linear) for name, linear in run.linears.items()):
        run.forward("fold: local errors")
    return observers


@contextlib.contextmanager
def hooked(handles: Iterator[RemovableHandle]) -> Iterator[None]:
    """Remove the hooks afterwards."""
    placed: list[RemovableHandle] = []
    try:
        placed.extend(handles)
        yield
    finally:
        for handle in placed:
            handle.remove()


def forward_sample(model: nn.Module, sample: torch.Tensor) -> None:
    """Run one sample `[length]` through the model, without a cache."""
    device = next(model.parameters()).device
    options = last_logits(model, _LOGITS_KEPT, len(sample))
    with torch.inference_mode():
        model(input_ids=sample.to(device).unsqueeze(0), use_cache=False, **options)


def _check_finite(statistics: Mapping[str, ChannelStatistics]) -> None:
    for name, channels in statistics.items():
        if not bool(torch.isfinite(channels.rms).all()):
            raise ModelError(
                f"The input of {name} is not finite on the calibration samples.",
                allowed="a model whose activations are finite in its calibration dtype",
                fix="check the weights with the dense model, or calibrate in --dtype float32",
            )
