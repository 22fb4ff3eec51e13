"""How long a decoded token takes, from the bytes of weight it reads and the ops it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nmexport.sparsity.quantisation import scale_groups

if TYPE_CHECKING:
    from nmexport.allocation.choice import Choice
    from nmexport.calibration.sites import Site

_SCALE_BYTES = 4  # float32, beside weights of one byte


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """Batch 1: each weight row that a token keeps is read once from memory."""

    bytes_per_second: float
    """At which one decoded token's weights stream in."""
    dense_overhead_seconds: float
    """Of a dense product, beyond reading its weight; linears that share an input are one."""
    sparse_overhead_seconds: float
    """Of a sparse one: the same, and finding the rows."""
    element_bytes: int
    """Of a weight of a linear that stays dense."""
    sparse_weights: str = "float"
    """How linears that become sparse are stored: see `nmexport.sparsity.quantisation.FORMS`."""
    other_bytes: int = 0
    """Of weights outside the targeted linears that every decoded token reads."""
    rest_seconds: float = 0.0
    """Of a decoded token in what is no product with weights: attention, norms, dispatch."""

    def weight_bytes(self, site: Site) -> int:
        """All of a site's weights, dense."""
        return site.weights * self.element_bytes

    def read_bytes(self, site: Site, choice: Choice) -> float:
        """What a decoded token reads of them: rows it keeps, and every scale."""
        if choice.nm is None:
            return self.weight_bytes(site)
        groups = scale_groups(self.sparse_weights, site.in_features, name=site.names[0])
        if groups is None:
            return self.weight_bytes(site) * choice.decode_density
        scales = groups * sum(site.out_features) * _SCALE_BYTES
        return site.weights * choice.decode_density + scales

    def seconds(self, site: Site, choice: Choice) -> float:
        """A decoded token's time in a site."""
        sparse = choice.decode_density < 1
        overhead = self.sparse_overhead_seconds if sparse else self.dense_overhead_seconds
        return self.read_bytes(site, choice) / self.bytes_per_second + overhead

    @property
    def other_seconds(self) -> float:
        """A decoded token's time outside of the targeted linears."""
        return self.other_bytes / self.bytes_per_second + self.rest_seconds
