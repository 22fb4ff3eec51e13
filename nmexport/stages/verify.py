"""Stage `verify`: measure what was built against the dense model, and write the report.

Every figure comes from the shipped ONNX files on the engine's runtime; torch only takes part in the
parity legs that name it. A gate that does not hold does not stop the stage: the report says so.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nmexport.calibration import corpus
from nmexport.environment import device_name
from nmexport.errors import RecipeError
from nmexport.models.context import check_lengths
from nmexport.progress import busy
from nmexport.report import engine_words, learning, pages
from nmexport.report.document import Measured, assemble, judge, weights_note
from nmexport.report.model import LinearParity, LinearsParity, read_report
from nmexport.runtimes.engine import read_engine
from nmexport.runtimes.native import engine_library
from nmexport.runtimes.opening import open_session, why_not_here
from nmexport.stages import export, fold
from nmexport.stages.engine import NO_LIBRARY, resolve_target
from nmexport.store.allocation import read_allocation
from nmexport.store.layers import model_phases
from nmexport.store.records import json_from
from nmexport.verification import (
    accuracy,
    alone,
    cache_parity,
    continuation,
    latency,
    memory,
    parity,
    tasks,
)
from nmexport.verification.memory import artifact_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray

    from nmexport.recipe import EvaluationSection, LatencySection, Recipe
    from nmexport.report.model import (
        Accuracy,
        Calibration,
        Latency,
        Parity,
        Report,
        Scores,
        Sparsity,
        TaskScore,
    )
    from nmexport.runtimes.engine import Engine
    from nmexport.runtimes.session import Session
    from nmexport.stages.inputs import StageInputs
    from nmexport.store.layers import ModelPhases
    from nmexport.verification.accuracy import LateLogits
    from nmexport.verification.reference import TorchSession

UPSTREAM = ("fold", "export", "engine")

PROMPT_TOKENS = 32
# Windows whose activations are counted, and tokens of the window that layer outputs are compared
# on: the counts hardly move after the first, and outputs of all layers are many.
_AUDIT_WINDOWS = 2
_ERROR_TOKENS = 128
# What decode-only scoring holds of a batch's dense logits, and of its caches: a step's past and
# present. More sequences at a time share more of the weights that a step reads.
_LOGITS_BYTES = 832 << 20
_CACHE_BYTES = 1 << 30
# Said by content in place of by name.
_NOT_KEYS = {"corpus", "tasks", "tasks_path", "task_limit", "task_fewshot"}
_NO_INNER_VALUES = "a TensorRT engine returns nothing but logits and cache"
# What parity takes of memory, against the size of the artifact. Torch's weights and those that two
# sessions map and repack; a session without the native library, which in narrow types holds all
# weights once more, as float32.
_PARITY_MEMORY = {"float32": 4, "float16": 5, "bfloat16": 5}
_BODIES_MEMORY = {"float32": 2, "float16": 4, "bfloat16": 4}


@dataclass(frozen=True)
class Artifact:
    """A finished verification."""

    path: Path

    @property
    def report(self) -> Report:
        """`report.json`.

        Raises:
            ArtifactError: if it is missing or not a report of this schema.
        """
        return read_report(self.path / "report.json")


def key_fields(inputs: StageInputs) -> dict[str, Any]:
    """How it is measured, on what, and where.

    Raises:
        RecipeError: if a gate or task needs the dense baseline, which the recipe leaves out, or
            something is longer than the model's context: said before anything runs.
    """
    recipe, environment = inputs.recipe, inputs.environment
    _check_comparable(recipe)
    check_lengths(inputs.source, recipe, measured=True)
    return {
        "target": resolve_target(recipe.target),
        "evaluation": recipe.evaluation.model_dump(mode="json", exclude=_NOT_KEYS),
        "suite": tasks.identity(tasks.Suite.of(recipe.evaluation)),
        "corpus": corpus.corpus_identity(recipe.evaluation.corpus),
        "latency": recipe.latency.model_dump(mode="json"),
        "gates": recipe.gates.model_dump(mode="json"),
        "seed": recipe.seed,
        "device": environment.cpu,
        "cores": environment.cores,
        "packages": {name: environment.version(name) for name in ("onnxruntime", "torch")},
    }


def _check_comparable(recipe: Recipe) -> None:
    needs = [
        name.replace("_", "-")
        for name, limit in recipe.gates
        if limit is not None and name != "max_peak_rss_bytes"
    ]
    if recipe.evaluation.tasks or recipe.evaluation.tasks_path:
        needs.append("tasks")
    if needs and not recipe.model.dense_baseline:
        raise RecipeError(
            f"Without the dense baseline there is nothing to hold {', '.join(needs)} against.",
            fix="leave out --no-dense-baseline, or the gates and tasks",
        )


def check(inputs: StageInputs) -> None:
    """Refuse tasks that are not known, or whose data is out of reach, before anything runs.

    Raises:
        EnvironmentFault: if a task's data cannot be reached.
        RecipeError: if a task is not known, or its file cannot be read.
    """
    suite = tasks.Suite.of(inputs.recipe.evaluation)
    if suite is not None:
        tasks.check(suite, inputs.progress)


def run(inputs: StageInputs) -> dict[str, Any]:
    """Measure everything and write `report.json`, `report.md` and `report.html`.

    Raises:
        CorpusError: if the evaluation text is missing or too short.
        ArtifactError: if an upstream artifact cannot be read.
        EnvironmentFault: if the engine's native library is missing here.
    """
    from nmexport.verification.reference import model_size

    recipe = inputs.recipe
    engine = read_engine(inputs.upstream["engine"])
    windows = _windows(inputs)
    prompts = prompts_from(windows, recipe.evaluation.prompts)
    size = model_size(inputs.source)
    built = engine_words.section(engine)
    compared = engine.dense_model is not None
    measure = _dense_against_sparse if compared else _sparse_alone
    accuracy, latency = measure(inputs, windows, prompts)
    with busy(inputs.progress, "verify: memory, each model in a process of its own"):
        measured = memory.measure_engine(
            inputs.upstream["engine"] / "engine.json",
            export=engine.model.parent,
            prompt_tokens=recipe.latency.prefill_tokens,
            why_no_dense=None if compared else alone.WHY,
        )
    agreement = replace(
        _parity(inputs, engine, prompts),
        dense=export.Artifact(inputs.upstream["export"]).dense_check,
    )
    report = assemble(
        recipe=recipe,
        source=inputs.source,
        parameters=size.parameters,
        target=engine.runtime,
        environment=inputs.environment,
        measured=Measured(
            sparsity=replace(_audit(inputs, engine, windows), linears=size.linears),
            accuracy=accuracy,
            parity=agreement,
            latency=latency,
            memory=measured,
            engine=built,
            allocation=read_allocation(inputs.upstream["fold"]),
            calibration=_calibration(inputs),
        ),
        notes=[
            *parity.concerns(agreement),
            *_notes(engine, why_not_here(inputs.upstream["engine"]), recipe),
            *engine_words.words(built),
        ],
        phases=_phases(inputs),
    )
    report = judge(report, recipe)
    with busy(inputs.progress, "verify: write the report"):
        pages.write(report, inputs.output)
    return {
        "verdict": report.verdict,
        "perplexity_ratio": report.accuracy.perplexity_ratio,
        "kl_mean": report.accuracy.kl_mean,
        "speedup": json_from(report.latency.speedup),
        "achieved_sparsity": report.sparsity.achieved,
    }


def prompts_from(windows: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Up to `count` prompts of equal length: the start of each window, then what follows it.

    Args:
        windows: `[W, L]` token ids.
        count: Prompts wanted.

    Returns:
        `[count or fewer, 32 or L]`.
    """
    import numpy as np

    length = min(PROMPT_TOKENS, windows.shape[1])
    pieces = [
        windows[:, start : start + length]
        for start in range(0, windows.shape[1] - length + 1, length)
    ]
    return np.concatenate(pieces)[:count]


