"""From a Hugging Face causal LM to an ONNX graph with its key/value cache.

A target linear is traced as an `NMLinear` node that carries nothing but its layer's name; weights,
constants and attributes are attached by `nmexport.graph.assembly`. So the sparse graph and the
dense baseline come from one trace, and no target weight is ever held twice.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import logging
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nmexport.errors import ModelError, NmexportError
from nmexport.graph.assembly import LAYER_ATTRIBUTE, LINEAR, find_linears
from nmexport.graph.contract import op_contract
from nmexport.graph.versions import OPSET
from nmexport.models import attention, families
from nmexport.models.context import context_of
from nmexport.models.rotary import frequencies_from_positions
from nmexport.models.swap import swapped, swapped_attention

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import onnx_ir as ir
    from transformers import PreTrainedModel

# Sizes to trace with: unequal, and none of them 1, which torch.export would take for a constant.
_BATCH, _SEQUENCE, _PAST = 2, 3, 5


class UntraceableError(ModelError):
    """A model that the tracer, or the cache of keys and values, cannot take."""


@dataclass(frozen=True)
class CacheShape:
    """Cache of one token in one decoder layer."""

    heads: int
    key_size: int
    value_size: int


class _TracedLinear(nn.Module):
    """Stands for a target linear: maps `[..., K]` to `[..., O]` by a node that names it."""

    def __init__(self, name: str, out_features: int) -> None:
        super().__init__()
        self.name = name
        self.out_features = out_features

    def forward(self, x: Tensor) -> Tensor:
        contract = op_contract()
        return torch.onnx.ops.symbolic(
            f"{contract.domain}::{LINEAR}",
            (x,),
            attrs={LAYER_ATTRIBUTE: self.name},
            dtype=x.dtype,
            shape=(*x.shape[:-1], self.out_features),
            version=contract.opset_version,
        )


class _CachedForward(nn.Module):
    """The model as a function of tensors alone."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past: list[tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        from transformers import DynamicCache

        # No config: a cache that knows of a sliding window would drop what lies beyond it, and
        # `present` would not be `past` plus the new tokens. The window is the mask's business.
        cache = DynamicCache()
        for index, (key, value) in enumerate(past):
            cache.update(key, value, index)
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        return output.logits, [(layer.keys, layer.values) for layer in cache.layers]


def cache_shapes(model: PreTrainedModel) -> list[CacheShape]:
    """Find what each decoder layer caches by running one token.

    Raises:
        ModelError: if the model keeps anything but keys and values.
    """
    from transformers import DynamicCache

    cache = DynamicCache()
    try:
        with torch.no_grad(), _fake_mode_of(model), _exportable_attention(model):
            model(
                input_ids=torch.zeros(1, 1, dtype=torch.long),
                attention_mask=torch.ones(1, 1, dtype=torch.long),
                position_ids=torch.zeros(1, 1, dtype=torch.long),
                past_key_values=cache,
                use_cache=True,
            )
        shapes = [
            CacheShape(layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3])
            for layer in cache.layers
        ]
    except NmexportError:
        raise
    except Exception as error:
        raise _cannot_export(model, "its cache is not one of keys and values", error) from error
    if not shapes:
        raise _cannot_export(model, "it keeps no cache", None)
    return shapes


def _fake_mode_of(model: PreTrainedModel) -> contextlib.AbstractContextManager[object]:
    """Return the fake mode that the model's parameters were made in; None for real ones."""
    from torch._guards import detect_fake_mode

    return detect_fake_mode(list(model.parameters())) or contextlib.nullcontext()


def trace(model: PreTrainedModel, layers: Sequence[str]) -> ir.Model:
    """Trace the model with the named linears as bare NMLinear nodes.

    The model is as before afterwards. Initializers of the graph share the model's memory.

    Args:
        model: A causal LM in eval mode.
        layers: Dotted names of the `nn.Linear` modules to trace as NMLinear.

    Returns:
        A graph with the ecosystem's names of inputs, outputs and axes.

    Raises:
        UntraceableError: if the model cannot be traced; says what failed.
    """
    shapes = cache_shapes(model)
    stand_ins = {
        name: _TracedLinear(name, model.get_submodule(name).out_features) for name in layers
    }
    with swapped(model, stand_ins):
        try:
            with (
                _exportable_attention(model),
                frequencies_from_positions(model),
                _silence(),
                _pause_garbage_collection(),
            ):
                traced = _export_at_any_length(model, shapes)
        except NmexportError:
            raise
        except Exception as error:  # the tracer and the model's code raise what they please
            raise _cannot_trace(model, error) from error
    _refuse_unused(model, layers, traced)
    return traced


