"""Text in, text out: a bundle, opened and checked, behind a scheduler with a thread of its own."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from nmexport.environment import free_memory
from nmexport.errors import RequestError
from nmexport.generation.chat import messages_from
from nmexport.generation.options import options_from
from nmexport.generation.tokenizer import Tokenizer
from nmexport.runtimes.opening import open_for_serving
from nmexport.runtimes.session import Closing
from nmexport.runtimes.slots import CHUNK, SLOTS, SlotRoom
from nmexport.serving import bundle as bundles
from nmexport.serving.limits import SHARED_STEPS, Limits
from nmexport.serving.scheduler import DEFAULT_MAX_TOKENS, Scheduler
from nmexport.serving.stopping import DRAIN_SECONDS

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from nmexport.runtimes.session import Session
    from nmexport.serving.bundle import Bundle
    from nmexport.serving.metrics import Metrics
    from nmexport.serving.request import Sink

_MEMORY_SHARE = 0.5
"""Share of the memory free after loading that caches get; a step needs some of the rest."""
# A character of JSON may be written as six: \\u0041.
_JSON_EXPANSION = 6


@dataclass(frozen=True, kw_only=True)
class TextRequest:
    """A client's request: either `text` or `messages`."""

    text: str | None = None
    messages: str | None = None
    """JSON of a chat."""
    chat: bool = False
    """Apply the chat template to `text`, as one message of the user."""
    add_special_tokens: bool = True
    values: Mapping[str, Any] = field(default_factory=dict)
    """Generation options by name."""
    likeliest: int | None = None
    """How many of the likeliest tokens to name beside each of the answer; None scores none."""


class TextService(Closing):
    """An open bundle that answers requests until it is closed."""

    def __init__(
        self,
        session: Session,
        tokenizer: Tokenizer,
        bundle: Bundle,
        *,
        limits: Limits,
        default_max_tokens: int = DEFAULT_MAX_TOKENS,
        metrics: Metrics | None = None,
        drain_seconds: float = DRAIN_SECONDS,
    ) -> None:
        """Start to serve.

        Args:
            session: Taken over: only this service runs it from now on.
            tokenizer: The model's.
            bundle: What is served.
            limits: How much to take on.
            default_max_tokens: For requests that do not say.
            metrics: Where measurements go.
            drain_seconds: How long requests in flight may take once it is told to stop.
        """
        self._session = session
        self._tokenizer = tokenizer
        self.bundle = bundle
        self.scheduler = Scheduler(
            session,
            decode=tokenizer.decode,
            end_tokens=bundle.end_tokens,
            limits=limits,
            default_max_tokens=default_max_tokens,
            metrics=metrics,
        )
        self._most_bytes = limits.context_tokens * tokenizer.longest_token
        self._abort = threading.Timer(drain_seconds, self.scheduler.abort)
        self._abort.daemon = True
        self._is_draining = threading.Lock()
        self._thread = threading.Thread(
            target=self.scheduler.serve, name="nmexport-scheduler", daemon=True
        )
        self._thread.start()

    @classmethod
    def open(
        cls,
        folder: Path,
        settings: Mapping[str, str],
        *,
        metrics: Metrics | None = None,
        drain_seconds: float = DRAIN_SECONDS,
        queued_outside: int = 0,
    ) -> Self:
        """Open a bundle, check that it computes what it computed when it was made, and serve.

        Args:
            folder: The bundle's.
            settings: Of the server, by name; see `SETTINGS`.
            metrics: Where measurements go.
            drain_seconds: How long requests in flight may take once it is told to stop.
            queued_outside: How much of the setting `queue` waits in front of this service.

        Raises:
            ArtifactError: if the bundle is damaged, or computes something else here.
            EnvironmentFault: if this machine lacks what it needs.
            RequestError: if a setting makes no sense.
        """
        bundle = bundles.read_bundle(folder)
        bundle.check_files()
        tokenizer = Tokenizer(folder)
        numbers = numbers_from(settings)
        session = open_for_serving(
            folder, slots_wanted(numbers, bundle.context_tokens), elsewhere=True
        )
        difference = bundles.smoke_check(session, bundle)
        logging.getLogger(__name__).info(
            "%s at %s: reference logits differ by %.2g", bundle.model, bundle.pattern, difference
        )
        if "queue" in numbers:
            numbers["queue"] = max(0, numbers["queue"] - queued_outside)
        return cls(
            session,
            tokenizer,
            bundle,
            limits=limits_for(session, numbers, bundle.context_tokens),
            default_max_tokens=numbers.get("default_max_tokens", DEFAULT_MAX_TOKENS),
            metrics=metrics,
            drain_seconds=drain_seconds,
        )

    def submit(self, request: TextRequest, sink: Sink, *, wait: bool = False) -> None:
        """Queue a request; its text goes to the sink.

        Args:
            request: What the client asks for.
            sink: Where its text goes.
            wait: Wait for room in a full queue.

        Raises:
            RequestError: if it is malformed or over a limit.
            ServerBusyError: if the queue is full, or the server is shutting down.
        """
        options = options_from(request.values, self.bundle.defaults)
        self.scheduler.submit(
            self._tokens(request), options, sink, likeliest=request.likeliest, wait=wait
        )

    def token_text(self, token: int) -> str:
        """Return the text of one token inside a longer text."""
        return self._tokenizer.token_text(token)

    def _tokens(self, request: TextRequest) -> list[int]:
        if (request.text is None) == (request.messages is None):
            raise RequestError(
                "The request names no text, or too much of it.",
                allowed="either text_input or messages",
            )
        if request.messages is not None:
            self._check_size("messages", request.messages, self._most_bytes * _JSON_EXPANSION)
            messages = messages_from(request.messages)
        elif not request.text:
            raise RequestError("text_input is empty.", allowed="at least one character")
        elif request.chat:
            messages = [{"role": "user", "content": request.text}]
        else:
            self._check_size("text_input", request.text, self._most_bytes)
            return self._tokenizer.encode(
                request.text, add_special_tokens=request.add_special_tokens
            )
        prompt = self._tokenizer.render(messages)
        self._check_size("The chat", prompt, self._most_bytes)
        return self._tokenizer.encode(prompt, add_special_tokens=False)

    def _check_size(self, what: str, text: str, most_bytes: int) -> None:
        """Refuse texts that cannot fit before tokenising them: megabytes take seconds.

        Raises:
            RequestError: if it has more bytes than the longest tokens could carry, or no UTF-8 has
                it: JSON can spell half a character.
        """
        try:
            size = len(text.encode())
        except UnicodeEncodeError as error:
            raise RequestError(f"{what} is no text: {error}", allowed="whole characters") from error
        if size > most_bytes:
            raise RequestError(
                f"Too long: {what} has {size} bytes.",
                allowed=f"{most_bytes} bytes: the model's context is "
                f"{self.scheduler.limits.context_tokens} tokens, its longest token "
                f"{self._tokenizer.longest_token} bytes",
                fix="shorten the prompt",
            )

    def drain(self) -> None:
        """Refuse new requests; end those still in flight `drain_seconds` after the first call."""
        self.scheduler.close()
        if self._is_draining.acquire(blocking=False):
            self._abort.start()

    def close(self) -> None:
        """Drain, and wait until that is done."""
        self.drain()
        self._thread.join()
        self._abort.cancel()
        self._abort.join()
        self._session.close()


