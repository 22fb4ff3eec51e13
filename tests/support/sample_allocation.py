"""An allocation with figures as a real model gives them, made up."""

from __future__ import annotations

from nmexport.sparsity.pattern import NMPattern
from nmexport.store.allocation import (
    DENSE,
    Allocation,
    Built,
    Candidate,
    Choice,
    CostConstants,
    FrontPoint,
    LedgerRow,
    Protocol,
)

SITES = {
    "self_attn": (("q_proj", "k_proj", "v_proj"), ("o_proj",)),
    "mlp": (("gate_proj", "up_proj"), ("down_proj",)),
}
CHOICES = (
    DENSE,
    *(Choice(pattern=NMPattern(kept, 16), criterion="act") for kept in (12, 8, 4)),
)
_SAVED = (0.0, 0.25, 0.5, 0.75)


def sample_allocation(layers: int = 6) -> Allocation:
    """Every fourth site gets another choice."""
    rows = [
        _row(f"model.layers.{layer}.{block}.", site, place=layer + index)
        for layer in range(layers)
        for block, sites in SITES.items()
        for index, site in enumerate(sites)
    ]
    ledger = tuple(one for site in rows for one in site)
    return Allocation(
        choices={row.name: row.choice for row in ledger},
        budget={"max_perplexity_ratio": 1.15, "max_bytes": 0.7},
        bytes_saved=0.375,
        decode_speedup=1.31,
        kl=0.1234,
        perplexity_ratio=1.1472,
        price=0.0061,
        front=(
            *(_point("uniform", one.label, saved, 3 * saved**3)
              for one, saved in zip(CHOICES[1:], _SAVED[1:], strict=True)),
            *(_point("front", f"{percent} %", percent / 100, (percent / 100) ** 3)
              for percent in range(10, 55, 5)),
            _point("chosen", "chosen", 0.375, 0.1234),
        ),
        ledger=ledger,
        budget_used=0.985,
        built=Built(kl=0.0456, perplexity_ratio=1.0512, budget_used=0.357),
        protocol=Protocol(
            words="Measured so and so.",
            sites=4 * layers,
            windows=4,
            held_out_windows=4,
            length=256,
            prompt=0,
            joint_over_sum=1.1,
            cost=CostConstants(
                bytes_per_second=35e9,
                dense_overhead_seconds=3e-6,
                sparse_overhead_seconds=12e-6,
                element_bytes=4,
            ),
        ),
    )  # fmt: skip


def _point(kind: str, label: str, saved: float, kl: float) -> FrontPoint:
    return FrontPoint(
        kind=kind,  # type: ignore[arg-type]
        label=label,
        bytes_saved=saved,
        decode_speedup=1 + saved,
        summed_kl=0.9 * kl,
        kl=kl,
        perplexity_ratio=1 + 0.9 * kl,
        linears={"dense": 20, "8:16 act": 22},
    )


def _row(prefix: str, site: tuple[str, ...], *, place: int) -> list[LedgerRow]:
    names = tuple(prefix + one for one in site)
    offered = tuple(
        Candidate(
            choice=one,
            kl=0.04 * saved**2,
            kl_stderr=None if one.pattern == NMPattern(12, 16) else 0.001,
            relative_error=0.4 * saved,
            bytes_saved=saved,
        )
        for one, saved in zip(CHOICES, _SAVED, strict=True)
    )
    return [
        LedgerRow(
            name=name,
            site=names,
            weight_bytes=576 * 576 * 4,
            choice=CHOICES[place % 4],
            why="Going on to 4:16 act would cost 0.01 nats; elsewhere a percent costs 0.0061.",
            candidates=offered,
            mitigation_errors={"none": 0.31, "var": 0.29, "s-var": None, "as built": 0.24},
            mitigation_pattern=NMPattern(8, 16),
        )
        for name in names
    ]
