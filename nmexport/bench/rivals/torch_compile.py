"""torch.compile with CUDA graphs, the way of gpt-fast: dense weights, or int8 weights alone."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch._dynamo
import torch._inductor.config

from nmexport.bench.rivals.interface import Contestant, Entry, Step
from nmexport.bench.rivals.torch_decoder import Decoder, DenseLinear, Int8Linear
from nmexport.timing import queued_milliseconds

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from nmexport.bench.rivals.interface import Case
    from nmexport.bench.rivals.shapes import Shapes
    from nmexport.progress import Progress

Weights = Literal["dense", "int8"]
WEIGHTS: tuple[Weights, ...] = ("dense", "int8")
_WARMUP = 4
"""Runs before the first timed one: compile, record the CUDA graph, replay it."""
_ALIGNMENT = 8
"""Tokens; gpt-fast's caches have such sizes too, which attention kernels like."""


@dataclass(frozen=True, kw_only=True)
class TorchSetting:
    """How rivals in PyTorch run."""

    shapes: Shapes
    device: str
    """`cuda`; on `cpu`, for tests, nothing is compiled."""
    dtype: torch.dtype
    """Type of the activations, and of weights in 16 bits."""
    progress: Progress


def entry(weights: Weights, setting: TorchSetting) -> Entry:
    """Describe one of the rivals."""
    shapes, item = setting.shapes, setting.dtype.itemsize
    linears = shapes.linear_weights * (item if weights == "dense" else 1)
    kind = str(setting.dtype).removeprefix("torch.") if weights == "dense" else "int8 weights"
    return Entry(
        name=f"torch.compile, {kind}",
        is_rival=True,
        is_dense=weights == "dense",
        weight_bytes=linears + shapes.embedding_weights * item,
        open=lambda: TorchCompiled(weights, setting),
    )


class TorchCompiled(Contestant):
    """A decoder of random weights, compiled anew for each case: its sizes are constants in it."""

    def __init__(self, weights: Weights, setting: TorchSetting) -> None:
        """Draw the weights."""
        self._setting = setting
        self._label = weights
        device, dtype = setting.device, setting.dtype
        kind = DenseLinear if weights == "dense" else Int8Linear
        self._decoder = Decoder(
            setting.shapes,
            lambda rows, columns: kind(rows, columns, device=device, dtype=dtype),
            device=device,
            dtype=dtype,
        )

    def prepare(self, case: Case) -> Step | None:
        """See `Contestant`; int8 weights save bytes, which a prompt does not wait for."""
        if case.phase == "prefill" and self._label == "int8":
            return None
        length = 1 if case.phase == "decode" else case.tokens
        self._decoder.allocate(case.batch, -(-case.tokens // _ALIGNMENT) * _ALIGNMENT)
        device = self._setting.device
        # The step's own token is the last of the context: one fewer than ours attends to.
        positions = torch.arange(case.tokens - length, case.tokens, device=device)
        ids = torch.randint(self._setting.shapes.vocabulary, (case.batch, length), device=device)
        return self._compile(case, ids, positions)

    def release(self) -> None:
        """Forget compiled code and recorded graphs of all rivals, and the cache."""
        self._decoder.free()
        torch._dynamo.reset()  # noqa: SLF001  torch has no other name for it
        if self._setting.device == "cuda":
            torch.cuda.empty_cache()

    def close(self) -> None:
        """Free the weights."""
        self.release()
        del self._decoder
        if self._setting.device == "cuda":
            torch.cuda.empty_cache()

    def _compile(self, case: Case, ids: Tensor, positions: Tensor) -> Step:
        if self._setting.device != "cuda":
            return _TorchStep(self._decoder, ids, positions, wait=None)
        step = _TorchStep(
            torch.compile(self._decoder, mode="reduce-overhead", fullgraph=True, dynamic=False),
            ids,
            positions,
            wait=torch.cuda.synchronize,
        )
        began = time.monotonic()
        # gpt-fast's setting: its generated kernels' sizes are tuned on this GPU.
        with torch._inductor.config.patch(coordinate_descent_tuning=True):  # noqa: SLF001
            for _ in range(_WARMUP):
                step.run()
        took = time.monotonic() - began
        self._setting.progress.note(
            f"torch.compile, {self._label} weights, {case}: compiled in {took:.0f} s"
        )
        return step


class _TorchStep(Step):
    def __init__(
        self,
        call: Callable[[Tensor, Tensor], Tensor],
        ids: Tensor,
        positions: Tensor,
        *,
        wait: Callable[[], None] | None,
    ) -> None:
        self._call, self._ids, self._positions, self._wait = call, ids, positions, wait

    def run(self) -> None:
        with torch.no_grad():
            self._call(self._ids, self._positions).tolist()

    def device_ms(self, times: int) -> float | None:
        if self._wait is None or self._ids.shape[1] != 1:
            return None
        with torch.no_grad():
            return queued_milliseconds(
                lambda: self._call(self._ids, self._positions), self._wait, times
            )
