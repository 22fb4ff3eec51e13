"""Every causal family of transformers: what we export computes what transformers computes, or the
family is refused before calibration.

Each family gets a tiny random model at 16:16, where sparse is dense; families without a tiny
configuration are listed as such. The table is printed: `pytest -m slow -s` on this file.

A half type is held to float32 with the tolerance of its rounding: two layers of a 64 wide model
round some twenty times, each by half a unit in the last place of values near one standard deviation
of the logits: 20 * 2^-11 and 20 * 2^-8.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import shutil
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.tiny import VOCABULARY, WINDOW, save_tiny_model, tiny_config

if TYPE_CHECKING:
    from pathlib import Path

# Of standard deviations of the logits, see above.
TOLERANCES = {"float32": 1e-3, "float16": 20 * 2.0**-11, "bfloat16": 20 * 2.0**-8}
LENGTH, PREFILL = WINDOW + 8, 10
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


def scan(family: str, folder: Path) -> list[Row]:
    """Build and compare one family in every type; runs in a process of its own."""
    import torch

    torch.set_num_threads(1)
    began = time.monotonic()
    source = folder / family
    try:
        _save(source, family)
    except Exception as error:  # noqa: BLE001 - a configuration raises what it pleases
        first = (str(error).strip().splitlines() or [""])[0]
        return [Row(family, "-", "untested", f"{type(error).__name__}: {first}"[:100], 0.0)]
    rows: list[Row] = []
    for dtype in TOLERANCES:
        outcome, detail = _outcome(source, folder / f"{family}-{dtype}", dtype)
        seconds, began = time.monotonic() - began, time.monotonic()
        rows.append(Row(family, dtype, outcome, detail, seconds))
        if outcome == "refused" and dtype == "float32":  # whatever the type
            break
    shutil.rmtree(source)
    return rows


def _save(folder: Path, family: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    options: dict[str, Any] = tiny_config(family)
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
    from nmexport.models.exportable import check_exportable
    from nmexport.models.source import resolve
    from nmexport.recipe import ModelSection

    try:
        check_exportable(resolve(ModelSection(id=str(source))), dtype=getattr(torch, dtype))
    except UserError as error:
        return "refused", error.problem
    try:
        error = _difference(source, output, dtype)
    except Exception as fault:  # noqa: BLE001 - whatever it is, it came too late
        first = (str(fault).strip().splitlines() or [""])[0]
        return "traceback", f"{type(fault).__name__}: {first}"[:200]
    finally:
        shutil.rmtree(output, ignore_errors=True)
    return ("right" if error <= TOLERANCES[dtype] else "wrong"), f"{error:.1e}"


def _difference(source: Path, output: Path, dtype: str) -> float:
    """Largest difference of logits, of dense and sparse file, in standard deviations of them."""
    import torch
    from nmexport.runtimes import native
    from nmexport.runtimes.onnxruntime_session import OrtSession
    from nmexport.sparsity.linear import Behaviour
    from nmexport.sparsity.pattern import NMPattern
    from transformers import AutoModelForCausalLM

    from tests.exported import export_folder

    output.mkdir()
    exported = export_folder(
        source, output, behaviour=Behaviour(pattern=NMPattern(16, 16)), dtype=dtype
    )
    ids = np.random.default_rng(0).integers(3, VOCABULARY, (1, LENGTH))
    own = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    with torch.inference_mode():
        wanted = own(input_ids=torch.from_numpy(ids)).logits.float().numpy()
    worst = 0.0
    for path in (exported.dense_model, exported.model):
        with OrtSession(path, library=native.find_library(), threads=1) as session:
            logits = [session.prefill(ids[:, :PREFILL])]
            logits += [session.decode_step(ids[:, at : at + 1]) for at in range(PREFILL, LENGTH)]
        got = np.concatenate(logits, axis=1)
        worst = max(worst, float(np.abs(got - wanted).max() / wanted.std()))
    return worst


def table(rows: list[Row]) -> str:
    """The scan as text, a row a family and type, and the counts."""
    lines = [f"{row.family:24}{row.dtype:10}{row.outcome:11}{row.detail[:110]}" for row in rows]
    kinds = sorted({row.outcome for row in rows})
    counts = {kind: len({row.family for row in rows if row.outcome == kind}) for kind in kinds}
    return "\n".join([*lines, ", ".join(f"{kind}: {count}" for kind, count in counts.items())])


@pytest.mark.slow
def test_every_causal_family_is_right_or_refused(tmp_path: Path) -> None:
    from nmexport.models.families import EXPORTED

    chosen = os.environ.get("NMEXPORT_FAMILIES", "").split() or families()
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as pool:
        jobs = [pool.submit(scan, family, tmp_path) for family in chosen]
        rows = [row for job in jobs for row in job.result()]
    print(f"\n{table(rows)}")  # noqa: T201 - the table is what a reader wants
    assert not [row for row in rows if row.outcome in {"wrong", "traceback"}]
    assert not {row.family for row in rows if row.outcome == "refused"} & EXPORTED
    late = [row for row in rows if row.outcome == "refused" and row.dtype != "float32"]
    assert not late, "a refusal must not depend on the type"
    if chosen == families():
        assert len({row.family for row in rows if row.outcome != "untested"}) >= 125
