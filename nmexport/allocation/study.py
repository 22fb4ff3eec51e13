"""What was measured of one model's sites, and joint models run on top of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from nmexport.allocation.additivity import Additivity
from nmexport.allocation.candidates import sparse_inputs
from nmexport.allocation.choice import DENSE, Choice, FrontPoint
from nmexport.allocation.programme import Option, sums

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Literal

    from nmexport.allocation.candidates import Variants
    from nmexport.allocation.cost import CostModel
    from nmexport.allocation.probe import Movement, Probe
    from nmexport.calibration.sites import Site


@dataclass
class Study:
    """Sites with their options, and the joint models that have been tried."""

    sites: list[Site]
    choices: list[list[Choice]]
    """Of each site; dense first."""
    options: list[list[Option]]
    """The same, in figures."""
    variants: Variants
    cost: CostModel
    probe: Probe
    """Held-out windows that joint models are measured on."""
    kl: Additivity = field(default_factory=Additivity)
    """From summed to joint divergence."""
    nll: Additivity = field(default_factory=Additivity)
    """From summed divergence to the logarithm of the perplexity ratio."""
    _tried: dict[tuple[int, ...], Movement] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        variants: Variants,
        estimates: Mapping[Site, Mapping[Choice, float]],
        *,
        cost: CostModel,
        probe: Probe,
        prefill_weight: float,
    ) -> Study:
        """Put figures to the choices.

        Args:
            variants: Sparse choices of each site.
            estimates: What each costs alone, in nats a token.
            cost: Bytes and seconds.
            probe: Held-out windows.
            prefill_weight: Worth of a prompt's multiply-adds, in decode time.
        """

        def option(site: Site, choice: Choice) -> Option:
            seconds, whole = cost.seconds(site, choice), cost.seconds(site, DENSE)
            return Option(
                kl=0.0 if choice == DENSE else estimates[site][choice],
                bytes=cost.read_bytes(site, choice),
                seconds=seconds,
                worth=seconds + prefill_weight * choice.prefill_density * whole,
            )

        table = {}
        for site, of_site in variants.items():
            dense = option(site, DENSE)
            rest = {one: option(site, one) for one in of_site}
            # What neither reads less nor is worth more than dense can only cost.
            table[site] = {DENSE: dense} | {
                one: figures
                for one, figures in rest.items()
                if figures.bytes < dense.bytes or figures.worth < dense.worth
            }
        choices = [list(row) for row in table.values()]
        options = [list(row.values()) for row in table.values()]
        return cls(list(table), choices, options, variants, cost, probe)

    def run(self, picked: Sequence[int]) -> Movement:
        """The joint model of one option for every site, on the held-out windows."""
        key = tuple(picked)
        if key not in self._tried:
            chosen = self.chosen(picked)
            moved = self.probe.measure(
                {
                    site: sparse_inputs(site, {one: self.variants[site][one]})[one]
                    for site, one in chosen.items()
                    if one != DENSE
                }
            )
            self._tried[key] = moved
            summed = sums(self.options, picked).kl
            if summed > 0:
                self.kl.add(summed, moved.kl_mean)
                self.nll.add(summed, moved.nll_mean)
        return self._tried[key]

    def chosen(self, picked: Sequence[int]) -> dict[Site, Choice]:
        """Options as choices."""
        rows = zip(self.sites, self.choices, picked, strict=True)
        return {site: choices[index] for site, choices, index in rows}

    def total(self, picked: Sequence[int]) -> Option:
        """The sums over all sites."""
        return sums(self.options, picked)

    @property
    def dense(self) -> Option:
        """The sums of the dense model."""
        return self.total([0] * len(self.options))

    def bytes_saved(self, picked: Sequence[int]) -> float:
        """Share of the targeted linears' bytes that a decoded token no longer reads."""
        return 1 - self.total(picked).bytes / self.dense.bytes

    def speedup(self, picked: Sequence[int]) -> float:
        """Of a whole decoded token, by the cost model."""
        other = self.cost.other_seconds
        return (self.dense.seconds + other) / (self.total(picked).seconds + other)

    def seconds_at(self, speedup: float) -> float:
        """What the targeted linears may take for a speed-up of the whole token."""
        other = self.cost.other_seconds
        return (self.dense.seconds + other) / speedup - other

    def point(
        self, kind: Literal["front", "uniform", "chosen"], label: str, picked: Sequence[int]
    ) -> FrontPoint:
        """An allocation as a row of the front."""
        moved = self.run(picked)
        return FrontPoint(
            kind=kind,
            label=label,
            bytes_saved=self.bytes_saved(picked),
            decode_speedup=self.speedup(picked),
            summed_kl=self.total(picked).kl,
            kl=moved.kl_mean,
            perplexity_ratio=math.exp(moved.nll_mean),
            linears=self._counted(picked),
        )

    def _counted(self, picked: Sequence[int]) -> dict[str, int]:
        """Linears by the label of their choice, densest first."""
        counts: dict[str, int] = {}
        chosen = sorted(self.chosen(picked).items(), key=lambda pair: -pair[1].decode_density)
        for site, choice in chosen:
            counts[choice.label] = counts.get(choice.label, 0) + len(site.names)
        return counts
