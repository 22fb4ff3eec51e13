"""The choice itself: cost model, integer programme, additivity, estimates, and the data written."""

from __future__ import annotations

import ctypes
import itertools
import json
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from nmexport.allocation.costs import inferred
from nmexport.allocation.prices import CostModel
from nmexport.allocation.solve import NOTHING, Option, _no_native_output, price, solve
from nmexport.allocation.study import Additivity
from nmexport.calibration.sites import Site
from nmexport.errors import ArtifactError
from nmexport.sparsity.pattern import NMPattern
from nmexport.store.allocation import (
    DENSE,
    FILENAME,
    Allocation,
    Choice,
    as_dict,
    read_allocation,
    write_allocation,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

HALF = Choice(pattern=NMPattern(8, 16), criterion="act")
SITE = Site(names=("q", "k"), in_features=64, out_features=(64, 32), layer=0)
COST = CostModel(
    bytes_per_second=1e9,
    dense_overhead_seconds=1e-6,
    sparse_overhead_seconds=3e-6,
    element_bytes=4,
    other_bytes=2000,
)


def option(kl: float, read: float, seconds: float | None = None) -> Option:
    seconds = read if seconds is None else seconds
    return Option(kl=kl, bytes=read, seconds=seconds, worth=seconds, work=read)


def sums(rows: Sequence[Sequence[Option]], picked: Sequence[int]) -> Option:
    return sum((row[index] for row, index in zip(rows, picked, strict=True)), NOTHING)


def some_options(sites: int, seed: int = 0) -> list[list[Option]]:
    """Convex and concave costs mixed, as sites have them."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(sites):
        weight, size, power = torch.rand(3, generator=generator).tolist()
        shares = (0.0, 0.25, 0.5, 0.75)
        rows.append(
            [
                option(weight * share ** (1 + 2 * power), (1 + size) * (1 - share))
                for share in shares
            ]
        )
    return rows


# -- what a choice is ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choice", "decode", "prefill", "label"),
    [
        (DENSE, 1.0, 1.0, "dense"),
        (HALF, 0.5, 0.5, "8:16 act"),
        (Choice(pattern=NMPattern(4, 16), criterion="wina", phase="decode"), 0.25, 1.0,
         "4:16 wina, decode only"),
        (Choice(pattern=NMPattern(4, 16), criterion="wina", phase="prefill"), 1.0, 0.25,
         "4:16 wina, prefill only"),
    ],
)  # fmt: skip
def test_a_phase_saves_only_where_it_is_sparse(
    choice: Choice, decode: float, prefill: float, label: str
) -> None:
    assert (choice.decode_density, choice.prefill_density, choice.label) == (decode, prefill, label)


def test_cost_counts_kept_rows_and_one_product_a_site() -> None:
    whole = 64 * 96 * 4
    assert COST.weight_bytes(SITE) == whole
    assert COST.read_bytes(SITE, HALF) == whole / 2
    assert COST.seconds(SITE, DENSE) == pytest.approx(whole / 1e9 + 1e-6)
    assert COST.seconds(SITE, HALF) == pytest.approx(whole / 2e9 + 3e-6)
    prefill = Choice(pattern=NMPattern(8, 16), criterion="act", phase="prefill")
    assert COST.seconds(SITE, prefill) == COST.seconds(SITE, DENSE)
    assert COST.other_seconds == pytest.approx(2e-6)
    assert replace(COST, rest_seconds=1e-6).other_seconds == pytest.approx(3e-6)


@pytest.mark.parametrize(
    ("weights", "scales"), [("int8", 4 * 96), ("int8:16", 4 * 96 * 4), ("int8:32", 4 * 96 * 2)]
)
def test_weights_in_int8_are_counted_with_their_scales(weights: str, scales: int) -> None:
    cost = replace(COST, sparse_weights=weights)
    assert cost.read_bytes(SITE, DENSE) == cost.weight_bytes(SITE) == 64 * 96 + scales
    assert cost.read_bytes(SITE, HALF) == 64 * 96 / 2 + scales
    prefill = replace(HALF, phase="prefill")
    assert cost.read_bytes(SITE, prefill) == 64 * 96 + scales  # decoded whole, out of int8
    assert cost.seconds(SITE, HALF) < COST.seconds(SITE, HALF)


# -- the programme ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("share", [0.3, 0.55, 0.8])
def test_the_programme_finds_what_trying_everything_finds(seed: int, share: float) -> None:
    rows = some_options(6, seed)
    limit = share * sum(row[0].bytes for row in rows)
    every = list(itertools.product(*(range(len(row)) for row in rows)))
    allowed = [picked for picked in every if sums(rows, picked).bytes <= limit]
    best = min(sums(rows, picked).kl for picked in allowed)
    found = solve(rows, minimise="kl", limits={"bytes": limit})
    assert found is not None
    assert sums(rows, found).bytes <= limit * (1 + 1e-6)
    assert sums(rows, found).kl == pytest.approx(best, rel=1e-3)


def test_under_a_budget_of_accuracy_the_fastest_is_found() -> None:
    rows = some_options(6)
    limit = 0.4 * sum(row[-1].kl for row in rows)
    every = itertools.product(*(range(len(row)) for row in rows))
    allowed = [picked for picked in every if sums(rows, picked).kl <= limit]
    best = min(sums(rows, picked).worth for picked in allowed)
    found = solve(rows, minimise="worth", limits={"kl": limit})
    assert found is not None
    assert sums(rows, found).kl <= limit * (1 + 1e-6)
    assert sums(rows, found).worth == pytest.approx(best, rel=1e-3)


def test_limits_out_of_reach_have_no_answer_and_equal_options_take_the_better() -> None:
    rows = some_options(3)
    assert solve(rows, minimise="kl", limits={"bytes": 0.1}) is None
    same_bytes = [[option(0.0, 4.0), option(0.3, 2.0), option(0.2, 2.0)]]
    assert solve(same_bytes, minimise="worth", limits={"kl": 1.0}) == [2]


def test_the_price_is_what_the_next_byte_costs() -> None:
    rows = [[option(0.0, 10.0), option(1.0, 5.0)], [option(0.0, 10.0), option(4.0, 5.0)]]
    assert price(rows, max_bytes=17.0) == pytest.approx(0.2)  # within the cheap site
    assert price(rows, max_bytes=12.0) == pytest.approx(0.8)  # within the dear one
    assert price(rows, max_bytes=20.0) is None
    assert price(rows, max_bytes=1.0) is None


def test_the_solver_writes_nothing_to_standard_output(capfd: pytest.CaptureFixture[str]) -> None:
    libc = ctypes.CDLL(None)
    with _no_native_output():
        libc.puts(b"chatter")
    libc.puts(b"a result")
    libc.fflush(None)
    assert capfd.readouterr().out == "a result\n"


# -- from single sites to joint models ------------------------------------------------------------


def test_additivity_passes_through_its_points_and_back() -> None:
    curve = Additivity()
    assert curve.factor() is None
    for summed, joint in ((0.1, 0.12), (0.4, 0.6), (1.0, 2.0)):
        curve.add(summed, joint)
    for summed, joint in curve.points:
        assert curve.joint(summed) == pytest.approx(joint)
        assert curve.summed(joint) == pytest.approx(summed)
    assert 0.12 < curve.joint(0.2) < 0.6
    assert curve.summed(curve.joint(0.7)) == pytest.approx(0.7)
    assert curve.joint(0.05) == pytest.approx(0.06)  # in proportion to the nearest point
    assert curve.joint(2.0) == pytest.approx(4.0)
    assert curve.factor() == pytest.approx((1.2 * 1.5 * 2.0) ** (1 / 3))


def test_additivity_levels_what_noise_turned_round() -> None:
    curve = Additivity()
    for summed, joint in ((0.1, 0.2), (0.2, 0.15), (0.3, 0.4), (0.0, 0.0)):
        curve.add(summed, joint)
    steps = [curve.joint(x / 100) for x in range(5, 40)]
    assert steps == sorted(steps)


def test_untried_patterns_follow_their_squared_error() -> None:
    squares = {"12:16": 0.01, "8:16": 0.08, "6:16": 0.16, "4:16": 0.32}
    quadratic = {name: 0.5 * square for name, square in squares.items()}
    assert inferred(squares, {"8:16": 0.04}) == pytest.approx(quadratic)
    two = inferred(squares, {"8:16": 0.04, "4:16": 0.2})
    assert two == pytest.approx({**quadratic, "4:16": 0.2, "6:16": 0.08})
    assert list(two) == list(squares)
    assert inferred({"8:16": 0.0, "4:16": 0.0}, {"8:16": 0.0}) == {"8:16": 0.0, "4:16": 0.0}


# -- as data --------------------------------------------------------------------------------------


def test_an_allocation_reads_back_as_it_was(tmp_path: Path) -> None:
    from tests.support.sample_allocation import sample_allocation

    allocation = sample_allocation()
    write_allocation(tmp_path, allocation)
    found = read_allocation(tmp_path)
    assert found is not None
    assert as_dict(found) == as_dict(allocation)
    assert found.choices == allocation.choices
    assert list(found.choices) == list(allocation.choices)
    assert found.ledger[0].candidates[0].choice == DENSE
    patterns = {choice.pattern for choice in found.sparse.values()}
    assert patterns == {NMPattern(kept, 16) for kept in (4, 8, 12)}
    assert math.isclose(found.kl, allocation.kl, rel_tol=1e-5)
    write_allocation(tmp_path / ".", found)
    assert read_allocation(tmp_path) == found


def test_an_allocation_of_before_it_was_measured_as_built_reads(tmp_path: Path) -> None:
    from tests.support.sample_allocation import sample_allocation

    document = as_dict(sample_allocation())
    del document["built"], document["budget_used"]
    (tmp_path / FILENAME).write_text(json.dumps(document), encoding="utf-8")
    found = read_allocation(tmp_path)
    assert found is not None
    assert found.built is None
    assert found.budget_used is None


def test_no_budget_no_file_and_damage_is_said_so(tmp_path: Path) -> None:
    assert read_allocation(tmp_path) is None
    for content in ("", "{}", json.dumps({"schema": 99}), json.dumps({"schema": 1, "front": 3})):
        (tmp_path / FILENAME).write_text(content, encoding="utf-8")
        with pytest.raises(ArtifactError, match=r"allocation\.json"):
            read_allocation(tmp_path)


def test_figures_are_written_as_far_as_they_mean_something() -> None:
    document: dict[str, Any] = as_dict(
        Allocation(
            choices={"a": HALF},
            budget={"max_kl": 0.1},
            bytes_saved=1 / 3,
            decode_speedup=1.0,
            kl=0.123456789,
            perplexity_ratio=1.1,
            price=None,
            front=(),
            ledger=(),
        )
    )
    assert document["bytes_saved"] == 0.333333
    assert document["kl"] == 0.123457
    assert document["choices"]["a"] == {
        "pattern": "8:16",
        "criterion": "act",
        "phase": "all",
        "weights": None,
    }
