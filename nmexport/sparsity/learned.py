"""The sparse linear whose constants are learned: shift, input scale, gain, bias, compensation.

With z the shifted input, s its kept values (times nu, where variance is corrected per token), d the
input scale, o the output gain, b the output bias, A `[K, r]` and B `[r, O]` the compensation and
W `[O, K]` the dense weight, whose own bias is c, the linear computes

    y = o * (W (d * s + eta)) + B^T A^T s + c + b

which `nmexport.sparsity.fold` folds into one op. The selection is held constant in the gradient:
which channels are kept changes only through the shift, step by step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nmexport.sparsity.fold import Corrections
from nmexport.sparsity.linear import InputSite, Selected, SparseLinear, bias_of
from nmexport.sparsity.parts import PARTS, RANK

if TYPE_CHECKING:
    from collections.abc import Iterable

    from nmexport.sparsity.linear import Behaviour, Constants
    from nmexport.sparsity.parts import Part

_FLOOR = 1e-6  # least spread that a learned shift or bias is measured in: dead channels


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Sizes that steps of learning are measured in, so that one rate suits every channel."""

    input_rms: torch.Tensor
    """`[K]`"""
    output_rms: torch.Tensor
    """`[O]`"""


class LearningSite(InputSite):
    """A site whose shift may be learned, and which selects once for all its linears.

    One selection saves a third of the time of learning; one shift lets an executor fuse the
    linears.
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
        super().__init__(behaviour, constants, input_rms.numel(), device=device)
        if behaviour.dynamic_shift and learns_shift:
            raise ValueError("a learned shift and a per-token shift exclude each other")
        self._members = members
        self._rms = input_rms.float().clamp_min(_FLOOR).to(device)
        self.shift = nn.Parameter((self.eta / self._rms).expand(self.channels).clone())
        self.shift.requires_grad_(learns_shift)
        self.input_scale: nn.Parameter | None = None
        """`[K]`, d of all linears of the input, where they share one: see `shared_scale`."""
        self.disturbance: torch.Tensor | None = None
        """`[K]` factors of the scores while a step is learned from; None ranks as the op does."""
        self._seen: torch.Tensor | None = None
        self._selected: Selected | None = None
        self._left = 0

    @property
    def learns_shift(self) -> bool:
        """Tell whether the shift is a parameter."""
        return self.shift.requires_grad

    def select(self, x: torch.Tensor, *, sparse: bool = True) -> Selected:
        """Select on `[..., K]`, once for all linears that are handed the same tensor."""
        if not sparse:
            return super().select(x, sparse=False)
        if x is not self._seen or self._selected is None:
            self._seen, self._selected, self._left = x, super().select(x), self._members
        selected = self._selected
        self._left -= 1
        if self._left <= 0:
            self._seen = self._selected = None
        return selected

    def shared_scale(self, start: torch.Tensor) -> nn.Parameter:
        """Return the one input scale of all linears of the input; it starts where the first says.

        Where a phase stays dense, d is a constant of its own beside the weight, and linears with
        the same one are fused. On SmolLM2 at 8:16, 40 steps, held-out divergence was 0.625 so, and
        0.618 with a scale for each linear.
        """
        if self.input_scale is None:
            self.input_scale = nn.Parameter(start.to(self.shift.device))
        return self.input_scale

    def learned_shift(self) -> torch.Tensor:
        """`[K]` float32, on the CPU."""
        return (self.shift.detach() * self._rms).float().cpu()

    def _ranking_scale(self) -> torch.Tensor | None:
        if self.disturbance is None or self.score_scale is None:
            return self.score_scale if self.disturbance is None else self.disturbance
        return self.score_scale * self.disturbance

    def _eta(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.shift * self._rms if self.learns_shift else super()._eta(tokens)


class LearnedLinear(SparseLinear):
    """A sparse linear whose constants are parameters; the dense weight stays as it is."""

    site: LearningSite

    def __init__(
        self,
        linear: nn.Linear,
        behaviour: Behaviour,
        constants: Constants,
        *,
        spread: Spread,
        parts: Iterable[Part] = PARTS,
        site: LearningSite | None = None,
        rank: int = RANK,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Start where the calibrated constants are: scales 1, bias 0, no compensation.

        Args:
            linear: The dense linear; its weight is not copied where the types agree.
            behaviour: Pattern and per-token corrections; the phase is not looked at.
            constants: Calibrated constants; a static nu is where d starts.
            spread: Sizes of the linear's input and output.
            parts: What to learn.
            site: Selects for all linears that share the input; None makes one for this alone.
            rank: r of the compensation.
            seed: Random seed of where A starts; B starts at zero.
            dtype: Type of the products. Selection is always in float32.

        Raises:
            ValueError: if a shift is to be learned beside a per-token one.
        """
        chosen = set(parts)
        device = linear.weight.device
        site = site or LearningSite(
            behaviour,
            constants,
            input_rms=spread.input_rms,
            learns_shift="shift" in chosen,
            device=device,
        )
        dense = {"W": linear.weight.detach().to(dtype).t()}
        own = bias_of(linear)
        if own is not None:
            dense["bias"] = own.detach().float()
        # Every token learns as one that the phase includes.
        super().__init__(replace(behaviour, phase="all"), dense, site=site)
        self.sparse = True
        """False computes the dense linear: one model is teacher and student."""
        self._nu = 1.0 if constants.nu is None else constants.nu
        self._output_rms = spread.output_rms.float().clamp_min(_FLOOR).to(device)
        start = self._start(chosen, rank, seed)
        self.learned = nn.ParameterDict(
            {name: nn.Parameter(value.to(device)) for name, value in start.items()}
        )
        if "input_scale" in start and behaviour.phase != "all":
            self.learned["input_scale"] = site.shared_scale(start["input_scale"])

    def corrections(self) -> Corrections:
        """Return what has been learned so far, on the CPU."""
        values = {name: value.detach().float().cpu() for name, value in self.learned.items()}
        if "bias" in values:
            values["bias"] = values["bias"] * self._output_rms.cpu()
        if self.site.learns_shift:
            values["shift"] = self.site.learned_shift()
        return Corrections(**values)

    def _can_drop(self) -> bool:
        return self.sparse

    def _product(self, selected: Selected) -> torch.Tensor:
        weight = self.W.t()  # [O, K]
        if selected.keep is None:
            return nn.functional.linear(selected.tokens.to(weight.dtype), weight).float()
        unit = selected.tokens.new_ones(1)
        learned = self.learned
        y: torch.Tensor = _SparseProduct.apply(  # type: ignore[no-untyped-call]
            selected.tokens,
            selected.eta,
            learned["input_scale"] if "input_scale" in learned else self._nu * unit,
            learned.get("output_scale", unit),
            learned.get("low_rank_in"),
            learned.get("low_rank_out"),
            selected.keep,
            selected.nu,
            weight,
        )
        return y + learned["bias"] * self._output_rms if "bias" in learned else y

    def _start(self, chosen: set[Part], rank: int, seed: int) -> dict[str, torch.Tensor]:
        """Parameters by name where learning starts, in units that suit one rate."""
        channels, outputs = self.in_features, self.out_features
        start: dict[str, torch.Tensor] = {}
        if "input_scale" in chosen:
            start["input_scale"] = torch.full((channels,), self._nu)
        if "output_scale" in chosen:
            start["output_scale"] = torch.ones(outputs)
        if "bias" in chosen:
            start["bias"] = torch.zeros(outputs)
        if "low_rank" in chosen:
            generator = torch.Generator().manual_seed(seed)
            rank = min(rank, channels, outputs)
            drawn = torch.randn(channels, rank, generator=generator)
            start["low_rank_in"] = drawn / channels**0.5
            start["low_rank_out"] = torch.zeros(rank, outputs)
        return start


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


def _sum_of_products(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`[T, C]` twice, of one type -> `[C]` float32, summed in float32 over tokens."""
    return (left * right).sum(dim=0, dtype=torch.float32)
