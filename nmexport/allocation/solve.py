"""The choice as an integer programme: one option for every site, under limits on their sums."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray
    from scipy.sparse import csr_array

Measure = Literal["kl", "bytes", "seconds", "worth", "work"]

# Branch and bound ends by a count, not by the clock: the same on every machine.
_NODES = 20_000
_GAP = 1e-4
# Of equal optima the one with the smaller divergence, or the fewer bytes.
_TIE = 1e-6


@dataclass(frozen=True)
class Option:
    """Addends of one choice to the sums."""

    kl: float
    bytes: float
    seconds: float
    worth: float
    """Objective for speed: seconds, and a prompt's time as far as that is wanted."""
    work: float
    """Objective where no choice gains speed: bytes read, and a prompt's multiply-adds."""

    def __add__(self, other: Option) -> Option:
        """Add up every measure."""
        pairs = zip(astuple(self), astuple(other), strict=True)
        return Option(*(left + right for left, right in pairs))


NOTHING = Option(kl=0.0, bytes=0.0, seconds=0.0, worth=0.0, work=0.0)


def solve(
    options: Sequence[Sequence[Option]],
    *,
    minimise: Measure,
    limits: Mapping[Measure, float],
) -> list[int] | None:
    """Pick an option for every site; None where no pick keeps the limits.

    Args:
        options: Each site's, at least one.
        minimise: The sum to minimise.
        limits: Largest sums.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    tie: Measure = "bytes" if minimise == "kl" else "kl"
    cost = _scale(options, minimise) + _TIE * _scale(options, tie)
    constraints = [LinearConstraint(_require_one_each(options), 1, 1)]
    for measure, limit in limits.items():
        row = _values(options, measure)
        scale = max(abs(row).max(), np.finfo(float).tiny)
        constraints.append(LinearConstraint(row[None, :] / scale, -np.inf, limit / scale))
    with _no_native_output():
        solution = milp(
            cost,
            constraints=constraints,
            bounds=Bounds(0, 1),
            integrality=np.ones(cost.size),
            options={"node_limit": _NODES, "mip_rel_gap": _GAP},
        )
    return None if solution.x is None else _read_picks(options, solution.x)


def price(options: Sequence[Sequence[Option]], *, max_bytes: float) -> float | None:
    """Price the last byte saved, in nats, where the bytes read are held to a limit.

    It is the multiplier of the limit in the linear relaxation; None where the limit does not bind.
    """
    from scipy.optimize import linprog

    kl, read = _values(options, "kl"), _values(options, "bytes")
    scale = max(abs(read).max(), np.finfo(float).tiny)
    solution = linprog(
        kl,
        A_ub=read[None, :] / scale,
        b_ub=[max_bytes / scale],
        A_eq=_require_one_each(options),
        b_eq=np.ones(len(options)),
        bounds=(0, 1),
        method="highs",
    )
    if solution.x is None:
        return None
    multiplier = -float(solution.ineqlin.marginals[0]) / scale
    return multiplier if multiplier > 0 else None


def _values(options: Sequence[Sequence[Option]], measure: Measure) -> NDArray[np.float64]:
    return np.array([getattr(option, measure) for row in options for option in row])


def _scale(options: Sequence[Sequence[Option]], measure: Measure) -> NDArray[np.float64]:
    """Divide values by the sum of each site's largest."""
    values = _values(options, measure)
    largest = sum(max(getattr(option, measure) for option in row) for row in options)
    scaled: NDArray[np.float64] = values / max(largest, np.finfo(float).tiny)
    return scaled


def _require_one_each(options: Sequence[Sequence[Option]]) -> csr_array:
    """`[sites, options]`: one where the option is the site's."""
    from scipy.sparse import csr_array

    rows = [site for site, row in enumerate(options) for _ in row]
    return csr_array((np.ones(len(rows)), (rows, np.arange(len(rows)))))


def _read_picks(options: Sequence[Sequence[Option]], x: NDArray[np.float64]) -> list[int]:
    ends = np.cumsum([len(row) for row in options])[:-1]
    return [int(part.argmax()) for part in np.split(x, ends)]


@contextlib.contextmanager
def _no_native_output() -> Iterator[None]:
    """Keep standard output for results: HiGHS prints a line of its own now and then."""
    libc = ctypes.CDLL(None)
    sys.stdout.flush()
    libc.fflush(None)
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        libc.fflush(None)
        os.dup2(kept, 1)
        os.close(nowhere)
        os.close(kept)
