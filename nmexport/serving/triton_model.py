"""The shell between Triton's python backend and `TextService`: tensors in, responses out.

Triton calls `initialize`, `execute` and `finalize` of `TritonPythonModel`; the repository's
`model.py` imports that class. `triton_python_backend_utils` exists in Triton's process only.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nmexport.errors import EnvironmentFault, RequestError
from nmexport.serving import metrics as names
from nmexport.serving.options import NAMES
from nmexport.serving.service import SETTINGS, TextRequest, TextService

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from nmexport.serving.scheduler import Outcome

_BACKEND = "triton_python_backend_utils"
_TEXTS = ("text_input", "messages")
_FLAGS = ("stream", "chat", "add_special_tokens")
# What Triton or its own clients put among a request's parameters.
_NOT_OURS = ("triton_", "sequence_", "priority", "timeout", "binary_data_output")
_UNSEEN = np.array([3, 1, 4, 1], dtype=np.int32)


class TritonPythonModel:
    """One model in one server; Triton makes it by name."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open the bundle beside `model.py`; an exception marks the model unready, and says why.

        Args:
            args: `model_repository` (the model's folder), `model_version`, `model_name` and
                `model_config` (JSON), as Triton gives them.

        Raises:
            NmexportError: whatever keeps the model from serving.
        """
        self._backend = importlib.import_module(_BACKEND)
        require_whole_tensors(self._backend)
        parameters = json.loads(args["model_config"]).get("parameters", {})
        settings = {
            name: value["string_value"] for name, value in parameters.items() if name in SETTINGS
        }
        self._service = TextService.open(
            Path(args["model_repository"]) / args["model_version"],
            settings,
            metrics=TritonMetrics(self._backend, args["model_name"]),
        )

    def execute(self, requests: Sequence[Any]) -> None:
        """Take requests; their responses follow from the scheduler's thread."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                values, stream = read_request(self._backend, request)
                self._service.submit(values, TritonSink(self._backend, sender, stream=stream))
            except RequestError as error:
                refuse(self._backend, sender, str(error))

    def finalize(self) -> None:
        """Drain."""
        service = getattr(self, "_service", None)
        if service is not None:
            service.close()


def require_whole_tensors(backend: Any) -> None:
    """Refuse a stub that reads and writes garbage with this NumPy.

    Stubs built before NumPy 2 read the size of its elements from the wrong place: text arrives as
    its first byte over and over, and leaves empty, with no error anywhere. Text cannot go around
    by DLPack, which has no type for it.

    Raises:
        EnvironmentFault: if a tensor does not survive the way through the stub.
    """
    # The stub's own capsule: NumPy's would meet a second fault of old stubs, on its way out.
    capsule = backend.Tensor("unseen", _UNSEEN).to_dlpack()
    tensor = backend.Tensor.from_dlpack("unseen", capsule)
    if not np.array_equal(tensor.as_numpy(), _UNSEEN):
        raise EnvironmentFault(
            f"This Triton's Python stub corrupts tensors of NumPy {np.__version__}.",
            allowed="NumPy 1 beside a stub of Triton 24.10 or older; any NumPy beside later ones",
            fix="`nmexport serve` makes such an environment; by hand: pip install 'numpy<2' in the "
            "environment whose python3 is first on the server's PATH",
        )


def read_request(backend: Any, request: Any) -> tuple[TextRequest, bool]:
    """What a Triton request asks for, from its inputs and its parameters, and whether to stream.

    Raises:
        RequestError: if a parameter is unknown or given twice, or a text is not UTF-8.
    """
    values = _inputs(backend, request)
    for name, value in json.loads(request.parameters() or "{}").items():
        if name in values:
            raise RequestError(f"{name} is given twice, as an input and as a parameter.")
        if not name.startswith(_NOT_OURS):
            values[name] = value
    flags = {name: _flag(name, values.pop(name)) for name in _FLAGS if name in values}
    texts = {name: _text(name, values.pop(name)) for name in _TEXTS if name in values}
    stream = flags.pop("stream", False)
    return (
        TextRequest(
            text=texts.get("text_input"), messages=texts.get("messages"), **flags, values=values
        ),
        stream,
    )


def _inputs(backend: Any, request: Any) -> dict[str, Any]:
    """The request's tensors as Python values."""
    values: dict[str, Any] = {}
    for name in (*_TEXTS, *_FLAGS, *NAMES):
        tensor = backend.get_input_tensor_by_name(request, name)
        if tensor is None:
            continue
        items = [_plain(name, item) for item in tensor.as_numpy().reshape(-1).tolist()]
        if name in {"stop", "stop_words"}:
            values[name] = [text for text in items if text]
        elif len(items) == 1:
            values[name] = items[0]
        else:
            raise RequestError(f"{name} holds {len(items)} values.", allowed="one")
    return values


def _plain(name: str, item: Any) -> Any:
    if not isinstance(item, bytes):
        return item
    try:
        return item.decode()
    except UnicodeDecodeError as error:
        raise RequestError(f"{name} is not UTF-8: {error}") from error


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise RequestError(f"{name} cannot be {value!r}.", allowed="true or false")
    return value


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise RequestError(f"{name} cannot be {value!r}.", allowed="text")
    return value


def refuse(backend: Any, sender: Any, problem: str) -> None:
    """End a request with an error that is the client's."""
    error = backend.TritonError(problem, backend.TritonError.INVALID_ARG)
    sender.send(
        backend.InferenceResponse(error=error),
        flags=backend.TRITONSERVER_RESPONSE_COMPLETE_FINAL,
    )


class TritonSink:
    """One request's responses: one for each piece of text, or one for all of it."""

    def __init__(self, backend: Any, sender: Any, *, stream: bool) -> None:
        """Answer through a response sender."""
        self._backend = backend
        self._sender = sender
        self._stream = stream
        self._pieces: list[str] = []

    def text(self, piece: str) -> None:
        """Send a piece, or keep it."""
        if self._stream:
            self._sender.send(self._response(piece))
        else:
            self._pieces.append(piece)

    def done(self, outcome: Outcome) -> None:
        """Send the last response, with the counts."""
        response = self._response(
            "".join(self._pieces),
            outcome.finish_reason,
            outcome.prompt_tokens,
            outcome.completion_tokens,
        )
        self._sender.send(response, flags=self._backend.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def failed(self, problem: str) -> None:
        """Send an error that is the server's."""
        self._sender.send(
            self._backend.InferenceResponse(error=self._backend.TritonError(problem)),
            flags=self._backend.TRITONSERVER_RESPONSE_COMPLETE_FINAL,
        )

    def is_cancelled(self) -> bool:
        """Whether the client went away."""
        return bool(self._sender.is_cancelled())

    def abandoned(self) -> None:
        """Tell Triton that this request is over; nobody reads it."""
        cancelled = self._backend.TritonError("cancelled", self._backend.TritonError.CANCELLED)
        self._sender.send(
            self._backend.InferenceResponse(error=cancelled),
            flags=self._backend.TRITONSERVER_RESPONSE_COMPLETE_FINAL,
        )

    def _response(
        self, text: str, reason: str = "", prompt_tokens: int = 0, completion_tokens: int = 0
    ) -> Any:
        texts = {"text_output": text, "finish_reason": reason}
        counts = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
        tensors = [
            self._backend.Tensor(name, np.array([[value.encode()]], dtype=np.object_))
            for name, value in texts.items()
        ]
        tensors += [
            self._backend.Tensor(name, np.array([[value]], dtype=np.int32))
            for name, value in counts.items()
        ]
        return self._backend.InferenceResponse(output_tensors=tensors)


class TritonMetrics:
    """Measurements as custom metrics of the server, labelled with the model's name."""

    def __init__(self, backend: Any, model: str) -> None:
        """Register every metric.

        Histograms become two counters, `_sum` and `_count`, where the server has none.
        """
        self._backend = backend
        self._labels = {"model": model}
        self._single: dict[str, Any] = {}
        self._families: list[Any] = []
        self._histograms = hasattr(backend.MetricFamily, "HISTOGRAM")
        for spec in names.METRICS:
            if spec.kind == "histogram" and not self._histograms:
                for suffix in ("_sum", "_count"):
                    self._register(f"{spec.name}{suffix}", "counter", spec)
            else:
                self._register(spec.name, spec.kind, spec)

    def _register(self, name: str, kind: names.Kind, spec: names.MetricSpec) -> None:
        families = self._backend.MetricFamily
        family = families(name=name, description=spec.about, kind=getattr(families, kind.upper()))
        self._families.append(family)  # a metric dies with its family
        more = {"buckets": list(spec.buckets)} if kind == "histogram" else {}
        self._single[name] = family.Metric(labels=self._labels, **more)

    def add(self, name: str, amount: float = 1.0) -> None:
        """Count up."""
        self._single[name].increment(amount)

    def set(self, name: str, value: float) -> None:
        """Say how things stand."""
        self._single[name].set(value)

    def observe(self, name: str, value: float) -> None:
        """Add one observation to a histogram."""
        if self._histograms:
            self._single[name].observe(value)
        else:
            self._single[f"{name}_sum"].increment(value)
            self._single[f"{name}_count"].increment(1)
