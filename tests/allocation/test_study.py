"""Choosing under a budget of accuracy that is measured on few windows, and so with noise."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from nmexport.allocation.choosing import choose
from nmexport.recipe import BudgetSection
from nmexport.store.allocation import DENSE

if TYPE_CHECKING:
    from collections.abc import Callable

LEVELS = 64


class OneSite:
    """A study of one site whose choices are levels: a level reads less, and moves more."""

    def __init__(self, joint: Callable[[int], float], summed: Callable[[float], float]) -> None:
        """Take the logarithm of a level's perplexity ratio, and the sum that a limit allows."""
        self.joint = joint
        self.nll = SimpleNamespace(summed=summed)
        self.quantised = SimpleNamespace(kl_mean=0.0, nll_mean=0.0)
        self.model = SimpleNamespace(sparse_weights="int8")
        self.is_mixed = False
        self.runs = 0

    def solve(self, *, minimise: str, limits: dict[str, float], among: Any) -> dict[str, Any]:
        del minimise, among
        return self._pick(min(int(limits["kl"]), LEVELS))

    def run(self, pick: dict[str, Any]) -> SimpleNamespace:
        self.runs += 1
        return SimpleNamespace(kl_mean=0.0, nll_mean=self.joint(self._level(pick)))

    def total(self, pick: dict[str, Any]) -> SimpleNamespace:
        level = self._level(pick)
        return SimpleNamespace(kl=float(level), worth=-float(level), work=-float(level))

    def least(self, measure: str) -> dict[str, Any]:
        del measure
        return self._pick(LEVELS)

    def departs(self, pick: dict[str, Any]) -> bool:
        return pick != self._pick(0)

    @staticmethod
    def _pick(level: int) -> dict[str, Any]:
        return {"site": DENSE if level == 0 else level}

    @staticmethod
    def _level(pick: dict[str, Any]) -> int:
        return 0 if pick["site"] == DENSE else pick["site"]


@pytest.mark.parametrize("misled", [1.0, 4.0, 100.0])
def test_a_budget_is_kept_however_wrong_the_prediction_is(misled: float) -> None:
    budget = BudgetSection(max_perplexity_ratio=1.08)
    allowed = math.log(1.08) * 100  # levels of a hundredth each

    def joint(level: int) -> float:
        return 0.01 * level

    study: Any = OneSite(joint, lambda left: misled * 100 * left)
    level = choose(study, budget).pick["site"]
    assert 0.5 * allowed < level <= allowed
    assert study.runs <= 8


def test_a_lucky_joint_model_does_not_draw_the_search_to_it() -> None:
    study: Any = OneSite(lambda level: 0.01 * level, lambda left: 100 * left)
    # As a curve through a lucky point predicts: a little less than what has just failed.
    study.nll = SimpleNamespace(summed=lambda left: 10.01 + 0 * left)
    level = choose(study, BudgetSection(max_perplexity_ratio=1.08)).pick["site"]
    assert 4 <= level <= 100 * math.log(1.08)


def test_the_least_sparsity_is_found_where_only_that_keeps_the_budget() -> None:
    study: Any = OneSite(lambda level: 0.2 * level, lambda left: 100 * left)
    assert choose(study, BudgetSection(max_perplexity_ratio=1.3)).pick["site"] == 1
