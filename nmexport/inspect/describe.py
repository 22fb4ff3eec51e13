"""Describes what a path holds, as data: a work directory, an artifact, an ONNX file, a report.

Rows are dictionaries whose first value names the row; so two descriptions can be compared.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, TypedDict

from nmexport.errors import ArtifactError, UserError
from nmexport.report.model import read_document
from nmexport.selection import STAGES
from nmexport.store.artifact import KEY_CHARS, MANIFEST, Manifest, read_manifest
from nmexport.store.layers import FILENAME, read_layers
from nmexport.store.work_directory import RESOLVED, WorkDirectory

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import onnx

DOMAIN = "nmexport"
KINDS = (
    "a work directory, an artifact folder (such as WORK/export/current), an .onnx file, "
    "or a report.json"
)


def describe(path: Path) -> dict[str, object]:
    """Say what a path holds; `kind` and `path` first.

    Raises:
        UserError: if it is nothing that can be described.
        ArtifactError: if it cannot be read.
    """
    if (path / MANIFEST).is_file():
        description = _artifact(path)
    elif (path / RESOLVED).is_file():
        description = _work_directory(path)
    elif path.is_file() and path.suffix == ".onnx":
        description = _onnx_model(path)
    elif path.is_file() and path.suffix == ".json":
        description = _report(path)
    elif not path.exists():
        raise UserError(f"There is no {path}.", allowed=KINDS)
    else:
        raise UserError(f"{path} is nothing that can be inspected.", allowed=KINDS)
    return {"path": str(path), **description}


class StageRow(TypedDict):
    """One stage of a work directory; None where it has not run."""

    stage: str
    key: str | None
    digest: str | None
    bytes: int | None
    seconds: float | None
    peak_memory_bytes: int | None
    share: float | None
    """Its share of the seconds that all stages took."""


def _work_directory(path: Path) -> dict[str, object]:
    work = WorkDirectory(path)
    recipe = work.recipe()
    manifests = {stage: work.current_manifest(stage) for stage in STAGES}
    description: dict[str, object] = {
        "kind": "work directory",
        "recipe": recipe.model_dump(mode="json", by_alias=True),
        "bytes": sum(manifest.bytes for manifest in manifests.values() if manifest),
        "stages": _stage_rows(manifests),
    }
    if (path / "report.json").is_file():
        description["report"] = _report(path / "report.json")["report"]
    return description


def _stage_rows(manifests: Mapping[str, Manifest | None]) -> list[StageRow]:
    """List the stages with their share of the total time."""
    # The artifacts in use now may come from several builds.
    total = sum(manifest.seconds for manifest in manifests.values() if manifest)
    return [_stage_row(stage, manifest, total) for stage, manifest in manifests.items()]


def _stage_row(stage: str, manifest: Manifest | None, total_seconds: float) -> StageRow:
    if manifest is None:
        return StageRow(
            stage=stage,
            key=None,
            digest=None,
            bytes=None,
            seconds=None,
            peak_memory_bytes=None,
            share=None,
        )
    return StageRow(
        stage=stage,
        key=manifest.key[:KEY_CHARS],
        digest=manifest.digest[:KEY_CHARS],
        bytes=manifest.bytes,
        seconds=manifest.seconds,
        peak_memory_bytes=manifest.peak_memory_bytes,
        share=round(manifest.seconds / total_seconds, 3) if total_seconds else None,
    )


def _artifact(path: Path) -> dict[str, object]:
    manifest = read_manifest(path)
    description: dict[str, object] = {
        "kind": f"{manifest.stage} artifact",
        "key": manifest.key,
        "digest": manifest.digest,
        "bytes": manifest.bytes,
        "made": {
            "started": manifest.started,
            "seconds": manifest.seconds,
            "share": manifest.share,
            "peak_memory_bytes": manifest.peak_memory_bytes,
            "command": manifest.command,
        },
        "inputs": manifest.inputs,
        "upstream": {name: record.digest for name, record in manifest.upstream.items()},
        "metrics": manifest.metrics,
        "environment": manifest.environment,
        "files": [vars(record) for record in manifest.files],
    }
    if (path / FILENAME).is_file() and manifest.stage in {"calibrate", "fold"}:
        description["layers"] = [
            {
                "name": layer.name,
                "shape": f"{layer.in_features} x {layer.out_features}",
                "pattern": str(layer.pattern),
                "phase": layer.phase,
                "criterion": layer.criterion,
                "mitigations": list(layer.mitigations),
                "grouping": layer.grouping,
                "outputs_for": layer.outputs_for,
                "relative_error": layer.relative_error,
            }
            for layer in read_layers(path).layers
        ]
    return description


def _report(path: Path) -> dict[str, object]:
    return {"kind": "report", "report": read_document(path)[0]}


# -- ONNX ---------------------------------------------------------------------------------------


def _onnx_model(path: Path) -> dict[str, object]:
    """Describe a graph; weights stay on disk."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(path, load_external_data=False)
    except (OSError, DecodeError) as error:
        raise ArtifactError(f"{path} is no ONNX file that can be read: {error}") from error
    graph = model.graph
    return {
        "kind": "ONNX model",
        "ir_version": model.ir_version,
        "producer": f"{model.producer_name} {model.producer_version}".strip(),
        "opsets": {entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
        "functions": [
            {
                "function": f"{body.domain}::{body.name}",
                "overload": body.overload,
                "nodes": len(body.node),
            }
            for body in model.functions
        ],
        "inputs": [_tensor_row(value) for value in graph.input],
        "outputs": [_tensor_row(value) for value in graph.output],
        "nodes": dict(Counter(_op_name(node) for node in graph.node).most_common()),
        "sparse_nodes": _sparse_rows(graph),
        "weights": len(graph.initializer),
        "weight_bytes": sum(_weight_bytes(weight) for weight in graph.initializer),
        "external_files": sorted(_external_files(graph)),
    }


def _op_name(node: onnx.NodeProto) -> str:
    return f"{node.domain}::{node.op_type}" if node.domain else node.op_type


def _tensor_row(value: onnx.ValueInfoProto) -> dict[str, object]:
    import onnx

    tensor = value.type.tensor_type
    shape = [dim.dim_param or dim.dim_value for dim in tensor.shape.dim]
    return {
        "name": value.name,
        "type": onnx.TensorProto.DataType.Name(tensor.elem_type).lower(),
        "shape": shape,
    }


def _sparse_rows(graph: onnx.GraphProto) -> list[dict[str, object]]:
    """Count our nodes by their attributes."""
    import onnx

    counts: Counter[tuple[str, str, str]] = Counter()
    for node in graph.node:
        if node.domain == DOMAIN:
            values = {
                attribute.name: onnx.helper.get_attribute_value(attribute)
                for attribute in node.attribute
            }
            phase = values.get("phase", b"all")
            phase = phase.decode() if isinstance(phase, bytes) else str(phase)
            counts[(node.op_type, f"{values.get('n')}:{values.get('m')}", phase)] += 1
    return [
        {"op": op, "pattern": pattern, "phase": phase, "count": count}
        for (op, pattern, phase), count in counts.most_common()
    ]


def _weight_bytes(weight: onnx.TensorProto) -> int:
    import onnx

    elements = 1
    for dim in weight.dims:
        elements *= dim
    return elements * int(onnx.helper.tensor_dtype_to_np_dtype(weight.data_type).itemsize)


def _external_files(graph: onnx.GraphProto) -> set[str]:
    return {
        entry.value
        for weight in graph.initializer
        for entry in weight.external_data
        if entry.key == "location"
    }
