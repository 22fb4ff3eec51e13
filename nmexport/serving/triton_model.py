"""Adapter between Triton's python backend and `TextService`: tensors in, responses out.

Triton calls `initialize`, `execute` and `finalize` of `TritonPythonModel`; the repository's
`model.py` imports that class. `triton_python_backend_utils` exists in Triton's process only.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nmexport.errors import EnvironmentFault, RequestError, ServerBusyError
from nmexport.generation.options import NAMES
from nmexport.serving import metrics as names
from nmexport.serving.metrics import Harmless
from nmexport.serving.openai.opening import open_front
from nmexport.serving.scheduler import SHUTTING_DOWN
from nmexport.serving.service import SETTINGS, TextRequest, TextService
from nmexport.serving.stopping import StopSignals, drain_seconds

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from nmexport.generation.token_scores import TokenScore
    from nmexport.serving.request import Outcome, Usage

_BACKEND = "triton_python_backend_utils"
_TEXTS = ("text_input", "messages")
_REPLY_FLAGS = ("stream", "return_num_input_tokens", "return_num_output_tokens")
_FLAGS = ("chat", "add_special_tokens", *_REPLY_FLAGS)
# What Triton or its own clients put among a request's parameters.
_NOT_OURS = ("triton_", "sequence_", "priority", "timeout", "binary_data_output")
_UNSEEN = np.array([3, 1, 4, 1], dtype=np.int32)


@dataclass(frozen=True, kw_only=True)
class Reply:
    """Form of the answer that a client asked for."""

    stream: bool = False
    """A response for each piece of text, in place of one for all of it."""
    return_num_input_tokens: bool = False
    return_num_output_tokens: bool = False


class TritonPythonModel:
    """One model in one server; Triton makes it by name."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open the bundle next to `model.py`; an exception marks the model unready, and says why.

        Args:
            args: `model_repository` (the model's folder), `model_version`, `model_name` and
                `model_config` (JSON), as Triton gives them.

        Raises:
            NmexportError: whatever keeps the model from serving.
        """
        self._backend = importlib.import_module(_BACKEND)
        require_whole_tensors(self._backend)
        config = json.loads(args["model_config"])
        parameters = config.get("parameters", {})
        self._queued_by_triton = queue_size(config)
        settings = {
            name: value["string_value"] for name, value in parameters.items() if name in SETTINGS
        }
        self._metrics = Harmless(TritonMetrics(self._backend, args["model_name"]))
        self._service = TextService.open(
            Path(args["model_repository"]) / args["model_version"],
            settings,
            metrics=self._metrics,
            drain_seconds=drain_seconds(os.environ),
            queued_outside=self._queued_by_triton,
        )
        self._openai = open_front(os.environ, self._service, self._metrics)
        self._signals = StopSignals(self._service.drain)

    def execute(self, requests: Sequence[Any]) -> None:
        """Take requests; their responses follow from the scheduler's thread.

        While the queue is full this waits. Requests then pile up in Triton's own queue, and what is
        more than that one holds Triton refuses with HTTP 503: a response of ours cannot, its HTTP
        endpoints answer every error of a model with 400.
        """
        for request in requests:
            sender = request.get_response_sender()
            error = self._take(request, sender)
            if error is not None:
                with contextlib.suppress(Exception):  # the others do not suffer for its client
                    end_with(self._backend, sender, error)

    def _take(self, request: Any, sender: Any) -> Any | None:
        """Queue a request; return the error that refuses it, if any."""
        errors = self._backend.TritonError
        try:
            values, reply = read_request(self._backend, request)
            sink = TritonSink(self._backend, sender, reply)
            self._service.submit(values, sink, wait=self._queued_by_triton > 0)
        except ServerBusyError as error:
            self._metrics.add(names.REJECTED)
            return errors(str(error), errors.UNAVAILABLE)
        except RequestError as error:
            self._metrics.add(names.REJECTED)
            return errors(str(error), errors.INVALID_ARG)
        except Exception:
            logging.getLogger(__name__).exception("a request could not be taken")
            self._metrics.add(names.FAILED)
            return errors("the server failed on this request; its log says why")
        return None

    def finalize(self) -> None:
        """Drain, then send what has ended."""
        for name in ("_signals", "_service", "_openai"):
            part = getattr(self, name, None)
            if part is not None:
                part.close()


def queue_size(config: Mapping[str, Any]) -> int:
    """Number of requests that Triton itself queues for a model; 0 is no limit."""
    policy = config.get("dynamic_batching", {}).get("default_queue_policy", {})
    return int(policy.get("max_queue_size", 0))


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
            allowed="NumPy 1 with a stub of Triton 24.10 or older; any NumPy with later ones",
            fix="`nmexport serve` makes such an environment; by hand: pip install 'numpy<2' in the "
            "environment whose python3 is first on the server's PATH",
        )


def read_request(backend: Any, request: Any) -> tuple[TextRequest, Reply]:
    """Read a Triton request from its inputs and its parameters.

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
    reply = Reply(**{name: flags.pop(name) for name in _REPLY_FLAGS if name in flags})
    return (
        TextRequest(
            text=texts.get("text_input"), messages=texts.get("messages"), **flags, values=values
        ),
        reply,
    )


def _inputs(backend: Any, request: Any) -> dict[str, object]:
    """Convert the request's tensors to Python values."""
    values: dict[str, object] = {}
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


def end_with(backend: Any, sender: Any, error: Any) -> None:
    """End a request with an error."""
    sender.send(
        backend.InferenceResponse(error=error),
        flags=backend.TRITONSERVER_RESPONSE_COMPLETE_FINAL,
    )


class TritonSink:
    """Sends one request's responses: one for each piece of text, or one for all of it."""

    def __init__(self, backend: Any, sender: Any, reply: Reply) -> None:
        """Answer through a response sender."""
        self._backend = backend
        self._sender = sender
        self._reply = reply
        self._pieces: list[str] = []
        self._reported = 0
        """Output tokens that earlier responses reported."""

    def text(
        self,
        piece: str,
        usage: Usage,
        scores: Sequence[TokenScore],  # noqa: ARG002  its requests have no way to ask for any
    ) -> None:
        """Send a piece, or keep it."""
        if self._reply.stream:
            self._sender.send(self._response(piece, usage))
        else:
            self._pieces.append(piece)

    def done(self, outcome: Outcome) -> None:
        """Send the last response, with the counts."""
        response = self._response("".join(self._pieces), outcome, outcome)
        self._sender.send(response, flags=self._backend.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def failed(self, problem: str) -> None:
        """Send an error that is the server's."""
        errors = self._backend.TritonError
        code = errors.UNAVAILABLE if problem == SHUTTING_DOWN else errors.INTERNAL
        end_with(self._backend, self._sender, errors(problem, code))

    def is_cancelled(self) -> bool:
        """Tell whether the client went away."""
        return bool(self._sender.is_cancelled())

    def abandoned(self) -> None:
        """Tell Triton that this request is over; nobody reads the response."""
        errors = self._backend.TritonError
        end_with(self._backend, self._sender, errors("cancelled", errors.CANCELLED))

    def _response(self, text: str, usage: Usage, outcome: Outcome | None = None) -> Any:
        """Build one response; the last one has the `outcome`."""
        reason = outcome.finish_reason if outcome else ""
        tensors = [
            self._tensor("text_output", text.encode(), np.object_),
            self._tensor("finish_reason", reason.encode(), np.object_),
            self._tensor("prompt_tokens", outcome.prompt_tokens if outcome else 0, np.int32),
            self._tensor(
                "completion_tokens", outcome.completion_tokens if outcome else 0, np.int32
            ),
        ]
        # As vLLM's backend counts for the OpenAI front end: all of the prompt in every response,
        # of the output what is new in this one; the front end sums.
        if self._reply.return_num_input_tokens:
            tensors.append(self._tensor("num_input_tokens", usage.prompt_tokens, np.uint32))
        if self._reply.return_num_output_tokens:
            new = usage.completion_tokens - self._reported
            self._reported = usage.completion_tokens
            tensors.append(self._tensor("num_output_tokens", new, np.uint32))
        return self._backend.InferenceResponse(output_tensors=tensors)

    def _tensor(self, name: str, value: bytes | int, dtype: type[np.generic]) -> Any:
        return self._backend.Tensor(name, np.array([[value]], dtype=dtype))


class TritonMetrics:
    """Publishes measurements as custom metrics of the server, labelled with the model's name."""

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
        """Set a gauge."""
        self._single[name].set(value)

    def observe(self, name: str, value: float) -> None:
        """Add one observation to a histogram."""
        if self._histograms:
            self._single[name].observe(value)
        else:
            self._single[f"{name}_sum"].increment(value)
            self._single[f"{name}_count"].increment(1)
