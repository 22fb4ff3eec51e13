"""Block by block: errors fall, a kill changes nothing, and text that is held out stays so."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from nmexport.calibration.block_learning import METRIC_CHUNKS, block_rows, learn_blocks
from nmexport.calibration.block_metric import gather_metrics
from nmexport.calibration.checkpoint import Checkpoint
from nmexport.calibration.effort import LearningSettings
from nmexport.calibration.learning_chunks import batch_of, split_chunks
from nmexport.calibration.learning_loss import block_loss_of, divergences_of, relative_errors
from nmexport.calibration.students import Targets
from nmexport.errors import CorpusError, ModelError
from nmexport.models.blocks import Block, DecoderBlocks
from nmexport.models.layerwise import LayerwiseModel
from nmexport.models.loader import load_model
from nmexport.models.source import ModelSource, resolve
from nmexport.progress import Silent
from nmexport.recipe import ModelSection
from nmexport.sparsity.fold import fold
from nmexport.sparsity.linear import Behaviour, Constants, SparseLinear
from nmexport.sparsity.pattern import NMPattern
from nmexport.sparsity.targets import linears_of

from tests.calibration.test_learning import DiesAfter, _Killed, same, some_samples
from tests.support.tiny import FAMILIES, save_tiny_model

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

SPARSER = Behaviour(pattern=NMPattern(2, 8))  # a random model loses little at 8:16
SHORT = LearningSettings(
    batch=16, length=16, held_out=16, block_chunks=192, block_epochs=4, block_rate=0.02, rank=4
)


@pytest.fixture(scope="module")
def source(tiny_llama: Path) -> ModelSource:
    return resolve(ModelSection(id=str(tiny_llama)))


def targets_of(model: Any, behaviour: Behaviour = SPARSER, *, left_out: str = "lm_head") -> Targets:
    linears = {name: linear for name, linear in linears_of(model).items() if name != left_out}
    layers = len(model.get_decoder().layers)
    sites = [[f"model.layers.{layer}.self_attn.{x}_proj" for x in "qkv"] for layer in range(layers)]
    return Targets(
        linears=linears,
        constants=dict.fromkeys(linears, Constants()),
        behaviours=dict.fromkeys(linears, behaviour),
        sites=sites,
    )


def run(blocks: DecoderBlocks, settings: LearningSettings = SHORT, **options: Any) -> Any:
    options = {"progress": Silent(), "dtype": torch.float32, **options}
    samples = options.pop("samples", [some_samples(128)])
    targets = options.pop("targets", None) or targets_of(blocks.model)
    return learn_blocks(blocks, targets, samples, settings=settings, **options)


@pytest.fixture(scope="module")
def learned(source: ModelSource) -> Any:
    return run(LayerwiseModel(source))


def logits(model: Any, ids: torch.Tensor, modules: Any = None) -> torch.Tensor:
    from nmexport.models.swap import swapped

    with torch.no_grad(), swapped(model, modules or {}):
        return model(input_ids=ids).logits.log_softmax(-1)


def test_divergence_on_held_out_text_falls_and_is_that_of_the_folded_model(
    source: ModelSource, learned: Any
) -> None:
    (_, before), (steps, after) = learned.curve.held_out
    assert steps == learned.curve.block_steps == 48
    assert after < 0.9 * before
    model = load_model(source, dtype=torch.float32)
    targets = targets_of(model)
    folded = {
        name: SparseLinear(
            SPARSER,
            fold(linear, SPARSER, Constants(), learned.corrections[name], dtype=torch.float32),
        )
        for name, linear in targets.linears.items()
    }
    held_out = split_chunks([some_samples(128)], SHORT).held_out
    dense, sparse = logits(model, held_out), logits(model, held_out, folded)
    assert after == pytest.approx(float((dense.exp() * (dense - sparse)).sum(-1).mean()), rel=1e-3)


@pytest.mark.parametrize(
    ("parts", "helps"),
    # A random model has no channel whose mean a bias or a shift could mend.
    [
        (("bias",), False),
        (("shift",), False),
        (("output_scale", "bias"), True),
        (("low_rank",), True),
    ],
)
def test_parts_alone_and_no_other_is_learned(source: ModelSource, parts: Any, helps: bool) -> None:
    learned = run(LayerwiseModel(source), replace(SHORT, parts=parts))
    (_, before), (_, after) = learned.curve.held_out
    assert after < before or not helps
    for one in learned.corrections.values():
        named = {name for name, value in vars(one).items() if value is not None}
        assert named == {"low_rank_in", "low_rank_out"} if parts == ("low_rank",) else set(parts)


def test_the_model_in_memory_and_layer_by_layer_learn_the_same_bits(
    source: ModelSource, learned: Any
) -> None:
    model = load_model(source, dtype=torch.float32)
    needed = [parameter.requires_grad for parameter in model.parameters()]
    ids = some_samples(2)
    before = logits(model, ids)
    whole = run(DecoderBlocks(model))
    assert same(whole.corrections, learned.corrections)
    assert torch.equal(logits(model, ids), before)
    assert [parameter.requires_grad for parameter in model.parameters()] == needed


def test_same_seed_same_constants(source: ModelSource, learned: Any) -> None:
    again = run(LayerwiseModel(source))
    assert same(again.corrections, learned.corrections)
    assert again.curve == learned.curve
    other = run(LayerwiseModel(source), replace(SHORT, seed=1))
    assert not same(other.corrections, learned.corrections)


@pytest.mark.parametrize("killed_after", [3, 60])
def test_a_killed_run_goes_on_at_its_block_to_the_same_bits(
    source: ModelSource, learned: Any, tmp_path: Path, killed_after: int
) -> None:
    def checkpoint_of(index: int) -> Checkpoint:
        return Checkpoint(tmp_path / f"block-{index}.safetensors", "one")

    with pytest.raises(_Killed):
        run(LayerwiseModel(source), checkpoint_of=checkpoint_of, progress=DiesAfter(killed_after))
    done = killed_after // 49  # 48 steps of a block, and one for moving the streams
    assert len(list(tmp_path.iterdir())) == done
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    resumed = run(LayerwiseModel(source), checkpoint_of=checkpoint_of)
    assert same(resumed.corrections, learned.corrections)
    assert resumed.curve == learned.curve
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())


class Watches(Silent):
    """Looks at a model now and then."""

    def __init__(self, look: Any) -> None:
        self.look = look

    def track(self, items: Iterable[Any], *, label: str, total: int | None = None) -> Iterator[Any]:
        for item in items:
            self.look()
            yield item


def test_one_block_and_its_optimiser_are_in_memory(source: ModelSource) -> None:
    layered = LayerwiseModel(source)
    held: list[frozenset[str]] = []

    def look() -> None:
        held.append(
            frozenset(
                name.split(".")[2]
                for name, parameter in layered.model.named_parameters()
                if name.startswith("model.layers.") and not parameter.is_meta
            )
        )

    run(layered, progress=Watches(look))
    assert {layers for layers in held if layers} == {frozenset("0"), frozenset("1")}
    assert all(parameter.is_meta for parameter in layered.model.parameters())


def test_held_out_text_is_never_learned_from(
    source: ModelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients are taken on the chunks that are learned from, and on no other."""
    kinds = [some_samples(128), some_samples(40).flip(1)]
    chunks = split_chunks(kinds, SHORT)
    rows = block_rows(chunks, SHORT)
    layered = LayerwiseModel(source)
    embedded = layered.states(chunks.held_out)
    with torch.no_grad():
        layered.embed(chunks.held_out, embedded)
    kept_apart = [embedded[number][0] for number in range(len(chunks.held_out))]
    seen: list[torch.Tensor] = []
    forward = Block.__call__

    def watched(block: Block, hidden: torch.Tensor) -> torch.Tensor:
        if block.index == 0 and torch.is_grad_enabled():
            seen.extend(hidden)
        return forward(block, hidden)

    monkeypatch.setattr(Block, "__call__", watched)
    run(layered, samples=kinds)
    assert len(seen) == METRIC_CHUNKS + SHORT.block_epochs * len(rows)
    assert not any(torch.equal(one, other) for one in seen for other in kept_apart)


