"""Qwen-style models: q, k and v have large biases, which selection must never cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from nmexport.oracle import nm_linear
from nmexport.runtimes import native
from nmexport.runtimes.onnxruntime_session import OrtSession
from nmexport.sparsity.fold import fold
from nmexport.sparsity.linear import Behaviour, Constants
from nmexport.sparsity.pattern import NMPattern
from nmexport.verification.audit import open_instrumented
from nmexport.verification.op_parity import check, instrument
from nmexport.verification.reference import DeviceProducts, array_from

from tests.support.exported import Exported, export_folder, linears_of, specs_of
from tests.support.tiny import VOCABULARY, save_tiny_model

if TYPE_CHECKING:
    from pathlib import Path

PROMPT = np.random.default_rng(4).integers(3, VOCABULARY, size=(1, 40))
EVERYTHING = Behaviour(pattern=NMPattern(8, 16), dynamic_shift=True, variance_correction=True)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Biases as large as what they are added to, and some ten times that."""
    folder = tmp_path_factory.mktemp("qwen")
    save_tiny_model(folder, "qwen2")
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if name.endswith("bias"):
            tensor[::7] *= 10.0
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def exported(qwen: Path, folder: Path, behaviour: Behaviour) -> Exported:
    return export_folder(qwen, folder, behaviour=behaviour)


@pytest.fixture(scope="module")
def dense_by_pattern(qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return exported(qwen, tmp_path_factory.mktemp("all"), Behaviour(pattern=NMPattern(16, 16)))


@pytest.fixture(scope="module", params=["plain", "shift and variance"])
def sparse(
    qwen: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> tuple[Exported, Behaviour]:
    behaviour = Behaviour(pattern=NMPattern(8, 16)) if request.param == "plain" else EVERYTHING
    return exported(qwen, tmp_path_factory.mktemp("half"), behaviour), behaviour


def test_the_biases_are_large(dense_by_pattern: Exported) -> None:
    """Or the tests below would show little."""
    model = dense_by_pattern.dense
    hidden = torch.randn(16, 64)
    for name, linear in linears_of(model).items():
        if name.endswith(("q_proj", "k_proj", "v_proj")):
            assert linear.bias.abs().max() > 3 * (hidden @ linear.weight.t()).std()


def logits(path: Path, library: Path | None = None) -> np.ndarray:
    with OrtSession(path, library=library, threads=1) as session:
        return session.prefill(PROMPT)


def test_keeping_all_is_the_dense_model_exactly(dense_by_pattern: Exported) -> None:
    """The same products and sums in the same order: not one bit differs."""
    kept, dense = logits(dense_by_pattern.model), logits(dense_by_pattern.dense_model)
    assert np.array_equal(kept, dense)
    assert np.abs(dense).max() > 1


def test_keeping_all_is_the_dense_model_in_torch_and_native(dense_by_pattern: Exported) -> None:
    """Executors that sum in an order of their own: as near as float32 is."""
    dense = logits(dense_by_pattern.dense_model)
    scale = np.abs(dense).max()
    with torch.inference_mode():
        kept = dense_by_pattern.sparse(input_ids=torch.from_numpy(PROMPT)).logits.numpy()
    assert np.abs(kept - dense).max() < 1e-5 * scale
    library = native.find_library()
    if library is not None:
        assert np.abs(logits(dense_by_pattern.model, library) - dense).max() < 1e-5 * scale


def test_each_linear_is_within_the_oracle(sparse: tuple[Exported, Behaviour]) -> None:
    model, behaviour = sparse
    layers = specs_of(model.dense, behaviour)
    assert sum(layer.has_bias for layer in layers) == 6
    tensors = {name: arrays(linear, behaviour) for name, linear in linears_of(model.dense).items()}
    graph, outputs = instrument(model.model)
    for library in {None, native.find_library()}:
        with open_instrumented(graph, model.folder, library=library, threads=1) as session:
            report, _ = check(session, layers, outputs, tensors.__getitem__, PROMPT[0])
        assert report.within_contract, (library, report)
        assert report.linears == len(layers)

        # As on a GPU: nothing is computed beforehand, and the oracle's products elsewhere.
        with open_instrumented(
            graph, model.folder, library=library, threads=1, folds_constants=False
        ) as session:
            unfolded, _ = check(
                session,
                layers,
                outputs,
                tensors.__getitem__,
                PROMPT[0],
                products=DeviceProducts("cpu"),
            )
        assert unfolded.error_over_tolerance == pytest.approx(report.error_over_tolerance, rel=0.1)
        assert (unfolded.linears, unfolded.values) == (report.linears, report.values)

        without = {
            name: {kind: value for kind, value in one.items() if kind != "bias"}
            for name, one in tensors.items()
        }
        with open_instrumented(graph, model.folder, library=library, threads=1) as session:
            report, _ = check(session, layers, outputs, without.__getitem__, PROMPT[0])
        assert report.error_over_tolerance > 1000  # what dropping a bias would look like


def arrays(linear: torch.nn.Linear, behaviour: Behaviour) -> dict[str, Any]:
    folded = fold(linear, behaviour, Constants(), dtype=torch.float32)
    return {kind: array_from(value) for kind, value in folded.items()}


def test_a_shift_of_the_input_leaves_the_bias_alone(qwen: Path, sparse: Any) -> None:
    """All inputs equal: nothing is left after the shift, and the bias with the sums stays."""
    linear = linears_of(sparse[0].dense)["model.layers.0.self_attn.q_proj"]
    folded = arrays(linear, EVERYTHING)
    x = np.full((1, 3, linear.in_features), 0.25, np.float32)
    attributes = {"n": 8, "m": 16, "dynamic_shift": True, "variance_correction": True}
    y = nm_linear(x, folded.pop("W"), **attributes, **folded)
    with torch.inference_mode():
        expected = linear(torch.from_numpy(x)).numpy()
    assert np.allclose(y, expected, atol=1e-4 * np.abs(expected).max())
