"""The report: pinned keys, pages that need nothing but themselves, looked at in a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from nmexport.recipe import GatesSection, ModelSection, Recipe
from nmexport.report import figures, learning, pages, rows
from nmexport.report.document import weights_note
from nmexport.report.model import (
    Scores,
    Weights,
    json_of,
    read_report,
    report_from,
)
from nmexport.report.plots import layer_place

from tests.support.sample_report import STORED_DENSE, sample_report

if TYPE_CHECKING:
    from pathlib import Path

# The product's fixed keys; `[]` is a list, its entry a row.
FIXED: dict[str, Any] = {
    "schema": None,
    "model": {"id": None, "revision": None, "parameters": None},
    "pattern": None,
    "criterion": None,
    "mitigations": None,
    "phases": None,
    "target": None,
    "sparsity": {
        "linears": None,
        "sparsified": None,
        "achieved": None,
        "layers": [{"name": None, "kept": None, "total": None}],
    },
    "accuracy": {
        "dataset": None,
        "tokens": None,
        "dense": {"perplexity": None},
        "sparse": {"perplexity": None},
        "perplexity_ratio": None,
        "kl_mean": None,
        "top1_agreement": None,
        "tasks": {},
    },
    "parity": {
        leg: {"max_abs": None, "top1_agreement": None}
        for leg in ("torch_onnx", "torch_engine", "onnx_engine")
    },
    "latency": {
        "runtime": None,
        "device": None,
        **{
            side: {
                "prefill": dict.fromkeys(("tokens", "p50_ms", "p90_ms", "p99_ms", "tokens_per_s")),
                "decode": dict.fromkeys(
                    ("batch", "context", "p50_ms", "p90_ms", "p99_ms", "tokens_per_s")
                ),
            }
            for side in ("dense", "sparse")
        },
        "speedup": {"prefill": None, "decode": None},
    },
    "memory": {"peak_rss_bytes": None, "device_bytes": None, "artifact_bytes": None},
    "gates": [{"name": None, "limit": None, "value": None, "passed": None}],
    "verdict": None,
}


def assert_has_keys(document: Any, fixed: Any, where: str = "report") -> None:
    if isinstance(fixed, list):
        assert isinstance(document, list), where
        for row in document:
            assert_has_keys(row, fixed[0], f"{where}[]")
    elif isinstance(fixed, dict):
        assert isinstance(document, dict), where
        for key, inner in fixed.items():
            assert key in document, f"{where}.{key}"
            assert_has_keys(document[key], inner, f"{where}.{key}")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    pages.write(sample_report(folder), folder)
    return folder / "report.html"


def test_report_has_the_products_keys(page: Path) -> None:
    report = json.loads(page.with_name("report.json").read_text())
    assert report["schema"] == 1
    assert report["gates"]
    assert_has_keys(report, FIXED)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    for native in (True, False):
        report = sample_report(tmp_path, layers=2, native=native)
        pages.write(report, tmp_path)
        assert read_report(tmp_path / "report.json") == report


def test_an_absent_leg_keeps_its_keys_and_says_why(tmp_path: Path) -> None:
    report = sample_report(tmp_path, native=False)
    document = json_of(report)
    assert_has_keys(document, FIXED)
    assert document["parity"]["torch_engine"]["max_abs"] is None
    for text in (pages.markdown(report), pages.html(report)):
        assert "not measured" in text
        assert "the native op library is not built here" in text


@pytest.mark.parametrize(
    ("limit", "verdict", "words"),
    [
        (2.05, "pass", "All gates passed"),
        (1.2, "fail", "A gate failed"),
        (None, "none", "no gates"),
    ],
)
def test_verdict(tmp_path: Path, limit: float | None, verdict: str, words: str) -> None:
    recipe = Recipe(
        model=ModelSection(id="smollm2"), gates=GatesSection(max_perplexity_ratio=limit)
    )
    report = sample_report(tmp_path, layers=2, recipe=recipe)
    assert report.verdict == verdict
    assert words in pages.html(report)
    assert words in pages.markdown(report)


def test_dense_in_the_same_integers_stands_between_the_two(tmp_path: Path) -> None:
    recipe = Recipe(model=ModelSection(id="smollm2", weights="int8"))
    plain = sample_report(tmp_path, layers=2, recipe=recipe)
    assert "In the same integers" not in pages.html(plain)
    report = replace(plain, stored_dense=STORED_DENSE)
    for text in (pages.html(report), pages.markdown(report)):
        for words in ("dense int8", "8:16 int8", "12.34", "0.0021", "9.87 ms", "6.54 ms"):
            assert words in text
        assert "decodes 1.51x and reads prompts 1.43x as fast" in text
        assert "165" in text


def test_pages_say_in_what_the_weights_are_stored(tmp_path: Path) -> None:
    recipe = Recipe(model=ModelSection(id="smollm2", weights="int8:64"))
    report = sample_report(tmp_path, layers=2, recipe=recipe)
    assert report.weights == Weights(dense="float32", sparse="int8:64")
    for text in (pages.html(report), pages.markdown(report)):
        assert "int8:64 weights against dense float32" in text
    note = weights_note(recipe, None, None, alone=False)
    assert note is not None
    assert "sparsity and quantisation together" in note
    alike = sample_report(tmp_path, layers=2)
    assert alike.weights == Weights(dense="float32", sparse="float32")
    assert "weights against" not in pages.html(alike)
    plain = Recipe(model=ModelSection(id="smollm2"))
    assert weights_note(plain, None, None, alone=False) is None


def test_equal_reports_make_equal_pages(tmp_path: Path) -> None:
    report = sample_report(tmp_path, layers=2)
    assert pages.html(report) == pages.html(report)


def test_page_is_self_contained(page: Path) -> None:
    text = page.read_text()
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!#)""", text)
    assert not re.search(r"@import|<script|<link|<iframe|url\((?!#)", text)
    assert text.count("<svg ") == 6
    assert len(set(re.findall(r'aria-label="([^"]+)"', text))) >= 5


