"""Kernel lab: builds, checks against float64, then times; needs a GPU, nvcc and PyTorch.

    python3 plugins/bench/cuda/lab.py --out DIR [--stages check,sweep,grouped,shapes,chain,prefill,tokens,options,rivals] [--library liblab.so]

Timing protocol: weights rotate through at least 600 MB so that no launch finds its rows in L2; launches are captured
into a CUDA graph; variants of one shape are interleaved, replay by replay; medians with the 10 % and 90 % quantiles.
Nothing is timed before it agrees with the reference.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parent.parent / "kernels" / "cuda"
ROTATED_BYTES = 600 << 20
SHAPES = {
    "o": (4096, 4096),
    "qkv": (4096, 6144),
    "gate": (4096, 14336),
    "gate_up": (4096, 28672),
    "down": (14336, 4096),
}
TARGETS = {"o": 1.60, "qkv": 1.72, "gate": 1.85, "gate_up": 1.92, "down": 1.85, "chain": 1.82}
FLOORS = {"o": 1.37, "qkv": 1.53, "gate": 1.70, "gate_up": 1.82, "down": 1.67, "chain": 1.65}
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class Selection(ctypes.Structure):
    """Mirror of nmexport::cuda::Selection."""

    _fields_ = [
        ("n", ctypes.c_int32),
        ("m", ctypes.c_int32),
        ("score_scale", ctypes.c_void_p),
        ("channel_order", ctypes.c_void_p),
        ("value_scale", ctypes.c_void_p),
        ("shift", ctypes.c_void_p),
        ("shift_length", ctypes.c_int32),
        ("dynamic_shift", ctypes.c_bool),
        ("variance_correction", ctypes.c_bool),
    ]


class LinearArgs(ctypes.Structure):
    """Mirror of nmexport::cuda::LinearArgs."""

    _fields_ = [
        ("type", ctypes.c_int32),
        ("tokens", ctypes.c_int64),
        ("channels", ctypes.c_int32),
        ("outputs", ctypes.c_int32),
        ("selection", Selection),
        ("x", ctypes.c_void_p),
        ("w", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("shift_weight", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
    ]


class MaskArgs(ctypes.Structure):
    """Mirror of nmexport::cuda::MaskArgs."""

    _fields_ = [
        ("type", ctypes.c_int32),
        ("tokens", ctypes.c_int64),
        ("channels", ctypes.c_int32),
        ("selection", Selection),
        ("x", ctypes.c_void_p),
        ("is_gathered", ctypes.c_bool),
        ("s", ctypes.c_void_p),
        ("keep", ctypes.c_void_p),
        ("eta", ctypes.c_void_p),
        ("nu", ctypes.c_void_p),
    ]


class Plan(ctypes.Structure):
    """Mirror of nmexport::cuda::DecodePlan."""

    _fields_ = [
        (name, ctypes.c_int32)
        for name in (
            "lanes",
            "vectors",
            "warps",
            "unroll",
            "overlap",
            "resident",
            "cluster",
            "late",
        )
    ]

    def label(self) -> str:
        return f"L{self.lanes} V{self.vectors} W{self.warps} U{self.unroll} O{self.overlap} R{self.resident} C{self.cluster} N{self.late}"

    def values(self) -> list[int]:
        return [getattr(self, name) for name, _ in self._fields_]

    def ctas(self, outputs: int) -> int:
        return -(-outputs // (self.lanes * self.vectors * 8)) * self.cluster


# ---------------------------------------------------------------------------------------------------------- building


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
    jobs = [
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


# ---------------------------------------------------------------------------------------------------------- launching


def pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def stream() -> ctypes.c_void_p:
    return ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)


@dataclass
class Layer:
    """One linear with every option of the contract; tensors live on the GPU.

    Everything of K elements but x lies by position: the place of a channel in the order.
    """

    x: torch.Tensor
    w: torch.Tensor
    n: int = 8
    m: int = 16
    bias: torch.Tensor | None = None
    shift: torch.Tensor | None = None
    shift_weight: torch.Tensor | None = None
    score_scale: torch.Tensor | None = None
    channel_order: torch.Tensor | None = None
    value_scale: torch.Tensor | None = None
    dynamic_shift: bool = False
    variance_correction: bool = False

    def selection(self) -> Selection:
        return Selection(
            self.n,
            self.m,
            pointer(self.score_scale),
            pointer(self.channel_order),
            pointer(self.value_scale),
            pointer(self.shift),
            0 if self.shift is None else self.shift.numel(),
            self.dynamic_shift,
            self.variance_correction,
        )

    def decode_args(self, y: torch.Tensor) -> LinearArgs:
        return LinearArgs(
            DTYPES[self.x.dtype],
            self.x.shape[0],
            self.x.shape[1],
            self.w.shape[1],
            self.selection(),
            self.x.data_ptr(),
            self.w.data_ptr(),
            pointer(self.bias),
            pointer(self.shift_weight),
            y.data_ptr(),
        )

    def reference(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """By sorting and a float64 product, by position: keep [T, K], s float32, nu [T, 1], y [T, O]."""
        x = self.x.float()
        if self.channel_order is not None:
            x = x[:, self.channel_order.long()]
        eta = torch.zeros_like(x[:, :1])
        if self.dynamic_shift:
            eta = self.x.double().mean(dim=1, keepdim=True).float()
        z = x - eta
        if self.shift is not None:
            z = x - self.shift
        score = z.abs() if self.score_scale is None else z.abs() * self.score_scale
        grouped = torch.nan_to_num(score, nan=math.inf).double().view(len(x), -1, self.m)
        grouped = torch.where(score.isnan().view_as(grouped), 2e300, grouped)  # NaN above infinity
        grouped = torch.where(grouped == math.inf, 1e300, grouped)
        best = torch.sort(grouped, dim=2, descending=True, stable=True).indices[:, :, : self.n]
        keep = torch.zeros_like(grouped, dtype=torch.bool).scatter_(2, best, True).view(len(x), -1)
        s = torch.where(keep, z, 0.0)
        nu = torch.ones_like(s[:, :1])
        if self.variance_correction:
            kept = s.double().var(1, correction=0).clamp_min(1e-12)
            nu = (z.double().var(1, correction=0) / kept).sqrt()[:, None]
        if self.value_scale is not None:
            s = torch.where(keep, s * self.value_scale, 0.0)
        y = nu * (s.double() @ self.w.double())
        if self.dynamic_shift:
            y = y + eta.double() * self.shift_weight.double()
        if self.bias is not None:
            y = y + self.bias.double()
        return keep, s, nu, y


def sweep_entry(plan: Plan) -> str:
    """The library's function for the plan's row width."""
    return f"labSweep_{plan.lanes}_{plan.vectors}"


@dataclass
class Lab:
    """The loaded libraries and everything measured so far."""

    lib: ctypes.CDLL
    blaslt: ctypes.CDLL | None = None
    results: dict = field(default_factory=dict)

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


# ----------------------------------------------------------------------------------------------------------- checking


def worst_excess(y: torch.Tensor, reference: torch.Tensor, channels: int) -> float:
    """Largest error in units of what the contract allows; at most 1 passes, NaN never does."""
    relative = 1e-5 * math.sqrt(channels)
    scale = torch.maximum(reference.abs(), reference.square().mean().sqrt())
    allowed = relative * scale
    bits = {torch.float16: 10, torch.bfloat16: 7}.get(y.dtype)
    if bits is not None:
        ulp = torch.exp2(torch.floor(torch.log2(reference.abs().clamp_min(2.0**-14))) - bits)
        allowed = allowed + 2 * ulp
    excess = ((y.double() - reference).abs() / allowed).max().item()
    return excess if math.isfinite(excess) else math.inf


def make_layer(
    dtype: torch.dtype,
    tokens: int,
    channels: int,
    outputs: int,
    n: int,
    m: int,
    options: str,
    kind: str,
) -> Layer:
    x = torch.randn(tokens, channels, device="cuda")
    if kind == "ties":
        x = torch.randint(-2, 3, (tokens, channels), device="cuda").float()
    if kind == "outliers":
        x = x * torch.exp(2.0 * torch.randn(channels, device="cuda")) + 0.5
    layer = Layer(
        x.to(dtype),
        (torch.randn(channels, outputs, device="cuda") / math.sqrt(channels)).to(dtype),
        n,
        m,
    )
    if "b" in options:
        layer.bias = torch.randn(outputs, device="cuda").to(dtype)
    if "s" in options:
        layer.shift = torch.randn(channels, device="cuda") * 0.3
    if "1" in options:
        layer.shift = torch.full((1,), 0.21, device="cuda")
    if "w" in options:
        layer.score_scale = torch.rand(channels, device="cuda") + 0.1
    if "a" in options:
        layer.value_scale = torch.randn(channels, device="cuda")
    if "o" in options:
        layer.channel_order = torch.randperm(channels, device="cuda").int()
    if "d" in options:
        layer.dynamic_shift = True
        layer.shift_weight = layer.w.float().sum(0)
    layer.variance_correction = "v" in options
    return layer


def check_cases() -> list[tuple]:
    cases = []
    for dtype in DTYPES:
        for tokens in (1, 2, 3, 4):
            for options in ("", "b", "bs", "1w", "bdv", "o", "a", "wo", "oa", "dvowb", "dvowba"):
                cases.append((dtype, tokens, 1024, 768, 8, 16, options, "outliers"))
        for n, m in (
            (2, 4),
            (4, 8),
            (16, 32),
            (1, 4),
            (3, 8),
            (12, 16),
            (16, 16),
            (1, 1),
            (5, 10),
            (7, 48),
            (32, 64),
            (1, 64),
        ):
            cases.append((dtype, 1, m * 24, 264, n, m, "bv", "gauss"))
            cases.append((dtype, 3, m * 24, 264, n, m, "bo", "ties"))
            cases.append((dtype, 2, m * 24, 264, n, m, "bosaw", "gauss"))
        for channels, outputs in (
            (16, 8),
            (48, 8),
            (576, 192),
            (1536, 576),
            (4096, 1000),
            (576, 101),
            (64, 1),
        ):
            cases.append((dtype, 1, channels, outputs, 8, 16, "b", "gauss"))
            cases.append((dtype, 4, channels, outputs, 8, 16, "bdv", "gauss"))
    for channels, outputs in [*SHAPES.values(), (4096, 1024)]:
        cases.append((torch.bfloat16, 1, channels, outputs, 8, 16, "", "gauss"))
        cases.append((torch.bfloat16, 1, channels, outputs, 8, 16, "dvwob", "outliers"))
        cases.append((torch.float16, 2, channels, outputs, 8, 16, "b", "ties"))
        for options in ("o", "ow", "owsb", "bd", "v"):
            cases.append((torch.bfloat16, 1, channels, outputs, 8, 16, options, "outliers"))
    return cases


def recorded_layers(path: Path) -> list[tuple[str, Layer]]:
    """Layers whose inputs were recorded from a real model: an .npz of float16 arrays [tokens, K]."""
    import numpy as np

    layers = []
    with np.load(path) as arrays:
        for name in arrays.files:
            x = torch.from_numpy(arrays[name]).cuda()
            for dtype in DTYPES:
                for tokens in (1, 2, 3, 4):
                    first = 7 * tokens
                    layer = make_layer(dtype, tokens, x.shape[1], 576, 8, 16, "o", "gauss")
                    layer.x = x[first : first + tokens].to(dtype).contiguous()
                    layers.append((f"recorded {name} {dtype} {tokens}", layer))
    return layers


def check(lab: Lab, recorded: Path | None = None) -> None:
    """Every case against the reference; a failure ends the run, before anything is timed."""
    worst, failures = 0.0, []
    layers = [(str(case), lambda case=case: make_layer(*case)) for case in check_cases()]
    if recorded is not None:
        layers += [(name, lambda layer=layer: layer) for name, layer in recorded_layers(recorded)]
    for case, make in layers:
        layer = make()
        keep, expected_s, nu, expected = layer.reference()
        y = lab.decode(layer)
        again = lab.decode(layer)
        s, kept, _, nu_mask = lab.mask(layer)
        excess = worst_excess(y, expected, layer.x.shape[1])
        worst = max(worst, excess)
        same_bits = torch.equal(y.view(torch.uint8), again.view(torch.uint8))
        mask_off = int((kept.bool() != keep).sum())
        by_channel = lab.mask(layer, is_gathered=False)[:2]
        if layer.channel_order is not None:
            by_channel = [values[:, layer.channel_order.long()] for values in by_channel]
        s_right = torch.equal(s, by_channel[0]) and torch.equal(kept, by_channel[1])
        if layer.dynamic_shift:  # the mean's order of summation may move the last bit
            agreed = kept.bool() & keep
            s_right = s_right and torch.allclose(
                s.float()[agreed], expected_s[agreed], rtol=1e-2, atol=1e-4
            )
        else:
            s_right = s_right and torch.equal(s, expected_s.to(s.dtype))
        nu_right = not layer.variance_correction or torch.allclose(
            nu_mask.double(), nu[:, 0], rtol=1e-4
        )
        mask_ok = mask_off == 0 or (layer.dynamic_shift and mask_off <= 4)
        if excess > 1 or not same_bits or not mask_ok or not s_right or not nu_right:
            failures.append(
                f"{case}: excess {excess:.2f} bits {same_bits} mask off {mask_off} s {s_right} nu {nu_right}"
            )
    special = make_layer(torch.float32, 1, 64, 64, 8, 16, "", "gauss")
    special.x[0, :20] = torch.tensor(
        [math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, -1e-45] + [1.0] * 12
    )
    if not torch.equal(lab.mask(special)[1].bool(), special.reference()[0]):
        failures.append("special values: mask differs")
    lab.results["check"] = {"cases": len(layers), "worst": worst, "failures": failures}
    print(
        f"check: {len(layers)} cases, worst error {worst:.3f} of the allowed, {len(failures)} failures"
    )
    if failures:
        raise SystemExit("\n".join(f"  FAILED {failure}" for failure in failures[:12]))


# ------------------------------------------------------------------------------------------------------------- timing


def capture(launch, launches: int, reset=None) -> torch.cuda.CUDAGraph:
    """A graph of `launches` calls; `reset` (one small copy) goes first, so that values stay those of real data."""
    torch.cuda.synchronize()  # what the launches read may still be in the making on another stream
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        launch(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        if reset is not None:
            reset()
        for i in range(launches):
            launch(i)
    graph.replay()
    torch.cuda.synchronize()
    return graph


def time_interleaved(
    graphs: dict[str, torch.cuda.CUDAGraph], launches: int, rounds: int
) -> dict[str, dict[str, float]]:
    """Microseconds per launch: median, p10, p90 over rounds; one replay of each graph per round."""
    events = {name: [] for name in graphs}
    for _ in range(rounds + 2):
        for name, graph in graphs.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    out = {}
    for name, pairs in events.items():
        us = torch.tensor([a.elapsed_time(b) * 1000 / launches for a, b in pairs[2:]])
        q = torch.quantile(us, torch.tensor([0.1, 0.5, 0.9]))
        out[name] = {"us": q[1].item(), "p10": q[0].item(), "p90": q[2].item()}
    return out


@dataclass
class Bench:
    """Rotating weights of one shape; each launch reads what the launch before wrote, as in a model.

    So the weights are cold and the activations are in L2; the mask differs from launch to launch.
    """

    channels: int
    outputs: int
    budget_us: float = 3000.0

    def __post_init__(self) -> None:
        size = self.channels * self.outputs * 2
        self.copies = max(3, math.ceil(ROTATED_BYTES / size))
        self.launches = (
            2 * self.copies * max(1, round(self.budget_us / (size / 3e6) / self.copies / 2))
        )
        scale = 1 / math.sqrt(self.channels)
        self.w = [
            (torch.randn(self.channels, self.outputs, device="cuda", dtype=torch.bfloat16) * scale)
            for _ in range(self.copies)
        ]
        longest = max(self.channels, self.outputs)
        self.buffers = [
            torch.randn(1, longest, device="cuda", dtype=torch.bfloat16) for _ in range(2)
        ]
        self.fresh = torch.randn(1, longest, device="cuda", dtype=torch.bfloat16)
        self.x = [b[:, : self.channels] for b in self.buffers]
        self.y = [b[:, : self.outputs] for b in reversed(self.buffers)]

    def reset(self) -> None:
        self.buffers[0].copy_(self.fresh)

    def graph(self, launch) -> torch.cuda.CUDAGraph:
        return capture(launch, self.launches, self.reset)

    def sparse(self, lab: Lab, plan: Plan | None, n: int = 8, order: torch.Tensor | None = None):
        arguments = [
            Layer(self.x[i % 2], self.w[i % self.copies], n, 16, channel_order=order).decode_args(
                self.y[i % 2]
            )
            for i in range(2 * self.copies)
        ]
        if order is not None:
            return lambda i: lab.call("labDecodePlan", arguments[i % len(arguments)], plan)
        if plan is None:
            return lambda i: lab.call("labDecode", arguments[i % len(arguments)])
        name = sweep_entry(plan)
        return lambda i: lab.call(name, arguments[i % len(arguments)], plan)

    def blaslt(self, lab: Lab, problem: int, algorithm: int, weights: list[torch.Tensor]):
        def launch(i: int) -> None:
            w = weights[i % self.copies]
            status = lab.blaslt.ltRun(
                problem,
                algorithm,
                self.x[i % 2].data_ptr(),
                w.data_ptr(),
                self.y[i % 2].data_ptr(),
                stream(),
            )
            if status != 0:
                raise RuntimeError(f"cublasLt {status}")

        return launch


def sweep_plans(channels: int, outputs: int) -> list[Plan]:
    plans = []
    for lanes, vectors in ROW_WIDTHS:
        for warps in (4, 8, 16):
            for unroll, overlap, resident in SWEPT_UNROLLS:
                for cluster in range(1, 9):
                    plan = Plan(lanes, vectors, warps, unroll, overlap, resident, cluster, 0)
                    all_warps = plan.ctas(outputs) * warps
                    if (
                        plan.ctas(outputs) >= 64
                        and 1000 <= all_warps <= 132 * resident * 1.05
                        and channels // 16 >= cluster * warps
                    ):
                        plans.append(plan)
    return plans


SWEPT_UNROLLS = ((4, 1, 32), (8, 1, 24), (8, 1, 16), (16, 1, 16), (16, 0, 16))


def sweep(lab: Lab, names: list[str], rounds: int) -> None:
    """Every plan of every shape, each first checked for agreement with the plain product."""
    for name in names:
        sweep_shape(lab, name, rounds)
        torch.cuda.empty_cache()


def sweep_shape(lab: Lab, name: str, rounds: int) -> None:
    channels, outputs = SHAPES[name]
    bench = Bench(channels, outputs, budget_us=1500)
    layer = Layer(bench.x[0].clone(), bench.w[0])  # the launches overwrite bench.x
    expected = layer.reference()[3]
    wrong: list[str] = []
    times: dict[str, dict[str, float]] = {}

    def time_plans(plans: list[Plan], how_often: int) -> None:
        graphs = {}
        for plan in plans:
            if worst_excess(lab.decode(layer, plan), expected, channels) > 1:
                wrong.append(plan.label())
                continue
            graphs[plan.label()] = bench.graph(bench.sparse(lab, plan))
        times.update(time_interleaved(graphs, bench.launches, how_often))

    def ranked() -> list[str]:
        return sorted(times, key=lambda k: times[k]["us"])

    time_plans(sweep_plans(channels, outputs), max(3, rounds // 2))
    best = ranked()[:16]
    varied = [plan_of(label) for label in best]
    # One CTA on nearly every multiprocessor: even placement may need one of the two switches.
    # With one CTA on nearly every multiprocessor, even placement may need the next kernel to wait.
    varied += [
        p for p in sweep_plans(channels, outputs) if p.warps == 16 and 100 <= p.ctas(outputs) <= 132
    ]
    varied += [Plan(*plan.values()[:7], 1) for plan in varied]
    time_plans(list({plan.label(): plan for plan in varied}.values()), rounds)
    dense = {f"dense {p}": bench.graph(bench.sparse(lab, plan_of(p), n=16)) for p in ranked()[:24]}
    times_dense = time_interleaved(dense, bench.launches, max(3, rounds // 2))
    ranked_dense = sorted(times_dense, key=lambda k: times_dense[k]["us"])
    lab.results.setdefault("sweep", {})[name] = {
        "sparse": times,
        "dense": times_dense,
        "wrong": wrong,
    }
    lab.results.setdefault("best", {})[name] = {
        "sparse": ranked()[:3],
        "dense": ranked_dense[:2],
    }
    print(f"sweep {name}: {len(times)} plans, wrong {wrong}", flush=True)
    for label in ranked()[:8]:
        print(f"  {label:34s} {times[label]['us']:.2f}")
    print(
        "  own dense:",
        ", ".join(f"{k[6:]} {times_dense[k]['us']:.2f}" for k in ranked_dense[:3]),
    )


TUNED_SHAPES = (
    (8, 1, 8, 8, 1, 24),
    (8, 1, 16, 8, 1, 16),
    (16, 1, 4, 4, 1, 32),
    (16, 1, 8, 8, 1, 24),
    (16, 1, 16, 8, 1, 16),
    (32, 1, 8, 4, 1, 32),
    (32, 1, 8, 8, 1, 16),
    (32, 1, 8, 16, 1, 16),
    (32, 1, 16, 8, 1, 16),
)


def sweep_grouped(lab: Lab, names: list[str], rounds: int) -> None:
    """The product's compiled shapes with a random channel order, by which x is gathered."""
    for name in names:
        channels, outputs = SHAPES[name]
        bench = Bench(channels, outputs, budget_us=1500)
        order = torch.randperm(channels, device="cuda").int()
        graphs = {}
        for shape in TUNED_SHAPES:
            for cluster in range(1, 9):
                plan = Plan(*shape, cluster, 0)
                warps = plan.ctas(outputs) * plan.warps
                if channels // 16 >= cluster * plan.warps and 800 <= warps <= 132 * 34:
                    graphs[plan.label()] = bench.graph(bench.sparse(lab, plan, order=order))
        times = time_interleaved(graphs, bench.launches, rounds)
        lab.results.setdefault("grouped", {})[name] = times
        ranked = sorted(times, key=lambda k: times[k]["us"])
        print(
            f"grouped {name}:",
            ", ".join(f"{k} {times[k]['us']:.2f}" for k in ranked[:5]),
            flush=True,
        )
        del bench, graphs
        torch.cuda.empty_cache()


