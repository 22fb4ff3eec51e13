"""Kernel lab: builds, checks against float64, then times; needs a GPU, nvcc and PyTorch.

    python3 plugins/bench/cuda/lab --out DIR [--stages check,sweep,grouped,shapes,chain,prefill,tokens,options,rivals] [--library liblab.so]

Timing protocol: weights rotate through at least 600 MB so that no launch finds its rows in L2; launches are captured
into a CUDA graph; variants of one shape are interleaved, replay by replay; medians with the 10 % and 90 % quantiles.
Nothing is timed before it agrees with the reference.
"""

from __future__ import annotations

import argparse
import ctypes
import json
from pathlib import Path

import torch
from cases import SHAPES
from chain import chain
from check import check
from library import Lab, build_library
from measure import few_tokens, fixed_cost, options_cost, prefill, profile, roofline, shapes

from report import report, table_rows
from sweep import sweep, sweep_grouped


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
    lab = Lab(ctypes.CDLL(str(library)), library.parent)
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
