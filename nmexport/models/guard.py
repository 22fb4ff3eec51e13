"""Keep transformers quiet while it reads a model, and say in one message what went wrong."""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from typing import TYPE_CHECKING

from nmexport.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from nmexport.models.source import ModelSource


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' bars and remarks from the user's terminal, and leave it as it was."""
    from transformers.utils import logging as remarks

    verbosity, had_bars = remarks.get_verbosity(), remarks.is_progress_bar_enabled()
    remarks.set_verbosity(logging.CRITICAL)
    remarks.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        remarks.set_verbosity(verbosity)
        if had_bars:
            remarks.enable_progress_bar()


@contextlib.contextmanager
def reading(source: ModelSource) -> Iterator[None]:
    """Say what went wrong in the model's terms.

    Transformers, tokenizers, safetensors and gguf raise what they please on a broken file, from
    OSError to bare Exception, so everything is caught here.
    """
    try:
        yield
    except (MemoryError, ModelError):
        raise
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise needs_code(source) from error
        where = source.folder / (source.gguf_file or "")
        reason = next((line for line in str(error).splitlines() if line.strip()), "no reason given")
        raise ModelError(
            f"Model {source.id!r} cannot be loaded from {where}: "
            f"{_architecture(source.folder)}{type(error).__name__}: {reason[:300]}",
            allowed="a causal language model that this version of transformers knows",
            fix="check that the files are complete; for a model with Python files of its own, "
            "give --trust-remote-code if you trust them",
        ) from error


def needs_code(source: ModelSource) -> ModelError:
    """Build the error that says a model comes with Python files that may not run."""
    files = sorted(path.name for path in source.folder.glob("*.py"))
    return ModelError(
        f"Model {source.id!r} needs Python code of its own"
        + (f" ({', '.join(files[:3])})" if files else "")
        + ", which runs only with your leave.",
        allowed="a model that transformers knows by itself",
        fix="read the code; if you trust it, give --trust-remote-code, or set "
        "model.trust_remote_code: true in the recipe",
    )


def _architecture(folder: Path) -> str:
    """`model_type 'x': `, where a config tells."""
    try:
        model_type = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return f"model_type {model_type!r}: "