def plan_of(label: str) -> Plan:
    """The plan of a label, such as `L32 V1 W8 U8 O1 R24 C4 N0`."""
    return Plan(*[int(part[1:]) for part in label.removeprefix("dense ").split()])


def best_blaslt(lab: Lab, bench: Bench, transposed: list[torch.Tensor]) -> dict[str, object]:
    """The fastest algorithm of each layout, as launchers; times every one that cuBLASLt proposes."""
    launchers, counts = {}, {}
    for layout, weights in (("KO", bench.w), ("OK", transposed)):
        problem = lab.blaslt.ltOpen(1, bench.channels, bench.outputs, int(layout == "OK"), 400)
        count = lab.blaslt.ltCount(problem)
        graphs = {}
        for algorithm in range(count):
            launch = bench.blaslt(lab, problem, algorithm, weights)
            try:
                graphs[str(algorithm)] = bench.graph(launch)
            except RuntimeError:
                continue
        times = time_interleaved(graphs, bench.launches, 3)
        best = min(times, key=lambda k: times[k]["us"])
        launchers[f"cublasLt {layout}"] = bench.blaslt(lab, problem, int(best), weights)
        counts[layout] = {
            "proposed": count,
            "best": int(best),
            "us": times[best]["us"],
            "first_us": times.get("0", {}).get("us"),
        }
    lab.results.setdefault("cublaslt", {})[f"{bench.channels}x{bench.outputs}"] = counts
    return launchers


