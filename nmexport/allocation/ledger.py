"""The ledger: what each choice and each mitigation costs every linear, and why it got its."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from nmexport.allocation.costs import Variant, observe_variants
from nmexport.calibration.method import behaviour_of
from nmexport.store.allocation import Candidate, Choice, LedgerRow

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from nmexport.allocation.costs import Problem
    from nmexport.allocation.study import Pick, Study
    from nmexport.calibration.local_error import ErrorObserver
    from nmexport.calibration.sites import Site
    from nmexport.recipe import SparsitySection

AS_BUILT = "as built"
# All mitigations but the learned ones and r-sparse, which a budget refuses. A static variance is
# read from the run that observes the per-token one, so that six runs of a linear show nine.
_OBSERVED: dict[str, tuple[str, ...]] = {
    "none": (),
    "var": ("var",),
    "s-pts": ("s-pts",),
    "s-pts + var": ("s-pts", "var"),
    "d-pts": ("d-pts",),
    "d-pts + var": ("d-pts", "var"),
}
_STATIC = {"s-var": "none", "s-pts + s-var": "s-pts", "d-pts + s-var": "d-pts"}


def rows(problem: Problem, study: Study, pick: Pick, *, price: float | None) -> list[LedgerRow]:
    """Explain the choice of each linear, in the order of the sites.

    Args:
        problem: Model and text, to measure the mitigations on.
        study: Sites and options.
        pick: What each site became.
        price: Nats that the last byte saved costs.
    """
    mitigations = mitigation_errors(problem, pick) if problem.section.compare_mitigations else {}
    return [
        LedgerRow(
            name=name,
            site=site.names,
            weight_bytes=site.in_features * width * study.model.element_bytes,
            choice=choice,
            why=_why(study, site, choice, price),
            candidates=tuple(_candidates(study, site, name)),
            mitigation_errors=mitigations.get(name, {}),
            mitigation_pattern=choice.pattern or problem.method.pattern,
        )
        for site, choice in pick.items()
        for name, width in zip(site.names, site.out_features, strict=True)
    ]


def mitigation_errors(problem: Problem, pick: Pick) -> dict[str, dict[str, float | None]]:
    """Measure every linear's relative output error with each mitigation, at its chosen pattern.

    A linear that stays dense is shown at the recipe's own pattern, where that fits.
    """
    variants: dict[str, dict[str, Variant]] = {}
    for site, choice in pick.items():
        method = problem.method.model_copy(update=_selection(choice))
        mitigated: dict[str, Variant] = {}
        if site.in_features % method.pattern.m == 0:
            for words, names in _OBSERVED.items():
                mitigated[words] = _variant(problem, site, method, names)
        variants |= dict.fromkeys(site.names, mitigated)
    seen = observe_variants(problem, variants, label="fold: errors by mitigation")
    return {name: _errors(observers) for name, observers in seen.items()}


def with_built(row: LedgerRow, error: float | None) -> LedgerRow:
    """Add the error of what was built; of a linear that stays dense there is none."""
    return replace(row, mitigation_errors={**row.mitigation_errors, AS_BUILT: error})


def _selection(choice: Choice) -> dict[str, object]:
    if choice.pattern is None:
        return {"phases": "all"}
    return {"pattern": choice.pattern, "criterion": choice.criterion, "phases": "all"}


def _variant(
    problem: Problem, site: Site, method: SparsitySection, mitigations: tuple[str, ...]
) -> Variant:
    mitigated = method.model_copy(update={"mitigations": mitigations})
    return Variant(
        behaviour=behaviour_of(mitigated), constants=problem.constants_for(site, mitigated)
    )


def _errors(observers: Mapping[str, ErrorObserver]) -> dict[str, float | None]:
    if not observers:
        return {}
    errors = {words: observer.relative_error() for words, observer in observers.items()}
    for words, plain in _STATIC.items():
        errors[words] = observers[plain].relative_error(observers[plain].static_nu())
    return errors


def _candidates(study: Study, site: Site, name: str) -> Iterator[Candidate]:
    whole = study.model.weight_bytes(site)
    for choice, option in study.table[site].items():
        yield Candidate(
            choice=choice,
            kl=option.kl,
            kl_stderr=study.costs.stderr(site, choice),
            relative_error=study.costs.error(site, name, choice),
            bytes_saved=1 - option.bytes / whole,
        )


def _why(study: Study, site: Site, choice: Choice, price: float | None) -> str:
    """Set the choice between its neighbours: what a step either way would cost or return."""
    row = study.table[site]
    mine, percent = row[choice], study.dense.bytes / 100

    def rate(other: Choice) -> float:
        return (row[other].kl - mine.kl) / (mine.bytes - row[other].bytes) * percent

    sparser = [other for other, option in row.items() if option.bytes < mine.bytes]
    denser = [other for other, option in row.items() if option.bytes > mine.bytes]
    words = []
    if sparser:
        cheapest = min(sparser, key=rate)
        words.append(
            f"going on to {cheapest.label} would cost {rate(cheapest):.2g} nats for each "
            "percent of bytes"
        )
    if denser:
        best = max(denser, key=rate)
        words.append(f"back to {best.label} would return {rate(best):.2g}")
    if not words:
        fits = study.costs.variants[site] or study.is_mixed
        return "No choice reads fewer bytes." if fits else "No pattern fits its inputs."
    text = ", ".join(words)
    stands = "the budget leaves room" if price is None else f"a percent costs {price * percent:.2g}"
    return f"{text[0].upper()}{text[1:]}; elsewhere {stands}."
