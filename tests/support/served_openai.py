"""OpenAI's API over a tiny packaged model, without Triton: what its tests share."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import openai
from nmexport.serving.metrics import NoMetrics
from nmexport.serving.openai.front import Front
from nmexport.serving.service import TextService

from tests.support.served import SETTINGS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PROMPT = "The quick brown"
CONTEXT = 4096
LONG = CONTEXT - 100
"""Tokens of a text that takes seconds."""


class Counts(NoMetrics):
    """Counts what is added up."""

    def __init__(self) -> None:
        self.total: dict[str, float] = {}

    def add(self, name: str, amount: float = 1.0) -> None:
        self.total[name] = self.total.get(name, 0) + amount

    def of(self, name: str) -> float:
        return self.total.get(name, 0)


@contextlib.contextmanager
def served(work: Path, counts: Counts, **settings: str) -> Iterator[tuple[TextService, Front]]:
    (bundle,) = (work / "package" / "current").glob("model_repository/*/1")
    with (
        TextService.open(bundle, {**SETTINGS, **settings}, metrics=counts) as service,
        Front(service, counts, host="127.0.0.1", port=0) as front,
    ):
        yield service, front


def connect(front: Front, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(
        base_url=f"http://127.0.0.1:{front.port}/v1", api_key="any", max_retries=0, **options
    )