def slots_wanted(numbers: Mapping[str, int], context_tokens: int) -> SlotRoom:
    """Number of slots that a server's settings ask for, for a model of this context."""
    return SlotRoom(
        slots=numbers.get("slots", SLOTS),
        tokens=min(numbers.get("context_tokens", context_tokens), context_tokens),
        may_shrink="context_tokens" not in numbers,
        chunk=numbers.get("prefill_chunk", CHUNK),
        cache_bytes=numbers.get("cache_bytes"),
    )


def limits_for(session: Session, numbers: Mapping[str, int], context_tokens: int) -> Limits:
    """Limits of a server: its settings, or what suits the session where there are none.

    Raises:
        RequestError: if a setting makes no sense.
    """
    chosen = dict(SHARED_STEPS) if session.shares_steps else {}
    chosen.update(numbers)
    chosen.pop("default_max_tokens", None)
    tokens = (numbers.get("context_tokens"), context_tokens, session.limits.tokens)
    chosen["context_tokens"] = min(size for size in tokens if size is not None)
    slots = session.limits.batch
    if session.shares_steps and slots is not None:  # opened for these settings
        chosen["slots"] = slots
        chosen["cache_bytes"] = slots * session.cache_bytes(chosen["context_tokens"])
    chosen.setdefault("cache_bytes", int(free_memory() * _MEMORY_SHARE))
    return Limits(**chosen)


SETTINGS = (
    "slots",
    "queue",
    "prefill_chunk",
    "slowdown_percent",
    "context_tokens",
    "cache_bytes",
    "default_max_tokens",
)
"""Settings of a server's operator, as text: whole numbers, or `auto` (as if left out)."""


def numbers_from(settings: Mapping[str, str]) -> dict[str, int]:
    """Read the settings that were set.

    Raises:
        RequestError: if one is unknown or no whole number.
    """
    numbers = {}
    for name, text in settings.items():
        if name not in SETTINGS:
            raise RequestError(f"Unknown setting {name!r}.", allowed=", ".join(SETTINGS))
        if text == "auto":
            continue
        if not text.isascii() or not text.isdigit():
            raise RequestError(
                f"The setting {name} cannot be {text!r}.", allowed="a whole number, or auto"
            )
        numbers[name] = int(text)
    return numbers
