"""Describes this machine: versions, CPU, memory, GPUs. Probed once into a frozen value.

Nothing heavy is imported: versions come from package metadata, the CPU from the
operating system, GPUs from `nvidia-smi`.
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping  # noqa: TC003  records are read by their annotations
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path

from nmexport import __version__

PACKAGES = (
    "accelerate",
    "datasets",
    "gguf",
    "ml-dtypes",
    "numpy",
    "onnx",
    "onnx-ir",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxscript",
    "optimum-onnx",
    "polygraphy",
    "safetensors",
    "tensorrt",
    "tensorrt-rtx",
    "tokenizers",
    "torch",
    "transformers",
)
# What the CPU kernels dispatch on; other flags say nothing about a result or a timing here.
ISA_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_bf16", "amx_bf16", "asimd")
_GPU_QUERY = "name,driver_version,compute_cap,memory.total,uuid,clocks.max.sm,clocks.max.memory"
_CLOCK_QUERY = "uuid,clocks.sm,clocks.mem"
_MEBIBYTE = 2**20
_CONTROL_GROUP = "/sys/fs/cgroup"


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One NVIDIA GPU, as `nvidia-smi` describes it."""

    name: str
    driver: str
    compute_capability: str
    memory_bytes: int
    """0 where its memory is the machine's."""
    uuid: str = ""
    sm_mhz: int | None = None
    """Highest clock of its multiprocessors."""
    memory_mhz: int | None = None
    """Highest clock of its memory."""

    def __str__(self) -> str:
        """Name it with its memory and highest clocks."""
        parts = [self.name]
        if self.memory_bytes:
            parts.append(f"{self.memory_bytes / 2**30:.0f} GiB")
        if self.sm_mhz is not None:
            parts.append(f"up to {self.sm_mhz} MHz")
        if self.memory_mhz is not None:
            parts.append(f"memory up to {self.memory_mhz} MHz")
        return ", ".join(parts)


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Versions and devices."""

    nmexport: str
    python: str
    system: str
    """Operating system and machine, such as `Linux-6.1 x86_64`."""
    cpu: str
    isa: tuple[str, ...]
    """Instruction sets the kernels know how to use."""
    cores: int
    """Physical cores this process may run on."""
    memory_bytes: int
    packages: Mapping[str, str] = field(default_factory=dict)
    """Versions of the installed packages that can change a result, by distribution name."""
    gpus: tuple[Gpu, ...] = ()

    def version(self, package: str) -> str | None:
        """Return the version of an installed package; None where it is not installed or listed."""
        return self.packages.get(package)

    def as_dict(self) -> dict[str, object]:
        """JSON values."""
        return asdict(self)


@cache
def probe() -> Environment:
    """Probe this machine; the result is cached for the life of the process."""
    return Environment(
        nmexport=__version__,
        python=platform.python_version(),
        system=f"{platform.system()}-{platform.release()} {platform.machine()}",
        cpu=_cpu_model(),
        isa=_isa_flags(),
        cores=physical_cores(),
        memory_bytes=_memory_bytes(),
        packages=_package_versions(),
        gpus=_gpus(),
    )


def device_name(environment: Environment, *, on_gpu: bool) -> str:
    """Name what computes: the CPU, or the GPU that CUDA calls its first, with memory and clocks."""
    if not on_gpu:
        return environment.cpu
    gpu = _first_gpu(environment)
    return "a CUDA GPU that nvidia-smi does not show" if gpu is None else str(gpu)


def clocks_now(environment: Environment) -> str | None:
    """Say at which clocks CUDA's first GPU runs now; None where that is unknown.

    Asked right after a measurement, it shows a GPU that was slowed down by heat or power.
    """
    gpu = _first_gpu(environment)
    lines = () if gpu is None else _ask_driver(_CLOCK_QUERY)
    for uuid, core, memory in lines:
        if gpu is not None and uuid == gpu.uuid and core.isdigit() and memory.isdigit():
            return f"{core} MHz after the last run, memory {memory} MHz"
    return None


def device_and_clocks(device: str, *, on_gpu: bool) -> str:
    """Add to a device's name the clocks that its GPU runs at now, where the driver says them."""
    clocks = clocks_now(probe()) if on_gpu else None
    return device if clocks is None else f"{device}; {clocks}"


