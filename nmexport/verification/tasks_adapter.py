"""Runs lm-evaluation-harness on our sessions: the artifact itself answers its requests.

Imported only where the optional package is installed; see `tasks`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from lm_eval import utils as harness
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)

from nmexport.errors import UserError
from nmexport.generation.options import GenerationOptions
from nmexport.generation.sampler import Sampler
from nmexport.verification.likelihood import ScoredText, scores

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from nmexport.progress import Progress
    from nmexport.runtimes.session import Session
    from nmexport.verification.tasks import TextSide

_MAX_NEW_TOKENS = 256  # the harness's own default
_GENERATION_BATCH = 8


class SessionLM(TemplateLM):  # type: ignore[misc]  # the harness ships no types
    """A session and its tokenizer as the harness's language model.

    Texts become tokens exactly as the harness's own Hugging Face model makes them.
    """

    def __init__(
        self,
        session: Session,
        text: TextSide,
        *,
        stepwise: bool,
        progress: Progress,
        label: str,
        seed: int = 0,
    ) -> None:
        """Answer for one model.

        Args:
            session: The model.
            text: Its tokenizer and window; what the session takes may be less.
            stepwise: See `likelihood.scores`.
            progress: Counts requests.
            label: What it counts them under.
            seed: Of generation, where a task asks for draws.
        """
        super().__init__()
        self.tokenizer = text.tokenizer
        self.max_length = text.within(session.limits).max_length
        self._session = session
        self._stepwise = stepwise
        self._progress = progress
        self._label = label
        self._seed = seed

    @property
    def eot_token_id(self) -> int:
        """Token that ends a text."""
        token: int = self.tokenizer.eos_token_id
        return token

    @property
    def prefix_token_id(self) -> int:
        """Token that stands before a text with no context."""
        first: int | None = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else first

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: object
    ) -> list[int]:
        """Token ids; special tokens as the tokenizer adds them, unless said otherwise."""
        if add_special_tokens is None and has_bos_prefix(
            string, self.tokenizer.decode(self.prefix_token_id)
        ):
            add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        ids: list[int] = self.tokenizer.encode(string, **options)
        return ids

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """Score continuations after contexts; shows our progress bar, not the harness's."""
        del disable_tqdm
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return answers

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = True
    ) -> list[float]:
        """Score whole texts in windows that do not overlap."""
        del disable_tqdm
        windows = [list(self._windows(request.args[0])) for request in requests]
        flat = iter(self._score([pair for pairs in windows for pair in pairs]))
        return [sum(next(flat)[0] for _ in pairs) for pairs in windows]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        """Continue contexts until a stop text; those of one length and options in a batch."""
        del disable_tqdm
        groups: dict[tuple[str, int], list[tuple[int, list[int], dict[str, Any]]]] = {}
        for index, request in enumerate(requests):
            given, options = request.args
            wanted = normalize_gen_kwargs(options, _MAX_NEW_TOKENS)
            context = self._context(given, wanted["max_gen_toks"])
            groups.setdefault((repr(options), len(context)), []).append((index, context, wanted))
        size = min(self._session.limits.batch or _GENERATION_BATCH, _GENERATION_BATCH)
        batches = [
            rows[start : start + size]
            for rows in groups.values()
            for start in range(0, len(rows), size)
        ]
        texts = [""] * len(requests)
        for batch in self._progress.track(batches, label=self._label, total=len(batches)):
            indices, contexts, wanted = zip(*batch, strict=True)
            for index, text in zip(indices, self._continue(contexts, wanted[0]), strict=True):
                texts[index] = text
        return texts

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: object
    ) -> list[tuple[float, bool]]:
        return self._score([(context, continuation) for _, context, continuation in requests])

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        texts = []
        for context, continuation in pairs:
            try:
                texts.append(ScoredText.fitted(context, continuation, self.max_length))
            except ValueError as error:
                raise UserError(
                    f"A task's request does not fit the model: {error}.",
                    fix=self._larger_window,
                ) from error
        bar = iter(self._progress.track(texts, label=self._label, total=len(texts)))
        results = scores(
            self._session, texts, stepwise=self._stepwise, advance=lambda: next(bar, None)
        )
        next(bar, None)  # past the end: a bar closes once it is asked for more
        return [(score.logprob, score.is_greedy) for score in results]

    def _windows(self, text: str) -> Iterator[tuple[list[int], list[int]]]:
        for window in harness.get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        ):
            yield harness.make_disjoint_window(window)

    def _context(self, text: str, new_tokens: int) -> list[int]:
        """Encode a prompt, cut from the left to leave room for what follows."""
        room = self.max_length - new_tokens
        if room < 1:
            raise UserError(
                f"A task asks for {new_tokens} new tokens of a model with a window of "
                f"{self.max_length}.",
                fix="lower max_gen_toks in the task's generation_kwargs"
                + (f", or {self._larger_window}" if self._larger_window else ""),
            )
        return (self.tok_encode(text) or [self.prefix_token_id])[-room:]

    @property
    def _larger_window(self) -> str | None:
        """Say how to get a larger window, where the runtime limits it."""
        built = self._session.limits.tokens == self.max_length
        return "build the engine with a larger engine.max_context" if built else None

    def _continue(self, contexts: Sequence[list[int]], wanted: dict[str, Any]) -> list[str]:
        """Continue each context; all have one length."""
        end = self.tokenizer.decode(self.eot_token_id, skip_special_tokens=False)
        stops = handle_stop_sequences(list(wanted.get("until", [])), eos=end)
        samplers = [self._sampler(wanted) for _ in contexts]
        rows: list[list[int]] = [[] for _ in contexts]
        running = set(range(len(contexts)))
        logits = self._session.prefill(np.array(contexts, dtype=np.int64))
        for step in range(wanted["max_gen_toks"]):
            if step:
                logits = self._session.decode_step(_column([row[-1] for row in rows]))
            for index, row in enumerate(rows):
                # A finished row goes on being fed: its neighbours do not depend on it.
                row.append(samplers[index](logits[index, -1]) if index in running else row[-1])
            running -= {index for index in running if self._has_ended(rows[index], stops)}
            if not running:
                break
        return [
            postprocess_generated_text(self._text(row), stops, think_end_token=None) for row in rows
        ]

    def _sampler(self, wanted: dict[str, Any]) -> Sampler:
        return Sampler(
            GenerationOptions(
                temperature=wanted.get("temperature", 1.0) if wanted.get("do_sample") else 0.0,
                top_p=wanted.get("top_p", 1.0),
                top_k=wanted.get("top_k", 0),
                seed=self._seed,
            )
        )

    def _has_ended(self, row: list[int], stops: Sequence[str]) -> bool:
        return row[-1] == self.eot_token_id or any(
            stop in self._text(row) for stop in stops if stop
        )

    def _text(self, row: list[int]) -> str:
        """Decode generated tokens, up to the one that ends the text."""
        ends = self.eot_token_id
        kept = row[: row.index(ends)] if ends in row else row
        text: str = self.tokenizer.decode(kept, skip_special_tokens=True)
        return text


def _column(tokens: Sequence[int]) -> NDArray[np.int64]:
    return np.array(tokens, dtype=np.int64)[:, None]
