"""Measures the error of selection in one linear, on the dense model's activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from nmexport.sparsity.linear import VARIANCE_FLOOR, InputSite, variance_ratio

if TYPE_CHECKING:
    from nmexport.sparsity.linear import Behaviour, Constants


@dataclass
class ErrorObserver:
    """Measures what one linear loses by selection, on the dense model's activations.

    With q the dense product and p that of the kept values (both before bias and shift), the
    sparse output is off by `nu p - q`. Keeping the three inner products leaves nu open, so that
    one pass both finds a static nu and knows the error with it.
    """

    tokens: int = 0
    nu_sum: float = 0.0
    """Sum over tokens of sqrt(var(z) / var(kept)), of those tokens where it is defined."""
    nu_tokens: int = 0
    sparse_squares: float = 0.0
    """<p, p>"""
    products: float = 0.0
    """<p, q>"""
    dense_squares: float = 0.0
    """<q, q>"""
    output_squares: float = 0.0
    """Squared norm of the dense output, bias and all."""

    def merge(self, other: ErrorObserver) -> None:
        """Add what another observer saw."""
        for name in self.__dataclass_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def static_nu(self) -> float:
        """Mean over tokens of the variance ratio; 1 where no token defined it."""
        return self.nu_sum / self.nu_tokens if self.nu_tokens else 1.0

    def relative_error(self, nu: float = 1.0) -> float | None:
        """`||y_sparse - y_dense|| / ||y_dense||` over all tokens, or None if it is undefined."""
        if self.output_squares == 0.0:
            return None
        squares = nu * nu * self.sparse_squares - 2 * nu * self.products + self.dense_squares
        return float((max(squares, 0.0) / self.output_squares) ** 0.5)


def observe_error(
    linear: nn.Linear,
    behaviour: Behaviour,
    constants: Constants,
    x: torch.Tensor,
    y: torch.Tensor,
) -> ErrorObserver:
    """Return one batch's contribution.

    Args:
        linear: The dense linear.
        behaviour: Pattern and per-token corrections; the phase is not looked at.
        constants: Calibrated constants; a static nu is left out here, see ErrorObserver.
        x: Dense inputs `[..., K]`.
        y: The linear's dense output `[..., O]`.
    """
    site = InputSite(behaviour, constants, linear.in_features, device=x.device)
    selected = site.select(x.detach())
    z = selected.tokens - selected.eta
    kept = z if selected.keep is None else z * selected.keep
    nu = variance_ratio(z, kept)
    defined = kept.var(dim=-1, correction=0) > VARIANCE_FLOOR
    weight = linear.weight.detach().to(torch.float32)
    if constants.remainder is not None:
        # Both products have the remainder's in common, so it is left out of both.
        inner, outer = constants.remainder.inner, constants.remainder.outer
        weight = weight - (inner @ outer).t().to(weight.device)
    sparse = nn.functional.linear(kept, weight)
    if behaviour.variance_correction:
        sparse = nu * sparse
    dense = nn.functional.linear(z, weight)
    return ErrorObserver(
        tokens=z.shape[0],
        nu_sum=float(nu[defined].sum(dtype=torch.float64)),
        nu_tokens=int(defined.sum()),
        sparse_squares=_inner(sparse, sparse),
        products=_inner(sparse, dense),
        dense_squares=_inner(dense, dense),
        output_squares=_inner(y, y),
    )


def _inner(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.dot(a.detach().double().flatten(), b.detach().double().flatten()))
