"""Every site's options in figures, and joint models run on top of them."""

from __future__ import annotations

import bisect
import itertools
import math
from dataclasses import dataclass, field, replace
from functools import cached_property, reduce
from operator import add
from typing import TYPE_CHECKING

from nmexport.allocation.costs import sparse_input
from nmexport.allocation.probe import Movement
from nmexport.allocation.solve import NOTHING, Measure, Option, price, solve
from nmexport.store.allocation import DENSE, Choice, FrontPoint

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from nmexport.allocation.costs import Rounded, SiteCosts
    from nmexport.allocation.prices import CostModel
    from nmexport.allocation.probe import Probe, SparseInput
    from nmexport.calibration.sites import Site
    from nmexport.sparsity.linear import SparseLinear
    from nmexport.store.allocation import PointKind

    Allowed = Callable[[Choice], bool]
    """Tells whether a choice may be picked."""

_LEAST_NATS = 1e-9  # a divergence of nothing still has a logarithm
_UNMOVED = Movement(kl=(0.0,), nll=(0.0,))

Pick = dict["Site", Choice]
"""A choice for every site."""


def any_choice(choice: Choice) -> bool:
    """Allow all choices."""
    del choice
    return True


def is_dense(choice: Choice) -> bool:
    """Allow choices that keep all of an input."""
    return choice.pattern is None


@dataclass
class Additivity:
    """A rising curve from the sum of what sites cost alone to what they cost together.

    Errors of many sites neither simply add nor grow in one way for all models: so the joint model
    is run at a few points, and what lies between them is read off a line in logarithms.
    """

    points: list[tuple[float, float]] = field(default_factory=list)

    def add(self, summed: float, joint: float) -> None:
        """Add a measured point."""
        self.points.append((max(summed, _LEAST_NATS), max(joint, _LEAST_NATS)))

    def joint(self, summed: float) -> float:
        """Predict the joint cost of a sum."""
        return _interpolate(self._curve(), max(summed, _LEAST_NATS))

    def summed(self, joint: float) -> float:
        """Return the sum whose joint cost this is."""
        return _interpolate([(y, x) for x, y in self._curve()], max(joint, _LEAST_NATS))

    def factor(self) -> float | None:
        """Joint over sum, geometric mean of all points; None without any."""
        if not self.points:
            return None
        logs = [math.log(joint / summed) for summed, joint in self.points]
        return math.exp(math.fsum(logs) / len(logs))

    def _curve(self) -> list[tuple[float, float]]:
        """Sort the points and level what noise turns round, so that both coordinates rise."""
        ordered = sorted(self.points)
        highest = itertools.accumulate((y for _, y in ordered), max)
        curve: list[tuple[float, float]] = []
        for (x, _), y in zip(ordered, highest, strict=True):
            if not curve or (x > curve[-1][0] and y > curve[-1][1]):
                curve.append((x, y))
        return curve


def _interpolate(curve: list[tuple[float, float]], x: float) -> float:
    """Interpolate in logarithms; outside of the points in proportion to the nearest."""
    place = bisect.bisect_left(curve, x, key=lambda point: point[0])
    if place in {0, len(curve)}:
        x0, y0 = curve[min(place, len(curve) - 1)]
        return y0 * x / x0
    (x0, y0), (x1, y1) = curve[place - 1], curve[place]
    share = math.log(x / x0) / math.log(x1 / x0)
    return y0 * float((y1 / y0) ** share)