def test_svg_ids_do_not_collide(page: Path) -> None:
    """Two plots in one document: a reference must find its own definition or an equal one."""
    definitions: dict[str, str] = {}
    for name, body in re.findall(r'<path id="([^"]+)"(.*?)/>', page.read_text(), re.DOTALL):
        assert definitions.setdefault(name, body) == body


def test_names_are_escaped(tmp_path: Path) -> None:
    recipe = Recipe(model=ModelSection(id="<script>alert(1)</script>"))
    text = pages.html(sample_report(tmp_path, layers=1, recipe=recipe))
    assert "<script>" not in text


def test_markdown_tables_are_whole(page: Path) -> None:
    lines = page.with_name("report.md").read_text().splitlines()
    tables = 0
    for before, line in pairwise(lines):
        if re.fullmatch(r"(\|-+)+\|", line):
            tables += 1
            assert before.count("|") == line.count("|")
        elif line.startswith("|") and before.startswith("|"):
            assert line.count("|") == before.count("|"), line
    assert tables == 8
    assert "\n\n\n\n" not in "\n".join(lines)


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (None, 4, "not measured"),
        (29.6123, 4, "29.61"),
        (12345.6, 4, "12,350"),
        (0.0, 4, "0.0"),
        (3.4e-5, 2, "3.40e-05"),
        (2.0, 3, "2"),
    ],
)
def test_numbers_for_people(value: float | None, digits: int, text: str) -> None:
    assert figures.number(value, digits) == text


def test_sizes_and_counts_for_people() -> None:
    assert figures.size(999) == "999 B"
    assert figures.size(812_345_678) == "812.3 MB"
    assert figures.size(None) == "not measured"
    assert figures.count(134_515_008) == "134.5 million"
    assert figures.count(7_241_732_096) == "7.242 billion"
    assert figures.count(8176) == "8,176"
    assert figures.percent(None) == figures.speedup(None) == "not measured"


def test_method_in_words(tmp_path: Path) -> None:
    report = sample_report(tmp_path, layers=1)
    assert rows.method(report) == "8:16, ACT, balanced groups, no mitigation"
    decode = replace(report, mitigations=("d-pts", "var"), phases="decode")
    assert rows.method(decode).endswith("d-pts + var, decode only")


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.12.mlp.up_proj", (12, "up_proj")),
        ("transformer.h.3.attn.c_attn", (3, "c_attn")),
        ("model.layers.0.fused", (0, "fused")),
        ("lm_head", (7, "lm_head")),
    ],
)
def test_layer_places(name: str, place: tuple[int, str]) -> None:
    assert layer_place(name, 7) == place


# -- in a browser ---------------------------------------------------------------------------------

_BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--no-first-run",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)
# What sticks out of the page to the right, other than inside its own scrolling box.
_MEASURE = """<script>
addEventListener("load", () => {
  const width = document.documentElement.clientWidth;
  const out = [...document.querySelectorAll("main *")].filter((e) =>
    !e.closest(".scroll, pre, svg, details:not([open])")
    && e.getBoundingClientRect().right > width + 1);
  document.title = JSON.stringify({page: document.documentElement.scrollWidth, width,
    out: out.map((e) => e.tagName + "." + e.className).slice(0, 5),
    hidden: [...document.querySelectorAll(".scroll")].filter((e) =>
      e.clientWidth && e.scrollWidth > e.clientWidth + 1).length});
});
</script>"""


