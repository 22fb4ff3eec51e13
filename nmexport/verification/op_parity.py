"""Compares each sparsified linear with the float64 oracle, on inputs of a real run.

Whole models cannot tell a wrong executor from a rounding one: where two scores of a group are
nearly equal, the last bit of a hidden state decides which is kept, and what follows differs
visibly. Given the same input, though, the op contract leaves no room: the same mask, and values
within its tolerance. That is what is checked here, linear by linear.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from nmexport.oracle import Reference, reference
from nmexport.report.model import LinearParity
from nmexport.verification.audit import chunks_by_bytes
from nmexport.verification.instrument import add_layer_outputs, read_graph, sparse_linears

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    import onnx
    from numpy.typing import NDArray

    from nmexport.oracle import Products
    from nmexport.runtimes.onnxruntime_session import OrtSession
    from nmexport.store.layers import LayerSpec

    Tensors = Mapping[str, NDArray[Any]]
    Compute = Callable[[LayerSpec, NDArray[Any]], NDArray[Any]]
    TensorsOf = Callable[[str], Tensors]

PROTOCOL = (
    "Each sparsified linear computes on the input that it met in a run of the model, prompt and "
    "decode, and is held against a float64 oracle on that same input. The error is given as a "
    "share of what the op contract allows; a channel kept or dropped wrongly would exceed it by "
    "orders of magnitude. A GPU's products take operands of the engine's type: activations that a "
    "shift or scale changed are rounded to it first, and so are weights of integers for a prompt; "
    "that much is allowed too."
)
# Error that rounding an operand to T adds to an output, over half a unit in the last place times
# the norm of its terms: errors are independent, so five standard deviations of a uniform one are
# less.
_ROUNDED_OPERAND = 4.0
# With a shift computed from the token, scores this close may rank either way (op contract).
_TIE = 1e-5


@dataclass
class Worst:
    """The largest error so far, as a share of the contract's tolerance."""

    share: float = 0.0
    layer: str | None = None
    linears: set[str] = field(default_factory=set)
    values: int = 0

    def add(self, layer: str, share: NDArray[np.float64]) -> None:
        """Add one linear's errors over tolerance, `[tokens, O]`."""
        self.linears.add(layer)
        self.values += share.size
        largest = float(share.max(initial=0.0))
        if not largest <= self.share:  # NaN counts as worse than anything
            self.share, self.layer = largest, layer

    def report(self) -> LinearParity:
        """Make the report's figures."""
        return LinearParity(
            error_over_tolerance=self.share,
            worst_layer=self.layer,
            within_contract=self.share <= 1.0,
            linears=len(self.linears),
            values=self.values,
        )


def arguments(layer: LayerSpec, tensors: Tensors) -> dict[str, Any]:
    """Return the oracle's keyword arguments for a layer and its constants."""
    optional = {name: value for name, value in tensors.items() if name != "W"}
    return {
        "n": layer.pattern.n,
        "m": layer.pattern.m,
        "dynamic_shift": layer.dynamic_shift,
        "variance_correction": layer.variance_correction,
        "phase": layer.phase,
        "activation_bits": layer.activation_bits,
        "activation_block": layer.activation_block,
        **optional,
    }


@dataclass(frozen=True)
class Expected:
    """The oracle's result for one input of a linear: executors are checked against it in turn."""

    value: NDArray[np.float64]
    """`[..., S, O]`"""
    bound: NDArray[np.float64]
    """`[..., S, O]`: what the contract allows."""
    certain: NDArray[np.bool_]
    """`[..., S]`: tokens whose mask the contract leaves no choice of."""

    def shares(self, y: NDArray[Any]) -> NDArray[np.float64]:
        """Return the error of an output `[..., S, O]` as a share of what the contract allows.

        Returns:
            `[tokens, O]`; tokens whose mask the contract leaves open are left out.
        """
        share: NDArray[np.float64] = np.abs(y.astype(np.float64) - self.value) / self.bound
        return share.reshape(-1, share.shape[-1])[self.certain.reshape(-1)]


def expected_of(
    layer: LayerSpec,
    tensors: Tensors,
    x: NDArray[Any],
    *,
    products: Products | None = None,
    rounded_operands: int = 0,
) -> Expected:
    """Ask the oracle.

    Args:
        layer: What the linear computes.
        tensors: Its constants by the contract's names.
        x: `[..., S, K] T`, its input.
        products: See `oracle.reference`.
        rounded_operands: How many of the product's operands are rounded to T before.
    """
    exact = reference(x, tensors["W"], **arguments(layer, tensors), products=products)
    bound = exact.bound(x.dtype)
    if rounded_operands:
        half_unit = float(ml_dtypes.finfo(x.dtype).eps) / 2
        bound = bound + rounded_operands * _ROUNDED_OPERAND * half_unit * exact.magnitude
    return Expected(
        value=exact.value,
        bound=np.maximum(bound, np.finfo(np.float64).tiny),
        certain=~_open_masks(layer, tensors, x, exact),
    )


