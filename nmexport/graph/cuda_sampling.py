"""What a decode step takes from the host, and gives to it, on ONNX Runtime's CUDA provider."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from nmexport.graph.attention_form import NotRewritableError
from nmexport.graph.cuda_attention import LAST_POSITIONS
from nmexport.graph.fused import FUSED

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
        function = ir.serde.deserialize_function(onnx.parser.parse_function(_LIKELIEST))
        model.functions[function.identifier()] = function
        model.graph.opset_imports[FUSED] = 1
        return ir.passes.PassResult(model, modified=True)


class CopyPositions(ir.passes.InPlacePass):
    """Positions come as int64, and one node makes the int32 of them that every layer reads.

    The input may then be memory of the host, as token ids are: the device fetches it once a step,
    and not once a layer.

    Requires: what `ReplaceAttention` ensures. Ensures: the same values.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        given = next((value for value in graph.inputs if value.name == LAST_POSITIONS), None)
        if given is None:
            raise NotRewritableError(f"no input {LAST_POSITIONS}")
        given.name = f"{LAST_POSITIONS}.int32"
        wide = ir.val(LAST_POSITIONS, dtype=ir.DataType.INT64, shape=given.shape)
        cast = ir.Node("", "Cast", [wide], [ir.AttrInt64("to", int(ir.DataType.INT32))])
        narrow = cast.outputs[0]
        narrow.name, narrow.dtype, narrow.shape = given.name, ir.DataType.INT32, given.shape
        ir.convenience.replace_all_uses_with(given, narrow)
        graph.inputs[list(graph.inputs).index(given)] = wide
        graph.insert_before(graph[0], cast)
        return ir.passes.PassResult(model, modified=True)
