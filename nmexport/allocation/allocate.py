"""Allocation: measure each site, choose under the budget, measure what was chosen, say why."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from nmexport.allocation import ledger
from nmexport.allocation.built import BuiltLinear, errors_as_built
from nmexport.allocation.choosing import choose, remark, share_used
from nmexport.allocation.costs import check_candidates, measure_sites
from nmexport.allocation.front import front_points, uniform_points
from nmexport.allocation.prices import cost_in_floats, cost_model
from nmexport.allocation.probe import Probe
from nmexport.allocation.study import Integers, study_of
from nmexport.calibration.sites import input_sites
from nmexport.store.allocation import Allocation, Built, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from nmexport.allocation.costs import Problem
    from nmexport.allocation.study import Study
    from nmexport.calibration.checkpoint import Checkpoint
    from nmexport.choices import Phase
    from nmexport.sparsity.linear import Behaviour, SparseLinear
    from nmexport.store.allocation import FrontPoint

_TRIALS: dict[str, str] = {
    "run": "Each such site is made sparse alone, its linears on the inputs of the running model, "
    "and KL(dense || sparse) is measured over {windows} calibration windows of {length} tokens",
    "gradient": "What each such site costs alone in KL(dense || sparse) is estimated from the "
    "gradients of the dense model's predictions over {windows} calibration windows of {length} "
    "tokens",
}
PROTOCOL = (
    "Linears that read the same tensor share a choice. {trials}; patterns that were not tried "
    "follow from those that were, through the squared error of the site's outputs. An integer "
    "programme picks one choice for every site. Joint models are then run on {held_out} other "
    "calibration windows: these are the divergences and perplexity ratios of the front, before any "
    "learned constant. What is built is measured on the same windows, and has learned from none of "
    "them. Speed is predicted from the bytes that a decoded token reads and an overhead for each "
    "product."
)
_INTEGERS = (
    " Weights of joint models are in {weights}, as they are stored: that counts in all their "
    "figures, and is measured by itself too. The points called sparsity alone are those of the "
    "front with weights in floats."
)
_MIXED = (
    " A site also has a choice of weights, {weights}: what a coarser form costs is tried as "
    "patterns are, with all of the input kept, and adds to what a pattern costs. Rounding of four "
    "bits is compensated for whole inputs there; what is built is compensated for kept ones."
)
_PROMPT = (
    " The first {prompt} tokens of a window are its prompt and are not scored; the rest count as "
    "decoded."
)


def prepare(problem: Problem, checkpoint: Checkpoint | None = None) -> Prepared:
    """Measure every site and the Pareto front: all that a choice stands on.

    Args:
        problem: Model, candidates and text.
        checkpoint: Where the trials of sites, the long part, go on from and save to.

    Raises:
        RecipeError: if the method does not go with a budget.
        PatternError: if no candidate fits any linear.
        ModelError: if the dense model's predictions are not finite.
    """
    check_candidates(problem)
    section, progress = problem.section, problem.progress
    sites = input_sites(problem.model, problem.linears, problem.samples[0])
    study = study_of(
        measure_sites(problem, sites, checkpoint),
        cost_model(problem),
        Probe(problem.model, problem.held_out, prompt=problem.prompt),
        prefill_weight=section.cost.prefill_weight,
        integers=Integers(rounded=problem.rounded, floats=cost_in_floats(problem))
        if problem.rounded is not None
        else None,
        forms=problem.weights if problem.is_mixed else (None,),
    )
    alone = [study.quantised_point(f"dense {problem.weights[0]}")] if study.integers else []
    uniform = uniform_points(study, progress)
    front = front_points(study, section.front, progress)
    return Prepared(problem, study, (*alone, *uniform, *front))


@dataclass(frozen=True, eq=False)
class Prepared:
    """Everything measured; choices cost no more than the joint models they try."""

    problem: Problem
    study: Study
    points: tuple[FrontPoint, ...]

    @property
    def unlearned(self) -> torch.Tensor:
        """`[W, L]` windows that measure what is built: nothing may be learned from them."""
        return torch.cat([self.problem.held_out, self.problem.error_windows])

    def allocation(self, relief: float = 1.0) -> Allocation:
        """Choose for every linear among dense and the section's candidates.

        Args:
            relief: What the budget of accuracy is multiplied by, where learned constants are known
                to win back so much.

        Raises:
            RecipeError: if no choice keeps the budget, or only the dense model does.
        """
        problem, study = self.problem, self.study
        budget = problem.section.budget
        chosen = choose(study, budget, relief=relief)
        pick = chosen.pick
        price = study.price(pick)
        rows = {row.name: row for row in ledger.rows(problem, study, pick, price=price)}
        point = study.point("chosen", "chosen", pick)
        return Allocation(
            choices={name: rows[name].choice for name in problem.linears},
            budget=budget.limits(),
            bytes_saved=point.bytes_saved,
            decode_speedup=point.decode_speedup,
            kl=point.kl,
            perplexity_ratio=point.perplexity_ratio,
            price=None if price is None else price * study.dense.bytes / 100,
            front=(*self.points, point),
            ledger=tuple(rows[name] for name in problem.linears),
            budget_used=share_used(budget, kl=point.kl, nll=math.log(point.perplexity_ratio)),
            remark=remark(study, chosen),
            protocol=_protocol(problem, study),
        )

    def as_built(
        self,
        allocation: Allocation,
        behaviours: Mapping[str, Behaviour],
        folded: Callable[[str], Mapping[str, torch.Tensor]],
    ) -> Allocation:
        """Measure the built model and each of its linears, and add what it came to.

        Args:
            allocation: What was built.
            behaviours: Of the linears that became ops of ours, by name.
            folded: Makes the tensors of one of them, by its name.
        """
        problem, rounded = self.problem, self.problem.rounded
        stored = {} if rounded is None else rounded.of(allocation.choices)

        def modules(prompt_for: Callable[[Phase], int]) -> dict[str, BuiltLinear]:
            return {
                name: BuiltLinear(
                    _as_stored(behaviour, stored.get(name)),
                    partial(folded, name),
                    prompt=prompt_for(behaviour.phase),
                )
                for name, behaviour in behaviours.items()
                if name in allocation.sparse
            }

        sparse = modules(lambda _: problem.prompt)
        moved = self.study.probe.measure_modules({**stored, **sparse})
        errors = errors_as_built(
            problem.model,
            {name: problem.linears[name] for name in allocation.sparse},
            # All tokens as those of the linear's phase.
            modules(lambda phase: sys.maxsize if phase == "prefill" else 0),
            problem.error_windows,
            progress=problem.progress,
        )
        used = share_used(problem.section.budget, kl=moved.kl_mean, nll=moved.nll_mean)
        return replace(
            allocation,
            ledger=tuple(ledger.with_built(row, errors.get(row.name)) for row in allocation.ledger),
            built=Built(
                kl=moved.kl_mean, perplexity_ratio=math.exp(moved.nll_mean), budget_used=used
            ),
        )


def _as_stored(behaviour: Behaviour, stored: SparseLinear | None) -> Behaviour:
    """Round what meets the weight as its dense form in integers does; floats are not rounded."""
    if stored is None:
        return behaviour
    return replace(
        behaviour,
        activation_bits=stored.behaviour.activation_bits,
        activation_block=stored.behaviour.activation_block,
    )


def _protocol(problem: Problem, study: Study) -> Protocol:
    windows, held_out = len(problem.windows), len(problem.held_out)
    length, prompt = problem.windows.shape[1], problem.prompt
    trials = _TRIALS[problem.section.trials].format(windows=windows, length=length)
    words = PROTOCOL.format(trials=trials, held_out=held_out)
    if study.integers is not None:
        words += (_MIXED if problem.is_mixed else _INTEGERS).format(
            weights=", ".join(problem.weights)
        )
    return Protocol(
        words=words + _PROMPT.format(prompt=prompt) if prompt else words,
        sites=len(study.table),
        windows=windows,
        held_out_windows=held_out,
        length=length,
        prompt=prompt,
        joint_over_sum=study.kl.factor(),
        cost=study.model,
    )
