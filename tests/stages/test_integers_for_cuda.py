"""A build in integers for ONNX Runtime's CUDA provider, up to its graphs, which run on a CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
from nmexport.errors import ArtifactError, RecipeError
from nmexport.models.source import ModelSource
from nmexport.recipe import ModelSection, SparsitySection
from nmexport.runtimes import native, onnxruntime_opening
from nmexport.runtimes.cuda_model import CudaModel
from nmexport.runtimes.cuda_session import CudaSession
from nmexport.runtimes.engine import read_engine
from nmexport.runtimes.onnxruntime_opening import EXTERNAL_DATA_FOLDER, session_options
from nmexport.runtimes.onnxruntime_session import OrtSession
from nmexport.selection import Selection
from nmexport.stages import engine, rewriting, storing

import onnxruntime
from tests.stages.test_engine import RECIPE
from tests.support.pipelines import pipeline_in
from tests.support.tiny import VOCABULARY, save_tiny_model

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

    from nmexport.pipeline import Pipeline
    from nmexport.runtimes.engine import Engine, Side

TOLERANCE = {"stored": 0.01, "sparse": 0.4}
"""Of the norm of logits. Float16 rounds in another order, and in a sparse model of random weights
masks fall otherwise where scores nearly tie: `tests/graph/test_pruned.py` compares in float32."""
SPARSITY = SparsitySection(criterion="act", mitigations=("s-pts",))
IDS = np.random.default_rng(1).integers(3, VOCABULARY, (1, 14))


@pytest.fixture(scope="module")
def on_gpu() -> Any:
    """Stages see a GPU and an ONNX Runtime that computes on it; nothing is opened there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnxruntime_opening, "choose_provider", lambda _: "cuda")
        patch.setattr(storing, "gpu_runs", lambda _: True)
        patch.setattr(engine, "_load_check", lambda *_: 0.0)
        yield


def pipeline(work: Path, model: Path, **section: str) -> Pipeline:
    given = ModelSection(id="tiny", **{"dtype": "float16", "weights": "int8", **section})
    return pipeline_in(
        work,
        RECIPE.model_copy(update={"model": given, "sparsity": SPARSITY}),
        ModelSource(id="tiny", revision=None, folder=model, gguf_file=None, digest="2" * 64),
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, on_gpu: None) -> Engine:
    del on_gpu
    folder = tmp_path_factory.mktemp("integers-for-cuda")
    save_tiny_model(folder / "model", "mistral", max_position_embeddings=1024)
    made = pipeline(folder / "work", folder / "model")
    made.run(Selection(last="engine"))
    return read_engine(made.work.require("engine"))


def opened(described: Engine, side: Side) -> CudaSession:
    """A side's graph for CUDA on the CPU, by function bodies."""
    assert described.cuda is not None
    graph, weights = described.cuda.of(side), described.exported(side)
    assert graph is not None
    assert weights is not None
    config = {EXTERNAL_DATA_FOLDER: str(weights.parent)}
    options = session_options(library=None, threads=1, config=config)
    session = onnxruntime.InferenceSession(
        graph.read_bytes(), options, providers=["CPUExecutionProvider"]
    )
    return CudaSession(CudaModel(session, positions=described.cuda.positions, device="cpu"))


@pytest.mark.parametrize("side", ["sparse", "stored"])
def test_graphs_for_cuda_give_the_logits_of_the_exported_file(built: Engine, side: Side) -> None:
    exported = built.exported(side)
    assert exported is not None
    library = native.find_library()
    with opened(built, side) as ours, OrtSession(exported, library=library) as wanted:
        pairs = [(ours.prefill(IDS[:, :9]), wanted.prefill(IDS[:, :9]))]
        for place in range(9, IDS.shape[1]):
            step = IDS[:, place : place + 1]
            pairs.append((ours.decode_step(step), wanted.decode_step(step)))
    for got, right in pairs:
        error = np.linalg.norm(got - right) / np.linalg.norm(right)
        assert error < TOLERANCE[side]


def test_no_graph_has_a_float_matrix_or_rounds_activations(built: Engine) -> None:
    assert built.cuda is not None
    for side in ("sparse", "stored"):
        path = built.cuda.of(side)
        assert path is not None
        assert path.stat().st_size < 1e6, "weights stay in the export"
        graph = onnx.load(path, load_external_data=False).graph
        kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
        linears = [node for node in graph.node if node.op_type in {"NMLinear", "SparseLinear"}]
        assert {kinds[node.input[1]] for node in linears} == {onnx.TensorProto.INT8}
        assert not any(item.name == "activation_bits" for n in linears for item in n.attribute)
        names = [node.op_type for node in graph.node]
        assert "MatMul" not in names
        assert "CachedAttention" in names
        assert ("SparseLinear" in names) == (side == "sparse")


def test_rounded_activations_are_refused_before_anything_runs(
    tiny_llama: Path, tmp_path: Path, on_gpu: None
) -> None:
    del on_gpu
    with pytest.raises(RecipeError, match="leave out --activations int8"):
        pipeline(tmp_path / "a", tiny_llama, activations="int8").run(Selection(last="engine"))
    with pytest.raises(RecipeError, match="--dtype float16 or bfloat16"):
        pipeline(tmp_path / "b", tiny_llama, dtype="float32").run(Selection(last="engine"))


def test_an_export_for_a_cpu_says_how_to_build_it_for_a_gpu(tmp_path: Path) -> None:
    node = onnx.helper.make_node(
        "NMLinear", ["x", "w", *[""] * 5, "s"], ["y"], domain="nmexport", activation_bits=8
    )
    graph = onnx.helper.make_graph([node], "g", [], [])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "model.onnx")
    with pytest.raises(ArtifactError, match="--activations float"):
        rewriting.check_activations(tmp_path / "model.onnx")
