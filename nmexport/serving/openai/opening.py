"""Starts OpenAI's API where the environment asks for it."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import TYPE_CHECKING

from nmexport.errors import EnvironmentFault

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nmexport.runtimes.session import Closing
    from nmexport.serving.metrics import Metrics
    from nmexport.serving.service import TextService

ADDRESS_VARIABLE = "NMEXPORT_OPENAI"
"""Environment variable of the server: `HOST:PORT` to listen on; unset or empty is nowhere."""
PACKAGES = ("starlette", "uvicorn")
INSTALL = "pip install 'nmexport[serve]'"


def open_front(
    environment: Mapping[str, str], service: TextService, metrics: Metrics
) -> Closing | None:
    """Serve OpenAI's API at the address that the environment names.

    Args:
        environment: The server's variables.
        service: What answers.
        metrics: Where refused requests are counted.

    Returns:
        What serves until it is closed; None where it is not asked for, or cannot be had: the log
        says so then, and Triton serves all the same.

    Raises:
        EnvironmentFault: if the variable makes no sense, or the port cannot be had.
    """
    text = environment.get(ADDRESS_VARIABLE)
    if not text:
        return None
    host, _, port = text.rpartition(":")
    if not host or not (port.isascii() and port.isdigit()):
        raise EnvironmentFault(f"{ADDRESS_VARIABLE} cannot be {text!r}.", allowed="HOST:PORT")
    if not is_installed():
        logging.getLogger(__name__).warning(
            "OpenAI's API is not served: %s are missing; %s", " and ".join(PACKAGES), INSTALL
        )
        return None
    from nmexport.serving.openai.front import Front

    return Front(service, metrics, host=host.strip("[]"), port=int(port))


def is_installed() -> bool:
    """Tell whether the packages that serve OpenAI's API are installed."""
    return all(find_spec(package) is not None for package in PACKAGES)
