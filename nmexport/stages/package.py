"""Stage `package`: a Triton model repository that starts on the first try, wherever it is copied.

A model whose report says `fail` is not packaged unless the recipe asks for it. What is packaged has
run once from the package itself: the logits that it must give at every start come from there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nmexport.errors import ArtifactError, GateFailed
from nmexport.models.source import licence_files
from nmexport.recipe import short_name
from nmexport.runtimes.engine import PLAN, read_engine
from nmexport.runtimes.native import engine_library
from nmexport.runtimes.tensorrt.requirements import engine_plugin
from nmexport.serving import repository
from nmexport.serving.bundle import FILENAME, read_bundle
from nmexport.serving.repository import TextModel
from nmexport.serving.triton_config import signature_of_engine
from nmexport.stages import verify
from nmexport.store.artifact import read_manifest

if TYPE_CHECKING:
    from pathlib import Path

    from nmexport.report.model import Report
    from nmexport.runtimes.engine import TensorRTEngine
    from nmexport.serving.bundle import Bundle
    from nmexport.stages.inputs import StageInputs

UPSTREAM = ("export", "engine", "verify")
SCHEMA = 6
_AUTO = "auto"


@dataclass(frozen=True)
class Artifact:
    """A finished package."""

    path: Path

    @property
    def repository(self) -> Path:
        """The folder that Triton is given."""
        return self.path / "model_repository"

    @property
    def bundle(self) -> Bundle:
        """The text model's own record.

        Raises:
            ArtifactError: if there is none that can be read.
        """
        bundles = sorted(self.repository.glob(f"*/1/{FILENAME}"))
        if not bundles:
            raise ArtifactError(
                f"{self.path} holds no text model.", fix="run `nmexport package --force`"
            )
        return read_bundle(bundles[0].parent)


def key_fields(inputs: StageInputs) -> dict[str, object]:
    """Return what the package is made of, other than upstream artifacts."""
    return {
        "schema": SCHEMA,
        "model": inputs.source.id,
        "pattern": str(inputs.recipe.sparsity.pattern),
        "serving": inputs.recipe.serving.model_dump(mode="json"),
    }


def run(inputs: StageInputs) -> dict[str, object]:
    """Write `model_repository/`, `launch.sh`, `README.md`, notices, licences and `SHA256SUMS`.

    Raises:
        GateFailed: if the report's verdict is `fail` and the recipe does not allow that.
        ArtifactError: if an upstream artifact cannot be read, or cannot be served.
        EnvironmentFault: if this machine lacks what it needs.
    """
    report = verify.Artifact(inputs.upstream["verify"]).report
    refuse_failed(report, allowed=inputs.recipe.serving.allow_failed)
    source = text_model(inputs, verdict=report.verdict)
    inputs.progress.note(f"package: {source.name}, {len(source.files)} files of the export")
    bundle = repository.write_text_model(inputs.output, source)
    engine = f"{source.name}_engine"
    plugins, why_no_engine = _write_engine(inputs, engine)
    if why_no_engine is not None:
        inputs.progress.note(f"package: no {engine}: {why_no_engine}")
    repository.write_words(
        inputs.output,
        source=source,
        engine=engine if why_no_engine is None else None,
        plugins=plugins,
    )
    return {
        "why_no_engine": why_no_engine,
        "name": source.name,
        "verdict": source.verdict,
        "library": source.library.name if source.library else None,
        "bundle_bytes": sum(path.stat().st_size for path in bundle.iterdir() if path.is_file()),
    }


def _write_engine(inputs: StageInputs, name: str) -> tuple[list[str], str | None]:
    """Write the raw engine next to the text model, where Triton can run it.

    Returns:
        Plugin libraries that a server must load, relative to the package; and why there is no raw
        engine, where there is none.
    """
    folder = inputs.upstream["engine"]
    engine = read_engine(folder).tensorrt
    if engine is None:
        return [], "the target is not TensorRT"
    why = why_not_raw(engine)
    if why is not None:
        return [], why
    repository.write_engine_model(
        inputs.output,
        name=name,
        plan=folder / PLAN,
        signature=signature_of_engine(engine),
        max_batch_size=engine.max_batch,
        profiles=len(engine.profiles),
    )
    plugin = engine_plugin(engine)
    return ([] if plugin is None else [repository.write_plugin(inputs.output, plugin)]), None


def why_not_raw(engine: TensorRTEngine) -> str | None:
    """Why Triton's TensorRT backend cannot run an engine; None where it can."""
    if engine.target != "tensorrt":
        return "Triton's TensorRT backend runs plans of TensorRT, not of TensorRT-RTX"
    if engine.in_place_cache:
        return (
            "the engine updates its cache in place: past and present must be one buffer, and "
            "Triton gives each input and output a buffer of its own (build it with "
            "--in-place-cache off)"
        )
    return None


def refuse_failed(report: Report, *, allowed: bool) -> None:
    """Raise where the verification failed and that is not allowed.

    Raises:
        GateFailed: naming the gates.
    """
    if report.verdict != "fail" or allowed:
        return
    raise GateFailed(
        "not packaged: the verdict of the verification is fail "
        f"({', '.join(report.failed_gates)}).\n"
        "Next: build a better model, change the gates, or package it with --allow-failed"
    )


def text_model(inputs: StageInputs, *, verdict: str) -> TextModel:
    """Collect what the text model is made from.

    Raises:
        ArtifactError: if the export or the engine cannot be read.
        EnvironmentFault: if the native library of the engine is missing.
    """
    serving = inputs.recipe.serving
    engine = read_engine(inputs.upstream["engine"])
    records = read_manifest(inputs.upstream["export"]).files
    return TextModel(
        name=serving.name or short_name(inputs.source.id),
        model=inputs.source.id,
        pattern=str(inputs.recipe.sparsity.pattern),
        verdict=verdict,
        export=inputs.upstream["export"],
        files=tuple(record.path for record in records if not record.path.startswith("dense/")),
        engine=engine,
        library=engine_library(engine),
        settings={
            "slots": str(serving.slots or _AUTO),
            "queue": str(serving.queue),
            "prefill_chunk": str(serving.prefill_chunk or _AUTO),
            "slowdown_percent": str(serving.slowdown_percent),
            "default_max_tokens": str(serving.max_tokens),
            "context_tokens": _AUTO,
            "cache_bytes": _AUTO,
        },
        licences=licence_files(inputs.source.folder),
    )
