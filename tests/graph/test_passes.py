"""Graph rewrites: each leaves the values alone, fires where it should and only there."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from nmexport.graph.fusions import FuseCachedAttention, FuseRotaryEmbedding
from nmexport.graph.passes import EliminateNoOps, TransposeWeights

import onnxruntime

B, H, S, P, D = 2, 4, 3, 5, 8
RNG = np.random.default_rng(0)


def graph_of(text: str, *, opset: int = 23) -> ir.Model:
    """A model from ONNX's textual form: `(inputs) => (outputs) <initializers> { nodes }`."""
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}]>\n{text}')
    proto = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    return ir.serde.deserialize_model(proto)


def run(model: ir.Model, **feeds: np.ndarray) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    proto = ir.serde.serialize_model(model)
    onnx.checker.check_model(proto)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options)
    return session.run(None, feeds)


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def random(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def rewritten_equal(
    model: ir.Model, rewrite: ir.passes.InPlacePass, expected: bool, **feeds: np.ndarray
) -> None:
    before = run(model, **feeds)
    assert rewrite(model).modified is expected
    ir.passes.common.RemoveUnusedNodesPass()(model)
    for old, new in zip(before, run(model, **feeds), strict=True):
        np.testing.assert_allclose(new, old, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("nodes", "left"),
    [
        ("y = Mul(x, one)", 0),
        ("y = Mul(one, x)", 0),
        ("y = Add(x, zero)", 0),
        ("y = Slice(x, first, all, first)", 0),
        ("y = Slice(x, first, three, second)", 0),
        ("y = Transpose<perm = [0, 1]>(x)", 0),
        ("y = Cast<to = 1>(x)", 0),
        ("y = Concat<axis = 0>(x)", 0),
        ("y = Concat<axis = 0>(x, none)", 0),
        ("y = Mul(x, zero)", 1),
        ("y = Add(x, one)", 1),
        ("y = Slice(x, second, all, second)", 1),
        ("y = Slice(x, first, second, first)", 1),
        ("y = Transpose<perm = [1, 0]>(x)", 1),
        ("y = Cast<to = 7>(x)", 1),
        ("y = Concat<axis = 0>(x, x)", 1),
    ],
)
def test_no_ops(nodes: str, left: int) -> None:
    model = graph_of(
        f"""m (float[2, 3] x, float[0, 3] none) => (z)
        <float one = {{1.0}}, float zero = {{0.0}}, int64[1] first = {{0}},
         int64[1] second = {{1}}, int64[1] three = {{3}}, int64[1] all = {{9223372036854775807}}>
        {{ {nodes}
           z = Neg(y) }}""".replace(
            "(z)", "(int64[M, N] z)" if "to = 7" in nodes else "(float[M, N] z)", 1
        )
    )
    feeds = {"x": random(2, 3), "none": random(0, 3)}
    rewritten_equal(model, EliminateNoOps(), left == 0, **feeds)
    assert len(model.graph) == 1 + left


def test_no_op_that_broadcasts_stays() -> None:
    """`x * [[1]]` gives a scalar two axes."""
    model = graph_of(
        "m (float x) => (float[1, 1] z) <float[1, 1] one = {1.0}> { y = Mul(x, one) z = Neg(y) }"
    )
    rewritten_equal(model, EliminateNoOps(), False, x=np.array(3.0, np.float32))


def test_no_op_that_is_an_output_stays() -> None:
    model = graph_of("m (float[2] x) => (float[2] y) <float one = {1.0}> { y = Mul(x, one) }")
    rewritten_equal(model, EliminateNoOps(), False, x=random(2))


WEIGHT = "float[2, 3] w = {1.0, 2.0, 3.0, 4.0, 5.0, 6.0}"


def test_weight_read_transposed_is_stored_transposed() -> None:
    model = graph_of(
        f"m (float[4, 3] x) => (float[4, 2] y) <{WEIGHT}> "
        "{ t = Transpose<perm = [1, 0]>(w) y = MatMul(x, t) }"
    )
    rewritten_equal(model, TransposeWeights(), True, x=random(4, 3))
    assert ops(model) == ["MatMul"]


def test_tied_weight_stays_one() -> None:
    model = graph_of(
        f"m (float[4, 3] x, int64[1] i) => (float[4, 2] y, float[1, 3] e) <{WEIGHT}> "
        "{ t = Transpose<perm = [1, 0]>(w) y = MatMul(x, t) e = Gather(w, i) }"
    )
    rewritten_equal(model, TransposeWeights(), False, x=random(4, 3), i=np.array([1]))


def rotary(
    *, table: str = "Concat<axis = -1>(f, f)", end: int = D, factor: str = "", half: int = D // 2
) -> ir.Model:
    """`x * cos + rotate_half(x) * sin`, as torch leaves it."""
    scaled = f"{factor}" or "c1 = Identity(c0)"
    return graph_of(
        f"""m (float[{B}, {H}, {S}, {D}] x, float[{B}, {S}, {D // 2}] f,
           float[{B}, {S}, {D // 2}] g)
        => (float[{B}, {H}, {S}, {D}] y)
        <int64[1] zero = {{0}}, int64[1] middle = {{{half}}}, int64[1] end = {{{end}}},
         int64[1] axis = {{3}}, int64[1] one = {{1}}, float gain = {{1.5}}>
        {{
            t = {table}
            c0 = Cos(t)
            {scaled}
            s0 = Sin(t)
            c = Unsqueeze(c1, one)
            s = Unsqueeze(s0, one)
            upper = Slice(x, middle, end, axis)
            lower = Slice(x, zero, middle, axis)
            minus = Neg(upper)
            turned = Concat<axis = -1>(minus, lower)
            a = Mul(x, c)
            b = Mul(turned, s)
            y = Add(a, b)
        }}"""
    )


def rotary_feeds() -> dict[str, np.ndarray]:
    half = (B, S, D // 2)
    return {"x": random(B, H, S, D), "f": random(*half), "g": random(*half)}


def no_identity(model: ir.Model) -> ir.Model:
    ir.passes.common.IdentityEliminationPass()(model)
    return model


@pytest.mark.parametrize("end", [D, 2**63 - 1])
@pytest.mark.parametrize("factor", ["", "c1 = Mul(c0, gain)", "c1 = Mul(gain, c0)"])
def test_rotary_embedding(end: int, factor: str) -> None:
    model = no_identity(rotary(end=end, factor=factor))
    rewritten_equal(model, FuseRotaryEmbedding(), True, **rotary_feeds())
    assert "RotaryEmbedding" in ops(model)
    assert "Neg" not in ops(model)


@pytest.mark.parametrize(
    ("what", "options"),
    [
        ("halves of the table differ", {"table": "Concat<axis = -1>(f, g)"}),
        ("uneven halves of x", {"half": 2}),
        ("the second half is not all of it", {"end": D - 1}),
    ],
)
def test_what_is_no_rotary_embedding(what: str, options: dict[str, object]) -> None:
    model = no_identity(rotary(**options))
    assert not FuseRotaryEmbedding()(model).modified, what


def test_rotary_embedding_needs_its_opset() -> None:
    model = graph_of("m (float[2] x) => (float[2] y) { y = Neg(x) }", opset=20)
    with pytest.raises(ir.passes.PreconditionError):
        FuseRotaryEmbedding()(model)


CACHED = f"""m (float[{B}, {S}, {H * D}] q, float[{B}, {S}, {2 * D}] k, float[{B}, {S}, {2 * D}] v,
     float[{B}, 1, {S}, {P + S}] mask, float[{B}, 2, {P}, {D}] past_k,
     float[{B}, 2, {P}, {D}] past_v,
     float[{B}, {S}, {D // 2}] c, float[{B}, {S}, {D // 2}] s)
  => (float[{B}, {S}, {H * D}] y, float[{B}, 2, {P + S}, {D}] all_k,
      float[{B}, 2, {P + S}, {D}] all_v)
  <int64[4] heads = {{{B}, {S}, -1, {D}}}, int64[3] flat = {{{B}, {S}, -1}}>
  {{
    q1 = Reshape(q, heads)
    q2 = Transpose<perm = [0, 2, 1, 3]>(q1)
    q3 = RotaryEmbedding(q2, c, s)
    k1 = Reshape(k, heads)
    k2 = Transpose<perm = [0, 2, 1, 3]>(k1)
    k3 = RotaryEmbedding(k2, c, s)
    v1 = Reshape(v, heads)
    v2 = Transpose<perm = [0, 2, 1, 3]>(v1)
    all_k = Concat<axis = -2>(past_k, k3)
    all_v = Concat<axis = -2>(past_v, v2)
    a = Attention<scale = 0.3>(q3, all_k, all_v, mask)
    a1 = Transpose<perm = [0, 2, 1, 3]>(a)
    y = Reshape(a1, flat)
  }}"""


def attention_feeds() -> dict[str, np.ndarray]:
    return {
        "q": random(B, S, H * D),
        "k": random(B, S, 2 * D),
        "v": random(B, S, 2 * D),
        "mask": np.where(RNG.random((B, 1, S, P + S)) < 0.3, np.float32(-1e30), np.float32(0)),
        "past_k": random(B, 2, P, D),
        "past_v": random(B, 2, P, D),
        "c": random(B, S, D // 2),
        "s": random(B, S, D // 2),
    }


def test_cached_attention_is_one_node() -> None:
    model = graph_of(CACHED)
    rewritten_equal(model, FuseCachedAttention(), True, **attention_feeds())
    assert sorted(ops(model)) == ["Attention", "RotaryEmbedding", "RotaryEmbedding"]


def test_cached_attention_with_normalised_heads_keeps_four_axes() -> None:
    """Qwen3 normalises each head: only the caches move in."""
    text = CACHED.replace(
        "q3 = RotaryEmbedding(q2, c, s)", "q2n = Tanh(q2) q3 = RotaryEmbedding(q2n, c, s)"
    )
    model = graph_of(text)
    rewritten_equal(model, FuseCachedAttention(), True, **attention_feeds())
    assert "Concat" not in ops(model)
    assert "Tanh" in ops(model)


def test_attention_without_caches_is_left() -> None:
    model = graph_of(
        CACHED.replace("Concat<axis = -2>(past_k, k3)", "Concat<axis = -2>(k3, past_k)")
    )
    FuseCachedAttention()(model)
    assert len(next(node for node in model.graph if node.op_type == "Attention").inputs) == 4
