"""Learns the constants of all sparsified linears together, so that the model predicts as before.

The loss is the divergence of the sparse model's next-token distribution from the dense one's, on
calibration text; no label is used, and every linear learns on the inputs that the sparse part
before it really produces. Dense and sparse pass share one model: each linear can compute either.

Two things make what is learned carry over to other text. Each token counts by the root of its
divergence, so that a few tokens that no constant repairs do not rule every step. And in each step
scores are multiplied by random factors near 1, so that nothing relies on which of two nearly equal
channels is kept.

Everything that a step depends on is a function of the seed and the step's number, so that a run
that was killed goes on from its checkpoint to the same result, bit for bit on the same machine.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from nmexport.calibration.learning_chunks import SEED_STRIDE, batch_of, split_chunks
from nmexport.calibration.learning_loss import divergence_with_gradient, divergences
from nmexport.calibration.output_head import OutputHead, SampledHead, check_head
from nmexport.calibration.products import fast_dtype
from nmexport.calibration.sensitivity import activations_carry_gradients
from nmexport.calibration.students import Optimiser, Students, spreads_of
from nmexport.models.swap import swapped

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nmexport.calibration.checkpoint import Checkpoint
    from nmexport.calibration.effort import LearningSettings
    from nmexport.calibration.learning_chunks import Chunks
    from nmexport.calibration.students import Targets
    from nmexport.progress import Progress
    from nmexport.sparsity.fold import Corrections

_CHECKPOINT_EVERY = 20
_CHECKPOINT_SHARE = 0.05  # of the time, where a checkpoint is gigabytes
_HELD_OUT_POINTS = 8
_HELD_OUT_STEPS = 20  # at least so many between two measurements, each of which is worth a step
# Hidden states of the dense model are kept where each chunk is used more than once and all of them
# fit in this; else the dense model runs in every step.
_TARGET_BYTES = 1 << 30
_DRAWN_PART = 4  # one in so many of the tokens that the loss looks at is drawn anew in each step
_VOCABULARY_SAMPLE = 8192  # positions that decide which tokens the loss looks at
_LOGIT_ROWS = 512  # positions whose logits over the whole vocabulary exist at a time


@dataclass
class LossCurve:
    """Divergence from the dense model in nats a token."""

    learned: list[float] = field(default_factory=list)
    """Each step's, on the chunks it learned from, with its scores disturbed."""
    block_steps: int = 0
    """Steps of each block, where constants were learned block by block."""
    held_out: list[tuple[int, float]] = field(default_factory=list)
    """(steps done, on the held-out chunks): at the start, now and then, at the end."""


@dataclass(frozen=True, kw_only=True)
class Learned:
    """Result of learning."""

    corrections: dict[str, Corrections]
    """By linear."""
    curve: LossCurve
    settings: LearningSettings


def learn(
    model: Any,
    targets: Targets,
    samples: Sequence[torch.Tensor],
    *,
    settings: LearningSettings,
    progress: Progress,
    checkpoint: Checkpoint | None = None,
    dtype: torch.dtype | None = None,
) -> Learned:
    """Learn corrections on top of calibrated constants.

    Args:
        model: A dense Hugging Face causal language model in evaluation mode, float32. It is
            changed while this runs and left as it was.
        targets: The linears to sparsify.
        samples: `[samples, length]` int64 token ids of each kind of text: each makes up as much
            of every step, however much there is of it.
        settings: Steps, rate, parts.
        progress: Counts steps.
        checkpoint: Where to go on from and save to; None learns in one go.
        dtype: Type of the products; None takes bfloat16 where this machine multiplies it fast.

    Raises:
        CorpusError: if there are too few samples.
        ModelError: if the loss is not finite.
    """
    chunks = split_chunks(samples, settings)
    dtype = fast_dtype(next(model.parameters()).device) if dtype is None else dtype
    first = batch_of(0, chunks.counts, settings)
    spreads = spreads_of(targets.linears, lambda: _hidden(model, chunks.ids[first]))
    students = Students(targets, spreads, settings=settings, dtype=dtype)
    with activations_carry_gradients(model), swapped(model, students.by_name):
        run = _Run(model, students, chunks, settings=settings, dtype=dtype)
        curve = run.finish(progress, checkpoint)
    return Learned(corrections=students.corrections(), curve=curve, settings=settings)


