"""The choice of the next token on the device, for ONNX Runtime's CUDA provider."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from nmexport.graph.attention_form import NotRewritableError
from nmexport.graph.fused import FUSED, add_function

NEXT_IDS = "next_ids"
_LIKELIEST = f"""<opset_import: ["" : 23], domain: "{FUSED}">
Likeliest (X) => (ids) {{
    numbers = Cast <to: int = {int(onnx.TensorProto.FLOAT)}> (X)
    ids = ArgMax <axis: int = -1, keepdims: int = 0, select_last_index: int = 0> (numbers)
}}"""


class ChooseLikeliest(ir.passes.InPlacePass):
    """The likeliest token of each row of logits is an output of its own, `next_ids` `[B, L]`.

    Greedy generation needs no more: 8 bytes a sequence in place of all its logits.

    Requires: an output `logits` `[B, L, V]`.
    Ensures: the first index of the largest logit, as NumPy's argmax.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        logits = next((value for value in graph.outputs if value.name == "logits"), None)
        if logits is None or logits.shape is None:
            raise NotRewritableError("no output logits")
        node = ir.Node(FUSED, "Likeliest", [logits])
        ids = node.outputs[0]
        ids.name, ids.dtype, ids.shape = NEXT_IDS, ir.DataType.INT64, ir.Shape(logits.shape[:-1])
        graph.append(node)
        graph.outputs.append(ids)
        add_function(model, _LIKELIEST)
        return ir.passes.PassResult(model, modified=True)
