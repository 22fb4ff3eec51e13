"""The graph for ONNX Runtime's CUDA provider and its session, on a CPU in float32."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from nmexport.errors import ArtifactError
from nmexport.graph.attention_form import NotRewritableError
from nmexport.graph.cuda import rewrite_for_cuda
from nmexport.graph.cuda_sampling import ChooseLikeliest
from nmexport.graph.fused import FUSED
from nmexport.runtimes import native
from nmexport.runtimes.cuda_model import CudaModel
from nmexport.runtimes.cuda_session import CudaSession
from nmexport.runtimes.onnxruntime_opening import EXTERNAL_DATA_FOLDER
from nmexport.runtimes.onnxruntime_session import OrtSession

import onnxruntime
from tests.support.exported import Exported, export_folder
from tests.support.tiny import FAMILIES, VOCABULARY, save_tiny_model

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

POSITIONS = 1024
TOLERANCE = 5e-6
"""Rounding of float32 sums in another order; logits are about 2."""
needs_library = pytest.mark.skipif(native.find_library() is None, reason="no native library")
CAPPED = "gemma2"
"""Caps attention scores, which the provider does after the mask."""


@pytest.fixture(scope="module", params=[name for name in FAMILIES if name != CAPPED])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp(f"cuda-{request.param}")
    save_tiny_model(folder / "source", request.param)
    (folder / "export").mkdir()
    return export_folder(folder / "source", folder / "export")


def rewritten(path: Path) -> ir.Model:
    model = ir.load(path)
    rewrite_for_cuda(model, positions=POSITIONS)
    return model


def opened(path: Path, *, library: Path | None = None) -> CudaSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if library is not None:
        options.register_custom_ops_library(str(library))
    options.add_session_config_entry(EXTERNAL_DATA_FOLDER, str(path.parent))
    model = ir.to_proto(rewritten(path)).SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return CudaSession(CudaModel(session, positions=POSITIONS, device="cpu"))


def tokens(batch: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, VOCABULARY, (batch, length))


def assert_close(got: np.ndarray, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(got, wanted, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("side", ["model", "dense_model"])
def test_rewritten_graph_gives_the_exported_logits(exported: Exported, side: str) -> None:
    path: Path = getattr(exported, side)
    prompt, answer = tokens(1, 20), tokens(1, 6, seed=1)
    with opened(path) as rewritten_session, OrtSession(path) as session:
        assert_close(rewritten_session.prefill(prompt), session.prefill(prompt))
        for token in answer.T:
            step = token[None]
            assert_close(rewritten_session.decode_step(step), session.decode_step(step))
        caches = zip(
            rewritten_session.cache_values(rewritten_session.cache),
            session.cache_values(session.cache),
            strict=True,
        )
        for (name, got), (wanted_name, wanted) in caches:
            assert name == wanted_name
            assert_close(got, wanted)


@needs_library
def test_our_attention_op_hands_over_to_the_runtimes_kernel(exported: Exported) -> None:
    library = native.find_library()
    prompts, mask = tokens(3, 20), np.ones((3, 20), np.int64)
    mask[1, :7] = mask[2, :15] = 0
    with opened(exported.model, library=library) as ours, OrtSession(exported.model) as session:
        got, cache = ours.extend(None, prompts, mask)
        wanted, wanted_cache = session.extend(None, prompts, mask)
        assert_close(got[mask == 1], wanted[mask == 1])
        for seed in range(3):
            step = tokens(3, 1, seed)
            got, cache = ours.extend(cache, step)
            wanted, wanted_cache = session.extend(wanted_cache, step)
            assert_close(got, wanted)


CAPACITY = 16
NODE = """<ir_version: 10, opset_import: ["nmexport.fused" : 1]>
attention (float[B, S, W] x, float[B, H, C, D] keys, float[B, H, C, D] values, int32[N] last,
           int32 total) => (float[B, S, Z] y, float[B, H, C, D] k, float[B, H, C, D] v) {
    y, k, v = nmexport.fused.CachedAttention <num_heads: int = HEADS, kv_num_heads: int = 2,
        do_rotary: int = 0, local_window_size: int = -1> (x, , , keys, values, last, total)
}"""


def attention_outputs(heads: int = 4, **changed: np.ndarray) -> list[np.ndarray]:
    """One node of ours on packed queries, keys and values of heads of 8 elements."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(str(native.find_library()))
    model = onnx.parser.parse_model(NODE.replace("HEADS", str(heads)))
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    cache = np.zeros((1, 2, CAPACITY, 8), np.float32)
    feeds = {
        "x": np.ones((1, 3, 64), np.float32),
        "keys": cache,
        "values": cache,
        "last": np.array([2], np.int32),
        "total": np.array(3, np.int32),
    }
    return session.run(None, feeds | changed)


