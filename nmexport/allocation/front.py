"""The Pareto front: what quantisation alone, sparsity alone, and both come to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nmexport.allocation.study import is_dense

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from nmexport.allocation.solve import Measure
    from nmexport.allocation.study import Study
    from nmexport.progress import Progress
    from nmexport.store.allocation import Choice, FrontPoint, PointKind


def uniform_points(study: Study, progress: Progress) -> list[FrontPoint]:
    """Run every choice given to all sites that it fits: what a build without a budget can have.

    A dense one is quantisation alone.
    """
    kinds = dict.fromkeys(
        pick for row in study.table.values() for pick in row if pick != study.finest
    )
    return [
        study.point(
            "integers" if choice.pattern is None else "uniform",
            choice.label,
            study.uniform(choice),
        )
        for choice in progress.track(kinds, label="fold: uniform choices", total=len(kinds))
    ]


def front_points(study: Study, shares: Sequence[float], progress: Progress) -> list[FrontPoint]:
    """Find the least divergence for each share of bytes saved; leave out shares out of reach.

    Shares are of the dense model's bytes in each form of weights. Where these are integers, what
    sparsity alone and quantisation alone come to stands beside.
    """
    marks = [(whole, share) for whole in study.whole for share in shares]
    points: dict[tuple[PointKind, str], FrontPoint] = {}
    for whole, share in progress.track(marks, label="fold: Pareto front", total=len(marks)):
        label = f"{100 * share:.0f} %"
        if study.is_mixed:
            label += f" of {whole.weights}"
        points |= {(one.kind, label): one for one in _points_at(study, whole, share, label)}
    return list(points.values())


def _points_at(study: Study, whole: Choice, share: float, label: str) -> Iterator[FrontPoint]:
    """Points of the front's lines where so many of the bytes of a form of weights are saved."""
    read = study.total(study.uniform(whole)).bytes
    limit: dict[Measure, float] = {"bytes": (1 - share) * read}
    both = study.solve(minimise="kl", limits=limit)
    if both is not None:
        yield study.point("front", label, both)
    if study.integers is None:
        return
    if study.is_mixed:
        plain = study.solve(minimise="kl", limits=limit, among=is_dense)
        if plain is not None:
            yield study.point("integers", label, plain)
    if whole == study.finest:
        sparse = study.solve(
            minimise="kl", limits=limit, among=lambda choice: choice.weights == whole.weights
        )
        if sparse is not None:
            yield study.float_point(label, sparse)
