"""What was measured, as tables: for a reader, and as rows of the plan table."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch
from arguments import Plan, plan_of
from cases import SHAPES

if TYPE_CHECKING:
    from library import Lab

TARGETS = {"o": 1.60, "qkv": 1.72, "gate": 1.85, "gate_up": 1.92, "down": 1.85, "chain": 1.82}
FLOORS = {"o": 1.37, "qkv": 1.53, "gate": 1.70, "gate_up": 1.82, "down": 1.67, "chain": 1.65}


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
