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

import contextlib
import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nmexport.calibration.forward_passes import hooked
from nmexport.calibration.learning_chunks import SEED_STRIDE, batch_of, split_chunks
from nmexport.calibration.learning_loss import divergence_with_gradient, divergences
from nmexport.calibration.output_head import OutputHead, SampledHead, check_head
from nmexport.calibration.products import fast_dtype
from nmexport.calibration.sensitivity import activations_carry_gradients
from nmexport.errors import ModelError
from nmexport.models.swap import swapped
from nmexport.sparsity.learned import LearnedLinear, LearningSite, Spread

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from nmexport.calibration.checkpoint import Checkpoint
    from nmexport.calibration.effort import LearningSettings
    from nmexport.calibration.learning_chunks import Chunks
    from nmexport.progress import Progress
    from nmexport.sparsity.fold import Corrections
    from nmexport.sparsity.linear import Behaviour, Constants

_BETAS = (0.9, 0.99)
_WARMUP = 5
_CHECKPOINT_EVERY = 20
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
    linears: Mapping[str, nn.Linear],
    constants: Mapping[str, Constants],
    behaviours: Mapping[str, Behaviour],
    samples: Sequence[torch.Tensor],
    *,
    settings: LearningSettings,
    progress: Progress,
    sites: Iterable[Sequence[str]] = (),
    checkpoint: Checkpoint | None = None,
    dtype: torch.dtype | None = None,
) -> Learned:
    """Learn corrections on top of calibrated constants.

    Args:
        model: A dense Hugging Face causal language model in evaluation mode, float32. It is
            changed while this runs and left as it was.
        linears: The linears to sparsify, by name.
        constants: Their calibrated constants: where learning starts.
        behaviours: What they compute, by name.
        samples: `[samples, length]` int64 token ids of each kind of text: each makes up as much
            of every step, however much there is of it.
        settings: Steps, rate, parts.
        progress: Counts steps.
        sites: Names of linears that share an input: they learn one shift. A linear that is in
            none is alone.
        checkpoint: Where to go on from and save to; None learns in one go.
        dtype: Type of the products; None takes bfloat16 where this machine multiplies it fast.

    Raises:
        CorpusError: if there are too few samples.
        ModelError: if the loss is not finite.
    """
    chunks = split_chunks(samples, settings)
    dtype = fast_dtype(next(model.parameters()).device) if dtype is None else dtype
    first = batch_of(0, chunks.counts, settings)
    spreads = _spreads(model, linears, chunks.ids[first])
    students = _students(
        linears, constants, behaviours, spreads, sites, settings=settings, dtype=dtype
    )
    with activations_carry_gradients(model), swapped(model, students):
        run = _Run(model, students, chunks, settings=settings, dtype=dtype)
        curve = run.finish(progress, checkpoint)
    return Learned(
        corrections={name: student.corrections() for name, student in students.items()},
        curve=curve,
        settings=settings,
    )


def _students(
    linears: Mapping[str, nn.Linear],
    constants: Mapping[str, Constants],
    behaviours: Mapping[str, Behaviour],
    spreads: Mapping[str, Spread],
    sites: Iterable[Sequence[str]],
    *,
    settings: LearningSettings,
    dtype: torch.dtype,
) -> dict[str, LearnedLinear]:
    """Learnable stand-ins, those of one site on one selection."""
    site_of: dict[str, LearningSite] = {}
    for names in sites:
        members = [name for name in names if name in linears]
        for name in members:
            site_of[name] = site_of.get(members[0]) or LearningSite(
                behaviours[name],
                constants[name],
                input_rms=spreads[name].input_rms,
                members=len(members),
                learns_shift="shift" in settings.parts,
                device=linears[name].weight.device,
            )
    return {
        name: LearnedLinear(
            linear,
            behaviours[name],
            constants[name],
            spread=spreads[name],
            parts=settings.parts,
            site=site_of.get(name),
            rank=settings.rank,
            seed=settings.seed * SEED_STRIDE + place,
            dtype=dtype,
        )
        for place, (name, linear) in enumerate(linears.items())
    }


def rate_at(step: int, settings: LearningSettings) -> float:
    """The learning rate of a step."""
    warm = min((step + 1) / _WARMUP, 1.0)
    return settings.rate * warm * 0.5 * (1 + math.cos(math.pi * step / settings.steps))


