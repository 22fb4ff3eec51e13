"""Times the product: against dense rivals, over prompts, few tokens, with every option."""

from __future__ import annotations

import ctypes
import math

import torch
from arguments import DTYPES, Layer, LinearArgs, MaskArgs, plan_of
from cases import SHAPES, Case, make_layer
from library import Lab, stream

from timing import ROTATED_BYTES, Bench, Launch, capture, time_interleaved


def best_blaslt(lab: Lab, bench: Bench, transposed: list[torch.Tensor]) -> dict[str, Launch]:
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
        launchers: dict[str, Launch] = {
            f"sparse {label}": bench.sparse(lab, plan_of(label)) for label in best["sparse"]
        }
        launchers["sparse product"] = bench.sparse(lab, None)
        launchers |= {label: bench.sparse(lab, plan_of(label), n=16) for label in best["dense"]}
        launchers |= best_blaslt(lab, bench, transposed)
        launchers |= torch_products(bench, transposed)
        graphs = {label: bench.graph(launch) for label, launch in launchers.items()}
        times = time_interleaved(graphs, bench.launches, rounds)
        lab.results.setdefault("shapes", {})[name] = times
        del bench, transposed, graphs, launchers
        torch.cuda.empty_cache()


def torch_products(bench: Bench, transposed: list[torch.Tensor]) -> dict[str, Launch]:
    """PyTorch's own products, of W in either layout."""
    x, y, w, copies = bench.x, bench.y, bench.w, bench.copies
    return {
        "torch x@W": lambda i: torch.mm(x[i % 2], w[i % copies], out=y[i % 2]),
        "torch linear": lambda i: torch.mm(x[i % 2], transposed[i % copies].t(), out=y[i % 2]),
        "torch mv": lambda i: torch.mv(transposed[i % copies], x[i % 2][0], out=y[i % 2][0]),
    }


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

            def dense(i: int, b: Bench = bench) -> None:
                torch.mm(x, b.w[i % b.copies], out=y)

            def masked(i: int, b: Bench = bench) -> None:
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
        kept = []  # the arguments point into these layers' tensors
        for options in ("", "o", "a", "oa", "ow", "owsb", "bd", "v"):
            layer = make_layer(Case(torch.bfloat16, 1, channels, outputs, 8, 16, options))
            arguments = []
            for w in weights:
                layer.w = w
                arguments.append(layer.decode_args(y))
            kept.append(layer)

            def launch(i: int, calls: list[LinearArgs] = arguments) -> None:
                lab.call("labDecode", calls[i % copies])

            graphs[options or "none"] = capture(launch, launches)
        rows[name] = {k: v["us"] for k, v in time_interleaved(graphs, launches, rounds).items()}
        print("options", name, " ".join(f"{k} {v:.2f}" for k, v in rows[name].items()), flush=True)
        del weights, graphs, kept
        torch.cuda.empty_cache()


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
