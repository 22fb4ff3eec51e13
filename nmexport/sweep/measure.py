"""Measures the cells of one model; computes what they share once, and keeps what is done.

<root>/<model>/work/                    a work directory: calibration is shared by its keys
<root>/<model>/windows-<key12>.safetensors    evaluation text as token ids
<root>/<model>/cells/<key12>.json       a measured cell

A cell that measures accuracy runs calibrate and fold, and scores the folded model in torch: what
every exported file is held against. Its folded weights are removed once it is measured.
"""

from __future__ import annotations

import functools
import json
import time
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from filelock import FileLock, Timeout

from nmexport.calibration import corpus
from nmexport.calibration.windows import windows_of
from nmexport.environment import probe
from nmexport.errors import UserError, WorkDirectoryError
from nmexport.models import source as models
from nmexport.models.loader import load_model
from nmexport.models.swap import replace_linears
from nmexport.models.unpacked import unpack
from nmexport.pipeline import Pipeline
from nmexport.report.model import read_report
from nmexport.selection import Selection
from nmexport.sparsity.pattern import NMPattern
from nmexport.sparsity.targets import linears_of, select_targets
from nmexport.stages import fold
from nmexport.stages.fitting import check_fit
from nmexport.store.artifact import KEY_CHARS, canonical_json, digest_of
from nmexport.store.layers import model_phases
from nmexport.store.records import record_from
from nmexport.store.tensors import load_tensors, save_tensors
from nmexport.store.work_directory import WorkDirectory
from nmexport.sweep.baselines import replacement
from nmexport.sweep.replay import Replay
from nmexport.sweep.row import Figures, Row, Speeds
from nmexport.verification import accuracy
from nmexport.verification.reference import TorchSession, open_folded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray
    from torch import nn

    from nmexport.models.source import ModelSource
    from nmexport.progress import Progress
    from nmexport.recipe import ModelSection, Recipe
    from nmexport.report.model import Scores
    from nmexport.store.layers import ModelPhases
    from nmexport.sweep.plan import Baseline, Cell, Job

SCHEMA = 1
_ANY = NMPattern(1, 1)
"""Groups that fit every linear."""
_VERSIONS = ("torch", "transformers")


def run(job: Job, progress: Progress) -> list[Row]:
    """Measure the cells that have no results yet; return one row for each cell, in order.

    A combination that cannot be built is a row with the reason, and the others go on.

    Raises:
        WorkDirectoryError: if another sweep holds the folder, or the disk refuses.
    """
    with _lock(job.folder):
        bench = _Bench(job, progress)
        rows = []
        try:
            for number, cell in enumerate(job.cells, start=1):
                progress.note(f"{job.model}, {number} of {len(job.cells)}: {_describe(cell)}")
                rows.append(bench.measure(cell))
        finally:
            bench.close()
        return rows


def check(job: Job) -> None:
    """Refuse cells that cannot be measured on this model, before any is.

    Raises:
        UserError: if a cell's targets, pattern or weights do not fit the model's shapes.
    """
    seen = set()
    for cell in job.cells:
        recipe = cell.recipe
        pattern = recipe.sparsity.pattern
        if cell.baseline is not None:
            pattern = cell.baseline.pattern or _ANY
        asked = (pattern, recipe.sparsity.targets, recipe.model)
        if cell.refused is None and asked not in seen:
            seen.add(asked)
            check_fit(recipe, models.resolve(recipe.model), pattern)


