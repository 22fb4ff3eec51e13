"""A hand-built ONNX language model with the product's names: small enough to check by hand.

token embedding + running mean-free sum of the unmasked past + position embedding -> logits.
The running sum lives in the KV cache, so prefill, decode, masks and positions all matter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

if TYPE_CHECKING:
    from pathlib import Path

VOCABULARY = 11
WIDTH = 4
POSITIONS = 64
HEADS = 1


def embeddings(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "tokens": rng.standard_normal((VOCABULARY, WIDTH)).astype(np.float32),
        "positions": rng.standard_normal((POSITIONS, WIDTH)).astype(np.float32),
        "head": rng.standard_normal((WIDTH, VOCABULARY)).astype(np.float32),
    }


def expected_logits(ids: np.ndarray, seed: int = 0) -> np.ndarray:
    """Logits `[B, S, V]` of whole prompts without padding."""
    weights = embeddings(seed)
    hidden = weights["tokens"][ids].cumsum(axis=1) + weights["positions"][: ids.shape[1]]
    return hidden @ weights["head"]


def save_toy_lm(path: Path, *, seed: int = 0, dtype: int = TensorProto.FLOAT) -> Path:
    """Write the model; `dtype` is the type of cache and logits."""
    axes = {"ids": ["batch_size", "sequence_length"], "mask": ["batch_size", "total"]}
    past_shape = ["batch_size", HEADS, "past_sequence_length", WIDTH]
    present_shape = ["batch_size", HEADS, "total_sequence_length", WIDTH]
    inputs = [
        helper.make_tensor_value_info("input_ids", TensorProto.INT64, axes["ids"]),
        helper.make_tensor_value_info("attention_mask", TensorProto.INT64, axes["mask"]),
        helper.make_tensor_value_info("position_ids", TensorProto.INT64, axes["ids"]),
        helper.make_tensor_value_info("past_key_values.0.key", dtype, past_shape),
        helper.make_tensor_value_info("past_key_values.0.value", dtype, past_shape),
    ]
    outputs = [
        helper.make_tensor_value_info("logits", dtype, [*axes["ids"], VOCABULARY]),
        helper.make_tensor_value_info("present.0.key", dtype, present_shape),
        helper.make_tensor_value_info("present.0.value", dtype, present_shape),
    ]
    constants = {"axis1": np.array([1]), "axis2": np.array(2), "minus1": np.array([-1])}
    initializers = [
        numpy_helper.from_array(value, name)
        for name, value in {**embeddings(seed), **constants}.items()
    ]
    nodes = [
        helper.make_node("Gather", ["tokens", "input_ids"], ["embedded"]),
        helper.make_node("Unsqueeze", ["embedded", "axis1"], ["new"]),
        helper.make_node("Cast", ["new"], ["new_typed"], to=dtype),
        helper.make_node(
            "Concat", ["past_key_values.0.key", "new_typed"], ["present.0.key"], axis=2
        ),
        helper.make_node(
            "Concat", ["past_key_values.0.value", "new_typed"], ["present.0.value"], axis=2
        ),
        helper.make_node("Cast", ["present.0.value"], ["values"], to=TensorProto.FLOAT),
        helper.make_node("Squeeze", ["values", "axis1"], ["all_tokens"]),
        helper.make_node("Cast", ["attention_mask"], ["mask_float"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask_float", "minus1"], ["mask_column"]),
        helper.make_node("Mul", ["all_tokens", "mask_column"], ["unmasked"]),
        helper.make_node("Constant", [], ["one"], value_int=1),
        helper.make_node("CumSum", ["unmasked", "one"], ["sums"]),
        helper.make_node("Shape", ["input_ids"], ["length"], start=1, end=2),
        helper.make_node("Neg", ["length"], ["first"]),
        helper.make_node("Constant", [], ["end"], value_ints=[2**31]),
        helper.make_node("Slice", ["sums", "first", "end", "axis1"], ["context"]),
        helper.make_node("Gather", ["positions", "position_ids"], ["placed"]),
        helper.make_node("Add", ["context", "placed"], ["hidden"]),
        helper.make_node("MatMul", ["hidden", "head"], ["logits_float"], name="lm_head"),
        helper.make_node("Cast", ["logits_float"], ["logits"], to=dtype),
    ]
    graph = helper.make_graph(nodes, "toy", inputs, outputs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save_model(model, path)
    return path


def prefill_padded(session: Any, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Run prompts that are padded on the left; `decode_step` goes on from them."""
    logits, session.cache = session.extend(None, ids, mask)
    return logits
