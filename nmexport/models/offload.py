"""Decides whether a model is run whole, spread by Accelerate, or layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from nmexport import environment
from nmexport.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import nn

    from nmexport.choices import Offload
    from nmexport.models.layerwise import LayerwiseModel
    from nmexport.models.source import ModelSource
    from nmexport.progress import Progress
    from nmexport.recipe import Recipe

Placement = Literal["whole", "device", "mapped", "layerwise"]

# Memory that a model takes in float32, in sizes of its parameters: activations need room too.
_ROOM = 1.2
# The same on a GPU that learns too: beside the weights lie their copies in 16 bits.
_DEVICE_ROOM = 1.75
_FLOAT32 = 4


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Memory that a model may take here, in bytes."""

    host: int
    devices: tuple[int, ...] = ()
    """Free memory of each GPU."""


@dataclass(frozen=True, kw_only=True)
class OpenedModel:
    """A dense model in float32, or what stands for it."""

    model: Any
    """The model; where it runs layer by layer, its skeleton."""
    layerwise: LayerwiseModel | None = None
    """Runs the skeleton; None where the model runs by itself."""


def open_dense(
    source: ModelSource,
    *,
    offload: Offload,
    progress: Progress,
    folder: Path | None = None,
) -> OpenedModel:
    """Load a dense model in float32 where it fits, as `placement` says; notes where that is.

    Args:
        source: Where the model lies.
        offload: What the user asks for.
        progress: Told where the model is.
        folder: On a disk with room, for what waits between layers; None is the system's.

    Raises:
        ModelError: if it cannot be loaded, or not in the way that is asked for.
    """
    import torch

    from nmexport.models.layerwise import LayerwiseModel
    from nmexport.models.loader import load_model

    chosen, placed = _place(source, offload=offload)
    if chosen == "layerwise":
        progress.note(f"{source.id} runs layer by layer, its weights mapped from disk")
        layered = LayerwiseModel(source, folder=folder)
        return OpenedModel(model=layered.model, layerwise=layered)
    if placed is not None:
        progress.note(f"{source.id} is spread over {len(set(placed.values()))} GPUs")
    model = load_model(
        source,
        dtype=torch.float32,
        placing=None if placed is None else {"device_map": placed},
        device="cuda" if chosen == "device" else "cpu",
    )
    return OpenedModel(model=model)


def whole_device(source: ModelSource, *, offload: Offload) -> Literal["cuda", "cpu"] | None:
    """Device that holds the dense model in float32 as a whole now; None where none does.

    Raises:
        ModelError: if layer by layer is asked for and the model's format does not allow it.
    """
    chosen, _ = _place(source, offload=offload)
    if chosen == "device":
        return "cuda"
    return "cpu" if chosen == "whole" else None


def needs_whole(recipe: Recipe) -> list[str]:
    """List what in a recipe has to be measured in many trials."""
    return ["--budget"] if recipe.allocation.budget.limits() else []


def check_layerwise(recipe: Recipe) -> None:
    """Refuse what needs the whole model in memory: said before the long work.

    Raises:
        ModelError: if something has to be measured in many trials.
    """
    whole = needs_whole(recipe)
    if whole:
        raise ModelError(
            f"{recipe.model.id} runs layer by layer, and {', '.join(whole)} cannot: each of its "
            "many trials goes through the whole model.",
            allowed="one --pattern for all linears; any criterion and mitigation",
            fix="drop --budget, or use a GPU or host with room for the model in float32",
        )


def _place(source: ModelSource, *, offload: Offload) -> tuple[Placement, dict[str, int] | None]:
    """How to run a model here and now; of `mapped`, which GPU each part goes to."""
    from nmexport.models.skeleton import skeleton

    memory = free_memory()
    empty: Any = None
    if not source.packed and (offload == "auto" or (offload == "never" and memory.devices)):
        empty = skeleton(source)
    chosen = placement(source, offload, parameter_count(empty) if empty else 0, memory)
    if chosen != "mapped":
        return chosen, None
    placed = device_map(empty, memory.devices)
    return ("layerwise", None) if placed is None else (chosen, placed)


def is_placed(model: Any) -> bool:
    """Tell whether Accelerate placed the parts of a model: it must not be moved then."""
    return getattr(model, "hf_device_map", None) is not None


def free_memory() -> Memory:
    """Measure the memory that is free now."""
    import torch

    devices = tuple(torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count()))
    return Memory(host=environment.free_memory(), devices=devices)


def placement(source: ModelSource, offload: Offload, parameters: int, memory: Memory) -> Placement:
    """How to run a model of so many parameters in float32.

    `device` is read into the first GPU, tensor by tensor, and takes no memory of the host; `whole`
    is in the host's memory; `mapped` is spread over GPUs by Accelerate; `layerwise` keeps one
    decoder layer in memory. Nothing is spread over GPUs and the host: what Accelerate keeps on the
    host is in memory only while its module runs, and folding reads weights at other times.

    Raises:
        ModelError: if layer by layer is asked for and the model's format does not allow it.
    """
    if offload == "layerwise":
        if source.packed:
            raise ModelError(
                f"--offload layerwise cannot read {source.id}, a .gguf.",
                allowed="a model in safetensors files",
            )
        return "layerwise"
    needed = bytes_needed(parameters)
    if (
        memory.devices
        and not source.packed
        and device_bytes_needed(parameters) <= memory.devices[0]
    ):
        return "device"
    if offload == "never" or needed <= memory.host:
        return "whole"
    if memory.devices and needed <= sum(memory.devices):
        return "mapped"
    return "whole" if source.packed else "layerwise"


def bytes_needed(parameters: int) -> int:
    """Return the memory to run so many parameters in float32."""
    return round(_ROOM * _FLOAT32 * parameters)


def device_bytes_needed(parameters: int) -> int:
    """Return the GPU memory to run so many parameters in float32, and to learn on them."""
    return round(_DEVICE_ROOM * _FLOAT32 * parameters)


def parameter_count(model: nn.Module) -> int:
    """Count the parameters of a model or a skeleton; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def device_map(model: Any, devices: Sequence[int]) -> dict[str, int] | None:
    """Assign each part of a model to a GPU in float32; None where a part does not fit.

    Args:
        model: The model or its skeleton, in float32.
        devices: Free memory of each GPU, in bytes.
    """
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    limits: dict[int | str, int] = {
        index: round(free / _ROOM) for index, free in enumerate(devices)
    }
    # A decoder layer stays in one piece: its residual connections do not cross GPUs.
    whole = list(model._no_split_modules)  # noqa: SLF001 - its only name
    balanced = get_balanced_memory(
        model, max_memory={**limits, "cpu": 0}, no_split_module_classes=whole
    )
    placed = infer_auto_device_map(model, max_memory=balanced, no_split_module_classes=whole)
    on_gpus = {name: place for name, place in placed.items() if isinstance(place, int)}
    return on_gpus if len(on_gpus) == len(placed) else None
