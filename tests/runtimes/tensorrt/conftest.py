"""The plugin on kernels that only take notes: TensorRT's builder takes it for the real one."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest
from nmexport.runtimes.tensorrt import library as tensorrt_library

from tests.support.kept import kept
from tests.support.plugin_build import build_script, built

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="session")
def recording_plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("tensorrt_rtx", reason="the package tensorrt-rtx is not installed")
    pytest.importorskip("polygraphy", reason="the package polygraphy is not installed")

    def build(output: Path) -> None:
        library = built("build_recording_plugin", tmp_path_factory.mktemp("build"))
        shutil.copytree(library.parent, output, dirs_exist_ok=True)

    folder = tmp_path_factory.mktemp("recording-plugin")
    kept("recording-plugin", build, folder)
    library: str = build_script().LIBRARY
    return folder / library


@pytest.fixture
def plugin(recording_plugin: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The recording plugin, where `nmexport` looks for the real one."""
    monkeypatch.setattr(tensorrt_library, "_FOLDER", recording_plugin.parent)
    return recording_plugin
