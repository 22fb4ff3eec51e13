"""Estimates memory and time of a build on other machines, from the model's shape alone.

Time is arithmetic over a rate: good to a factor of two, enough to choose between a coffee and a
night. Rates are what a step of learning reached where it was measured; on a GPU, a quarter of what
it is sold for in 16 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from nmexport.calibration.effort import SENSITIVITY_SAMPLES, learning_settings
from nmexport.calibration.text_sources import SELF
from nmexport.inspect.estimate import RUNTIME_BYTES, memory_by_stage
from nmexport.models.offload import device_bytes_needed, needs_whole

if TYPE_CHECKING:
    from nmexport.inspect.estimate import Shape
    from nmexport.models.offload import Placement
    from nmexport.recipe import Recipe

Way = Literal["on the GPU", "on the CPU", "layer by layer", "not"]

LAYER_BY_LAYER = "--calib FILE --calib-self-share 0"
"""Options that a model which does not fit needs: it cannot write its own text."""
_GIGABYTE = 2**30
# SmolLM2 learned at some 100 GFLOP/s a core of a Xeon with AVX-512; float32 on GPUs without tensor
# cores reaches two fifths of what they are sold for.
_CORE_RATE = 1.0e11
_FORWARD, _BACKWARD = 2, 4
"""Operations of each parameter for a token."""
_LEARNING = _FORWARD * 2 + _BACKWARD
"""The dense model beside the one that learns."""
_MOVING = 2 * _FORWARD
"""Block by block, both streams move on."""
_WRITING = 4 * _FORWARD
"""Text comes token by token, a batch at a time: a quarter of the rate."""
_LEAST_STEP_SECONDS = 0.5
"""A small model on a GPU waits for its launches."""
_COMPARED = 4
"""Times that verification reads its text: two models, in torch and in the runtime."""
_SESSIONS, _SESSION_RATE = 10, 1.5e9
"""On a GPU verification is mostly sessions that are opened, and bytes a second of their weights."""
_FILE_RATE, _FILE_COPIES, _SERVED_BYTES = 0.5e9, 6, 2
"""Bytes a second of reading and writing, and how often weights are read or written in 16 bits."""
_SETTING_UP_SECONDS = 60


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A kind of machine."""

    name: str
    host_bytes: int
    cores: int = 16
    gpu_bytes: int = 0
    gpu_rate: float = 0.0
    """Operations a second of its GPU in float32."""
    gpu_half_rate: float = 0.0
    """The same of products in 16 bits."""

    @property
    def cpu_rate(self) -> float:
        """Return operations a second on all cores."""
        return _CORE_RATE * self.cores


MACHINES = (
    Machine(
        name="24 GB GPU",
        host_bytes=64 * _GIGABYTE,
        gpu_bytes=24 * _GIGABYTE,
        gpu_rate=1.2e13,
        gpu_half_rate=4.0e13,
    ),
    Machine(
        name="80 GB GPU",
        host_bytes=128 * _GIGABYTE,
        gpu_bytes=80 * _GIGABYTE,
        gpu_rate=1.5e13,
        gpu_half_rate=8.0e13,
    ),
    Machine(
        name="141 GB GPU",
        host_bytes=128 * _GIGABYTE,
        gpu_bytes=139 * _GIGABYTE,
        gpu_rate=2.5e13,
        gpu_half_rate=2.5e14,
    ),
    Machine(name="CPU, 16 cores", host_bytes=64 * _GIGABYTE),
)


@dataclass(frozen=True, kw_only=True)
class Expected:
    """The cost of a build on a machine."""

    machine: str
    way: Way
    """Device of calibration; `not` if it cannot run: a budget needs the whole model in memory."""
    memory_bytes: int
    """Peak of the largest stage up to the fold, on the GPU where it runs there."""
    seconds: float


