"""`bench rivals`: a work directory's engines against torch.compile on the same shapes."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from nmexport.bench.context import check_context
from nmexport.bench.rivals import ours, torch_compile
from nmexport.bench.rivals.contest import Contest, hold, over_rival
from nmexport.bench.rivals.interface import Case, Entry
from nmexport.bench.rivals.shapes import Shapes, read_shapes
from nmexport.environment import device_and_clocks, device_name, probe
from nmexport.errors import EnvironmentFault, RecipeError
from nmexport.report.model import Rivals
from nmexport.runtimes.engine import read_engine
from nmexport.runtimes.onnxruntime_opening import RUNTIME, provider_here

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from nmexport.bench.rivals.torch_compile import Weights
    from nmexport.progress import Progress
    from nmexport.report.model import ContestantTimes
    from nmexport.runtimes.engine import Engine

logger = logging.getLogger(__name__)

PROTOCOL = (
    "All sides run in one process, and take turns where they fit into memory together. Times "
    "are wall time of a whole step as a caller sees it, from token ids on the host or the device "
    "to the next token on the host; medians. Decode: one token on a cache, every run from the same "
    "one. Prompt: an empty cache, the last token's choice. The GPU's time is that of a step among "
    "many that are queued without waiting in between, the host's is the rest. Rivals have the "
    "model's shapes and random weights, drawn on the device: torch.compile with CUDA graphs (mode "
    "reduce-overhead, one graph, sizes constant, kernels tuned on this GPU), the cache in place, "
    "the choice of the token on the device, plain causal attention. Their step attends to as many "
    "tokens as `tokens` says, its own included; ours to one more."
)
_SPARE_BYTES = 12 << 30
"""Device memory for activations, recorded graphs and what runtimes keep beside weights."""
_HALF_TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class RivalOptions:
    """Cases, rivals and number of runs."""

    context: int = 2048
    batches: Sequence[int] = (1, 4, 8)
    prompts: Sequence[int] = (128, 512, 2048)
    weights: Sequence[Weights] = torch_compile.WEIGHTS
    runs: int = 30
    warmup: int = 3

    @property
    def cases(self) -> tuple[Case, ...]:
        """Decode steps, then prompts."""
        return (
            *(Case(phase="decode", batch=batch, tokens=self.context) for batch in self.batches),
            *(Case(phase="prefill", batch=1, tokens=tokens) for tokens in self.prompts),
        )


def bench_rivals(
    engine: Path,
    options: RivalOptions,
    *,
    save: Callable[[Rivals], None],
    progress: Progress,
    device: str = "cuda",
) -> Rivals:
    """Time our engines and the rivals.

    Args:
        engine: Folder of the engine, with `engine.json`.
        options: Cases, rivals and number of runs.
        save: Takes what is measured so far, after each case.
        progress: Where to count.
        device: `cpu` runs the same without a GPU and without compiling, for tests.

    Raises:
        ArtifactError: if the engine or its model's shapes cannot be read.
        EnvironmentFault: if torch sees no GPU, or our engine would not run on it.
        RecipeError: if the model's context is shorter than what is asked for.
    """
    described = read_engine(engine)
    model = described.model.parent
    check_context(model, options.context + 1, options="--context and a decoded token")
    check_context(model, max(options.prompts, default=1), options="--prompt-tokens")
    if described.dense_model is None:
        raise RecipeError(
            "Without the dense baseline there is nothing of ours to hold against dense rivals.",
            fix="build again without --no-dense-baseline",
        )
    if device == "cuda":
        _check_gpu(described)
    setting = torch_compile.TorchSetting(
        shapes=read_shapes(model),
        device=device,
        dtype=_HALF_TYPES.get(described.element_type, torch.bfloat16),
        progress=progress,
    )
    entries = (
        *ours.entries(engine),
        *(torch_compile.entry(weights, setting) for weights in options.weights),
    )
    together = device != "cuda" or _fit_together(entries, setting.shapes, options)
    measured = Rivals(
        engine=engine.resolve().name,
        device=device_name(probe(), on_gpu=device == "cuda"),
        runtime=RUNTIME,
        versions={"torch": torch.__version__},
        runs=options.runs,
        together=together,
        protocol=PROTOCOL,
    )
    return _collect(
        measured, entries, options, on_gpu=device == "cuda", save=save, progress=progress
    )


def _collect(
    rivals: Rivals,
    entries: Sequence[Entry],
    options: RivalOptions,
    *,
    on_gpu: bool,
    save: Callable[[Rivals], None],
    progress: Progress,
) -> Rivals:
    device = rivals.device

    def done(rows: tuple[ContestantTimes, ...]) -> None:
        nonlocal rivals
        now = device_and_clocks(device, on_gpu=on_gpu)
        rivals = replace(rivals, device=now, times=over_rival((*rivals.times, *rows)))
        save(rivals)

    contest = Contest(
        cases=options.cases,
        runs=options.runs,
        warmup=options.warmup,
        progress=progress,
        done=done,
    )
    hold(contest, [entries] if rivals.together else [[entry] for entry in entries])
    return rivals


def _check_gpu(engine: Engine) -> None:
    if not torch.cuda.is_available():
        raise EnvironmentFault(
            f"PyTorch {torch.__version__} sees no GPU here, and rivals run on one.",
            fix="run this on a machine with an NVIDIA GPU and a PyTorch built for CUDA; "
            "`nmexport doctor` says what is missing",
        )
    if engine.tensorrt is None and provider_here(engine.provider) != "cuda":
        raise EnvironmentFault(
            "The engine runs on the CPU, and rivals run on the GPU: that is no comparison.",
            fix="install onnxruntime-gpu, then `nmexport engine --force` on this machine",
        )


def _fit_together(entries: Sequence[Entry], shapes: Shapes, options: RivalOptions) -> bool:
    """Tell whether the GPU holds all sides at once; where not, warn that they run one by one."""
    free, _ = torch.cuda.mem_get_info()
    capacity = max((options.context, *options.prompts))
    # Buffers have a size of a power of two: at worst twice what is in them.
    cache = 2 * 2 * shapes.cache_values(max(options.batches, default=1), 2 * capacity)
    needed = sum(entry.weight_bytes + cache for entry in entries) + _SPARE_BYTES
    if needed <= free:
        return True
    logger.warning(
        "all sides together take some %.0f GB of GPU memory, and %.0f GB are free: they run one "
        "after another, not in turns",
        needed / 1e9,
        free / 1e9,
    )
    return False
