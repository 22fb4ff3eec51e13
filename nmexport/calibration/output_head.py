"""How a model's last hidden states become logits: the part of a loss that looks at few tokens.

Families scale logits, cap them, or add a bias. What is computed here is held against the model's
own logits once, so that a family that does something else is refused rather than learned wrongly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import torch

from nmexport.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Callable

# Both sides are sums in float32 over the same hidden states.
_AGREES = 1e-3


@dataclass(frozen=True, kw_only=True)
class OutputHead:
    """Logits are `cap(factor * (hidden @ weight^T + bias))`."""

    weight: torch.Tensor
    """`[V, H]`, in the type of the product."""
    bias: torch.Tensor | None = None
    """`[V]` float32."""
    factor: float = 1.0
    softcap: float | None = None
    """Logits x become `softcap * tanh(x / softcap)`."""
    log_counts: torch.Tensor | None = None
    """`[V]` float32, added to the logits: how many tokens each one stands for, as a logarithm."""

    @classmethod
    def of(cls, model: Any) -> Self:
        """Return the model's own, over its whole vocabulary.

        Args:
            model: A Hugging Face causal language model.
        """
        layer = model.get_output_embeddings()
        bias = getattr(layer, "bias", None)
        config = model.config.get_text_config()
        return cls(
            weight=layer.weight.detach(),
            bias=None if bias is None else bias.detach().float(),
            factor=_factor(config),
            softcap=getattr(config, "final_logit_softcapping", None),
        )

    def to(self, dtype: torch.dtype) -> OutputHead:
        """Convert to products in another type."""
        return replace(self, weight=self.weight.to(dtype))

    def rows(self, tokens: torch.Tensor) -> OutputHead:
        """Restrict the head to these tokens: `[V']` of their ids."""
        return replace(
            self,
            weight=self.weight[tokens].contiguous(),
            bias=None if self.bias is None else self.bias[tokens],
        )

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[T, H]` -> `[T, V]` float32."""
        logits = (hidden.to(self.weight.dtype) @ self.weight.t()).float()
        if self.bias is not None:
            logits = logits + self.bias
        if self.factor != 1.0:
            logits = self.factor * logits
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        if self.log_counts is not None:
            logits = logits + self.log_counts
        return logits


class SampledHead:
    """A head over the likeliest tokens and, other ones in each step, a few of the rest.

    A sparse model errs by giving probability to tokens that the dense one never thinks of. Where a
    loss looks at likely tokens alone that goes unseen, and all the more on text of other kinds than
    what was learned from. Each of the few stands for as many tokens as it was drawn from, so that
    sums over them estimate those over the whole vocabulary.
    """

    def __init__(
        self, head: OutputHead, mass: torch.Tensor, *, likeliest: int, drawn: int, seed: int
    ) -> None:
        """Choose the tokens that every step has.

        Args:
            head: Over the whole vocabulary.
            mass: `[V]`, how much probability the dense model gives each token.
            likeliest: How many tokens are always there.
            drawn: How many of the others are, in each step.
            seed: Of the draw.
        """
        self._head, self._seed = head, seed
        order = mass.argsort(descending=True, stable=True)
        self._always = order[:likeliest].sort().values
        self._others = order[likeliest:].sort().values
        self._drawn = min(drawn, len(self._others))
        self._fixed = None if self._drawn else head.rows(self._always)

    def of_step(self, step: int) -> OutputHead:
        """Restrict to the tokens of one step."""
        if self._fixed is not None:
            return self._fixed
        generator = torch.Generator().manual_seed(self._seed + step)
        chosen = torch.randperm(len(self._others), generator=generator)[: self._drawn]
        tokens = torch.cat([self._always, self._others[chosen.to(self._others.device)]])
        log_counts = torch.zeros(len(tokens), device=tokens.device)
        log_counts[len(self._always) :] = math.log(len(self._others) / self._drawn)
        return replace(self._head.rows(tokens), log_counts=log_counts)


def check_head(
    model: Any, head: OutputHead, hidden_of: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """Compare a head over the whole vocabulary with the model's own logits.

    Args:
        model: The model, computing what `hidden_of` computes.
        head: Of the model, with products in the type of its weights.
        hidden_of: Last hidden states `[1, L, H]` of ids `[1, L]`.

    Raises:
        ModelError: if they differ.
    """
    device = next(model.parameters()).device
    ids = torch.arange(min(8, head.weight.shape[0]), device=device)[None]
    with torch.no_grad():
        own = model(input_ids=ids, use_cache=False).logits[0].float()
        computed = head.logits(hidden_of(ids)[0])
    if own.shape == computed.shape and torch.allclose(
        computed, own, rtol=0.0, atol=_AGREES * float(own.abs().max())
    ):
        return
    raise ModelError(
        f"{type(model).__name__} makes its logits in a way that learning does not know: they are "
        "not those of the output embedding and the last hidden states.",
        allowed="a bias, a factor (logits_scaling, logit_scale, lm_head_multiplier) and a soft cap",
        fix="learn nothing: --mitigation var, s-pts, s-var or d-pts",
    )


def _factor(config: Any) -> float:
    """Return the factor on logits: Granite divides, Cohere and Falcon-H1 multiply."""
    divisor = getattr(config, "logits_scaling", None) or 1.0
    factor = 1.0 / divisor
    for name in ("logit_scale", "lm_head_multiplier"):
        factor *= getattr(config, name, None) or 1.0
    return float(factor)
