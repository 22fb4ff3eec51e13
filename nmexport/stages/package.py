"""Stage `package`: say how to run what was built.

Serving is not built yet: there is no model repository and no launch script here, and nothing that
pretends to be one. What is written runs today: a README with the lines that open the model in ONNX
Runtime, and a list of the files that make it up.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nmexport.artifact import read_manifest
from nmexport.errors import ArtifactError

if TYPE_CHECKING:
    from pathlib import Path

    from nmexport.artifact import FileRecord
    from nmexport.runtimes.onnxruntime import Engine
    from nmexport.stages.inputs import StageInputs

UPSTREAM = ("export", "engine")
SCHEMA = 1
FILES = "files.json"
README = "README.md"
NOT_BUILT = (
    "Serving is not built yet by this version of nmexport: there is no model repository here."
)


@dataclass(frozen=True)
class Artifact:
    """A finished package."""

    path: Path

    @property
    def files(self) -> list[dict[str, Any]]:
        """The files that make up the model: `path` relative to the export, `bytes`, `sha256`.

        Raises:
            ArtifactError: if the list is missing or of another schema.
        """
        path = self.path / FILES
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            schema = document["schema"]
            files: list[dict[str, Any]] = document["files"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(
                f"{path} cannot be read: {error!r}", fix="run `nmexport package --force`"
            ) from error
        if schema != SCHEMA:
            raise ArtifactError(f"{path} has schema {schema}.", allowed=f"schema {SCHEMA}")
        return files


def key_fields(inputs: StageInputs) -> dict[str, Any]:
    """What the text is made of, besides upstream."""
    return {
        "schema": SCHEMA,
        "model": inputs.source.id,
        "pattern": str(inputs.recipe.sparsity.pattern),
    }


def run(inputs: StageInputs) -> dict[str, Any]:
    """Write `README.md` and `files.json`.

    Raises:
        ArtifactError: if the engine cannot be read.
    """
    from nmexport.runtimes.onnxruntime import read_engine

    export = inputs.upstream["export"].resolve()
    engine = read_engine(inputs.upstream["engine"])
    records = shipped_files(export)
    document = {"schema": SCHEMA, "serving": NOT_BUILT, "files": [vars(one) for one in records]}
    (inputs.output / FILES).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    where = os.path.relpath(export, inputs.output.resolve()).replace(os.sep, "/")
    text = readme(
        model=inputs.source.id,
        pattern=str(inputs.recipe.sparsity.pattern),
        export=where,
        engine=engine,
        records=records,
    )
    (inputs.output / README).write_text(text, encoding="utf-8")
    inputs.progress.note(f"package: {NOT_BUILT}")
    return {"serving": NOT_BUILT, "files": len(records), "bytes": sum(one.bytes for one in records)}


def shipped_files(export: Path) -> list[FileRecord]:
    """What a model is shipped as: everything exported but the dense baseline.

    Raises:
        ArtifactError: if the export is not finished.
    """
    return [one for one in read_manifest(export).files if not one.path.startswith("dense/")]


def readme(
    *, model: str, pattern: str, export: str, engine: Engine, records: list[FileRecord]
) -> str:
    """The text that goes with the package."""
    files = "\n".join(f"| {one.path} | {one.bytes:,} | `{one.sha256[:12]}` |" for one in records)
    if engine.library_digest is None:
        library = (
            "No native op library was there when this was built. The model runs without one, by "
            "the function bodies it carries, and slower."
        )
        register = ""
    else:
        library = (
            f"The native op library `{engine.library_name}` (sha256 `{engine.library_digest[:12]}`)"
            " makes the sparse linears fast. Without it the model gives the same results by the "
            "function bodies it carries, and slower."
        )
        register = (
            "\nfrom nmexport.runtimes.native import require_library\n"
            "options.register_custom_ops_library(str(require_library()))"
        )
    return f"""# {model} at {pattern}

{NOT_BUILT} The model runs in ONNX Runtime, as below.

## Text, from the command line

    nmexport generate --work DIR "The capital of France is"

## In your own program

```python
import onnxruntime

options = onnxruntime.SessionOptions(){register}
session = onnxruntime.InferenceSession("{export}/model.onnx", options)
```

Inputs are `input_ids`, `attention_mask`, `position_ids` and `past_key_values.{{i}}.key|value`;
outputs are `logits` and `present.{{i}}.key|value`. The first run takes a past of length 0, each
later one the `present` of the run before. The tokenizer lies beside the model. Paths are relative
to this file.

{library}

## Files

In `{export}`:

| file | bytes | sha256 |
|---|---:|---|
{files}
"""
