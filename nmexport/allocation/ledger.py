"""The ledger: what each choice and each mitigation costs every linear, and why it got its."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from nmexport.allocation.candidates import selection_key
from nmexport.allocation.choice import DENSE, Candidate, Choice, LedgerRow
from nmexport.allocation.local_errors import Variant, observe_variants
from nmexport.calibration.method import behaviour_of
from nmexport.sparsity.remainder import rank_within, remainder_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import nn

    from nmexport.allocation.candidates import ConstantsFor
    from nmexport.allocation.probe import Movement
    from nmexport.allocation.study import Study
    from nmexport.calibration.local_error import ErrorObserver
    from nmexport.calibration.sites import Site
    from nmexport.progress import Progress
    from nmexport.recipe import SparsitySection

# What is not learned; static variance is read off its per-token sibling's observation, so that
# eight runs of a linear show eleven.
_OBSERVED: dict[str, tuple[str, ...]] = {
    "none": (),
    "var": ("var",),
    "s-pts": ("s-pts",),
    "s-pts + var": ("s-pts", "var"),
    "d-pts": ("d-pts",),
    "d-pts + var": ("d-pts", "var"),
    "r-sparse": ("r-sparse",),
    "r-sparse + var": ("r-sparse", "var"),
}
AS_BUILT = "as built"
_STATIC = {"s-var": "none", "s-pts + s-var": "s-pts", "d-pts + s-var": "d-pts"}


def mitigation_errors(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    chosen: Mapping[Site, Choice],
    windows: torch.Tensor,
    *,
    method: SparsitySection,
    constants_for: ConstantsFor,
    progress: Progress,
) -> dict[str, dict[str, float | None]]:
    """Relative output error of every linear alone with each mitigation, at its chosen pattern.

    A linear that stays dense is shown at the recipe's own pattern, where that fits.
    """
    variants: dict[str, dict[str, Variant]] = {}
    for site, choice in chosen.items():
        changed = method.model_copy(update=_selection(choice))
        fits = site.in_features % changed.pattern.m == 0
        mine = {
            words: _variant(site, changed, names, constants_for)
            for words, names in _OBSERVED.items()
            if fits
        }
        for name in site.names:
            variants[name] = _with_remainder(mine, linears[name], method.remainder)
    seen = observe_variants(
        model, linears, variants, windows, progress=progress, label="fold: errors by mitigation"
    )
    return {name: _errors(observers) for name, observers in seen.items()}


def rows(
    study: Study,
    chosen: Mapping[Site, Choice],
    *,
    moved: Mapping[Site, Mapping[Choice, Movement]],
    observed: Mapping[str, Mapping[str, ErrorObserver]],
    mitigations: Mapping[str, Mapping[str, float | None]],
    method: SparsitySection,
    price: float | None,
) -> list[LedgerRow]:
    """One row for each linear, in the order of the sites.

    Args:
        study: Sites and options.
        chosen: What each site became.
        moved: Choices that were tried alone.
        observed: Local errors by linear and selection.
        mitigations: Errors by mitigation, by linear.
        method: The recipe's.
        price: Nats that the last byte saved costs.
    """
    found = []
    for place, (site, choice) in enumerate(chosen.items()):
        why = _why(study, place, choice, price)
        pattern = choice.pattern or str(method.pattern)
        for name, width in zip(site.names, site.out_features, strict=True):
            found.append(
                LedgerRow(
                    name=name,
                    site=site.names,
                    weight_bytes=site.in_features * width * study.cost.element_bytes,
                    choice=choice,
                    why=why,
                    candidates=tuple(_candidates(study, place, moved[site], observed[name])),
                    mitigation_errors=dict(mitigations[name]),
                    mitigation_pattern=pattern,
                )
            )
    return found


def with_built(row: LedgerRow, error: float | None) -> LedgerRow:
    """The row with the error of what was built; of a linear that stays dense there is none."""
    return replace(row, mitigation_errors={**row.mitigation_errors, AS_BUILT: error})


def _selection(choice: Choice) -> dict[str, object]:
    if choice == DENSE:
        return {"phases": "all"}
    return {"pattern": choice.nm, "criterion": choice.criterion, "phases": "all"}


def _variant(
    site: Site, method: SparsitySection, names: tuple[str, ...], constants_for: ConstantsFor
) -> Variant:
    mitigated = method.model_copy(update={"mitigations": names})
    return Variant(behaviour=behaviour_of(mitigated), constants=constants_for(site, mitigated))


def _with_remainder(
    variants: Mapping[str, Variant], linear: nn.Linear, share: float
) -> dict[str, Variant]:
    """A site's variants for one of its linears, which has factors of its own for `r-sparse`."""
    if not variants:
        return {}
    rank = rank_within(share, linear.in_features, linear.out_features)
    factors = remainder_of(linear.weight, rank)
    return {
        words: replace(one, constants=replace(one.constants, remainder=factors))
        if "r-sparse" in _OBSERVED[words]
        else one
        for words, one in variants.items()
    }


def _errors(observers: Mapping[str, ErrorObserver]) -> dict[str, float | None]:
    if not observers:
        return {}
    errors = {words: one.relative_error() for words, one in observers.items()}
    for words, plain in _STATIC.items():
        errors[words] = observers[plain].relative_error(observers[plain].static_nu())
    return errors


def _candidates(
    study: Study,
    place: int,
    moved: Mapping[Choice, Movement],
    observed: Mapping[str, ErrorObserver],
) -> list[Candidate]:
    found = []
    whole = study.cost.weight_bytes(study.sites[place])
    for choice, option in zip(study.choices[place], study.options[place], strict=True):
        nu = 1.0
        if choice != DENSE:
            constants = study.variants[study.sites[place]][choice].constants
            nu = 1.0 if constants.nu is None else constants.nu
        found.append(
            Candidate(
                choice=choice,
                kl=option.kl,
                kl_stderr=moved[choice].kl_stderr if choice in moved else None,
                relative_error=0.0
                if choice == DENSE
                else observed[selection_key(choice)].relative_error(nu),
                bytes_saved=1 - option.bytes / whole,
            )
        )
    return found


def _why(study: Study, place: int, choice: Choice, price: float | None) -> str:
    """The choice between its neighbours: what one step either way would cost or return."""
    options, choices = study.options[place], study.choices[place]
    mine = options[choices.index(choice)]
    percent = study.dense.bytes / 100

    def rate(index: int) -> float:
        return (options[index].kl - mine.kl) / (mine.bytes - options[index].bytes) * percent

    sparser = [index for index, one in enumerate(options) if one.bytes < mine.bytes]
    denser = [index for index, one in enumerate(options) if one.bytes > mine.bytes]
    words = []
    if sparser:
        cheapest = min(sparser, key=rate)
        words.append(
            f"going on to {choices[cheapest].label} would cost {rate(cheapest):.2g} nats for each "
            "percent of bytes"
        )
    if denser:
        best = max(denser, key=rate)
        words.append(f"back to {choices[best].label} would return {rate(best):.2g}")
    if not words:
        return "No pattern fits its inputs."
    text = ", ".join(words)
    stands = "the budget leaves room" if price is None else f"a percent costs {price * percent:.2g}"
    return f"{text[0].upper()}{text[1:]}; elsewhere {stands}."
