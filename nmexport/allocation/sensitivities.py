"""How far each choice moves the predictions, on its own: trial after trial, resumable."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from nmexport.allocation.probe import Movement

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from nmexport.allocation.choice import Choice
    from nmexport.allocation.probe import Probe
    from nmexport.allocation.sparse_input import SparseInput
    from nmexport.calibration.checkpoint import Checkpoint
    from nmexport.calibration.sites import Site
    from nmexport.progress import Progress


def measure_alone(
    probe: Probe,
    trials: Mapping[Site, Mapping[Choice, SparseInput]],
    *,
    progress: Progress,
    checkpoint: Checkpoint | None = None,
) -> dict[Site, dict[Choice, Movement]]:
    """Make one site sparse at a time.

    Args:
        probe: The dense model on its windows.
        trials: What to try, by site, in model order.
        progress: Counts sites.
        checkpoint: Where to go on from and save to, a site at a time.
    """
    sites = sorted(trials, key=lambda site: site.layer)
    done = _restored(sites, trials, checkpoint)
    left = sites[len(done) :]
    for site in progress.track(left, label="fold: trials of sites", total=len(left)):
        probe.start_at(site.layer)
        done.append({choice: probe.measure({site: one}) for choice, one in trials[site].items()})
        if checkpoint is not None:
            checkpoint.save(_tensors(done), {"done": len(done)})
    probe.start_at(0)
    return {site: found for site, found in zip(sites, done, strict=True) if site in trials}


def _tensors(done: Sequence[Mapping[Choice, Movement]]) -> dict[str, torch.Tensor]:
    """`[choices, 2, windows]` float64 for every site that was tried."""
    return {
        str(place): torch.tensor([[one.kl, one.nll] for one in found.values()], dtype=torch.float64)
        for place, found in enumerate(done)
        if found
    }


def _restored(
    sites: Sequence[Site],
    trials: Mapping[Site, Mapping[Choice, SparseInput]],
    checkpoint: Checkpoint | None,
) -> list[dict[Choice, Movement]]:
    found = None if checkpoint is None else checkpoint.load()
    if found is None:
        return []
    tensors, state = found
    done: list[dict[Choice, Movement]] = []
    for place, site in enumerate(sites[: int(state["done"])]):
        rows = tensors[str(place)].tolist() if trials[site] else []
        done.append(
            {
                choice: Movement(kl=tuple(kl), nll=tuple(nll))
                for choice, (kl, nll) in zip(trials[site], rows, strict=True)
            }
        )
    return done
