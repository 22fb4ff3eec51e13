"""The contract file, its typed view, and what else in the package must say the same."""

from __future__ import annotations

import json
import typing

import onnx
import pytest
from nmexport import choices, oracle, oracle_weights
from nmexport.errors import ArtifactError, InternalError
from nmexport.graph import contract as contract_module
from nmexport.graph import cpu
from nmexport.graph.contract import (
    attribute_values,
    check_node,
    check_version,
    contract_from_document,
    op_contract,
    present_inputs,
    violations,
)
from nmexport.resources import resource_path
from nmexport.sparsity import quantisation
from nmexport.sparsity.pattern import MAX_GROUP

from tests.support.op_cases import linear_node, prune_node


def document():
    return json.loads(resource_path("contract.json").read_text(encoding="utf-8"))


def test_names_that_files_in_the_field_depend_on():
    contract = op_contract()
    assert (contract.domain, contract.opset_version) == ("nmexport", 2)
    assert (contract.plugin_version, contract.plugin_namespace) == ("2", "")
    assert contract.types == ("float32", "float16", "bfloat16")
    assert {name: [i.name for i in op.inputs] for name, op in contract.ops.items()} == {
        "NMPrune": ["X", "score_scale", "channel_order"],
        "NMLinear": [
            "X",
            "W",
            "bias",
            "shift",
            "shift_weight",
            "score_scale",
            "channel_order",
            "weight_scale",
            "value_scale",
            "weight_zero_point",
            "dense_scale",
            "dense_bias",
        ],
    }
    linear = contract.ops["NMLinear"]
    types = {i.name: (i.type, *i.alternatives) for i in linear.inputs}
    assert types["W"] == ("T", "int8", "int4", "uint4", "float8e4m3fn")
    assert types["weight_scale"] == ("float32", "T")
    assert types["weight_zero_point"] == ("W", "float32")
    assert {a.name: a.default for a in linear.attributes} == {
        "n": None,
        "m": None,
        "dynamic_shift": 0,
        "variance_correction": 0,
        "phase": "all",
        "activation_bits": 0,
        "activation_block": 32,
    }
    assert contract.ops["NMPrune"].optional_inputs == ("score_scale", "channel_order")


def test_the_oracle_and_the_pattern_say_what_the_contract_says():
    contract = op_contract()
    phase = contract.ops["NMLinear"].attribute("phase")
    assert phase is not None
    assert phase.values == oracle.PHASES == typing.get_args(choices.Phase)
    assert phase.values == typing.get_args(choices.Phase)
    assert tuple(str(t) for t in oracle.TYPES) == contract.types
    assert contract.variance_floor == oracle.VARIANCE_FLOOR
    assert contract.scale_group == oracle_weights.SCALE_GROUP == quantisation.GROUP
    stored = tuple(t.name.replace("_", "") for t in oracle_weights.STORED_TYPES)
    assert stored == quantisation.STORED_TYPES == contract.ops["NMLinear"].inputs[1].alternatives
    assert contract.tolerance.float32_rtol_per_sqrt_k == oracle.FLOAT32_RTOL_PER_SQRT_K
    assert contract.tolerance.half_ulps == oracle.HALF_ULPS
    assert contract.max_group == MAX_GROUP
    assert contract.opset_version == cpu._OPSET
    for op in contract.ops.values():
        for name in ("n", "m"):
            attribute = op.attribute(name)
            assert attribute is not None
            assert (attribute.min, attribute.max) == (1, MAX_GROUP)


def test_the_view_is_read_once():
    assert op_contract() is op_contract()


@pytest.mark.parametrize(
    ("break_it", "error"),
    [
        (lambda d: d.update(schema=2), ValueError),
        (lambda d: d.pop("domain"), KeyError),
        (lambda d: d["ops"]["NMPrune"]["inputs"][0].update(colour="red"), TypeError),
        (lambda d: d["tolerance"].update(more=1), TypeError),
    ],
)
def test_a_contract_of_another_shape_is_refused(break_it, error):
    changed = document()
    break_it(changed)
    with pytest.raises(error):
        contract_from_document(changed)


def test_a_broken_installation_is_a_bug_not_a_users_fault(tmp_path, monkeypatch):
    monkeypatch.setattr(contract_module, "resource_path", lambda name: tmp_path / name)
    with pytest.raises(InternalError, match=r"contract\.json cannot be read"):
        op_contract.__wrapped__()


