"""Allocation under every kind of budget, on a tiny model."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from nmexport.allocation.allocate import prepare
from nmexport.allocation.costs import Problem, Rounded, before_learning
from nmexport.allocation.probe import spread_windows
from nmexport.calibration.forward_passes import gather_channel_statistics
from nmexport.calibration.method import constants_of
from nmexport.calibration.sites import concatenated_weight
from nmexport.errors import PatternError, RecipeError
from nmexport.models.loader import load_model
from nmexport.models.source import resolve
from nmexport.models.swap import replace_linears
from nmexport.progress import Silent
from nmexport.recipe import AllocationSection, ModelSection, SparsitySection
from nmexport.sparsity.linear import Behaviour, Constants, SparseLinear
from nmexport.sparsity.pattern import NMPattern
from nmexport.sparsity.rounding import quantised
from nmexport.sparsity.targets import linears_of
from nmexport.sparsity.weight_form import WeightForm
from nmexport.store.allocation import Allocation, as_dict

from tests.support.unfolded import folded_linear

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# Only bytes count: on so small a model every overhead would outweigh what sparsity saves.
FREE = {"dense_overhead_us": 0.0, "sparse_overhead_us": 0.0, "layer_overhead_us": 0.0}
METHOD = {"criterion": "act", "mitigations": ["var"], "grouping": "balanced"}
SAMPLES = torch.randint(3, 384, (6, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def run(tiny_llama: Path) -> Callable[..., Allocation]:
    model = load_model(resolve(ModelSection(id=str(tiny_llama))), dtype=torch.float32)
    linears = {name: one for name, one in linears_of(model).items() if name != "lm_head"}
    statistics = gather_channel_statistics(model, linears, SAMPLES, progress=Silent())

    def constants_for(site: Any, method: SparsitySection) -> Any:
        return constants_of(method, concatenated_weight(site, linears), statistics[site.names[0]])

    def allocated(
        budget: dict[str, float],
        method: dict[str, Any] | None = None,
        weights: tuple[str, ...] = ("float",),
        rounded: Rounded | None = None,
        **section: Any,
    ) -> Allocation:
        whole = {"windows": 2, "length": 32, "front": [0.3], "cost": FREE, **section}
        problem = Problem(
            model=model,
            linears=linears,
            samples=SAMPLES,
            sparsity=SparsitySection.model_validate_json(json.dumps({**METHOD, **(method or {})})),
            section=AllocationSection.model_validate_json(json.dumps({"budget": budget, **whole})),
            constants_for=constants_for,
            element_bytes=4,
            weights=weights,
            rounded=rounded,
            progress=Silent(),
        )
        return prepare(problem).allocation()

    return allocated


def test_fewer_bytes_cost_more_and_the_limit_holds(run: Callable[..., Allocation]) -> None:
    much, little = run({"max_bytes": 0.45}), run({"max_bytes": 0.8})
    assert much.bytes_saved >= 0.55
    assert little.bytes_saved >= 0.2
    assert much.kl > little.kl
    assert much.decode_speedup > little.decode_speedup > 1
    assert little.price is not None
    assert much.price is not None
    assert much.price > little.price


def test_an_accuracy_budget_is_held_and_used(run: Callable[..., Allocation]) -> None:
    tight, loose = run({"max_kl": 0.004}), run({"max_kl": 0.02})
    assert 0 < tight.kl <= 0.004
    assert tight.kl < loose.kl <= 0.02
    assert loose.kl > 0.5 * 0.02
    assert loose.bytes_saved > tight.bytes_saved > 0
    both = run({"max_kl": 0.02, "max_perplexity_ratio": 1.5})
    assert both.kl <= 0.02
    assert both.perplexity_ratio <= 1.5


def test_a_speed_budget_takes_the_least_divergence(run: Callable[..., Allocation]) -> None:
    found = run({"min_speedup": 1.2})
    assert found.decode_speedup >= 1.2
    assert found.decode_speedup < 1.35  # no further than asked for
    faster = run({"min_speedup": 1.4})
    assert faster.kl > found.kl


def test_limits_hold_together_or_are_refused(run: Callable[..., Allocation]) -> None:
    found = run({"max_kl": 0.05, "max_bytes": 0.8})
    assert found.kl <= 0.05
    assert found.bytes_saved >= 0.2
    for impossible in (
        {"max_kl": 1e-7, "max_bytes": 0.5},
        {"max_bytes": 0.2},
        {"min_speedup": 50.0},
    ):
        with pytest.raises(RecipeError, match=r"bytes of at least 0\.25.*speed-up of at most"):
            run(impossible)


def test_products_too_small_to_gain_are_named_as_the_reason(run: Callable[..., Allocation]) -> None:
    costly = {**FREE, "sparse_overhead_us": 50.0}
    with pytest.raises(RecipeError, match="so small that finding rows takes longer"):
        run({"min_speedup": 1.1}, cost=costly)


def test_a_budget_of_accuracy_has_a_choice_where_nothing_gains_speed(
    run: Callable[..., Allocation],
) -> None:
    """The cost model of a large machine says so; it is no reason to refuse the budget."""
    costly = {**FREE, "sparse_overhead_us": 50.0}
    loose = run({"max_perplexity_ratio": 1.2}, cost=costly)
    assert len(loose.sparse) == len(loose.choices)
    assert loose.bytes_saved == pytest.approx(0.75)
    assert loose.perplexity_ratio <= 1.2
    assert loose.decode_speedup < 1
    assert loose.remark is not None
    assert "sees no gain" in loose.remark
    tight = run({"max_kl": 0.004}, cost=costly)
    assert 0 < tight.kl <= 0.004
    assert 0 < tight.bytes_saved < loose.bytes_saved
    assert run({"max_perplexity_ratio": 1.2}).remark is None


def test_sparse_prompts_alone_can_be_chosen(run: Callable[..., Allocation]) -> None:
    chosen = run({"max_kl": 0.02}, {"phases": "prefill", "mitigations": []})
    assert {choice.phase for choice in chosen.sparse.values()} == {"prefill"}
    assert 0 < chosen.kl <= 0.02
    assert chosen.bytes_saved == 0
    assert chosen.remark is not None
    assert "No choice reads fewer bytes." in {row.why for row in chosen.ledger}
    worth = run({"max_kl": 0.02}, {"phases": "prefill", "mitigations": []},
                cost={**FREE, "prefill_weight": 1.0})  # fmt: skip
    assert worth.sparse
    assert worth.remark is None


def test_the_same_twice_is_the_same(run: Callable[..., Allocation]) -> None:
    assert as_dict(run({"max_kl": 0.01})) == as_dict(run({"max_kl": 0.01}))


def test_patterns_that_fit_no_linear_are_refused(run: Callable[..., Allocation]) -> None:
    with pytest.raises(PatternError, match="multiple of M"):
        run({"max_bytes": 0.7}, patterns=["3:7"])
    with pytest.raises(PatternError, match="keeps all channels"):
        run({"max_bytes": 0.7}, patterns=["16:16", "4:4"])
    partly = run({"max_bytes": 0.9}, patterns=["3:7", "64:64", "48:64"])
    assert {one.pattern for one in partly.sparse.values()} == {NMPattern(48, 64)}


def test_static_corrections_are_calibrated_for_each_candidate(
    run: Callable[..., Allocation],
) -> None:
    found = run({"max_bytes": 0.7}, {"mitigations": ["s-pts", "s-var"]})
    row = next(row for row in found.ledger if row.choice.pattern)
    errors = {str(one.choice.pattern): one.relative_error for one in row.candidates}
    assert errors["12:16"] < errors["8:16"] < errors["4:16"]
    chosen = next(one for one in row.candidates if one.choice == row.choice)
    assert chosen.relative_error == pytest.approx(row.mitigation_errors["s-pts + s-var"], rel=0.02)


def test_int8_is_held_against_dense_int8(run: Callable[..., Allocation]) -> None:
    """What stays dense is stored alike; scales are read whole, so a little less is saved."""
    half = {"max_bytes": 0.75}
    floats, int8 = run(half, patterns=["8:16"]), run(half, patterns=["8:16"], weights=("int8",))
    saved = {
        name: {one.kind: one for one in found.front}["uniform"].bytes_saved
        for name, found in (("float", floats), ("int8", int8))
    }
    assert 0.4 < saved["int8"] < saved["float"]
    row = next(row for row in int8.ledger if row.choice.pattern)
    candidates = {one.choice.label: one.bytes_saved for one in row.candidates}
    assert candidates["dense"] == 0.0
    assert candidates["8:16 act"] == pytest.approx(saved["int8"], abs=0.05)


@pytest.mark.parametrize(
    ("mitigations", "tried"),
    [
        ([], ()),
        (["s-pts"], ("s-pts",)),
        (["d-pts", "s-var"], ("d-pts", "s-var")),
        (["l-pts"], ()),
        (["l-pts", "bias"], ()),
        (["l-pts", "ls", "gain", "bias"], ("var",)),
        (["s-pts", "low-rank"], ("s-pts", "var")),
        (["l-pts", "ls", "s-var"], ("s-var",)),
    ],
)
def test_trials_have_what_is_built_and_a_stand_in_for_learned_scales_alone(
    mitigations: list[str], tried: tuple[str, ...]
) -> None:
    section = SparsitySection.model_validate_json(json.dumps({"mitigations": mitigations}))
    assert before_learning(section).mitigations == tried


def test_without_mitigations_the_plain_model_keeps_the_budget(
    run: Callable[..., Allocation], tiny_llama: Path
) -> None:
    found = run({"max_kl": 0.01}, {"mitigations": [], "grouping": "consecutive"})
    model = load_model(resolve(ModelSection(id=str(tiny_llama))), dtype=torch.float32)
    linears = linears_of(model)
    windows = spread_windows(SAMPLES, 2, 32, part=1)
    with torch.no_grad():
        dense = model(input_ids=windows).logits[:, :-1].log_softmax(-1)
        for name, choice in found.sparse.items():
            assert choice.pattern is not None
            folded = folded_linear(linears[name], Behaviour(pattern=choice.pattern), Constants())
            replace_linears(model, {name: folded})
        sparse = model(input_ids=windows).logits[:, :-1].log_softmax(-1)
    built = float((dense.exp() * (dense - sparse)).sum(-1).mean())
    assert built == pytest.approx(found.kl, rel=1e-2)
    assert built <= 0.01


def test_r_sparse_is_refused_with_a_budget(run: Callable[..., Allocation]) -> None:
    with pytest.raises(RecipeError, match="adds a product of all channels"):
        run({"max_kl": 0.01}, {"mitigations": ["var", "r-sparse"]})


@pytest.fixture(scope="module")
def in_int8(tiny_llama: Path) -> Rounded:
    """Every linear of the model as a dense one in int8, its activations rounded."""
    return rounded(tiny_llama, "int8")


def rounded(tiny_llama: Path, *forms: str) -> Rounded:
    """The linears of the model as dense ones in these forms, the head in int8."""
    modules = {form: in_form(tiny_llama, form) for form in forms}
    others = {"lm_head": in_form(tiny_llama, "int8")["lm_head"]}
    for made in modules.values():
        made.pop("lm_head", None)
    return Rounded(modules=modules, others=others, head="int8")


def in_form(tiny_llama: Path, text: str) -> dict[str, SparseLinear]:
    """Every linear of the model as a dense one, its activations rounded; none in floats."""
    form = WeightForm.parse(text)
    if form is None:
        return {}
    model = load_model(resolve(ModelSection(id=str(tiny_llama))), dtype=torch.float32)
    made = {}
    for name, linear in linears_of(model).items():
        stored = quantised(linear.weight.t().float(), form, name=name)
        tensors = {"W": stored.values, "weight_scale": stored.scale}
        behaviour = Behaviour(pattern=NMPattern(16, 16), activation_bits=8)
        made[name] = SparseLinear(behaviour, tensors)
    return made


def test_joint_models_in_integers_cost_what_both_do(
    run: Callable[..., Allocation], in_int8: Rounded, tiny_llama: Path
) -> None:
    both = run({"max_bytes": 0.75}, weights=("int8",), rounded=in_int8)
    kinds = {point.kind: point for point in both.front}
    alone, floats, front = kinds["integers"], kinds["floats"], kinds["front"]
    model = load_model(resolve(ModelSection(id=str(tiny_llama))), dtype=torch.float32)
    windows = spread_windows(SAMPLES, 2, 32, part=1)
    with torch.no_grad():
        dense = model(input_ids=windows).logits[:, :-1].log_softmax(-1)
        replace_linears(model, {**in_int8.modules["int8"], **in_int8.others})
        rounded = model(input_ids=windows).logits[:, :-1].log_softmax(-1)
    kl = float((dense.exp() * (dense - rounded)).sum(-1).mean())
    assert alone.kl == pytest.approx(kl, rel=1e-3)
    assert alone.linears == {"dense": len(both.choices)}
    assert alone.bytes_saved == 0
    assert alone.float_bytes == pytest.approx(0.25, abs=0.03)  # scales are read too
    assert floats.linears == front.linears
    assert front.kl == pytest.approx(floats.kl + alone.kl, rel=0.2)
    assert floats.float_bytes == pytest.approx(1 - floats.bytes_saved)
    assert front.float_bytes is not None
    assert front.float_bytes < alone.float_bytes < floats.float_bytes
    assert both.protocol is not None
    assert "Weights of joint models are in int8" in both.protocol.words


def test_a_budget_of_quality_counts_quantisation(
    run: Callable[..., Allocation], in_int8: Rounded
) -> None:
    alone = next(
        point
        for point in run({"max_bytes": 0.75}, weights=("int8",), rounded=in_int8).front
        if point.kind == "integers"
    )
    found = run({"max_kl": 0.02 + alone.kl}, weights=("int8",), rounded=in_int8)
    assert alone.kl < found.kl <= 0.02 + alone.kl
    assert found.bytes_saved > 0
    with pytest.raises(RecipeError, match="int8 weights alone exceed the budget"):
        run({"max_kl": 0.5 * alone.kl}, weights=("int8",), rounded=in_int8)


# -- forms of weights beside patterns --------------------------------------------------------------

FORMS = ("float", "int8", "int4")


@pytest.fixture(scope="module")
def in_forms(tiny_llama: Path) -> Rounded:
    return rounded(tiny_llama, *FORMS)


def test_a_budget_chooses_forms_and_patterns_together(
    run: Callable[..., Allocation], in_forms: Rounded
) -> None:
    found = run({"max_bytes": 0.12}, weights=FORMS, rounded=in_forms)
    assert found.bytes_saved >= 0.88
    assert {choice.weights for choice in found.choices.values()} <= {"int8", "int4"}
    assert found.sparse
    for row in found.ledger:
        assert {found.choices[name] for name in row.site} == {row.choice}
        labels = [one.choice.label for one in row.candidates]
        assert labels[0] == "dense float"
        assert {"dense int8", "8:16 act float", "8:16 act int4"} <= set(labels)
        read = {one.choice.label: 1 - one.bytes_saved for one in row.candidates}
        assert read["8:16 act int8"] < read["dense int8"] < read["8:16 act float"]
        errors = {one.choice.label: one.relative_error for one in row.candidates}
        assert errors["dense float"] == 0.0
        assert errors["dense int8"] < errors["dense int4"] < errors["8:16 act int4"]
        assert errors["8:16 act int4"] > errors["8:16 act float"]
    again = run({"max_bytes": 0.12}, weights=FORMS, rounded=in_forms)
    assert as_dict(again) == as_dict(found)


def test_the_front_has_a_line_for_quantisation_one_for_sparsity_and_one_for_both(
    run: Callable[..., Allocation], in_forms: Rounded
) -> None:
    found = run({"max_bytes": 0.12}, weights=FORMS, rounded=in_forms, front=[0.1, 0.3])
    lines = {
        kind: [point for point in found.front if point.kind == kind]
        for kind in ("integers", "floats", "front")
    }
    assert len(lines["floats"]) == 2
    assert len(lines["front"]) == 6  # two shares of each form's bytes
    assert {"dense float", "dense int8", "dense int4"} <= {p.label for p in lines["integers"]}
    assert all(name.startswith("dense") for p in lines["integers"] for name in p.linears)
    assert all("int" not in name for p in lines["floats"] for name in p.linears)
    alone = {point.label: point for point in lines["integers"]}
    for point in lines["front"]:  # what may also be sparse is predicted no worse
        if point.label in alone:
            assert point.summed_kl <= alone[point.label].summed_kl * (1 + 1e-3) + 1e-6


def test_where_quantisation_alone_keeps_the_budget_nothing_is_sparse(
    run: Callable[..., Allocation], in_forms: Rounded
) -> None:
    found = run({"max_bytes": 0.3}, weights=FORMS, rounded=in_forms)
    assert found.sparse == {}
    assert found.bytes_saved >= 0.7
    assert found.remark is not None
    assert "Sparsity does not pay under this budget: every linear stays dense" in found.remark
    only = run({"max_bytes": 0.2}, weights=FORMS, rounded=in_forms, patterns=["16:16"])
    assert only.sparse == {}
    assert set(only.forms.values()) == {"int8", "int4"}


def test_a_budget_of_quality_over_forms_is_held_and_beats_floats(
    run: Callable[..., Allocation], in_forms: Rounded
) -> None:
    found = run({"max_kl": 0.02}, weights=FORMS, rounded=in_forms)
    floats = run({"max_kl": 0.02})
    assert 0 < found.kl <= 0.02
    assert found.bytes_saved > floats.bytes_saved
    assert found.decode_speedup > floats.decode_speedup
    assert found.remark is not None
    assert "Under the same budget quantisation alone" in found.remark


def test_a_budget_over_forms_out_of_reach_says_so(
    run: Callable[..., Allocation], in_forms: Rounded
) -> None:
    with pytest.raises(RecipeError, match=r"(?s)patterns and weights.*bytes of at least 0\.0"):
        run({"max_bytes": 0.01}, weights=FORMS, rounded=in_forms)


def test_gradients_tell_what_forms_cost(run: Callable[..., Allocation], in_forms: Rounded) -> None:
    def costs(trials: str) -> dict[str, float]:
        found = run({"max_bytes": 0.12}, weights=FORMS, rounded=in_forms, trials=trials)
        return {
            row.name: one.kl
            for row in found.ledger
            for one in row.candidates
            if one.choice.label == "dense int4"
        }

    tried, estimated = costs("run"), costs("gradient")
    assert tried.keys() == estimated.keys()
    assert sum(estimated.values()) == pytest.approx(sum(tried.values()), rel=0.5)
