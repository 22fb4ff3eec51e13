"""Keeps transformers quiet while it reads a model, and says in one message what went wrong."""

from __future__ import annotations

import contextlib
import logging
import warnings
from typing import TYPE_CHECKING, Any

from nmexport.errors import ModelError
from nmexport.json_reader import parse_json

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from nmexport.models.source import ModelSource


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' progress bars and warnings off the user's terminal."""
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
def reading(source: ModelSource, *, part: str | None = None) -> Iterator[None]:
    """Say what went wrong in the model's terms.

    Transformers, tokenizers, safetensors and gguf raise what they please on a broken file, from
    OSError to bare Exception, so everything is caught here.

    Args:
        source: The model.
        part: What of it is read, such as `tokenizer`; None is the model itself.
    """
    try:
        yield
    except (MemoryError, ModelError):
        raise
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise needs_code(source) from error
        where = source.folder / (source.gguf_file or "")
        if part is not None:
            raise ModelError(
                f"The {part} of {source.id!r} cannot be loaded from {where}: "
                f"{_reason(error, source.folder)}",
                allowed=f"a {part} that this version of transformers reads",
                fix=f"copy the {part}'s files of the model (or of its base model) again",
            ) from error
        raise ModelError(
            f"Model {source.id!r} cannot be loaded from {where}: "
            f"{_architecture(source.folder)}{_reason(error, source.folder)}",
            allowed="a causal language model that this version of transformers knows",
            fix="check that the files are complete"
            + (
                ", the model's own Python files too"
                if source.trust_remote_code
                else "; for a model with Python files of its own, give --trust-remote-code if you "
                "trust them"
            ),
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


def unused_code(source: ModelSource) -> str | None:
    """Say that a model comes with Python code that is not run; None where it has none."""
    config = {} if source.gguf_file else _config(source.folder)
    if source.trust_remote_code or not config.get("auto_map"):
        return None
    return (
        f"{source.id} names Python code of its own (auto_map in config.json), which is not run: "
        f"transformers' own {config.get('model_type')!r} is used. If you trust the code, "
        "--trust-remote-code runs it."
    )


def _architecture(folder: Path) -> str:
    """`model_type 'x': `, where a config tells."""
    config = _config(folder)
    return f"model_type {config['model_type']!r}: " if "model_type" in config else ""


def _reason(error: Exception, folder: Path) -> str:
    """Return the error in one line; for an unknown value, with its key."""
    missing = error.args[0] if isinstance(error, KeyError) and error.args else None
    key = None if missing is None else _key_of(missing, _config(folder))
    if key is not None:
        return f"{key} is {missing!r} in its config, which this version does not know"
    return f"{type(error).__name__}: {first_line(error)}"


def first_line(error: Exception) -> str:
    """Return an error's message in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = lines[0] if lines else "no reason given"
    if said.endswith(":") and len(lines) > 1:  # what follows is what is wrong
        said += f" {lines[1]}"
    return said[:300]


def _key_of(value: object, section: Mapping[str, Any], prefix: str = "") -> str | None:
    """Find the dotted key of a value in a section of a config; None where there is none."""
    for name, held in section.items():
        if isinstance(held, dict):
            inside = _key_of(value, held, f"{prefix}{name}.")
            if inside is not None:
                return inside
        elif isinstance(held, str) and held == value:
            return f"{prefix}{name}"
    return None


def _config(folder: Path) -> Mapping[str, Any]:
    """Read a folder's configuration; empty where it cannot be read."""
    try:
        document = parse_json((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}
