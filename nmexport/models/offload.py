"""Whether a model is run whole, spread by Accelerate, or layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from nmexport.errors import ModelError

if TYPE_CHECKING:
    from torch import nn

    from nmexport.models.layerwise import LayerwiseModel
    from nmexport.models.source import ModelSource
    from nmexport.progress import Progress
    from nmexport.recipe import Offload, Recipe

Placement = Literal["whole", "mapped", "layerwise"]

# Memory that a model takes in float32, in sizes of its parameters: activations need room too.
_ROOM = 1.2
_FLOAT32 = 4


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What a model may take here, in bytes."""

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
    source: ModelSource, *, trust_remote_code: bool, offload: Offload, progress: Progress
) -> OpenedModel:
    """Load a dense model in float32 where it fits, as `placement` says; notes where that is.

    Raises:
        ModelError: if it cannot be loaded, or not in the way that is asked for.
    """
    import torch

    from nmexport.models.layerwise import LayerwiseModel, skeleton
    from nmexport.models.loader import load_model

    memory = free_memory()
    parameters = 0
    if offload == "auto" and source.gguf_file is None:
        parameters = parameter_count(skeleton(source, trust_remote_code=trust_remote_code))
    chosen = placement(source, offload, parameters, memory)
    if chosen == "layerwise":
        progress.note(f"{source.id} runs layer by layer, its weights mapped from disk")
        layered = LayerwiseModel(source, trust_remote_code=trust_remote_code)
        return OpenedModel(model=layered.model, layerwise=layered)
    if chosen == "mapped":
        progress.note(f"{source.id} is spread over {len(memory.devices)} GPUs and the host")
    model = load_model(
        source,
        dtype=torch.float32,
        trust_remote_code=trust_remote_code,
        placing=device_map_options(memory) if chosen == "mapped" else None,
    )
    return OpenedModel(model=model)


def check_layerwise(recipe: Recipe) -> None:
    """Refuse what needs the whole model in memory: said before the long work.

    Raises:
        ModelError: if something has to be learned, or measured through gradients or many trials.
    """
    from nmexport.sparsity.criterion import CRITERIA
    from nmexport.sparsity.mitigation import learned_parts

    sparsity = recipe.sparsity
    whole: list[str] = [name for name in sparsity.mitigations if learned_parts((name,))]
    if "sensitivity" in CRITERIA[sparsity.criterion].needs:
        whole.append(sparsity.criterion)
    if recipe.allocation.budget.limits():
        whole.append("--budget")
    if whole:
        raise ModelError(
            f"{recipe.model.id} runs layer by layer, and {', '.join(whole)} cannot: gradients and "
            "trials go through the whole model.",
            allowed="mitigations d-pts, s-pts, var, s-var, r-sparse; criteria act, wina, clact, "
            "amber; no --budget",
            fix="--criterion act --mitigation var, or a GPU or host with room for the model in "
            "float32",
        )


def is_placed(model: Any) -> bool:
    """Whether Accelerate decided where the parts of a model are: it must not be moved then."""
    return getattr(model, "hf_device_map", None) is not None


def free_memory() -> Memory:
    """What is free now."""
    import psutil
    import torch

    devices = tuple(torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count()))
    return Memory(host=psutil.virtual_memory().available, devices=devices)


def placement(source: ModelSource, offload: Offload, parameters: int, memory: Memory) -> Placement:
    """How to run a model of so many parameters in float32.

    `whole` is in the host's memory, or moved to one GPU; `mapped` is spread over GPUs and host by
    Accelerate; `layerwise` keeps one decoder layer in memory.

    Raises:
        ModelError: if layer by layer is asked for and the model's format does not allow it.
    """
    if offload == "layerwise":
        if source.gguf_file is not None:
            raise ModelError(
                f"--offload layerwise cannot read {source.id}, a .gguf.",
                allowed="a model in safetensors files",
            )
        return "layerwise"
    needed = round(_ROOM * _FLOAT32 * parameters)
    if offload == "never" or needed <= memory.host:
        return "whole"
    if memory.devices and needed <= sum(memory.devices) + memory.host:
        return "mapped"
    return "whole" if source.gguf_file is not None else "layerwise"


def parameter_count(model: nn.Module) -> int:
    """Parameters of a model or a skeleton; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def device_map_options(memory: Memory) -> dict[str, Any]:
    """Options of `from_pretrained` that let Accelerate spread a model over GPUs, then the host."""
    limits: dict[int | str, int] = {
        index: round(free / _ROOM) for index, free in enumerate(memory.devices)
    }
    return {"device_map": "auto", "max_memory": {**limits, "cpu": round(memory.host / _ROOM)}}
