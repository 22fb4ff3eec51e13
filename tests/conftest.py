"""Fixtures that several test files share."""

from __future__ import annotations

import functools
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support import kept
from tests.support.tiny import save_tiny_model

if TYPE_CHECKING:
    from collections.abc import Callable

    from nmexport.stages.exporting import TracedModel

    from tests.support.exported import Exported

_TESTS = Path(__file__).parent
# Half a minute and more of a core each, of the slow suite and then of the fast one.
_FIRST = (
    "calibration/test_learning_smollm2.py",
    "test_smollm2_build.py",
    "plugins/test_wheel.py",
    "runtimes/tensorrt/test_building.py",
    "models/test_layerwise.py",
    "models/test_streaming.py",
    "sparsity/test_smollm2.py",
    "runtimes/tensorrt/test_smollm2.py",
    "graph/test_cuda.py",
    "graph/test_cpu.py",
    "stages/test_export.py",
    "models/test_families.py",
    "stages/test_engine.py",
    "verification/test_tasks.py",
)
# Each starts two processes: whichever runs last, both cores are busy to the end.
_LAST = (
    "plugins/test_native_compilers.py",
    "models/test_family_scan.py",
    "plugins/test_cuda_kernels.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: a worker that starts one of them last leaves the other idle."""
    turns = {_TESTS / name: turn for turn, name in enumerate(_FIRST, start=-len(_FIRST))}
    turns |= {_TESTS / name: turn for turn, name in enumerate(_LAST, start=1)}
    items.sort(key=lambda item: turns.get(item.path, 0))


def pytest_collection_finish() -> None:
    """Coverage looks away while torch traces: Python that is not ours, and most of an export."""
    if "torch" in sys.modules and sys.gettrace() is not None:
        import torch.onnx

        torch.onnx.export = _uncounted(torch.onnx.export)


def _uncounted(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        tracer = sys.gettrace()
        sys.settrace(None)
        try:
            return function(*arguments, **named)
        finally:
            sys.settrace(tracer)

    return call


@pytest.fixture(scope="session", autouse=True)
def _keep_exports(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Workers share one folder: the one above their own."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    kept.FOLDER[:] = [shared / "kept"]


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random Llama with a tokenizer."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    save_tiny_model(folder, "llama")
    return folder


@pytest.fixture(scope="session")
def traced_llama(tiny_llama: Path) -> TracedModel:
    """The tiny Llama in float32, traced: models with any constants are written from it."""
    from nmexport.stages.exporting import trace_model

    from tests.support.exported import linears_of, load

    model = load(tiny_llama)
    return trace_model(model, list(linears_of(model)))


@pytest.fixture(scope="session")
def plain_export(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The tiny Llama in float32, every linear 8:16; a test that changes its files copies it."""
    from tests.support.exported import export_folder

    return export_folder(tiny_llama, tmp_path_factory.mktemp("plain-export"))


@pytest.fixture(scope="session")
def tiny_export(
    tiny_llama: Path, plain_export: Exported, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Folder of the plain export, with all that a package takes from there."""
    from tests.support.served import add_configs

    folder = tmp_path_factory.mktemp("tiny-export") / "model"
    shutil.copytree(plain_export.folder, folder)
    add_configs(tiny_llama, plain_export, folder)
    return folder