def shapes(lab: Lab, names: list[str], rounds: int) -> None:
    """Interleaved: the best sparse plans against every dense rival."""
    for name in names:
        channels, outputs = SHAPES[name]
        bench = Bench(channels, outputs)
        transposed = [w.t().contiguous() for w in bench.w]
        best = lab.results.get("best", {}).get(name, {"sparse": [], "dense": []})
        launchers = {
            f"sparse {label}": bench.sparse(lab, plan_of(label)) for label in best["sparse"]
        }
        launchers["sparse product"] = bench.sparse(lab, None)
        launchers |= {label: bench.sparse(lab, plan_of(label), n=16) for label in best["dense"]}
        launchers |= best_blaslt(lab, bench, transposed)
        launchers["torch x@W"] = lambda i, b=bench: torch.mm(
            b.x[i % 2], b.w[i % b.copies], out=b.y[i % 2]
        )
        launchers["torch linear"] = lambda i, b=bench, t=transposed: torch.mm(
            b.x[i % 2], t[i % b.copies].t(), out=b.y[i % 2]
        )
        launchers["torch mv"] = lambda i, b=bench, t=transposed: torch.mv(
            t[i % b.copies], b.x[i % 2][0], out=b.y[i % 2][0]
        )
        graphs = {label: bench.graph(launch) for label, launch in launchers.items()}
        times = time_interleaved(graphs, bench.launches, rounds)
        lab.results.setdefault("shapes", {})[name] = times
        del bench, transposed, graphs, launchers
        torch.cuda.empty_cache()