@needs_library
def test_attention_of_equal_rows_is_their_value() -> None:
    y, keys, values = attention_outputs()
    np.testing.assert_array_equal(y, np.ones((1, 3, 32), np.float32))
    for cache in (keys, values):
        assert cache[:, :, :3].all()


@needs_library
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": np.ones((1, 3, 56), np.float32)}, r"queries have shape \[1, 3, 56\]"),
        ({"last": np.zeros(2, np.int32)}, "last_positions needs one element"),
        (
            {"total": np.array(CAPACITY + 1, np.int32)},
            "17 positions; allowed: up to the caches' 16",
        ),
        ({"values": np.zeros((1, 2, CAPACITY, 16), np.float32)}, r"caches \[1, 2, 16, 8\]"),
    ],
)
def test_tensors_that_do_not_fit_an_attention_are_refused(
    changed: dict[str, np.ndarray], message: str
) -> None:
    with pytest.raises(Exception, match=message):
        attention_outputs(**changed)


@needs_library
def test_heads_that_do_not_share_keys_evenly_are_refused() -> None:
    with pytest.raises(Exception, match="3 heads on 2"):
        attention_outputs(heads=3)


def test_attention_may_stay_the_runtimes_op(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "source", "mistral")
    (tmp_path / "export").mkdir()
    model = ir.load(export_folder(tmp_path / "source", tmp_path / "export").model)
    rewrite_for_cuda(model, positions=POSITIONS, has_own_attention=False)
    names = [node.op_type for node in model.graph]
    assert names.count("GroupQueryAttention") == 2
    assert "CachedAttention" not in {name for _, name, _ in model.functions}


def test_prompts_of_different_lengths(exported: Exported) -> None:
    prompts, mask = tokens(3, 20), np.ones((3, 20), np.int64)
    mask[1, :7] = mask[2, :15] = 0
    with opened(exported.model) as rewritten_session, OrtSession(exported.model) as session:
        got, cache = rewritten_session.extend(None, prompts, mask)
        wanted, wanted_cache = session.extend(None, prompts, mask)
        assert_close(got[mask == 1], wanted[mask == 1])
        step = tokens(3, 1, seed=2)
        assert_close(
            rewritten_session.extend(cache, step)[0], session.extend(wanted_cache, step)[0]
        )


def test_last_logits_alone_are_those_of_the_whole_prompt(exported: Exported) -> None:
    prompt = tokens(2, 20)
    with opened(exported.model) as session:
        last, _ = session.extend_last(None, prompt)
        assert_close(last, session.prefill(prompt)[:, -1:])


def test_a_layer_is_eight_nodes(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "source", "mistral")
    (tmp_path / "export").mkdir()
    model = rewritten(export_folder(tmp_path / "source", tmp_path / "export").model)
    names = [node.op_type for node in model.graph]
    layer = ["NMLinear", "CachedAttention", "NMLinear", "ResidualNorm"]
    layer += ["NMLinear", "GatedSilu", "NMLinear", "ResidualNorm"]
    head = ["Gather", "MatMul", "Likeliest"]
    assert sorted(names) == sorted(
        ["Gather", "SimplifiedLayerNormalization", *layer, *layer, *head]
    )


def test_chunks_and_growth_give_the_whole_prompts_logits(exported: Exported) -> None:
    prompt = tokens(1, 700)
    with opened(exported.model) as rewritten_session, OrtSession(exported.model) as session:
        cache, parts = None, []
        for start in range(0, prompt.shape[1], 100):
            logits, cache = rewritten_session.extend(cache, prompt[:, start : start + 100])
            parts.append(logits)
        assert_close(np.concatenate(parts, axis=1), session.prefill(prompt))