class _Bench:
    """Everything the cells of a model share while they are measured."""

    def __init__(self, job: Job, progress: Progress) -> None:
        self._job = job
        self._progress = progress
        self._environment = probe()
        self._work = WorkDirectory(job.folder / "work")
        self._find_model = functools.cache(models.resolve)
        self._dense: tuple[str, Replay] | None = None

    def close(self) -> None:
        """Free what the cells shared."""
        if self._dense is not None:
            self._dense[1].forget()

    def measure(self, cell: Cell) -> Row:
        """Return a cell's row: its figures from their file, or measured now and saved there."""
        row = _identity(self._job, cell)
        if cell.refused is not None:
            return replace(row, refused=cell.refused)
        try:
            return replace(row, figures=self._load_figures(cell))
        except WorkDirectoryError:
            raise
        except UserError as error:
            return replace(row, refused=error.problem)

    def _load_figures(self, cell: Cell) -> Figures:
        key = digest_of(self._key_fields(cell))
        path = self._job.folder / "cells" / f"{key[:KEY_CHARS]}.json"
        if path.is_file():
            return record_from(Figures, json.loads(path.read_text(encoding="utf-8")))
        began = time.monotonic()
        figures = self._figures(cell)
        figures = replace(figures, seconds=round(time.monotonic() - began, 1))
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._work.disk_faults():
            self._work.replace(path, (json.dumps(figures.as_json(), indent=1) + "\n").encode())
        return figures

    def _key_fields(self, cell: Cell) -> dict[str, object]:
        """Everything that can change a cell's figures."""
        recipe = cell.recipe
        shared: dict[str, object] = {
            "schema": SCHEMA,
            "measure": self._job.measure,
            "model": self._find_model(recipe.model).digest,
            "evaluation": _evaluation_fields(recipe),
            "versions": {name: self._environment.version(name) for name in _VERSIONS},
        }
        if cell.baseline is not None:
            return {
                **shared,
                "baseline": str(cell.baseline),
                "dtype": recipe.model.dtype,
                "targets": recipe.sparsity.targets.model_dump(mode="json"),
            }
        last = "fold" if self._job.measure == "accuracy" else "verify"
        return {**shared, "stage": self._pipeline(recipe).keys(last)[last]}

    def _figures(self, cell: Cell) -> Figures:
        if cell.baseline is not None:
            return self._baseline_figures(cell.recipe, cell.baseline)
        if self._job.measure == "build":
            return self._build_figures(cell.recipe)
        return self._fold_figures(cell.recipe)

    def _fold_figures(self, recipe: Recipe) -> Figures:
        """Fold, score in torch, and drop the folded weights."""
        pipeline = self._pipeline(recipe)
        pipeline.run(Selection(last="fold"))
        key = pipeline.keys("fold")["fold"]
        folded = fold.Artifact(self._work.folder("fold", key))
        source = self._readable_model(recipe.model)
        phases = model_phases(folded.layers)
        figures = self._score(recipe, lambda: open_folded(source, recipe.model, folded), phases)
        with self._work.lock(pipeline.command):
            self._work.discard("fold", key)
        return figures

    def _build_figures(self, recipe: Recipe) -> Figures:
        """Run all stages and take the report's figures."""
        self._pipeline(recipe).run(Selection(last="verify"))
        report = read_report(self._work.require("verify") / "report.json")
        speedup = report.latency.speedup
        return replace(
            _accuracy_figures(report.accuracy),
            speedup=Speeds(prefill=speedup.prefill, decode=speedup.decode),
        )

    def _baseline_figures(self, recipe: Recipe, baseline: Baseline) -> Figures:
        return self._score(recipe, lambda: self._baseline_session(recipe, baseline), "all")

    def _baseline_session(self, recipe: Recipe, baseline: Baseline) -> TorchSession:
        session, model = self._load(recipe)
        groups = baseline.pattern or _ANY
        targets = recipe.sparsity.targets
        chosen = set(
            select_targets(model, groups, include=targets.include, exclude=targets.exclude)
        )
        replaced: dict[str, nn.Module] = {
            name: replacement(linear, baseline)
            for name, linear in linears_of(model).items()
            if name in chosen
        }
        replace_linears(model, replaced)
        return session

    def _score(
        self, recipe: Recipe, opened: Callable[[], TorchSession], phases: ModelPhases
    ) -> Figures:
        """Score both models on the evaluation windows."""
        windows = self._windows(recipe)
        with (
            self._work.disk_faults(),
            self._dense_session(recipe, len(windows)) as dense,
            opened() as sparse,
        ):
            tracked = self._progress.track(windows, label="sweep: perplexity", total=len(windows))
            return _accuracy_figures(accuracy.compare(dense, sparse, tracked, phases=phases))

    def _dense_session(self, recipe: Recipe, windows: int) -> Replay:
        """The dense model's answers, computed by the first cell that needs them."""
        fields = {
            "model": canonical_json(recipe.model.model_dump(mode="json")),
            "evaluation": _evaluation_fields(recipe),
        }
        key = digest_of(fields)
        if self._dense is None or self._dense[0] != key:
            if self._dense is not None:
                self._dense[1].forget()
            answers = Replay(lambda: self._load(recipe)[0], windows, self._job.folder)
            self._dense = (key, answers)
        return self._dense[1]

    def _load(self, recipe: Recipe) -> tuple[TorchSession, nn.Module]:
        section = recipe.model
        model = load_model(self._readable_model(section), dtype=section.dtype)
        return TorchSession(model, model.config.get_text_config().vocab_size), model

    def _windows(self, recipe: Recipe) -> NDArray[np.int64]:
        """Make or read evaluation text once for all cells that share it."""
        fields = {"model": self._find_model(recipe.model).digest, **_evaluation_fields(recipe)}
        path = self._job.folder / f"windows-{digest_of(fields)[:KEY_CHARS]}.safetensors"
        if not path.is_file():
            partial = path.with_suffix(".new")
            ids = torch.from_numpy(self._make_windows(recipe)).int()
            with self._work.disk_faults():
                save_tensors(partial, {"input_ids": ids})
                partial.replace(path)
        stored: torch.Tensor = load_tensors(path)["input_ids"]
        return stored.long().numpy()

    def _make_windows(self, recipe: Recipe) -> NDArray[np.int64]:
        return windows_of(
            self._find_model(recipe.model),
            recipe,
            lambda: load_model(self._readable_model(recipe.model), dtype="float32"),
            progress=self._progress,
            label="sweep: own text",
        )

    def _readable_model(self, section: ModelSection) -> ModelSource:
        """Return the model to read weights from: a `.gguf` is dequantised once for all cells."""
        source = self._find_model(section)
        if not source.packed:
            return source
        with self._work.lock(self._command):
            return unpack(source, self._work.root, self._progress)

    @property
    def _command(self) -> str:
        return f"nmexport sweep, model {self._job.model}"

    def _pipeline(self, recipe: Recipe) -> Pipeline:
        source: ModelSource = self._find_model(recipe.model)
        return Pipeline(
            recipe=recipe,
            source=source,
            environment=self._environment,
            work=self._work,
            progress=self._progress,
            command=self._command,
        )


