"""Times every plan of the decode kernel and keeps the best of each shape."""

from __future__ import annotations

import torch
from arguments import Layer, Plan, plan_of
from cases import SHAPES
from check import worst_excess
from library import ROW_WIDTHS, Lab

from timing import Bench, time_interleaved

SWEPT_UNROLLS = ((4, 1, 32), (8, 1, 24), (8, 1, 16), (16, 1, 16), (16, 0, 16))


def sweep_plans(channels: int, outputs: int) -> list[Plan]:
    """Plans that fill the GPU: enough CTAs, and no more warps than it holds at once."""
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