def _first_gpu(environment: Environment) -> Gpu | None:
    """Find the GPU that CUDA calls its first."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip()
    if visible and not visible.isdigit():
        named = (gpu for gpu in environment.gpus if gpu.uuid.startswith(visible))
        return next(named, None)
    index = int(visible or "0")
    return environment.gpus[index] if index < len(environment.gpus) else None


def physical_cores() -> int:
    """Count the physical cores among the CPUs that this process may run on; at least 1."""
    allowed = _allowed_cpus()
    pairs = set()
    for cpu in allowed:
        topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
        try:
            pairs.add(
                (
                    (topology / "physical_package_id").read_text().strip(),
                    (topology / "core_id").read_text().strip(),
                )
            )
        except OSError:  # not Linux, or a sandbox that hides it
            return len(allowed)
    return max(1, len(pairs))


def _allowed_cpus() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _cpuinfo(key: str) -> str:
    """Return the first value of a key in /proc/cpuinfo, or nothing."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""


def _cpu_model() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _isa_flags() -> tuple[str, ...]:
    present = set((_cpuinfo("flags") or _cpuinfo("Features")).split())
    return tuple(flag for flag in ISA_FLAGS if flag in present)


def _memory_bytes() -> int:
    """Return the memory this process may use: the machine's, or its container's lower limit."""
    import psutil

    total, limit = int(psutil.virtual_memory().total), _container_limit()
    return total if limit is None else min(total, limit)


def _container_limit() -> int | None:
    """Return the container's memory limit in bytes; None where there is none."""
    try:
        limit = (Path(_CONTROL_GROUP) / "memory.max").read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return int(limit) if limit.isdigit() else None


def free_memory() -> int:
    """Return the free bytes for this process: the machine's, or its container's where less."""
    import psutil

    free, limit = int(psutil.virtual_memory().available), _container_limit()
    if limit is None:
        return free
    group = Path(_CONTROL_GROUP)
    try:
        used = int((group / "memory.current").read_text(encoding="utf-8"))
        kinds = (group / "memory.stat").read_text(encoding="utf-8")
    except OSError:
        return free
    # Pages of files that nobody reads any more count as used, and are given up when asked for.
    idle = next((line for line in kinds.splitlines() if line.startswith("inactive_file ")), "x 0")
    return max(0, min(free, limit - used + int(idle.split()[1])))


def return_freed_memory() -> None:
    """Return freed memory to the system, where the C library keeps it (glibc).

    Blocks of some megabytes, as weights are, leave holes in the heap that glibc does not close by
    itself: a pass over a model's layers would take more memory with each layer.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def return_device_memory() -> None:
    """Return GPU memory that torch caches to the driver: other runtimes need it.

    Nothing is done where torch has used no GPU.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        gc.collect()  # models and hooks hold each other
        torch.cuda.empty_cache()


def _package_versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _gpus() -> tuple[Gpu, ...]:
    """List the GPUs that a working driver shows; none where there is no driver."""
    return tuple(
        Gpu(
            name=name,
            driver=driver,
            compute_capability=capability,
            memory_bytes=(_number(memory) or 0) * _MEBIBYTE,
            uuid=uuid,
            sm_mhz=_number(core),
            memory_mhz=_number(bus),
        )
        for name, driver, capability, memory, uuid, core, bus in _ask_driver(_GPU_QUERY)
    )


def _number(text: str) -> int | None:
    """Parse a whole number; None for `[N/A]`."""
    return int(text) if text.isdigit() else None


def _ask_driver(query: str) -> tuple[tuple[str, ...], ...]:
    """List each GPU as `nvidia-smi` describes it; nothing where there is none that works."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    command = [program, f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(  # noqa: S603  a fixed command, found on the user's own PATH
            command, capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ()
    rows = (tuple(part.strip() for part in line.split(",")) for line in answer.stdout.splitlines())
    # Lines that are no answer are left out.
    return tuple(row for row in rows if len(row) == query.count(",") + 1)
