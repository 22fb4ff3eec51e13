"""The scheduler on a session that shares steps: every request's text is the one it gets alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nmexport.generation.options import GenerationOptions
from nmexport.graph.shared_step import rewrite_for_shared_step
from nmexport.runtimes import native
from nmexport.runtimes.onnxruntime_opening import EXTERNAL_DATA_FOLDER
from nmexport.runtimes.step_session import StepSession
from nmexport.serving import client
from nmexport.serving import metrics as names
from nmexport.serving.service import TextRequest, TextService
from nmexport.store.artifact import file_digest

from tests.serving.test_scheduler import ListSink, Recorder
from tests.support.served import engine_of, require_tritonserver, save_package, triton
from tests.support.solo_runs import prompt, scheduler_on, solo
from tests.support.triton_clients import metrics_of, text_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from nmexport.runtimes.session import Stepped
    from nmexport.serving.scheduler import Scheduler

    from tests.support.exported import Exported

POSITIONS = 256

pytestmark = pytest.mark.skipif(native.find_library() is None, reason="no native library")


class Counting(StepSession):
    """Counts the sequences of each run."""

    sizes: list[int]

    def step(self, work: Sequence[Any]) -> list[Stepped]:
        self.sizes.append(len(work))
        return super().step(work)


@pytest.fixture(scope="module")
def session(plain_export: Exported) -> Iterator[Counting]:
    model = ir.load(plain_export.model)
    rewrite_for_shared_step(model, positions=POSITIONS)
    with Counting(
        ir.to_proto(model).SerializeToString(),
        positions=POSITIONS,
        library=native.require_library(),
        threads=2,
        config={EXTERNAL_DATA_FOLDER: str(plain_export.model.parent)},
    ) as one:
        one.sizes = []
        yield one


def scheduler(session: StepSession, **limits: int) -> Scheduler:
    known = {"context_tokens": POSITIONS, "cache_bytes": 10_000_000, "slots": 32, **limits}
    return scheduler_on(session, Recorder(), **known)


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_mix_gives_everyone_the_text_of_a_solo_run(
    session: StepSession, data: st.DataObject
) -> None:
    one = scheduler(
        session,
        slots=data.draw(st.sampled_from([2, 32]), "slots"),
        prefill_chunk=data.draw(st.sampled_from([2, 7, 64]), "chunk"),
    )
    shared = prompt(60, 99)
    wanted: list[tuple[ListSink, str, bool]] = []
    for seed in range(data.draw(st.integers(1, 10), "requests")):
        text = prompt(data.draw(st.integers(1, 80), "length"), seed)
        text = shared[: data.draw(st.sampled_from([0, 0, 30, 60]), "shared")] + text
        tokens = data.draw(st.integers(1, 12), "tokens")
        heat = data.draw(st.sampled_from([0.0, 0.9]), "temperature")
        sink = ListSink()
        one.submit(text, GenerationOptions(max_tokens=tokens, temperature=heat, seed=seed), sink)
        leaves = data.draw(st.sampled_from([False, False, False, True]), "leaves")
        wanted.append((sink, solo(session, text, tokens, heat=heat, seed=seed), leaves))
        for _ in range(data.draw(st.integers(0, 4), "steps before the next")):
            one.step()
        sink.cancelled = leaves
    for _ in range(1000):
        if not (one.running or one.waiting):
            break
        one.step()
    for sink, text, left in wanted:
        assert sink.problem is None
        assert text.startswith(sink.all_text)
        assert sink.was_abandoned or sink.all_text == text
        assert left or not sink.was_abandoned


def test_requests_share_runs(session: Counting) -> None:
    one = scheduler(session)
    sinks = [ListSink() for _ in range(6)]
    for seed, sink in enumerate(sinks):
        one.submit(prompt(5, seed), GenerationOptions(max_tokens=4), sink)
    session.sizes.clear()
    while one.running or one.waiting:
        one.step()
    assert session.sizes == [6, 6, 6, 6], "the prompts, and three tokens of all"
    assert all(len(sink.all_text) == 4 for sink in sinks)


def test_a_beginning_that_was_seen_is_not_computed_again(session: Counting) -> None:
    one = scheduler(session)
    text = prompt(120, 1)
    for end in (prompt(5, 2), prompt(5, 3)):
        sink = ListSink()
        one.submit(text + end, GenerationOptions(max_tokens=3), sink)
        while one.running or one.waiting:
            one.step()
        assert sink.all_text == solo(session, text + end, 3, heat=0.0, seed=0)
    recorded = one._metrics._metrics  # type: ignore[attr-defined]
    assert recorded.counts[names.PROMPT_TOKENS] == 125 + 5
    assert recorded.counts[names.REUSED_TOKENS] == 120
    assert recorded.values[names.PREFIX_BYTES] > 0


def test_beginnings_give_way_to_requests_that_need_the_memory(session: Counting) -> None:
    page = session.cache_bytes(1)
    one = scheduler(session, cache_bytes=8 * page)
    for seed in range(3):
        one.submit(prompt(40, seed), GenerationOptions(max_tokens=2), ListSink())
        while one.running or one.waiting:
            one.step()
    assert one._prefixes.bytes <= 2 * page
    one.submit(prompt(220, 9), GenerationOptions(max_tokens=20), ListSink())
    one.step()
    assert one._prefixes.bytes == 0


@pytest.fixture
def bundle(tiny_export: Path, tmp_path: Path) -> Path:
    """A package whose engine shares steps."""
    model = ir.load(tiny_export / "model.onnx")
    rewrite_for_shared_step(model, positions=POSITIONS)
    path = tmp_path / "model.step.onnx"
    path.write_bytes(ir.to_proto(model).SerializeToString())
    library = native.require_library()
    engine = engine_of(
        tiny_export,
        library={"file": str(library), "sha256": file_digest(library)},
        shared_step={"model": str(path), "dense_model": None, "positions": POSITIONS},
    )
    return save_package(tiny_export, tmp_path / "package", engine=engine, library=library)


def test_a_package_is_served_in_shared_steps(bundle: Path) -> None:
    service = TextService.open(bundle, {"cache_bytes": "100000000"})
    try:
        limits = service.scheduler.limits
        assert (limits.slots, limits.prefill_chunk) == (64, 256)
        sinks = [ListSink() for _ in range(5)]
        for sink in sinks:
            values = {"max_tokens": 8, "temperature": 0.0}
            service.submit(TextRequest(text="the same words", values=values), sink)
        assert all(sink.ended.wait(30) for sink in sinks)
        assert len({sink.all_text for sink in sinks}) == 1
        assert all(sink.problem is None for sink in sinks)
    finally:
        service.close()


def test_a_server_streams_to_many_what_each_gets_alone(bundle: Path, tmp_path: Path) -> None:
    require_tritonserver()
    with triton(bundle.parents[1], tmp_path / "log") as server:
        url = server.addresses.http
        name = client.text_model(url)

        def streamed(index: int) -> str:
            fields = {
                "text_input": "the same words and " + "one more " * (index % 7),
                "max_tokens": 4 + index % 9,
                "temperature": 0.8 * (index % 2),
                "seed": index,
                "stream": True,
            }
            return text_of(list(client.stream(url, name, fields)))

        alone = [streamed(index) for index in range(32)]
        with ThreadPoolExecutor(32) as pool:
            together = list(pool.map(streamed, range(32)))
        assert together == alone
        assert len(set(alone)) > 16
        assert metrics_of(server, name)["prompt_tokens_reused_total"] > 0
