"""What a folded model stores of a linear."""

from __future__ import annotations

from nmexport.graph.contract import op_contract
from nmexport.graph.low_rank import FACTORS
from nmexport.store import folded


def test_a_linears_tensors_are_the_ops_inputs_and_the_low_rank_factors() -> None:
    given = [spec.name for spec in op_contract().ops["NMLinear"].inputs]
    assert (*given[1:], *FACTORS) == folded.TENSORS
    assert given[0] == "X"
    assert set(folded.SHARED) < set(folded.TENSORS)
