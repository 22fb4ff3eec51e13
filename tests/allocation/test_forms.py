"""Forms of weights beside patterns: options, picks and prices, on made-up costs."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from nmexport.allocation.prices import CostModel
from nmexport.allocation.study import Study, is_dense, study_of
from nmexport.calibration.sites import Site
from nmexport.sparsity.pattern import NMPattern
from nmexport.sparsity.weight_form import HEAD, Forms, WeightForm, finest_first
from nmexport.store.allocation import DENSE, Choice

if TYPE_CHECKING:
    from nmexport.allocation.study import Pick

FORMS = ("float", "int8", "int4")
KEPT = {kept: Choice(pattern=NMPattern(kept, 16), criterion="act") for kept in (12, 8)}
COST = CostModel(
    bytes_per_second=2e9,
    integer_bytes_per_second=1e9,
    dense_overhead_seconds=1e-6,
    sparse_overhead_seconds=2e-6,
    element_bytes=4,
    other_bytes=4000,
    other_weights="int8",
)


def study(seed: int, forms: tuple[str | None, ...] = FORMS, sites: int = 3) -> Study:
    """Sites of several sizes; what is coarser or sparser costs more."""
    chance = np.random.default_rng(seed)
    variants: Any = {
        Site((f"layer.{place}",), 64, (32 * size,), layer=place): dict.fromkeys(KEPT.values())
        for place, size in enumerate(chance.integers(1, 5, sites).tolist())
    }
    sparse = {site: chance.uniform(0.01, 1.0) for site in variants}
    coarse = {site: chance.uniform(0.01, 1.0) for site in variants}
    costs: Any = SimpleNamespace(
        variants=variants,
        divergences=lambda site: {
            choice: sparse[site] * choice.pattern.sparsity**2 for choice in KEPT.values()
        },
        divergence_of=lambda site, form: {"int8": 1e-3, "int4": 0.1}.get(form, 0.0) * coarse[site],
    )
    probe: Any = None
    return study_of(costs, COST, probe, prefill_weight=0.0, forms=forms)


def every_pick(made: Study) -> list[Pick]:
    rows = itertools.product(*(row for row in made.table.values()))
    return [dict(zip(made.table, row, strict=True)) for row in rows]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("share", [0.1, 0.3, 0.7])
def test_the_pick_is_the_best_of_all_there_are(seed: int, share: float) -> None:
    made = study(seed)
    limit = share * made.dense.bytes
    within = [made.total(pick) for pick in every_pick(made)]
    best = min(total.kl for total in within if total.bytes <= limit)
    pick = made.solve(minimise="kl", limits={"bytes": limit})
    assert pick is not None
    assert made.total(pick).bytes <= limit * (1 + 1e-6)
    assert made.total(pick).kl == pytest.approx(best, rel=1e-3, abs=1e-6)
    fastest = made.solve(minimise="worth", limits={"kl": best})
    assert fastest is not None
    quickest = min(total.worth for total in within if total.kl <= best)
    assert made.total(fastest).worth == pytest.approx(quickest, rel=1e-3)


@pytest.mark.parametrize("seed", range(4))
def test_more_to_choose_among_is_never_worse(seed: int) -> None:
    made = study(seed)
    for share in (0.2, 0.4, 0.6):
        limits: Any = {"bytes": share * made.dense.bytes}
        both = made.solve(minimise="kl", limits=limits)
        plain = made.solve(minimise="kl", limits=limits, among=is_dense)
        assert both is not None
        if plain is not None:
            assert made.total(both).kl <= made.total(plain).kl * (1 + 1e-3) + 1e-6
        floats = study(seed, (None,))
        alone = floats.solve(minimise="kl", limits=limits)
        if alone is not None:
            assert made.total(both).kl <= floats.total(alone).kl * (1 + 1e-3) + 1e-6


def test_each_form_reads_its_own_bytes_at_its_own_speed() -> None:
    site = Site(("q", "k"), 64, (64, 32), layer=0)
    read = {form: COST.read_bytes(site, Choice(weights=form)) for form in FORMS}
    assert read == {"float": 64 * 96 * 4, "int8": 64 * 96 + 4 * 96, "int4": 64 * 48 + 4 * 96 * 2}
    seconds = COST.seconds(site, Choice(weights="int8"))
    assert seconds == pytest.approx(read["int8"] / 1e9 + 1e-6)
    assert COST.seconds(site, DENSE) == pytest.approx(read["float"] / 2e9 + 1e-6)
    assert COST.other_seconds == pytest.approx(4e-6)
    half = Choice(weights="int4", pattern=NMPattern(8, 16), criterion="act")
    assert COST.read_bytes(site, half) == 64 * 24 + 4 * 96 * 2  # every scale is read


def test_a_uniform_pick_stays_in_its_form_where_the_pattern_does_not_fit() -> None:
    made = study(0)
    odd = Choice(weights="int4", pattern=NMPattern(3, 7), criterion="act")
    assert set(made.uniform(odd).values()) == {Choice(weights="int4")}
    assert made.finest == Choice(weights="float")
    assert not made.departs(made.uniform(Choice(weights="float")))
    assert made.departs(made.uniform(Choice(weights="int8")))


def test_forms_are_sorted_and_those_that_are_one_are_one() -> None:
    given = ["int4", "int8", "int4:32", "int8:64", "float", "int4:64"]
    assert finest_first(given) == ("float", "int8:64", "int8", "int4:32", "int4:64")


@pytest.mark.parametrize(
    ("weights", "among", "others", "head"),
    [
        ("auto", (), None, None),
        ("int4", (), WeightForm("int4", 32), HEAD),
        ("auto", ("float", "int4"), None, HEAD),
        ("auto", ("int4", "int8"), WeightForm("int8", None), HEAD),
        ("float", ("float", "int4"), None, None),
        ("int8", ("float", "int4"), WeightForm("int8", None), HEAD),
    ],
)
def test_what_is_no_target_is_stored_as_the_recipe_says(
    weights: str, among: tuple[str, ...], others: WeightForm | None, head: WeightForm | None
) -> None:
    forms = Forms.of(weights, among)
    assert (forms.others, forms.head) == (others, head)
