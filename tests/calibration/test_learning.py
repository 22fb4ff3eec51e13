"""The optimisation: it learns, repeats, goes on after a kill, and leaves the model as it was."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from nmexport.calibration.checkpoint import Checkpoint
from nmexport.calibration.effort import EFFORTS, LearningSettings
from nmexport.calibration.learning import learn
from nmexport.calibration.learning_chunks import batch_of, split_chunks
from nmexport.calibration.learning_loss import divergence_with_gradient, divergences, loss_of
from nmexport.calibration.output_head import OutputHead, SampledHead
from nmexport.calibration.products import fast_dtype
from nmexport.calibration.sensitivity import gather_sensitivities
from nmexport.calibration.students import Targets, rate_at
from nmexport.errors import CorpusError, ModelError
from nmexport.models.loader import load_model
from nmexport.models.source import resolve
from nmexport.models.swap import replace_linears
from nmexport.progress import Silent
from nmexport.recipe import ModelSection
from nmexport.sparsity.fold import Corrections, fold
from nmexport.sparsity.linear import Behaviour, Constants, SparseLinear
from nmexport.sparsity.pattern import NMPattern
from nmexport.sparsity.targets import linears_of

from tests.support.tiny import save_tiny_model
from tests.support.unfolded import folded_linear

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

BEHAVIOUR = Behaviour(pattern=NMPattern(8, 16))
SHORT = LearningSettings(steps=45, batch=2, length=16, rate=0.01, vocabulary=256, held_out=2)


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> Any:
    return load_model(resolve(ModelSection(id=str(tiny_llama))), dtype=torch.float32)


@pytest.fixture(scope="module")
def linears(model: Any) -> dict[str, torch.nn.Linear]:
    return {name: one for name, one in linears_of(model).items() if name != "lm_head"}


def some_samples(count: int = 12, length: int = 32) -> torch.Tensor:
    return torch.randint(3, 384, (count, length), generator=torch.Generator().manual_seed(0))


def plain(linears: Iterable[str]) -> dict[str, Constants]:
    return {name: Constants() for name in linears}


def run(model: Any, linears: Any, settings: LearningSettings = SHORT, **options: Any) -> Any:
    options = {"progress": Silent(), "dtype": torch.float32, **options}
    samples = options.pop("samples", [some_samples()])
    targets = Targets(
        linears=linears,
        constants=plain(linears),
        behaviours=dict.fromkeys(linears, options.pop("behaviour", BEHAVIOUR)),
        sites=options.pop("sites", ()),
    )
    return learn(model, targets, samples, settings=settings, **options)


def same(one: dict[str, Corrections], other: dict[str, Corrections]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, getattr(other[name], part))
        for name in one
        for part, value in vars(one[name]).items()
        if value is not None
    )


class _Killed(Exception):
    pass


class DiesAfter(Silent):
    """Stops the loop in the middle, as a kill would."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def track(self, items: Iterable[Any], *, label: str, total: int | None = None) -> Iterator[Any]:
        for count, item in enumerate(items):
            if count == self.steps:
                raise _Killed
            yield item


def test_held_out_loss_falls_and_the_model_is_left_as_it_was(model: Any, linears: Any) -> None:
    ids = some_samples(2)
    with torch.no_grad():
        before = model(input_ids=ids).logits
    settings = replace(SHORT, steps=80, batch=16, rate=0.005, held_out=16)
    sparser = Behaviour(pattern=NMPattern(2, 8))  # a random model loses little at 8:16
    learned = run(model, linears, settings, samples=[some_samples(256)], behaviour=sparser)
    assert len(learned.curve.learned) == 80
    (first, start), *_, (last, end) = learned.curve.held_out
    assert (first, last) == (0, 80)
    assert end < 0.95 * start
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, before)
    assert linears_of(model).keys() - {"lm_head"} == linears.keys()


def test_same_seed_same_constants(model: Any, linears: Any) -> None:
    settings = replace(SHORT, steps=6)
    one, again = (run(model, linears, settings) for _ in range(2))
    assert same(one.corrections, again.corrections)
    assert one.curve == again.curve
    other = run(model, linears, replace(settings, seed=1))
    assert not same(one.corrections, other.corrections)


def test_killed_run_goes_on_to_the_same_result(model: Any, linears: Any, tmp_path: Path) -> None:
    whole = run(model, linears)
    checkpoint = Checkpoint(tmp_path / "learning.safetensors", "one")
    with pytest.raises(_Killed):
        run(model, linears, checkpoint=checkpoint, progress=DiesAfter(33))
    resumed = run(model, linears, checkpoint=checkpoint, progress=DiesAfter(30))  # 45 - 20 = 25
    assert same(resumed.corrections, whole.corrections)
    assert resumed.curve == whole.curve
    finished = run(model, linears, checkpoint=checkpoint, progress=DiesAfter(0))  # no step left
    assert same(finished.corrections, whole.corrections)
    assert [path.name for path in tmp_path.iterdir()] == ["learning.safetensors"]


