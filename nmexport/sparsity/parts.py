"""Names of the parts of a linear that can be learned; see `nmexport.sparsity.learned`."""

from __future__ import annotations

from typing import Literal

Part = Literal["shift", "input_scale", "output_scale", "bias", "low_rank"]
PARTS: tuple[Part, ...] = ("shift", "input_scale", "output_scale", "bias", "low_rank")

RANK = 32
"""Default rank of the low-rank compensation."""
