"""N:M patterns: of each M consecutive input channels of one token, N are kept."""

from __future__ import annotations

import re
from dataclasses import dataclass

from nmexport.errors import PatternError

MAX_GROUP = 64  # op contract: a kernel holds a group's keep mask in one machine word
_ALLOWED = f"N:M with 1 <= N <= M <= {MAX_GROUP}, such as 8:16, 2:4 or 12:16; N is what is kept"


@dataclass(frozen=True, order=True)
class NMPattern:
    """Keep `n` of every `m` consecutive channels.

    Raises:
        PatternError: if not 1 <= n <= m <= 64.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        """Refuse what no executor could run."""
        if not 1 <= self.n <= self.m <= MAX_GROUP:
            raise PatternError(f"Pattern {self} is out of range.", allowed=_ALLOWED)

    @classmethod
    def parse(cls, text: str) -> NMPattern:
        """Read `"8:16"`.

        Raises:
            PatternError: if the text is not two positive integers joined by a colon.
        """
        match = re.fullmatch(r"\s*(\d{1,4}):(\d{1,4})\s*", text)
        if match is None:
            raise PatternError(f"{text!r} is not an N:M pattern.", allowed=_ALLOWED)
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        """`8:16`."""
        return f"{self.n}:{self.m}"

    @property
    def density(self) -> float:
        """Share of channels kept, N/M."""
        return self.n / self.m

    @property
    def sparsity(self) -> float:
        """Share of channels dropped, 1 - N/M."""
        return 1.0 - self.density