def _open_masks(
    layer: LayerSpec, tensors: Tensors, x: NDArray[Any], expected: Reference
) -> NDArray[np.bool_]:
    """Find tokens `[...]` with a kept and a dropped score that the contract does not tell apart."""
    if not layer.dynamic_shift:
        return np.zeros(x.shape[:-1], dtype=np.bool_)
    wide = x.astype(np.float64)
    order = tensors.get("channel_order", np.arange(x.shape[-1]))
    centred = (wide - wide.mean(axis=-1, keepdims=True))[..., order]
    groups = (*x.shape[:-1], -1, layer.pattern.m)
    score = (np.abs(centred) * tensors.get("score_scale", 1.0)).reshape(groups)
    keep = expected.keep[..., order].reshape(groups)
    least_kept = np.where(keep, score, np.inf).min(axis=-1)
    most_dropped = np.where(keep, -np.inf, score).max(axis=-1)
    near: NDArray[np.bool_] = (least_kept - most_dropped <= _TIE * least_kept).any(axis=-1)
    return near


def instrument(path: Path) -> tuple[onnx.ModelProto, dict[str, tuple[str, str]]]:
    """Make a model return the inputs and outputs of its linears too.

    Returns:
        The model without its weights, and names of input and output by layer.

    Raises:
        ArtifactError: if the model cannot be read.
    """
    model = read_graph(path)
    linears = sparse_linears(model)
    # The graph's own values, so the producer may be any node, or an input shared by linears.
    given = add_layer_outputs(
        model, {name: linear.node.input[0] for name, linear in linears.items()}, kind="input"
    )
    made = add_layer_outputs(model, {name: linear.output for name, linear in linears.items()})
    return model, {name: (given[name], made[name]) for name in linears}


def met_inputs(
    session: OrtSession,
    layers: Sequence[LayerSpec],
    outputs: Mapping[str, tuple[str, str]],
    prompt: NDArray[np.int64],
) -> Iterator[tuple[LayerSpec, NDArray[np.float32], NDArray[np.float32]]]:
    """Yield each linear's input `[1, S, K]` and output `[1, S, O]`: prompt, then decode.

    Args:
        session: A model that returns its linears' inputs and outputs.
        layers: The linears; taken so many at a time that memory stays bounded.
        outputs: Names of a linear's input and output among the graph's outputs.
        prompt: Token ids `[P]`; the last one is decoded on the cache of the others.
    """
    for chunk in _chunks(layers, tokens=prompt.size):
        session.watch(name for layer in chunk for name in outputs[layer.name])
        for run, tokens in ((session.prefill, prompt[:-1]), (session.decode_step, prompt[-1:])):
            run(tokens[None, :])
            for layer in chunk:
                x, y = (session.watched[name] for name in outputs[layer.name])
                yield layer, x, y


def check(
    session: OrtSession,
    layers: Sequence[LayerSpec],
    outputs: Mapping[str, tuple[str, str]],
    tensors_of: TensorsOf,
    prompt: NDArray[np.int64],
    *,
    executor: Compute | None = None,
    products: Products | None = None,
) -> tuple[LinearParity, LinearParity | None]:
    """Compare every linear of a running model with the oracle.

    Args:
        session: See `met_inputs`.
        layers: See `met_inputs`.
        outputs: See `met_inputs`.
        tensors_of: Constants of a layer by the contract's names; W's type is T.
        prompt: See `met_inputs`.
        executor: One linear of another executor, compared with the oracle on the same inputs.
        products: See `oracle.reference`.

    Returns:
        The report of the session, and of the other executor.
    """
    session_errors, executor_errors = Worst(), Worst()
    for layer, x32, y32 in met_inputs(session, layers, outputs, prompt):
        tensors = tensors_of(layer.name)
        element = tensors["W"].dtype if layer.weight_type == "float" else session.element_type
        x, y = (value.astype(element) for value in (x32, y32))  # exact: they were T
        rounded = _rounded_operands(layer, tensors, tokens=x.shape[-2]) if session.on_gpu else 0
        expected = expected_of(layer, tensors, x, products=products, rounded_operands=rounded)
        session_errors.add(layer.name, expected.shares(y))
        if executor is not None:
            executor_errors.add(layer.name, expected.shares(executor(layer, x)))
    return session_errors.report(), None if executor is None else executor_errors.report()


def _rounded_operands(layer: LayerSpec, tensors: Tensors, *, tokens: int) -> int:
    """Count the operands that a GPU's product rounds to T: changed activations, widened weights."""
    if layer.phase == "all" or (layer.phase == "decode") == (tokens == 1):
        changes_values = layer.dynamic_shift or bool({"shift", "value_scale"} & tensors.keys())
    else:
        changes_values = "dense_scale" in tensors
    widens = layer.weight_type != "float" and tokens > 1
    return int(changes_values) + int(widens)


def _chunks(layers: Sequence[LayerSpec], *, tokens: int) -> Iterator[list[LayerSpec]]:
    return chunks_by_bytes(
        layers, lambda layer: 4 * tokens * (layer.in_features + layer.out_features)
    )
