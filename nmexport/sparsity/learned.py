"""Learned constants of one linear: L-PTS, LS, an output gain and bias, a low-rank compensation.

With z the shifted input, s its kept values (times nu, where variance is corrected per token), d the
input scale, o the output gain, b the output bias, A `[K, r]` and B `[r, O]` the compensation and
W `[O, K]` the dense weight, whose own bias is c, the linear computes

    y = o * (W (d * s + eta)) + B^T A^T s + c + b

All of it folds: rows of W take d, columns take o, A B is added to what came of that, and eta, being
no longer added back before the product, becomes part of the bias (per token: of `shift_weight`).
The selection is held constant in the gradient: which channels are kept changes only through the
shift, step by step.

Linears that share an input share its selection, and so its shift: see `InputSite`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from nmexport.sparsity.lanes import LaneSelector
from nmexport.sparsity.linear import bias_of, gathered, variance_ratio
from nmexport.sparsity.mask import scores_of
from nmexport.sparsity.parts import PARTS, RANK

if TYPE_CHECKING:
    from collections.abc import Iterable

    from nmexport.sparsity.linear import Behaviour, Constants
    from nmexport.sparsity.parts import Part

_FLOOR = 1e-6  # least spread that a learned shift or bias is measured in: dead channels


@dataclass(frozen=True, kw_only=True)
class Corrections:
    """What was learned for one linear; None was not learned."""

    shift: torch.Tensor | None = None
    """`[K]` float32, takes the place of the calibrated one (L-PTS)."""
    input_scale: torch.Tensor | None = None
    """`[K]` float32, d (LS)."""
    output_scale: torch.Tensor | None = None
    """`[O]` float32, o."""
    bias: torch.Tensor | None = None
    """`[O]` float32, b: added to the linear's own bias."""
    low_rank_in: torch.Tensor | None = None
    """`[K, r]` float32, A."""
    low_rank_out: torch.Tensor | None = None
    """`[r, O]` float32, B."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Sizes that steps of learning are measured in, so that one rate suits every channel."""

    input_rms: torch.Tensor
    """`[K]`"""
    output_rms: torch.Tensor
    """`[O]`"""


class InputSite(nn.Module):
    """What linears with one input have in common: the shift and the selection, computed once.

    Which is what lets an executor fuse them, and a third of the time of learning.
    """

    def __init__(
        self,
        behaviour: Behaviour,
        constants: Constants,
        *,
        input_rms: torch.Tensor,
        members: int = 1,
        learns_shift: bool = False,
        device: torch.device | None = None,
    ) -> None:
        """Start at the calibrated shift.

        Args:
            behaviour: Pattern and per-token corrections; the phase is not looked at.
            constants: Calibrated constants; shift, score scale and channel order are used.
            input_rms: `[K]`, the size that a learned shift is measured in.
            members: How many linears share the input.
            learns_shift: Whether the shift is a parameter.
            device: Where; None is the CPU.

        Raises:
            ValueError: if a shift is to be learned beside a per-token one.
        """
        super().__init__()
        if behaviour.dynamic_shift and learns_shift:
            raise ValueError("a learned shift and a per-token shift exclude each other")
        self._behaviour, self._members = behaviour, members
        self._rms = input_rms.float().clamp_min(_FLOOR).to(device)
        self.channels = channels = self._rms.numel()
        self._score_scale = _on(constants.score_scale, device)
        self._select = LaneSelector(behaviour.pattern, channels, constants.channel_order)
        start = _on(constants.shift, device)
        self._fixed = self._rms.new_zeros(1) if start is None else start
        self.shift = nn.Parameter((self._fixed / self._rms).expand(channels).clone())
        self.shift.requires_grad_(learns_shift)
        self.disturbance: torch.Tensor | None = None
        """`[K]` factors of the scores while a step is learned from; None ranks as the op does."""
        self._seen: torch.Tensor | None = None
        self._selected: _Selected | None = None
        self._left = 0

    @property
    def learns_shift(self) -> bool:
        """Whether the shift is a parameter."""
        return self.shift.requires_grad

    def select(self, x: torch.Tensor) -> _Selected:
        """Selection on `[..., K]`; of one tensor once, for all linears that are handed it."""
        if x is not self._seen or self._selected is None:
            self._seen, self._selected, self._left = x, self._selection_of(x), self._members
        selected = self._selected
        self._left -= 1
        if self._left <= 0:
            self._seen = self._selected = None
        return selected

    def learned_shift(self) -> torch.Tensor:
        """`[K]` float32, on the CPU."""
        return (self.shift.detach() * self._rms).float().cpu()

    def _selection_of(self, x: torch.Tensor) -> _Selected:
        tokens = x.reshape(-1, x.shape[-1]).float()
        eta = self._eta(tokens)
        with torch.no_grad():
            z = tokens - eta
            keep = self._select(scores_of(z, self._ranking_scale())).view(torch.uint8)
            corrects = self._behaviour.variance_correction
            nu = variance_ratio(z, z * keep) if corrects else None
        return _Selected(tokens, eta, keep, nu)

    def _ranking_scale(self) -> torch.Tensor | None:
        """`[K]` float32 that scores are multiplied by; None leaves magnitudes alone."""
        if self.disturbance is None:
            return self._score_scale
        if self._score_scale is None:
            return self.disturbance
        return self._score_scale * self.disturbance

    def _eta(self, tokens: torch.Tensor) -> torch.Tensor:
        """`[T, 1]` per token, `[K]` learned, `[1]` calibrated or none."""
        if self._behaviour.dynamic_shift:
            return tokens.mean(dim=-1, keepdim=True)
        return self.shift * self._rms if self.learns_shift else self._fixed


