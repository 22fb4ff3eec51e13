"""What can be learned of a linear, by name; see `nmexport.sparsity.learned`."""

from __future__ import annotations

from typing import Literal

Part = Literal["shift", "input_scale", "output_scale", "bias", "low_rank"]
PARTS: tuple[Part, ...] = ("shift", "input_scale", "output_scale", "bias", "low_rank")

RANK = 32
"""Of the low-rank compensation, where nobody says otherwise."""
