"""The truth: both ops of the op contract in NumPy float64, slow and obvious.

Every executor (PyTorch module, ONNX function body, native kernel) is tested against this file, and
this file against nothing but the contract and a brute-force search in its tests.

Two number systems meet here, on purpose. *Selection* is done on float32 scores, bit for bit as an
executor does it, so that masks can be compared exactly. *Values* are float64, so that what is left
of a difference is the executor's rounding; `Reference.bound` says how much the contract allows.

Readings of the contract, where it leaves a choice:

- The sequence length S that decides `phase` is the second-to-last dimension of X. An X of rank 1 is
  a single token: S = 1.
- `var` is the mean of squared deviations over K (no Bessel correction; the ratio would cancel it).
- Tokens that `phase` excludes meet the dense linear: W, `dense_scale` and `dense_bias`, and nothing
  else. Where n == m nothing is dropped, so nu = 1 also where var(z) lies below the variance floor.
- A static `shift` is float32, and so is z: scores are taken from `float32(x) - float32(eta)`.
- `value_scale` multiplies whatever is kept, so all channels where nothing is dropped.
- With `activation_bits` 8 the operand that is rounded is float32's: `float32(z) * value_scale`, or
  `float32(x) * dense_scale`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, get_args

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from nmexport.choices import Phase
from nmexport.errors import PatternError
from nmexport.oracle_weights import (
    check_activations,
    check_weights,
    meant_weights,
    rounded_operand,
)
from nmexport.sparsity.pattern import NMPattern

if TYPE_CHECKING:
    from collections.abc import Callable

PHASES: tuple[Phase, ...] = get_args(Phase)

VARIANCE_FLOOR = 1e-12
FLOAT32_RTOL_PER_SQRT_K = 1e-5
HALF_ULPS = 2
TYPES: tuple[np.dtype[Any], ...] = (
    np.dtype(np.float32),
    np.dtype(np.float16),
    np.dtype(ml_dtypes.bfloat16),
)

_Array = NDArray[Any]
_Float64 = NDArray[np.float64]
_Float32 = NDArray[np.float32]
_Bool = NDArray[np.bool_]

Products: TypeAlias = "Callable[[_Float64, _Array], tuple[_Float64, _Float64]]"
"""`s [..., K]` float64 and `w [K, O]` of floats -> `s @ w` and `s^2 @ w^2`, both float64."""


@dataclass(frozen=True, eq=False)
class Reference:
    """Expected output of NMLinear, and how far an executor may be from it."""

    value: _Float64
    """`Y [..., O]`, not rounded to T."""
    magnitude: _Float64
    """`[..., O]`: Euclidean norm of the terms that add up to each output.

    It is the size that an output has when its terms do not cancel, and what rounding errors are
    proportional to: an output that cancels to nearly nothing is not more precise for it.
    """
    keep: _Bool
    """`[..., K]`: the mask, in X's own channel order."""
    slack: _Float64
    """`[..., O]`: what the values come to that an executor may round to 8 bits the other way."""

    def bound(self, dtype: np.dtype[Any] | type) -> _Float64:
        """Largest difference `[..., O]` the contract allows an executor of type T."""
        scale = np.maximum(np.abs(self.value), self.magnitude)
        return tolerance(dtype, self.keep.shape[-1], self.value, magnitude=scale) + self.slack