def test_a_legal_node_passes_and_its_parts_are_read():
    node = linear_node({"W", "shift"}, n=8, m=16, phase="decode")
    check_node(node)
    assert present_inputs(node) == {"X", "W", "shift"}
    assert attribute_values(node) == {
        "n": 8,
        "m": 16,
        "dynamic_shift": 0,
        "variance_correction": 0,
        "phase": "decode",
        "activation_bits": 0,
        "activation_block": 32,
    }
    check_node(linear_node({"W", "weight_scale", "weight_zero_point"}, n=8, m=16))
    check_node(linear_node({"W", "weight_scale"}, n=8, m=16, activation_bits=8))
    check_node(prune_node({"channel_order"}, n=16, m=16))


@pytest.mark.parametrize(
    ("present", "attributes", "says"),
    [
        (set(), {"n": 8, "m": 16}, "input W is missing"),
        ({"W"}, {"m": 16}, "attribute n is missing"),
        ({"W"}, {"n": 0, "m": 16}, "n is 0; allowed: 1 to 64"),
        ({"W"}, {"n": 8, "m": 65}, "m is 65; allowed: 1 to 64"),
        ({"W"}, {"n": 17, "m": 16}, "n is 17 of m = 16"),
        ({"W"}, {"n": 8.0, "m": 16}, "n is 8.0; allowed: an integer"),
        ({"W"}, {"n": 8, "m": 16, "phase": 1}, "phase is 1; allowed: a string"),
        ({"W"}, {"n": 8, "m": 16, "phase": "both"}, "allowed: all, prefill, decode"),
        ({"W"}, {"n": 8, "m": 16, "block": 4}, "unknown attribute block; allowed: n, m, dynamic"),
        ({"W"}, {"n": 8, "m": 16, "dynamic_shift": 2}, "dynamic_shift is 2; allowed: 0 to 1"),
        ({"W"}, {"n": 8, "m": 16, "dynamic_shift": 1}, "needs the input shift_weight"),
        ({"W"}, {"n": 8, "m": 16, "activation_bits": 4}, "activation_bits is 4; allowed: 0, 8"),
        ({"W"}, {"n": 8, "m": 16, "activation_bits": 8}, "needs the input weight_scale"),
        ({"W"}, {"n": 8, "m": 16, "activation_block": 40}, "allowed: a multiple of 16"),
        ({"W", "dense_bias"}, {"n": 8, "m": 16}, "dense_bias goes with phase decode or prefill"),
        ({"W", "weight_zero_point"}, {"n": 8, "m": 16}, "weight_zero_point needs the input"),
        (
            {"W", "shift", "shift_weight"},
            {"n": 8, "m": 16, "dynamic_shift": 1},
            "exclude each other",
        ),
    ],
)
def test_what_breaks_the_contract_is_named(present, attributes, says):
    with pytest.raises(ArtifactError, match=says):
        check_node(linear_node(present, **attributes))


def test_every_fault_is_listed_at_once():
    assert len(violations(linear_node(set(), n=99, phase="x"))) == 4


@pytest.mark.parametrize(
    ("node", "says"),
    [
        (onnx.helper.make_node("MatMul", ["a", "b"], ["c"]), "no op of the contract"),
        (
            onnx.helper.make_node("NMRoute", ["a"], ["c"], domain="nmexport"),
            "nmexport::NMPrune, nmexport::NMLinear",
        ),
        (
            onnx.helper.make_node("NMPrune", list("abcd"), ["y"], domain="nmexport", n=2, m=4),
            "has 4 inputs",
        ),
        (
            onnx.helper.make_node("NMPrune", ["a"], ["y", "z"], domain="nmexport", n=2, m=4),
            "has 2 outputs",
        ),
    ],
)
def test_a_node_of_another_kind_or_arity_is_refused(node, says):
    with pytest.raises(ArtifactError, match=says):
        check_node(node)


def test_a_model_of_another_version_is_refused_in_one_sentence():
    check_version({"": 23}, "a dense model")
    check_version({"": 23, "nmexport": 2}, "model.onnx")
    with pytest.raises(ArtifactError) as refusal:
        check_version({"": 23, "nmexport": 1}, "model.onnx")
    assert str(refusal.value).startswith("model.onnx holds nmexport ops of version 1.")
    assert refusal.value.allowed == "version 2"
    assert "export the model again" in str(refusal.value.fix)
