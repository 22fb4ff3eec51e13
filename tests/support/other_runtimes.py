"""An exported model in runtimes that are not installed with ours."""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest
from nmexport.models.loader import load_tokenizer
from nmexport.models.source import resolve
from nmexport.models.tokenizer_files import write_tokenizer
from nmexport.recipe import ModelSection
from nmexport.runtimes import native
from nmexport.serving import repository
from nmexport.stages.exporting import write_configs
from nmexport.store.exported import GENAI_CONFIG

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.exported import Exported

GENAI = "onnxruntime-genai==0.18.0"


def save_for_other_runtimes(source: Path, exported: Exported, folder: Path) -> Path:
    """A folder as a package has it: model, native op, tokenizer, configurations."""
    shutil.copytree(exported.folder, folder)
    write_configs(exported.dense, folder)
    write_tokenizer(load_tokenizer(resolve(ModelSection(id=str(source)))), folder)
    library = native.find_library()
    if library is None:
        pytest.skip("the native library is not built")
    shutil.copy(library, folder)
    repository._name_library(folder / GENAI_CONFIG, library.name)
    return folder


def install(command: list[object]) -> None:
    """Install, or skip where the package cannot be had."""
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=False, timeout=300
    )
    if done.returncode:
        pytest.skip(f"cannot be installed here: {done.stderr.strip()[-200:]}")
