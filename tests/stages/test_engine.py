"""Engine, verify and package on tiny models: what they write, check and refuse."""

from __future__ import annotations

import functools
import json
import types
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import onnx
import pytest
from nmexport.environment import probe
from nmexport.errors import ArtifactError, EnvironmentFault, GateFailed
from nmexport.models import loader
from nmexport.models.source import ModelSource
from nmexport.progress import Silent
from nmexport.recipe import (
    CorpusSection,
    EvaluationSection,
    GatesSection,
    LatencySection,
    ModelSection,
    Recipe,
    ServingSection,
    SparsitySection,
)
from nmexport.report.model import json_of
from nmexport.runtimes import native, onnxruntime_opening
from nmexport.runtimes.engine import read_engine
from nmexport.runtimes.onnxruntime_session import OrtSession
from nmexport.runtimes.opening import open_session
from nmexport.runtimes.tensorrt import library as tensorrt_library
from nmexport.runtimes.tensorrt import requirements
from nmexport.selection import Selection
from nmexport.serving.triton_config import from_text
from nmexport.stages import engine, package, verify
from nmexport.stages.inputs import StageInputs
from nmexport.store.artifact import file_digest
from nmexport.store.work_directory import WorkDirectory
from nmexport.verification import executors, subject
from nmexport.verification.memory import artifact_bytes
from nmexport.verification.reference import TorchSession
from onnx import TensorProto

from tests.report.test_pages import FIXED, assert_has_keys
from tests.support.exported import export_folder
from tests.support.pipelines import pipeline_in
from tests.support.toy_lm import save_toy_lm

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from nmexport.choices import Dtype
    from nmexport.runtimes.engine import Side

T = TypeVar("T")
RECIPE = Recipe(
    model=ModelSection(id="tiny"),
    sparsity=SparsitySection(mitigations=("d-pts",)),
    calibration=CorpusSection(samples=2, length=16),
    evaluation=EvaluationSection(windows=3, length=48, prompts=2, generate_tokens=8),
    latency=LatencySection(prefill_tokens=8, decode_context=8, runs=3, warmup=1, threads=1),
    gates=GatesSection(max_perplexity_ratio=1e-3),
    serving=ServingSection(allow_failed=True, slots=3),
)


