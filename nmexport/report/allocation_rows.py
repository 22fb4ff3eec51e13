"""The report's part on allocation: the front, what was chosen, and the ledger, as rows of text."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nmexport.store.allocation import Allocation, Candidate, FrontPoint, LedgerRow

_LIMITS = {
    "max_perplexity_ratio": "perplexity ratio at most {:g}",
    "max_kl": "KL at most {:g} nats",
    "min_speedup": "decode at least {:g}x as fast",
    "max_bytes": "at most {:.0%} of the weight bytes read",
}
_DENSE = "dense"
_KINDS = {
    "front": "front",
    "uniform": "all alike",
    "chosen": "chosen",
    "integers": "quantisation alone",
    "floats": "sparsity alone",
}


@dataclass(frozen=True, kw_only=True)
class FrontRow:
    """A point of the front."""

    kind: str
    name: str
    bytes_saved: float
    perplexity_ratio: float
    kl: float
    summed_kl: float
    decode_speedup: float
    mix: str
    float_bytes: float | None
    """Bytes read, as a share of what the dense model reads in floats; None where weights are so."""
    float_speedup: float | None
    """Speed, times that of the dense model in floats, predicted."""


@dataclass(frozen=True, kw_only=True)
class SiteCost:
    """A candidate's divergence at a site, in thousandths of a nat; None where it does not fit."""

    kl: float | None = None
    measured: bool = False
    chosen: bool = False


@dataclass(frozen=True, kw_only=True)
class SiteRow:
    """A site: its linears, its choice, each candidate's cost, and why."""

    names: str
    choice: str
    why: str
    kl: list[SiteCost]


@dataclass(frozen=True, kw_only=True)
class LinearRow:
    """A linear: its error with each candidate and with each mitigation."""

    name: str
    choice: str
    errors: list[float | None]
    pattern: str
    mitigations: list[float | None]


@dataclass(frozen=True, kw_only=True)
class ReadShare:
    """Share of a site's weight bytes that a decoded token reads."""

    name: str
    share: float


@dataclass(frozen=True, kw_only=True)
class AllocationRows:
    """Everything that the pages print."""

    budget: str
    built: str | None
    in_integers: bool
    """Whether the front compares quantisation, sparsity, and both."""
    front: list[FrontRow]
    columns: list[str]
    mitigations: list[str]
    sites: list[SiteRow]
    linears: list[LinearRow]


def rows(allocation: Allocation | None) -> AllocationRows | None:
    """Lay out everything that the pages print; None where there was no allocation."""
    if allocation is None:
        return None
    return AllocationRows(
        budget=budget(allocation),
        built=remarks(allocation),
        in_integers=in_integers(allocation),
        front=front_rows(allocation),
        columns=columns(allocation),
        mitigations=mitigations(allocation),
        sites=site_rows(allocation),
        linears=linear_rows(allocation),
    )


def in_integers(allocation: Allocation) -> bool:
    """Tell whether weights are integers, by what the front was measured on."""
    return any(point.kind == "integers" for point in allocation.front)


def budget(allocation: Allocation) -> str:
    """Say what was asked for."""
    return ", ".join(_LIMITS[name].format(value) for name, value in allocation.budget.items())


def built(allocation: Allocation) -> str | None:
    """Say what the choice came to once it was built; None where that was not measured."""
    figures = allocation.built
    if figures is None:
        return None
    words = (
        f"As built, all constants folded: perplexity ratio {figures.perplexity_ratio:.3f} and "
        f"mean KL {figures.kl:.3f} nats on the same text"
    )
    used = figures.budget_used
    if used is None:
        return f"{words}."
    share = f"{words}, {used:.0%} of the budget of accuracy"
    return f"{share}." if used <= 1 else f"{share}: the budget is exceeded."


def remarks(allocation: Allocation) -> str | None:
    """Say what there is to say besides the figures."""
    return " ".join(words for words in (built(allocation), allocation.remark) if words) or None


def mix(counts: Mapping[str, int]) -> str:
    """Write `60 dense, 150 at 8:16 act`."""
    return ", ".join(
        f"{count} {name}" if name.startswith(_DENSE) else f"{count} at {name}"
        for name, count in counts.items()
    )


def chosen_mix(allocation: Allocation) -> str:
    """Count the linears by their choice, densest first."""
    ledger = sorted(allocation.ledger, key=lambda row: -row.choice.decode_density)
    return mix(Counter(row.choice.label for row in ledger))


