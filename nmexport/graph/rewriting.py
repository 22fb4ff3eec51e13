"""Replaces nodes by another."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

if TYPE_CHECKING:
    from collections.abc import Sequence


def take_place(
    graph: ir.Graph,
    old: list[ir.Node],
    new: ir.Node,
    outputs: Sequence[ir.Value],
    *,
    at: ir.Node | None = None,
) -> None:
    """Put `new` where the first of `old` is, or `at`; its outputs take names, shapes and uses."""
    fresh = list(new.outputs)[: len(outputs)]
    for before, after in zip(outputs, fresh, strict=True):
        after.name, after.shape, after.type = before.name, before.shape, before.type
    ir.convenience.replace_nodes_and_values(graph, at or old[0], old, [new], list(outputs), fresh)
