"""Plans of the CUDA decode kernel: those worth trying, and the table that the kernels choose by."""

from __future__ import annotations

import ctypes
import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from nmexport.errors import EnvironmentFault, RecipeError
from nmexport.runtimes.native import CUDA_PLANS_FILE

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

Dtype = Literal["float16", "float32"]
"""bfloat16 reads the same bytes as float16 and shares its rows."""
_MAX_CLUSTER = 8
_CLUSTERS_SINCE = 90
_ITEM_BYTES = {"float16": 2, "float32": 4}
GROUP = 16
"""Channels of a group."""
_MIN_COPIES, _MAX_COPIES = 3, 64
_KEY_FIELDS, _ROW_FIELDS = 7, 18
"""Fields of a table row: those that say what was measured, which come first, and all."""


@dataclass(frozen=True)
class Plan:
    """How the decode kernel cuts its work; DecodePlan of nm_cuda.h, field for field."""

    lanes: int
    vectors: int
    warps: int
    unroll: int
    resident: int
    cluster: int

    def fields(self) -> tuple[int, ...]:
        """List the fields in the order of a table row; the next kernel may start at once."""
        return (
            self.lanes,
            self.vectors,
            self.warps,
            self.unroll,
            1,
            self.resident,
            self.cluster,
            0,
        )


@dataclass(frozen=True)
class Device:
    """The GPU that a table row was measured on."""

    compute_capability: int
    multiprocessors: int


class PlanLibrary:
    """The native library's functions for measured plans."""

    def __init__(self, path: Path) -> None:
        """Load the library.

        Raises:
            EnvironmentFault: if it carries no CUDA kernels, or there is no GPU.
        """
        self._library = ctypes.CDLL(str(path))
        if not hasattr(self._library, "nmexport_cuda_device"):
            raise EnvironmentFault(
                f"{path} carries no CUDA kernels.",
                fix="build it with them: NMEXPORT_CUDA=1 python -m pip install --no-deps -e .",
            )
        self._library.nmexport_cuda_device.restype = ctypes.c_char_p
        self._library.nmexport_cuda_shapes.restype = ctypes.c_char_p
        self._library.nmexport_use_cuda_plans.argtypes = [ctypes.c_char_p]
        answer = self._library.nmexport_cuda_device()
        if not answer:
            raise EnvironmentFault("There is no CUDA GPU here.", fix="`nmexport doctor` says more")
        traits = json.loads(answer)
        self.device = Device(traits["compute_capability"], traits["multiprocessors"])

    def plans(self, in_features: int) -> Iterator[Plan]:
        """Yield every plan worth trying on this device: a warp gets a whole group at least."""
        clusters = _MAX_CLUSTER if self.device.compute_capability >= _CLUSTERS_SINCE else 1
        for shape in json.loads(self._library.nmexport_cuda_shapes()):
            for cluster in range(1, clusters + 1):
                lanes, vectors, warps, unroll, resident = shape
                plan = Plan(lanes, vectors, warps, unroll, resident, cluster)
                if cluster * plan.warps * GROUP <= in_features:
                    yield plan

    def use(self, rows: Sequence[str]) -> None:
        """Use a table from now on.

        Raises:
            RecipeError: if a row is malformed.
        """
        fault = self._library.nmexport_use_cuda_plans("\n".join(rows).encode())
        if fault:
            raise RecipeError(f"Line {fault} of the table of CUDA plans is malformed.")


def table_row(
    device: Device,
    problem: Problem,
    plan: Plan,
    *,
    sparse_us: float,
    masked_us: float,
    dense_us: float,
) -> str:
    """Write one line of a table of plans, as plan_table.h reads it."""
    shape = (problem.item_bytes, problem.tokens, problem.in_features, problem.out_features)
    measured = (device.compute_capability, device.multiprocessors, *shape, int(problem.grouped))
    numbers = (*measured, *plan.fields())
    times = (f"{value:.2f}" for value in (sparse_us, masked_us, dense_us))
    return ", ".join([*map(str, numbers), *times])


def merge_table(old: str, rows: Sequence[str]) -> list[str]:
    """Add rows to the lines of a table; each replaces one of the same measurement.

    Raises:
        RecipeError: if a line is no row.
    """
    measured = {_key_of(row): row for row in rows}
    kept = []
    for number, line in enumerate(old.splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("//"):
            kept.append(line)
            continue
        try:
            key = _key_of(line)
        except ValueError as error:
            raise RecipeError(f"Line {number} is no row of a table of CUDA plans.") from error
        if key not in measured:
            kept.append(line)
    return [*kept, *measured.values()]


def _key_of(row: str) -> tuple[int, ...]:
    fields = row.split(",")
    if len(fields) != _ROW_FIELDS:
        raise ValueError(row)
    return tuple(int(field) for field in fields[:_KEY_FIELDS])


def check_savable(library: Path) -> None:
    """Refuse to measure what could not be saved afterwards.

    Raises:
        EnvironmentFault: if the folder of the native library cannot be written.
    """
    if not os.access(library.parent, os.W_OK):
        raise _unsavable(library, "the folder is not yours to write")


def save_plans(library: Path, rows: Sequence[str]) -> Path:
    """Add rows to the table next to the native library, which every later session reads.

    Raises:
        EnvironmentFault: if the folder cannot be written, or the file there is no such table.
    """
    path = library.with_name(CUDA_PLANS_FILE)
    try:
        old = path.read_text(encoding="utf-8") if path.is_file() else ""
        text = "\n".join(merge_table(old, rows)) + "\n"
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except RecipeError as error:
        raise EnvironmentFault(
            f"{path}: {error.problem}", fix="delete the file, and measure again with --save"
        ) from error
    except OSError as error:
        raise _unsavable(library, str(error)) from error
    return path


def _unsavable(library: Path, why: str) -> EnvironmentFault:
    return EnvironmentFault(
        f"What is measured cannot be saved in {library.parent}: {why}.",
        allowed="a writable installation, such as a virtual environment of your own",
        fix="install nmexport there; --table FILE writes the rows elsewhere, for the record",
    )


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One linear and token count."""

    in_features: int
    out_features: int
    tokens: int
    dtype: Dtype
    grouped: bool = False
    """With a channel order."""

    @property
    def item_bytes(self) -> int:
        """Bytes of an element."""
        return _ITEM_BYTES[self.dtype]

    def copies(self, rotated_bytes: int) -> int:
        """Number of weights that together exceed the cache."""
        wanted = rotated_bytes // (self.in_features * self.out_features * self.item_bytes) + 1
        return min(max(wanted, _MIN_COPIES), _MAX_COPIES)

    def __str__(self) -> str:
        """Such as `4096x6144, 2 tokens, channel order`."""
        order = ", channel order" if self.grouped else ""
        return f"{self.in_features}x{self.out_features}, {self.tokens} tokens{order}"
