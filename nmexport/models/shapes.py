"""A model's tensors by its configuration alone: weights need not be there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nmexport.errors import ModelError
from nmexport.models.skeleton import skeleton
from nmexport.models.source import ModelSource

if TYPE_CHECKING:
    from pathlib import Path

_CONFIG = "config.json"


def tensors_of_config(path: Path) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a model's parameters; tied ones count once.

    Args:
        path: Its `config.json`, or the folder that holds it.

    Raises:
        ModelError: if there is none, or it is of no causal language model.
    """
    folder = path if path.is_dir() else path.parent
    if path.name != _CONFIG and not (path / _CONFIG).is_file():
        raise ModelError(
            f"There is no {_CONFIG} at {path}.",
            allowed=f"a model's {_CONFIG}, or a folder with it",
            fix="download that one file from the model's page; its weights are not needed",
        )
    source = ModelSource(
        id=str(folder), revision=None, folder=folder.absolute(), gguf_file=None, digest=""
    )
    model = skeleton(source)
    model.tie_weights()  # the empty weights were made one by one
    return [(name, tuple(value.shape)) for name, value in model.named_parameters()]