def test_checkpoint_of_something_else_or_damaged_starts_over(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    checkpoint = Checkpoint(path, "one")
    assert checkpoint.load() is None
    checkpoint.save({"a": torch.ones(2)}, {"done": 3})
    found = checkpoint.load()
    assert found is not None
    assert found[1] == {"done": 3}
    assert torch.equal(found[0]["a"], torch.ones(2))
    assert Checkpoint(path, "other").load() is None
    path.write_bytes(path.read_bytes()[:20])
    assert checkpoint.load() is None


def test_folded_model_has_the_loss_that_learning_reports(model: Any, linears: Any) -> None:
    """What is exported is what was learned: the held-out loss, recomputed on folded linears."""
    settings = replace(SHORT, vocabulary=384)
    learned = run(model, linears, settings)
    constants = plain(linears)
    folded = {
        name: SparseLinear(
            BEHAVIOUR,
            fold(
                linear, BEHAVIOUR, constants[name], learned.corrections[name], dtype=torch.float32
            ),
        )
        for name, linear in linears.items()
    }
    held_out = split_chunks([some_samples()], settings).held_out
    with torch.no_grad():
        dense = model(input_ids=held_out).logits.log_softmax(-1)
        replaced = replace_linears(model, folded)
        sparse = model(input_ids=held_out).logits.log_softmax(-1)
    replace_linears(model, replaced)
    direct = float((dense.exp() * (dense - sparse)).sum(-1).mean())
    assert learned.curve.held_out[-1][1] == pytest.approx(direct, rel=1e-3)


def test_targets_in_store_and_computed_on_the_way_agree(
    model: Any, linears: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each chunk more than once: targets are stored. Small steps, and a pattern that loses enough
    # for rounding to be small beside it: a root weighs small divergences most.
    settings = replace(SHORT, steps=14, rate=0.002)
    sparser = Behaviour(pattern=NMPattern(2, 8))
    stored = run(model, linears, settings, behaviour=sparser)
    monkeypatch.setattr("nmexport.calibration.learning._TARGET_BYTES", 0)
    on_the_way = run(model, linears, settings, behaviour=sparser)
    # A store in half precision: later steps magnify its rounding.
    pairs = zip(stored.curve.learned[:5], on_the_way.curve.learned[:5], strict=True)
    for one, other in pairs:
        assert one == pytest.approx(other, rel=0.05)


def test_only_the_parts_asked_for_are_learned(model: Any, linears: Any) -> None:
    learned = run(model, linears, replace(SHORT, steps=2, parts=("bias",)))
    for one in learned.corrections.values():
        assert one.bias is not None
        assert one.shift is one.input_scale is one.output_scale is None


def test_linears_of_one_site_learn_one_shift(model: Any, linears: Any) -> None:
    sites = [[f"model.layers.{layer}.self_attn.{x}_proj" for x in "qkv"] for layer in range(2)]
    learned = run(model, linears, replace(SHORT, steps=3), sites=sites)
    for site in sites:
        first, *rest = (learned.corrections[name] for name in site)
        assert bool(first.shift.any())
        for other in rest:
            assert torch.equal(first.shift, other.shift)
            assert not torch.equal(first.input_scale, other.input_scale)


def test_where_a_phase_stays_dense_they_learn_one_scale_too(
    model: Any, linears: Any, tmp_path: Path
) -> None:
    """Linears are one op where all that lies along their input is the same."""
    sites = [[f"model.layers.{layer}.self_attn.{x}_proj" for x in "qkv"] for layer in range(2)]
    settings = replace(SHORT, parts=("shift", "input_scale", "bias"))
    options = {"sites": sites, "behaviour": replace(BEHAVIOUR, phase="decode")}
    learned = run(model, linears, settings, **options)
    for site in sites:
        first, *rest = (learned.corrections[name] for name in site)
        assert float(first.input_scale.std()) > 0
        for other in rest:
            assert torch.equal(first.input_scale, other.input_scale)
            assert not torch.equal(first.bias, other.bias)
    checkpoint = Checkpoint(tmp_path / "learning.safetensors", "one")
    with pytest.raises(_Killed):
        run(model, linears, settings, checkpoint=checkpoint, progress=DiesAfter(33), **options)
    resumed = run(model, linears, settings, checkpoint=checkpoint, **options)
    assert same(resumed.corrections, learned.corrections)


def test_loss_that_is_not_finite_ends_in_words(model: Any, linears: Any) -> None:
    with pytest.raises(ModelError, match="finite"):
        run(model, linears, replace(SHORT, rate=float("inf")))
    assert linears_of(model).keys() - {"lm_head"} == linears.keys()


def test_every_chunk_is_learned_from_once_before_any_twice() -> None:
    chunks = split_chunks([some_samples()], SHORT)
    assert len(chunks.ids) + len(chunks.held_out) == 24
    steps = len(chunks.ids) // 2
    rows = torch.cat([batch_of(step, chunks.counts, SHORT) for step in range(steps)])
    assert sorted(rows.tolist()) == list(range(len(chunks.ids)))
    whole = some_samples().reshape(-1, 16).tolist()
    assert sorted(chunks.ids.tolist() + chunks.held_out.tolist()) == sorted(whole)


def test_kinds_of_text_make_up_as_much_of_every_step() -> None:
    many, few = some_samples(40), some_samples(6) + 1
    chunks = split_chunks([many, many[:0], few], SHORT)
    assert chunks.counts == (80 - 1, 12 - 1)
    for step in range(30):
        rows = batch_of(step, chunks.counts, SHORT)
        assert (rows < 79).tolist() == [True, False]
    seen = torch.cat([batch_of(step, chunks.counts, SHORT) for step in range(22)])
    assert sorted(row for row in seen.tolist() if row >= 79) == sorted([*range(79, 90)] * 2)


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(CorpusError, match="too few"):
        split_chunks([some_samples(1, 16)], SHORT)


def test_rate_warms_up_and_falls() -> None:
    rates = [rate_at(step, steps=SHORT.steps, rate=SHORT.rate) for step in range(SHORT.steps)]
    assert rates[0] < rates[4] <= SHORT.rate
    assert rates[-1] < 0.01 * SHORT.rate
    assert EFFORTS["fast"].steps < EFFORTS["standard"].steps < EFFORTS["thorough"].steps


def mean_divergence(student: torch.Tensor, teacher: torch.Tensor, head: OutputHead) -> float:
    return float(divergences(student, teacher, head).mean())


def test_divergence_of_equals_is_zero_and_cap_and_factor_count() -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 5, 8, generator=generator)
    head = OutputHead(weight=torch.randn(20, 8, generator=generator))
    assert mean_divergence(one, one, head) == pytest.approx(0, abs=1e-6)
    plain_loss = mean_divergence(one, other, head)
    assert 0 < mean_divergence(one, other, replace(head, softcap=1.0)) < plain_loss
    assert 0 < mean_divergence(one, other, replace(head, factor=0.25)) < plain_loss
    doubled = OutputHead(weight=head.weight * 2)
    assert mean_divergence(one, other, doubled) == pytest.approx(
        mean_divergence(one, other, replace(head, factor=2.0))
    )


def test_the_gradient_in_parts_is_that_of_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 600, 8, generator=generator)  # two parts and a rest
    head = OutputHead(weight=torch.randn(20, 8, generator=generator), softcap=2.0)
    value, gradient = divergence_with_gradient(student, teacher, head)
    leaf = student.clone().requires_grad_()
    whole = divergences(leaf, teacher, head)
    (loss_of(whole) / len(whole)).backward()  # type: ignore[no-untyped-call]
    assert value == pytest.approx(float(whole.detach().mean()), rel=1e-5)
    assert leaf.grad is not None
    assert torch.allclose(gradient, leaf.grad, rtol=1e-4, atol=1e-8)
    assert not student.requires_grad