def _refuse_unused(model: PreTrainedModel, layers: Sequence[str], traced: ir.Model) -> None:
    """Refuse a model with linears that run but are missing from the graph.

    Raises:
        UntraceableError: naming one of them.
    """
    named = {name for name, _ in find_linears(traced)}
    unused = [name for name in layers if name not in named]
    if unused:
        what = f"no logit depends on {len(unused)} of its linears, such as {unused[0]}"
        raise _cannot_export(model, what, None)


def _export_at_any_length(model: PreTrainedModel, shapes: Sequence[CacheShape]) -> ir.Model:
    """Trace without a maximum cache length, or up to the context where the code has one.

    GPT-Neo and others cut their mask or positions out of a table, which ends with the context.
    """
    try:
        return _export(model, shapes)
    except Exception as error:
        context = context_of(model.config)
        if context is None or context <= _PAST + _SEQUENCE or not _is_bound_in_length(error):
            raise
    return _export(model, shapes, longest=context)


def _export(
    model: PreTrainedModel, shapes: Sequence[CacheShape], *, longest: int | None = None
) -> ir.Model:
    # Named where they are the same in many inputs: else the tracer would find out anew for each
    # layer, which takes a quarter of its time.
    batch, past = torch.export.Dim("batch"), torch.export.Dim("past", max=longest)
    tokens = {0: batch, 1: torch.export.Dim.DYNAMIC}
    states = {0: batch, 2: past}
    with torch.no_grad():
        program = torch.onnx.export(
            _CachedForward(model).eval(),
            _example_inputs(shapes, model.dtype),
            dynamo=True,
            dynamic_shapes=(tokens, tokens, tokens, [(states, states) for _ in shapes]),
            input_names=[
                "input_ids",
                "attention_mask",
                "position_ids",
                *state_names("past_key_values", len(shapes)),
            ],
            output_names=["logits", *state_names("present", len(shapes))],
            opset_version=OPSET,
            optimize=False,  # nmexport.graph.passes does what pays, in a fraction of the time
            verbose=False,
        )
    if program is None:
        raise RuntimeError("torch.onnx.export returned nothing")
    _name_parameters(program.model)
    _name_axes(program.model, shapes)
    return program.model


def state_names(prefix: str, count: int) -> list[str]:
    """`prefix.0.key`, `prefix.0.value`, `prefix.1.key`, ..."""
    return [f"{prefix}.{index}.{kind}" for index in range(count) for kind in ("key", "value")]


def _example_inputs(shapes: Sequence[CacheShape], dtype: torch.dtype) -> tuple[Any, ...]:
    total = _PAST + _SEQUENCE
    past = [
        (
            torch.zeros(_BATCH, shape.heads, _PAST, shape.key_size, dtype=dtype),
            torch.zeros(_BATCH, shape.heads, _PAST, shape.value_size, dtype=dtype),
        )
        for shape in shapes
    ]
    return (
        torch.ones(_BATCH, _SEQUENCE, dtype=torch.long),
        torch.ones(_BATCH, total, dtype=torch.long),
        torch.arange(_PAST, total).expand(_BATCH, -1).contiguous(),
        past,
    )


def _name_parameters(traced: ir.Model) -> None:
    """Name the parameters as the Hugging Face model does."""
    for value in list(traced.graph.initializers.values()):
        if value.name is not None:
            value.name = value.name.removeprefix("model.")


_BATCH_AXIS, _SEQUENCE_AXIS = "batch_size", "sequence_length"
_PAST_AXIS, _TOTAL_AXIS = "past_sequence_length", "total_sequence_length"


