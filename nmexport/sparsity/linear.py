"""The sparse linear in torch: `NMLinear` of the op contract, as every executor computes it.

A linear selects through an `InputSite`, which linears that read the same tensor may share.
`nmexport.sparsity.fold` makes its tensors of a dense linear and calibrated constants;
`nmexport.sparsity.learned` is the form whose constants are parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from nmexport.sparsity.lanes import LaneSelector
from nmexport.sparsity.mask import scores_of
from nmexport.sparsity.quantisation import dequantised, rounded

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nmexport.choices import Phase
    from nmexport.sparsity.pattern import NMPattern

# Rows a thread below which MKL multiplies in another order: 4 on one thread, 8 on two.
_LEAST_ROWS = 8
VARIANCE_FLOOR = 1e-12  # op contract: the least variance of the kept values that is divided by
# Tensors that a linear holds itself; shift and score_scale belong to its site.
_OWN_TENSORS = (
    "W",
    "bias",
    "shift_weight",
    "channel_order",
    "weight_scale",
    "value_scale",
    "weight_zero_point",
    "dense_scale",
    "dense_bias",
    "remainder_in",
    "remainder_out",
)


@dataclass(frozen=True, kw_only=True)
class Behaviour:
    """Computation of one linear at run time, apart from its constants."""

    pattern: NMPattern
    dynamic_shift: bool = False
    variance_correction: bool = False
    phase: Phase = "all"
    activation_bits: int = 0
    """8 rounds what meets a weight of integers; 0 leaves it float."""
    activation_block: int = 32
    """Channels of a token that are rounded with one scale."""


@dataclass(frozen=True)
class Remainder:
    """R-Sparse (arXiv 2504.19449): A B ~ W^T, applied to all channels beside the kept ones."""

    inner: torch.Tensor
    """A `[K, r]` float32."""
    outer: torch.Tensor
    """B `[r, O]` float32."""


@dataclass(frozen=True, kw_only=True)
class Constants:
    """Calibrated constants of one linear in X's own channel order, unfolded; None is absent."""

    score_scale: torch.Tensor | None = None
    """`[K]` float32."""
    channel_order: torch.Tensor | None = None
    """`[K]` int32."""
    shift: torch.Tensor | None = None
    """`[1]` or `[K]` float32, subtracted before selection and added back after it."""
    nu: float | None = None
    """Static variance correction of the kept values."""
    remainder: Remainder | None = None
    """Low-rank part of the weight that meets every channel."""


class Selected(NamedTuple):
    """One input, and what is kept of it."""

    tokens: torch.Tensor
    """`[T, K]` float32."""
    eta: torch.Tensor
    """Return the shift to subtract: `[T, 1]` per token, `[K]` per channel, or `[1]`."""
    keep: torch.Tensor | None
    """`[T, K]` uint8, 1 where kept: a product with it takes half as long as with bool. None keeps
    everything."""
    nu: torch.Tensor | None
    """`[T, 1]`, factor of the kept values."""