def expect(recipe: Recipe, shape: Shape, machine: Machine) -> Expected:
    """Estimate a build up to its verification.

    Args:
        recipe: What is built.
        shape: The model's.
        machine: Where.
    """
    way = _way(recipe, shape, machine)
    place: Placement = "layerwise" if way == "layer by layer" else "whole"
    on_gpu = way == "on the GPU"
    return Expected(
        machine=machine.name,
        way=way,
        memory_bytes=_on_device(recipe, shape) if on_gpu else _peak(recipe, shape, place),
        seconds=_gpu_seconds(recipe, shape, machine)
        if on_gpu
        else _cpu_seconds(recipe, shape, machine, way),
    )


def _peak(recipe: Recipe, shape: Shape, place: Placement) -> int:
    held = memory_by_stage(recipe, shape, place=place)
    return max(held["calibrate"], held["fold"]) + RUNTIME_BYTES


def _on_device(recipe: Recipe, shape: Shape) -> int:
    """Estimate the memory of a GPU that holds the model: weights, their copies, activations."""
    return max(device_bytes_needed(shape.parameters), _peak(recipe, shape, "whole"))


def _way(recipe: Recipe, shape: Shape, machine: Machine) -> Way:
    offload = recipe.calibration.offload
    if offload != "layerwise":
        if _on_device(recipe, shape) <= machine.gpu_bytes:
            return "on the GPU"
        if _peak(recipe, shape, "whole") <= machine.host_bytes or offload == "never":
            return "on the CPU"
    return "not" if needs_whole(recipe) else "layer by layer"


def _cpu_seconds(recipe: Recipe, shape: Shape, machine: Machine, way: Way) -> float:
    operations = _operations(recipe, by_block=way == "layer by layer") + _sensitivities(recipe)
    evaluated = recipe.evaluation.windows * recipe.evaluation.length
    operations += _COMPARED * _FORWARD * evaluated
    return (
        operations * shape.parameters / machine.cpu_rate
        + _moving_seconds(shape)
        + _SETTING_UP_SECONDS
    )


def _gpu_seconds(recipe: Recipe, shape: Shape, machine: Machine) -> float:
    learning = learning_settings(recipe.sparsity, recipe.seed)
    waited = 0.0 if learning is None else learning.steps * _LEAST_STEP_SECONDS
    work = _operations(recipe, by_block=False) * shape.parameters / machine.gpu_half_rate
    wide = _sensitivities(recipe) * shape.parameters / machine.gpu_rate
    opened = _SESSIONS * _SERVED_BYTES * shape.parameters / _SESSION_RATE
    return max(work, waited) + wide + opened + _moving_seconds(shape) + _SETTING_UP_SECONDS


def _moving_seconds(shape: Shape) -> float:
    """Estimate the seconds of reading and writing weights."""
    return _FILE_COPIES * _SERVED_BYTES * shape.parameters / _FILE_RATE


def _sensitivities(recipe: Recipe) -> float:
    """Count operations of the float32 backward passes, for each parameter."""
    section = recipe.calibration
    return _BACKWARD * min(SENSITIVITY_SAMPLES, section.samples) * section.length


def _operations(recipe: Recipe, *, by_block: bool) -> float:
    """Count operations of calibrating and learning, for each parameter, but `_sensitivities`."""
    section = recipe.calibration
    tokens = section.samples * section.length
    total: float = _FORWARD * tokens
    share = 1.0 if section.corpus == SELF else section.self_share
    written = share * tokens
    learning = learning_settings(recipe.sparsity, recipe.seed)
    if learning is not None and by_block:
        learned = learning.block_chunks * learning.length
        total += learned * (_MOVING + learning.block_epochs * (_FORWARD + _BACKWARD))
    elif learning is not None:
        chunks = learning.steps * learning.batch
        total += _LEARNING * chunks * learning.length
        written += (section.self_share > 0) * min(chunks, learning.written) * learning.length
    return total + _WRITING * written
