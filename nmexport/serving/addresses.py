"""A server's addresses, and a check that they are free."""

from __future__ import annotations

import contextlib
import socket
from dataclasses import dataclass
from typing import Self

from nmexport.errors import EnvironmentFault


@dataclass(frozen=True, kw_only=True)
class Addresses:
    """Host and ports that a server listens on."""

    host: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
    openai_port: int = 9000
    """0 is none: OpenAI's API is not served."""

    @classmethod
    def unused(cls) -> Self:
        """Pick free ports of this machine."""
        with contextlib.ExitStack() as stack:
            sockets = [stack.enter_context(socket.socket()) for _ in range(4)]
            for listener in sockets:
                listener.bind((cls.host, 0))
            http, grpc, metrics, openai = (listener.getsockname()[1] for listener in sockets)
        return cls(http_port=http, grpc_port=grpc, metrics_port=metrics, openai_port=openai)

    @property
    def http(self) -> str:
        """URL of the HTTP endpoint, for a client on this machine."""
        return f"http://{self._reachable}:{self.http_port}"

    @property
    def grpc(self) -> str:
        """Host and port of the gRPC endpoint."""
        return f"{self._reachable}:{self.grpc_port}"

    @property
    def metrics(self) -> str:
        """URL of the metrics."""
        return f"http://{self._reachable}:{self.metrics_port}/metrics"

    @property
    def openai(self) -> str | None:
        """Base URL of OpenAI's API, for a client on this machine; None where it is not served."""
        return f"http://{self._reachable}:{self.openai_port}/v1" if self.openai_port else None

    @property
    def openai_listener(self) -> str:
        """`HOST:PORT` for OpenAI's API; empty for none."""
        return f"{self.host}:{self.openai_port}" if self.openai_port else ""

    def require_free(self) -> None:
        """Refuse ports that are taken.

        It would say so itself, and whoever is there would be taken for it meanwhile.

        Raises:
            EnvironmentFault: naming the first such port.
        """
        ports = {"http": self.http_port, "grpc": self.grpc_port, "metrics": self.metrics_port}
        if self.openai_port:
            ports["openai"] = self.openai_port
        if len(set(ports.values())) < len(ports):
            raise EnvironmentFault(
                f"The server cannot have one port twice: {', '.join(map(str, ports.values()))}.",
                allowed=f"{len(ports)} ports",
            )
        for name, port in ports.items():
            problem = _why_not_free(self.host, port)
            if problem is not None:
                raise EnvironmentFault(
                    f"The server cannot listen on {self.host} port {port}: {problem}.",
                    fix=f"end what listens there, or choose another with --{name}-port",
                )

    @property
    def _reachable(self) -> str:
        return "127.0.0.1" if self.host in {"0.0.0.0", "::"} else self.host  # noqa: S104


def _why_not_free(host: str, port: int) -> str | None:
    try:
        (family, kind, _, _, address), *_ = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        with socket.socket(family, kind) as probe:
            # A port that was in use a moment ago counts as free, as it does for the server.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        return error.strerror or str(error)
    return None
