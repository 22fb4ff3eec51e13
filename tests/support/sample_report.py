"""A report with figures as a real model gives them, made up: for what is done with reports."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from nmexport.environment import Environment
from nmexport.models.source import ModelSource
from nmexport.progress import Silent
from nmexport.recipe import GatesSection, ModelSection, Recipe, SparsitySection
from nmexport.report import learning
from nmexport.report.document import Measured, assemble, judge
from nmexport.report.model import (
    Accuracy,
    CacheError,
    CacheParity,
    Calibration,
    Continuation,
    DecodeTimes,
    Latency,
    Likelihood,
    LinearParity,
    LinearsParity,
    Memory,
    MetricScore,
    Parity,
    ParityLeg,
    PeakMemory,
    PrefillTimes,
    Report,
    Scores,
    SideTimes,
    Sparsity,
    Speedup,
    StoredDense,
    TaskScore,
)
from nmexport.runtimes.session import Session
from nmexport.sparsity.pattern import NMPattern
from nmexport.store.layers import LayerSpec
from nmexport.verification import (
    audit,
    continuation,
    latency,
    op_parity,
    parity,
)
from nmexport.verification.accuracy import protocol
from nmexport.verification.memory import PROTOCOL as MEMORY_PROTOCOL

if TYPE_CHECKING:
    from pathlib import Path

KINDS = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj")}
RECIPE = Recipe(
    model=ModelSection(id="smollm2"),
    sparsity=SparsitySection(criterion="act", mitigations=(), grouping="balanced"),
    gates=GatesSection(max_perplexity_ratio=2.05, min_decode_speedup=1.35),
)
ENVIRONMENT = Environment(
    nmexport="0.1.0",
    python="3.11.7",
    system="Linux-6.1 x86_64",
    cpu="A Processor With A Long Name 9999 16-Core",
    isa=("avx2", "avx512f"),
    cores=2,
    memory_bytes=16 << 30,
    packages={"onnxruntime": "1.32.0", "torch": "2.13.0"},
)


STORED_DENSE = StoredDense(
    scores=Scores(sparse=Likelihood(perplexity=12.34), kl_mean=0.0021),
    latency=Latency(
        dense=SideTimes(decode=DecodeTimes(p50_ms=9.87), prefill=PrefillTimes(p50_ms=65.4)),
        sparse=SideTimes(decode=DecodeTimes(p50_ms=6.54), prefill=PrefillTimes(p50_ms=45.6)),
        speedup=Speedup(decode=1.51, prefill=1.43),
    ),
    dense_bytes=540_000_000,
    stored_bytes=165_000_000,
    sparse_bytes=166_000_000,
)
"""A dense model in integers: for a report whose recipe has them."""


def _calibration(specs: list[LayerSpec]) -> Calibration:
    """A loss that falls, orders that help by layer."""
    learned = [0.6 * 0.99**step + 0.02 * (step % 7) for step in range(120)]
    held_out = [(step, 0.62 * 0.992**step) for step in range(0, 121, 15)]
    layers = [replace(spec, gap_closed=0.3 + 0.004 * place) for place, spec in enumerate(specs)]
    document = {
        "settings": {"steps": 120, "batch": 4, "length": 256},
        "curve": {"learned": learned, "held_out": [list(pair) for pair in held_out]},
    }
    return learning.section(document, layers)


def sample_report(
    folder: Path, *, layers: int = 30, native: bool = True, recipe: Recipe = RECIPE
) -> Report:
    """A whole report; `native` False is a machine without the native op library."""
    rng = np.random.default_rng(1)
    specs = _layers(layers, rng)
    source = ModelSource(
        id=recipe.model.id, revision=None, folder=folder, gguf_file=None, digest="0" * 64
    )
    peak = 812_345_678
    report = assemble(
        recipe=recipe,
        source=source,
        parameters=134_515_008,
        target="onnxruntime",
        environment=ENVIRONMENT,
        measured=Measured(
            sparsity=replace(_sparsity(specs, rng), linears=7 * layers + 1),
            accuracy=_accuracy(rng),
            calibration=_calibration(specs),
            parity=_parity(native=native),
            latency=_latency(rng),
            memory=Memory(
                peak_rss_bytes=peak,
                artifact_bytes=540_000_000,
                sparse=PeakMemory(peak_rss_bytes=peak),
                dense=PeakMemory(why="the measuring process ended with code -9"),
                protocol=MEMORY_PROTOCOL,
            ),
        ),
        notes=[] if native else ["The native op library is not built here."],
    )
    return judge(report, recipe)


def _layers(count: int, rng: np.random.Generator) -> list[LayerSpec]:
    return [
        LayerSpec(
            name=f"model.layers.{index}.{block}.{kind}",
            in_features=576,
            out_features=576,
            pattern=NMPattern(8, 16),
            criterion="act",
            relative_error=float(rng.uniform(0.1, 0.3)),
        )
        for index in range(count)
        for block, kinds in {**KINDS, "mlp": (*KINDS["mlp"], "down_proj")}.items()
        for kind in kinds
    ]


def _sparsity(layers: list[LayerSpec], rng: np.random.Generator) -> Sparsity:
    total = 576 * 1024
    kept = {layer.name: (total // 2 - int(rng.integers(50)), total) for layer in layers}
    errors = {layer.name: float(rng.uniform(0.2, 0.9)) for layer in layers}
    return audit.sparsity(layers, kept, {**errors, layers[3].name: None})


def _task(metric: str, dense: float, sparse: float) -> TaskScore:
    error = None if metric == "bits" else 0.02
    score = MetricScore(
        dense=dense,
        sparse=sparse,
        dense_stderr=error,
        sparse_stderr=error,
        difference_stderr=error and error / 2,
    )
    return TaskScore(**vars(score), stderr=error, n=1200, metric=metric, metrics={metric: score})


def _accuracy(rng: np.random.Generator) -> Accuracy:
    dense = Likelihood(perplexity=29.61, nll_mean=3.388, window_nll_mean=(3.3, 3.4))
    sparse = Likelihood(perplexity=58.13, nll_mean=4.063, window_nll_mean=(4.0, 4.1))
    return Accuracy(
        dataset="test.txt",
        tokens=8176,
        windows=16,
        dense=dense,
        sparse=sparse,
        perplexity_ratio=1.963,
        perplexity_ratio_stderr=0.0312,
        kl_mean=0.7123,
        top1_agreement=0.6124,
        continuation=Continuation(
            prompts=8,
            prompt_tokens=32,
            generated_tokens=64,
            free_running_agreement=0.182,
            guided_agreement=0.641,
            first_divergence=(3, 9, None, 1, 0, 12, 5, 7),
            median_first_divergence=6.0,
            protocol=continuation.PROTOCOL,
        ),
        second_half=Scores(
            tokens=4080,
            dense=Likelihood(perplexity=24.9),
            sparse=Likelihood(perplexity=48.2),
            perplexity_ratio=1.936,
            perplexity_ratio_stderr=0.02,
        ),
        decode_only=Scores(
            tokens=4080,
            windows=16,
            dense=dense,
            sparse=sparse,
            perplexity_ratio=1.612,
            perplexity_ratio_stderr=0.02,
            kl_mean=0.412,
            top1_agreement=0.701,
            protocol="",
        ),
        tasks={"local_choice": _task("acc", 0.52, 0.47), "texts": _task("bits", 1.2, 1.4)},
        tasks_protocol="Both models answer the same requests.",
        protocol=protocol("all"),
    )


def _parity(*, native: bool) -> Parity:
    why = "the native op library is not built here"
    leg = ParityLeg(
        max_abs=3.4e-5,
        median_abs=1.2e-5,
        top1_agreement=1.0,
        greedy_identical=True,
        prompts_diverged=0,
        prompts=8,
        tokens=768,
    )
    linears = LinearParity(
        error_over_tolerance=0.031,
        worst_layer="model.layers.0.mlp.up_proj",
        within_contract=True,
        linears=210,
        values=4_567_890,
    )
    absent = ParityLeg(why=why)
    return Parity(
        torch_onnx=leg,
        torch_engine=leg if native else absent,
        onnx_engine=replace(leg, greedy_identical=False, prompts_diverged=1) if native else absent,
        noise_floor=replace(leg, max_abs=12.2, greedy_identical=False, prompts_diverged=7),
        extent="Torch and the function bodies ran on the CPU, on all of 8 prompts.",
        protocol=parity.PROTOCOL,
        caches=_caches() if native else CacheParity(why=why),
        linears=LinearsParity(
            torch=linears,
            onnx=linears,
            engine=linears if native else LinearParity(why=why),
            protocol=op_parity.PROTOCOL,
        ),
    )


def _caches() -> CacheParity:
    layers = tuple(
        CacheError(layer=layer, tensor=tensor, relative_error=1e-6 * 4**layer)
        for layer in range(3)
        for tensor in ("key", "value")
    )
    return CacheParity(layers=layers, tolerance=1e-3)


class Paced(Session):
    """A session that takes no time; drawn samples replace what was timed."""

    threads = 2
    runtime = "onnxruntime 1.32"
    vocabulary_size = 8

    def extend(self, cache: object, input_ids: np.ndarray) -> tuple[np.ndarray, object]:
        return np.zeros((*input_ids.shape, 8), np.float32), cache or ()

    def keep(self, cache: object) -> object:
        return cache

    def close(self) -> None:
        pass


def _latency(rng: np.random.Generator) -> Latency:
    ids = np.zeros((1, 128), np.int64)
    timing = latency.Timing(
        prompt=ids,
        context=ids,
        runs=30,
        warmup=3,
        device=ENVIRONMENT.cpu,
        progress=Silent(),
    )
    timed = latency.compare(Paced(), Paced(), timing)

    def drawn(middle: float) -> list[float]:
        return (middle * rng.lognormal(0, 0.04, 30)).tolist()

    prefill, decode = (drawn(183.0), drawn(171.0)), (drawn(31.2), drawn(20.7))
    dense, sparse = (latency.side_times(prefill[side], decode[side], timing) for side in (0, 1))
    speedup = Speedup(
        prefill=dense.prefill.p50_ms / sparse.prefill.p50_ms,
        decode=dense.decode.p50_ms / sparse.decode.p50_ms,
        prefill_interval=latency.speedup_interval(*prefill),
        decode_interval=latency.speedup_interval(*decode),
    )
    return replace(timed, dense=dense, sparse=sparse, speedup=speedup)