class _Run:
    """One optimisation: the students' parameters, Adam over them, and the curve so far."""

    def __init__(
        self,
        model: Any,
        students: Mapping[str, LearnedLinear],
        chunks: Chunks,
        *,
        settings: LearningSettings,
        dtype: torch.dtype,
    ) -> None:
        self._model, self._students, self._settings = model, students, settings
        self._chunks, self._counts, self._held_out = chunks.ids, chunks.counts, chunks.held_out
        self._device = next(model.parameters()).device
        self._sites = _sites_of(students)
        self._parameters = _parameters_of(students, self._sites)
        self._adam = torch.optim.Adam(
            self._parameters.values(), lr=settings.rate, betas=_BETAS, foreach=True
        )
        self._heads = self._sampled(self._checked_head().to(dtype))
        self._targets: torch.Tensor | None = None
        self._held_out_targets: torch.Tensor | None = None
        self._curve = LossCurve()

    def finish(self, progress: Progress, checkpoint: Checkpoint | None) -> LossCurve:
        """From the checkpoint, or the start, to the last step."""
        steps = self._settings.steps
        first = self._restore(checkpoint)
        if first < steps:
            self._targets = self._stored_targets(progress)
        measured_every = max(_HELD_OUT_STEPS, steps // _HELD_OUT_POINTS)
        for step in progress.track(
            range(first, steps), label="fold: learned constants", total=steps - first
        ):
            if step % measured_every == 0:
                self._measure(step, progress)
            self._step(step)
            if checkpoint is not None and (step + 1) % _CHECKPOINT_EVERY == 0:
                self._save(checkpoint, step + 1)
        self._measure(steps, progress)
        if checkpoint is not None:
            self._save(checkpoint, steps)
        return self._curve

    def _step(self, step: int) -> None:
        rows = batch_of(step, self._counts, self._settings)
        teacher = self._teacher(rows)
        with self._disturbed(step):
            student = self._hidden(self._chunks[rows])
        value, gradient = divergence_with_gradient(
            student.detach().flatten(0, 1), teacher.flatten(0, 1), self._heads.of_step(step)
        )
        if not math.isfinite(value):
            raise ModelError(
                f"Learning left the finite numbers in step {step + 1}.",
                fix="learn with --effort fast, or drop the learned mitigations",
            )
        for group in self._adam.param_groups:
            group["lr"] = rate_at(step, self._settings)
        self._adam.zero_grad(set_to_none=True)
        student.backward(gradient.view_as(student))  # type: ignore[no-untyped-call]
        self._adam.step()
        self._curve.learned.append(value)

    @contextlib.contextmanager
    def _disturbed(self, step: int) -> Iterator[None]:
        """Scores of all sites times the step's factors."""
        generator = torch.Generator().manual_seed(self._settings.seed * SEED_STRIDE + step)
        for site in self._sites:
            drawn = torch.randn(site.channels, generator=generator)
            site.disturbance = (self._settings.disturbance * drawn).exp().to(self._device)
        try:
            yield
        finally:
            for site in self._sites:
                site.disturbance = None

    def _measure(self, step: int, progress: Progress) -> None:
        """The loss on held-out chunks, one at a time."""
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
        """Last hidden states `[B, L, H]` of ids `[B, L]`."""
        output = self._model.base_model(input_ids=ids.to(self._device), use_cache=False)
        hidden: torch.Tensor = output.last_hidden_state
        return hidden

    def _dense_hidden(self, ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), _dense(self._students):
            return self._hidden(ids)

    def _teacher(self, rows: torch.Tensor) -> torch.Tensor:
        if self._targets is None:
            return self._dense_hidden(self._chunks[rows])
        return self._targets[rows].to(self._device)

    def _stored_targets(self, progress: Progress) -> torch.Tensor | None:
        """`[chunks, length, H]` bfloat16, always computed in the same batches."""
        chunks, settings = self._chunks, self._settings
        size = chunks.numel() * self._model.config.get_text_config().hidden_size * 2
        if settings.steps * settings.batch <= len(chunks) or size > _TARGET_BYTES:
            return None
        batches = torch.split(chunks, settings.batch)
        tracked = progress.track(batches, label="fold: dense targets", total=len(batches))
        return torch.cat([self._dense_hidden(ids).bfloat16().cpu() for ids in tracked])

    def _checked_head(self) -> OutputHead:
        """The model's output head over its whole vocabulary.

        Raises:
            ModelError: if the model's logits are not what it makes.
        """
        head = OutputHead.of(self._model)
        with _dense(self._students):
            check_head(self._model, head, self._hidden)
        return head

    def _sampled(self, head: OutputHead) -> SampledHead:
        """The head over the tokens that the dense model gives most probability to, and others."""
        whole = head.weight.shape[0]
        looked_at = min(self._settings.vocabulary, whole)
        drawn = looked_at // _DRAWN_PART if looked_at < whole else 0
        mass = self._mass(head) if drawn else torch.zeros(whole, device=head.weight.device)
        seed = self._settings.seed * SEED_STRIDE
        return SampledHead(head, mass, likeliest=looked_at - drawn, drawn=drawn, seed=seed)

    def _mass(self, head: OutputHead) -> torch.Tensor:
        """How much probability the dense model gives each token, on some of the chunks: `[V]`."""
        mass = torch.zeros(head.weight.shape[0], device=head.weight.device)
        wanted = max(1, _VOCABULARY_SAMPLE // self._chunks.shape[1])
        for ids in self._chunks[:: max(1, len(self._chunks) // wanted)]:
            for rows in torch.split(self._dense_hidden(ids[None])[0], _LOGIT_ROWS):
                mass += head.logits(rows).softmax(dim=-1).sum(dim=0)
        return mass

    def _save(self, checkpoint: Checkpoint, done: int) -> None:
        tensors: dict[str, torch.Tensor] = {}
        for name, parameter in self._parameters.items():
            state = self._adam.state[parameter]
            tensors[f"{name}:value"] = parameter.detach().cpu()
            tensors[f"{name}:mean"] = state["exp_avg"].cpu()
            tensors[f"{name}:square"] = state["exp_avg_sq"].cpu()
        checkpoint.save(tensors, {"done": done, "curve": asdict(self._curve)})

    def _restore(self, checkpoint: Checkpoint | None) -> int:
        """Steps already done."""
        found = None if checkpoint is None else checkpoint.load()
        if found is None:
            return 0
        tensors, state = found
        done = int(state["done"])
        for name, parameter in self._parameters.items():
            parameter.data.copy_(tensors[f"{name}:value"])
            self._adam.state[parameter] = {
                "step": torch.tensor(float(done)),
                "exp_avg": tensors[f"{name}:mean"].to(self._device),
                "exp_avg_sq": tensors[f"{name}:square"].to(self._device),
            }
        curve = state["curve"]
        self._curve = LossCurve(curve["learned"], [(at, loss) for at, loss in curve["held_out"]])
        return done


def _sites_of(students: Mapping[str, LearnedLinear]) -> dict[LearningSite, str]:
    """Each site once, with the name of its first linear."""
    found: dict[LearningSite, str] = {}
    for name, student in students.items():
        found.setdefault(student.site, name)
    return found


def _parameters_of(
    students: Mapping[str, LearnedLinear], sites: Mapping[LearningSite, str]
) -> dict[str, nn.Parameter]:
    """Return the learned parameters by name; a site's shift once, under its first linear."""
    found: dict[str, nn.Parameter] = {}
    for name, student in students.items():
        if student.site.learns_shift and sites[student.site] == name:
            found[f"{name}.shift"] = student.site.shift
        found.update({f"{name}.{part}": value for part, value in student.learned.items()})
    return found


@contextlib.contextmanager
def _dense(students: Mapping[str, LearnedLinear]) -> Iterator[None]:
    for student in students.values():
        student.sparse = False
    try:
        yield
    finally:
        for student in students.values():
            student.sparse = True


def _spreads(
    model: Any, linears: Mapping[str, nn.Linear], chunks: torch.Tensor
) -> dict[str, Spread]:
    """Sizes of each linear's input and output, on the dense model."""
    found: dict[str, Spread] = {}

    def watch(name: str, linear: nn.Linear) -> Any:
        def hook(module: nn.Module, arguments: tuple[Any, ...], output: torch.Tensor) -> None:
            del module
            found[name] = Spread(input_rms=_rms(arguments[0]), output_rms=_rms(output))

        return linear.register_forward_hook(hook)

    device = next(model.parameters()).device
    with hooked(watch(*item) for item in linears.items()), torch.no_grad():
        model.base_model(input_ids=chunks.to(device), use_cache=False)
    return found


def _rms(tensor: torch.Tensor) -> torch.Tensor:
    """Root mean square of each channel `[..., C]` -> `[C]` float32, on the CPU."""
    flat = tensor.detach().reshape(-1, tensor.shape[-1]).double()
    return flat.square().mean(dim=0).sqrt().float().cpu()
