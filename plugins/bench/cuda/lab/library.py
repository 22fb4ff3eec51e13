"""Builds the lab's libraries for this GPU and calls their functions."""

from __future__ import annotations

import ctypes
import functools
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from arguments import DTYPES, Layer, MaskArgs, Plan, pointer

HERE = Path(__file__).resolve().parent.parent
KERNELS = HERE.parent.parent / "kernels" / "cuda"


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


ROW_WIDTHS = ((8, 1), (16, 1), (32, 1), (16, 2), (32, 2))


def build_library(out: Path, with_sweep: bool = True) -> Path:
    """Compiles kernels and lab for this GPU, a source per thread; the wide sweep's shapes are optional."""
    out.mkdir(parents=True, exist_ok=True)
    major, minor = torch.cuda.get_device_capability()
    flags = [
        "-std=c++17",
        "-O3",
        "--split-compile=0",
        f"-gencode=arch=compute_{major}{minor},code=sm_{major}{minor}",
        "-Xcompiler",
        "-fPIC",
        f"-I{KERNELS}",
    ]
    jobs: list[tuple[Path, list[str], Path]] = [
        (source, [], out / f"{source.stem}.o")
        for source in [
            HERE / "lab.cu",
            *sorted(KERNELS.glob("*.cu")),
            *sorted(KERNELS.glob("*.cpp")),
        ]
    ]
    jobs += (
        []
        if not with_sweep
        else [
            (
                HERE / "lab_sweep.cu",
                [f"-DLAB_LANES={lanes}", f"-DLAB_VECTORS={vectors}"],
                out / f"sweep_{lanes}_{vectors}.o",
            )
            for lanes, vectors in ROW_WIDTHS
        ]
    )
    with ThreadPoolExecutor() as pool:
        list(
            pool.map(lambda j: run(["nvcc", *flags, *j[1], "-c", str(j[0]), "-o", str(j[2])]), jobs)
        )
    library = out / "liblab.so"
    run(["nvcc", "-shared", "-cudart", "static", "-o", str(library), *[str(j[2]) for j in jobs]])
    return library


def find_cublaslt() -> tuple[Path, Path]:
    """The header's folder and the library, from the toolkit or from PyTorch's own packages."""
    roots = [
        Path("/usr/local/cuda"),
        *[Path(p) / "nvidia" / "cu13" for p in sys.path],
        *[Path(p) / "nvidia" / "cublas" for p in sys.path],
    ]
    headers = [root / "include" for root in roots if (root / "include" / "cublasLt.h").exists()]
    libraries = [
        lib
        for root in roots
        for folder in ("lib64", "lib")
        for lib in (root / folder).glob("libcublasLt.so*")
    ]
    if not headers or not libraries:
        raise SystemExit("cublasLt.h or libcublasLt.so not found")
    return headers[0], libraries[0]


def build_blaslt(out: Path) -> ctypes.CDLL:
    include, library = find_cublaslt()
    target = out / "libblaslt.so"
    cuda = "/usr/local/cuda/include"
    run(
        [
            "g++",
            "-std=c++17",
            "-O2",
            "-shared",
            "-fPIC",
            f"-I{include}",
            f"-I{cuda}",
            str(HERE / "blaslt.cpp"),
            "-o",
            str(target),
            str(library),
            "-L/usr/local/cuda/lib64",
            "-lcudart",
            f"-Wl,-rpath,{library.parent}:/usr/local/cuda/lib64",
        ]
    )
    lib = ctypes.CDLL(str(target))
    lib.ltOpen.restype = ctypes.c_void_p
    lib.ltCount.argtypes = [ctypes.c_void_p]
    lib.ltRun.argtypes = [ctypes.c_void_p, ctypes.c_int, *[ctypes.c_void_p] * 4]
    return lib


def stream() -> ctypes.c_void_p:
    return ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)


def sweep_entry(plan: Plan) -> str:
    """The library's function for the plan's row width."""
    return f"labSweep_{plan.lanes}_{plan.vectors}"


@dataclass
class Lab:
    """The loaded libraries and everything measured so far."""

    lib: ctypes.CDLL
    folder: Path
    results: dict[str, Any] = field(default_factory=dict)

    @functools.cached_property
    def blaslt(self) -> ctypes.CDLL:
        """cuBLASLt's algorithms, one by one; compiled beside the lab's library when first asked for."""
        return build_blaslt(self.folder)

    def call(self, name: str, *args: object) -> None:
        status = getattr(self.lib, name)(
            *[ctypes.byref(a) if isinstance(a, ctypes.Structure) else a for a in args], stream()
        )
        if status != 0:
            raise RuntimeError(f"{name} returned cudaError {status}")

    def decode(self, layer: Layer, plan: Plan | None = None) -> torch.Tensor:
        y = torch.full(
            (len(layer.x), layer.w.shape[1]), math.nan, dtype=layer.x.dtype, device="cuda"
        )
        if plan is None:
            self.call("labDecode", layer.decode_args(y))
        else:
            self.call(sweep_entry(plan), layer.decode_args(y), plan)
        return y

    def mask(
        self, layer: Layer, is_gathered: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """s, keep, eta, nu: by position, or by channel as NMPrune gives it."""
        x = layer.x
        s = torch.full_like(x, math.nan)
        keep = torch.full(x.shape, 7, dtype=torch.uint8, device="cuda")
        eta, nu = (torch.full((len(x),), math.nan, device="cuda") for _ in range(2))
        args = MaskArgs(
            DTYPES[x.dtype],
            len(x),
            x.shape[1],
            layer.selection(),
            x.data_ptr(),
            is_gathered,
            *map(pointer, (s, keep, eta, nu)),
        )
        self.call("labMask", args)
        return s, keep, eta, nu