def front_rows(allocation: Allocation) -> list[FrontRow]:
    """Lay out the front and the uniform choices, the most bytes read first."""
    compares = in_integers(allocation)
    return [
        FrontRow(
            kind=point.kind,
            name="both" if compares and point.kind == "front" else _KINDS[point.kind],
            bytes_saved=point.bytes_saved,
            perplexity_ratio=point.perplexity_ratio,
            kl=point.kl,
            summed_kl=point.summed_kl,
            decode_speedup=point.decode_speedup,
            mix=mix(point.linears),
            float_bytes=point.float_bytes,
            float_speedup=point.float_speedup,
        )
        for point in sorted(allocation.front, key=_bytes_read, reverse=True)
    ]


def _bytes_read(point: FrontPoint) -> float:
    return 1 - point.bytes_saved if point.float_bytes is None else point.float_bytes


def columns(allocation: Allocation) -> list[str]:
    """List the labels of all candidates of any linear but the first, the most bytes first."""
    saved: dict[str, float] = {}
    for row in allocation.ledger:
        for candidate in row.candidates[1:]:
            saved.setdefault(candidate.choice.label, candidate.bytes_saved)
    return sorted(saved, key=lambda name: saved[name])


def mitigations(allocation: Allocation) -> list[str]:
    """List the mitigations whose errors the ledger holds."""
    return list(dict.fromkeys(name for row in allocation.ledger for name in row.mitigation_errors))


def site_rows(allocation: Allocation) -> list[SiteRow]:
    """Lay out one row for each site."""
    labels = columns(allocation)
    by_label = {
        site: {candidate.choice.label: candidate for candidate in row.candidates}
        for site, row in _sites(allocation).items()
    }
    return [
        SiteRow(
            names=_join(site),
            choice=row.choice.label,
            why=row.why,
            kl=[_site_cost(by_label[site].get(label), row) for label in labels],
        )
        for site, row in _sites(allocation).items()
    ]


def linear_rows(allocation: Allocation) -> list[LinearRow]:
    """Lay out one row for each linear."""
    labels, names = columns(allocation), mitigations(allocation)
    rows = []
    for row in allocation.ledger:
        errors = {candidate.choice.label: candidate.relative_error for candidate in row.candidates}
        rows.append(
            LinearRow(
                name=row.name,
                choice=row.choice.label,
                errors=[errors.get(label) for label in labels],
                pattern=str(row.mitigation_pattern),
                mitigations=[row.mitigation_errors.get(name) for name in names],
            )
        )
    return rows


def read_shares(allocation: Allocation) -> list[ReadShare]:
    """List the share of weight bytes that a decoded token reads, by site: for a plot."""
    return [
        ReadShare(name=_plot_name(site), share=_share_read(row))
        for site, row in _sites(allocation).items()
    ]


def _share_read(row: LedgerRow) -> float:
    """Return the share of the dense weight's bytes, in the finest form, that a choice reads."""
    saved = {candidate.choice: candidate.bytes_saved for candidate in row.candidates}
    return 1 - saved[row.choice]


def _sites(allocation: Allocation) -> dict[tuple[str, ...], LedgerRow]:
    """Return the first row of each site."""
    sites: dict[tuple[str, ...], LedgerRow] = {}
    for row in allocation.ledger:
        sites.setdefault(row.site, row)
    return sites


def _plot_name(site: tuple[str, ...]) -> str:
    """Write `model.layers.0.mlp.gate+up`, from which a plot reads layer and kind."""
    parent = site[0].rpartition(".")[0]
    kinds = [name.rpartition(".")[2].removesuffix("_proj") for name in site]
    return f"{parent}.{'+'.join(kinds)}"


def _site_cost(candidate: Candidate | None, row: LedgerRow) -> SiteCost:
    if candidate is None:
        return SiteCost()
    return SiteCost(
        kl=1000 * candidate.kl,
        measured=candidate.kl_stderr is not None,
        chosen=candidate.choice == row.choice,
    )


def _join(names: tuple[str, ...]) -> str:
    """Write `model.layers.0.self_attn.{q_proj, k_proj, v_proj}`, or the names as they are."""
    parents = {name.rpartition(".")[0] for name in names}
    if len(names) == 1 or len(parents) > 1:
        return ", ".join(names)
    return f"{parents.pop()}.{{{', '.join(name.rpartition('.')[2] for name in names)}}}"
