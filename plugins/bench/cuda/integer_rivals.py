"""Linears of one token on weights in 8 and 4 bits: ours, dense and 8:16, beside the kernels that others ship.

    python3 plugins/bench/cuda/integer_rivals.py --library libnmexport_onnxruntime.so

The same weights on every side, cold (in turns through more than the second-level cache holds), a CUDA graph of several
launches, the sides in turns, medians. "8:16" is the op as an exported graph has it: NMLinear ranks its own row. "8:16,
pruned" is what a decoder on a GPU runs: the norm or activation before has pruned the row. Rivals:

* ONNX Runtime's MatMulNBits;
* PyTorch's int4 kernel (`_weight_int4pack_mm`, bfloat16);
* what torch.compile makes of `F.linear(x, w.to(x.dtype)) * scale` (int8).

Before a side is timed its result is held against a float64 product.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch
from onnx import TensorProto, helper

import onnxruntime

SHAPES = ((4096, 14336), (4096, 28672), (14336, 4096))
ROTATED_BYTES = 256 << 20
GROUP = 128
LAUNCHES = 24
"""Of one graph, at least."""
Run = Callable[[], object]


@dataclass
class Weight:
    """Integers of a weight [O, K] as the checkpoint formats have them, without sign; a scale an output."""

    bits: int
    channels: int
    outputs: int

    def __post_init__(self) -> None:
        self.zero = 1 << (self.bits - 1)
        shape = (self.outputs, self.channels)
        generator = torch.Generator("cuda").manual_seed(self.bits)
        self.values = torch.randint(
            0, 2 * self.zero, shape, generator=generator, device="cuda", dtype=torch.uint8
        )
        scale = torch.rand(self.outputs, generator=generator, device="cuda") + 0.5
        self.scale = (scale / (self.zero * math.sqrt(self.channels))).half()

    @property
    def copies(self) -> int:
        """Places in memory to go through."""
        return math.ceil(ROTATED_BYTES / (self.channels * self.outputs * self.bits / 8))

    @property
    def launches(self) -> int:
        """A whole number of rounds through the copies."""
        return self.copies * math.ceil(LAUNCHES / self.copies)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """X W in float64, [1, O]."""
        centred = self.values.double() - self.zero
        return x.double() @ centred.T * self.scale.double()

    def by_channel(self) -> torch.Tensor:
        """W [K, O] with a sign, two 4-bit values a byte: our layout."""
        rows = (self.values.to(torch.int16) - self.zero).to(torch.int8).T.contiguous()
        return rows if self.bits == 8 else _two_a_byte(rows.view(torch.uint8))

    def by_output(self) -> torch.Tensor:
        """[O, K / GROUP, bytes of a group] without a sign: MatMulNBits' layout."""
        packed = self.values if self.bits == 8 else _two_a_byte(self.values)
        return packed.reshape(self.outputs, self.channels // GROUP, -1)


def _two_a_byte(values: torch.Tensor) -> torch.Tensor:
    """The lower index in the low half."""
    low, high = values[..., 0::2] & 15, values[..., 1::2] & 15
    return (low | high << 4).contiguous()


class Graph:
    """Nodes of one kind over copies of a weight, on ONNX Runtime's CUDA graphs; a call enqueues them."""

    def __init__(
        self,
        nodes: list[onnx.NodeProto],
        tensors: dict[str, tuple[int, list[int], torch.Tensor]],
        constants: list[onnx.TensorProto],
        outputs: int,
        options: argparse.Namespace,
    ) -> None:
        self.stream = torch.cuda.Stream()
        infos = [helper.make_tensor_value_info(n, t, s) for n, (t, s, _) in tensors.items()]
        results = [node.output[0] for node in nodes]
        graph = helper.make_graph(
            nodes,
            "linears",
            infos,
            [helper.make_tensor_value_info(n, TensorProto.FLOAT16, [1, outputs]) for n in results],
            constants,
        )
        opsets = [
            helper.make_opsetid("", 21),
            helper.make_opsetid("com.microsoft", 1),
            helper.make_opsetid("nmexport", 2),
        ]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 3
        settings.register_custom_ops_library(str(options.library))
        provider = {"enable_cuda_graph": "1", "user_compute_stream": str(self.stream.cuda_stream)}
        self.session = onnxruntime.InferenceSession(
            model, settings, providers=[("CUDAExecutionProvider", provider), "CPUExecutionProvider"]
        )
        self.y = torch.empty(len(nodes), outputs, device="cuda", dtype=torch.float16)
        self.tensors = tensors  # they stay alive as long as their addresses are bound
        self.binding = self.session.io_binding()
        for name, (element, shape, tensor) in tensors.items():
            self.binding.bind_input(name, "cuda", 0, element, shape, tensor.data_ptr())
        for i, name in enumerate(results):
            place = self.y[i].data_ptr()
            self.binding.bind_output(name, "cuda", 0, TensorProto.FLOAT16, [1, outputs], place)
        self.run_options = onnxruntime.RunOptions()
        self.run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        torch.cuda.synchronize()
        for _ in range(3):
            self()
        torch.cuda.synchronize()

    def __call__(self) -> None:
        self.session.run_with_iobinding(self.binding, self.run_options)


def ours(weight: Weight, x: torch.Tensor, keep: int, options: argparse.Namespace) -> Graph:
    """NMLinear with `keep` of 16 channels."""
    element = TensorProto.INT8 if weight.bits == 8 else TensorProto.INT4
    groups = 1 if weight.bits == 8 else weight.channels // GROUP
    rows = weight.by_channel()
    scale = weight.scale.expand(groups, -1).contiguous()
    scales = scale.cpu().numpy()
    tensors = {"X": (TensorProto.FLOAT16, [1, weight.channels], x)}
    constants = []
    for i in range(weight.copies):
        tensors[f"W{i}"] = (element, [weight.channels, weight.outputs], rows.clone())
        constants.append(
            helper.make_tensor(
                f"S{i}", TensorProto.FLOAT16, scales.shape, scales.tobytes(), raw=True
            )
        )
    # Between W and weight_scale: bias, shift, shift_weight, score_scale, channel_order.
    nodes = [
        helper.make_node(
            "NMLinear",
            ["X", f"W{i % weight.copies}", *[""] * 5, f"S{i % weight.copies}"],
            [f"Y{i}"],
            domain="nmexport",
            n=keep,
            m=16,
        )
        for i in range(weight.launches)
    ]
    return Graph(nodes, tensors, constants, weight.outputs, options)


def many_bits(weight: Weight, x: torch.Tensor, options: argparse.Namespace) -> Graph:
    """MatMulNBits."""
    raw = weight.by_output().cpu().numpy()
    scales = weight.scale.cpu().numpy()[:, None].repeat(weight.channels // GROUP, axis=1)
    constants = []
    for i in range(weight.copies):
        constants += [
            helper.make_tensor(f"B{i}", TensorProto.UINT8, raw.shape, raw.tobytes(), raw=True),
            helper.make_tensor(
                f"S{i}", TensorProto.FLOAT16, scales.shape, scales.tobytes(), raw=True
            ),
        ]
    nodes = [
        helper.make_node(
            "MatMulNBits",
            ["X", f"B{i % weight.copies}", f"S{i % weight.copies}"],
            [f"Y{i}"],
            domain="com.microsoft",
            K=weight.channels,
            N=weight.outputs,
            bits=weight.bits,
            block_size=GROUP,
        )
        for i in range(weight.launches)
    ]
    tensors = {"X": (TensorProto.FLOAT16, [1, weight.channels], x)}
    return Graph(nodes, tensors, constants, weight.outputs, options)


class Captured:
    """Launches of PyTorch in a CUDA graph; a call replays them."""

    def __init__(self, launch: Callable[[int], torch.Tensor], launches: int) -> None:
        self.stream = torch.cuda.Stream()
        with torch.cuda.stream(self.stream):
            for i in range(3):
                launch(i)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=self.stream):
            self.y = [launch(i) for i in range(launches)]
        self()
        torch.cuda.synchronize()

    def __call__(self) -> None:
        self.graph.replay()


def tiny_gemm(weight: Weight, x: torch.Tensor) -> Captured:
    """PyTorch's int4 kernel."""
    # It wants the higher half first, and scales and zeros [K / GROUP, O, 2].
    swapped = (weight.values[:, 0::2] << 4 | weight.values[:, 1::2]).contiguous()
    packed = [torch._convert_weight_to_int4pack(swapped, 8) for _ in range(weight.copies)]
    scale = weight.scale.bfloat16().expand(weight.channels // GROUP, -1)
    both = torch.stack([scale, torch.zeros_like(scale)], dim=-1).contiguous()
    row = x.bfloat16()
    return Captured(
        lambda i: torch._weight_int4pack_mm(row, packed[i % weight.copies], GROUP, both),
        weight.launches,
    )


def compiled(weight: Weight, x: torch.Tensor) -> Captured:
    """What torch.compile makes of a dense int8 linear."""
    rows = (weight.values.to(torch.int16) - weight.zero).to(torch.int8)
    copies = [rows.clone() for _ in range(weight.copies)]

    @torch.compile(dynamic=False, options={"coordinate_descent_tuning": True})
    def linear(row: torch.Tensor, w: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(row, w.to(row.dtype)) * scale

    return Captured(lambda i: linear(x, copies[i % weight.copies], weight.scale), weight.launches)


def pruned(x: torch.Tensor) -> torch.Tensor:
    """A row with zeros for the smaller half of every 16 channels."""
    order = x.abs().view(-1, 16).argsort(dim=1, descending=True, stable=True)
    kept = torch.zeros_like(order, dtype=torch.bool).scatter_(1, order[:, :8], 1)
    return torch.where(kept.view_as(x), x, 0)


def sides_of(
    weight: Weight, x: torch.Tensor, options: argparse.Namespace
) -> dict[str, Callable[[], Graph | Captured]]:
    """Every side of a weight."""
    sides: dict[str, Callable[[], Graph | Captured]] = {
        "ours 8:16": lambda: ours(weight, x, 8, options),
        "ours 8:16, pruned": lambda: ours(weight, pruned(x), 16, options),
        "ours dense": lambda: ours(weight, x, 16, options),
        "MatMulNBits": lambda: many_bits(weight, x, options),
    }
    if weight.bits == 8:
        sides["torch.compile"] = lambda: compiled(weight, x)
    else:
        sides["PyTorch int4"] = lambda: tiny_gemm(weight, x)
    return sides


def is_right(side: str, run: Graph | Captured, weight: Weight, x: torch.Tensor) -> bool:
    """Whether the first and the last launch give the product (8:16: that of the kept channels)."""
    expected = weight.product(pruned(x) if side.startswith("ours 8:16") else x)
    return all(
        ((run.y[i].double() - expected).norm() / expected.norm()).item() < 0.02 for i in (0, -1)
    )


def time_in_turns(
    sides: dict[str, Graph | Captured], launches: int, rounds: int
) -> dict[str, float]:
    """Microseconds a launch by the GPU's clock, medians."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 2):
        for name, side in sides.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            with torch.cuda.stream(side.stream):
                side()  # the host is ahead from here on
                start.record()
                for _ in range(4):
                    side()
                end.record()
            torch.cuda.synchronize()
            if turn >= 2:
                times[name].append(start.elapsed_time(end) * 1000 / (4 * launches))
    return {name: statistics.median(values) for name, values in times.items()}


def measure(
    bits: int, channels: int, outputs: int, options: argparse.Namespace
) -> dict[str, float]:
    """All sides of one shape that run here and are right."""
    weight = Weight(bits, channels, outputs)
    x = torch.randn(
        1, channels, device="cuda", generator=torch.Generator("cuda").manual_seed(1)
    ).half()
    sides = {}
    for name, build in sides_of(weight, x, options).items():
        try:
            side = build()
        except (RuntimeError, onnxruntime.capi.onnxruntime_pybind11_state.Fail) as error:
            print(f"  {name}: {str(error)[:300]}", flush=True)
            continue
        if is_right(name, side, weight, x):
            sides[name] = side
        else:
            print(f"  {name}: wrong, so not timed", flush=True)
    return time_in_turns(sides, weight.launches, options.rounds)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--library", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    onnxruntime.preload_dlls()
    rows = {}
    for channels, outputs in SHAPES:
        for bits in (8, 4):
            times = measure(bits, channels, outputs, options)
            dense = min(us for name, us in times.items() if not name.startswith("ours 8:16"))
            key = f"{channels}x{outputs} int{bits}"
            rows[key] = times
            figures = ", ".join(f"{name} {us:.2f}" for name, us in times.items())
            ratios = [dense / us for name, us in times.items() if name.startswith("ours 8:16")]
            print(
                f"{key}: {figures} us; best dense over 8:16",
                *(f"{r:.2f}" for r in ratios),
                flush=True,
            )
            torch.cuda.empty_cache()
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
