"""Names, units and buckets of a server's metrics; the caller exports them."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator

Kind = Literal["counter", "gauge", "histogram"]

_MILLISECONDS = (1.0, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1e3, 2.5e3, 5e3, 1e4, 3e4, 6e4)


@dataclass(frozen=True, kw_only=True)
class MetricSpec:
    """One metric."""

    name: str
    kind: Kind
    about: str
    buckets: tuple[float, ...] = ()
    """Upper bounds of a histogram's buckets."""


QUEUE_TIME = "nmexport_queue_time_ms"
FIRST_WAIT = "nmexport_time_to_first_token_ms"
NEXT_WAIT = "nmexport_inter_token_latency_ms"
PROMPT_TOKENS = "nmexport_prompt_tokens_total"
GENERATED_TOKENS = "nmexport_generated_tokens_total"
FINISHED = "nmexport_requests_finished_total"
REJECTED = "nmexport_requests_rejected_total"
CANCELLED = "nmexport_requests_cancelled_total"
FAILED = "nmexport_requests_failed_total"
RUNNING = "nmexport_running_requests"
WAITING = "nmexport_waiting_requests"
CACHE_BYTES = "nmexport_cache_reserved_bytes"
PREFIX_BYTES = "nmexport_cache_prefix_bytes"
REUSED_TOKENS = "nmexport_prompt_tokens_reused_total"

METRICS = (
    MetricSpec(
        name=QUEUE_TIME,
        kind="histogram",
        about="Milliseconds a request waited for a slot",
        buckets=_MILLISECONDS,
    ),
    MetricSpec(
        name=FIRST_WAIT,
        kind="histogram",
        about="Milliseconds from a request's arrival to its first token",
        buckets=_MILLISECONDS,
    ),
    MetricSpec(
        name=NEXT_WAIT,
        kind="histogram",
        about="Milliseconds between two tokens of a request",
        buckets=_MILLISECONDS,
    ),
    MetricSpec(name=PROMPT_TOKENS, kind="counter", about="Prompt tokens processed"),
    MetricSpec(
        name=REUSED_TOKENS,
        kind="counter",
        about="Prompt tokens whose cache an earlier request had computed",
    ),
    MetricSpec(name=GENERATED_TOKENS, kind="counter", about="Tokens generated"),
    MetricSpec(name=FINISHED, kind="counter", about="Requests that ran to their end"),
    MetricSpec(
        name=REJECTED,
        kind="counter",
        about="Requests refused: malformed, over a limit, or queue full",
    ),
    MetricSpec(name=CANCELLED, kind="counter", about="Requests whose client went away"),
    MetricSpec(name=FAILED, kind="counter", about="Requests that failed inside"),
    MetricSpec(name=RUNNING, kind="gauge", about="Requests in a slot"),
    MetricSpec(name=WAITING, kind="gauge", about="Requests waiting for a slot"),
    MetricSpec(name=CACHE_BYTES, kind="gauge", about="Cache memory reserved by requests in a slot"),
    MetricSpec(
        name=PREFIX_BYTES, kind="gauge", about="Cache memory kept for prompts that begin alike"
    ),
)


class Metrics(Protocol):
    """Receiver of measurements."""

    def add(self, name: str, amount: float = 1.0) -> None:
        """Count up."""
        ...

    def set(self, name: str, value: float) -> None:
        """Set a gauge."""
        ...

    def observe(self, name: str, value: float) -> None:
        """Add one observation to a histogram."""
        ...


class NoMetrics:
    """Measurements go nowhere."""

    def add(self, name: str, amount: float = 1.0) -> None:
        """Nothing."""

    def set(self, name: str, value: float) -> None:
        """Nothing."""

    def observe(self, name: str, value: float) -> None:
        """Nothing."""


class Harmless:
    """Passes measurements on and swallows errors: a lost one is not worth a request."""

    def __init__(self, metrics: Metrics) -> None:
        """Pass everything to other metrics."""
        self._metrics = metrics
        self._has_told = False

    def add(self, name: str, amount: float = 1.0) -> None:
        """Count up."""
        with self._caught():
            self._metrics.add(name, amount)

    def set(self, name: str, value: float) -> None:
        """Set a gauge."""
        with self._caught():
            self._metrics.set(name, value)

    def observe(self, name: str, value: float) -> None:
        """Add one observation to a histogram."""
        with self._caught():
            self._metrics.observe(name, value)

    @contextlib.contextmanager
    def _caught(self) -> Iterator[None]:
        try:
            yield
        except Exception:
            if not self._has_told:  # once: the next step would say it again
                logging.getLogger(__name__).exception("a measurement is lost; so may be others")
            self._has_told = True
