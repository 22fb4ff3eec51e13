"""A listener for the application, in a thread of its own."""

from __future__ import annotations

import socket
import threading
from typing import TYPE_CHECKING

import uvicorn

from nmexport.errors import EnvironmentFault
from nmexport.runtimes.session import Closing
from nmexport.serving.openai.app import application

if TYPE_CHECKING:
    from nmexport.serving.metrics import Metrics
    from nmexport.serving.service import TextService

_CLOSE_SECONDS = 2
"""How long answers that have ended may take to reach a slow reader."""
_BACKLOG = 2048


class Front(Closing):
    """Answers OpenAI's requests on a port until it is closed."""

    def __init__(self, service: TextService, metrics: Metrics, *, host: str, port: int) -> None:
        """Start to listen.

        Raises:
            EnvironmentFault: if the port cannot be had.
        """
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._socket = socket.create_server((host, port), family=family, backlog=_BACKLOG)
        except OSError as error:
            raise EnvironmentFault(
                f"OpenAI's API cannot listen on {host} port {port}: {error.strerror or error}.",
                fix="end what listens there, or choose another port",
            ) from error
        self._server = uvicorn.Server(
            uvicorn.Config(
                application(service, metrics),
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=_CLOSE_SECONDS,
            )
        )
        # Not the main thread: uvicorn leaves signals alone then.
        self._thread = threading.Thread(
            target=self._server.run, args=([self._socket],), name="nmexport-openai", daemon=True
        )
        self._thread.start()

    @property
    def port(self) -> int:
        """The port that it listens on."""
        port: int = self._socket.getsockname()[1]
        return port

    def close(self) -> None:
        """Send finished answers, and stop listening."""
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()
