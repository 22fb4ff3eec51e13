"""Scores the folded model against the dense one in torch, before anything is exported.

Under `accelerate launch` every process scores a share of the windows, on a device of its own; the
figures are those of one process, bit for bit where the devices are alike. A model that does not fit
into memory is scored layer by layer, in float32 whatever the recipe's type.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from nmexport.calibration.windows import windows_of
from nmexport.models.context import check_lengths
from nmexport.models.embedding import round_embedding
from nmexport.models.layerwise import LayerwiseModel
from nmexport.models.loader import load_model
from nmexport.models.offload import Memory, bytes_needed, free_memory, parameter_count, placement
from nmexport.models.skeleton import skeleton
from nmexport.models.source import resolve
from nmexport.models.unpacked import reuse
from nmexport.report.model import Scores
from nmexport.stages import fold
from nmexport.store.layers import model_phases
from nmexport.verification import accuracy
from nmexport.verification.precomputed import Precomputed
from nmexport.verification.reference import folded_linear, open_dense, open_folded

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from numpy.typing import NDArray

    from nmexport.models.source import ModelSource
    from nmexport.progress import Progress
    from nmexport.recipe import Recipe
    from nmexport.runtimes.session import Session
    from nmexport.store.folded import FoldedModel
    from nmexport.store.layers import ModelPhases
    from nmexport.store.work_directory import WorkDirectory
    from nmexport.verification.accuracy import WindowComparison


@dataclass(frozen=True, kw_only=True)
class Share:
    """Which part of the work this process does."""

    rank: int = 0
    processes: int = 1
    device: str = "cpu"

    @property
    def is_main(self) -> bool:
        """True for the process that reports the result."""
        return self.rank == 0

    def of(self, count: int) -> range:
        """Return its pieces out of `count`; neighbours go to different processes."""
        return range(self.rank, count, self.processes)


@dataclass(frozen=True, kw_only=True)
class _Subject:
    """The model and text to score."""

    work: WorkDirectory
    recipe: Recipe
    source: ModelSource
    folded: fold.Artifact

    @property
    def phases(self) -> ModelPhases:
        return model_phases(self.folded.layers)


def read_launch() -> Share:
    """Read this process's share, as `accelerate launch` set it up; by default all."""
    import torch
    from accelerate import PartialState

    # Asked for where there is no GPU, or several processes would not find each other.
    state = PartialState(cpu=not torch.cuda.is_available())
    return Share(rank=state.process_index, processes=state.num_processes, device=str(state.device))


@dataclass(frozen=True, kw_only=True)
class Evaluation(Scores):
    """Scores of the folded model in torch."""

    dataset: str
    second_half: Scores | None
    phases: ModelPhases
    processes: int


def evaluate(
    work: WorkDirectory, share: Share, *, progress: Progress, recipe: Recipe | None = None
) -> Evaluation | None:
    """Score the fold artifact in use.

    Args:
        work: A work directory with a finished fold stage.
        share: What this process does.
        progress: Counts windows.
        recipe: Says on which text; None takes what was built there.

    Returns:
        The scores, in the main process; None in the others.

    Raises:
        ArtifactError: if nothing was folded here, or what was is damaged.
        CorpusError: if the evaluation text is missing or too short.
        ModelError: if the model cannot be loaded.
        WorkDirectoryError: if the work directory's disk has no room for a model's answers.
    """
    recipe = recipe or work.recipe()
    folded = fold.Artifact(work.require("fold"))
    source = reuse(resolve(recipe.model), work.root)
    subject = _Subject(work=work, recipe=recipe, source=source, folded=folded)
    check_lengths(subject.source, recipe, measured=True)
    phases = subject.phases
    windows = _windows(subject, progress)
    mine = share.of(len(windows))
    with _sessions(subject, windows[list(mine)], share, progress) as (dense, sparse):
        tracked = progress.track(mine, label="evaluate: perplexity", total=len(mine))
        scores = [
            (number, accuracy.score_window(dense, sparse, windows[number], phases=phases))
            for number in tracked
        ]
    everywhere = _gather(scores, share)
    if not share.is_main:
        return None
    ordered = [score for _, score in sorted(everywhere, key=lambda pair: pair[0])]
    scored = accuracy.figures(ordered, phases=phases)
    figures = {each.name: getattr(scored, each.name) for each in fields(Scores)}
    return Evaluation(
        **figures,
        second_half=scored.second_half,
        dataset=recipe.evaluation.corpus,
        phases=phases,
        processes=share.processes,
    )