@dataclass(frozen=True, kw_only=True, eq=False)
class Integers:
    """Weights in integers: what joint models run on, and what floats would cost."""

    rounded: Rounded
    """The linears as dense ones in integers."""
    floats: CostModel
    """Prices with weights in floats."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Study:
    """Every site's options in figures, and the joint models that have been tried."""

    table: Mapping[Site, Mapping[Choice, Option]]
    """By site, dense first."""
    costs: SiteCosts
    model: CostModel
    probe: Probe
    """Held-out windows that joint models are measured on."""
    integers: Integers | None = None
    """None where weights are floats."""
    whole: tuple[Choice, ...] = (DENSE,)
    """Choices that keep all of an input, one for each form of weights, the finest first."""
    kl: Additivity = field(default_factory=Additivity)
    """From summed to joint divergence, beyond what the finest weights alone cost."""
    nll: Additivity = field(default_factory=Additivity)
    """From summed divergence to the logarithm of the perplexity ratio, likewise."""
    _tried: dict[tuple[Choice, ...], Movement] = field(default_factory=dict)

    @property
    def finest(self) -> Choice:
        """The choice that every other is held against: dense, in the finest weights."""
        return self.whole[0]

    @property
    def is_mixed(self) -> bool:
        """Tell whether there are several forms of weights to choose among."""
        return len(self.whole) > 1

    @cached_property
    def quantised(self) -> Movement:
        """The loss of the dense model in the finest weights, on the held-out windows.

        It is 0 where weights are floats.

        Rounding and sparsity hardly go together: their divergences add up.
        """
        if self.integers is None:
            return _UNMOVED
        return self.probe.measure_modules(self._modules(self.uniform(self.finest)))

    def run(self, pick: Pick) -> Movement:
        """Run the joint model of a pick on the held-out windows, its weights as stored."""
        key = tuple(pick.values())
        if key not in self._tried:
            moved = self.probe.measure(self._inputs(pick), modules=self._modules(pick))
            self._tried[key] = moved
            summed = self.total(pick).kl
            if summed > 0:
                self.kl.add(summed, moved.kl_mean - self.quantised.kl_mean)
                self.nll.add(summed, moved.nll_mean - self.quantised.nll_mean)
        return self._tried[key]

    def _inputs(self, pick: Pick) -> dict[Site, SparseInput]:
        variants = self.costs.variants
        return {
            site: sparse_input(site, variants[site][choice.selection])
            for site, choice in pick.items()
            if choice.pattern is not None
        }

    def _modules(self, pick: Pick) -> Mapping[str, SparseLinear]:
        if self.integers is None:
            return {}
        chosen = {name: choice for site, choice in pick.items() for name in site.names}
        return self.integers.rounded.of(chosen)

    def solve(
        self,
        *,
        minimise: Measure,
        limits: Mapping[Measure, float],
        among: Allowed = any_choice,
    ) -> Pick | None:
        """Pick an option for every site; None where no pick keeps the limits.

        Args:
            minimise: The sum to minimise.
            limits: Largest sums.
            among: Which choices may be picked.
        """
        rows = {
            site: {choice: option for choice, option in row.items() if among(choice)}
            for site, row in self.table.items()
        }
        if not all(rows.values()):
            return None
        options = [list(row.values()) for row in rows.values()]
        picked = solve(options, minimise=minimise, limits=limits)
        if picked is None:
            return None
        return {
            site: list(row)[index] for (site, row), index in zip(rows.items(), picked, strict=True)
        }

    def price(self, pick: Pick) -> float | None:
        """Price the last byte that a pick saves, in nats; None where bytes are no constraint."""
        return price(self._rows(), max_bytes=self.total(pick).bytes)

    def least(self, measure: Measure) -> Pick:
        """Pick each site's option that has least of something."""
        return {
            site: min(row, key=lambda choice: getattr(row[choice], measure))
            for site, row in self.table.items()
        }

    def uniform(self, choice: Choice) -> Pick:
        """Pick one choice for all sites that have it; the others stay dense, in its weights."""
        whole = next((each for each in self.whole if each.weights == choice.weights), self.finest)
        return {
            site: next((each for each in (choice, whole) if each in row), self.finest)
            for site, row in self.table.items()
        }

    def total(self, pick: Pick) -> Option:
        """Add up a pick's options."""
        return reduce(add, (self.table[site][choice] for site, choice in pick.items()), NOTHING)

    @property
    def dense(self) -> Option:
        """The sums of the dense model in the finest weights."""
        return self.total(self.uniform(self.finest))

    def departs(self, pick: Pick) -> bool:
        """Tell whether a pick is any other than the dense model in the finest weights."""
        return any(choice != self.finest for choice in pick.values())

    def bytes_saved(self, pick: Pick) -> float:
        """Share of the targeted linears' bytes that a decoded token no longer reads."""
        return 1 - self.total(pick).bytes / self.dense.bytes

    def speedup(self, pick: Pick) -> float:
        """Predict how much faster a decoded token is as a whole."""
        other = self.model.other_seconds
        return (self.dense.seconds + other) / (self.total(pick).seconds + other)

    def seconds_at(self, speedup: float) -> float:
        """Time that the targeted linears may take for a speed-up of the whole token."""
        other = self.model.other_seconds
        return (self.dense.seconds + other) / speedup - other

    def point(self, kind: PointKind, label: str, pick: Pick) -> FrontPoint:
        """Describe a pick as a row of the front."""
        return self._point(kind, label, pick, self.run(pick))

    def quantised_point(self, label: str) -> FrontPoint:
        """Describe the dense model in the finest weights."""
        return self._point("integers", label, self.uniform(self.finest), self.quantised)

    def float_point(self, label: str, pick: Pick) -> FrontPoint:
        """Describe a pick's patterns with weights in floats: sparsity alone.

        Raises:
            ValueError: if weights are floats anyway.
        """
        if self.integers is None:
            raise ValueError("weights are floats: every point is one of sparsity alone")
        floats = self.integers.floats
        bare = {site: choice.selection for site, choice in pick.items()}
        whole = sum(floats.read_bytes(site, DENSE) for site in bare)
        read = sum(floats.read_bytes(site, choice) for site, choice in bare.items())
        quick = _seconds(floats, dict.fromkeys(bare, DENSE)) / _seconds(floats, bare)
        moved = self.probe.measure(self._inputs(pick))
        return FrontPoint(
            kind="floats",
            label=label,
            bytes_saved=1 - read / whole,
            decode_speedup=quick,
            summed_kl=self.total(pick).kl,
            kl=moved.kl_mean,
            perplexity_ratio=math.exp(moved.nll_mean),
            linears=count_linears(bare),
            float_bytes=read / whole,
            float_speedup=quick,
        )

    def _point(self, kind: PointKind, label: str, pick: Pick, moved: Movement) -> FrontPoint:
        float_bytes, float_speedup = self._over_floats(pick)
        return FrontPoint(
            kind=kind,
            label=label,
            bytes_saved=self.bytes_saved(pick),
            decode_speedup=self.speedup(pick),
            summed_kl=self.total(pick).kl,
            kl=moved.kl_mean,
            perplexity_ratio=math.exp(moved.nll_mean),
            linears=count_linears(pick),
            float_bytes=float_bytes,
            float_speedup=float_speedup,
        )

    def _over_floats(self, pick: Pick) -> tuple[float, float] | tuple[None, None]:
        """Bytes and speed of a pick, to the dense model in floats."""
        if self.integers is None:
            return None, None
        floats, dense = self.integers.floats, dict.fromkeys(self.table, DENSE)
        whole = sum(floats.read_bytes(site, DENSE) for site in dense)
        return (
            self.total(pick).bytes / whole,
            _seconds(floats, dense) / _seconds(self.model, pick),
        )

    def _rows(self) -> list[list[Option]]:
        return [list(row.values()) for row in self.table.values()]


