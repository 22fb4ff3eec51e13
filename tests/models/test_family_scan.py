"""Every causal family of transformers: what we export computes what transformers computes, or the
family is refused before calibration.

Each family gets a tiny random model at 16:16, where sparse is dense; families without a tiny
configuration are listed as such. The table is printed: `pytest -m slow -s` on this file.
`NMEXPORT_FAMILIES="llama opt"` scans these alone.

A trace takes most of the time, so there is one for each family and type. The half types have one
layer where the family has such a configuration, since an operator that a half type lacks is in
every layer. Of a family that is not in `EXPORTED`, `calibrate` traces on trial; here the trace of
the export stands for it.

The outcomes are in `family_scan.md` beside this file, and the test holds what it scans against it.
It scans the families in `EXPORTED`, those with something of their own (`PECULIAR`) and those that
are refused, a few minutes;
`NMEXPORT_FAMILIES=all` scans every family, in a quarter of an hour or more, and writes the table
anew.

A half type is held to float32. It may differ by twice what transformers itself differs in that
type, or by twenty roundings of one standard deviation of the logits, whichever is more.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import shutil
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.tiny import VOCABULARY, WINDOW, save_tiny_model, tiny_config

# Of standard deviations of the logits: of float32, and twenty roundings of the half types.
TOLERANCES = {"float32": 1e-3, "float16": 20 * 2.0**-11, "bfloat16": 20 * 2.0**-8}
TABLE = Path(__file__).with_name("family_scan.md")
LENGTH, PREFILL = WINDOW + 8, 10
_ONE_LAYER: dict[str, dict[str, Any]] = {"gemma3_text": {"layer_types": ["sliding_attention"]}}
"""What a configuration of one layer says otherwise."""
PECULIAR = frozenset({"granite_swa", "gpt_neox"})
"""Attention sinks; a head that the files call otherwise."""
_MOST_PARAMETERS = 4_000_000  # more is no tiny configuration: some size has another name


@dataclass(frozen=True)
class Row:
    """What became of one family in one type."""

    family: str
    dtype: str
    outcome: str
    """`right`, `refused`, `wrong`, `untested` (no tiny configuration) or `traceback`."""
    detail: str
    seconds: float


def families() -> list[str]:
    """Every `model_type` that transformers has a causal class for."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def prepare() -> None:
    """Set up a process that scans: quiet, on one thread, with torch's table of operators kept.

    The tracer builds that table anew for each model, which is an eighth of its time.
    """
    import functools

    import torch
    from torch.onnx._internal.exporter import _registration
    from transformers.utils import logging as remarks

    torch.set_num_threads(1)
    remarks.set_verbosity_error()
    remarks.disable_progress_bar()
    registry = _registration.ONNXRegistry
    kept = functools.cache(registry.from_torchlib)
    registry.from_torchlib = staticmethod(kept)  # type: ignore[assignment]


def scan(family: str, folder: Path) -> list[Row]:
    """Build and compare one family in every type; runs in a process of its own."""
    began = time.monotonic()
    deep, shallow = folder / family, folder / f"{family}-shallow"
    try:
        _save(deep, family)
    except Exception as error:  # noqa: BLE001 - a configuration raises what it pleases
        return [Row(family, "-", "untested", _first_line(error)[:100], 0.0)]
    try:
        _save(shallow, family, num_hidden_layers=1, **_ONE_LAYER.get(family, {}))
    except Exception:  # noqa: BLE001 - some have no configuration of one layer
        shallow = deep
    rows: list[Row] = []
    for dtype in TOLERANCES:
        source = deep if dtype == "float32" else shallow
        outcome, detail = _outcome(source, folder / f"{family}-{dtype}", dtype)
        seconds, began = time.monotonic() - began, time.monotonic()
        rows.append(Row(family, dtype, outcome, detail, seconds))
        if outcome == "refused" and dtype == "float32":  # whatever the type
            break
    shutil.rmtree(deep)
    shutil.rmtree(shallow, ignore_errors=True)
    return rows