class _Selected(NamedTuple):
    """One input and what is kept of it."""

    tokens: torch.Tensor
    """`[T, K]` float32"""
    eta: torch.Tensor
    keep: torch.Tensor
    """`[T, K]` uint8, 1 where kept: a product with it takes half as long as with bool."""
    nu: torch.Tensor | None
    """`[T, 1]`"""


class LearnedLinear(nn.Module):
    """A sparsified linear whose constants are parameters; the dense weight stays as it is."""

    def __init__(
        self,
        linear: nn.Linear,
        behaviour: Behaviour,
        constants: Constants,
        *,
        spread: Spread,
        parts: Iterable[Part] = PARTS,
        site: InputSite | None = None,
        rank: int = RANK,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Start where the calibrated constants are: scales 1, bias 0, no compensation.

        Args:
            linear: The dense linear; its weight is not copied where the types agree.
            behaviour: Pattern and per-token corrections; the phase is not looked at.
            constants: Calibrated constants; a static nu is where d starts.
            spread: Of the linear's input and output.
            parts: What to learn.
            site: Of the input, where other linears share it; None makes one of its own.
            rank: r of the compensation.
            seed: Of where A starts; B starts at zero.
            dtype: Type of the products. Selection is always in float32.

        Raises:
            ValueError: if a shift is to be learned beside a per-token one.
        """
        super().__init__()
        chosen = set(parts)
        self.sparse = True
        """False computes the dense linear: one model is teacher and student."""
        device = linear.weight.device
        self._nu = 1.0 if constants.nu is None else constants.nu
        self._output_rms = spread.output_rms.float().clamp_min(_FLOOR).to(device)
        self._weight = linear.weight.detach().to(dtype)
        own = bias_of(linear)
        self._own_bias = None if own is None else own.detach().float()
        self.site = site or InputSite(
            behaviour,
            constants,
            input_rms=spread.input_rms,
            learns_shift="shift" in chosen,
            device=device,
        )
        started = self._started(linear, chosen, rank, seed)
        self.learned = nn.ParameterDict(
            {name: nn.Parameter(start.to(device)) for name, start in started.items()}
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., K]` -> `[..., O]`, in the type of x."""
        y = self._sparse_product(x) if self.sparse else self._dense_product(x)
        if self._own_bias is not None:
            y = y + self._own_bias
        return y.reshape(*x.shape[:-1], -1).to(x.dtype)

    def corrections(self) -> Corrections:
        """What has been learned so far, on the CPU."""
        found = {name: value.detach().float().cpu() for name, value in self.learned.items()}
        if "bias" in found:
            found["bias"] = found["bias"] * self._output_rms.cpu()
        if self.site.learns_shift:
            found["shift"] = self.site.learned_shift()
        return Corrections(**found)

    def _dense_product(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        return nn.functional.linear(tokens.to(self._weight.dtype), self._weight).float()

    def _sparse_product(self, x: torch.Tensor) -> torch.Tensor:
        selected = self.site.select(x)
        one = selected.tokens.new_ones(1)
        learned = self.learned
        y: torch.Tensor = _SparseProduct.apply(  # type: ignore[no-untyped-call]
            selected.tokens,
            selected.eta,
            learned["input_scale"] if "input_scale" in learned else self._nu * one,
            learned.get("output_scale", one),
            learned.get("low_rank_in"),
            learned.get("low_rank_out"),
            selected.keep,
            selected.nu,
            self._weight,
        )
        return y + learned["bias"] * self._output_rms if "bias" in learned else y

    def _started(
        self, linear: nn.Linear, chosen: set[Part], rank: int, seed: int
    ) -> dict[str, torch.Tensor]:
        """Parameters by name where learning starts, in units that suit one rate."""
        channels, outputs = linear.in_features, linear.out_features
        started: dict[str, torch.Tensor] = {}
        if "input_scale" in chosen:
            started["input_scale"] = torch.full((channels,), self._nu)
        if "output_scale" in chosen:
            started["output_scale"] = torch.ones(outputs)
        if "bias" in chosen:
            started["bias"] = torch.zeros(outputs)
        if "low_rank" in chosen:
            generator = torch.Generator().manual_seed(seed)
            rank = min(rank, channels, outputs)
            drawn = torch.randn(channels, rank, generator=generator)
            started["low_rank_in"] = drawn / channels**0.5
            started["low_rank_out"] = torch.zeros(rank, outputs)
        return started


class _SparseProduct(torch.autograd.Function):
    """`o * (W (d nu s + eta)) + B^T A^T nu s`, keeping only what its gradient needs, in W's type.

    Written out because autograd would hold every intermediate of every linear in float32, which is
    most of the memory and a third of the time of learning on a CPU.
    """

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd passes no keywords
        ctx: Any,
        x: torch.Tensor,  # [T, K] float32
        eta: torch.Tensor,  # [T, 1], [K] or [1]
        input_scale: torch.Tensor,  # [K] or [1]
        output_scale: torch.Tensor,  # [O] or [1]
        low_rank_in: torch.Tensor | None,  # [K, r]
        low_rank_out: torch.Tensor | None,  # [r, O]
        keep: torch.Tensor,  # [T, K] uint8
        nu: torch.Tensor | None,  # [T, 1]
        weight: torch.Tensor,  # [O, K]
    ) -> torch.Tensor:
        kept = (x - eta).mul_(keep)
        if nu is not None:
            kept.mul_(nu)
        operand = torch.addcmul(eta.expand_as(kept), kept, input_scale)
        product = operand.to(weight.dtype) @ weight.t()
        kept = kept.to(weight.dtype)
        y = product * output_scale
        inner = None
        if low_rank_in is not None and low_rank_out is not None:
            low_rank_in = low_rank_in.to(weight.dtype)
            inner = kept @ low_rank_in
            # In float32, and in place: adding a tensor of another type takes longer than that.
            y = y.float().addmm_(inner.float(), low_rank_out)
        ctx.save_for_backward(
            kept, keep, nu, product, input_scale, output_scale, weight,
            low_rank_in, low_rank_out, inner,
        )  # fmt: skip
        ctx.eta_shape = eta.shape
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (kept, keep, nu, product, input_scale, output_scale, weight,
         low_rank_in, low_rank_out, inner) = ctx.saved_tensors  # fmt: skip
        (of_y,) = gradients
        needs_scale, needs_gain = ctx.needs_input_grad[2], ctx.needs_input_grad[3]
        low_of_y = of_y.to(weight.dtype)
        of_gain = _sum_of_products(low_of_y, product) if needs_gain else None
        low_of_operand = (of_y * output_scale).to(weight.dtype) @ weight
        of_scale = _sum_of_products(low_of_operand, kept) if needs_scale else None
        of_operand = low_of_operand.float()
        of_kept = of_operand * input_scale
        of_in = of_out = None
        if inner is not None:
            of_inner = low_of_y @ low_rank_out.to(weight.dtype).t()
            of_out = (inner.t() @ low_of_y).float()
            of_in = (kept.t() @ of_inner).float()
            of_kept.addmm_(of_inner.float(), low_rank_in.float().t())
        of_x = of_kept.mul_(keep)
        if nu is not None:
            of_x.mul_(nu)
        of_eta = None
        if ctx.needs_input_grad[1]:
            # eta is added back everywhere and taken away where a value is kept.
            of_eta = (of_operand - of_x).sum_to_size(ctx.eta_shape)
        return of_x, of_eta, of_scale, of_gain, of_in, of_out, None, None, None


def _sum_of_products(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """`[T, C]` twice, of one type -> `[C]` float32, summed in float32 over tokens."""
    return (one * other).sum(dim=0, dtype=torch.float32)


def with_learned(constants: Constants, corrections: Corrections) -> Constants:
    """The constants that fold beside the corrections: a learned shift, and nu once only."""
    changed = constants
    if corrections.shift is not None:
        changed = replace(changed, shift=corrections.shift)
    if corrections.input_scale is not None:
        changed = replace(changed, nu=None)  # d started at nu
    return changed


def fold_learned(
    linear: nn.Linear,
    behaviour: Behaviour,
    constants: Constants,
    corrections: Corrections,
    *,
    dtype: torch.dtype,
) -> dict[str, torch.Tensor]:
    """Fold calibrated and learned constants, as the op contract's table says.

    Args:
        linear: The dense linear.
        behaviour: Attributes of the op.
        constants: Calibrated constants, as they went into learning.
        corrections: What was learned.
        dtype: T.

    Returns:
        The tensors of `nmexport.sparsity.linear.fold`: `W [K, O]` T, and where used `bias [O]` T,
        `shift`, `shift_weight [O]`, `score_scale [K]` float32, `channel_order [K]` int32.

    Raises:
        ValueError: if corrections that change the dense product meet a phase that stays dense.
    """
    if behaviour.phase != "all" and changes_dense_product(corrections):
        raise ValueError(f"phase {behaviour.phase} needs the dense product unchanged elsewhere")
    constants = with_learned(constants, corrections)
    gain = _double(corrections.output_scale, 1.0)  # [O] or []
    scale = _double(corrections.input_scale, 1.0 if constants.nu is None else constants.nu)
    weight = linear.weight.detach().cpu().t().double()  # [K, O]
    product = scale.reshape(-1, 1) * weight * gain
    if corrections.low_rank_in is not None and corrections.low_rank_out is not None:
        product += corrections.low_rank_in.double() @ corrections.low_rank_out.double()
    folded = {"W": product.to(dtype)}
    bias = _folded_bias(linear, weight, gain, constants.shift, corrections.bias)
    if bias is not None:
        folded["bias"] = bias.to(dtype)
    if behaviour.dynamic_shift:
        folded["shift_weight"] = (weight.sum(dim=0) * gain).float()
    for name in ("shift", "score_scale", "channel_order"):
        value = getattr(constants, name)
        if value is not None:
            folded[name] = value.cpu().clone()  # linears of one site share theirs
    return {name: tensor.detach().contiguous() for name, tensor in gathered(folded).items()}


def changes_dense_product(corrections: Corrections) -> bool:
    """Whether the folded linear differs from the dense one even where everything is kept."""
    changing = (
        corrections.input_scale,
        corrections.output_scale,
        corrections.bias,
        corrections.low_rank_in,
    )
    return any(tensor is not None for tensor in changing)


def _folded_bias(
    linear: nn.Linear,
    weight: torch.Tensor,
    gain: torch.Tensor,
    shift: torch.Tensor | None,
    correction: torch.Tensor | None,
) -> torch.Tensor | None:
    """`c + o * (W eta) + b` `[O]` float64, from the unscaled W; None where all are absent."""
    terms = []
    own = bias_of(linear)
    if own is not None:
        terms.append(own.detach().cpu().double())
    if shift is not None:
        terms.append(gain * (shift.cpu().double().expand(weight.shape[0]) @ weight))
    if correction is not None:
        terms.append(correction.double())
    return torch.stack(terms).sum(dim=0) if terms else None


def _double(tensor: torch.Tensor | None, otherwise: float) -> torch.Tensor:
    return torch.tensor(otherwise, dtype=torch.float64) if tensor is None else tensor.double()


def _on(tensor: torch.Tensor | None, device: torch.device | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.to(device)
