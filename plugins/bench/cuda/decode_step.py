"""A whole decoder on ONNX Runtime's CUDA provider, dense beside sparse: decode steps as CUDA graphs, and prefill.

    python3 plugins/bench/cuda/decode_step.py --library libnmexport_onnxruntime.so --out DIR

Mistral-7B's shapes with random weights: 32 layers, hidden 4096, 32 heads and 8 KV heads of 128, intermediate 14336,
vocabulary 32000; q/k/v fused to one linear of 6144 columns, gate and up to one of 28672; embedding and output head
dense. Both sides are the same graph over the very same weights in device memory, which enter as inputs (so that no
copy is made); one has MatMul where the other has NMLinear 8:16. Attention is GroupQueryAttention with the cache written
in place. A third side, NMLinear 16:16, must agree with the dense one before anything is timed.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

import onnxruntime

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER, VOCABULARY = 4096, 32, 8, 128, 14336, 32000
LINEARS = {
    "qkv": (HIDDEN, (HEADS + 2 * KV_HEADS) * HEAD_DIM),
    "o": (HEADS * HEAD_DIM, HIDDEN),
    "gate_up": (HIDDEN, 2 * INNER),
    "down": (INNER, HIDDEN),
}
SIDES = {"dense": None, "sparse": 8, "all kept": 16}
T = TensorProto.FLOAT16


@dataclass
class Weights:
    """Every constant of the model, by input name."""

    layers: int
    longest: int
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        def random(*shape: int, scale: float) -> torch.Tensor:
            return torch.empty(shape, device="cuda", dtype=torch.float16).normal_(0, scale)

        self.tensors["embedding"] = random(VOCABULARY, HIDDEN, scale=1.0)
        self.tensors["head"] = random(HIDDEN, VOCABULARY, scale=1 / math.sqrt(HIDDEN))
        self.tensors["ones"] = torch.ones(HIDDEN, device="cuda", dtype=torch.float16)
        angles = torch.arange(self.longest, device="cuda")[:, None] / 10000 ** (
            torch.arange(HEAD_DIM // 2, device="cuda") * 2 / HEAD_DIM
        )
        self.tensors["cos"], self.tensors["sin"] = angles.cos().half(), angles.sin().half()
        for layer in range(self.layers):
            for name, (channels, outputs) in LINEARS.items():
                self.tensors[f"{name}.{layer}"] = random(
                    channels, outputs, scale=1 / math.sqrt(channels)
                )


def build(
    layers: int, keep: int | None, context: int, new: int, longest: int, weights: Weights
) -> bytes:
    """The graph of one step: `new` tokens after `context` cached ones; logits of the last token."""
    nodes, inputs, outputs = [], [], []

    def value(name: str, shape: list[int], element: int = T) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, element, shape)

    def linear(x: str, weight: str, y: str) -> None:
        if keep is None:
            nodes.append(helper.make_node("MatMul", [x, weight], [y]))
        else:
            nodes.append(
                helper.make_node("NMLinear", [x, weight], [y], domain="nmexport", n=keep, m=16)
            )

    def contrib(op: str, ins: list[str], outs: list[str], **attributes: object) -> None:
        nodes.append(helper.make_node(op, ins, outs, domain="com.microsoft", **attributes))

    inputs.append(value("ids", [1, new], TensorProto.INT64))
    inputs.append(value("seqlens", [1], TensorProto.INT32))
    for name, tensor in weights.tensors.items():
        inputs.append(value(name, list(tensor.shape)))
    cache = [1, KV_HEADS, longest, HEAD_DIM]
    nodes.append(helper.make_node("Gather", ["embedding", "ids"], ["h.0"]))
    nodes.append(
        helper.make_node(
            "SimplifiedLayerNormalization", ["h.0", "ones"], ["x.0"], epsilon=1e-5, axis=-1
        )
    )
    residual = "h.0"
    for i in range(layers):
        for side in ("key", "value"):
            inputs.append(value(f"past_{side}.{i}", cache))
            outputs.append(value(f"present_{side}.{i}", cache))
        linear(f"x.{i}", f"qkv.{i}", f"qkvs.{i}")
        contrib(
            "GroupQueryAttention",
            [
                f"qkvs.{i}",
                "",
                "",
                f"past_key.{i}",
                f"past_value.{i}",
                "seqlens",
                "total",
                "cos",
                "sin",
            ],
            [f"attention.{i}", f"present_key.{i}", f"present_value.{i}"],
            num_heads=HEADS,
            kv_num_heads=KV_HEADS,
            do_rotary=1,
        )
        linear(f"attention.{i}", f"o.{i}", f"os.{i}")
        contrib(
            "SkipSimplifiedLayerNormalization",
            [f"os.{i}", residual, "ones"],
            [f"m.{i}", "", "", f"r.{i}"],
            epsilon=1e-5,
        )
        linear(f"m.{i}", f"gate_up.{i}", f"gates.{i}")
        nodes.append(
            helper.make_node("Split", [f"gates.{i}"], [f"g.{i}", f"u.{i}"], axis=-1, num_outputs=2)
        )
        contrib("QuickGelu", [f"g.{i}"], [f"a.{i}"], alpha=1.0)
        nodes.append(helper.make_node("Mul", [f"a.{i}", f"u.{i}"], [f"p.{i}"]))
        linear(f"p.{i}", f"down.{i}", f"d.{i}")
        contrib(
            "SkipSimplifiedLayerNormalization",
            [f"d.{i}", f"r.{i}", "ones"],
            [f"x.{i + 1}", "", "", f"h.{i + 1}"],
            epsilon=1e-5,
        )
        residual = f"h.{i + 1}"
    last = f"x.{layers}"
    constants = [numpy_helper.from_array(_array([context + new], "int32").reshape(()), "total")]
    if new > 1:
        constants.append(numpy_helper.from_array(_array([new - 1], "int64"), "last"))
        nodes.append(helper.make_node("Gather", [last, "last"], ["final"], axis=1))
        last = "final"
    nodes.append(helper.make_node("MatMul", [last, "head"], ["logits"]))
    outputs.append(value("logits", [1, 1, VOCABULARY]))
    graph = helper.make_graph(nodes, "step", inputs, outputs, constants)
    opsets = [
        helper.make_opsetid("", 20),
        helper.make_opsetid("com.microsoft", 1),
        helper.make_opsetid("nmexport", 2),
    ]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def _array(values: list[int], dtype: str):
    import numpy as np

    return np.array(values, dtype=dtype)


class Step:
    """One side of one step, bound to its buffers; a call enqueues it."""

    def __init__(
        self,
        options: argparse.Namespace,
        weights: Weights,
        keep: int | None,
        context: int,
        new: int,
        cache: dict[str, torch.Tensor],
        graphs: bool,
    ) -> None:
        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 3
        settings.register_custom_ops_library(str(options.library))
        self.stream = torch.cuda.Stream()
        provider = {
            "device_id": "0",
            "enable_cuda_graph": "1" if graphs else "0",
            "user_compute_stream": str(self.stream.cuda_stream),
        }
        longest = weights.longest
        model = build(weights.layers, keep, context, new, longest, weights)
        self.session = onnxruntime.InferenceSession(
            model, settings, providers=[("CUDAExecutionProvider", provider), "CPUExecutionProvider"]
        )
        if self.session.get_providers()[0] != "CUDAExecutionProvider":
            raise SystemExit("the CUDA provider did not load")
        ids = torch.randint(
            0, VOCABULARY, (1, new), device="cuda", generator=torch.Generator("cuda").manual_seed(3)
        )
        self.tensors = {
            **weights.tensors,
            **cache,
            "ids": ids,
            "seqlens": torch.tensor([context + new - 1], device="cuda", dtype=torch.int32),
        }
        self.logits = torch.empty(1, 1, VOCABULARY, device="cuda", dtype=torch.float16)
        self.binding = self.session.io_binding()
        kinds = {torch.float16: T, torch.int64: TensorProto.INT64, torch.int32: TensorProto.INT32}
        for value in self.session.get_inputs():
            tensor = self.tensors[value.name]
            self.binding.bind_input(
                value.name, "cuda", 0, kinds[tensor.dtype], list(tensor.shape), tensor.data_ptr()
            )
        for value in self.session.get_outputs():
            tensor = (
                self.logits
                if value.name == "logits"
                else cache[value.name.replace("present", "past")]
            )
            self.binding.bind_output(
                value.name, "cuda", 0, T, list(tensor.shape), tensor.data_ptr()
            )
        self.run_options = onnxruntime.RunOptions()
        self.run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        for _ in range(4):
            self()
        torch.cuda.synchronize()

    def __call__(self) -> None:
        self.session.run_with_iobinding(self.binding, self.run_options)


def time_steps(steps: dict[str, Step], rounds: int, calls: int) -> dict[str, dict[str, float]]:
    """Milliseconds of one call, the sides in turn: on the device, and by the clock of a single synchronous call."""
    device = {name: [] for name in steps}
    clock = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            with torch.cuda.stream(step.stream):
                step()
                start.record()
                for _ in range(calls):
                    step()
                end.record()
            torch.cuda.synchronize()
            device[name].append(start.elapsed_time(end) / calls)
            began = time.perf_counter()
            step()
            torch.cuda.synchronize()
            clock[name].append((time.perf_counter() - began) * 1e3)
    return {
        name: {
            "device_ms": statistics.median(device[name]),
            "clock_ms": statistics.median(clock[name]),
        }
        for name in steps
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--library", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--contexts", default="128,2048,8192")
    parser.add_argument("--prompts", default="512,2048")
    parser.add_argument("--rounds", type=int, default=12)
    options = parser.parse_args()
    onnxruntime.preload_dlls()  # CUDA's libraries, from wherever PyTorch's packages are
    torch.manual_seed(1)
    longest = 8192 + 256
    weights = Weights(options.layers, longest)
    cache = {
        f"past_{side}.{i}": torch.empty(
            1, KV_HEADS, longest, HEAD_DIM, device="cuda", dtype=torch.float16
        ).normal_()
        for i in range(options.layers)
        for side in ("key", "value")
    }
    results: dict[str, object] = {"layers": options.layers, "runtime": onnxruntime.__version__}
    try:
        for context in map(int, options.contexts.split(",")):
            steps = {
                name: Step(options, weights, keep, context, 1, cache, graphs=True)
                for name, keep in SIDES.items()
            }
            report(results, f"decode {context}", steps, options.rounds, 10)
        for prompt in map(int, options.prompts.split(",")):
            steps = {
                name: Step(options, weights, keep, 0, prompt, cache, graphs=False)
                for name, keep in SIDES.items()
            }
            report(results, f"prefill {prompt}", steps, max(3, options.rounds // 3), 2)
    finally:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "decode_step.json").write_text(json.dumps(results, indent=1))


def report(
    results: dict[str, object], name: str, steps: dict[str, Step], rounds: int, calls: int
) -> None:
    for step in steps.values():
        step()
    torch.cuda.synchronize()
    dense, sparse, kept = (steps[s].logits.float() for s in SIDES)
    agreement = ((kept - dense).norm() / dense.norm()).item()
    distance = ((sparse - dense).norm() / dense.norm()).item()
    times = time_steps(steps, rounds, calls)
    row = {
        **times,
        "all_kept_error": agreement,
        "sparse_distance": distance,
        "ratio": times["dense"]["device_ms"] / times["sparse"]["device_ms"],
    }
    results[name] = row
    print(name, json.dumps(row), flush=True)
    if not agreement < 0.05:
        raise SystemExit("NMLinear 16:16 and MatMul disagree")


if __name__ == "__main__":
    main()