def chain(lab: Lab, layers: int, rounds: int) -> None:
    """qkv, o, gate_up, down of distinct layers, each fed by the one before; selection is inside the kernel."""
    order = ["qkv", "o", "gate_up", "down"]
    weights = [
        {
            n: torch.randn(*SHAPES[n], device="cuda", dtype=torch.bfloat16)
            * (1.0 / math.sqrt(SHAPES[n][0]))
            for n in order
        }
        for _ in range(layers)
    ]
    buffers = {n: torch.randn(1, SHAPES[n][1], device="cuda", dtype=torch.bfloat16) for n in order}
    inputs = {
        "qkv": buffers["down"],
        "o": buffers["qkv"][:, :4096],
        "gate_up": buffers["o"],
        "down": buffers["gate_up"][:, :14336],
    }
    best = lab.results["best"]

    def sparse_of(pick):
        calls = []
        for layer in weights:
            for n in order:
                args = Layer(inputs[n], layer[n]).decode_args(buffers[n])
                calls.append((args, pick(n)))

        def launch(i: int) -> None:
            args, plan = calls[i % len(calls)]
            if plan is None:
                lab.call("labDecode", args)
            else:
                lab.call(sweep_entry(plan), args, plan)

        return launch

    def dense_launcher():
        problems = {}
        for n in order:
            record = lab.results["cublaslt"]["x".join(map(str, SHAPES[n]))]
            layout = min(record, key=lambda k: record[k]["us"])
            problems[n] = (
                lab.blaslt.ltOpen(1, *SHAPES[n], int(layout == "OK"), 400),
                record[layout]["best"],
                layout,
            )
        stored = [
            {n: (layer[n].t().contiguous() if problems[n][2] == "OK" else layer[n]) for n in order}
            for layer in weights
        ]

        def launch(i: int) -> None:
            n = order[i % 4]
            problem, algorithm, _ = problems[n]
            w = stored[i // 4 % layers][n]
            status = lab.blaslt.ltRun(
                problem,
                algorithm,
                inputs[n].data_ptr(),
                w.data_ptr(),
                buffers[n].data_ptr(),
                stream(),
            )
            if status != 0:
                raise RuntimeError(f"cublasLt {status}")

        return launch

    def own_dense():
        calls = [
            (
                Layer(inputs[n], layer[n], 16, 16).decode_args(buffers[n]),
                plan_of(best[n]["dense"][0]),
            )
            for layer in weights
            for n in order
        ]
        name = {id(plan): sweep_entry(plan) for _, plan in calls}
        return lambda i: lab.call(name[id(calls[i % len(calls)][1])], *calls[i % len(calls)])

    repeats = 6
    fresh = torch.randn_like(buffers["down"])

    def graph(launch) -> torch.cuda.CUDAGraph:
        return capture(launch, 4 * layers * repeats, lambda: buffers["down"].copy_(fresh))

    graphs = {
        "dense cublasLt": graph(dense_launcher()),
        "dense own": graph(own_dense()),
        "sparse best": graph(sparse_of(lambda n: plan_of(best[n]["sparse"][0]))),
        "sparse product": graph(sparse_of(lambda n: None)),
    }
    times = time_interleaved(graphs, layers * repeats, rounds)
    lab.results["chain"] = times


def prefill(lab: Lab, rounds: int) -> None:
    """The mask pass before a dense product, against the dense product alone."""
    rows = {}
    for tokens in (64, 512, 2048, 4096):
        for name in ("qkv", "o", "gate_up", "down"):
            channels, outputs = SHAPES[name]
            bench = Bench(channels, outputs)
            x = torch.randn(tokens, channels, device="cuda", dtype=torch.bfloat16)
            s = torch.empty_like(x)
            y = torch.empty(tokens, outputs, device="cuda", dtype=torch.bfloat16)
            args = MaskArgs(
                2,
                tokens,
                channels,
                Layer(x, bench.w[0]).selection(),
                x.data_ptr(),
                True,
                s.data_ptr(),
            )

            def dense(i: int, b=bench) -> None:
                torch.mm(x, b.w[i % b.copies], out=y)

            def masked(i: int, b=bench) -> None:
                lab.call("labMask", args)
                torch.mm(s, b.w[i % b.copies], out=y)

            order = torch.randperm(channels, device="cuda").int()
            grouped = MaskArgs(
                2,
                tokens,
                channels,
                Layer(x, bench.w[0], channel_order=order).selection(),
                x.data_ptr(),
                True,
                s.data_ptr(),
            )
            graphs = {
                "dense": capture(dense, 8),
                "masked": capture(masked, 8),
                "mask": capture(lambda i: lab.call("labMask", args), 8),
                "grouped": capture(lambda i: lab.call("labMask", grouped), 8),
            }
            rows[f"{name} {tokens}"] = {
                k: v["us"] for k, v in time_interleaved(graphs, 8, rounds).items()
            }
            del bench, graphs
            torch.cuda.empty_cache()
    lab.results["prefill"] = rows


def few_tokens(lab: Lab, names: list[str], rounds: int) -> None:
    """1 to 4 tokens in every type: the decode kernel, a mask and a dense product, the dense product alone."""
    rows = lab.results.setdefault("tokens", {})
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for name in names:
            channels, outputs = SHAPES[name]
            size = channels * outputs * dtype.itemsize
            copies = max(3, math.ceil(ROTATED_BYTES / size))
            weights = [
                (torch.randn(channels, outputs, device="cuda") / math.sqrt(channels)).to(dtype)
                for _ in range(copies)
            ]
            launches = copies * max(1, round(2000 / (size / 3e6) / copies))
            for tokens in (1, 2, 3, 4):
                x = torch.randn(tokens, channels, device="cuda", dtype=dtype)
                s = torch.empty_like(x)
                y = torch.empty(tokens, outputs, device="cuda", dtype=dtype)
                layers = [Layer(x, w) for w in weights]
                decode = [layer.decode_args(y) for layer in layers]
                mask = MaskArgs(
                    DTYPES[dtype],
                    tokens,
                    channels,
                    layers[0].selection(),
                    x.data_ptr(),
                    True,
                    s.data_ptr(),
                )

                def masked(i: int) -> None:
                    lab.call("labMask", mask)
                    torch.mm(s, weights[i % copies], out=y)

                graphs = {
                    "sparse": capture(
                        lambda i: lab.call("labDecode", decode[i % copies]), launches
                    ),
                    "masked": capture(masked, launches),
                    "dense": capture(lambda i: torch.mm(x, weights[i % copies], out=y), launches),
                }
                rows[f"{str(dtype)[6:]} {name} {tokens}"] = {
                    k: v["us"] for k, v in time_interleaved(graphs, launches, rounds).items()
                }
            torch.cuda.empty_cache()
    for key, row in rows.items():
        print(f"tokens {key:18s}", " ".join(f"{k} {v:.2f}" for k, v in row.items()))


def options_cost(lab: Lab, names: list[str], rounds: int) -> None:
    """What each option of the selection adds to one token's product, weights cold."""
    rows = lab.results.setdefault("options", {})
    for name in names:
        channels, outputs = SHAPES[name]
        copies = max(3, math.ceil(ROTATED_BYTES / (2 * channels * outputs)))
        weights = [
            torch.randn(channels, outputs, device="cuda", dtype=torch.bfloat16)
            for _ in range(copies)
        ]
        launches = copies * max(1, round(2000 / (channels * outputs / 1.5e6) / copies))
        y = torch.empty(1, outputs, device="cuda", dtype=torch.bfloat16)
        graphs = {}
        for options in ("", "o", "a", "oa", "ow", "owsb", "bd", "v"):
            layer = make_layer(torch.bfloat16, 1, channels, outputs, 8, 16, options, "gauss")
            arguments = []
            for w in weights:
                layer.w = w
                arguments.append(layer.decode_args(y))
            arguments.append(layer)  # keeps the tensors alive
            graphs[options or "none"] = capture(
                lambda i, a=arguments: lab.call("labDecode", a[i % copies]), launches
            )
            graphs[options or "none"].kept = arguments
        rows[name] = {k: v["us"] for k, v in time_interleaved(graphs, launches, rounds).items()}
        print("options", name, " ".join(f"{k} {v:.2f}" for k, v in rows[name].items()), flush=True)
        del weights, graphs
        torch.cuda.empty_cache()


def table_rows(lab: Lab) -> list[str]:
    """The measured token counts as rows of a plan table (plan_table.h): 16-bit rows are bfloat16's."""
    major, minor = torch.cuda.get_device_capability()
    chip = f"{10 * major + minor}, {torch.cuda.get_device_properties(0).multi_processor_count}"
    rows = []
    for key, times in lab.results.get("tokens", {}).items():
        dtype, name, tokens = key.split()
        if dtype == "float16":
            continue
        code, size = (0, 4) if dtype == "float32" else (2, 2)
        channels, outputs = SHAPES[name]
        plan = Plan()
        lab.lib.labPlan(code, int(tokens), channels, outputs, ctypes.byref(plan))
        rows.append(
            f"{{{chip}, {size}, {tokens}, {channels}, {outputs}, 0, "
            f"{{{', '.join(map(str, plan.values()))}}}, "
            f"{times['sparse']:.2f}F, {times['masked']:.2f}F, {times['dense']:.2f}F}},"
        )
    for name, grouped in lab.results.get("grouped", {}).items():
        best = min(grouped, key=lambda k: grouped[k]["us"])
        row = lab.results.get("tokens", {}).get(f"bfloat16 {name} 1", {"masked": 1e3, "dense": 1e3})
        rows.append(
            f"{{{chip}, 2, 1, {SHAPES[name][0]}, {SHAPES[name][1]}, 1, "
            f"{{{', '.join(map(str, plan_of(best).values()))}}}, "
            f"{grouped[best]['us']:.2f}F, {row['masked']:.2f}F, {row['dense']:.2f}F}},"
        )
    return rows


def profile(lab: Lab, names: list[str]) -> None:
    """One launch of each shape, for a hardware profiler around this process."""
    for name in names:
        channels, outputs = SHAPES[name]
        layer = Layer(
            torch.randn(1, channels, device="cuda", dtype=torch.bfloat16),
            torch.randn(channels, outputs, device="cuda", dtype=torch.bfloat16),
        )
        lab.decode(layer)
        torch.cuda.synchronize()
        print(f"profile {name}: kept bytes {channels * outputs}")


def fixed_cost(lab: Lab, rounds: int) -> None:
    """Time against K at 4096 outputs: the intercept is what a launch costs beside its bytes."""
    rows = {}
    for label in lab.results["best"]["o"]["sparse"][:2]:
        for channels in (512, 1024, 2048, 4096):
            bench = Bench(channels, 4096, budget_us=1500)
            plan = plan_of(label)
            graphs = {"sparse": bench.graph(bench.sparse(lab, plan))}
            rows[f"{label} K={channels}"] = time_interleaved(graphs, bench.launches, rounds)[
                "sparse"
            ]["us"]
    lab.results["fixed_cost"] = rows
    for key, us in rows.items():
        print(f"fixed cost {key} {us:.2f}")


def roofline(lab: Lab) -> None:
    data = torch.randn(1 << 28, device="cuda")
    other = torch.empty_like(data)
    sink = torch.zeros(1, dtype=torch.int32, device="cuda")
    size = data.numel() * 4

    def read(i: int) -> None:
        status = lab.lib.labRead(
            ctypes.c_void_p(data.data_ptr()),
            ctypes.c_int64(size),
            ctypes.c_void_p(sink.data_ptr()),
            132 * 4,
            stream(),
        )
        assert status == 0

    graphs = {"copy": capture(lambda i: other.copy_(data), 2), "read": capture(read, 2)}
    times = time_interleaved(graphs, 2, 8)
    lab.results["roofline"] = {
        "copy_TBps": 2 * size / times["copy"]["us"] / 1e6,
        "read_TBps": size / times["read"]["us"] / 1e6,
    }
    print("roofline", lab.results["roofline"])


# ---------------------------------------------------------------------------------------------------------- reporting


def report(lab: Lab) -> None:
    r = lab.results
    print(
        f"{'shape':8s} {'dense us':>9s} {'by':36s} {'sparse us':>9s} {'plan':30s} {'ratio':>6s} {'prod':>6s} {'target':>6s} {'floor':>6s} {'keptTB/s':>8s}"
    )
    for name, times in r.get("shapes", {}).items():
        dense = {k: v for k, v in times.items() if not k.startswith("sparse")}
        sparse = {k: v for k, v in times.items() if k.startswith("sparse")}
        d, s = (min(group, key=lambda k: group[k]["us"]) for group in (dense, sparse))
        kept = SHAPES[name][0] * SHAPES[name][1] / times[s]["us"] / 1e6
        print(
            f"{name:8s} {times[d]['us']:9.2f} {d:36s} {times[s]['us']:9.2f} {s[7:]:30s} {times[d]['us'] / times[s]['us']:6.2f} "
            f"{times[d]['us'] / times['sparse product']['us']:6.2f} {TARGETS[name]:6.2f} {FLOORS[name]:6.2f} {kept:8.2f}"
        )
        print("         ", ", ".join(f"{k} {v['us']:.1f}" for k, v in dense.items()))
    if "chain" in r:
        times = r["chain"]
        d = min(v["us"] for k, v in times.items() if k.startswith("dense"))
        print(
            "chain us/layer",
            {k: round(v["us"], 1) for k, v in times.items()},
            f"ratio {d / times['sparse best']['us']:.2f}, product {d / times['sparse product']['us']:.2f} (target 1.82, floor 1.65)",
        )
    for key, row in r.get("prefill", {}).items():
        print(
            f"prefill {key:14s} dense {row['dense']:.1f} masked {row['masked']:.1f} mask {row['mask']:.1f} grouped {row['grouped']:.1f} ratio {row['dense'] / row['masked']:.3f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--library", type=Path, help="a built liblab.so; built here when absent")
    parser.add_argument("--stages", default="check,sweep,shapes,chain,prefill")
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument(
        "--best", type=Path, help="JSON of an earlier run whose best plans are taken over"
    )
    parser.add_argument("--seed", type=int, default=1, help="of every random tensor")
    parser.add_argument("--recorded", type=Path, help=".npz of float16 activations [tokens, K]")
    options = parser.parse_args()
    library = options.library or build_library(options.out / "build")
    lab = Lab(ctypes.CDLL(str(library)))
    if options.best is not None:
        lab.results["best"] = json.loads(options.best.read_text())["best"]
    stages, names = options.stages.split(","), options.shapes.split(",")
    if "chain" in stages and "sweep" not in stages and options.best is None:
        raise SystemExit("chain compares with the sweep's plans: add the stage sweep, or --best")
    lab.results |= {"device": torch.cuda.get_device_name(), "seed": options.seed}
    torch.manual_seed(options.seed)
    try:
        if "check" in stages:
            check(lab, options.recorded)
        if "profile" in stages:
            profile(lab, names)
            return
        roofline(lab)
        if "sweep" in stages:
            sweep(lab, names, 8)
        if "grouped" in stages:
            sweep_grouped(lab, names, 5)
        if "shapes" in stages or "chain" in stages:
            lab.blaslt = build_blaslt(library.parent)
        if "shapes" in stages:
            shapes(lab, names, options.rounds)
        if "chain" in stages:
            chain(lab, 6, options.rounds)
        if "fixed" in stages:
            fixed_cost(lab, 8)
        if "prefill" in stages:
            prefill(lab, 10)
        if "tokens" in stages:
            few_tokens(lab, names, 8)
        if "tokens" in stages or "grouped" in stages:
            (options.out / "plans.inl").write_text("\n".join(table_rows(lab)) + "\n")
        if "options" in stages:
            options_cost(lab, names, 8)
        if "rivals" in stages:
            import rivals

            lab.results["rivals"] = rivals.measure({n: SHAPES[n] for n in names})
        report(lab)
    finally:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "lab.json").write_text(json.dumps(lab.results, indent=1))


if __name__ == "__main__":
    main()
