"""Fixtures that several test files share."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest

from tests.support.tiny import save_tiny_model

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.exported import Exported

_LONGEST = ("test_smollm2_build.py", "test_learning_smollm2.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: a worker that starts one of them last leaves the other idle."""
    items.sort(key=lambda item: item.path.name not in _LONGEST)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random Llama with a tokenizer."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    save_tiny_model(folder, "llama")
    return folder


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
