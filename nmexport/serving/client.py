"""A first request to a server, over Triton's HTTP generate endpoints; nothing but Python."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any

from nmexport.errors import EnvironmentFault, RequestError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_EVENT = "data:"


def models(url: str, *, timeout: float = 10.0) -> list[str]:
    """Names of the models that a server has ready.

    Raises:
        EnvironmentFault: if no server answers.
        RequestError: if it answers with an error.
    """
    with _open(f"{url}/v2/repository/index", {"ready": True}, timeout) as answer:
        return [entry["name"] for entry in json.load(answer)]


def text_model(url: str, *, timeout: float = 10.0) -> str:
    """The one model of a server that takes text.

    Raises:
        EnvironmentFault: if no server answers.
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
    """One response with all of the text.

    Args:
        url: The server's.
        model: Its name.
        fields: Inputs of the model, such as `text_input` and `max_tokens`.
        timeout: Seconds to wait for anything to come.

    Returns:
        The model's outputs by name.

    Raises:
        EnvironmentFault: if no server answers.
        RequestError: if it answers with an error.
    """
    with _open(f"{url}/v2/models/{model}/generate", fields, timeout) as answer:
        outputs: dict[str, Any] = json.load(answer)
    return outputs


def stream(
    url: str, model: str, fields: Mapping[str, Any], *, timeout: float = 600.0
) -> Iterator[dict[str, Any]]:
    """Responses as they come, the last with a `finish_reason`; arguments as in `generate`.

    Raises:
        EnvironmentFault: if no server answers, or it goes away.
        RequestError: if it answers with an error.
    """
    whole = {**fields, "stream": True}
    with _open(f"{url}/v2/models/{model}/generate_stream", whole, timeout) as answer:
        for line in answer:
            text = line.decode().strip()
            if not text.startswith(_EVENT):
                continue
            response = json.loads(text.removeprefix(_EVENT))
            if "error" in response:
                raise RequestError(f"The server refuses: {response['error']}")
            yield response


def _open(url: str, document: Mapping[str, Any], timeout: float) -> Any:
    if not url.startswith(("http://", "https://")):
        raise RequestError(f"{url} is no URL of a server.", allowed="http://HOST:PORT")
    request = urllib.request.Request(  # noqa: S310  checked above
        url, json.dumps(document).encode(), {"Content-Type": "application/json"}
    )
    try:
        return urllib.request.urlopen(request, timeout=timeout)  # noqa: S310
    except urllib.error.HTTPError as error:
        raise RequestError(f"The server refuses: {_said(error)}") from error
    except OSError as error:
        raise EnvironmentFault(
            f"No server answers at {url}: {error}", fix="start one with `nmexport serve WORK`"
        ) from error


def _said(error: urllib.error.HTTPError) -> str:
    # A stream's error is an event, too.
    body = error.read().decode(errors="replace").strip().removeprefix(_EVENT)
    try:
        return str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        return body or f"{error.code} {error.reason}"