def test_a_kept_cache_is_not_changed_by_what_goes_on_from_it(exported: Exported) -> None:
    with opened(exported.model) as session:
        session.prefill(tokens(1, 9))
        kept = session.keep(session.cache)
        first, one_branch = session.extend(kept, tokens(1, 1, seed=3))
        second, other_branch = session.extend(kept, tokens(1, 1, seed=4))
        assert one_branch.lease is not other_branch.lease, "both are held, so they share nothing"
        after = session.extend(one_branch, tokens(1, 1, seed=5))[0]
        del second, other_branch, one_branch
        np.testing.assert_array_equal(session.extend(kept, tokens(1, 1, seed=3))[0], first)
        whole = np.concatenate([tokens(1, 9), *(tokens(1, 1, seed=n) for n in (3, 5))], axis=1)
        assert_close(after[:, -1], session.prefill(whole)[:, -1])


@pytest.mark.parametrize("length", [384, 512])
def test_a_kept_cache_has_room_for_the_next_token(exported: Exported, length: int) -> None:
    with opened(exported.model) as session:
        _, cache = session.extend(None, tokens(1, 300))
        _, cache = session.extend(cache, tokens(1, length - 300))
        kept = session.keep(cache)
        del cache
        for _ in range(2):
            _, after = session.extend(kept, tokens(1, 1, seed=3))
            assert after.lease is kept.lease, "nothing was copied"
            del after


@pytest.mark.parametrize("batch", [1, 3])
def test_next_tokens_are_the_argmax_of_the_logits(exported: Exported, batch: int) -> None:
    with opened(exported.model) as session:
        chosen, cache = session.next_tokens(None, tokens(batch, 9))
        assert chosen.tolist() == session.prefill(tokens(batch, 9))[:, -1].argmax(-1).tolist()
        for _ in range(6):
            kept = session.keep(cache)
            logits, after = session.extend_last(kept, chosen[:, None])
            del after
            chosen, cache = session.next_tokens(kept, chosen[:, None])
            assert chosen.tolist() == logits[:, -1].argmax(-1).tolist()
            assert chosen.dtype == np.int64
        first = chosen.tolist()
        session.next_tokens(cache, 1 + chosen[:, None] % (VOCABULARY - 1))
        assert chosen.tolist() == first, "a later step leaves what was returned"


@pytest.mark.parametrize(("dtype", "kind"), [("float", 1), ("float16", 10), ("bfloat16", 16)])
def test_the_likeliest_is_the_first_of_equals(dtype: str, kind: int) -> None:
    model = ir.from_proto(
        onnx.parser.parse_model(
            f'<ir_version: 10, opset_import: ["" : 23]> g (float[B, L, V] x) => '
            f"({dtype}[B, L, V] logits) {{ logits = Cast <to: int = {kind}> (x) }}"
        )
    )
    ChooseLikeliest()(model)
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    rng = np.random.default_rng(0)
    x = rng.integers(-3, 4, (2, 3, 50)).astype(np.float32)
    x[0, 0] = -1.0
    x[0, 1] = np.where(rng.random(50) < 0.5, 0.0, -0.0)
    x[0, 2, :43] = -np.inf
    (ids,) = session.run(["next_ids"], {"x": x})
    np.testing.assert_array_equal(ids, x.argmax(-1))


@needs_library
def test_of_nans_the_first_is_the_likeliest() -> None:
    model = ir.from_proto(
        onnx.parser.parse_model(
            '<ir_version: 10, opset_import: ["" : 23]> g (float[B, V] x) => '
            "(float[B, V] logits) { logits = Relu (x) }"
        )
    )
    ChooseLikeliest()(model)
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(native.find_library()))
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    x = np.random.default_rng(0).integers(-3, 4, (9, 40)).astype(np.float32)
    x[1, 5], x[1, 9], x[2, 0], x[3, 39] = np.nan, np.nan, np.nan, np.nan
    x[4, 7], x[4, 20], x[5], x[6] = np.inf, np.nan, -1.0, np.nan
    logits, ids = session.run(["logits", "next_ids"], {"x": x})
    assert np.isnan(logits).sum() == np.isnan(x).sum()
    np.testing.assert_array_equal(ids, logits.argmax(-1))
    with pytest.raises(Exception, match=r"Likeliest: X has shape \[2, 0\]"):
        session.run(["next_ids"], {"x": x[:2, :0]})


def test_a_graph_of_an_older_version_is_refused(exported: Exported) -> None:
    with OrtSession(exported.model) as plain, pytest.raises(ArtifactError, match="next_ids"):
        CudaModel(plain._session, positions=POSITIONS, device="cpu")


