"""Six small stages in place of the real ones: they read what is upstream and write two files."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nmexport.environment import Environment
from nmexport.models.source import ModelSource
from nmexport.pipeline import Pipeline
from nmexport.progress import Silent
from nmexport.recipe import Recipe, resolve
from nmexport.store.work_directory import WorkDirectory

if TYPE_CHECKING:
    from pathlib import Path

    from nmexport.stages.inputs import StageInputs

ORDER = ("calibrate", "fold", "export", "engine", "verify", "package")
_READS = {
    "calibrate": (),
    "fold": ("calibrate",),
    "export": ("fold",),
    "engine": ("export",),
    "verify": ("fold", "export", "engine"),
    "package": ("export", "engine", "verify"),
}


@dataclass
class FakeStage:
    name: str
    log: list[str]
    salt: str = ""
    """Changes what is written and nothing of the key: a stage that is not deterministic."""
    pause: float = 0.0
    broken: BaseException | None = None
    report: dict[str, Any] = field(
        default_factory=lambda: {"schema": 1, "verdict": "none", "gates": []}
    )
    UPSTREAM: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.UPSTREAM = _READS[self.name]

    def key_fields(self, inputs: StageInputs) -> dict[str, Any]:
        fields: dict[str, Any] = {"model": inputs.source.digest}
        if self.name == "fold":
            fields["sparsity"] = {"pattern": str(inputs.recipe.sparsity.pattern)}
        if self.name == "verify":
            fields["windows"] = inputs.recipe.evaluation.windows
        return fields

    def run(self, inputs: StageInputs) -> dict[str, Any]:
        self.log.append(self.name)
        text = f"{self.name} {self.key_fields(inputs)} {self.salt}\n"
        for name in self.UPSTREAM:
            text += (inputs.upstream[name] / "data.txt").read_text()
        (inputs.output / "deep").mkdir()
        (inputs.output / "deep" / "part.bin").write_bytes(hashlib.sha256(text.encode()).digest())
        time.sleep(self.pause)
        if self.broken is not None:
            raise self.broken
        (inputs.output / "data.txt").write_text(text)
        if self.name == "verify":
            for end, contents in (
                ("json", json.dumps(self.report)),
                ("md", "# Report\n"),
                ("html", "<p>"),
            ):
                (inputs.output / f"report.{end}").write_text(contents)
        return {"lines": text.count("\n"), "not_a_number": float("nan")}


def fake_stages(log: list[str] | None = None, **attributes: Any) -> dict[str, FakeStage]:
    return {name: FakeStage(name, [] if log is None else log, **attributes) for name in ORDER}


ENVIRONMENT = Environment(
    nmexport="0", python="3", system="test", cpu="test", isa=(), cores=1, memory_bytes=1
)


def fake_pipeline(
    work: Path,
    stages: dict[str, FakeStage] | None = None,
    *,
    model: str = "some/model",
    digest: str = "d0",
    recipe: Recipe | None = None,
    **overrides: Any,
) -> Pipeline:
    dotted = {name.replace("__", "."): value for name, value in overrides.items()}
    return Pipeline(
        recipe=recipe or resolve(model, dotted),
        source=ModelSource(id=model, revision=None, folder=work, gguf_file=None, digest=digest),
        environment=ENVIRONMENT,
        work=WorkDirectory(work),
        progress=Silent(),
        stages=stages if stages is not None else fake_stages(),
    )
