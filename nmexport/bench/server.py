"""A server of this machine, started on a package for as long as it is measured."""

from __future__ import annotations

import contextlib
import tempfile
from typing import TYPE_CHECKING

from nmexport.serving import launch
from nmexport.serving.repository import REPOSITORY

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from nmexport.serving.launch import Installation, Server


@contextlib.contextmanager
def started(folder: Path, installation: Installation) -> Iterator[tuple[Server, str]]:
    """Start a server on the text model of a package, and wait until it is ready.

    Its messages are kept for an error alone.

    Args:
        folder: The package, or a work directory that holds one.
        installation: The server to start.

    Returns:
        The server, and the name of its text model.
    """
    package = launch.package_folder(folder)
    models = launch.models_of(package / REPOSITORY)
    texts = [name for name, is_plan in models.items() if not is_plan]
    with (
        tempfile.TemporaryFile() as log,
        launch.Server.start(
            package / REPOSITORY,
            addresses=launch.Addresses.unused(),
            installation=installation,
            models=texts,
            output=log,
        ) as server,
    ):
        server.wait_ready()
        yield server, texts[0]
