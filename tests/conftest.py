"""Fixtures that several test files share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.tiny import save_tiny_model

if TYPE_CHECKING:
    from pathlib import Path

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
def tiny_export(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny Llama exported, with all that a package takes from there."""
    from tests.served import save_export

    return save_export(tiny_llama, tmp_path_factory.mktemp("tiny-export") / "model")