def _seconds(model: CostModel, pick: Pick) -> float:
    """Time of a whole decoded token."""
    return model.other_seconds + math.fsum(
        model.seconds(site, choice) for site, choice in pick.items()
    )


def count_linears(pick: Pick) -> dict[str, int]:
    """Count linears by the label of their choice, densest first."""
    counts: dict[str, int] = {}
    for site, choice in sorted(pick.items(), key=lambda pair: -pair[1].decode_density):
        counts[choice.label] = counts.get(choice.label, 0) + len(site.names)
    return counts


def study_of(
    costs: SiteCosts,
    model: CostModel,
    probe: Probe,
    *,
    prefill_weight: float,
    integers: Integers | None = None,
    forms: Sequence[str | None] = (None,),
) -> Study:
    """Put figures to every site's choices.

    Args:
        costs: What each costs in accuracy, alone.
        model: Bytes and seconds.
        probe: Held-out windows.
        prefill_weight: Worth of a prompt's multiply-adds, in decode time.
        integers: What weights in integers add; None where they are floats.
        forms: Of weights to choose among, the finest first; None is the only one.
    """
    whole = tuple(Choice(weights=form) for form in forms)
    table = {
        site: _options(site, _divergences(site, costs, forms), model, prefill_weight)
        for site in costs.variants
    }
    gains = {
        site: {choice: option for choice, option in row.items() if _gains(option, row[whole[0]])}
        for site, row in table.items()
    }
    if any(gains.values()):  # else all are kept: a budget of accuracy alone still has a choice
        table = {site: {whole[0]: table[site][whole[0]], **row} for site, row in gains.items()}
    return Study(table=table, costs=costs, model=model, probe=probe, integers=integers, whole=whole)


def _divergences(site: Site, costs: SiteCosts, forms: Sequence[str | None]) -> dict[Choice, float]:
    """Nats a token that each choice of a site causes; what rounds and what drops adds up."""
    selections = {DENSE: 0.0, **costs.divergences(site)}
    return {
        replace(choice, weights=form): kl + costs.divergence_of(site, form)
        for form in forms
        for choice, kl in selections.items()
    }


def _options(
    site: Site, divergences: Mapping[Choice, float], model: CostModel, prefill_weight: float
) -> dict[Choice, Option]:
    whole = model.seconds(site, DENSE)

    def option(choice: Choice, kl: float) -> Option:
        read, seconds = model.read_bytes(site, choice), model.seconds(site, choice)
        return Option(
            kl=kl,
            bytes=read,
            seconds=seconds,
            worth=seconds + prefill_weight * choice.prefill_density * whole,
            work=read + choice.prefill_density * model.weight_bytes(site),
        )

    return {pick: option(pick, kl) for pick, kl in divergences.items()}


def _gains(option: Option, dense: Option) -> bool:
    """Tell whether an option reads less than dense or is worth more: else it can only cost."""
    return option.bytes < dense.bytes or option.worth < dense.worth