def _evaluation_fields(recipe: Recipe) -> dict[str, object]:
    evaluation = recipe.evaluation
    return {
        "corpus": corpus.corpus_identity(evaluation.corpus),
        "windows": evaluation.windows,
        "length": evaluation.length,
        "seed": recipe.seed,
    }


def _accuracy_figures(scores: Scores) -> Figures:
    """Take what a sweep keeps of a report's `accuracy`, all of which is there: both models ran."""
    return record_from(
        Figures,
        {
            "perplexity": {"dense": scores.dense.perplexity, "sparse": scores.sparse.perplexity},
            "tokens": scores.tokens,
            "perplexity_ratio": scores.perplexity_ratio,
            "perplexity_ratio_stderr": scores.perplexity_ratio_stderr,
            "kl_mean": scores.kl_mean,
            "top1_agreement": scores.top1_agreement,
        },
    )


def _identity(job: Job, cell: Cell) -> Row:
    """Return the settings that a row is about."""
    section = cell.recipe.sparsity
    own = cell.baseline is None and cell.refused is None
    return Row(
        model=job.model,
        label=cell.label,
        baseline=None if cell.baseline is None else str(cell.baseline),
        pattern=section.pattern if own else None,
        criterion=section.criterion if own else None,
        mitigations=section.mitigations if own else None,
        grouping=section.grouping if own else None,
        phases=section.phases if own else None,
        settings=dict(cell.more),
    )


def _describe(cell: Cell) -> str:
    return cell.label if cell.baseline else f"{cell.recipe.sparsity.pattern}, {cell.label}"


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Keep a second sweep out of a model's folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout:
        raise WorkDirectoryError(
            f"{folder} is held by another sweep.",
            fix="wait for it to end, or name another folder with --work DIR",
        ) from None