@pytest.fixture
def no_native(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without the native op library."""
    monkeypatch.setattr(native, "find_library", lambda *_: None)


def _inputs(tmp_path: Path, recipe: Recipe = RECIPE, **upstream: Path) -> StageInputs:
    output = tmp_path / "engine" / "0123456789ab.partial-1"
    output.mkdir(parents=True, exist_ok=True)
    source = ModelSource(id="tiny", revision=None, folder=tmp_path, gguf_file=None, digest="0" * 64)
    return StageInputs(
        recipe=recipe,
        source=source,
        environment=probe(),
        progress=Silent(),
        output=output,
        upstream=upstream,
    )


@pytest.fixture
def toy_export(tmp_path: Path) -> Path:
    folder = tmp_path / "export" / "ba9876543210"
    save_toy_lm(folder / "model.onnx")
    save_toy_lm(folder / "dense" / "model.onnx")
    return folder


@pytest.mark.parametrize(("dtype", "why"), [("float16", None), ("float32", "16-bit")])
def test_a_cuda_engine_has_graphs_of_its_own(
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: Dtype,
    why: str | None,
) -> None:
    export = tmp_path / "export" / "ba9876543210"
    export.mkdir(parents=True)
    export_folder(tiny_llama, export, dtype=dtype)
    (export / "genai_config.json").write_text('{"model": {"context_length": 256}}')
    monkeypatch.setattr(onnxruntime_opening, "choose_provider", lambda _: "cuda")
    monkeypatch.setattr(engine, "_load_check", lambda *_, **__: 0.0)
    recipe = Recipe(model=ModelSection(id="tiny", dtype=dtype), target="onnxruntime")
    inputs = _inputs(tmp_path, recipe, export=export)
    engine.run(inputs)
    described = read_engine(inputs.output)
    assert described.provider == "cuda"
    if why is not None:
        assert described.cuda is None
        assert why in (described.why_no_cuda or "")
        return
    assert described.cuda is not None
    assert described.cuda.positions == 256
    for path in (described.cuda.model, described.cuda.dense_model):
        graph = onnx.load(path, load_external_data=False).graph
        assert "CachedAttention" in {node.op_type for node in graph.node}
        assert path.stat().st_size < 1e6, "weights stay in the export"


@pytest.mark.skipif(native.find_library() is None, reason="no native library")
def test_a_cpu_engine_shares_steps(tiny_export: Path, tmp_path: Path) -> None:
    inputs = _inputs(tmp_path, export=tiny_export)
    engine.run(replace(inputs, environment=replace(inputs.environment, gpus=())))
    described = read_engine(inputs.output)
    assert described.shared_step is not None
    assert described.why_no_shared_step is None
    for path in (described.shared_step.model, described.shared_step.dense_model):
        graph = onnx.load(path, load_external_data=False).graph
        names = {node.op_type for node in graph.node}
        (region,) = (node for node in graph.node if node.op_type == "Region")
        names |= {item.s.decode() for item in region.attribute if item.name.endswith("_op")}
        assert "PagedAttention" in names
        assert "MatMul" not in names, "the runtime's product rounds by the number of rows"
    sides: tuple[Side, ...] = ("sparse", "dense")
    for side in sides:
        with open_session(inputs.output, side=side) as session:
            assert session.shares_steps
            assert session.limits.tokens == described.shared_step.positions


@pytest.mark.parametrize(
    ("dtype", "has_library", "why"),
    [("float32", False, "not built here"), ("bfloat16", True, "computes in float32")],
)
def test_why_a_cpu_engine_runs_requests_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: Dtype, has_library: bool, why: str
) -> None:
    export = tmp_path / "export"
    (export / "dense").mkdir(parents=True)
    narrow = TensorProto.BFLOAT16 if dtype == "bfloat16" else TensorProto.FLOAT
    for folder in (export, export / "dense"):
        save_toy_lm(folder / "model.onnx", dtype=narrow)
    if not has_library:
        monkeypatch.setattr(native, "find_library", lambda *_: None)
    elif native.find_library() is None:
        pytest.skip("no native library")
    recipe = Recipe(model=ModelSection(id="tiny", dtype=dtype), target="onnxruntime")
    inputs = _inputs(tmp_path, recipe, export=export)
    engine.run(inputs)
    described = read_engine(inputs.output)
    assert described.shared_step is None
    assert why in (described.why_no_shared_step or "")


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-rtx"])
def test_a_tensorrt_target_without_its_plugin_says_how_to_get_it(
    tmp_path: Path, toy_export: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    pytest.importorskip("polygraphy")
    monkeypatch.setattr(tensorrt_library, "_FOLDER", tmp_path)
    monkeypatch.setattr(tensorrt_library, "load", lambda _: None)
    monkeypatch.setattr(requirements, "check_gpus", lambda *_: None)
    recipe = Recipe(model=ModelSection(id="tiny"), target=target)
    with pytest.raises(EnvironmentFault, match=r"tensorrt/build\.py"):
        engine.run(_inputs(tmp_path, recipe, export=toy_export))


def test_bfloat16_runs_on_a_processor(tmp_path: Path) -> None:
    recipe = Recipe(model=ModelSection(id="tiny", dtype="bfloat16"), target="onnxruntime")
    export = tmp_path / "narrow"
    (export / "dense").mkdir(parents=True)
    for folder in (export, export / "dense"):
        save_toy_lm(folder / "model.onnx", dtype=TensorProto.BFLOAT16)
    inputs = _inputs(tmp_path, recipe, export=export)
    alone = replace(inputs, environment=replace(inputs.environment, gpus=()))
    assert engine.key_fields(alone)["target"] == "onnxruntime"
    assert engine.run(alone)["open_seconds"].keys() == {"sparse", "dense"}


@pytest.mark.usefixtures("no_native")
def test_engine_survives_the_rename_of_its_folder(tmp_path: Path, toy_export: Path) -> None:
    inputs = _inputs(tmp_path, export=toy_export)
    metrics = engine.run(inputs)
    finished = inputs.output.rename(inputs.output.with_name("0123456789ab"))
    described = engine.Artifact(finished).engine
    assert described.model == toy_export / "model.onnx"
    assert described.library is None
    assert metrics["why_no_library"]
    with OrtSession.from_engine(finished) as session:
        assert np.isfinite(session.prefill(np.array([[1]]))).all()


@pytest.mark.usefixtures("no_native")
def test_engine_is_the_same_bytes_each_time(tmp_path: Path, toy_export: Path) -> None:
    inputs = _inputs(tmp_path, export=toy_export)
    texts = []
    for _ in range(2):
        engine.run(inputs)
        texts.append((inputs.output / "engine.json").read_bytes())
    assert texts[0] == texts[1]


def test_key_follows_the_librarys_contents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "libnmexport.so"
    monkeypatch.setattr(native, "find_library", lambda *_: library)
    keys = []
    for contents in (b"one", b"two"):
        library.write_bytes(contents)
        keys.append(engine.key_fields(_inputs(tmp_path))["library"]["sha256"])
    assert keys[0] != keys[1]


@pytest.mark.usefixtures("no_native")
def test_a_model_that_computes_nan_is_refused(tmp_path: Path, toy_export: Path) -> None:
    import onnx

    model = onnx.load(toy_export / "model.onnx")
    head = next(one for one in model.graph.initializer if one.name == "head")
    values = onnx.numpy_helper.to_array(head).copy()
    values[:] = np.nan
    head.CopyFrom(onnx.numpy_helper.from_array(values, "head"))
    onnx.save(model, toy_export / "model.onnx")
    with pytest.raises(ArtifactError, match="not finite"):
        engine.run(_inputs(tmp_path, export=toy_export))


def test_prompts_are_the_windows_starts_first() -> None:
    windows = np.arange(2 * 70).reshape(2, 70)
    prompts = subject.prompts_from(windows, 3)
    assert prompts.shape == (3, 32)
    assert prompts[:, 0].tolist() == [0, 70, 32]
    assert subject.prompts_from(windows[:, :8], 9).shape == (2, 8)


def test_latency_tokens_repeat_a_short_text() -> None:
    section = LatencySection(prefill_tokens=5, decode_context=4)
    prompt, context = subject.latency_tokens(np.arange(3)[None, :], section)
    assert prompt.tolist() == [[0, 1, 2, 0, 1]]
    assert context.tolist() == [[2, 0, 1, 2]]


# -- the whole pipeline on a tiny model ------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> WorkDirectory:
    """A work directory of a machine without the native library."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "find_library", lambda *_: None)
        work = WorkDirectory(tmp_path_factory.mktemp("work") / "w")
        source = ModelSource(
            id="tiny", revision=None, folder=tiny_llama, gguf_file=None, digest="1" * 64
        )
        pipeline_in(work.root, RECIPE, source).run(Selection())
    return work


def test_report_of_a_real_build(built: WorkDirectory) -> None:
    report = verify.Artifact(built.require("verify")).report
    assert_has_keys(json_of(report), FIXED)
    assert report.sparsity.sparsified == 14
    assert report.sparsity.linears == 15
    assert report.accuracy.tokens == 3 * 47
    assert report.latency.dense.decode.runs == 3
    assert report.memory.peak_rss_bytes > 1e6
    assert (built.root / "report.html").is_file()


def test_sparsity_is_counted_as_the_pattern_says(built: WorkDirectory) -> None:
    sparsity = verify.Artifact(built.require("verify")).report.sparsity
    tokens = 2 * 48  # the audited windows
    for layer in sparsity.layers:
        features = 128 if layer.name.endswith("down_proj") else 64
        assert layer.total == tokens * features
        assert layer.kept == layer.total // 2  # random activations: no natural zeros
        assert 0 < layer.relative_error < 2
    assert sparsity.achieved == 0.5


def test_parity_of_torch_and_function_bodies(built: WorkDirectory) -> None:
    parity = verify.Artifact(built.require("verify")).report.parity
    assert parity.torch_onnx.greedy_identical
    assert parity.torch_onnx.max_abs < 1e-3
    for executor in ("torch", "onnx"):
        assert getattr(parity.linears, executor).within_contract, parity.linears
        assert getattr(parity.linears, executor).linears == 14
    assert parity.linears.engine.within_contract is None
    assert 0 < parity.noise_floor.max_abs < 1
    for leg in ("torch_engine", "onnx_engine"):
        assert getattr(parity, leg).max_abs is None
        assert "not built" in getattr(parity, leg).why


def test_a_failed_gate_leaves_a_complete_artifact(built: WorkDirectory) -> None:
    report = verify.Artifact(built.require("verify")).report
    assert report.verdict == "fail"
    assert report.gates[0].name == "max_perplexity_ratio"
    assert not report.gates[0].passed


def test_a_failed_model_is_not_packaged_unasked(built: WorkDirectory) -> None:
    recipe = RECIPE.model_copy(update={"serving": ServingSection()})
    upstream = {name: built.require(name) for name in package.UPSTREAM}
    inputs = _inputs(built.root / "elsewhere", recipe, **upstream)
    with pytest.raises(GateFailed, match=r"max_perplexity_ratio.*\n.*--allow-failed"):
        package.run(inputs)
    assert list(inputs.output.iterdir()) == []


def test_package_is_whole_and_knows_no_place(built: WorkDirectory) -> None:
    folder = built.require("package")
    bundle = package.Artifact(folder).bundle
    assert (bundle.name, bundle.verdict, bundle.context_tokens) == ("tiny", "fail", 256)
    assert bundle.end_tokens == {2}
    names = {record.path for record in bundle.files}
    assert {"model.onnx", "model.onnx.data", "tokenizer.json", "model.py", "engine.json"} <= names
    assert not any(name.startswith("dense/") for name in names)
    bundle.check_files()
    for path in folder.rglob("*"):
        if path.suffix in {".json", ".md", ".sh", ".py", ".pbtxt"} and path.name != "manifest.json":
            assert str(built.root) not in path.read_text("utf-8"), path
    config = from_text((folder / "model_repository" / "tiny" / "config.pbtxt").read_text("utf-8"))
    assert config.parameters["slots"].string_value == "3"


def test_sums_cover_every_file_of_a_package(built: WorkDirectory) -> None:
    folder = built.require("package")
    lines = (folder / "SHA256SUMS").read_text("utf-8").splitlines()
    sums = {name: digest for digest, name in (line.split("  ") for line in lines)}
    files = {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in {"SHA256SUMS", "manifest.json", "recipe.yaml"}
    }
    assert set(sums) == files
    assert all(file_digest(folder / name) == digest for name, digest in sums.items())


def test_a_folder_without_a_package_says_so(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no text model"):
        _ = package.Artifact(tmp_path).bundle


@pytest.mark.parametrize("text", [None, "{", '{"schema": 9}'])
def test_damaged_reports_are_refused(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "report.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"report\.json"):
        _ = verify.Artifact(tmp_path).report


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_executors_stay_out_where_memory_is_short(
    dtype: str, built: WorkDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psutil

    described = engine.Artifact(built.require("engine")).engine
    size = artifact_bytes(described.model.parent)
    out = []
    for sizes in (0, 4, 9):
        free = types.SimpleNamespace(available=sizes * size)
        monkeypatch.setattr(psutil, "virtual_memory", lambda free=free: free)
        out.append(executors.too_large(described, dtype))
    assert [list(one) for one in out] == [["torch", "onnx"], ["torch"] * (dtype != "float32"), []]
    assert all("of memory, and 0 GB are free" in why for why in out[0].values())


def test_a_report_stands_without_executors_that_are_too_large(
    built: WorkDirectory, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        executors, "too_large", lambda *_: {"torch": "too large", "onnx": "too large"}
    )
    upstream = {name: built.require(name) for name in verify.UPSTREAM}
    inputs = _inputs(tmp_path, **upstream)
    inputs = replace(inputs, source=replace(inputs.source, folder=tiny_llama))
    verify.run(inputs)
    parity = verify.Artifact(inputs.output).report.parity
    for leg in ("torch_onnx", "torch_engine", "onnx_engine"):
        assert getattr(parity, leg).max_abs is None
        assert getattr(parity, leg).why == "too large"
    assert parity.caches.why == "too large"
    for executor in ("torch", "onnx", "engine"):
        assert getattr(parity.linears, executor).within_contract is None


def test_engine_json_names_no_absolute_path(built: WorkDirectory) -> None:
    document = json.loads((built.require("engine") / "engine.json").read_text())
    assert not document["model"].startswith("/")
    assert str(built.root) not in json.dumps(document)


def test_native_op_and_function_bodies_choose_the_same_tokens(built: WorkDirectory) -> None:
    native = pytest.importorskip("nmexport.runtimes.native")
    library = native.find_library()
    if library is None:
        pytest.skip("the native op library is not built here")
    from nmexport.verification.continuation import greedy

    model = engine.Artifact(built.require("engine")).engine.model
    prompts = np.random.default_rng(0).integers(3, 384, size=(4, 12))
    tokens = []
    for registered in (library, None):
        with OrtSession(model, library=registered, threads=1) as session:
            tokens.append(greedy(session, prompts, range(24)))
    np.testing.assert_array_equal(tokens[0], tokens[1])


class _Watched(Silent):
    """Knows how many bars are shown."""

    def __init__(self) -> None:
        self.shown = 0
        self.short: list[str] = []

    def track(self, items: Iterable[T], *, label: str, total: int | None = None) -> Iterator[T]:
        self.shown += 1
        count = 0
        try:
            for item in items:
                yield item
                count += 1
        finally:
            self.shown -= 1
            if total is not None and count < total:
                self.short.append(label)


def test_whatever_takes_long_in_verify_has_a_bar(
    built: WorkDirectory, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    progress = _Watched()
    unseen: list[str] = []

    def watch(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        @functools.wraps(original)
        def watched(*given: Any, **options: Any) -> Any:
            if not progress.shown:
                unseen.append(f"{owner.__name__}.{name}")
            return original(*given, **options)

        monkeypatch.setattr(owner, name, watched)

    for name in ("__init__", "_run"):
        watch(OrtSession, name)
    watch(TorchSession, "extend")
    watch(loader, "load_model")
    watch(loader, "load_tokenizer")
    upstream = {name: built.require(name) for name in verify.UPSTREAM}
    inputs = replace(_inputs(tmp_path, **upstream), progress=progress)
    verify.run(replace(inputs, source=replace(inputs.source, folder=tiny_llama)))
    assert not unseen
    assert not progress.short  # every bar ends at its total
    assert not progress.shown
