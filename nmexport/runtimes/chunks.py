"""How a prompt is cut into chunks."""

from __future__ import annotations

LEAST_CHUNK = 2
"""Tokens of a chunk at least, but for a whole prompt of one."""


def chunk_end(start: int, total: int, chunk: int) -> int:
    """Return the end of the prompt chunk that begins at `start`.

    No chunk but a whole prompt is one token long: models whose decode is another computation than
    their prefill tell the two apart by that, and a prompt's last token belongs to prefill.
    """
    end = min(start + chunk, total)
    return total if total - end == 1 else end
