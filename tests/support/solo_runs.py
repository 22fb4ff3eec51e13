"""The scheduler, and what a request gets alone: tokens are spelled one character each."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from nmexport.generation.loop import continuation
from nmexport.generation.options import GenerationOptions
from nmexport.generation.sampler import Sampler
from nmexport.serving.limits import Limits
from nmexport.serving.scheduler import Scheduler

from tests.support.tiny import VOCABULARY

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nmexport.runtimes.session import Session
    from nmexport.serving.metrics import Metrics


def spelled(ids: Sequence[int]) -> str:
    return "".join(chr(0x4E00 + token) for token in ids)


def prompt(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, VOCABULARY, length).tolist()


def solo(session: Session, text: list[int], tokens: int, *, heat: float, seed: int) -> str:
    sampler = Sampler(GenerationOptions(temperature=heat, seed=seed), prompt=text)
    drawn = continuation(session, text, sampler, max_tokens=tokens, ends=frozenset())
    return spelled(list(drawn))


def scheduler_on(session: Session, metrics: Metrics, **limits: int) -> Scheduler:
    return Scheduler(
        session, decode=spelled, end_tokens=frozenset(), limits=Limits(**limits), metrics=metrics
    )