def test_every_chunk_comes_once_in_an_epoch_and_kinds_by_turns() -> None:
    chunks = split_chunks([some_samples(128), some_samples(128).flip(1)], SHORT)
    rows = block_rows(chunks, SHORT)
    assert len(rows) == 192
    assert (rows < chunks.counts[0]).sum() == 96
    assert torch.equal(rows[:16], batch_of(0, chunks.counts, SHORT))
    few = block_rows(chunks, replace(SHORT, block_chunks=10_000))
    assert sorted(few.tolist()) == list(range(len(chunks.ids)))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_learns_in_batches(family: str, tmp_path: Path) -> None:
    save_tiny_model(tmp_path, family)
    layered = LayerwiseModel(resolve(ModelSection(id=str(tmp_path))))
    targets = targets_of(layered.model)
    learned = run(
        layered,
        replace(SHORT, length=32, batch=16, block_chunks=96, block_epochs=1),
        targets=replace(targets, sites=[]),
    )
    (_, before), (_, after) = learned.curve.held_out
    assert after < before


def test_patterns_and_orders_of_their_own(source: ModelSource) -> None:
    layered = LayerwiseModel(source)
    targets = targets_of(layered.model)
    name = "model.layers.0.mlp.down_proj"
    order = torch.randperm(128, generator=torch.Generator().manual_seed(3)).int()
    constants = {**targets.constants, name: Constants(channel_order=order, nu=1.1)}
    behaviours = {
        **targets.behaviours,
        name: Behaviour(pattern=NMPattern(4, 16), variance_correction=True),
    }
    without = {name: linear for name, linear in targets.linears.items() if "layers.1" not in name}
    learned = run(
        layered,
        targets=replace(targets, linears=without, constants=constants, behaviours=behaviours),
    )
    assert learned.corrections.keys() == without.keys()  # a dense layer only hands on
    (_, before), (_, after) = learned.curve.held_out
    assert after < before


