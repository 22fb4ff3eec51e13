"""Learns constants block by block: for models of any size, in the memory of one decoder layer.

Two streams of hidden states go through the layers: the dense model's, and that of the part which is
sparse and learned already. Each block learns to give, from the sparse stream, what the dense one
becomes; so it also makes good what those before it left. An error counts by what it makes of the
predictions (`block_metric`). The result is of the same kind as that of `learning`.

Starting gains, biases and compensations at least squares does not pay: they serve outputs by size,
not by what depends on them. With four layers of SmolLM2 sparse (32 chunks, twice; 4 windows of 512
tokens), perplexity rose by 3.9 % and that of other text by 13.2 % without, in 18 s of processor
time; by 6.0 and 11.8 % with gains and biases so, in 31 s; by 7.4 and 17.4 % with all. Nothing
learned: 7.6 and 16.7 %.

A block depends on the seed and on those before it. One that is done is kept: a run that was killed
takes the streams through it again and goes on to the same result, bit for bit on the same machine.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from nmexport.calibration.block_metric import gather_metrics
from nmexport.calibration.learning import Learned, LossCurve
from nmexport.calibration.learning_chunks import SEED_STRIDE, batch_of, split_chunks
from nmexport.calibration.learning_loss import block_loss_of, divergences_of, relative_errors
from nmexport.calibration.products import fast_dtype
from nmexport.calibration.students import Optimiser, Students, spreads_of
from nmexport.errors import ModelError
from nmexport.models.backward import frozen
from nmexport.models.swap import swapped

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from nmexport.calibration.block_metric import BlockMetrics
    from nmexport.calibration.checkpoint import Checkpoint
    from nmexport.calibration.effort import LearningSettings
    from nmexport.calibration.learning_chunks import Chunks
    from nmexport.calibration.students import Targets
    from nmexport.models.blocks import Block, DecoderBlocks
    from nmexport.models.hidden_states import HiddenStates
    from nmexport.progress import Progress
    from nmexport.sparsity.fold import Corrections
    from nmexport.sparsity.learned import Spread

METRIC_CHUNKS = 16
"""Chunks, of those learned from, that say how much predictions depend on an error."""
_LOGIT_ROWS = 256  # positions whose distributions exist in both forms at a time


def learn_blocks(
    blocks: DecoderBlocks,
    targets: Targets,
    samples: Sequence[torch.Tensor],
    *,
    settings: LearningSettings,
    progress: Progress,
    checkpoint_of: Callable[[int], Checkpoint | None] = lambda _: None,
    dtype: torch.dtype | None = None,
) -> Learned:
    """Learn corrections on top of calibrated constants, one decoder layer in memory at a time.

    Args:
        blocks: A dense causal language model in float32. It is left as it was.
        targets: The linears to sparsify, all of them inside of decoder layers.
        samples: `[samples, length]` int64 token ids of each kind of text.
        settings: Chunks and epochs of a block, rate, parts.
        progress: Counts steps of all blocks.
        checkpoint_of: The checkpoint of a block; None keeps nothing.
        dtype: Type of the products; None takes bfloat16 where this machine multiplies it fast.

    Raises:
        CorpusError: if there are too few samples.
        ModelError: if a linear is in no decoder layer, no token reaches it, the layers cannot be
            run one by one, or the loss is not finite.
        OSError: if the disk has no room for the hidden states.
    """
    _refuse_outside(blocks, targets)
    chunks = split_chunks(samples, settings)
    dtype = fast_dtype(blocks.device) if dtype is None else dtype
    rows = block_rows(chunks, settings)
    metrics = gather_metrics(
        blocks,
        chunks.ids[rows[:METRIC_CHUNKS]],
        progress=progress,
        seed=settings.seed,
        folder=blocks.folder,
    )
    run = _Run(blocks, targets, chunks, rows=rows, metrics=metrics, settings=settings, dtype=dtype)
    return run.finish(progress, checkpoint_of)


def block_rows(chunks: Chunks, settings: LearningSettings) -> torch.Tensor:
    """Choose the chunks that blocks learn from, each once, kinds in turn: `[rows]`."""
    batches = -(-settings.block_chunks // settings.batch)
    rows = torch.cat([batch_of(step, chunks.counts, settings) for step in range(batches)])
    return torch.tensor(list(dict.fromkeys(rows.tolist())))


def _refuse_outside(blocks: DecoderBlocks, targets: Targets) -> None:
    layers = tuple(f"{name}." for name in blocks.names())
    for name in targets.linears:
        if not name.startswith(layers):
            raise ModelError(
                f"{name} is in no decoder layer, and learning goes through those, one by one.",
                fix=f"leave it dense with --targets '!{name}', or --offload never",
            )


class _Streams:
    """Hidden states between two layers: chunks that are learned from, then those held out."""

    def __init__(
        self, blocks: DecoderBlocks, learned: torch.Tensor, held_out: torch.Tensor
    ) -> None:
        ids = torch.cat([learned, held_out])
        self.learned = torch.arange(len(learned))
        self.held_out = torch.arange(len(learned), len(ids))
        self.dense, self.sparse = blocks.states(ids), blocks.states(ids)
        self.unlearned = blocks.states(held_out) if len(held_out) else None
        """Hidden states of the held-out chunks in the sparse model with nothing learned."""
        self.calls = blocks.embed(ids, self.dense)
        everything = torch.arange(len(ids))
        for rows in torch.split(everything, 1):
            self.sparse.put(rows, self.dense.batch(rows))
        if self.unlearned is not None:
            for row in self.held_out:
                self.unlearned.put(row[None] - len(learned), self.dense.batch(row[None]))

    @property
    def count(self) -> int:
        """Number of chunks."""
        return len(self.learned) + len(self.held_out)


class _Run:
    """One pass over the layers."""

    def __init__(
        self,
        blocks: DecoderBlocks,
        targets: Targets,
        chunks: Chunks,
        *,
        rows: torch.Tensor,
        metrics: BlockMetrics,
        settings: LearningSettings,
        dtype: torch.dtype,
    ) -> None:
        self._blocks, self._targets, self._metrics = blocks, targets, metrics
        self._settings, self._dtype = settings, dtype
        with torch.no_grad():
            self._streams = _Streams(blocks, chunks.ids[rows], chunks.held_out)
        batches = -(-len(rows) // settings.batch)
        self._steps = settings.block_epochs * batches
        self._corrections: dict[str, Corrections] = {}

    def finish(
        self, progress: Progress, checkpoint_of: Callable[[int], Checkpoint | None]
    ) -> Learned:
        total = len(self._blocks) * (self._steps + 1)
        steps = self._all_steps(progress, checkpoint_of)
        for _ in progress.track(steps, label="fold: constants, block by block", total=total):
            pass
        curve = LossCurve(block_steps=self._steps)
        if len(self._streams.held_out):
            before, after = self._divergences()
            curve.held_out += [(0, before), (self._steps, after)]
            progress.note(f"all blocks learned: KL {before:.4f} -> {after:.4f} on held-out text")
        return Learned(corrections=self._corrections, curve=curve, settings=self._settings)

    def _all_steps(
        self, progress: Progress, checkpoint_of: Callable[[int], Checkpoint | None]
    ) -> Iterator[None]:
        """Do the work; yield after each piece, the same number for each block."""
        done = 0
        for block in self._blocks.blocks(self._streams.calls):
            targets = self._targets.within(block.name)
            with frozen(block.layer):
                yield from self._block_steps(
                    block, targets, done, progress, checkpoint_of(block.index)
                )
            done += len(targets.linears)

    def _block_steps(
        self,
        block: Block,
        targets: Targets,
        first: int,
        progress: Progress,
        checkpoint: Checkpoint | None,
    ) -> Iterator[None]:
        """Learn one block, or load its checkpoint; then move all streams past it."""
        students = Students(
            targets,
            self._spreads(block, targets),
            settings=self._settings,
            dtype=self._dtype,
            first=first,
        )
        inside = {
            name.removeprefix(f"{block.name}."): student
            for name, student in students.by_name.items()
        }
        with swapped(block.layer, inside):
            self._move_unlearned(block)
            kept = None if checkpoint is None else checkpoint.load()
            if kept is None:
                self._move_dense(block, students)
                yield from self._optimise(block, students)
                if checkpoint is not None:
                    checkpoint.save(students.values(), {})
            else:
                self._move_dense(block, students)
                students.restore(kept[0])
                yield from [None] * self._steps
            error = self._move_sparse(block)
        if error is not None:
            progress.note(f"{block.name}: error {error:.3f} of the state on held-out text")
        self._corrections |= students.corrections()
        yield

    def _optimise(self, block: Block, students: Students) -> Iterator[None]:
        """Run all steps of a block; a dense one has nothing to learn."""
        parameters = students.parameters()
        if not parameters:
            yield from [None] * self._steps
            return
        optimiser = Optimiser(parameters, steps=self._steps, rate=self._settings.block_rate)
        metric = self._metrics.of(block.index).to(self._blocks.device)
        for step in range(self._steps):
            self._step(block, students, optimiser, metric, step)
            yield

    def _step(
        self,
        block: Block,
        students: Students,
        optimiser: Optimiser,
        metric: torch.Tensor,
        step: int,
    ) -> None:
        rows = self._rows_of(block.index, step)
        device = self._blocks.device
        inputs = self._streams.sparse.batch(rows).to(device)
        target = self._streams.dense.batch(rows).to(device)
        with torch.enable_grad(), students.disturbed(block.index * self._steps + step):
            loss = block_loss_of(divergences_of(relative_errors(block(inputs), target), metric))
        optimiser.step(step, float(loss.detach()), loss.backward)

    def _rows_of(self, index: int, step: int) -> torch.Tensor:
        """Choose the chunks of a step: each once an epoch, in a new order each time."""
        count = len(self._streams.learned)
        batches = -(-count // self._settings.batch)
        epoch, place = divmod(step, batches)
        seed = self._settings.seed * SEED_STRIDE + index * self._settings.block_epochs + epoch
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        return order[place * self._settings.batch : (place + 1) * self._settings.batch]

    def _spreads(self, block: Block, targets: Targets) -> Mapping[str, Spread]:
        """Measure the dense linears' inputs and outputs, on chunks enough to reach all of them.

        Raises:
            ModelError: if no token reaches a linear.
        """
        spreads: dict[str, Spread] = {}
        missing = dict(targets.linears)
        for rows in torch.split(self._streams.learned, self._settings.batch):
            if not missing:
                return spreads
            dense = self._streams.dense.batch(rows).to(self._blocks.device)
            spreads |= spreads_of(missing, partial(block, dense))
            missing = {name: one for name, one in missing.items() if name not in spreads}
        if missing:
            name = next(iter(missing))
            raise ModelError(
                f"No token that is learned from reaches {name} ({len(missing)} such linears).",
                fix=f"leave it dense with --targets '!{name}'",
            )
        return spreads

    def _move_unlearned(self, block: Block) -> None:
        if self._streams.unlearned is not None:
            self._move(block, self._streams.unlearned, len(self._streams.held_out))

    def _move_dense(self, block: Block, students: Students) -> None:
        with students.dense():
            self._move(block, self._streams.dense, self._streams.count)

    def _move_sparse(self, block: Block) -> float | None:
        """Move the sparse stream; return its error on held-out chunks."""
        streams = self._streams
        self._move(block, streams.sparse, streams.count)
        if not len(streams.held_out):
            return None
        errors = [
            relative_errors(streams.sparse.batch(row[None]), streams.dense.batch(row[None]))
            for row in streams.held_out
        ]
        return float(torch.cat(errors).square().mean(dim=-1).sqrt().mean())

    def _move(self, block: Block, states: HiddenStates, count: int) -> None:
        """Take the first chunks of a stream through a block."""
        with torch.no_grad():
            for rows in torch.split(torch.arange(count), self._settings.batch):
                inputs = states.batch(rows).to(self._blocks.device)
                states.put(rows, block(inputs).cpu())

    def _divergences(self) -> tuple[float, float]:
        """Measure KL from the dense model on held-out chunks, without and with what was learned."""
        unlearned = self._streams.unlearned
        if unlearned is None:
            raise ValueError("nothing is held out")
        sums = [0.0, 0.0]
        count = len(self._streams.held_out)
        for number, row in enumerate(self._streams.held_out):
            dense = self._logits(self._streams.dense, row[None])
            sides = (unlearned, torch.tensor([number])), (self._streams.sparse, row[None])
            for side, (states, place) in enumerate(sides):
                sums[side] += _divergence(self._logits(states, place), dense) / count
        return sums[0], sums[1]

    def _logits(self, states: HiddenStates, rows: torch.Tensor) -> torch.Tensor:
        """Compute the logits `[L, V]` of one chunk."""
        kept: list[torch.Tensor] = []
        with torch.no_grad():
            self._blocks.finish(
                states, rows=rows.tolist(), use_logits=lambda _, logits: kept.append(logits.cpu())
            )
        return kept[0]


def _divergence(student: torch.Tensor, teacher: torch.Tensor) -> float:
    """Compute the mean KL(teacher || student) of logits `[L, V]`."""
    total = 0.0
    for rows, wanted in zip(
        torch.split(student, _LOGIT_ROWS), torch.split(teacher, _LOGIT_ROWS), strict=True
    ):
        target, predicted = wanted.float().log_softmax(-1), rows.float().log_softmax(-1)
        total += float((target.exp() * (target - predicted)).sum())
    return total / len(teacher)
