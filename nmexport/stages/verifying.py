"""Verification as it runs: every figure taken, the report written."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from nmexport.calibration.windows import check_text, windows_of
from nmexport.environment import return_device_memory
from nmexport.models.loader import load_model
from nmexport.models.offload import whole_device
from nmexport.models.skeleton import model_size
from nmexport.progress import busy
from nmexport.report import engine_words, learning, pages
from nmexport.report.document import Measured, assemble, judge, weights_note
from nmexport.runtimes.opening import why_not_here
from nmexport.stages import export, fold
from nmexport.store.allocation import read_allocation
from nmexport.store.records import json_from
from nmexport.verification import (
    alone,
    audit,
    executors,
    memory,
    parity,
    sides,
    stored_dense,
    suite,
)
from nmexport.verification.subject import Subject

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedModel

    from nmexport.stages.inputs import StageInputs


def check(inputs: StageInputs) -> None:
    """Refuse text or tasks that cannot be measured on, before anything runs.

    Raises:
        CorpusError: if a file of text is missing, malformed or too short.
        EnvironmentFault: if a task's data cannot be reached.
        RecipeError: if a task is not known, or its file cannot be read.
    """
    check_text(inputs.source, inputs.recipe.evaluation)
    tasks = suite.Suite.of(inputs.recipe.evaluation)
    if tasks is not None:
        suite.check(tasks, inputs.progress)


def run(inputs: StageInputs) -> dict[str, object]:
    """Measure everything and write `report.json`, `report.md` and `report.html`.

    Raises:
        CorpusError: if the evaluation text is missing or too short.
        ArtifactError: if an upstream artifact cannot be read.
        EnvironmentFault: if the engine's native library is missing here.
    """
    recipe = inputs.recipe
    with busy(inputs.progress, "verify: read the model's parts and the text"):
        size = model_size(inputs.source)
        subject = _subject(inputs)
    built = engine_words.section(subject.engine)
    measured = _measure(inputs, subject)
    measured = replace(measured, sparsity=replace(measured.sparsity, linears=size.linears))
    report = assemble(
        recipe=recipe,
        source=inputs.source,
        parameters=size.parameters,
        target=subject.engine.runtime,
        environment=inputs.environment,
        measured=measured,
        notes=[
            *parity.concerns(measured.parity),
            *_notes(subject, why_not_here(subject.engine_folder)),
            *engine_words.words(built),
        ],
        phases=subject.phases,
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


def _subject(inputs: StageInputs) -> Subject:
    return Subject(
        recipe=inputs.recipe,
        source=inputs.source,
        folded=fold.Artifact(inputs.upstream["fold"]),
        engine_folder=inputs.upstream["engine"],
        windows=_windows(inputs),
        environment=inputs.environment,
        progress=inputs.progress,
    )


def _measure(inputs: StageInputs, subject: Subject) -> Measured:
    """Take every figure of the report."""
    accuracy, latency = sides.measure(subject)
    with busy(inputs.progress, "verify: memory, each model in a process of its own"):
        peaks = memory.measure_engine(
            subject.engine_folder / "engine.json",
            export=subject.engine.model.parent,
            prompt_tokens=inputs.recipe.latency.prefill_tokens,
            why_no_dense=alone.WHY if subject.engine.dense_model is None else None,
        )
    agreement = executors.compare(subject)
    return_device_memory()
    return Measured(
        sparsity=audit.measure(subject),
        accuracy=accuracy,
        parity=replace(agreement, dense=export.Artifact(inputs.upstream["export"]).dense_check),
        latency=latency,
        memory=peaks,
        stored_dense=stored_dense.measure(subject),
        engine=engine_words.section(subject.engine),
        allocation=read_allocation(subject.folded.path),
        calibration=learning.section(subject.folded.learning, subject.folded.layers),
        kept=subject.folded.kept,
    )


def _windows(inputs: StageInputs) -> NDArray[np.int64]:

    recipe = inputs.recipe

    def load() -> PreTrainedModel:
        device = whole_device(inputs.source, offload=recipe.calibration.offload) or "cpu"
        with busy(inputs.progress, "verify: load the model"):
            return load_model(inputs.source, dtype="float32", device=device)

    windows = windows_of(
        inputs.source, recipe, load, progress=inputs.progress, label="verify: own text"
    )
    return_device_memory()  # runtimes need what torch had
    return windows


def _notes(subject: Subject, absent: str | None) -> list[str]:
    engine = subject.engine
    mixed = weights_note(
        subject.recipe,
        subject.folded.kept,
        read_allocation(subject.folded.path),
        alone=engine.dense_model is None,
    )
    notes = [alone.NOTE] if engine.dense_model is None else []
    notes += [mixed] if mixed else []
    if absent:
        note = f"The {engine.runtime} engine was built and does not run here: {absent}"
        notes.append(f"{note} Accuracy and latency are of its ONNX file on ONNX Runtime.")
    elif engine.runtime == "onnxruntime" and engine.why_no_library:
        why = engine.why_no_library.capitalize()
        notes.append(f"{why}: the latency below is theirs, not the native op's.")
    return notes
