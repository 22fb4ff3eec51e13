"""Estimate memory and time of a build on machines that are not here, from the model's shape alone.

Time is arithmetic over a rate: good to a factor of two, enough to choose between a coffee and a
night. Rates are what a step of learning reached where it was measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from nmexport.calibration.corpus import SELF
from nmexport.calibration.effort import SENSITIVITY_SAMPLES, learning_settings
from nmexport.inspect.estimate import RUNTIME_BYTES, memory_by_stage
from nmexport.models.offload import needs_whole

if TYPE_CHECKING:
    from nmexport.inspect.estimate import Shape
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
_FILE_RATE, _FILE_COPIES, _SERVED_BYTES = 0.5e9, 6, 2
"""Bytes a second of reading and writing, and how often weights are read or written in 16 bits."""
_SETTING_UP_SECONDS = 60


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A machine that somebody may have."""

    name: str
    host_bytes: int
    cores: int = 16
    gpu_bytes: int = 0
    gpu_rate: float = 0.0
    """Operations a second that learning reaches in float32."""

    @property
    def cpu_rate(self) -> float:
        """Operations a second on all cores."""
        return _CORE_RATE * self.cores


MACHINES = (
    Machine(name="24 GB GPU", host_bytes=64 * _GIGABYTE, gpu_bytes=24 * _GIGABYTE, gpu_rate=1.2e13),
    Machine(
        name="80 GB GPU", host_bytes=128 * _GIGABYTE, gpu_bytes=80 * _GIGABYTE, gpu_rate=1.5e13
    ),
    Machine(name="CPU, 16 cores", host_bytes=64 * _GIGABYTE),
)


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What a build takes on a machine."""

    machine: str
    way: Way
    """Where calibration runs; `not` is nowhere: a budget needs the whole model in memory."""
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
    return Expected(
        machine=machine.name,
        way=way,
        memory_bytes=_peak(recipe, shape, is_layerwise=way == "layer by layer"),
        seconds=_seconds(recipe, shape, machine, way),
    )


def _peak(recipe: Recipe, shape: Shape, *, is_layerwise: bool) -> int:
    held = memory_by_stage(recipe, shape, is_layerwise=is_layerwise)
    return max(held["calibrate"], held["fold"]) + RUNTIME_BYTES


def _way(recipe: Recipe, shape: Shape, machine: Machine) -> Way:
    offload = recipe.calibration.offload
    if offload != "layerwise":
        needed = _peak(recipe, shape, is_layerwise=False)
        if needed <= machine.gpu_bytes:
            return "on the GPU"
        if needed <= machine.host_bytes or offload == "never":
            return "on the CPU"
    return "not" if needs_whole(recipe) else "layer by layer"


def _seconds(recipe: Recipe, shape: Shape, machine: Machine, way: Way) -> float:
    rate = machine.gpu_rate if way == "on the GPU" else machine.cpu_rate
    learning = learning_settings(recipe.sparsity, recipe.seed)
    steps = 0 if learning is None else learning.steps
    work = _operations(recipe, by_block=way == "layer by layer") * shape.parameters / rate
    waited = steps * _LEAST_STEP_SECONDS if way == "on the GPU" else 0.0
    evaluated = recipe.evaluation.windows * recipe.evaluation.length
    verified = _COMPARED * _FORWARD * evaluated * shape.parameters / machine.cpu_rate
    moved = _FILE_COPIES * _SERVED_BYTES * shape.parameters / _FILE_RATE
    return max(work, waited) + verified + moved + _SETTING_UP_SECONDS


def _operations(recipe: Recipe, *, by_block: bool) -> float:
    """Operations of calibrating and learning, for each parameter."""
    section = recipe.calibration
    tokens = section.samples * section.length
    total = (
        _FORWARD * tokens + _BACKWARD * min(SENSITIVITY_SAMPLES, section.samples) * section.length
    )
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