def latency_tokens(
    windows: NDArray[np.int64], section: LatencySection
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Evaluation text to prefill, `[1, S]`, and to decode after, `[1, C]`; repeated if short."""
    import numpy as np

    text = np.resize(windows.reshape(-1), section.prefill_tokens + section.decode_context)
    prompt, context = np.split(text, [section.prefill_tokens])
    return prompt[None, :], context[None, :]


def _windows(inputs: StageInputs) -> NDArray[np.int64]:
    from nmexport.models.loader import load_model, load_tokenizer
    from nmexport.models.text_files import known_tokens

    recipe = inputs.recipe
    tokenizer = load_tokenizer(inputs.source)

    def self_text(samples: int, length: int, seed: int) -> NDArray[np.int64]:
        from nmexport.calibration.self_text import self_text

        with busy(inputs.progress, "verify: load the model"):
            model = load_model(inputs.source, dtype="float32")
        generate = self_text(model, tokenizer, progress=inputs.progress, label="verify: own text")
        return generate(samples, length, seed)

    return corpus.evaluation_windows(
        recipe.evaluation,
        tokenizer,
        self_text,
        seed=recipe.seed,
        vocabulary=known_tokens(inputs.source),
    )


def _dense_against_sparse(
    inputs: StageInputs, windows: NDArray[np.int64], prompts: NDArray[np.int64]
) -> tuple[Accuracy, Latency]:
    """Measure both models."""
    recipe, progress = inputs.recipe, inputs.progress
    evaluation, timing = recipe.evaluation, recipe.latency
    prompt, context = latency_tokens(windows, timing)
    phases = _phases(inputs)
    with contextlib.ExitStack() as stack:
        with busy(progress, "verify: open the models"):
            engine = inputs.upstream["engine"]
            dense = stack.enter_context(open_session(engine, dense=True, elsewhere=True))
            sparse = stack.enter_context(open_session(engine, elsewhere=True))
        tracked = progress.track(windows, label="verify: perplexity", total=len(windows))
        wanted = _scores_decode_only(inputs)
        late = accuracy.LateLogits(_LOGITS_BYTES if wanted else 0)
        scores = accuracy.compare(dense, sparse, tracked, phases=phases, late=late)
        steps = range(evaluation.generate_tokens)
        continued = continuation.compare(
            dense,
            sparse,
            prompts,
            progress.track(steps, label="verify: continuation", total=len(steps)),
        )
        decoded = _decode_only(inputs, dense, sparse, windows, late) if wanted else None
        task_scores, tasks_protocol = _tasks(inputs, dense, sparse)
        times = latency.compare(
            dense,
            sparse,
            prompt=prompt,
            context=context,
            runs=timing.runs,
            warmup=timing.warmup,
            device=device_name(inputs.environment, on_gpu=sparse.on_gpu),
            progress=progress,
        )
    scores = replace(
        scores,
        dataset=_dataset(evaluation),
        continuation=continued,
        decode_only=decoded,
        tasks=task_scores,
        tasks_protocol=tasks_protocol,
        protocol=f"{corpus.protocol(evaluation)}. {accuracy.protocol(phases)}",
    )
    return scores, times


def _sparse_alone(
    inputs: StageInputs, windows: NDArray[np.int64], prompts: NDArray[np.int64]
) -> tuple[Accuracy, Latency]:
    """Measure the sparse model where there is no dense baseline."""
    recipe, progress = inputs.recipe, inputs.progress
    evaluation, timing = recipe.evaluation, recipe.latency
    prompt, context = latency_tokens(windows, timing)
    phases = _phases(inputs)
    with open_session(inputs.upstream["engine"], elsewhere=True) as sparse:
        tracked = progress.track(windows, label="verify: perplexity", total=len(windows))
        scores = alone.score(sparse, tracked, phases=phases)
        times = alone.time(
            sparse,
            prompt=prompt,
            context=context,
            runs=timing.runs,
            warmup=timing.warmup,
            device=device_name(inputs.environment, on_gpu=sparse.on_gpu),
            progress=progress,
        )
    scores = replace(
        scores,
        dataset=_dataset(evaluation),
        continuation=alone.no_continuation(prompts),
        protocol=f"{corpus.protocol(evaluation)}. {accuracy.protocol(phases)}",
    )
    return scores, times


def _phases(inputs: StageInputs) -> ModelPhases:
    """When the model is sparse: the recipe's phases, unless its linears got phases of their own."""
    return model_phases(fold.Artifact(inputs.upstream["fold"]).layers)


def _scores_decode_only(inputs: StageInputs) -> bool:
    """Tell whether decode-only sparsity was asked for and says something new."""
    return inputs.recipe.evaluation.decode_only and _phases(inputs) == "all"


def _decode_only(
    inputs: StageInputs,
    dense: Session,
    sparse: Session,
    windows: NDArray[np.int64],
    late: LateLogits,
) -> Scores:
    """Score sparsity in decode only."""
    batch = _decode_batch_size(sparse, windows)
    batches = [windows[start : start + batch] for start in range(0, len(windows), batch)]
    return accuracy.decode_only(
        dense,
        sparse,
        batches,
        late=late,
        progress=inputs.progress,
        label="verify: decode-only sparsity",
    )


def _decode_batch_size(sparse: Session, windows: NDArray[np.int64]) -> int:
    """Windows that decode-only scoring decodes side by side, of `[W, L]`."""
    count, length = windows.shape
    scored = length - accuracy.prompt_length(windows[0])
    most: list[int] = [count, _LOGITS_BYTES // (4 * sparse.vocabulary_size * scored)]
    if sparse.exposes_cache:
        most.append(_CACHE_BYTES // (2 * length * sparse.cache_bytes_per_token))
    if sparse.limits.batch is not None:
        most.append(sparse.limits.batch)
    return max(1, min(most))


def _tasks(
    inputs: StageInputs, dense: Session, sparse: Session
) -> tuple[Mapping[str, TaskScore], str | None]:
    """Score the tasks, and say how they were scored."""
    from nmexport.generation.tokenizer import Tokenizer

    suite = tasks.Suite.of(inputs.recipe.evaluation)
    if suite is None:
        return {}, None
    folder = inputs.upstream["export"]
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    phases = _phases(inputs)
    text = tasks.text_side(Tokenizer(folder), config)
    scored = tasks.compare(
        dense,
        sparse,
        text,
        suite,
        phases=phases,
        seed=inputs.recipe.seed,
        progress=inputs.progress,
    )
    return scored, tasks.protocol(phases, text, dense, sparse)


def _dataset(section: EvaluationSection) -> str:
    path = Path(section.corpus)
    return path.name if path.suffix in {".txt", ".jsonl"} else section.corpus


def _audit(inputs: StageInputs, engine: Engine, windows: NDArray[np.int64]) -> Sparsity:
    from nmexport.verification import audit

    counted = windows[:_AUDIT_WINDOWS]
    return audit.audit(
        engine.model,
        engine.dense_model,
        fold.Artifact(inputs.upstream["fold"]).layers,
        library=engine_library(engine),
        threads=engine.threads,
        windows=inputs.progress.track(counted, label="verify: audit", total=len(counted)),
        error_window=windows[0, :_ERROR_TOKENS],
    )


def _parity(inputs: StageInputs, engine: Engine, prompts: NDArray[np.int64]) -> Parity:
    """Compare whole models in lock step, and each linear with the oracle."""
    from nmexport.runtimes.onnxruntime_session import OrtSession
    from nmexport.verification.reference import open_folded

    folded = fold.Artifact(inputs.upstream["fold"])
    dtype = inputs.recipe.model.dtype
    why = _too_large(engine, dtype)
    with contextlib.ExitStack() as stack:
        executors: dict[str, Session] = {}
        torch_session = None
        if parity.TORCH not in why:
            with busy(inputs.progress, "verify: parity: open the torch model"):
                torch_session = stack.enter_context(
                    open_folded(inputs.source, inputs.recipe.model, folded)
                )
            executors[parity.TORCH] = torch_session.with_twins()
        if parity.ONNX not in why:
            executors[parity.ONNX] = stack.enter_context(
                OrtSession(
                    engine.model,
                    threads=engine.threads,
                    config=engine.session_config,
                    bfloat16=engine.needs_rewrite("cpu", dense=False),
                )
            )
        absent = why_not_here(inputs.upstream["engine"]) or _no_library(engine)
        if absent:
            why[parity.ENGINE] = absent
        else:
            executors[parity.ENGINE] = stack.enter_context(open_session(inputs.upstream["engine"]))
        steps = range(inputs.recipe.evaluation.generate_tokens)
        tracked = inputs.progress.track(steps, label="verify: parity", total=len(steps))
        report = parity.compare(
            executors, prompts, tracked, why_absent=why, twins=parity.TORCH in executors
        )
        with busy(inputs.progress, "verify: parity: caches"):
            caches = cache_parity.compare_where_possible(
                executors, (parity.ONNX, parity.ENGINE), why, dtype=dtype
            )
        with busy(inputs.progress, "verify: parity: each linear against the oracle"):
            linears = _linear_parity(engine, folded, torch_session, prompts[0], why)
        return replace(report, caches=caches, linears=linears)


def _linear_parity(
    engine: Engine,
    folded: fold.Artifact,
    torch_session: TorchSession | None,
    prompt: NDArray[np.int64],
    why: Mapping[str, str],
) -> LinearsParity:
    """Hold each executor's linears against the oracle, on one prompt."""
    from nmexport.verification import op_parity
    from nmexport.verification.audit import open_instrumented
    from nmexport.verification.reference import array_from

    layers = folded.linears
    graph, outputs = op_parity.instrument(engine.model)
    libraries: dict[str, Path | None] = {} if parity.ONNX in why else {parity.ONNX: None}
    if engine.runtime != "onnxruntime":
        why = {**why, parity.ENGINE: why.get(parity.ENGINE, _NO_INNER_VALUES)}
    elif parity.ENGINE not in why:
        libraries[parity.ENGINE] = engine_library(engine)

    def tensors_of(name: str) -> dict[str, NDArray[Any]]:
        return {kind: array_from(value) for kind, value in folded.tensors(name).items()}

    figures = {name: LinearParity(why=reason) for name, reason in why.items()}
    for name, library in libraries.items():
        executor = torch_session.linear if torch_session and name == parity.ONNX else None
        with open_instrumented(
            graph, engine.model.parent, library=library, threads=engine.threads
        ) as session:
            figures[name], other = op_parity.check(
                session, layers, outputs, tensors_of, prompt, executor=executor
            )
        if other is not None:
            figures[parity.TORCH] = other
    unknown = LinearParity()
    return LinearsParity(
        torch=figures.get(parity.TORCH, unknown),
        onnx=figures.get(parity.ONNX, unknown),
        engine=figures.get(parity.ENGINE, unknown),
        protocol=op_parity.PROTOCOL,
    )


def _too_large(engine: Engine, dtype: str) -> dict[str, str]:
    """Why executors do not fit into memory, by name: torch before the function bodies alone."""
    import psutil

    size, free = artifact_bytes(engine.model.parent), psutil.virtual_memory().available
    return {
        name: f"{what} would take about {copies[dtype] * size / 1e9:.0f} GB of memory, and "
        f"{free / 1e9:.0f} GB are free"
        for name, what, copies in (
            (parity.TORCH, "three copies of the model", _PARITY_MEMORY),
            (parity.ONNX, "the model without its native op", _BODIES_MEMORY),
        )
        if copies[dtype] * size > free
    }


def _calibration(inputs: StageInputs) -> Calibration:
    """The report's `calibration`."""
    folded = fold.Artifact(inputs.upstream["fold"])
    return learning.section(folded.learning, folded.layers)


def _no_library(engine: Engine) -> str | None:
    """Why ONNX Runtime has no engine of its own, where it has none."""
    needs_one = engine.runtime == "onnxruntime" and engine.library is None
    return NO_LIBRARY if needs_one else None


def _notes(engine: Engine, absent: str | None, recipe: Recipe) -> list[str]:
    mixed = weights_note(recipe) if engine.dense_model is not None else None
    notes = [alone.NOTE] if engine.dense_model is None else []
    notes += [mixed] if mixed else []
    if absent:
        note = f"The {engine.runtime} engine was built and does not run here: {absent}"
        notes.append(f"{note} Accuracy and latency are of its ONNX file on ONNX Runtime.")
    elif _no_library(engine) is not None:
        notes.append(
            f"{NO_LIBRARY.capitalize()}: the latency below is theirs, not the native op's."
        )
    return notes
