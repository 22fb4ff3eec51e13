"""A sparsified linear in torch, twice: folded as every executor computes it, and as the paper says.

`FoldedLinear` is the op contract. `SparseLinear` is the method before folding: the shift is added
back to the masked input, the correction scales the input, the weight is the dense one. That both
agree is what makes folding right.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch
from torch import nn

from nmexport.sparsity.mask import keep_mask, scores_of
from nmexport.sparsity.pattern import NMPattern
from nmexport.sparsity.quantisation import dequantised

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nmexport.choices import Phase

# Rows a thread below which MKL multiplies in another order: 4 on one thread, 8 on two.
_LEAST_ROWS = 8
VARIANCE_FLOOR = 1e-12  # op contract: the least variance of the kept values that is divided by


@dataclass(frozen=True, kw_only=True)
class Behaviour:
    """What one linear computes at run time, apart from its constants."""

    pattern: NMPattern
    dynamic_shift: bool = False
    variance_correction: bool = False
    phase: Phase = "all"


@dataclass(frozen=True)
class Remainder:
    """R-Sparse (arXiv 2504.19449): A B ~ W^T, applied to all channels beside the kept ones."""

    inner: torch.Tensor
    """A `[K, r]` float32."""
    outer: torch.Tensor
    """B `[r, O]` float32."""


@dataclass(frozen=True, kw_only=True)
class Constants:
    """Calibrated constants of one linear, unfolded; None is absent."""

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


def selection(
    z: torch.Tensor,
    pattern: NMPattern,
    score_scale: torch.Tensor | None,
    channel_order: torch.Tensor | None,
) -> torch.Tensor:
    """The keep mask of shifted inputs: `[..., K]` -> bool."""
    return keep_mask(scores_of(z, score_scale), pattern, channel_order)


def shift_of(x: torch.Tensor, behaviour: Behaviour, constants: Constants) -> torch.Tensor:
    """What is subtracted before selection: of `[..., K]` float32, `[..., 1]`, `[K]` or `[1]`."""
    if behaviour.dynamic_shift:
        return x.mean(dim=-1, keepdim=True)
    shift = constants.shift
    return x.new_zeros(1) if shift is None else shift.to(x.device)


def variance_ratio(z: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """`nu = sqrt(var(z) / var(kept))` over K: `[..., K]` float32 twice -> `[..., 1]`."""
    lost = kept.var(dim=-1, correction=0, keepdim=True).clamp_min(VARIANCE_FLOOR)
    return (z.var(dim=-1, correction=0, keepdim=True) / lost).sqrt()


def drops_channels(x: torch.Tensor, pattern: NMPattern, phase: Phase) -> bool:
    """Whether anything of this input `[..., S, K]` can be dropped; else the op is dense.

    Decode means S == 1. Where nothing is dropped there is no lost variance to correct either.
    """
    if pattern.n == pattern.m:
        return False
    sequence_length = x.shape[-2] if x.ndim > 1 else 1
    return phase == "all" or (sequence_length == 1) == (phase == "decode")


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


class FoldedLinear(nn.Module):
    """NMLinear of the op contract."""

    W: torch.Tensor
    bias: torch.Tensor | None
    shift: torch.Tensor | None
    shift_weight: torch.Tensor | None
    score_scale: torch.Tensor | None
    channel_order: torch.Tensor | None
    weight_scale: torch.Tensor | None
    remainder_in: torch.Tensor | None
    remainder_out: torch.Tensor | None

    def __init__(
        self,
        behaviour: Behaviour,
        *,
        W: torch.Tensor,  # noqa: N803 - the op contract's name
        bias: torch.Tensor | None = None,
        shift: torch.Tensor | None = None,
        shift_weight: torch.Tensor | None = None,
        score_scale: torch.Tensor | None = None,
        channel_order: torch.Tensor | None = None,
        weight_scale: torch.Tensor | None = None,
        remainder_in: torch.Tensor | None = None,
        remainder_out: torch.Tensor | None = None,
    ) -> None:
        """Hold the op's attributes and inputs.

        Args:
            behaviour: The op's attributes.
            W: `[K, O]` T, in_features first; or int8, with `weight_scale`.
            bias: `[O]` T.
            shift: `[1]` or `[K]` float32.
            shift_weight: `[O]` float32, with a dynamic shift.
            score_scale: `[K]` float32.
            channel_order: `[K]` int32.
            weight_scale: `[G, O]` float32 of an int8 W, whose channels share scales by G groups.
            remainder_in: `[K, r]` T, and
            remainder_out: `[r, O]` T: factors of a product of all channels, beside the op.

        Raises:
            ValueError: if a static and a dynamic shift meet, or a dynamic one lacks its weight.
        """
        super().__init__()
        if behaviour.dynamic_shift and (shift is not None or shift_weight is None):
            raise ValueError("a dynamic shift takes shift_weight and excludes a static shift")
        self.n, self.m = behaviour.pattern.n, behaviour.pattern.m
        self.dynamic_shift = behaviour.dynamic_shift
        self.variance_correction = behaviour.variance_correction
        self.phase: Phase = behaviour.phase
        self.in_features, self.out_features = W.shape
        self.register_buffer("W", W)
        self.register_buffer("bias", bias)
        self.register_buffer("shift", shift)
        self.register_buffer("shift_weight", shift_weight)
        self.register_buffer("score_scale", score_scale)
        self.register_buffer("channel_order", channel_order)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("remainder_in", remainder_in)
        self.register_buffer("remainder_out", remainder_out)

    @classmethod
    def from_dense(
        cls,
        linear: nn.Linear,
        behaviour: Behaviour,
        constants: Constants,
        *,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Fold a dense linear with its constants.

        Args:
            linear: The dense linear; its own bias is kept.
            behaviour: Attributes of the op.
            constants: Calibrated constants.
            dtype: T of the folded W and bias; None keeps the linear's own.
        """
        tensors = fold(linear, behaviour, constants, dtype=dtype or linear.weight.dtype)
        return cls.from_tensors(behaviour, tensors)

    @classmethod
    def from_tensors(cls, behaviour: Behaviour, tensors: Mapping[str, torch.Tensor]) -> Self:
        """From the tensors of one layer of a fold artifact: `W`, and where present the others."""
        return cls(
            behaviour,
            W=tensors["W"],
            bias=tensors.get("bias"),
            shift=tensors.get("shift"),
            shift_weight=tensors.get("shift_weight"),
            score_scale=tensors.get("score_scale"),
            channel_order=tensors.get("channel_order"),
            weight_scale=tensors.get("weight_scale"),
            remainder_in=tensors.get("remainder_in"),
            remainder_out=tensors.get("remainder_out"),
        )

    @property
    def pattern(self) -> NMPattern:
        """N:M."""
        return NMPattern(self.n, self.m)

    def keep_mask(self, x: torch.Tensor) -> torch.Tensor:
        """Which channels of an input `[..., K]` are kept: bool `[..., K]`."""
        if not drops_channels(x, self.pattern, self.phase):
            return torch.ones_like(x, dtype=torch.bool)
        z = x.to(torch.float32)
        eta = self._eta(z)
        return self._select(z if eta is None else z - eta)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., K]` T -> `[..., O]` T: the op, and beside it the remainder's product."""
        y = self.op(x)
        if self.remainder_in is None or self.remainder_out is None:
            return y
        eta = self._eta(x.to(torch.float32))
        z = x if eta is None else x - eta.to(x.dtype)
        return y + token_product(token_product(z, self.remainder_in), self.remainder_out)

    def op(self, x: torch.Tensor) -> torch.Tensor:
        """NMLinear alone: `[..., K]` T -> `[..., O]` T, in float32 with one rounding at the end."""
        x32 = x.to(torch.float32)
        eta = self._eta(x32)
        z = x32 if eta is None else x32 - eta
        drops = drops_channels(x, self.pattern, self.phase)
        kept = torch.where(self._select(z), z, 0.0) if drops else z
        y = token_product(kept, dequantised(self.W, self.weight_scale))
        if drops and self.variance_correction:
            y = variance_ratio(z, kept) * y
        if eta is not None and self.shift_weight is not None:
            y = y + eta * self.shift_weight
        if self.bias is not None:
            y = y + self.bias.to(torch.float32)
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{self.in_features}, {self.out_features}, {self.pattern}, phase={self.phase}"

    def _eta(self, x32: torch.Tensor) -> torch.Tensor | None:
        return x32.mean(dim=-1, keepdim=True) if self.dynamic_shift else self.shift

    def _select(self, z: torch.Tensor) -> torch.Tensor:
        return selection(z, self.pattern, self.score_scale, self.channel_order)


class SparseLinear(nn.Module):
    """The method unfolded, as the paper states it: correct the input, then the dense linear."""

    def __init__(self, linear: nn.Linear, behaviour: Behaviour, constants: Constants) -> None:
        """Wrap a dense linear.

        Args:
            linear: The dense linear, unchanged.
            behaviour: Pattern, per-token corrections, phase.
            constants: Calibrated constants.
        """
        super().__init__()
        self.linear = linear
        self.behaviour = behaviour
        self.constants = constants

    @classmethod
    def from_dense(cls, linear: nn.Linear, behaviour: Behaviour, constants: Constants) -> Self:
        """Same as the constructor, beside `FoldedLinear.from_dense`."""
        return cls(linear, behaviour, constants)

    @property
    def in_features(self) -> int:
        """K."""
        return self.linear.in_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., K]` -> `[..., O]`, in float32, rounded to the type of x."""
        given = operand = x.to(torch.float32)
        if drops_channels(x, self.behaviour.pattern, self.behaviour.phase):
            operand = self._sparsified(given)
        bias = bias_of(self.linear)
        weight = self.linear.weight.to(torch.float32)
        y = nn.functional.linear(operand, weight, None if bias is None else bias.float())
        if self.constants.remainder is not None:
            # What was dropped (and what a correction added) meets the low-rank part of W instead.
            inner, outer = self.constants.remainder.inner, self.constants.remainder.outer
            y = y + (given - operand) @ inner.to(x.device) @ outer.to(x.device)
        return y.to(x.dtype)

    def _sparsified(self, x: torch.Tensor) -> torch.Tensor:
        eta = shift_of(x, self.behaviour, self.constants)
        z = x - eta
        scale, order = (
            None if constant is None else constant.to(x.device)
            for constant in (self.constants.score_scale, self.constants.channel_order)
        )
        keep = selection(z, self.behaviour.pattern, scale, order)
        kept = torch.where(keep, z, 0.0)
        return self._nu(z, kept) * kept + eta

    def _nu(self, z: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        if self.behaviour.variance_correction:
            return variance_ratio(z, kept)
        nu = self.constants.nu
        return z.new_tensor([1.0 if nu is None else nu])


def fold(
    linear: nn.Linear, behaviour: Behaviour, constants: Constants, *, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Fold constants into the weight and bias, as the op contract's table says.

    All sums are taken over the unscaled weight, in float64, before W and bias are rounded to T.

    Args:
        linear: The dense linear.
        behaviour: Attributes of the op.
        constants: Calibrated constants.
        dtype: T.

    Returns:
        `W [K, O]` T, and where used `bias [O]` T, `shift` float32, `shift_weight [O]` float32,
        `score_scale [K]` float32, `channel_order [K]` int32, `remainder_in [K, r]` and
        `remainder_out [r, O]` T; contiguous.
    """
    weight = linear.weight.detach().t().to("cpu", torch.float32)  # [K, O]; constants lie there
    gain = 1.0 if constants.nu is None else constants.nu
    remainder = constants.remainder
    left = weight if remainder is None else weight - remainder.inner @ remainder.outer
    folded = {"W": (left * gain).to(dtype)}
    if remainder is not None:
        folded["remainder_in"] = remainder.inner.to(dtype)
        folded["remainder_out"] = remainder.outer.to(dtype)
    bias = _folded_bias(linear, weight, constants.shift)
    if bias is not None:
        folded["bias"] = bias.to(dtype)
    if behaviour.dynamic_shift:
        folded["shift_weight"] = weight.sum(dim=0, dtype=torch.float64).float()
    for name in ("shift", "score_scale", "channel_order"):
        value = getattr(constants, name)
        if value is not None:
            folded[name] = value.clone()  # linears of one site share theirs
    return {name: tensor.detach().contiguous() for name, tensor in folded.items()}


def _folded_bias(
    linear: nn.Linear, weight: torch.Tensor, shift: torch.Tensor | None
) -> torch.Tensor | None:
    """`bias + shift @ W`: what adding the shift back after selection comes to."""
    own = bias_of(linear)
    bias = None if own is None else own.detach().cpu().double()
    if shift is None:
        return bias
    moved = shift.double().expand(weight.shape[0]) @ weight.double()
    return moved if bias is None else bias + moved
