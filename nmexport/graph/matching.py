"""Reads small facts off a graph: constants, producers, sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

_READABLE = 64
"""Constants of more elements than this are weights: no rule looks into them."""


def constant(value: ir.Value | None) -> NDArray[Any] | None:
    """Read the elements of a small constant; None for other values."""
    if value is None or value.const_value is None or value.const_value.size > _READABLE:
        return None
    array: NDArray[Any] = value.const_value.numpy()
    return array


def scalar(value: ir.Value | None) -> float | int | None:
    """Read the element of a constant with only one, of any rank."""
    array = constant(value)
    return None if array is None or array.size != 1 else array.reshape(()).item()


def integers(value: ir.Value | None) -> list[int] | None:
    """Read a small constant as a flat list of ints."""
    array = constant(value)
    return None if array is None else [int(item) for item in array.reshape(-1)]


def made_by(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """Return the value's producer, if it is the standard op of that name."""
    node = None if value is None else value.producer()
    return node if node is not None and is_op(node, op_type) else None


def is_op(node: ir.Node, op_type: str) -> bool:
    """Tell whether the node is the standard op of that name."""
    return node.op_type == op_type and node.domain in {"", "ai.onnx"}


def only_use(value: ir.Value, op_type: str) -> ir.Node | None:
    """Return the value's only user, if it is that standard op."""
    users = [usage.node for usage in value.uses()]
    return users[0] if len(users) == 1 and is_op(users[0], op_type) else None


def static_size(value: ir.Value | None, axis: int) -> int | None:
    """Return the size of an axis, if the shape has it."""
    if value is None or value.shape is None or not -len(value.shape) <= axis < len(value.shape):
        return None
    size = value.shape[axis]
    return size if isinstance(size, int) else None


def rank(value: ir.Value) -> int | None:
    """Return how many axes the value has, if that is known."""
    return None if value.shape is None else len(value.shape)


def int_attribute(node: ir.Node, name: str, default: int) -> int:
    """Read an integer attribute or its default."""
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()


def slice_of(value: ir.Value | None) -> tuple[ir.Value, int, int, int] | None:
    """Match `(data, axis, start, end)` of a Slice on one axis with constant bounds and step 1.

    The axis counts from the front where the rank is known, the end is clipped to a known size.
    """
    node = made_by(value, "Slice")
    if node is None or len(node.inputs) < 4 or node.inputs[0] is None:  # noqa: PLR2004 (axes)
        return None
    data = node.inputs[0]
    starts, ends, axes = (integers(item) for item in node.inputs[1:4])
    step = 1 if len(node.inputs) == 4 else scalar(node.inputs[4])  # noqa: PLR2004
    if starts is None or ends is None or axes is None or len(axes) != 1 or step != 1:
        return None
    axis, start, end = axes[0], starts[0], ends[0]
    size = static_size(data, axis)
    if size is not None:
        start, end = (item + size if item < 0 else min(item, size) for item in (start, end))
    if axis < 0 and data.shape is not None:
        axis += len(data.shape)
    return data, axis, start, end