class InputSite(nn.Module):
    """Shift and kept channels, shared by all linears of one input."""

    eta: torch.Tensor
    score_scale: torch.Tensor | None

    def __init__(
        self,
        behaviour: Behaviour,
        constants: Constants,
        channels: int,
        *,
        device: torch.device | None = None,
    ) -> None:
        """Prepare the selection.

        Args:
            behaviour: Pattern and per-token corrections; the phase is the caller's business.
            constants: Shift, score scale and channel order are used.
            channels: K.
            device: Where; None is where the constants are.
        """
        super().__init__()
        self.behaviour, self.channels = behaviour, channels
        shift = torch.zeros(1) if constants.shift is None else constants.shift
        scale = constants.score_scale
        self.register_buffer("eta", shift.to(device))
        self.register_buffer("score_scale", None if scale is None else scale.to(device))
        self._keep = LaneSelector(behaviour.pattern, channels, constants.channel_order)

    def select(self, x: torch.Tensor, *, sparse: bool = True) -> Selected:
        """Shift an input `[..., K]` and choose what to keep; all of it unless `sparse`."""
        tokens = x.reshape(-1, self.channels).float()
        eta = self._eta(tokens)
        if not sparse:
            return Selected(tokens, eta, None, None)
        with torch.no_grad():
            z = tokens - eta
            keep = self._keep(scores_of(z, self._ranking_scale())).view(torch.uint8)
            corrects = self.behaviour.variance_correction
            nu = variance_ratio(z, z * keep) if corrects else None
        return Selected(tokens, eta, keep, nu)

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        """Score an input `[..., K]` for selection: `[T, K]`."""
        tokens = x.reshape(-1, self.channels).float()
        return scores_of(tokens - self._eta(tokens), self._ranking_scale())

    def _ranking_scale(self) -> torch.Tensor | None:
        """`[K]` float32 that magnitudes are multiplied by."""
        return self.score_scale

    def _eta(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens.mean(dim=-1, keepdim=True) if self.behaviour.dynamic_shift else self.eta


class SparseLinear(nn.Module):
    """NMLinear of the op contract, and beside it the product of a remainder."""

    W: torch.Tensor
    bias: torch.Tensor | None
    shift_weight: torch.Tensor | None
    channel_order: torch.Tensor | None
    weight_scale: torch.Tensor | None
    value_scale: torch.Tensor | None
    weight_zero_point: torch.Tensor | None
    dense_scale: torch.Tensor | None
    dense_bias: torch.Tensor | None
    remainder_in: torch.Tensor | None
    remainder_out: torch.Tensor | None

    def __init__(
        self,
        behaviour: Behaviour,
        tensors: Mapping[str, torch.Tensor],
        *,
        site: InputSite | None = None,
        prompt: int | None = None,
    ) -> None:
        """Hold the op's attributes and inputs.

        Args:
            behaviour: The op's attributes.
            tensors: `W [K, O]`, and where present the op's other inputs by their names; besides
                `remainder_in [K, r]`, in X's own channel order, and `remainder_out [r, O]`.
            site: Selects in place of the tensors' own shift and score scale.
            prompt: Given whole sequences, how many of their tokens count as prefill; the others
                count as decoded one by one. None takes the phase from the length of a sequence.

        Raises:
            ValueError: if a static and a dynamic shift meet, or a dynamic one lacks its weight.
        """
        super().__init__()
        if site is None:
            site = _site_of(behaviour, tensors)
        self.behaviour, self.site, self.prompt = behaviour, site, prompt
        self.in_features, self.out_features = tensors["W"].shape
        for name in _OWN_TENSORS:
            self.register_buffer(name, tensors.get(name))

    def keep_mask(self, x: torch.Tensor) -> torch.Tensor:
        """Which channels of an input `[..., K]` are kept: bool `[..., K]`, in its own order."""
        keep = self.site.select(self._gathered(x), sparse=self._drops(x)).keep
        if keep is None:
            return torch.ones_like(x, dtype=torch.bool)
        return self._in_own_order(keep.view(torch.bool)).reshape(x.shape)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., K]` T -> `[..., O]` T: the op, and beside it the remainder's product."""
        y = self.op(x)
        if self.remainder_in is None or self.remainder_out is None:
            return y
        eta = self.site.select(self._gathered(x), sparse=False).eta
        if eta.shape[-1] > 1:  # by channel
            eta = self._in_own_order(eta)
        elif eta.ndim > 1:  # by token
            eta = eta.reshape(*x.shape[:-1], 1)
        z = x - eta.to(x.dtype)
        return y + token_product(token_product(z, self.remainder_in), self.remainder_out)

    def op(self, x: torch.Tensor) -> torch.Tensor:
        """NMLinear alone: `[..., K]` T -> `[..., O]` T, in float32 with one rounding at the end."""
        if self.prompt is None or self.behaviour.phase == "all":
            return self._in_phase(x, _phase_of(x))
        head, tail = x[..., : self.prompt, :], x[..., self.prompt :, :]
        return torch.cat([self._in_phase(head, "prefill"), self._in_phase(tail, "decode")], dim=-2)

    def extra_repr(self) -> str:
        """Describe the module for `print(model)`."""
        behaviour = self.behaviour
        sizes = f"{self.in_features}, {self.out_features}"
        return f"{sizes}, {behaviour.pattern}, phase={behaviour.phase}"

    def _in_phase(self, x: torch.Tensor, phase: Phase) -> torch.Tensor:
        """`[..., K]` T -> `[..., O]` T, of tokens of one phase."""
        if self.behaviour.phase in {"all", phase}:
            sparse = self._can_drop()
            y, bias = self._product(self.site.select(self._gathered(x), sparse=sparse)), self.bias
        else:
            y, bias = self._dense_product(self._gathered(x)), self.dense_bias
        if bias is not None:
            y = y + bias.float()
        return y.reshape(*x.shape[:-1], self.out_features).to(x.dtype)

    def _dense_product(self, x: torch.Tensor) -> torch.Tensor:
        """All but the bias of tokens that the phase excludes: `[T, O]` float32."""
        return self._weighted(x.reshape(-1, self.in_features).float(), self.dense_scale)

    def _product(self, selected: Selected) -> torch.Tensor:
        """All but the bias: `[T, O]` float32."""
        y = self._weighted(kept_values(selected), self.value_scale)
        if selected.nu is not None:
            y = selected.nu * y
        return y if self.shift_weight is None else y + selected.eta * self.shift_weight

    def _weighted(self, values: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        """`values [T, K]`, scaled and rounded, times the weight: `[T, O]` float32."""
        operand = values if scale is None else values * scale
        if self.behaviour.activation_bits:
            operand = rounded(operand, self.behaviour.activation_block)
        weight = dequantised(self.W, self.weight_scale, self.weight_zero_point)
        return token_product(operand, weight)

    def _drops(self, x: torch.Tensor) -> bool:
        """Tell whether any of this input `[..., S, K]` can be dropped."""
        return self._can_drop() and self.behaviour.phase in {"all", _phase_of(x)}

    def _can_drop(self) -> bool:
        return self.behaviour.pattern.n < self.behaviour.pattern.m

    def _gathered(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.channel_order is None else x[..., self.channel_order.long()]

    def _in_own_order(self, gathered: torch.Tensor) -> torch.Tensor:
        if self.channel_order is None:
            return gathered
        return gathered[..., torch.argsort(self.channel_order.long())]


def _phase_of(x: torch.Tensor) -> Phase:
    """Return the phase of an input `[..., S, K]`; one token alone is decoded."""
    return "decode" if x.ndim == 1 or x.shape[-2] == 1 else "prefill"


def _site_of(behaviour: Behaviour, tensors: Mapping[str, torch.Tensor]) -> InputSite:
    """The selection of an op's own inputs, which lie in gathered order.

    Raises:
        ValueError: if a static and a dynamic shift meet, a dynamic one lacks its weight, or
            constants of dense tokens come where the phase is `all`.
    """
    if behaviour.phase == "all" and not tensors.keys().isdisjoint({"dense_scale", "dense_bias"}):
        raise ValueError("dense_scale and dense_bias go with phase decode or prefill")
    shift = tensors.get("shift")
    if behaviour.dynamic_shift and (shift is not None or "shift_weight" not in tensors):
        raise ValueError("a dynamic shift takes shift_weight and excludes a static shift")
    own = Constants(shift=shift, score_scale=tensors.get("score_scale"))
    return InputSite(behaviour, own, tensors["W"].shape[0], device=tensors["W"].device)


def kept_values(selected: Selected) -> torch.Tensor:
    """Shifted values where kept, else 0: `[T, K]` float32."""
    z = selected.tokens - selected.eta
    keep = selected.keep
    return z if keep is None else torch.where(keep.view(torch.bool), z, 0.0)


def variance_ratio(z: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """`nu = sqrt(var(z) / var(kept))` over K: `[..., K]` float32 twice -> `[..., 1]`."""
    lost = kept.var(dim=-1, correction=0, keepdim=True).clamp_min(VARIANCE_FLOOR)
    return (z.var(dim=-1, correction=0, keepdim=True) / lost).sqrt()


def token_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`x @ weight`, `[..., K]` and `[K, O]`, with the same bits for a token whatever is beside it.

    A CPU product of few rows goes another way than one of many: zero rows keep it from that.
    """
    tokens = x.reshape(-1, x.shape[-1])
    missing = _LEAST_ROWS * torch.get_num_threads() - tokens.shape[0]
    if x.is_cuda or missing <= 0:
        return x @ weight
    padded = torch.cat([tokens, tokens.new_zeros(missing, tokens.shape[1])])
    return (padded @ weight)[: tokens.shape[0]].reshape(*x.shape[:-1], weight.shape[1])


def bias_of(linear: nn.Linear) -> torch.Tensor | None:
    """The linear's own bias, typed as what it is: torch's stubs forget that it may be absent."""
    return linear.bias
