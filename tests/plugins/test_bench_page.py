"""The page of CPU measurements: every figure that was taken is on it, losses too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from nmexport.bench.kernels import KernelSettings, bench_kernels
from nmexport.runtimes import native

from tests.support.plugin_build import load_script

SCRIPT = Path(__file__).resolve().parents[2] / "plugins" / "bench" / "page.py"


@pytest.fixture(scope="module")
def page() -> Any:
    return load_script(SCRIPT)


def latency(prompt: int, speed: float) -> dict[str, Any]:
    side = {
        "prefill": {"tokens": prompt, "p50_ms": 10.0 * prompt},
        "decode": {"context": 128, "p50_ms": 7.0},
    }
    interval = [speed - 0.02, speed + 0.02]
    return {
        "dense": side,
        "sparse": side,
        "speedup": {
            "prefill": speed,
            "decode": 1.5,
            "prefill_interval": interval,
            "decode_interval": interval,
        },
    }


def model(**more: Any) -> dict[str, Any]:
    return {
        "name": "a model",
        "dtype": "float32",
        "weights": "float",
        "pattern": "8:16",
        "mitigations": ["var"],
        "bytes": 1000,
        "runs": 30,
        "latency": [latency(128, 1.1), latency(512, 0.9)],
        **more,
    }


def figures(**more: Any) -> dict[str, Any]:
    empty = {"date": "", "cpu": "", "cores": 1, "runtime": "", "variant": ""}
    return {**empty, "kernels": [], "prompts": [], "models": [], **more}


@pytest.mark.skipif(native.find_library() is None, reason="no native library")
def test_every_figure_is_on_the_page(page: Any) -> None:
    kernels = bench_kernels(
        [(64, 48), (32, 32)],
        (1, 2, 3, 4),
        KernelSettings(
            threads=(1, 2), dtypes=page.DTYPES, seconds=0.0, min_runs=3, rotated_bytes=1
        ),
    ).as_json()
    for row in kernels["results"]:
        row["float32"]["ratio"] = 0.42  # a loss
    prompts = bench_kernels(
        [(64, 48)], (5,), KernelSettings(rivals=False, seconds=0.0, min_runs=3, rotated_bytes=1)
    ).as_json()
    found = figures(
        cpu="a processor",
        cores=2,
        kernels=kernels["results"],
        prompts=prompts["results"],
        models=[model(), model(name="another", weights="int8")],
    )
    text = page.page(found)
    assert "**a processor**, 2 cores" in text
    lines = text.splitlines()
    decode = [line for line in lines if line.startswith("| 64 x 48 | ") and "GB/s" in line]
    assert [line.split(" | ")[1] for line in decode] == [*page.DTYPES] * 2
    assert "| 32 x 32 | 2 | 0.42x | 0.42x | 0.42x | 0.42x |" in lines
    assert any(line.startswith("| 64 x 48 | 5 | ") for line in lines)
    prompt = "prompt of 512 | 5120.00 | 5120.00 | 0.90x | 0.88 to 0.92 |"
    assert f"| a model | float32, float32 | {prompt}" in lines
    assert f"| another | float32, int8 | {prompt}" in lines
    step = "token after 128 | 7.00 | 7.00 | 1.50x | 1.08 to 1.12 |"
    assert f"| a model | float32, float32 | {step}" in lines
    drawn = page.chart(found["kernels"])
    assert drawn.startswith("<svg ")
    assert drawn.count("32 x 32, ") == 2


def test_without_a_model_there_is_no_table_of_models(page: Any) -> None:
    assert "Whole models" not in page.page(figures())


def test_a_run_that_was_cut_off_goes_on_after_what_is_kept(page: Any, tmp_path: Path) -> None:
    path, asked = tmp_path / "kept.json", []

    def measured() -> list[int]:
        asked.append(1)
        return [7]

    assert page.Kept(path, {"cpu": "a"}).part("one", measured) == [7]
    assert page.Kept(path, {"cpu": "a"}).part("one", measured) == [7]
    assert len(asked) == 1
    page.Kept(path, {"cpu": "another"}).part("one", measured)
    assert len(asked) == 2


def test_the_page_is_written_again_from_kept_figures(page: Any, tmp_path: Path) -> None:
    kept = tmp_path / "figures.json"
    kept.write_text(json.dumps(figures(cpu="a processor", models=[model()])))
    page.main(["--from", str(kept), "--into", str(tmp_path)])
    assert "a processor" in (tmp_path / "README.md").read_text()
    assert (tmp_path / "cpu.svg").read_text().startswith("<svg ")
    assert json.loads((tmp_path / "cpu.json").read_text())["cpu"] == "a processor"
