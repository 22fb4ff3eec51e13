"""Measures how much predictions depend on each input channel of each linear.

The square root of the diagonal of the Fisher information: gradients of the log-likelihood of tokens
drawn from the model's own predictions, so that no label is needed. One forward and one backward
pass over a few samples; a model that runs layer by layer computes each layer once more for it.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch

from nmexport.calibration.forward_passes import hooked
from nmexport.models.backward import backward

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import nn
    from torch.utils.hooks import RemovableHandle

    from nmexport.models.blocks import DecoderBlocks
    from nmexport.progress import Progress


def gather_sensitivities(
    model: Any,
    linears: Mapping[str, nn.Module],
    samples: torch.Tensor,
    *,
    progress: Progress,
    seed: int = 0,
    layerwise: DecoderBlocks | None = None,
) -> dict[str, torch.Tensor]:
    """Measure the root mean square gradient of each input channel.

    Args:
        model: A dense Hugging Face causal language model in evaluation mode.
        linears: Its linears to watch, by name.
        samples: `[samples, length]` int64 token ids.
        progress: Counts samples.
        seed: Of the drawn tokens.
        layerwise: Runs the model with one layer in memory at a time; None runs it whole.

    Returns:
        `[K]` float64 by name; a linear that no token reached is absent.
    """
    squares: dict[str, torch.Tensor] = {}

    def watch(name: str, linear: nn.Module) -> RemovableHandle:
        def gather(gradient: torch.Tensor) -> None:
            sums = gradient.reshape(-1, gradient.shape[-1]).double().square().sum(dim=0).cpu()
            squares[name] = squares[name] + sums if name in squares else sums

        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            del module
            if not torch.is_grad_enabled():
                return arguments  # layer by layer, the way there
            # A view of its own: linears that share an input each see their own gradient.
            tapped = arguments[0].view_as(arguments[0])
            tapped.register_hook(gather)
            return (tapped, *arguments[1:])

        return linear.register_forward_pre_hook(hook)

    generator = torch.Generator().manual_seed(seed)
    label = "fold: sensitivities"
    with hooked(watch(*item) for item in linears.items()):
        if layerwise is None:
            with activations_carry_gradients(model):
                for sample in progress.track(samples, label=label, total=len(samples)):
                    drawn_loss(_logits(model, sample), generator).backward()  # type: ignore[no-untyped-call]
        else:
            backward(
                layerwise,
                samples,
                lambda logits: drawn_loss(logits, generator),
                progress=progress,
                label=label,
            )
    tokens = samples.numel()
    return {name: (squares[name] / tokens).sqrt() for name in linears if name in squares}


@contextlib.contextmanager
def activations_carry_gradients(model: Any) -> Iterator[None]:
    """Let gradients flow through activations from the first one on; parameters need none."""
    needed = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in needed:
        parameter.requires_grad_(False)
    handle = model.get_input_embeddings().register_forward_hook(_start_gradients)
    try:
        with torch.enable_grad():
            yield
    finally:
        handle.remove()
        for parameter in needed:
            parameter.requires_grad_(True)


def _start_gradients(module: nn.Module, arguments: object, output: torch.Tensor) -> torch.Tensor:
    del module, arguments
    return output.detach().requires_grad_(torch.is_grad_enabled())


def _draw_tokens(probabilities: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draw a token for each row of `[T, V]`: `[T, 1]`.

    By the inverse of the distribution function: `torch.multinomial` draws a number for every token
    of the vocabulary, which takes half as long as the model.
    """
    cumulative = probabilities.cumsum(dim=-1)
    total = cumulative[:, -1:]
    drawn = total * torch.rand(len(cumulative), 1, generator=generator)
    below = torch.nextafter(total, torch.zeros_like(total))  # the product may round to total
    return torch.searchsorted(cumulative, torch.minimum(drawn, below), right=True)


def _logits(model: Any, sample: torch.Tensor) -> torch.Tensor:
    """Compute the logits `[length, V]` of one sample `[length]`."""
    device = next(model.parameters()).device
    logits: torch.Tensor = model(input_ids=sample.to(device).unsqueeze(0), use_cache=False).logits[
        0
    ]
    return logits


def drawn_loss(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Compute the negative log-likelihood of tokens drawn from logits `[T, V]` themselves."""
    logits = logits.float()
    drawn = _draw_tokens(logits.detach().softmax(dim=-1).cpu(), generator)
    return torch.nn.functional.cross_entropy(
        logits, drawn.squeeze(1).to(logits.device), reduction="sum"
    )
