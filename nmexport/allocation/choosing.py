"""The choice under a budget, held by joint models as measured, and what there is to say of it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from nmexport.allocation.study import any_choice, count_linears, is_dense
from nmexport.errors import RecipeError

if TYPE_CHECKING:
    from nmexport.allocation.solve import Measure
    from nmexport.allocation.study import Allowed, Pick, Study
    from nmexport.recipe import BudgetSection

# Solving for an accuracy budget, running the result, solving again: so often at most.
_ROUNDS = 8
# A measured model within this share of its budget is as good as one right on it.
_NEAR = 0.97
# After a sum that exceeded the budget none above this share of it is tried, after the next none
# above its square of that, and so on: a lucky joint model just below would draw them there.
_STEP = 0.85


class Chosen(NamedTuple):
    """The best pick under a budget, and the best without sparsity."""

    pick: Pick
    plain: Pick | None
    """None where weights have one form, or no such pick keeps the budget."""


def choose(study: Study, budget: BudgetSection, *, relief: float = 1.0) -> Chosen:
    """Pick an option for every site under the budget.

    A budget of accuracy is held by the joint model as measured on the held-out windows, not merely
    as predicted; the fastest such pick is taken. Where the cost model sees no gain in any, the one
    that reads and multiplies least is. Without such a budget, the least divergence is taken.

    Where forms of weights are chosen too, a pick without sparsity that is no worse is taken: no
    worse as measured, since both are run.

    Args:
        study: What was measured.
        budget: Limits.
        relief: What limits of accuracy, in nats, are multiplied by.

    Raises:
        RecipeError: if no pick keeps the budget, or only the dense model does.
    """

    def cost(pick: Pick) -> float:
        if budget.limits_accuracy:
            return study.total(pick).worth
        return study.run(pick).kl_mean

    pick, plain = _pick_within(study, budget, relief), None
    if study.is_mixed:
        plain = _pick_within(study, budget, relief, among=is_dense)
    candidates = [each for each in (plain, pick) if each is not None and study.departs(each)]
    if not candidates:
        raise _out_of_reach(study, budget)
    best = candidates[0] if len(candidates) == 1 else min(candidates, key=cost)
    return Chosen(best, plain)


def _pick_within(
    study: Study, budget: BudgetSection, relief: float, *, among: Allowed = any_choice
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


def remark(study: Study, chosen: Chosen) -> str | None:
    """Say where a pick gains nothing, and what sparsity adds to quantisation alone.

    Returns:
        None where there is nothing to say.
    """
    pick, words = chosen.pick, []
    if study.total(pick).worth >= study.dense.worth:
        words.append(
            f"The cost model sees no gain in this choice: decode at {study.speedup(pick):.2f}x the "
            "dense model's speed. Measure it, or give allocation.cost the constants of the target."
        )
    if study.is_mixed:
        words.append(_on_sparsity(study, chosen))
    return " ".join(words) or None


def _on_sparsity(study: Study, chosen: Chosen) -> str:
    """Say whether sparsity pays beside quantisation alone."""
    pick, plain = chosen
    if all(map(is_dense, pick.values())):
        counts = ", ".join(f"{count} {name}" for name, count in count_linears(pick).items())
        return f"Sparsity does not pay under this budget: every linear stays dense ({counts})."
    if plain is None:
        return "Quantisation alone does not keep this budget."
    return (
        "Under the same budget quantisation alone "
        f"{_in_figures(study, plain)}; with sparsity it {_in_figures(study, pick)}."
    )


def _in_figures(study: Study, pick: Pick) -> str:
    """Say what a pick saves, gains and costs."""
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