def test_a_queued_step_is_the_step_itself_and_changes_nothing(exported: Exported) -> None:
    step = tokens(1, 1, seed=3)
    with opened(exported.model) as session:
        _, cache = session.extend(None, tokens(1, 9))
        kept = session.keep(cache)
        first, after = session.extend(kept, step)
        lease = after.lease
        del after
        runs: list[object] = []
        run = session._model.session.run_with_iobinding
        session._model._session = SimpleNamespace(  # counts, and runs
            run_with_iobinding=lambda binding, options: (
                runs.append(binding),
                run(binding, options),
            )
        )
        took = session.queued_step_ms(kept, step, 5)
        assert took is not None
        assert took > 0
        assert len(runs) == 2 + 5, "two that record, five that are timed"
        assert len(set(map(id, runs))) == 1
        again, after = session.extend(kept, step)
        assert after.lease is lease, "nothing was copied"
        np.testing.assert_array_equal(again, first)


def test_buffers_are_used_again_once_dropped_and_not_before(exported: Exported) -> None:
    with opened(exported.model) as session:
        session.prefill(tokens(1, 9))
        kept = session.cache
        session.prefill(tokens(1, 9, seed=4))
        assert session.cache.lease.buffers is not kept.lease.buffers
        dropped = session.cache.lease.buffers
        session.prefill(tokens(1, 9, seed=5))
        assert session.cache.lease.buffers is dropped


def test_sessions_of_one_architecture_share_caches(exported: Exported) -> None:
    with opened(exported.dense_model) as dense, opened(exported.model) as sparse:
        dense.prefill(tokens(1, 9))
        sparse.cache = dense.keep(dense.cache)
        from_dense = sparse.decode_step(tokens(1, 1, seed=3))
        with OrtSession(exported.dense_model) as first, OrtSession(exported.model) as second:
            first.prefill(tokens(1, 9))
            second.cache = first.keep(first.cache)
            assert_close(from_dense, second.decode_step(tokens(1, 1, seed=3)))


def test_text_longer_than_the_tables_is_refused(exported: Exported) -> None:
    with opened(exported.model) as session, pytest.raises(ArtifactError, match="1025 tokens"):
        session.prefill(tokens(1, POSITIONS + 1))


def test_half_type_linears_are_ours(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "source", "qwen2")
    (tmp_path / "export").mkdir()
    model = rewritten(
        export_folder(tmp_path / "source", tmp_path / "export", dtype="float16").dense_model
    )
    counts = [node.op_type for node in model.graph]
    assert "MatMul" not in counts
    assert "Add" not in counts, "biases are the linears' own"
    linears = [node for node in model.graph if node.op_type == "NMLinear"]
    assert {node.attributes["n"].as_int() for node in linears} == {16}


def test_gate_and_up_of_their_own(tmp_path: Path) -> None:
    # Wide ones stay apart in a dense baseline.
    save_tiny_model(tmp_path / "source", "llama", intermediate_size=640)
    (tmp_path / "export").mkdir()
    exported = export_folder(tmp_path / "source", tmp_path / "export")
    names = [node.op_type for node in rewritten(exported.dense_model).graph]
    assert names.count("GatedSiluPair") == 2
    prompt = tokens(1, 9)
    with opened(exported.dense_model) as session, OrtSession(exported.dense_model) as reference:
        assert_close(session.prefill(prompt), reference.prefill(prompt))


def test_function_bodies_travel_with_the_fused_ops(exported: Exported) -> None:
    model = rewritten(exported.model)
    used = {node.op_type for node in model.graph if node.domain == FUSED}
    assert used == {name for domain, name, _ in model.functions if domain == FUSED}


def test_a_cap_on_scores_is_not_rewritten(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "source", CAPPED)
    (tmp_path / "export").mkdir()
    exported = export_folder(tmp_path / "source", tmp_path / "export")
    with pytest.raises(NotRewritableError, match="attention"):
        rewritten(exported.model)


def without_causality(model: ir.Model) -> None:
    for node in model.graph:
        if node.op_type == "LessOrEqual":
            node.op_type = "Less"


def with_scaled_queries(model: ir.Model) -> None:
    for node in list(model.graph):
        if node.op_type == "RotaryEmbedding":
            ir.convenience.replace_all_uses_with(node.outputs[0], node.inputs[0])
            return


@pytest.mark.parametrize("change", [without_causality, with_scaled_queries])
def test_what_no_rule_takes_is_refused(
    tiny_export: Path, change: Callable[[ir.Model], None]
) -> None:
    model = ir.load(tiny_export / "model.onnx")
    change(model)
    with pytest.raises(NotRewritableError):
        rewrite_for_cuda(model, positions=POSITIONS)