def _first_line(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"


def _save(folder: Path, family: str, **overrides: Any) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    options: dict[str, Any] = {**tiny_config(family), **overrides}
    config = AutoConfig.for_model(family, **options)
    if getattr(config, "sliding_window", None):
        options["sliding_window"] = WINDOW
    if getattr(config, "is_decoder", None) is False and not config.is_encoder_decoder:
        options["is_decoder"] = True
    config = AutoConfig.for_model(family, **options)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    if count > _MOST_PARAMETERS:
        raise ValueError(f"{count / 1e6:.0f} million parameters")
    save_tiny_model(folder, family, **options)


def _outcome(source: Path, output: Path, dtype: str) -> tuple[str, str]:
    import torch
    from nmexport.errors import UserError
    from nmexport.models.exportable import check_kind
    from nmexport.models.source import resolve
    from nmexport.models.tracing import UntraceableError
    from nmexport.recipe import ModelSection

    try:
        check_kind(resolve(ModelSection(id=str(source))), dtype=getattr(torch, dtype))
    except UserError as error:
        return "refused", error.problem
    try:
        error, tolerance = _difference(source, output, dtype)
    except UntraceableError as refusal:  # what the trace on trial says, with the same call
        return "refused", refusal.problem
    except Exception as fault:  # noqa: BLE001 - whatever it is, it came too late
        return "traceback", _first_line(fault)[:200]
    finally:
        shutil.rmtree(output, ignore_errors=True)
    return ("right" if error <= tolerance else "wrong"), f"{error:.1e} of {tolerance:.1e}"


def _difference(source: Path, output: Path, dtype: str) -> tuple[float, float]:
    """Largest difference of dense or sparse file from transformers in float32, and the tolerance.

    Both in standard deviations of the logits.
    """
    from nmexport.runtimes import native
    from nmexport.runtimes.onnxruntime_session import OrtSession
    from nmexport.sparsity.linear import Behaviour
    from nmexport.sparsity.pattern import NMPattern

    from tests.support.exported import export_folder

    output.mkdir()
    exported = export_folder(
        source, output, behaviour=Behaviour(pattern=NMPattern(16, 16)), dtype=dtype
    )
    ids = np.random.default_rng(0).integers(3, VOCABULARY, (1, LENGTH))
    wanted = _own_logits(source, ids, "float32")
    deviation = wanted.std()
    worst = 0.0
    for path in (exported.dense_model, exported.model):
        with OrtSession(
            path, library=native.find_library(), threads=1, bfloat16=dtype == "bfloat16"
        ) as session:
            logits = [session.prefill(ids[:, :PREFILL])]
            logits += [session.decode_step(ids[:, at : at + 1]) for at in range(PREFILL, LENGTH)]
        got = np.concatenate(logits, axis=1)
        # not max(), which loses NaN
        worst = float(np.maximum(worst, np.abs(got - wanted).max() / deviation))
    tolerance = TOLERANCES[dtype]
    if dtype != "float32":
        own = np.abs(_own_logits(source, ids, dtype) - wanted).max() / deviation
        tolerance = max(tolerance, 2 * float(own))
    return worst, tolerance


def _own_logits(source: Path, ids: np.ndarray, dtype: str) -> np.ndarray:
    """Logits of transformers itself."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype)).eval()
    with torch.inference_mode():
        logits: np.ndarray = model(input_ids=torch.from_numpy(ids)).logits.float().numpy()
    return logits


def table(rows: list[Row]) -> str:
    """The scan as text, a row a family and type, and the counts."""
    lines = [f"{row.family:24}{row.dtype:10}{row.outcome:11}{row.detail[:110]}" for row in rows]
    kinds = sorted({row.outcome for row in rows})
    counts = {kind: len({row.family for row in rows if row.outcome == kind}) for kind in kinds}
    return "\n".join([*lines, ", ".join(f"{kind}: {count}" for kind, count in counts.items())])


def lines_of(rows: list[Row]) -> list[str]:
    """A line a family: its outcome in every type, and why where it is not right."""
    lines = []
    for family in sorted({row.family for row in rows}):
        first, *others = own = [row for row in rows if row.family == family]
        types = ", ".join(row.dtype for row in own if row.outcome == "right")
        reasons = [first.detail] if first.outcome != "right" else []
        reasons += [
            f"{row.dtype} {row.outcome}: {row.detail}" for row in others if row.outcome != "right"
        ]
        why = "; ".join([types, *reasons] if types else reasons)
        lines.append(f"| {family} | {first.outcome} | {why[:200].replace('|', '/')} |")
    return lines


def recorded() -> dict[str, str]:
    """Outcome by family, as the table says."""
    lines = TABLE.read_text(encoding="utf-8").splitlines()
    cells = [line.split("|") for line in lines if line.startswith("| ")]
    return {family.strip(): outcome.strip() for _, family, outcome, *_ in cells[1:]}


def document(rows: list[Row]) -> str:
    """The table that is kept."""
    kinds = {row.family: row.outcome for row in reversed(rows)}
    found = list(kinds.values())
    counts = ", ".join(f"{found.count(kind)} {kind}" for kind in sorted(set(found)))
    head = [
        "# Every causal family of transformers, built at 16:16",
        "",
        f"Written by `test_family_scan.py`, with transformers {version('transformers')}: {counts}.",
        "Right: dense and sparse file agree with transformers, in prefill and decode. Refused:",
        "before calibration, in these words. Untested: there is no tiny configuration, and why.",
        f"Not scanned yet: {', '.join(sorted(set(families()) - kinds.keys())) or 'none'}.",
        "",
        "| family | outcome | types, or why |",
        "|---|---|---|",
    ]
    return "\n".join([*head, *lines_of(rows)]) + "\n"


@pytest.mark.slow
def test_every_causal_family_is_right_or_refused(tmp_path: Path) -> None:
    from nmexport.models.families import EXPORTED

    asked = os.environ.get("NMEXPORT_FAMILIES", "").split()
    refused = {family for family, outcome in recorded().items() if outcome == "refused"}
    chosen = families() if asked == ["all"] else asked or sorted(refused | EXPORTED | PECULIAR)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=context, initializer=prepare) as pool:
        rows = [row for found in pool.map(scan, chosen, [tmp_path] * len(chosen)) for row in found]
    print(f"\n{table(rows)}")  # noqa: T201 - figures, which differ from machine to machine
    if asked == ["all"]:
        TABLE.write_text(document(rows), encoding="utf-8")
    assert not [row for row in rows if row.outcome in {"wrong", "traceback"}]
    outcomes = {family: {row.outcome for row in rows if row.family == family} for family in chosen}
    for family in EXPORTED & set(chosen):
        assert outcomes[family] == {"right"}, family
    known = recorded()
    changed = {family for family in chosen if known.get(family) not in {None, *outcomes[family]}}
    assert not changed, f"{TABLE.name} says otherwise; NMEXPORT_FAMILIES=all writes it anew"


def test_the_table_names_families_of_transformers() -> None:
    from nmexport.models.families import EXPORTED

    known = recorded()
    assert not known.keys() - set(families())
    assert set(known.values()) <= {"right", "refused", "untested"}
    assert {known[family] for family in EXPORTED & known.keys()} == {"right"}
