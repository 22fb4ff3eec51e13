"""Text from a built artifact: prompt in, pieces of text out as they come; no torch."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from nmexport.errors import UserError
from nmexport.generation.context import context_length, length_switch
from nmexport.generation.defaults import end_tokens
from nmexport.generation.sampler import Sampler
from nmexport.generation.stopping import StopFilter
from nmexport.generation.text_stream import TextStream
from nmexport.generation.tokenizer import Tokenizer
from nmexport.runtimes.engine import read_engine
from nmexport.runtimes.opening import open_session

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from nmexport.generation.options import GenerationOptions
    from nmexport.runtimes.session import Session

logger = logging.getLogger(__name__)


def generate(
    work: Path,
    prompt: str,
    options: GenerationOptions,
    *,
    chat: bool = False,
    dense: bool = False,
) -> Iterator[str]:
    """Continue a prompt with the model that was built in a work directory.

    Args:
        work: The work directory.
        prompt: Text to continue, or the user's message where `chat` is set.
        options: How the text is drawn and where it ends; the model's end-of-text token ends it too.
        chat: Apply the model's chat template to the prompt.
        dense: Run the dense baseline in place of the sparse model.

    Returns:
        Pieces of text, each whole characters; joined they are the continuation.

    Raises:
        UserError: if the prompt has no tokens or fills the context.
        ArtifactError: if the work directory holds no engine, or one that cannot be opened.
        EnvironmentFault: if the engine needs a native library that is missing here.
    """
    engine_folder = work / "engine" / "current"
    folder = read_engine(engine_folder).model.parent
    tokenizer = Tokenizer(folder)
    prompt_ids = encode_prompt(tokenizer, prompt, chat=chat)
    context = context_length(folder)
    room = context - len(prompt_ids)
    if room < 1:
        raise UserError(
            f"The prompt has {len(prompt_ids)} tokens, and the model's context is {context}: no "
            "token can follow.",
            allowed=f"at most {context - 1} tokens",
            fix="shorten the prompt",
        )
    session = open_session(engine_folder, side="dense" if dense else "sparse")
    sampler = Sampler(options, prompt=prompt_ids)
    wanted = options.max_tokens or room

    def pieces() -> Iterator[str]:
        with session:
            tokens = _tokens(
                session, folder, tokenizer, prompt_ids, sampler, max_tokens=min(wanted, room)
            )
            if room < wanted:
                tokens = _explain_when_full(tokens, room, context)
            yield from until_stop(text_pieces(tokenizer, tokens), options.stop)

    return pieces()


def session_text(
    session: Session, folder: Path, prompt: Sequence[int], sampler: Sampler, *, max_tokens: int
) -> Iterator[str]:
    """Continue a prompt on an open session, as `generate` does.

    Args:
        session: The model.
        folder: With its configuration and tokenizer.
        prompt: Token ids that leave room for `max_tokens` in the model's context.
        sampler: Chooses tokens.
        max_tokens: At most this many tokens; the model's end-of-text token ends it sooner.
    """
    tokenizer = Tokenizer(folder)
    yield from text_pieces(
        tokenizer, _tokens(session, folder, tokenizer, prompt, sampler, max_tokens=max_tokens)
    )


def _tokens(
    session: Session,
    folder: Path,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    sampler: Sampler,
    *,
    max_tokens: int,
) -> Iterator[int]:
    """Yield the tokens that follow a prompt; the model's own files say when they end."""
    return continuation(
        session,
        prompt,
        sampler,
        max_tokens=max_tokens,
        ends=end_tokens(folder, tokenizer),
        switch=length_switch(folder),
    )


def encode_prompt(tokenizer: Tokenizer, prompt: str, *, chat: bool) -> list[int]:
    """Encode a prompt as token ids.

    Raises:
        UserError: if it has no tokens or ones that the model does not know, or a chat template is
            asked for and there is none.
    """
    if chat:
        ids = tokenizer.encode_chat([{"role": "user", "content": prompt}])
    else:
        ids = tokenizer.encode(prompt)
    if not ids and tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id]
    if not ids:
        raise UserError(f"The prompt {prompt!r} has no tokens.", fix="give some text")
    return ids


def continuation(
    session: Session,
    prompt: Sequence[int],
    sampler: Sampler,
    *,
    max_tokens: int,
    ends: frozenset[int],
    switch: int | None = None,
) -> Iterator[int]:
    """Yield the tokens that follow a prompt, until one of `ends` (not yielded) or `max_tokens`.

    A sequence that grows beyond `switch` tokens is computed anew: see `context.length_switch`.
    """
    text = list(prompt)
    token, cache = _next(session, sampler, None, text)
    for made in range(max_tokens):
        if token in ends:
            return
        yield token
        text.append(token)
        if made + 1 == max_tokens:
            return
        if len(text) - 1 == switch:
            cache = None  # its memory is free for the next one
            token, cache = _next(session, sampler, None, text)
        else:
            token, cache = _next(session, sampler, cache, [token])


def _next(
    session: Session, sampler: Sampler, cache: Any | None, tokens: Sequence[int]
) -> tuple[int, Any]:
    """Choose the token after some, and return the cache with them in it."""
    import numpy as np

    ids = np.asarray([tokens], dtype=np.int64)
    if sampler.is_greedy:  # chosen where the logits are
        chosen, extended = session.next_tokens(cache, ids)
        return int(chosen[0]), extended
    logits, extended = session.extend_last(cache, ids)
    return sampler(logits[0, -1]), extended


def _explain_when_full(tokens: Iterable[int], room: int, context: int) -> Iterator[int]:
    """Yield tokens as they come; warn where the context, not the model, ends them."""
    made = 0
    for token in tokens:
        made += 1
        yield token
    if made == room:
        logger.warning("Stopped: the model's context of %d tokens is full.", context)


def text_pieces(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """Yield the text of tokens as they come, never half a character; see `TextStream`."""
    stream = TextStream(tokenizer.decode)
    yield from (piece for piece in map(stream.push, tokens) if piece)
    rest = stream.flush()
    if rest:
        yield rest


def until_stop(pieces: Iterable[str], stop: Sequence[str]) -> Iterator[str]:
    """Yield pieces up to the first of the stop texts; what might begin one is held back."""
    kept = StopFilter(stop)
    for piece in pieces:
        given = kept.push(piece)
        if given:
            yield given
        if kept.stopped:
            return
    rest = kept.flush()
    if rest:
        yield rest