def _browse(page: Path, profile: Path, *arguments: str) -> str:
    done = subprocess.run(
        [_BROWSER, *_FLAGS, f"--user-data-dir={profile}", *arguments, page.as_uri()],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout


@pytest.mark.skipif(not _BROWSER, reason="no Chromium on PATH")
@pytest.mark.parametrize("width", [1200, 600, 390])
def test_nothing_overflows_in_a_browser(page: Path, tmp_path: Path, width: int) -> None:
    probe = tmp_path / "probe.html"
    probe.write_text(page.read_text().replace("</body>", _MEASURE + "</body>"))
    # A frame sets the width: browsers have a least width for their own window.
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<iframe src="probe.html" style="width:{width}px;height:900px;border:0"></iframe>'
        "<script>addEventListener('load', () => setTimeout(() => {"
        "document.title = frames[0].document.title}, 300));</script>"
    )
    dom = _browse(
        frame, tmp_path / "profile", "--allow-file-access-from-files", "--dump-dom",
        "--virtual-time-budget=4000",
    )  # fmt: skip
    found = re.search(r"<title>(.*?)</title>", dom)
    assert found, dom[:500]
    measured = json.loads(found[1])
    assert measured["width"] == width
    assert measured["page"] <= width, measured
    assert measured["out"] == []
    if width >= 600:
        assert measured["hidden"] == 0  # no table needs to be scrolled


@pytest.mark.skipif(not _BROWSER, reason="no Chromium on PATH")
def test_the_picture_shows_the_page(page: Path, tmp_path: Path) -> None:
    import matplotlib.image

    shot = tmp_path / "shot.png"
    _browse(page, tmp_path / "profile", "--window-size=1200,2400", f"--screenshot={shot}")
    pixels = (matplotlib.image.imread(shot)[..., :3] * 255).round().astype(int)
    assert pixels.shape[:2] == (2400, 1200)
    sparse = np.abs(pixels - [0x00, 0x72, 0xB2]).max(axis=-1) < 12
    advice = np.abs(pixels - [0xB3, 0x26, 0x1E]).max(axis=-1) < 12
    ink = pixels.sum(axis=-1) < 3 * 90
    assert sparse.sum() > 500  # plots drew their lines
    assert advice[:200].sum() > 2000  # against the sample: the first thing seen
    assert 0.005 < ink.mean() < 0.2  # text, and neither a blank nor a black page
    bands = ink.reshape(24, 100, 1200).any(axis=(1, 2))
    assert bands.sum() >= 20  # from top to bottom


def test_tasks_and_decode_only_stand_beside_the_perplexity(tmp_path: Path) -> None:
    report = sample_report(tmp_path)
    assert "| local_choice, acc | 1,200 | 0.52 ± 0.02 | 0.47 ± 0.02 | -0.05 ± 0.01 |" in (
        pages.markdown(report)
    )
    assert "<td>-0.05<small>± 0.01</small></td>" in pages.html(report)
    for page in (pages.markdown(report), pages.html(report)):
        assert "1.612" in page
        assert "in all phases 1.936" in page


def test_a_decode_only_figure_that_is_missing_says_why(tmp_path: Path) -> None:
    report = sample_report(tmp_path)
    unmeasured = replace(report.accuracy, decode_only=Scores(why="no cache"))
    assert "not measured: no cache" in pages.markdown(replace(report, accuracy=unmeasured))
    bare = replace(report.accuracy, decode_only=None, tasks={})
    page = pages.html(replace(report, accuracy=bare))
    assert "decode only" not in page
    assert "documents" not in page


def test_calibration_says_what_learning_and_grouping_did(tmp_path: Path) -> None:
    report = sample_report(tmp_path)
    for page in (pages.html(report), pages.markdown(report)):
        assert "Constants learned in 120 steps of 4 x 256 tokens" in page
        assert "the divergence fell from 0.620 to 0.236" in page
        assert "distance from consecutive groups" in page
    assert "Loss of the learned constants by step" in pages.html(report)
    bare = replace(report, calibration=learning.section(None, []))
    assert "Calibration</h2>" not in pages.html(bare)
    assert "## Calibration" not in pages.markdown(bare)
    older = {key: value for key, value in json_of(report).items() if key != "calibration"}
    assert "Calibration</h2>" not in pages.html(report_from(older))