def keep_mask(
    x: _Array,
    n: int,
    m: int,
    *,
    score_scale: _Array | None = None,
    channel_order: _Array | None = None,
) -> _Bool:
    """Which channels each token keeps.

    Args:
        x: `[..., K]`, one of the contract's types.
        n: How many channels of a group are kept.
        m: Channels in a group.
        score_scale: `[K] float32`, factors of the scores, in gathered order.
        channel_order: `[K]`, a permutation: group g holds `channel_order[g*m : g*m+m]`. None
            takes X as it lies.

    Returns:
        `[..., K]`, True where kept, in X's own channel order.

    Raises:
        PatternError: if n:m is out of range or m does not divide K.
        ValueError: if an array has the wrong type or shape.
    """
    _check_input(x, n, m)
    in_features = x.shape[-1]
    order = _check_order(channel_order, in_features)
    score: _Float32 = np.abs(_float32(x[..., order]))
    if score_scale is not None:
        _check_vector("score_scale", score_scale, (in_features,), np.dtype(np.float32))
        with np.errstate(over="ignore", invalid="ignore"):
            score = score * score_scale

    grouped = score.reshape(*score.shape[:-1], in_features // m, m)
    return _in_own_order(_keep_largest(grouped, n).reshape(score.shape), order)


def nm_prune(
    x: _Array,
    *,
    n: int,
    m: int,
    score_scale: _Array | None = None,
    channel_order: _Array | None = None,
) -> _Array:
    """NMPrune: X where kept, exact (positive) zero elsewhere, in X's own type.

    Raises:
        PatternError: if n:m is out of range or m does not divide K.
        ValueError: if an array has the wrong type or shape.
    """
    keep = keep_mask(x, n, m, score_scale=score_scale, channel_order=channel_order)
    return np.where(keep, x, np.zeros((), dtype=x.dtype))


def nm_linear(x: _Array, w: _Array, **arguments: Any) -> _Float64:
    """NMLinear's `Y [..., O]` in float64; arguments as for `reference`."""
    return reference(x, w, **arguments).value


def reference(
    x: _Array,
    w: _Array,
    *,
    n: int,
    m: int,
    bias: _Array | None = None,
    shift: _Array | None = None,
    shift_weight: _Array | None = None,
    score_scale: _Array | None = None,
    channel_order: _Array | None = None,
    weight_scale: _Array | None = None,
    value_scale: _Array | None = None,
    weight_zero_point: _Array | None = None,
    dense_scale: _Array | None = None,
    dense_bias: _Array | None = None,
    dynamic_shift: bool = False,
    variance_correction: bool = False,
    phase: Phase = "all",
    activation_bits: int = 0,
    activation_block: int = 32,
    products: Products | None = None,
) -> Reference:
    """NMLinear with its mask and the size of its terms.

    With a `channel_order`, X is gathered first; everything else along K lies in gathered order.

    Args:
        x: `[..., K] T`.
        w: `[K, O] T`, in_features first; or int8, int4, uint4 or float8_e4m3fn (ml_dtypes), with
            `weight_scale`.
        n: How many channels of a group are kept.
        m: Channels in a group.
        bias: `[O] T`.
        shift: `[1]` or `[K] float32`, subtracted from every token.
        shift_weight: `[O] float32`, what a unit of dynamic shift adds back; needed by it.
        score_scale: `[K] float32`.
        channel_order: `[K]`, a permutation: `x[..., channel_order]` is what is computed on.
        weight_scale: `[G, O]`, float32 or T, of a stored w: `w[k, o]` stands for
            `(w[k, o] - weight_zero_point[g, o]) * weight_scale[g, o]`, `g = k // (K / G)`. G is 1,
            or K / G a multiple of 16.
        value_scale: `[K] float32`, factors of the kept values; scores and nu do not see them.
        weight_zero_point: `[G, O]` of w's type; of integers also float32, between their steps.
        dense_scale: `[K] float32`, factors of all values of a token that `phase` excludes.
        dense_bias: `[O] T`, the bias of such a token.
        dynamic_shift: Subtract each token's own mean.
        variance_correction: Scale the product so that the token's variance is kept.
        phase: Which tokens are sparsified: `decode` those of sequences of length 1, `prefill`
            those of longer ones. The others take W, `dense_scale` and `dense_bias` alone.
        activation_bits: 8 rounds the operand to 8 bits; w is then of integers.
        activation_block: Channels of a token that are rounded with one scale.
        products: Computes the two products of float weights elsewhere, where they are all that is
            needed of w; None is NumPy, slow and obvious.

    Raises:
        PatternError: if n:m is out of range or m does not divide K.
        ValueError: if an array has the wrong type or shape, or both shifts are asked for.
    """
    _check_input(x, n, m)
    _check_linear(x, w, bias, shift, shift_weight, dynamic_shift=dynamic_shift, phase=phase)
    check_weights(x.dtype, w, weight_scale, weight_zero_point)
    check_activations(w, weight_scale, activation_bits, activation_block)
    _check_scales(x, value_scale=value_scale, dense_scale=dense_scale)
    _check_dense_phase(x, w, dense_scale, dense_bias, phase=phase)
    if not _phase_includes(phase, x.shape):
        shift, bias, value_scale = None, dense_bias, dense_scale
        dynamic_shift = variance_correction = False
    order = _check_order(channel_order, x.shape[-1])
    x = x[..., order]
    x64 = x.astype(np.float64)
    is_asked = weight_scale is not None or dynamic_shift or products is None  # for W itself
    w64 = meant_weights(w, weight_scale, weight_zero_point) if is_asked else w
    multiply = _products if is_asked or products is None else products

    with np.errstate(over="ignore", invalid="ignore"):
        eta: _Float64 = np.zeros(1)
        if dynamic_shift:
            eta = x64.mean(axis=-1, keepdims=True)
        elif shift is not None:
            eta = shift.astype(np.float64)
        z = x64 - eta
        z32: _Float32 = _float32(x) - eta.astype(np.float32)

        sparsify = n < m and _phase_includes(phase, x.shape)
        keep = np.ones(x.shape, dtype=np.bool_)
        if sparsify:
            keep = keep_mask(z32, n, m, score_scale=score_scale)
        s = np.where(keep, z, 0.0)

        nu: _Float64 = np.ones((*x.shape[:-1], 1))
        if variance_correction and sparsify:
            nu = np.sqrt(_variance(z) / np.maximum(_variance(s), VARIANCE_FLOOR))
        if value_scale is not None:
            s = s * value_scale.astype(np.float64)
        slack: _Float64 = np.zeros((1,))
        if activation_bits:
            s, open_step = rounded_operand(s, eta, activation_block)
            slack = nu * (open_step @ np.abs(w64))

        product, squares = multiply(s, w64)
        value, squared_terms = nu * product, np.square(nu) * squares
        if dynamic_shift and shift_weight is not None:
            value = value + eta * shift_weight.astype(np.float64)
            # eta itself carries a rounding error, which meets all of W.
            squared_terms = squared_terms + np.square(eta) * np.square(w64).sum(axis=0)
        if bias is not None:
            value = value + bias.astype(np.float64)
            squared_terms = squared_terms + np.square(bias.astype(np.float64))
    keep = _in_own_order(keep, order)
    return Reference(
        value=value, magnitude=np.sqrt(squared_terms), keep=keep, slack=_whole(slack, value)
    )


def _products(s: _Float64, w: _Array) -> tuple[_Float64, _Float64]:
    return s @ w, np.square(s) @ np.square(w)


def tolerance(
    dtype: np.dtype[Any] | type,
    in_features: int,
    value: _Float64,
    *,
    magnitude: _Float64 | None = None,
) -> _Float64:
    """How far a result of type T may lie from the float64 `value`, elementwise.

    `1e-5 * sqrt(K)` relative, and for the 16-bit types two units in the last place besides.

    Args:
        dtype: T.
        in_features: K.
        value: The oracle's result.
        magnitude: What the relative part is relative to; default `|value|`. Where sums cancel,
            pass the size of their terms (see `Reference`).
    """
    scale = np.abs(value) if magnitude is None else magnitude
    bound: _Float64 = FLOAT32_RTOL_PER_SQRT_K * np.sqrt(in_features) * scale
    if np.dtype(dtype) != np.dtype(np.float32):
        bound = bound + HALF_ULPS * unit_in_last_place(dtype, value)
    return bound


def unit_in_last_place(dtype: np.dtype[Any] | type, value: _Float64) -> _Float64:
    """Distance between neighbours of type T around `value`, elementwise (inf where not finite)."""
    info = ml_dtypes.finfo(np.dtype(dtype))
    finite = np.isfinite(value)
    # Below the smallest normal number the spacing stays what it is there.
    size = np.maximum(np.where(finite, np.abs(value), 0.0), float(info.smallest_normal))
    _, exponent = np.frexp(size)
    # frexp's mantissa lies in [0.5, 1): the leading bit is worth 2**(exponent - 1).
    ulp = np.ldexp(1.0, exponent - 1 - int(info.nmant))
    return np.where(finite, ulp, np.inf)


def agrees(actual: _Array, value: _Float64, bound: _Float64) -> _Bool:
    """Elementwise: is `actual` within `bound` of `value`, NaN matching NaN and inf matching inf?"""
    with np.errstate(invalid="ignore"):
        given = actual.astype(np.float64)
        near = np.abs(given - value) <= bound
    same = (given == value) | (np.isnan(given) & np.isnan(value))
    return np.where(np.isfinite(value), near, same).astype(np.bool_)


def _keep_largest(score: _Float32, n: int) -> _Bool:
    """The n largest of the last axis: NaN first, then by value, then by position."""
    is_nan = np.isnan(score)
    value = np.where(is_nan, np.float32(0), score)
    position = np.broadcast_to(np.arange(score.shape[-1]), score.shape)
    ranked = np.lexsort((position, -value, ~is_nan), axis=-1)  # the last key is the first to count
    keep = np.zeros(score.shape, dtype=np.bool_)
    np.put_along_axis(keep, ranked[..., :n], True, axis=-1)
    return keep


def _float32(x: _Array) -> _Float32:
    with np.errstate(invalid="ignore"):  # a signalling NaN is a NaN like any other
        return x.astype(np.float32)


def _variance(a: _Float64) -> _Float64:
    """Mean squared deviation over the last axis, kept as a dimension."""
    deviation = a - a.mean(axis=-1, keepdims=True)
    variance: _Float64 = np.square(deviation).mean(axis=-1, keepdims=True)
    return variance


def _phase_includes(phase: Phase, shape: tuple[int, ...]) -> bool:
    sequence_length = shape[-2] if len(shape) > 1 else 1
    return {"all": True, "decode": sequence_length == 1, "prefill": sequence_length > 1}[phase]


def _check_scales(x: _Array, **scales: _Array | None) -> None:
    for name, scale in scales.items():
        if scale is not None:
            _check_vector(name, scale, x.shape[-1:], np.dtype(np.float32))


def _check_dense_phase(
    x: _Array, w: _Array, dense_scale: _Array | None, dense_bias: _Array | None, *, phase: Phase
) -> None:
    if phase == "all" and not (dense_scale is None and dense_bias is None):
        raise ValueError("dense_scale and dense_bias go with phase decode or prefill, not all")
    if dense_bias is not None:
        _check_vector("dense_bias", dense_bias, w.shape[1:], x.dtype)


def _check_input(x: _Array, n: int, m: int) -> None:
    if x.dtype not in TYPES:
        raise ValueError(f"X is {x.dtype}; allowed: {', '.join(str(t) for t in TYPES)}")
    if x.ndim == 0:
        raise ValueError("X has no channel axis: its rank is 0")
    pattern = NMPattern(n, m)
    if x.shape[-1] % m:
        raise PatternError(
            f"{pattern} does not fit {x.shape[-1]} channels.",
            allowed="a group size M that divides the channels",
        )


def _check_vector(name: str, vector: _Array, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    if vector.shape != shape or vector.dtype != dtype:
        raise ValueError(
            f"{name} is {vector.dtype} {list(vector.shape)}; it must be {dtype} {list(shape)}"
        )


def _check_order(channel_order: _Array | None, in_features: int) -> NDArray[np.intp]:
    identity = np.arange(in_features, dtype=np.intp)
    if channel_order is None:
        return identity
    _check_vector("channel_order", channel_order, (in_features,), np.dtype(np.int32))
    if not np.array_equal(np.sort(channel_order), identity):
        raise ValueError(f"channel_order is not a permutation of 0..{in_features - 1}")
    return channel_order.astype(np.intp)


def _in_own_order(gathered: _Bool, order: NDArray[np.intp]) -> _Bool:
    """Put what lies in gathered order along the last axis back where it came from."""
    own = np.empty(gathered.shape, dtype=gathered.dtype)
    own[..., order] = gathered
    return own


def _whole(slack: _Float64, value: _Float64) -> _Float64:
    """Slack for each value; what is not finite allows nothing beside it."""
    return np.where(np.isfinite(slack), np.broadcast_to(slack, value.shape), 0.0)


def _check_linear(
    x: _Array,
    w: _Array,
    bias: _Array | None,
    shift: _Array | None,
    shift_weight: _Array | None,
    *,
    dynamic_shift: bool,
    phase: str,
) -> None:
    in_features = x.shape[-1]
    if w.ndim != 2 or w.shape[0] != in_features:  # noqa: PLR2004
        raise ValueError(f"W is {w.dtype} {list(w.shape)}; it must be [{in_features}, O]")
    out_features = w.shape[1]
    float32 = np.dtype(np.float32)
    if bias is not None:
        _check_vector("bias", bias, (out_features,), x.dtype)
    if shift is not None:
        _check_vector("shift", shift, (1,) if shift.shape == (1,) else (in_features,), float32)
    if shift_weight is not None:
        _check_vector("shift_weight", shift_weight, (out_features,), float32)
    if phase not in PHASES:
        raise ValueError(f"phase is {phase!r}; allowed: {', '.join(PHASES)}")
    if dynamic_shift and shift is not None:
        raise ValueError("dynamic_shift and a static shift exclude each other")
    if dynamic_shift and shift_weight is None:
        raise ValueError("dynamic_shift needs shift_weight, the column sums of the dense weight")