def test_what_is_already_equal_pulls_at_nothing() -> None:
    """The slope of a root at zero is infinite."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 8, generator=generator)
    head = OutputHead(weight=torch.randn(20, 8, generator=generator))
    value, gradient = divergence_with_gradient(hidden, hidden.clone(), head)
    assert value == pytest.approx(0, abs=1e-6)
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_tokens_far_off_count_by_the_root_of_their_divergence() -> None:
    found = torch.tensor([0.01, 4.0], requires_grad=True)
    loss_of(found).backward()  # type: ignore[no-untyped-call]
    assert found.grad is not None
    assert float(found.grad[0] / found.grad[1]) == pytest.approx(20.0)


def test_scores_are_disturbed_in_steps_alone_and_by_the_seed(model: Any, linears: Any) -> None:
    """A wide disturbance shows in the loss learned from, never in the one on held-out text."""
    settings = replace(SHORT, steps=1, rate=0.0)
    calm, wild, again = (
        run(model, linears, replace(settings, disturbance=width)) for width in (0.0, 3.0, 3.0)
    )
    assert wild.curve.learned[0] > calm.curve.learned[0]
    assert wild.curve.learned == again.curve.learned
    assert wild.curve.held_out == calm.curve.held_out


SCALED: dict[str, dict[str, Any]] = {
    "granite": {"logits_scaling": 8.0},
    "cohere": {"logit_scale": 0.25},
    "gemma2": {},
    "phi": {},  # its output embedding has a bias
}


@pytest.mark.parametrize("family", SCALED)
def test_logits_are_the_models_own(tmp_path: Path, family: str) -> None:
    save_tiny_model(tmp_path, family, **SCALED[family])
    scaled = load_model(resolve(ModelSection(id=str(tmp_path))), dtype=torch.float32)
    linears = {name: one for name, one in linears_of(scaled).items() if name != "lm_head"}
    settings = replace(SHORT, steps=1, vocabulary=384)
    sparser = Behaviour(pattern=NMPattern(2, 8))
    learned = run(scaled, linears, settings, behaviour=sparser)
    held_out = split_chunks([some_samples()], settings).held_out
    modules = {name: folded_linear(one, sparser, Constants()) for name, one in linears.items()}
    with torch.no_grad():
        dense = scaled(input_ids=held_out).logits.log_softmax(-1)
        replace_linears(scaled, modules)
        sparse = scaled(input_ids=held_out).logits.log_softmax(-1)
    direct = float((dense.exp() * (dense - sparse)).sum(-1).mean())
    assert learned.curve.held_out[0] == (0, pytest.approx(direct, rel=1e-3))


def test_tokens_that_are_looked_at_keep_their_bias() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias, hidden = (
        torch.randn(*shape, generator=generator) for shape in ((20, 8), (20,), (3, 8))
    )
    head = OutputHead(weight=weight, bias=bias, factor=0.5, softcap=2.0)
    few = torch.tensor([3, 7, 11])
    torch.testing.assert_close(head.rows(few).logits(hidden), head.logits(hidden)[:, few])


def test_few_tokens_stand_for_all_of_them() -> None:
    """Over steps, sums over what is looked at are those over the vocabulary; each step differs."""
    generator = torch.Generator().manual_seed(0)
    weight, hidden = (torch.randn(*shape, generator=generator) for shape in ((60, 4), (3, 4)))
    head = OutputHead(weight=weight)
    mass = head.logits(hidden).softmax(dim=-1).sum(dim=0)
    sampled = SampledHead(head, mass, likeliest=20, drawn=10, seed=7)
    sums = [sampled.of_step(step).logits(hidden).exp().sum(dim=-1) for step in range(400)]
    assert not torch.equal(sums[0], sums[1])
    assert torch.equal(sums[3], sampled.of_step(3).logits(hidden).exp().sum(dim=-1))
    exact = head.logits(hidden).exp().sum(dim=-1)
    torch.testing.assert_close(torch.stack(sums).mean(dim=0), exact, rtol=0.02, atol=0.0)
    always = mass.topk(20).indices.sort().values
    torch.testing.assert_close(
        sampled.of_step(0).logits(hidden)[:, :20], head.rows(always).logits(hidden)
    )


@pytest.mark.parametrize("likeliest", [60, 12])
def test_where_nothing_is_drawn_the_loss_sees_the_likeliest(likeliest: int) -> None:
    weight = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    head = OutputHead(weight=weight)
    sampled = SampledHead(head, torch.arange(60.0), likeliest=likeliest, drawn=0, seed=0)
    assert sampled.of_step(5).log_counts is None
    assert torch.equal(sampled.of_step(5).weight, weight[60 - likeliest :])


def test_logits_that_come_about_otherwise_are_refused(
    model: Any, linears: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = type(model).forward

    def softened(self: Any, **given: Any) -> Any:
        output = forward(self, **given)
        output.logits = output.logits / 1.5
        return output

    monkeypatch.setattr(type(model), "forward", softened)
    with pytest.raises(ModelError, match="way that learning does not know") as caught:
        run(model, linears)
    assert "--mitigation var" in (caught.value.fix or "")


def test_sensitivities_are_gradients_of_the_models_own_predictions(
    model: Any, linears: Any
) -> None:
    samples = some_samples(2)
    found, again = (
        gather_sensitivities(model, linears, samples, progress=Silent()) for _ in range(2)
    )
    assert found.keys() == linears.keys()
    for name, one in found.items():
        assert one.shape == (linears[name].in_features,)
        assert bool((one > 0).all())
        assert torch.equal(one, again[name])
    q, k = ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj")
    assert not torch.allclose(found[q], found[k])  # one input, two gradients
    assert not any(parameter.grad is not None for parameter in model.parameters())
    assert fast_dtype(torch.device("cpu")) in {torch.bfloat16, torch.float32}