@contextlib.contextmanager
def _sessions(
    subject: _Subject, windows: NDArray[np.int64], share: Share, progress: Progress
) -> Iterator[tuple[Session, Session]]:
    """Open the dense and the folded model, whole on a device, or layer by layer."""
    source, section = subject.source, subject.recipe.model
    offload, memory = subject.recipe.calibration.offload, free_memory()
    parameters = 0
    if offload == "auto" and not source.packed:
        empty = skeleton(source)
        parameters = 2 * parameter_count(empty)
    device = _device(share, parameters, memory)
    on_host = share.processes * parameters if device == "cpu" else 0
    if placement(source, offload, on_host, Memory(host=memory.host)) == "layerwise":
        with _layerwise_sessions(subject, windows, progress) as pair:
            yield pair
        return

    with (
        open_dense(source, section, device=device) as dense,
        open_folded(source, section, subject.folded, device=device) as sparse,
    ):
        yield dense, sparse


def _device(share: Share, parameters: int, memory: Memory) -> str:
    """Choose the process's own GPU, if that many parameters fit in it, or else the host."""
    kind, _, index = share.device.partition(":")
    if kind != "cuda":
        return share.device
    return share.device if bytes_needed(parameters) <= memory.devices[int(index or 0)] else "cpu"


@contextlib.contextmanager
def _layerwise_sessions(
    subject: _Subject, windows: NDArray[np.int64], progress: Progress
) -> Iterator[tuple[Session, Session]]:
    from functools import partial

    folded = subject.folded
    decodes = subject.phases != "all"
    prompt = accuracy.prompt_length(windows[0]) if decodes and len(windows) else None
    # Not in the system's folder for temporary files, which may be small, or in memory.
    folder = subject.work.root
    model = LayerwiseModel(subject.source, folder=folder)
    substitutes = {
        layer.name: partial(folded_linear, layer, folded, prompt=prompt) for layer in folded.linears
    }
    answers = partial(Precomputed, model, windows, progress=progress, folder=folder)
    with (
        subject.work.disk_faults(),
        answers(label="evaluate: dense layers") as dense,
        _stored_embedding(model.model, folded),
        answers(
            label="evaluate: sparse layers",
            substitutes=substitutes,
            decodes_second_half=decodes,
        ) as sparse,
    ):
        yield dense, sparse


@contextlib.contextmanager
def _stored_embedding(model: Any, folded: FoldedModel) -> Iterator[None]:
    """Look tokens up as the exported model does."""
    if not folded.embedding_bits:
        yield
        return
    handle = round_embedding(model)
    try:
        yield
    finally:
        handle.remove()


def _windows(subject: _Subject, progress: Progress) -> NDArray[np.int64]:
    load = functools.partial(load_model, subject.source, dtype="float32")
    return windows_of(
        subject.source, subject.recipe, load, progress=progress, label="evaluate: own text"
    )


def _gather(
    scores: list[tuple[int, WindowComparison]], share: Share
) -> list[tuple[int, WindowComparison]]:
    """Gather the scores of all processes."""
    if share.processes == 1:
        return scores
    from accelerate.utils import gather_object

    everywhere: list[tuple[int, WindowComparison]] = gather_object(scores)
    return everywhere