class _Run:
    """One optimisation: the students' parameters, Adam over them, and the curve so far."""

    def __init__(
        self,
        model: Any,
        students: Students,
        chunks: Chunks,
        *,
        settings: LearningSettings,
        dtype: torch.dtype,
    ) -> None:
        self._model, self._students, self._settings = model, students, settings
        self._chunks, self._counts, self._held_out = chunks.ids, chunks.counts, chunks.held_out
        self._device = next(model.parameters()).device
        self._optimiser = Optimiser(students.parameters(), steps=settings.steps, rate=settings.rate)
        self._heads = self._sample_head(self._open_head().to(dtype))
        self._targets: torch.Tensor | None = None
        self._held_out_targets: torch.Tensor | None = None
        self._curve = LossCurve()

    def finish(self, progress: Progress, checkpoint: Checkpoint | None) -> LossCurve:
        """Run from the checkpoint, or the start, to the last step."""
        steps = self._settings.steps
        first = self._restore(checkpoint)
        if first < steps:
            self._targets = self._compute_targets(progress)
        began, saving = time.monotonic(), 0.0
        measured_every = max(_HELD_OUT_STEPS, steps // _HELD_OUT_POINTS)
        for step in progress.track(
            range(first, steps), label="fold: learned constants", total=steps - first
        ):
            if step % measured_every == 0:
                self._measure(step, progress)
            self._step(step)
            if checkpoint is not None and (step + 1) % _CHECKPOINT_EVERY == 0:
                due = time.monotonic()
                if saving <= _CHECKPOINT_SHARE * (due - began):
                    self._save(checkpoint, step + 1)
                    saving += time.monotonic() - due
        self._measure(steps, progress)
        if checkpoint is not None:
            self._save(checkpoint, steps)
        return self._curve

    def _step(self, step: int) -> None:
        rows = batch_of(step, self._counts, self._settings)
        teacher = self._teacher(rows)
        with self._students.disturbed(step):
            student = self._hidden(self._chunks[rows])
        value, gradient = divergence_with_gradient(
            student.detach().flatten(0, 1), teacher.flatten(0, 1), self._heads.of_step(step)
        )

        def backward() -> None:
            student.backward(gradient.view_as(student))  # type: ignore[no-untyped-call]

        self._optimiser.step(step, value, backward)
        self._curve.learned.append(value)

    def _measure(self, step: int, progress: Progress) -> None:
        """Measure the loss on held-out chunks, one at a time."""
        done = self._curve.held_out
        if not len(self._held_out) or (done and done[-1][0] == step):
            return
        total, head = 0.0, self._heads.of_step(0)  # the same tokens each time
        with torch.no_grad():
            if self._held_out_targets is None:
                dense = [self._dense_hidden(chunk[None])[0] for chunk in self._held_out]
                self._held_out_targets = torch.stack(dense)
            for chunk, teacher in zip(self._held_out, self._held_out_targets, strict=True):
                total += float(divergences(self._hidden(chunk[None])[0], teacher, head).mean())
        done.append((step, total / len(self._held_out)))
        progress.note(f"after {step} steps: KL {done[-1][1]:.4f} on held-out text")

    def _hidden(self, ids: torch.Tensor) -> torch.Tensor:
        return _hidden(self._model, ids)

    def _dense_hidden(self, ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), self._students.dense():
            return self._hidden(ids)

    def _teacher(self, rows: torch.Tensor) -> torch.Tensor:
        if self._targets is None:
            return self._dense_hidden(self._chunks[rows])
        return self._targets[rows].to(self._device)

    def _compute_targets(self, progress: Progress) -> torch.Tensor | None:
        """Compute `[chunks, length, H]` bfloat16, always in the same batches."""
        chunks, settings = self._chunks, self._settings
        size = chunks.numel() * self._model.config.get_text_config().hidden_size * 2
        if settings.steps * settings.batch <= len(chunks) or size > _TARGET_BYTES:
            return None
        batches = torch.split(chunks, settings.batch)
        tracked = progress.track(batches, label="fold: dense targets", total=len(batches))
        return torch.cat([self._dense_hidden(ids).bfloat16().cpu() for ids in tracked])

    def _open_head(self) -> OutputHead:
        """Open the model's output head over its whole vocabulary.

        Raises:
            ModelError: if the model's logits are not what it makes.
        """
        head = OutputHead.of(self._model)
        with self._students.dense():
            check_head(self._model, head, self._hidden)
        return head

    def _sample_head(self, head: OutputHead) -> SampledHead:
        """Restrict the head to the dense model's likeliest tokens, and some others."""
        whole = head.weight.shape[0]
        looked_at = min(self._settings.vocabulary, whole)
        drawn = looked_at // _DRAWN_PART if looked_at < whole else 0
        mass = self._mass(head) if drawn else torch.zeros(whole, device=head.weight.device)
        seed = self._settings.seed * SEED_STRIDE
        return SampledHead(head, mass, likeliest=looked_at - drawn, drawn=drawn, seed=seed)

    def _mass(self, head: OutputHead) -> torch.Tensor:
        """Sum the dense model's probability of each token over some chunks: `[V]`."""
        mass = torch.zeros(head.weight.shape[0], device=head.weight.device)
        wanted = max(1, _VOCABULARY_SAMPLE // self._chunks.shape[1])
        for ids in self._chunks[:: max(1, len(self._chunks) // wanted)]:
            for rows in torch.split(self._dense_hidden(ids[None])[0], _LOGIT_ROWS):
                mass += head.logits(rows).softmax(dim=-1).sum(dim=0)
        return mass

    def _save(self, checkpoint: Checkpoint, done: int) -> None:
        state = {"done": done, "curve": asdict(self._curve)}
        checkpoint.save(self._optimiser.tensors(), state)

    def _restore(self, checkpoint: Checkpoint | None) -> int:
        """Steps already done."""
        saved = None if checkpoint is None else checkpoint.load()
        if saved is None:
            return 0
        tensors, state = saved
        done = int(state["done"])
        self._optimiser.restore(tensors, done)
        curve = state["curve"]
        self._curve = LossCurve(
            learned=curve["learned"],
            held_out=[(at, loss) for at, loss in curve["held_out"]],
        )
        return done


def _hidden(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Compute the last hidden states `[B, L, H]` of ids `[B, L]`."""
    device = next(model.parameters()).device
    output = model.base_model(input_ids=ids.to(device), use_cache=False)
    hidden: torch.Tensor = output.last_hidden_state
    return hidden
