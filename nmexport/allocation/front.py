"""The Pareto front, the uniform choices beside it, and the choice under a budget."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from nmexport.allocation.choice import DENSE, Choice
from nmexport.allocation.programme import Measure, solve
from nmexport.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nmexport.allocation.choice import FrontPoint
    from nmexport.allocation.study import Study
    from nmexport.progress import Progress
    from nmexport.recipe import BudgetSection

# Solving for an accuracy budget, running the result, solving again: so often at most.
_ROUNDS = 6
# A measured model within this share of its budget is as good as one right on it.
_NEAR = 0.97


def uniform_points(study: Study, progress: Progress) -> list[FrontPoint]:
    """Every choice given to all sites that it fits: what a build without a budget can have."""
    kinds = dict.fromkeys(one for choices in study.choices for one in choices if one != DENSE)
    return [
        study.point("uniform", one.label, _uniform(study, one))
        for one in progress.track(kinds, label="fold: uniform choices", total=len(kinds))
    ]


def front_points(study: Study, shares: Sequence[float], progress: Progress) -> list[FrontPoint]:
    """The least divergence for each share of bytes saved; shares out of reach are left out."""
    found = []
    for share in progress.track(shares, label="fold: Pareto front", total=len(shares)):
        limit: dict[Measure, float] = {"bytes": (1 - share) * study.dense.bytes}
        picked = solve(study.options, minimise="kl", limits=limit)
        if picked is not None:
            found.append(study.point("front", f"{100 * share:.0f} %", picked))
    return found


def choose(study: Study, budget: BudgetSection, *, relief: float = 1.0) -> list[int]:
    """An option for every site under the budget.

    A budget of accuracy is held by the joint model as measured on the held-out windows, not merely
    as predicted; the fastest such choice is taken. Where the cost model sees no choice that is
    faster than dense, the one that reads the fewest bytes is. Without such a budget, the least
    divergence is taken.

    Args:
        study: What was measured.
        budget: Limits.
        relief: What limits of accuracy, in nats, are multiplied by.

    Raises:
        RecipeError: if no choice keeps the budget, or only the dense model does.
    """
    limits: dict[Measure, float] = {}
    if budget.max_bytes is not None:
        limits["bytes"] = budget.max_bytes * study.dense.bytes
    if budget.min_speedup is not None:
        limits["seconds"] = study.seconds_at(budget.min_speedup)
    if budget.max_kl is None and budget.max_perplexity_ratio is None:
        picked = solve(study.options, minimise="kl", limits=limits)
    else:
        picked = _most_within(study, budget, limits, relief, minimise="worth")
        if picked is None or not any(picked):
            picked = _most_within(study, budget, limits, relief, minimise="bytes")
    if picked is None or not any(picked):
        raise _out_of_reach(study, budget)
    return picked


def _most_within(
    study: Study,
    budget: BudgetSection,
    limits: dict[Measure, float],
    relief: float,
    *,
    minimise: Literal["worth", "bytes"],
) -> list[int] | None:
    """Find the choice with least of something whose joint model keeps the accuracy budget."""
    best: list[int] | None = None
    for _ in range(_ROUNDS):
        target = _summed_limit(study, budget, relief)
        picked = solve(study.options, minimise=minimise, limits={**limits, "kl": target})
        if picked is None or picked == best:
            break
        moved = study.run(picked)
        share = (share_used(budget, kl=moved.kl_mean, nll=moved.nll_mean) or 0.0) / relief
        if share <= 1 and (
            best is None or _sum(study, picked, minimise) < _sum(study, best, minimise)
        ):
            best = picked
        if _NEAR <= share <= 1:
            break
    return best


def share_used(budget: BudgetSection, *, kl: float, nll: float) -> float | None:
    """How much of the accuracy budget a model takes; more than 1 breaks it, None is no such budget.

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
    """The sum of single divergences that the joint budget comes to, as far as is known."""
    limits = []
    if budget.max_kl is not None:
        limits.append(study.kl.summed(relief * budget.max_kl))
    if budget.max_perplexity_ratio is not None:
        limits.append(study.nll.summed(relief * math.log(budget.max_perplexity_ratio)))
    return min(limits)


def _sum(study: Study, picked: Sequence[int], measure: Measure) -> float:
    total: float = getattr(study.total(picked), measure)
    return total


def _uniform(study: Study, choice: Choice) -> list[int]:
    return [row.index(choice) if choice in row else 0 for row in study.choices]


def _extreme(study: Study, measure: Measure) -> list[int]:
    """The option of each site that has least of something."""
    values = [[getattr(one, measure) for one in row] for row in study.options]
    return [row.index(min(row)) for row in values]


def _out_of_reach(study: Study, budget: BudgetSection) -> RecipeError:
    least, quickest = _extreme(study, "bytes"), _extreme(study, "seconds")
    given = ", ".join(f"{name} {value:g}" for name, value in budget.limits().items())
    if not any(quickest):
        why = "the linears are so small that finding rows takes longer than reading all of them"
    else:
        why = f"a speed-up of at most {study.speedup(quickest):.2f}"
    return RecipeError(
        f"No choice of patterns keeps the budget ({given}) and sparsifies anything.",
        allowed=f"bytes of at least {1 - study.bytes_saved(least):.2f}; by the cost model {why}; "
        "the more of either, the less accuracy",
        fix="loosen --budget, or give allocation.patterns more to choose among",
    )
