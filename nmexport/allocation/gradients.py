"""Estimate what every site costs alone from gradients: one backward pass a window for all of them.

To second order, a small change `d` of a site's input moves the predictions of a token by half of
`d F d`, F the Fisher information: `KL ~ (g d)^2 / 2` in expectation, where g is the gradient of the
log-likelihood of a token drawn from the model's own predictions. Positions of the changed input are
taken one by one: what the same change does at several of them together is left out. A trial runs
the model once for each site; this runs it once, forwards and backwards.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from nmexport.allocation.probe import Movement, scored_positions
from nmexport.calibration.forward_passes import hooked
from nmexport.calibration.sensitivity import activations_carry_gradients, drawn_loss

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn
    from torch.utils.hooks import RemovableHandle

    from nmexport.allocation.probe import SparseInput
    from nmexport.calibration.sites import Site
    from nmexport.progress import Progress
    from nmexport.store.allocation import Choice

    Trials = Mapping[Site, Mapping[Choice, SparseInput]]


def estimate_alone(
    model: Any,
    windows: torch.Tensor,
    trials: Trials,
    *,
    prompt: int,
    progress: Progress,
    seed: int = 0,
) -> dict[Site, dict[Choice, Movement]]:
    """Estimate the divergence that each choice causes alone.

    Args:
        model: A dense Hugging Face causal language model in evaluation mode; left as it is.
        windows: `[W, L]` int64 token ids, L at least 2.
        trials: What to try, by site.
        prompt: Tokens of a window that count as its prompt and are not scored.
        progress: Counts windows.
        seed: Of the drawn tokens.

    Returns:
        Divergences, window by window, in nats a token. The rise of the likelihood of the text's own
        tokens is not estimated: it is 0.
    """
    vocabulary = model.config.get_text_config().vocab_size
    scored = scored_positions(windows, prompt, vocabulary)
    generator = torch.Generator().manual_seed(seed)
    seen: dict[Site, dict[Choice, list[float]]] = {
        site: {choice: [] for choice in choices} for site, choices in trials.items()
    }
    label = "fold: costs of sites, by gradient"
    with activations_carry_gradients(model):
        for window in progress.track(windows, label=label, total=len(windows)):
            sites = [_Slopes(choices, prompt) for choices in trials.values()]
            named = zip(trials, sites, strict=True)
            with hooked(
                _watch(model.get_submodule(name), slopes)
                for site, slopes in named
                for name in site.names
            ):
                _backward(model, window, scored, generator)
            for site, slopes in zip(trials, sites, strict=True):
                for choice in trials[site]:
                    seen[site][choice].append(slopes.squares(choice) / (2 * len(scored)))
    return {
        site: {
            choice: Movement(kl=tuple(kl), nll=(0.0,) * len(kl)) for choice, kl in choices.items()
        }
        for site, choices in seen.items()
    }


class _Slopes:
    """Slope of the log-likelihood along the change that each choice makes to a site's input."""

    def __init__(self, choices: Mapping[Choice, SparseInput], prompt: int) -> None:
        self._choices, self._prompt = choices, prompt
        self._changes: dict[Choice, torch.Tensor] | None = None
        self._slopes: dict[Choice, torch.Tensor] = {}

    def see(self, x: torch.Tensor) -> None:
        """Compute the changes of an input `[1, S, K]`: the same for all linears of the site."""
        if self._changes is None:
            with torch.no_grad():
                self._changes = {
                    choice: sparse(x.detach(), prompt=self._prompt) - x.detach()
                    for choice, sparse in self._choices.items()
                }

    def add(self, gradient: torch.Tensor) -> None:
        """Add what one linear's gradient `[1, S, K]` makes of the changes."""
        for choice, change in (self._changes or {}).items():
            slope = (gradient * change).sum(dim=-1).double()
            self._slopes[choice] = self._slopes.get(choice, torch.zeros_like(slope)) + slope

    def squares(self, choice: Choice) -> float:
        """Sum the squared slopes of all positions; 0 where no gradient came."""
        return float(self._slopes.get(choice, torch.zeros(1)).square().sum())


def _watch(linear: nn.Module, slopes: _Slopes) -> RemovableHandle:
    def hook(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        del module
        slopes.see(arguments[0])
        # A view of its own: linears that share an input each see their own gradient.
        tapped = arguments[0].view_as(arguments[0])
        tapped.register_hook(slopes.add)
        return (tapped, *arguments[1:])

    return linear.register_forward_pre_hook(hook)


def _backward(
    model: Any, window: torch.Tensor, scored: torch.Tensor, generator: torch.Generator
) -> None:
    device = next(model.parameters()).device
    logits = model(input_ids=window.to(device).unsqueeze(0), use_cache=False).logits[0]
    loss = drawn_loss(logits[scored.to(device)], generator)
    loss.backward()  # type: ignore[no-untyped-call]