def test_a_target_outside_of_the_layers_is_refused(source: ModelSource) -> None:
    layered = LayerwiseModel(source)
    targets = targets_of(layered.model, left_out="")
    with pytest.raises(ModelError, match="lm_head is in no decoder layer") as caught:
        run(layered, targets=targets)
    assert "'!lm_head'" in (caught.value.fix or "")


def test_too_little_text_and_a_loss_that_is_not_finite_end_in_words(source: ModelSource) -> None:
    with pytest.raises(CorpusError, match="too few"):
        run(LayerwiseModel(source), samples=[some_samples(1, 16)])
    with pytest.raises(ModelError, match="finite"):
        run(LayerwiseModel(source), replace(SHORT, block_rate=float("inf")))


def test_the_error_is_relative_and_weighed_by_direction() -> None:
    teacher = torch.tensor([[3.0, 4.0], [300.0, 400.0]])
    student = teacher + torch.tensor([[0.0, 0.5], [0.0, 50.0]])
    errors = relative_errors(student, teacher)
    assert errors[:, 1].tolist() == pytest.approx([0.02**0.5] * 2)
    assert divergences_of(errors, torch.eye(2)).tolist() == pytest.approx([0.02] * 2)
    assert divergences_of(errors, torch.tensor([[1.0], [0.0]])).tolist() == [0.0, 0.0]
    assert float(block_loss_of(torch.tensor([0.04, 0.16]))) == pytest.approx(0.3)


def test_a_metric_foresees_what_an_error_does_to_the_predictions(source: ModelSource) -> None:
    """Twice the divergence, for small errors: the Fisher information is its curvature."""
    model = load_model(source, dtype=torch.float32)
    blocks = DecoderBlocks(model)
    samples = some_samples(32)
    metrics = gather_metrics(blocks, samples, progress=Silent(), seed=0)
    layer, ids = 0, some_samples(8)
    noise = 0.02 * torch.randn(8, 32, 64, generator=torch.Generator().manual_seed(1))
    module = model.model.layers[layer]
    before: list[torch.Tensor] = []

    def add(module: Any, arguments: Any, output: torch.Tensor) -> torch.Tensor:
        before.append(output)
        return output + noise * output.square().mean(-1, keepdim=True).sqrt()

    dense = logits(model, ids)
    handle = module.register_forward_hook(add)
    noisy = logits(model, ids)
    handle.remove()
    measured = float((dense.exp() * (dense - noisy)).sum(-1).mean())
    # Every direction counts a tenth more than what the gradients say.
    foreseen = float(divergences_of(noise, metrics.of(layer)).mean()) / 2 / 1.1
    assert foreseen == pytest.approx(measured, rel=0.25)