def _name_axes(traced: ir.Model, shapes: Sequence[CacheShape]) -> None:
    """Give every value the product's axes instead of the tracer's symbols.

    The tracer has a symbol for each axis of each input; those that mean the same get one name.
    """
    import onnx_ir as ir

    tokens: list[int | str] = [_BATCH_AXIS, _SEQUENCE_AXIS]
    named: dict[str, list[int | str]] = {
        "input_ids": tokens,
        "attention_mask": [_BATCH_AXIS, _TOTAL_AXIS],
        "position_ids": tokens,
    }
    for prefix, length in (("past_key_values", _PAST_AXIS), ("present", _TOTAL_AXIS)):
        for index, shape in enumerate(shapes):
            axes: list[int | str] = [_BATCH_AXIS, shape.heads, length]
            named[f"{prefix}.{index}.key"] = [*axes, shape.key_size]
            named[f"{prefix}.{index}.value"] = [*axes, shape.value_size]
    symbols = _symbols(traced.graph.inputs, named)
    # The model's code may cut a table at the context; the tracer cannot tell the batch then.
    logits = traced.graph.outputs[0].shape or ()
    named["logits"] = [*tokens, *(size for size in logits[2:] if isinstance(size, int))]
    for node in traced.graph:
        for value in node.outputs:
            if value.shape is not None:
                value.shape = ir.Shape([_name_axis(size, symbols) for size in value.shape])
    for value in (*traced.graph.inputs, *traced.graph.outputs):
        if value.name in named:
            value.shape = ir.Shape(named[value.name])


def _symbols(
    inputs: Sequence[ir.Value], named: Mapping[str, Sequence[int | str]]
) -> dict[str, str]:
    """Map each of the tracer's symbols to our name."""
    symbols = {}
    for value in inputs:
        for size, name in zip(value.shape or (), named[value.name or ""], strict=True):
            if isinstance(name, str) and not isinstance(size, int):
                symbols[str(size)] = name
    past = [symbol for symbol, name in symbols.items() if name == _PAST_AXIS]
    sequence = [symbol for symbol, name in symbols.items() if name == _SEQUENCE_AXIS]
    for old, new in itertools.product(past, sequence):
        symbols[f"{old} + {new}"] = symbols[f"{new} + {old}"] = _TOTAL_AXIS
    return symbols


def _name_axis(size: int | ir.SymbolicDim, symbols: Mapping[str, str]) -> int | str | None:
    """Name an axis: static sizes and known symbols as they are, expressions as unknown."""
    return size if isinstance(size, int) else symbols.get(str(size))


@contextlib.contextmanager
def _exportable_attention(model: PreTrainedModel) -> Iterator[None]:
    """Switch the model to the attention that exports well, where it can be switched."""
    if not getattr(model, "_supports_attention_backend", False):
        yield
        return
    with swapped_attention(model, attention.register()):
        yield


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Silence the tracer's log; failures come as exceptions."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _pause_garbage_collection() -> Iterator[None]:
    """Pause the garbage collector, which finds nothing in a graph that only grows.

    It would look through all of it again and again: an eighth of the tracer's time.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _is_bound_in_length(error: Exception) -> bool:
    """Tell whether the model's code has a maximum cache length, or another path beyond one."""
    from torch._dynamo.exc import UserError as TracerError
    from torch._dynamo.exc import UserErrorType

    cause = error.__cause__ or error
    return isinstance(cause, TracerError) and cause.error_type is UserErrorType.CONSTRAINT_VIOLATION


def _cannot_trace(model: PreTrainedModel, error: Exception) -> UntraceableError:
    if _is_bound_in_length(error) or "inconsisten" in str(error.__cause__):
        what = "its code takes another path at some lengths of its cache, and a graph has one path"
        return _cannot_export(model, what, None)
    return _cannot_export(model, "torch.export cannot follow its code", error)


def _cannot_export(model: PreTrainedModel, what: str, error: Exception | None) -> UntraceableError:
    # The tracer's own error wraps what failed, and tells of steps and flags that nobody has here.
    said = str((error and error.__cause__) or error or "")
    lines = [line for line in said.splitlines() if line.strip()]
    reason = f": {lines[0][:300]}" if lines else ""
    return UntraceableError(
        f"Models of type {model.config.model_type!r} cannot be exported: {what}{reason}.",
        allowed=families.ALLOWED,
        fix="use a dense model of one of these families; -vv shows what was raised",
    )
