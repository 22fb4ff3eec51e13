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


def test_a_graph_that_the_gpu_refuses_runs_on_the_cpu() -> None:
    asked: list[str] = []

    def open_on(provider: str) -> Any:
        asked.append(provider)
        if provider == "cuda":
            raise ArtifactError("no kernel for it\nand more", fix="none")
        return "a session"

    notes = Notes()
    assert open_where_it_runs(open_on, "cuda", notes) == "a session"
    assert asked == ["cuda", "cpu"]
    assert notes.said == ["on the CPU in place of the GPU: no kernel for it"]


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
