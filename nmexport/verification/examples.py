"""Text that a model writes after a few prompts, for people to compare."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nmexport.generation.context import context_length
from nmexport.generation.loop import session_text
from nmexport.generation.sampler import Sampler
from nmexport.generation.tokenizer import Tokenizer

if TYPE_CHECKING:
    from nmexport.runtimes.session import Session
    from nmexport.verification.subject import Subject

TOKENS = 24
"""Tokens of a text at most: about a line."""


def write(session: Session, subject: Subject) -> dict[str, str]:
    """Continue the recipe's examples greedily, as `nmexport generate` does.

    Args:
        session: The model.
        subject: The build, and its recipe.

    Returns:
        Text by prompt. A prompt that leaves no room in the model's context, or has a token that
        the model does not know, is left out.
    """
    folder = subject.engine.model.parent
    tokenizer, room = Tokenizer(folder), context_length(folder)
    texts = {}
    for prompt in subject.recipe.evaluation.examples:
        ids = tokenizer.encode(prompt)
        if not ids or len(ids) >= room or max(ids) >= session.vocabulary_size:
            continue
        pieces = session_text(
            session, folder, ids, Sampler(), max_tokens=min(TOKENS, room - len(ids))
        )
        texts[prompt] = "".join(pieces)
    return texts
