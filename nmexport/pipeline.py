"""The order of the stages, what is cached and why not, and running what is missing.

A stage's key is the sha256 of its own inputs and the *keys* of its upstream stages, so every key
of a build is known before anything runs. A manifest also records the digests of the upstream
files it was made from: an artifact whose upstream was since rebuilt with other bytes is stale,
though its key is the same.
"""

from __future__ import annotations

import importlib
import logging
import shlex
import time
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Protocol, cast

from nmexport import __version__
from nmexport.environment import return_device_memory, return_freed_memory
from nmexport.errors import ArtifactError, GateFailed
from nmexport.progress import peak_rss_bytes, reset_peak_rss
from nmexport.recipe import dump
from nmexport.report import rivals_file
from nmexport.selection import STAGES, StageRefused, Step
from nmexport.stages.inputs import StageInputs
from nmexport.store.artifact import (
    RECIPE,
    SCHEMA,
    Manifest,
    UpstreamRecord,
    changes,
    damage,
    digest_of,
    plain,
    record_files,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from nmexport.environment import Environment
    from nmexport.models.source import ModelSource
    from nmexport.progress import Progress
    from nmexport.recipe import Recipe
    from nmexport.selection import Selection
    from nmexport.store.work_directory import WorkDirectory

READ_WEIGHTS = frozenset({"calibrate", "fold", "export", "verify"})
"""Stages that read the model's weights."""


class Stage(Protocol):
    """A stage module; see `nmexport.stages`.

    It may have a function `check(inputs)`, which is called before the first stage runs wherever
    this one is going to: what it can refuse then is not refused after hours.
    """

    @property
    def UPSTREAM(self) -> Sequence[str]:  # noqa: N802  a constant of the module
        """Stages whose artifacts it reads."""
        ...

    def key_fields(self, inputs: StageInputs) -> dict[str, object]:
        """Return what can change the result, upstream apart; called before upstream ran."""
        ...

    def run(self, inputs: StageInputs) -> dict[str, object]:
        """Write the artifact, return its metrics."""
        ...


def load_stages() -> Mapping[str, Stage]:
    """Import the stage modules."""
    return {name: cast("Stage", importlib.import_module(path)) for name, path in STAGES.items()}


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """A recipe, the model it is about, and the work directory it is built in."""

    recipe: Recipe
    source: ModelSource
    environment: Environment
    work: WorkDirectory
    progress: Progress
    command: str = "nmexport build"
    """The user's own line, shown to whoever finds the directory locked."""
    stages: Mapping[str, Stage] = field(default_factory=load_stages)
    _known_fields: dict[str, dict[str, object]] = field(
        default_factory=dict, init=False, repr=False
    )
    """Each stage's inputs, asked for once: a file changed during a run must not split it."""

    def plan(self, selection: Selection) -> list[Step]:
        """Return what `run` would do now; writes nothing.

        Raises:
            ArtifactError: if a stage before the first selected one is not complete.
            WorkDirectoryError: if the directory was built from another model.
        """
        self.work.refuse_other_model(self.recipe)
        keys = self.keys(selection.last)
        self._require_earlier(selection, keys)
        steps: list[Step] = []
        running: list[str] = []
        for stage in selection.stages:
            step = self._assess(stage, keys, selection, full=selection.check)
            waits = [name for name in self.stages[stage].UPSTREAM if name in running]
            if waits and step.action == "cached":
                step = Step(
                    stage=stage,
                    key=step.key,
                    action="depends",
                    reason=f"runs only if {waits[0]} writes other files than before",
                    bytes=step.bytes,
                )
            if step.action != "cached":
                running.append(stage)
            steps.append(step)
        return steps

    def run(self, selection: Selection) -> list[Step]:
        """Build what is missing, in order, and put it in use once all of it is finished.

        A run that fails changes neither the recipe, nor the report, nor the artifacts in use.
        Stages that it finished are kept, and the next run of the same recipe goes on from them.

        Raises:
            UserError: whatever a stage says the user or the machine got wrong.
            WorkDirectoryError: if the directory is held, full, unwritable or another model's.
            StageRefused: if a gate keeps a stage from running. What ran before it is in use: a
                failed gate is an outcome, and its report can be read.
        """
        with self.work.lock(self.command):
            plan = self.plan(selection)
            self.work.claim(self.command)
            keys = self.keys(selection.last)
            read = {
                name
                for step in plan
                if step.action != "cached"
                for name in self.stages[step.stage].UPSTREAM
            }
            self._check_earlier(selection, keys, read)
            self.check(plan)
            steps: list[Step] = []
            for stage in selection.stages:
                full = selection.check or stage in read
                try:
                    steps.append(self._do(stage, keys, selection, full=full))
                except GateFailed as refusal:
                    self._put_in_use(steps, keys)
                    refused = Step(
                        stage=stage, key=keys[stage], action="refused", reason=str(refusal)
                    )
                    raise StageRefused(str(refusal), [*steps, refused]) from refusal
            self._put_in_use(steps, keys)
            return steps

    def check(self, plan: Sequence[Step]) -> None:
        """Let every stage that is going to run refuse what it cannot do; reads no weight.

        Args:
            plan: What `plan` returned.

        Raises:
            UserError: whatever a stage says the user or the machine got wrong.
        """
        for step in plan:
            check = getattr(self.stages[step.stage], "check", None)
            if check is not None and step.action != "cached":
                check(self._inputs(self.work.root / step.stage, {}))

    def keys(self, last: str) -> dict[str, str]:
        """Compute the key of every stage up to the last."""
        keys: dict[str, str] = {}
        for stage in list(STAGES)[: list(STAGES).index(last) + 1]:
            upstream = {name: keys[name] for name in self.stages[stage].UPSTREAM}
            keys[stage] = digest_of(
                {
                    "schema": SCHEMA,
                    "stage": stage,
                    "inputs": self._fields(stage),
                    "upstream": upstream,
                }
            )
        return keys

    # -- one stage -------------------------------------------------------------------------------

    def _do(self, stage: str, keys: Mapping[str, str], selection: Selection, *, full: bool) -> Step:
        """Run the stage unless its artifact is there and whole."""
        step = self._assess(stage, keys, selection, full=full)
        if step.action == "cached":
            logging.getLogger(__name__).info("%s: %s", stage, step.reason)
        else:
            self.progress.note(f"{stage}: {step.reason}")
            step = self._build(stage, keys, step.reason)
        return step

    def _put_in_use(self, steps: Sequence[Step], keys: Mapping[str, str]) -> None:
        """Put what ran in use, with its recipe and its report."""
        self.work.note_shares(keys)
        links = {step.stage: step.key for step in steps}
        report = self.work.folder("verify", links["verify"]) if "verify" in links else None
        self.work.put_in_use(self.recipe, links, report=report)
        if report is not None:
            rivals_file.show(self.work)
        if report is None and not self._is_consistent("verify"):
            self.work.withdraw_reports()

    def _is_consistent(self, stage: str) -> bool:
        """Tell whether the artifact in use was made from the upstream artifacts in use."""
        manifest = self.work.current_manifest(stage)
        if manifest is None:
            return False
        for name, record in manifest.upstream.items():
            upstream = self.work.current_manifest(name)
            if upstream is None or (upstream.key, upstream.digest) != (record.key, record.digest):
                return False
        return all(self._is_consistent(name) for name in manifest.upstream)

    def _build(self, stage: str, keys: Mapping[str, str], reason: str) -> Step:
        module, key = self.stages[stage], keys[stage]
        upstream = {name: self.work.folder(name, keys[name]) for name in module.UPSTREAM}
        started, began = datetime.now(UTC), time.monotonic()
        reset_peak_rss()
        with self.work.partial(stage, key) as output:
            resume = self.work.resume_path(stage, key)
            inputs = self._inputs(output, upstream, resume)
            metrics = module.run(replace(inputs, source=self._source_for(stage)))
            return_device_memory()
            return_freed_memory()
            (output / RECIPE).write_text(dump(self.recipe), encoding="utf-8")
            manifest = Manifest(
                stage=stage,
                key=key,
                inputs=self._fields(stage),
                upstream=self._upstream_records(stage, keys),
                files=record_files(output),
                environment=self.environment.as_dict(),
                metrics=plain(metrics),
                started=started.isoformat(timespec="seconds"),
                seconds=round(time.monotonic() - began, 3),
                peak_memory_bytes=peak_rss_bytes(),
                command=self._rebuild_line(stage, key),
            )
            self.work.commit(output, manifest)
        self.work.forget_resume(stage, key)
        return Step(
            stage=stage,
            key=key,
            action="run",
            reason=reason,
            bytes=manifest.bytes,
            seconds=manifest.seconds,
            peak_memory_bytes=manifest.peak_memory_bytes,
        )

    def _assess(
        self, stage: str, keys: Mapping[str, str], selection: Selection, *, full: bool
    ) -> Step:
        """Decide whether the stage has an intact artifact, made from the current upstream."""
        key = keys[stage]
        manifest = self.work.find(stage, key)
        if manifest is None:
            return Step(stage=stage, key=key, action="run", reason=self._why_missing(stage))
        reason = self._why_again(stage, keys, manifest, selection, full=full)
        return Step(
            stage=stage,
            key=key,
            action="run" if reason else "cached",
            reason=reason or "up to date",
            bytes=manifest.bytes,
        )

    def _why_again(
        self,
        stage: str,
        keys: Mapping[str, str],
        manifest: Manifest,
        selection: Selection,
        *,
        full: bool,
    ) -> str | None:
        """Say why a finished artifact must be rebuilt; None where it need not."""
        if stage in selection.force:
            return "forced"
        harm = damage(self.work.folder(stage, manifest.key), manifest, full=full)
        if harm is not None:
            return f"damaged: {harm}"
        for name, record in self._upstream_records(stage, keys).items():
            if manifest.upstream.get(name) != record:
                return f"{name} was rebuilt, with other contents"
        return None

    def _why_missing(self, stage: str) -> str:
        """Say what changed since the artifact in use; keys alone would not say."""
        manifest = self.work.current_manifest(stage)
        if manifest is None:
            return "not built yet"
        lines = changes(manifest.inputs, self._fields(stage))
        if not lines:
            return "what it is made from changed upstream"
        more = f", and {len(lines) - 1} more" if len(lines) > 1 else ""
        return f"changed: {lines[0]}{more}"

    def _upstream_records(self, stage: str, keys: Mapping[str, str]) -> dict[str, UpstreamRecord]:
        """Return key and digest of each upstream artifact that is there."""
        records = {}
        for name in self.stages[stage].UPSTREAM:
            manifest = self.work.find(name, keys[name])
            if manifest is not None:
                records[name] = UpstreamRecord(key=manifest.key, digest=manifest.digest)
        return records

    # -- stages before the selected ones -----------------------------------------------------------

    def _earlier(self, selection: Selection) -> list[str]:
        """List the earlier stages that a selected one reads, in order."""
        needed = {name for stage in selection.stages for name in self.stages[stage].UPSTREAM}
        return [stage for stage in STAGES if stage in needed - set(selection.stages)]

    def _require_earlier(self, selection: Selection, keys: Mapping[str, str]) -> None:
        for stage in self._earlier(selection):
            if self.work.find(stage, keys[stage]) is None:
                raise ArtifactError(
                    f"{selection.first} needs the {stage} artifact of these options, and "
                    f"{self.work.root} holds none ({self._why_missing(stage)}).",
                    fix=f"run the same with `nmexport build --to {selection.last}`",
                )

    def _check_earlier(self, selection: Selection, keys: Mapping[str, str], read: set[str]) -> None:
        """Compare what will be read with its digests: upstream cannot be rebuilt here."""
        for stage in self._earlier(selection):
            manifest = self.work.find(stage, keys[stage])
            if stage not in read or manifest is None:
                continue
            harm = damage(self.work.folder(stage, keys[stage]), manifest, full=True)
            if harm is not None:
                raise ArtifactError(
                    f"The {stage} artifact in {self.work.root} is damaged: {harm}.",
                    fix=f"run `nmexport build --to {selection.last}` with the same options",
                )

    # -- parts -------------------------------------------------------------------------------------

    def _fields(self, stage: str) -> dict[str, object]:
        """Return the stage's own inputs, as its manifest records them."""
        if stage not in self._known_fields:
            inputs = self._inputs(self.work.root / stage, {})
            fields = self.stages[stage].key_fields(inputs)
            self._known_fields[stage] = plain({"nmexport": __version__, **fields})
        return self._known_fields[stage]

    def _source_for(self, stage: str) -> ModelSource:
        """Return the model that a stage reads: a `.gguf` is dequantised once for all of them."""
        if not self.source.packed or stage not in READ_WEIGHTS:
            return self.source
        from nmexport.models.unpacked import unpack  # torch: only where a stage runs

        return unpack(self.source, self.work.root, self.progress)

    def _inputs(
        self, output: Path, upstream: Mapping[str, Path], resume: Path | None = None
    ) -> StageInputs:
        return StageInputs(
            recipe=self.recipe,
            source=self.source,
            environment=self.environment,
            progress=self.progress,
            output=output,
            resume=resume,
            upstream=upstream,
        )

    def _rebuild_line(self, stage: str, key: str) -> str:
        recipe = self.work.folder(stage, key) / RECIPE
        words = ["nmexport", stage, "--recipe", recipe, "--work", self.work.root, "--force"]
        return shlex.join(str(word) for word in words)
