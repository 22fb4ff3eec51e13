"""Paths of the data files that are installed with the package: recipes and the op contract."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
NATIVE_FOLDER = _PACKAGE / "_native"
"""Libraries that were compiled when the package was installed."""
# An installed package carries its data inside; a source tree keeps it where people look.
_INSTALLED = _PACKAGE / "_resources"
_SOURCE = {"recipes": "recipes", "contract.json": "plugins/contract.json"}


def resource_path(name: str) -> Path:
    """Path of `recipes` (a folder) or `contract.json` (a file)."""
    installed = _INSTALLED / name
    return installed if installed.exists() else _PACKAGE.parent / _SOURCE[name]
