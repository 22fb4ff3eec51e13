"""The CUDA kernel lab without a GPU: its reference is the oracle, and a failure ends the run."""

from __future__ import annotations

import dataclasses
import functools
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from nmexport import oracle

from tests.support.plugin_build import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator

MODULES = ("arguments", "cases", "check", "library")
OPTIONS = ("", "b", "bs", "1w", "bdv", "wo", "oa", "dvowba")


@pytest.fixture(scope="module")
def lab() -> Iterator[SimpleNamespace]:
    """The lab's modules, which import each other by their bare names as a script's do."""
    folder = str(ROOT / "plugins" / "bench" / "cuda" / "lab")
    sys.path.insert(0, folder)
    try:
        yield SimpleNamespace(**{name: __import__(name) for name in MODULES})
    finally:
        sys.path.remove(folder)
        for name in MODULES:
            sys.modules.pop(name, None)


def layers(lab: SimpleNamespace) -> list[tuple[str, Any]]:
    torch.manual_seed(3)
    make = functools.partial(lab.cases.make_layer, device="cpu")
    return [
        (options, make(lab.cases.Case(torch.float32, 3, 96, 40, 8, 16, options, "outliers")))
        for options in OPTIONS
    ]


class RightKernels:
    """Answers with the lab's own reference, at times with one element off."""

    def __init__(self, off: float = 0.0) -> None:
        self.off = off
        self.results: dict[str, Any] = {}

    def decode(self, layer: Any) -> torch.Tensor:
        y = layer.reference()[3].to(layer.x.dtype)
        y[0, 0] += self.off
        return y

    def mask(self, layer: Any, *, is_gathered: bool = True) -> tuple[torch.Tensor, ...]:
        keep, s, nu, _ = layer.reference()
        if layer.channel_order is not None and not is_gathered:
            back = layer.channel_order.long().argsort()
            keep, s = keep[:, back], s[:, back]
        return s.to(layer.x.dtype), keep.to(torch.uint8), nu[:, 0], nu[:, 0]


def test_the_labs_reference_is_the_oracles(lab):
    for options, layer in layers(lab):
        fields = dataclasses.asdict(layer)
        arrays = {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in fields.items()}
        expected = oracle.reference(arrays.pop("x"), arrays.pop("w"), **arrays)
        keep, _, _, y = layer.reference()
        order = np.arange(96) if layer.channel_order is None else layer.channel_order.numpy()
        assert (keep.numpy() == expected.keep[:, order]).all(), options
        assert (abs(y.numpy() - expected.value) <= expected.bound(np.float32)).all(), options


def check(lab: SimpleNamespace, kernels: RightKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab.check, "_layers", lambda recorded: iter(layers(lab)))
    make = functools.partial(lab.cases.make_layer, device="cpu")
    monkeypatch.setattr(lab.check, "make_layer", make)
    lab.check.check(kernels)


def test_what_is_right_passes(lab, monkeypatch, capsys):
    kernels = RightKernels()
    check(lab, kernels, monkeypatch)
    assert kernels.results["check"]["cases"] == len(OPTIONS)
    assert kernels.results["check"]["worst"] < 1
    assert "0 failures" in capsys.readouterr().out


@pytest.mark.parametrize("off", [0.01, float("nan")])
def test_one_wrong_element_ends_the_run(lab, monkeypatch, off):
    kernels = RightKernels(off)
    with pytest.raises(SystemExit, match="FAILED"):
        check(lab, kernels, monkeypatch)
    assert len(kernels.results["check"]["failures"]) == len(OPTIONS)
