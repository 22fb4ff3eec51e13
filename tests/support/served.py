"""Tiny packaged models and the servers they run in: what the serving tests share."""

from __future__ import annotations

import contextlib
import http.server
import json
import shutil
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from nmexport.errors import EnvironmentFault
from nmexport.runtimes.engine import SCHEMA, Engine
from nmexport.runtimes.onnxruntime_opening import SESSION_CONFIG
from nmexport.serving import launch
from nmexport.serving.addresses import Addresses
from nmexport.serving.bundle import FILENAME
from nmexport.serving.repository import TextModel, write_text_model, write_words
from nmexport.serving.stub_environment import python_environment
from nmexport.store.records import record_from

from tests.support.exported import export_folder

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.exported import Exported

NAME = "tiny"
CHAT_TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}: {{ message['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
SETTINGS = {
    "slots": "4",
    "queue": "64",
    "prefill_chunk": "8",
    "slowdown_percent": "80",
    "default_max_tokens": "16",
    "context_tokens": "auto",
    "cache_bytes": "auto",
}


def save_export(source: Path, output: Path, *, dtype: str = "float32") -> Path:
    """Export a tiny model with all that lies beside it."""
    output.mkdir(parents=True)
    add_configs(source, export_folder(source, output, dtype=dtype), output)
    return output


def add_configs(source: Path, exported: Exported, output: Path) -> None:
    """Write what lies beside an export: tokenizer, configuration, chat template."""
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (output / name).write_bytes((source / name).read_bytes())
    (output / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    length = exported.dense.config.max_position_embeddings
    (output / "genai_config.json").write_text(json.dumps({"model": {"context_length": length}}))


def engine_document(**changes: object) -> dict[str, object]:
    """`engine.json` of an export, for ONNX Runtime."""
    return {
        "schema": SCHEMA,
        "runtime": "onnxruntime",
        "runtime_version": "1",
        "model": "../../export/current/model.onnx",
        "dense_model": "../../export/current/dense/model.onnx",
        "threads": 1,
        "element_type": "float32",
        "provider": "cpu",
        "session_config": dict(SESSION_CONFIG),
        "library": None,
        **changes,
    }


TENSORRT_SECTION: dict[str, object] = {
    "target": "tensorrt-rtx",
    "version": "1.7.1",
    "dtype": "float16",
    "compute_capabilities": ["8.9"],
    "in_place_cache": True,
    "why_not_in_place": None,
    "attention": "fused",
    "max_batch": 1,
    "max_sequence": 8,
    "max_context": 16,
    "profiles": ["prefill", "decode"],
    "plugin": {"file": "x.so", "sha256": "0" * 64, "version": "1", "embedded": False},
    "tensors": [{"name": "ids", "element": "INT64", "shape": [-1, -1], "is_input": True}],
}
"""What `engine.json` says of a plan."""


def tensorrt_document(**changes: object) -> dict[str, object]:
    """The entries of `engine.json` that make it one of TensorRT-RTX, or the target named."""
    section = {**TENSORRT_SECTION, **changes}
    return {
        "runtime": section["target"],
        "runtime_version": section["version"],
        "tensorrt": section,
    }


def engine_of(folder: Path, **changes: object) -> Engine:
    """The engine that such a document in a folder describes."""
    document = engine_document(**changes)
    del document["schema"]
    return record_from(Engine, document, folder=folder)


def text_model(export: Path, **changes: object) -> TextModel:
    """What a package of an export is made from."""
    fields: dict[str, object] = {
        "name": NAME,
        "model": "some/tiny",
        "pattern": "8:16",
        "verdict": "none",
        "export": export,
        "files": tuple(
            str(path.relative_to(export))
            for path in sorted(export.rglob("*"))
            if path.is_file() and "dense" not in path.parts
        ),
        "engine": engine_of(export),
        "library": None,
        "settings": SETTINGS,
    }
    return TextModel(**{**fields, **changes})


def save_package(export: Path, output: Path, **changes: object) -> Path:
    """Package an export; returns the bundle's folder."""
    output.mkdir(parents=True, exist_ok=True)
    source = text_model(export, **changes)
    bundle = write_text_model(output, source)
    write_words(output, source=source)
    return bundle


def save_work(export: Path, root: Path, *, context: int) -> Path:
    """A work directory with an export, an engine and a package; returns the bundle's folder.

    The package's texts end by their length alone, and may have up to `context` tokens: the tiny
    model's positions have no end.
    """
    shutil.copytree(export, root / "export" / "current")
    engine = root / "engine" / "current"
    engine.mkdir(parents=True)
    (engine / "engine.json").write_text(json.dumps(engine_document()))
    bundle = save_package(root / "export" / "current", root / "package" / "current")
    path = bundle / FILENAME
    changed = {"context_tokens": context, "end_tokens": []}
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **changed}))
    return bundle


def addresses() -> Addresses:
    """Ports that were free a moment ago."""
    return Addresses.unused()


@contextlib.contextmanager
def streaming(
    pieces: int, *, finishes: bool = True
) -> Iterator[tuple[str, list[dict[str, object]]]]:
    """The URL of a server that streams a piece a millisecond, and what it is asked."""
    asked: list[dict[str, object]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            asked.append(json.loads(self.rfile.read(length)))
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):  # the client went away
                for _ in range(pieces):
                    time.sleep(0.001)
                    self.send({"text_output": "piece "})
                if finishes:
                    end = {"finish_reason": "length", "completion_tokens": pieces}
                    self.send({"text_output": "", **end})

        def send(self, event: dict[str, object]) -> None:
            self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())

        def log_message(self, *words: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()
        thread.join()


def require_tritonserver() -> launch.Installation:
    """The server, or a skip that says what is missing."""
    try:
        installation = launch.find_server()
        python_environment(old_stub=installation.wheel is not None)
    except EnvironmentFault as error:
        pytest.skip(str(error))
    return installation


@contextlib.contextmanager
def triton(
    repository: Path, log: Path, *, backends: Path | None = None, **options: object
) -> Iterator[launch.Server]:
    """A ready server on a repository; its messages go to a file."""
    installation = replace(require_tritonserver(), backends=backends)
    with (
        log.open("wb") as output,
        launch.Server.start(
            repository,
            installation=installation,
            addresses=addresses(),
            output=output,
            **options,
        ) as server,
    ):
        server.wait_ready(60)
        yield server
