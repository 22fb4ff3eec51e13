"""The report's part on allocation: the front, what was chosen, and the ledger, as rows of text."""

from __future__ import annotations

from typing import Any

_LIMITS = {
    "max_perplexity_ratio": "perplexity ratio at most {:g}",
    "max_kl": "KL at most {:g} nats",
    "min_speedup": "decode at least {:g}x as fast",
    "max_bytes": "at most {:.0%} of the weight bytes read",
}
_DENSE = "dense"


def label(choice: dict[str, Any]) -> str:
    """A choice in words: `dense`, `8:16 act`, `8:16 act, decode only`."""
    if choice["pattern"] is None:
        return _DENSE
    words = f"{choice['pattern']} {choice['criterion']}"
    return words if choice["phase"] == "all" else f"{words}, {choice['phase']} only"


def budget(allocation: dict[str, Any]) -> str:
    """Return the budget asked for, in words."""
    return ", ".join(_LIMITS[name].format(value) for name, value in allocation["budget"].items())


def built(allocation: dict[str, Any]) -> str | None:
    """Return the measured result of the choice once built, in words; None if not measured."""
    result = allocation.get("built")
    if result is None:
        return None
    words = (
        f"As built, all constants folded: perplexity ratio {result['perplexity_ratio']:.3f} and "
        f"mean KL {result['kl']:.3f} nats on the same text"
    )
    used = result["budget_used"]
    if used is None:
        return f"{words}."
    share = f"{words}, {used:.0%} of the budget of accuracy"
    return f"{share}." if used <= 1 else f"{share}: the budget is exceeded."


def mix(counts: dict[str, int]) -> str:
    """`60 dense, 150 at 8:16 act`."""
    return ", ".join(
        f"{count} {name}" if name == _DENSE else f"{count} at {name}"
        for name, count in counts.items()
    )


def chosen_mix(allocation: dict[str, Any]) -> str:
    """How many linears got what."""
    counts: dict[str, int] = {}
    for row in sorted(allocation["ledger"], key=lambda row: -_share(row)):
        name = label(row["choice"])
        counts[name] = counts.get(name, 0) + 1
    return mix(counts)


def remarks(allocation: dict[str, Any]) -> str | None:
    """Return remarks on the figures."""
    said = [built(allocation), allocation.get("remark")]
    return " ".join(words for words in said if words) or None


def rows(allocation: dict[str, Any] | None) -> dict[str, Any] | None:
    """Everything that the pages print; None where there was no allocation."""
    if allocation is None:
        return None
    return {
        "budget": budget(allocation),
        "built": remarks(allocation),
        "front": front_rows(allocation),
        "columns": columns(allocation),
        "mitigations": mitigations(allocation),
        "sites": site_rows(allocation),
        "linears": linear_rows(allocation),
    }


def front_rows(allocation: dict[str, Any]) -> list[dict[str, Any]]:
    """The front and the uniform choices, in order of bytes saved; the chosen one marked."""
    ordered = sorted(allocation["front"], key=lambda point: point["bytes_saved"])
    names = {"front": "front", "uniform": "all alike", "chosen": "chosen"}
    return [
        {**point, "name": names[point["kind"]], "mix": mix(point["linears"])} for point in ordered
    ]


def columns(allocation: dict[str, Any]) -> list[str]:
    """Labels of all sparse candidates of any linear, densest first."""
    saved: dict[str, float] = {}
    for row in allocation["ledger"]:
        for candidate in row["candidates"]:
            saved.setdefault(label(candidate["choice"]), candidate["bytes_saved"])
    saved.pop(_DENSE, None)
    return sorted(saved, key=lambda name: saved[name])


def mitigations(allocation: dict[str, Any]) -> list[str]:
    """Names of the mitigations whose errors the ledger holds."""
    return list(
        dict.fromkeys(name for row in allocation["ledger"] for name in row["mitigation_errors"])
    )


def site_rows(allocation: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each site: its linears, choice, the divergence of each candidate, and why."""
    wanted = columns(allocation)
    rows, seen = [], set()
    for row in allocation["ledger"]:
        site = tuple(row["site"])
        if site in seen:
            continue
        seen.add(site)
        by_label = {label(candidate["choice"]): candidate for candidate in row["candidates"]}
        rows.append(
            {
                "names": _join(site),
                "choice": label(row["choice"]),
                "why": row["why"],
                "kl": [_candidate(by_label.get(name), row) for name in wanted],
            }
        )
    return rows


def linear_rows(allocation: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each linear: its error with each candidate and with each mitigation."""
    wanted, mended = columns(allocation), mitigations(allocation)
    rows = []
    for row in allocation["ledger"]:
        by_label = {
            label(candidate["choice"]): candidate["relative_error"]
            for candidate in row["candidates"]
        }
        rows.append(
            {
                "name": row["name"],
                "choice": label(row["choice"]),
                "errors": [by_label.get(name) for name in wanted],
                "pattern": row["mitigation_pattern"],
                "mitigations": [row["mitigation_errors"].get(name) for name in mended],
            }
        )
    return rows


def read_shares(allocation: dict[str, Any]) -> list[dict[str, Any]]:
    """Share of weight rows that a decoded token reads, by site: for a plot."""
    sites = {tuple(row["site"]): row for row in allocation["ledger"]}
    return [{"name": _label_site(site), "share": _share(row)} for site, row in sites.items()]


def _label_site(site: tuple[str, ...]) -> str:
    """`model.layers.0.mlp.gate+up`: what a plot tells layer and kind from."""
    parent = site[0].rpartition(".")[0]
    kinds = [name.rpartition(".")[2].removesuffix("_proj") for name in site]
    return f"{parent}.{'+'.join(kinds)}"


def _share(row: dict[str, Any]) -> float:
    """Return the share of its weight rows that a decoded token reads."""
    choice = row["choice"]
    if choice["pattern"] is None or choice["phase"] == "prefill":
        return 1.0
    kept, _, group = choice["pattern"].partition(":")
    return int(kept) / int(group)


def _candidate(candidate: dict[str, Any] | None, row: dict[str, Any]) -> dict[str, Any]:
    if candidate is None:
        return {"kl": None, "measured": False, "chosen": False}
    return {
        "kl": 1000 * candidate["kl"],
        "measured": candidate["kl_stderr"] is not None,
        "chosen": label(candidate["choice"]) == label(row["choice"]),
    }


def _join(names: tuple[str, ...]) -> str:
    """`model.layers.0.self_attn.{q_proj, k_proj, v_proj}`, or the names as they are."""
    parents = {name.rpartition(".")[0] for name in names}
    if len(names) == 1 or len(parents) > 1:
        return ", ".join(names)
    return f"{parents.pop()}.{{{', '.join(name.rpartition('.')[2] for name in names)}}}"
