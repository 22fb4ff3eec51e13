"""What verification runs beside the engine: on its GPU, or said why not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from nmexport.errors import ArtifactError
from nmexport.models.offload import Memory
from nmexport.progress import Silent
from nmexport.runtimes.engine import Engine
from nmexport.verification import placing
from nmexport.verification.placing import open_where_it_runs, parity_device

if TYPE_CHECKING:
    from pathlib import Path


class Notes(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, message: str) -> None:
        self.said.append(message)


class Opened:
    """A session on a provider, which may fail when it runs."""

    def __init__(self, provider: str, fault: str | None = None) -> None:
        self.provider, self.fault, self.closed = provider, fault, False

    def prefill(self, _: object) -> None:
        if self.fault is not None:
            raise RuntimeError(self.fault)

    def close(self) -> None:
        self.closed = True


def test_a_graph_that_the_gpu_refuses_runs_on_the_cpu() -> None:
    def open_on(provider: str) -> Any:
        if provider == "cuda":
            raise ArtifactError("no kernel for it\nand more", fix="none")
        return Opened(provider)

    notes = Notes()
    opened: Any = open_where_it_runs(open_on, "cuda", notes)
    assert opened.provider == "cpu"
    assert notes.said == ["on the CPU in place of the GPU: no kernel for it"]


def test_a_graph_that_opens_on_the_gpu_and_fails_there_runs_on_the_cpu() -> None:
    made: list[Opened] = []

    def open_on(provider: str) -> Any:
        made.append(Opened(provider, "no kernel image\nand more" if provider == "cuda" else None))
        return made[-1]

    notes = Notes()
    opened: Any = open_where_it_runs(open_on, "cuda", notes)
    assert opened is made[1]
    assert made[0].closed
    (said,) = notes.said
    assert said.endswith("does not run there: no kernel image")


def test_a_graph_that_runs_on_the_gpu_stays_there() -> None:
    opened: Any = open_where_it_runs(lambda provider: Opened(provider), "cuda", Silent())  # type: ignore[arg-type,return-value] # noqa: PLW0108
    assert (opened.provider, opened.closed) == ("cuda", False)


def test_what_the_cpu_refuses_is_an_error() -> None:
    def refuse(_: str) -> Any:
        raise ArtifactError("no kernel for it", fix="none")

    with pytest.raises(ArtifactError, match="no kernel"):
        open_where_it_runs(refuse, "cpu", Silent())


@pytest.mark.parametrize(
    ("provider", "free", "expected"),
    [("cpu", 1 << 40, "cpu"), ("cuda", 3500, "cuda"), ("cuda", 3499, "cpu")],
)
def test_parity_runs_where_three_executors_find_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, provider: Any, free: int, expected: str
) -> None:
    (tmp_path / "model.onnx").write_bytes(b"\0" * 1000)
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / "model.onnx").write_bytes(b"\0" * 1000)  # no executor of parity
    engine = Engine(
        runtime="onnxruntime",
        runtime_version="1",
        model=tmp_path / "model.onnx",
        dense_model=None,
        element_type="float16",
        threads=None,
        provider=provider,
        session_config={},
        library=None,
    )
    monkeypatch.setattr(placing, "provider_here", lambda given: given)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(placing, "free_memory", lambda: Memory(host=1 << 40, devices=(free,)))
    assert parity_device(engine) == expected
