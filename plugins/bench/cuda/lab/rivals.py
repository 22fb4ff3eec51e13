"""Rivals of the sparse GEMV, written in Triton and taken from cuSPARSELt: what a user could run instead.

* a threshold GEMV in the manner of TEAL: rows of W [K, O] whose |x| is at most a threshold are not loaded; split over K
  with float32 atomics, the output zeroed first (inside the timed region: the result needs it);
* dense int8 weights with a scale per output, as [O, K] rows: the same bytes as 16-bit 8:16;
* 2:4 activations on sparse tensor cores, with and without packing.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from timing import ROTATED_BYTES, capture, time_interleaved, timed_event


@triton.jit
def threshold_gemv(x, w, y, threshold, outputs, BLOCK_K: tl.constexpr, BLOCK_O: tl.constexpr):
    column = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    row = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    value = tl.load(x + row, eviction_policy="evict_last").to(tl.float32)
    keep = tl.abs(value) > threshold
    tile = tl.load(
        w + row[:, None] * outputs + column[None, :],
        mask=keep[:, None] & (column < outputs)[None, :],
        other=0.0,
        eviction_policy="evict_first",
    )
    tl.atomic_add(
        y + column, tl.sum(tile.to(tl.float32) * value[:, None], axis=0), mask=column < outputs
    )


@triton.jit
def int8_gemv(x, w, scale, y, channels, BLOCK_K: tl.constexpr, BLOCK_O: tl.constexpr):
    output = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    sums = tl.zeros((BLOCK_O, BLOCK_K), dtype=tl.float32)
    for start in range(0, channels, BLOCK_K):
        channel = start + tl.arange(0, BLOCK_K)
        value = tl.load(x + channel, eviction_policy="evict_last").to(tl.float32)
        tile = tl.load(
            w + output[:, None] * channels + channel[None, :], eviction_policy="evict_first"
        )
        sums += tile.to(tl.float32) * value[None, :]
    tl.store(y + output, (tl.sum(sums, axis=1) * tl.load(scale + output)).to(tl.bfloat16))


def measure(shapes: dict[str, tuple[int, int]]) -> dict[str, dict[str, float | str]]:
    """Medians in microseconds; the best configuration of each rival, cold weights, graph-timed."""
    rows: dict[str, dict[str, float | str]] = {}
    for name, (channels, outputs) in shapes.items():
        rows[name] = {**time_threshold(channels, outputs), **time_int8(channels, outputs)}
        print(
            "rivals",
            name,
            {k: round(v, 2) if isinstance(v, float) else v for k, v in rows[name].items()},
            flush=True,
        )
        torch.cuda.empty_cache()
    for tokens in (64, 512, 2048, 4096):
        for name in ("qkv", "gate_up", "down"):
            key = f"{name} {tokens}"
            try:
                rows[key] = time_two_four(tokens, *shapes[name])
            except RuntimeError as error:
                rows[key] = {"failed": str(error)[:200]}
            print("2:4", key, rows[key], flush=True)
            torch.cuda.empty_cache()
    return rows


def time_threshold(channels: int, outputs: int) -> dict[str, float | str]:
    copies = max(3, math.ceil(ROTATED_BYTES / (2 * channels * outputs)))
    weights = [
        torch.randn(channels, outputs, device="cuda", dtype=torch.bfloat16) for _ in range(copies)
    ]
    x = torch.randn(channels, device="cuda", dtype=torch.bfloat16)
    threshold = x.float().abs().median().item()
    y = torch.empty(outputs, device="cuda")
    expected = (
        torch.where(x.float().abs() > threshold, x.float(), 0.0).double() @ weights[0].double()
    )
    graphs = {}
    launches = copies * max(1, round(2000 / (channels * outputs / 3e6) / copies))
    for block_o, block_k, warps in (
        (256, 16, 4),
        (256, 32, 4),
        (256, 64, 4),
        (512, 16, 4),
        (512, 32, 4),
        (512, 64, 8),
        (1024, 16, 4),
        (1024, 32, 8),
        (1024, 64, 8),
        (128, 64, 4),
        (128, 128, 4),
        (256, 128, 8),
    ):

        def launch(
            i: int, block_o: int = block_o, block_k: int = block_k, warps: int = warps
        ) -> None:
            y.zero_()
            threshold_gemv[(triton.cdiv(outputs, block_o), channels // block_k)](
                x, weights[i % copies], y, threshold, outputs, block_k, block_o, num_warps=warps
            )

        launch(0)
        error = (y.double() - expected).norm() / expected.norm()
        if error < 1e-3:
            graphs[f"O{block_o} K{block_k} W{warps}"] = capture(launch, launches)
    times = time_interleaved(graphs, launches, 6)
    best = min(times, key=lambda k: times[k]["us"])
    return {"threshold_us": times[best]["us"], "threshold_config": best}


def time_int8(channels: int, outputs: int) -> dict[str, float | str]:
    copies = max(3, math.ceil(ROTATED_BYTES / (channels * outputs)))
    weights = [
        torch.randint(-127, 128, (outputs, channels), device="cuda", dtype=torch.int8)
        for _ in range(copies)
    ]
    scale = torch.rand(outputs, device="cuda")
    x = torch.randn(channels, device="cuda", dtype=torch.bfloat16)
    y = torch.empty(outputs, device="cuda", dtype=torch.bfloat16)
    expected = (weights[0].double() @ x.double()) * scale.double()
    launches = copies * max(1, round(2000 / (channels * outputs / 3e6) / copies))
    graphs = {}
    for block_o, block_k, warps in (
        (1, 2048, 4),
        (1, 4096, 8),
        (2, 1024, 4),
        (2, 2048, 4),
        (4, 512, 4),
        (4, 1024, 4),
        (4, 2048, 8),
        (8, 512, 4),
        (8, 1024, 8),
        (16, 512, 8),
    ):
        if channels % block_k:
            continue

        def launch(
            i: int, block_o: int = block_o, block_k: int = block_k, warps: int = warps
        ) -> None:
            int8_gemv[(outputs // block_o,)](
                x, weights[i % copies], scale, y, channels, block_k, block_o, num_warps=warps
            )

        launch(0)
        error = (y.double() - expected).norm() / expected.norm()
        if error < 1e-2:
            graphs[f"O{block_o} K{block_k} W{warps}"] = capture(launch, launches)
    times = time_interleaved(graphs, launches, 6)
    best = min(times, key=lambda k: times[k]["us"])
    return {"int8_us": times[best]["us"], "int8_config": best}


def time_two_four(tokens: int, channels: int, outputs: int) -> dict[str, float | str]:
    """Sparse tensor cores on 2:4 activations [tokens, K] against the dense product, events around ten calls."""
    w = torch.randn(channels, outputs, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(tokens, channels, device="cuda", dtype=torch.bfloat16)
    groups = x.view(tokens, -1, 4)
    kept = groups.abs().argsort(dim=2, descending=True)[:, :, :2]
    s = torch.zeros_like(groups).scatter_(2, kept, groups.gather(2, kept)).view_as(x)
    y = torch.empty(tokens, outputs, device="cuda", dtype=torch.bfloat16)
    packed = torch._cslt_compress(s)
    algorithm = torch._cslt_sparse_mm_search(packed, w)
    out = torch._cslt_sparse_mm(packed, w, alg_id=algorithm)
    error = (out.double() - s.double() @ w.double()).norm() / out.double().norm()
    calls = {
        "dense": lambda: torch.mm(x, w, out=y),
        "2:4": lambda: torch._cslt_sparse_mm(packed, w, alg_id=algorithm),
        "2:4 packing": lambda: torch._cslt_sparse_mm(torch._cslt_compress(s), w, alg_id=algorithm),
    }
    times: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in calls}
    for _ in range(12):
        for name, call in calls.items():
            start, end = timed_event(), timed_event()
            start.record()
            for _ in range(10):
                call()
            end.record()
            times[name].append((start, end))
    torch.cuda.synchronize()
    medians = {
        name: sorted(a.elapsed_time(b) * 100 for a, b in pairs[2:])[len(pairs) // 2 - 1]
        for name, pairs in times.items()
    }
    return {**{f"{k} us": round(v, 1) for k, v in medians.items()}, "error": round(error.item(), 5)}
