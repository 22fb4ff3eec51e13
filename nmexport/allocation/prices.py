"""Predict what a choice reads, and how long a decoded token takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nmexport.sparsity.targets import _decoder_layers
from nmexport.sparsity.weight_form import WeightForm
from nmexport.store.allocation import DENSE, Choice, CostConstants

if TYPE_CHECKING:
    from nmexport.allocation.costs import Problem
    from nmexport.calibration.sites import Site

_SCALE_BYTES = 4  # float32, with weights of integers


@dataclass(frozen=True, kw_only=True)
class CostModel(CostConstants):
    """Predicts a decoded token's time from the weight rows it reads and the ops it runs.

    Each weight row that the token keeps is read once from memory.
    """

    def weight_bytes(self, site: Site) -> float:
        """Size of all of a site's weights, as they are stored, and of their scales."""
        return self.read_bytes(site, DENSE)

    def read_bytes(self, site: Site, choice: Choice) -> float:
        """Bytes that a decoded token reads of them: rows it keeps, and every scale."""
        form = self._form(choice)
        stored = site.weights * (self.element_bytes if form is None else form.bits / 8)
        return stored * choice.decode_density + self._scale_bytes(site, form)

    def _form(self, choice: Choice) -> WeightForm | None:
        return WeightForm.parse(choice.weights or self.sparse_weights)

    def _scale_bytes(self, site: Site, form: WeightForm | None) -> int:
        if form is None:
            return 0
        groups = form.groups(site.in_features, name=site.names[0])
        return groups * sum(site.out_features) * _SCALE_BYTES

    def seconds(self, site: Site, choice: Choice) -> float:
        """A decoded token's time in a site."""
        sparse = choice.decode_density < 1
        overhead = self.sparse_overhead_seconds if sparse else self.dense_overhead_seconds
        return self.read_bytes(site, choice) / self._speed(self._form(choice)) + overhead

    def _speed(self, form: WeightForm | None) -> float:
        """Bytes a second of weights in a form."""
        return self.bytes_per_second if form is None else self._integer_speed

    @property
    def _integer_speed(self) -> float:
        return self.integer_bytes_per_second or self.bytes_per_second

    @property
    def other_seconds(self) -> float:
        """A decoded token's time outside of the targeted linears."""
        speed = self._speed(WeightForm.parse(self.other_weights))
        return self.other_bytes / speed + self.rest_seconds


def cost_model(problem: Problem) -> CostModel:
    """Take the section's constants, and count the weights outside of the targeted linears."""
    head = "float" if problem.rounded is None else problem.rounded.head
    return _cost_model(problem, weights=problem.weights[0], head=head)


def cost_in_floats(problem: Problem) -> CostModel:
    """Price the same with all weights in floats."""
    return _cost_model(problem, weights="float", head="float")


def _cost_model(problem: Problem, *, weights: str, head: str) -> CostModel:
    """Make a cost model.

    Args:
        problem: Model and constants.
        weights: How targeted linears are stored where a choice does not say.
        head: How the output head is.
    """
    model, constants = problem.model, problem.section.cost
    targeted = {id(linear.weight) for linear in problem.linears.values()}
    looked_up = id(model.get_input_embeddings().weight)
    output = model.get_output_embeddings()
    if output is not None and id(output.weight) == looked_up:
        looked_up = 0  # tied: read as a whole after all
    other = sum(
        parameter.numel()
        for parameter in model.parameters()
        if id(parameter) not in targeted and id(parameter) != looked_up
    )
    return CostModel(
        bytes_per_second=constants.gigabytes_per_second * 1e9,
        integer_bytes_per_second=constants.integer_gigabytes_per_second * 1e9,
        dense_overhead_seconds=constants.dense_overhead_us * 1e-6,
        sparse_overhead_seconds=constants.sparse_overhead_us * 1e-6,
        element_bytes=problem.element_bytes,
        sparse_weights=weights,
        # Nearly all of it is the output head.
        other_bytes=other * (problem.element_bytes if head == "float" else 1),
        other_weights=head,
        rest_seconds=constants.layer_overhead_us * 1e-6 * _decoder_layers(model)[1],
    )
