"""The budget's choice: options of all sites, joint models run on top, and the Pareto front."""

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
from nmexport.errors import RecipeError
from nmexport.store.allocation import DENSE, Choice, FrontPoint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from nmexport.allocation.costs import CostModel, Rounded, SiteCosts
    from nmexport.allocation.probe import Probe, SparseInput
    from nmexport.calibration.sites import Site
    from nmexport.progress import Progress
    from nmexport.recipe import BudgetSection
    from nmexport.sparsity.linear import SparseLinear
    from nmexport.store.allocation import PointKind

    Allowed = Callable[[Choice], bool]
    """Tells whether a choice may be picked."""

# Solving for an accuracy budget, running the result, solving again: so often at most.
_ROUNDS = 8
# A measured model within this share of its budget is as good as one right on it.
_NEAR = 0.97
# After a sum that exceeded the budget none above this share of it is tried, after the next none
# above its square of that, and so on: a lucky joint model just below would draw them there.
_STEP = 0.85
_LEAST_NATS = 1e-9  # a divergence of nothing still has a logarithm
_UNMOVED = Movement(kl=(0.0,), nll=(0.0,))

Pick = dict["Site", Choice]
"""A choice for every site."""


def _any_choice(choice: Choice) -> bool:
    del choice
    return True


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
        among: Allowed = _any_choice,
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
        whole = next((one for one in self.whole if one.weights == choice.weights), self.finest)
        return {
            site: next((one for one in (choice, whole) if one in row), self.finest)
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
            linears=_count(bare),
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
            linears=_count(pick),
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


def _count(pick: Pick) -> dict[str, int]:
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


# -- choosing --------------------------------------------------------------------------------------


def uniform_points(study: Study, progress: Progress) -> list[FrontPoint]:
    """Run every choice given to all sites that it fits: what a build without a budget can have.

    A dense one is quantisation alone.
    """
    kinds = dict.fromkeys(
        pick for row in study.table.values() for pick in row if pick != study.finest
    )
    return [
        study.point(
            "integers" if choice.pattern is None else "uniform",
            choice.label,
            study.uniform(choice),
        )
        for choice in progress.track(kinds, label="fold: uniform choices", total=len(kinds))
    ]


def front_points(study: Study, shares: Sequence[float], progress: Progress) -> list[FrontPoint]:
    """Find the least divergence for each share of bytes saved; leave out shares out of reach.

    Shares are of the dense model's bytes in each form of weights. Where these are integers, what
    sparsity alone and quantisation alone come to stands beside.
    """
    marks = [(whole, share) for whole in study.whole for share in shares]
    points: dict[tuple[PointKind, str], FrontPoint] = {}
    for whole, share in progress.track(marks, label="fold: Pareto front", total=len(marks)):
        label = f"{100 * share:.0f} %"
        if study.is_mixed:
            label += f" of {whole.weights}"
        points |= {(one.kind, label): one for one in _points_at(study, whole, share, label)}
    return list(points.values())


def _points_at(study: Study, whole: Choice, share: float, label: str) -> Iterator[FrontPoint]:
    """Points of the front's lines where so many of the bytes of a form of weights are saved."""
    read = study.total(study.uniform(whole)).bytes
    limit: dict[Measure, float] = {"bytes": (1 - share) * read}
    both = study.solve(minimise="kl", limits=limit)
    if both is not None:
        yield study.point("front", label, both)
    if study.integers is None:
        return
    if study.is_mixed:
        plain = study.solve(minimise="kl", limits=limit, among=_is_dense)
        if plain is not None:
            yield study.point("integers", label, plain)
    if whole == study.finest:
        sparse = study.solve(
            minimise="kl", limits=limit, among=lambda choice: choice.weights == whole.weights
        )
        if sparse is not None:
            yield study.float_point(label, sparse)


def _is_dense(choice: Choice) -> bool:
    return choice.pattern is None


def choose(
    study: Study,
    budget: BudgetSection,
    *,
    relief: float = 1.0,
) -> Pick:
    """Pick an option for every site under the budget.

    A budget of accuracy is held by the joint model as measured on the held-out windows, not merely
    as predicted; the fastest such pick is taken. Where the cost model sees no gain in any, the one
    that reads and multiplies least is. Without such a budget, the least divergence is taken.

    Args:
        study: What was measured.
        budget: Limits.
        relief: What limits of accuracy, in nats, are multiplied by.

    Raises:
        RecipeError: if no pick keeps the budget, or only the dense model does.
    """
    pick = _pick_within(study, budget, relief)
    if pick is None or not study.departs(pick):
        raise _out_of_reach(study, budget)
    return pick


def without_sparsity(study: Study, budget: BudgetSection, *, relief: float = 1.0) -> Pick | None:
    """Pick a form of weights alone for every site under the budget.

    Returns:
        None where there is one form, or no such pick keeps the budget.
    """
    return _pick_within(study, budget, relief, among=_is_dense) if study.is_mixed else None


def better_of(study: Study, budget: BudgetSection, pick: Pick, plain: Pick | None) -> Pick:
    """Choose between a pick and one without sparsity: by what was measured, not predicted.

    Both keep the budget. With a limit on accuracy the faster is better, else the more accurate.
    """
    if plain is None or not study.departs(plain):
        return pick

    def cost(one: Pick) -> float:
        return study.total(one).worth if budget.limits_accuracy else study.run(one).kl_mean

    return plain if cost(plain) <= cost(pick) else pick


def _pick_within(
    study: Study, budget: BudgetSection, relief: float, *, among: Allowed = _any_choice
) -> Pick | None:
    """Pick within the budget: the fastest with a limit on accuracy, else the most accurate."""
    limits: dict[Measure, float] = {}
    if budget.max_bytes is not None:
        limits["bytes"] = budget.max_bytes * study.dense.bytes
    if budget.min_speedup is not None:
        limits["seconds"] = study.seconds_at(budget.min_speedup)
    if not budget.limits_accuracy:
        return study.solve(minimise="kl", limits=limits, among=among)
    _check_quantised(study, budget)
    aim: Measure = "worth" if study.departs(study.least("worth")) else "work"
    return _most_within(study, budget, limits, relief, minimise=aim, among=among)


def remark(study: Study, pick: Pick, plain: Pick | None = None) -> str | None:
    """Say where a pick gains nothing, and what sparsity adds to quantisation alone.

    Args:
        study: What was measured.
        pick: What was chosen.
        plain: The best pick without sparsity under the same budget.

    Returns:
        None where there is nothing to say.
    """
    words = []
    if study.total(pick).worth >= study.dense.worth:
        words.append(
            f"The cost model sees no gain in this choice: decode at {study.speedup(pick):.2f}x the "
            "dense model's speed. Measure it, or give allocation.cost the constants of the target."
        )
    if study.is_mixed:
        words.append(_on_sparsity(study, pick, plain))
    return " ".join(words) or None


def _on_sparsity(study: Study, pick: Pick, plain: Pick | None) -> str:
    """Say whether sparsity pays beside quantisation alone."""
    if all(map(_is_dense, pick.values())):
        counts = ", ".join(f"{count} {name}" for name, count in _count(pick).items())
        return f"Sparsity does not pay under this budget: every linear stays dense ({counts})."
    if plain is None:
        return "Quantisation alone does not keep this budget."
    return (
        "Under the same budget quantisation alone "
        f"{_in_figures(study, plain)}; with sparsity it {_in_figures(study, pick)}."
    )


def _in_figures(study: Study, pick: Pick) -> str:
    """What a pick saves, gains and costs."""
    moved = study.run(pick)
    return (
        f"saves {study.bytes_saved(pick):.0%} of the bytes and decodes "
        f"{study.speedup(pick):.2f}x as fast, by the cost model, at a perplexity ratio of "
        f"{math.exp(moved.nll_mean):.3f} and a KL of {moved.kl_mean:.3g}"
    )


def _check_quantised(study: Study, budget: BudgetSection) -> None:
    """Refuse a budget of accuracy that weights in integers exceed before anything is sparse.

    Raises:
        RecipeError: says what they cost.
    """
    kl, nll = study.quantised.kl_mean, study.quantised.nll_mean
    if (share_used(budget, kl=kl, nll=nll) or 0.0) < 1:
        return
    raise RecipeError(
        f"{study.model.sparse_weights} weights alone exceed the budget: perplexity ratio "
        f"{math.exp(nll):.3f}, KL {kl:.3g} nats.",
        allowed="a budget that leaves room for sparsity",
        fix="loosen --budget, or store weights in more bits with --weights",
    )


def _most_within(
    study: Study,
    budget: BudgetSection,
    limits: dict[Measure, float],
    relief: float,
    *,
    minimise: Measure,
    among: Allowed,
) -> Pick | None:
    """Minimise something over the picks whose joint model keeps the accuracy budget."""
    best: Pick | None = None
    least, kept, exceeded, failures = math.inf, 0.0, math.inf, 0
    for _ in range(_ROUNDS):
        wanted = min(_summed_limit(study, budget, relief), _STEP**failures * exceeded)
        target = _between(kept, wanted, exceeded)
        pick = study.solve(minimise=minimise, limits={**limits, "kl": target}, among=among)
        if pick is None or pick == best:
            break
        moved, total = study.run(pick), study.total(pick)
        share = (share_used(budget, kl=moved.kl_mean, nll=moved.nll_mean) or 0.0) / relief
        if share > 1:
            exceeded, failures = min(exceeded, total.kl), failures + 1
            continue
        kept = max(kept, total.kl)
        if getattr(total, minimise) < least:
            best, least = pick, getattr(total, minimise)
        if share >= _NEAR:
            break
    return best


def _between(kept: float, wanted: float, exceeded: float) -> float:
    """Choose the next limit on a sum of divergences: what few windows say of it is noisy.

    Args:
        kept: The largest sum known to keep the budget; 0 without one.
        wanted: The limit by what all joint models showed.
        exceeded: The least sum known to exceed the budget.
    """
    if kept < wanted:
        return wanted
    return 2 * kept if exceeded == math.inf else math.sqrt(kept * exceeded)


def share_used(budget: BudgetSection, *, kl: float, nll: float) -> float | None:
    """Share of the accuracy budget that a model takes; beyond 1 it is exceeded, None without one.

    Args:
        budget: Limits.
        kl: The model's divergence, nats a token.
        nll: The logarithm of its perplexity ratio.
    """
    shares = []
    if budget.max_kl is not None:
        shares.append(kl / budget.max_kl)
    if budget.max_perplexity_ratio is not None:
        shares.append(nll / math.log(budget.max_perplexity_ratio))
    return max(shares) if shares else None


def _summed_limit(study: Study, budget: BudgetSection, relief: float) -> float:
    """Turn the joint budget into a limit on the sum of single divergences, as far as is known."""
    limits = []
    if budget.max_kl is not None:
        left = relief * budget.max_kl - study.quantised.kl_mean
        limits.append(study.kl.summed(left))
    if budget.max_perplexity_ratio is not None:
        left = relief * math.log(budget.max_perplexity_ratio) - study.quantised.nll_mean
        limits.append(study.nll.summed(left))
    return min(limits)


def _out_of_reach(study: Study, budget: BudgetSection) -> RecipeError:
    quickest = study.least("seconds")
    given = ", ".join(f"{name} {value:g}" for name, value in budget.limits().items())
    if not study.departs(quickest):
        why = "the linears are so small that finding rows takes longer than reading all of them"
    else:
        why = f"a speed-up of at most {study.speedup(quickest):.2f}"
    least_bytes = 1 - study.bytes_saved(study.least("bytes"))
    return RecipeError(
        f"No choice of patterns{' and weights' if study.is_mixed else ''} keeps the budget "
        f"({given}) and {'saves' if study.is_mixed else 'sparsifies'} anything.",
        allowed=f"bytes of at least {least_bytes:.2f}; by the cost model {why}; "
        "the more of either, the less accuracy",
        fix="loosen --budget, or give allocation.patterns and allocation.weights more to choose "
        "among"
        if study.is_mixed
        else "loosen --budget, or give allocation.patterns more to choose among; with --pattern "
        "16:16 --weights int8 nothing is sparse, and a quarter of the bytes are read",
    )
