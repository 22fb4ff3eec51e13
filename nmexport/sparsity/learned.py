"""Learned constants of one linear: L-PTS, LS, an output gain and an output bias, learned together.

With z the shifted input, s its kept values (times nu, where variance is corrected per token), d the
input scale, o the output gain, b the output bias and W `[O, K]` the dense weight, whose own bias
is c, the linear computes

    y = o * (W (d * s + eta)) + c + b

All of it folds: rows of W take d, columns take o, and eta, being no longer added back before the
product, becomes part of the bias (per token: of `shift_weight`). The selection is held constant in
the gradient: which channels are kept changes only through the shift, step by step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from nmexport.sparsity.lanes import LaneSelector
from nmexport.sparsity.linear import bias_of, variance_ratio
from nmexport.sparsity.mask import scores_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from nmexport.sparsity.linear import Behaviour, Constants

Part = Literal["shift", "input_scale", "output_scale", "bias"]
PARTS: tuple[Part, ...] = ("shift", "input_scale", "output_scale", "bias")

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


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Sizes that steps of learning are measured in, so that one rate suits every channel."""

    input_rms: torch.Tensor
    """`[K]`"""
    output_rms: torch.Tensor
    """`[O]`"""


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
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Start where the calibrated constants are: scales 1, bias 0.

        Args:
            linear: The dense linear; its weight is not copied where the types agree.
            behaviour: Pattern and per-token corrections; the phase is not looked at.
            constants: Calibrated constants; a static nu is where d starts.
            spread: Of the linear's input and output.
            parts: What to learn.
            dtype: Type of the products. Selection is always in float32.

        Raises:
            ValueError: if a shift is to be learned beside a per-token one.
        """
        super().__init__()
        chosen = set(parts)
        if behaviour.dynamic_shift and "shift" in chosen:
            raise ValueError("a learned shift and a per-token shift exclude each other")
        self.sparse = True
        """False computes the dense linear: one model is teacher and student."""
        self._behaviour, self._constants, self._spread = behaviour, constants, _floored(spread)
        device = linear.weight.device
        self._weight = linear.weight.detach().to(dtype)
        own = bias_of(linear)
        self._own_bias = None if own is None else own.detach().float()
        self._score_scale = _on(constants.score_scale, device)
        self._select = LaneSelector(behaviour.pattern, linear.in_features, constants.channel_order)
        self.learned = nn.ParameterDict(
            {
                part: nn.Parameter(self._start(part, linear).to(device))
                for part in PARTS
                if part in chosen
            }
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., K]` -> `[..., O]`, in the type of x."""
        tokens = x.reshape(-1, x.shape[-1])
        y = self._sparse_product(tokens.float()) if self.sparse else self._dense_product(tokens)
        if self._own_bias is not None:
            y = y + self._own_bias
        return y.reshape(*x.shape[:-1], -1).to(x.dtype)

    def corrections(self) -> Corrections:
        """What has been learned so far, on the CPU."""
        parts: dict[str, torch.Tensor] = {
            part: (parameter.detach() * self._unit(part, parameter.device)).float().cpu()
            for part, parameter in self.learned.items()
        }
        return Corrections(**parts)

    def _dense_product(self, tokens: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(tokens.to(self._weight.dtype), self._weight).float()

    def _sparse_product(self, tokens: torch.Tensor) -> torch.Tensor:
        eta = self._eta(tokens)
        with torch.no_grad():
            z = tokens - eta
            keep = self._select(scores_of(z, self._score_scale))
            corrects = self._behaviour.variance_correction
            nu = variance_ratio(z, z * keep) if corrects else None
        y: torch.Tensor = _SparseProduct.apply(  # type: ignore[no-untyped-call]
            tokens,
            eta,
            self._value("input_scale", tokens.new_tensor(self._nu)),
            self._value("output_scale", tokens.new_ones(1)),
            keep,
            nu,
            self._weight,
        )
        return y + self._value("bias", tokens.new_zeros(1))

    def _eta(self, tokens: torch.Tensor) -> torch.Tensor:
        """`[T, 1]` per token, `[K]` learned, `[1]` calibrated or none."""
        if self._behaviour.dynamic_shift:
            return tokens.mean(dim=-1, keepdim=True)
        start = self._constants.shift
        fixed = tokens.new_zeros(1) if start is None else start.to(tokens.device)
        return self._value("shift", fixed)

    def _value(self, part: Part, otherwise: torch.Tensor) -> torch.Tensor:
        if part not in self.learned:
            return otherwise
        parameter = self.learned[part]
        value: torch.Tensor = parameter * self._unit(part, parameter.device)
        return value

    def _unit(self, part: str, device: torch.device) -> torch.Tensor:
        """What a parameter of 1 stands for."""
        units = {"shift": self._spread.input_rms, "bias": self._spread.output_rms}
        return units[part].to(device) if part in units else torch.ones(1, device=device)

    def _start(self, part: Part, linear: nn.Linear) -> torch.Tensor:
        match part:
            case "shift":
                start = self._constants.shift
                rms = self._spread.input_rms.cpu()
                return torch.zeros_like(rms) if start is None else start.cpu() / rms
            case "input_scale":
                return torch.full((linear.in_features,), self._nu)
            case "output_scale":
                return torch.ones(linear.out_features)
            case "bias":
                return torch.zeros(linear.out_features)

    @property
    def _nu(self) -> float:
        return 1.0 if self._constants.nu is None else self._constants.nu


class _SparseProduct(torch.autograd.Function):
    """`o * (W (d nu s + eta))`, keeping only what its gradient needs in the type of W.

    Written out because autograd would hold every intermediate of every linear in float32, which is
    most of the memory and a third of the time of learning on a CPU.
    """

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd passes no keywords
        ctx: Any,
        x: torch.Tensor,  # [T, K] float32
        eta: torch.Tensor,  # [T, 1], [K] or [1]
        input_scale: torch.Tensor,  # [K] or []
        output_scale: torch.Tensor,  # [O] or [1]
        keep: torch.Tensor,  # [T, K] bool
        nu: torch.Tensor | None,  # [T, 1]
        weight: torch.Tensor,  # [O, K]
    ) -> torch.Tensor:
        kept = (x - eta).mul_(keep)
        if nu is not None:
            kept.mul_(nu)
        operand = torch.addcmul(eta.expand_as(kept), kept, input_scale)
        product = operand.to(weight.dtype) @ weight.t()
        kept = kept.to(weight.dtype)
        ctx.save_for_backward(kept, keep, nu, product, input_scale, output_scale, weight)
        ctx.eta_shape = eta.shape
        return product * output_scale

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        kept, keep, nu, product, input_scale, output_scale, weight = ctx.saved_tensors
        (of_y,) = gradients
        needs_scale, needs_gain = ctx.needs_input_grad[2], ctx.needs_input_grad[3]
        of_gain = (of_y * product).sum(dim=0) if needs_gain else None
        of_operand = ((of_y * output_scale).to(weight.dtype) @ weight).float()
        of_scale = (of_operand * kept).sum(dim=0) if needs_scale else None
        of_x = (of_operand * input_scale).mul_(keep)
        if nu is not None:
            of_x.mul_(nu)
        of_eta = None
        if ctx.needs_input_grad[1]:
            # eta is added back everywhere and taken away where a value is kept.
            of_eta = (of_operand - of_x).sum_to_size(ctx.eta_shape)
        return of_x, of_eta, of_scale, of_gain, None, None, None


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
    folded = {"W": (scale.reshape(-1, 1) * weight * gain).to(dtype)}
    bias = _folded_bias(linear, weight, gain, constants.shift, corrections.bias)
    if bias is not None:
        folded["bias"] = bias.to(dtype)
    if behaviour.dynamic_shift:
        folded["shift_weight"] = (weight.sum(dim=0) * gain).float()
    for name in ("shift", "score_scale", "channel_order"):
        value = getattr(constants, name)
        if value is not None:
            folded[name] = value.cpu()
    return {name: tensor.detach().contiguous() for name, tensor in folded.items()}


def changes_dense_product(corrections: Corrections) -> bool:
    """Whether the folded linear differs from the dense one even where everything is kept."""
    changing = (corrections.input_scale, corrections.output_scale, corrections.bias)
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


def _on(tensor: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    return None if tensor is None else tensor.to(device)


def _floored(spread: Spread) -> Spread:
    return Spread(
        input_rms=spread.input_rms.float().clamp_min(_FLOOR),
        output_rms=spread.output_rms.float().clamp_min(_FLOOR),
    )
