"""Estimate what every site costs alone from gradients: one backward pass a window for all of them.

To second order, a small change `d` of a site's input moves the predictions of a token by half of
`d F d`, F the Fisher information: `KL ~ (g d)^2 / 2` in expectation, where g is the gradient of the
log-likelihood of a token drawn from the model's own predictions. Positions of the changed input are
taken one by one: what the same change does at several of them together is left out. A trial runs
the model once for each site; this runs it once, forwards and backwards.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch

from nmexport.allocation.probe import Movement, RoundedSite, SparseInput, scored_positions
from nmexport.calibration.forward_passes import hooked
from nmexport.calibration.sensitivity import activations_carry_gradients, drawn_loss

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import nn
    from torch.utils.hooks import RemovableHandle

    from nmexport.allocation.probe import Trials
    from nmexport.calibration.sites import Site
    from nmexport.progress import Progress
    from nmexport.store.allocation import Choice


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
                hook
                for site, slopes in named
                for name in site.names
                for hook in _watch(name, model.get_submodule(name), slopes)
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
    """Slope of the log-likelihood along the change that each choice makes.

    A selection changes the site's input, a form of weights the outputs of its linears.
    """

    def __init__(self, trials: Mapping[Choice, SparseInput | RoundedSite], prompt: int) -> None:
        self._choices = {
            choice: trial for choice, trial in trials.items() if isinstance(trial, SparseInput)
        }
        self._rounded = {
            choice: trial for choice, trial in trials.items() if isinstance(trial, RoundedSite)
        }
        self._prompt = prompt
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
        self._add(self._changes or {}, gradient)

    def see_output(self, name: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Compute the changes of one linear's output `[1, S, O]`; returns it, to go on with."""
        if not self._rounded:
            return y
        with torch.no_grad():
            changes = {
                choice: rounded.modules[name](x.detach()) - y.detach()
                for choice, rounded in self._rounded.items()
            }
        tapped = y.view_as(y)
        tapped.register_hook(functools.partial(self._add, changes))  # type: ignore[no-untyped-call]
        return tapped

    def _add(self, changes: Mapping[Choice, torch.Tensor], gradient: torch.Tensor) -> None:
        for choice, change in changes.items():
            slope = (gradient * change).sum(dim=-1).double()
            self._slopes[choice] = self._slopes.get(choice, torch.zeros_like(slope)) + slope

    def squares(self, choice: Choice) -> float:
        """Sum the squared slopes of all positions; 0 where no gradient came."""
        return float(self._slopes.get(choice, torch.zeros(1)).square().sum())


def _watch(name: str, linear: nn.Module, slopes: _Slopes) -> Iterator[RemovableHandle]:
    def hook(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        del module
        slopes.see(arguments[0])
        # A view of its own: linears that share an input each see their own gradient.
        tapped = arguments[0].view_as(arguments[0])
        tapped.register_hook(slopes.add)
        return (tapped, *arguments[1:])

    def after(module: nn.Module, arguments: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        del module
        return slopes.see_output(name, arguments[0], output)

    yield linear.register_forward_pre_hook(hook)
    yield linear.register_forward_hook(after)


def _backward(
    model: Any, window: torch.Tensor, scored: torch.Tensor, generator: torch.Generator
) -> None:
    device = next(model.parameters()).device
    logits = model(input_ids=window.to(device).unsqueeze(0), use_cache=False).logits[0]
    loss = drawn_loss(logits[scored.to(device)], generator)
    loss.backward()  # type: ignore[no-untyped-call]
