"""On a GPU: a session with slots gives everyone the bits of a solo run, in any company."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from nmexport.generation.options import GenerationOptions
from nmexport.runtimes.chunks import chunk_end
from nmexport.runtimes.session import Work
from nmexport.runtimes.slot_session import SlotSession
from nmexport.runtimes.tensorrt import library as tensorrt_library
from nmexport.serving.limits import Limits
from nmexport.serving.scheduler import Scheduler

from tests.serving.test_scheduler import ListSink
from tests.support.exported import Exported, export_folder
from tests.support.slots import gpu_model
from tests.support.tiny import VOCABULARY, save_tiny_model

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.skipif(
    not tensorrt_library.gpu_is_usable(), reason="no NVIDIA GPU with its driver is here"
)
POSITIONS = 1024
SLOTS, TOKENS, CHUNK = 8, 512, 64
SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("slots")
    save_tiny_model(folder / "source", "llama", **SMOLLM2)
    (folder / "export").mkdir()
    return export_folder(folder / "source", folder / "export", dtype="float16")


def opened(path: Path) -> SlotSession:
    model = gpu_model(path, POSITIONS)
    return SlotSession(model, slots=SLOTS, tokens=TOKENS, chunk=CHUNK)


@pytest.fixture(scope="module", params=["model", "dense_model"])
def session(request: pytest.FixtureRequest, exported: Exported) -> Iterator[SlotSession]:
    with opened(getattr(exported, request.param)) as one:
        yield one


def tokens(length: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, VOCABULARY, length)


def rows_of(session: SlotSession, seeds: list[int], together: int) -> dict[int, list[np.ndarray]]:
    """Logits of each sequence's steps, so many of them at a time; arrivals and ends mix."""
    waiting, done = list(seeds), {seed: list[np.ndarray]() for seed in seeds}
    running: dict[int, tuple[object, int]] = {}
    while waiting or running:
        while waiting and len(running) < together:
            running[waiting.pop(0)] = (None, 0)
        work = {seed: _work(seed, *state, done[seed]) for seed, state in running.items()}
        results = session.step(list(work.values()))
        for (seed, part), result in zip(work.items(), results, strict=True):
            cached = running[seed][1] + len(part.tokens)
            running[seed] = (result.cache, cached)
            if cached >= len(_prompt(seed)):
                assert result.logits is not None
                assert result.token == result.logits.argmax()
                done[seed].append(result.logits.copy())
            if len(done[seed]) == 3 + seed % 7:
                del running[seed]
        del results, result
    return done


def _prompt(seed: int) -> np.ndarray:
    return tokens([1, 2, 63, 64, 65, 66, 130, 300][seed % 8], seed)


def _work(seed: int, cache: object, cached: int, logits: list[np.ndarray]) -> Work:
    prompt = _prompt(seed)
    if cached < len(prompt):
        return Work(cache, prompt[cached : chunk_end(cached, len(prompt), CHUNK)])
    likeliest = np.argsort(logits[-1])[-1 - seed % 2 :][:1]  # the first, or the second
    return Work(cache, likeliest.astype(np.int64))


def test_logits_are_those_of_a_solo_run_in_every_slot(session: SlotSession) -> None:
    seeds = list(range(24))
    alone = rows_of(session, seeds, 1)
    for together in (3, SLOTS):
        mixed = rows_of(session, list(np.random.default_rng(together).permutation(seeds)), together)
        for seed in seeds:
            np.testing.assert_array_equal(mixed[seed], alone[seed])


def test_texts_through_the_scheduler_are_those_of_a_solo_run(session: SlotSession) -> None:
    def texts(together: int) -> list[str]:
        one = Scheduler(
            session,
            decode=lambda ids: "".join(chr(0x4E00 + token) for token in ids),
            end_tokens=frozenset(),
            limits=Limits(
                context_tokens=TOKENS,
                cache_bytes=SLOTS * session.cache_bytes(TOKENS),
                slots=together,
                prefill_chunk=CHUNK,
            ),
        )
        sinks = [ListSink() for _ in range(24)]
        for seed, sink in enumerate(sinks):
            heat = 0.8 * (seed % 4 == 3)
            options = GenerationOptions(max_tokens=5 + seed, temperature=heat, seed=seed)
            one.submit(_prompt(seed).tolist(), options, sink)
        steps = 0
        while one.running or one.waiting:
            one.step()
            steps += 1
            sinks[5].cancelled = together > 1 and steps > 4
        return [sink.all_text for sink in sinks]

    alone, mixed = texts(1), texts(SLOTS)
    assert alone[5].startswith(mixed[5])
    assert [*mixed[:5], *mixed[6:]] == [*alone[:5], *alone[6:]]
