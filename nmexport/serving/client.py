"""A first request to a server, over Triton's HTTP generate endpoints; nothing but Python."""

from __future__ import annotations

import contextlib
import http.client
import json
import urllib.error
import urllib.parse
import urllib.request
from typing import TYPE_CHECKING, Any

from nmexport.errors import EnvironmentFault, RequestError

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Mapping

_EVENT = "data:"
_AT_FAULT = (OSError, http.client.HTTPException)
"""Errors of a connection whose other side is not there, or goes away."""


def models(url: str, *, timeout: float = 10.0) -> list[str]:
    """List the models that a server has ready.

    Raises:
        EnvironmentFault: if no server answers, or one that is not Triton.
        RequestError: if it answers with an error.
    """
    with _open(f"{url}/v2/repository/index", {"ready": True}, timeout) as answer, _reading(url):
        return [entry["name"] for entry in json.load(answer)]


def text_model(url: str, *, timeout: float = 10.0) -> str:
    """Find the one model of a server that takes text.

    Raises:
        EnvironmentFault: if no server answers, or one that is not Triton.
        RequestError: if it has none, or several.
    """
    names = [name for name in models(url, timeout=timeout) if not name.endswith("_engine")]
    if len(names) != 1:
        raise RequestError(
            f"The server at {url} has {len(names)} models that could be meant.",
            allowed=", ".join(names) or "none is ready",
            fix="name one with --name",
        )
    return names[0]


def generate(
    url: str, model: str, fields: Mapping[str, Any], *, timeout: float = 600.0
) -> dict[str, Any]:
    """Return one response with all of the text.

    Args:
        url: The server's.
        model: Its name.
        fields: Inputs of the model, such as `text_input` and `max_tokens`.
        timeout: Seconds to wait for anything to come.

    Returns:
        The model's outputs by name.

    Raises:
        EnvironmentFault: if no server answers, it goes away, or it is not Triton.
        RequestError: if it answers with an error.
    """
    with _open(f"{url}/v2/models/{model}/generate", fields, timeout) as answer, _reading(url):
        outputs: dict[str, Any] = json.load(answer)
    return outputs


def stream(
    url: str, model: str, fields: Mapping[str, Any], *, timeout: float = 600.0
) -> Generator[dict[str, Any], None, None]:
    """Yield responses as they come, the last with a `finish_reason`; arguments as in `generate`.

    Closing the generator closes the connection, and the server ends the request.

    Raises:
        EnvironmentFault: if no server answers, it goes away before the last response, or it is not
            Triton.
        RequestError: if it answers with an error.
    """
    whole = {**fields, "stream": True}
    finished, is_events = False, False
    where = f"{url}/v2/models/{model}/generate_stream"
    with _open(where, whole, timeout) as answer, _reading(url):
        for line in answer:
            if not line.endswith(b"\n"):
                break  # a connection that was cut looks like one that was closed
            text = line.decode().strip()
            if not text.startswith(_EVENT):
                if text and not is_events:
                    raise _no_triton(url, "its answer is no stream of events")
                continue
            is_events = True
            response = json.loads(text.removeprefix(_EVENT))
            if "error" in response:
                raise RequestError(f"The server refuses: {response['error']}")
            if "text_output" not in response:
                raise RequestError(
                    f"The model {model} gives no text_output.", allowed="a text model of nmexport"
                )
            finished = bool(response.get("finish_reason"))
            yield response
    if not finished:
        raise _unreachable_error(url, "the stream has no last response")


def _open(url: str, document: Mapping[str, Any], timeout: float) -> Any:
    server = url.partition("/v2/")[0]
    if not url.startswith(("http://", "https://")):
        raise RequestError(f"{server} is no URL of a server.", allowed="http://HOST:PORT")
    try:
        request = urllib.request.Request(  # noqa: S310  checked above
            url, json.dumps(document).encode(), {"Content-Type": "application/json"}
        )
        return urllib.request.urlopen(request, timeout=timeout)  # noqa: S310
    except urllib.error.HTTPError as error:
        with _reading(url):
            said = _error_message(error)
        if said is None:
            raise _no_triton(url, f"it answers with HTTP {error.code} {error.reason}") from error
        raise RequestError(f"The server refuses: {said}") from error
    except (http.client.InvalidURL, ValueError) as error:
        raise RequestError(
            f"{server} is no URL of a server.", allowed="http://HOST:PORT"
        ) from error
    except (http.client.BadStatusLine, http.client.LineTooLong) as error:
        if isinstance(error, http.client.RemoteDisconnected):
            raise _unreachable_error(url, str(error)) from error
        raise _no_triton(url, "it does not speak HTTP (the gRPC port does not, either)") from error
    except _AT_FAULT as error:
        raise EnvironmentFault(
            f"No server answers at {server}: {_reason(error)}",
            fix="start one with `nmexport serve WORK`",
        ) from error


@contextlib.contextmanager
def _reading(url: str) -> Iterator[None]:
    """Explain faults of an answer."""
    try:
        yield
    except _AT_FAULT as error:
        raise _unreachable_error(url, str(error) or type(error).__name__) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _no_triton(url, "its answer is not what Triton's would be") from error


def _no_triton(url: str, why: str) -> EnvironmentFault:
    parts = urllib.parse.urlsplit(url)
    return EnvironmentFault(
        f"{parts.scheme}://{parts.netloc} is no Triton HTTP port: {why}.",
        allowed="the HTTP port of a Triton server, 8000 unless it was told otherwise",
        fix="check --url; `nmexport serve` says where it listens",
    )


def _unreachable_error(url: str, how: str) -> EnvironmentFault:
    return EnvironmentFault(
        f"The server at {url} went away before the answer was complete: {how}",
        fix="see its own messages, and ask again",
    )


def _reason(error: Exception) -> str:
    """Return the operating system's message, where it refused."""
    inner = getattr(error, "reason", error)
    return getattr(inner, "strerror", None) or str(inner)


def _error_message(error: urllib.error.HTTPError) -> str | None:
    """Return Triton's error message; None where the answer is not Triton's."""
    # A stream's error is an event, too.
    body = error.read().decode(errors="replace").strip().removeprefix(_EVENT)
    try:
        return str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        return None
