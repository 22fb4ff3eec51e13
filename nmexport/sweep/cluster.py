"""Where the jobs of a sweep run: here one after the other, or on a Ray cluster."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Protocol

from nmexport.errors import EnvironmentFault
from nmexport.progress import on_stream
from nmexport.sweep import measure

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from nmexport.progress import Progress
    from nmexport.sweep.measure import Job

Rows = list[dict[str, Any]]


class Cluster(Protocol):
    """Runs jobs."""

    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Rows]]:
        """Yield each job with its rows as it ends, in any order."""
        ...


class ThisMachine:
    """One job after the other, in this process."""

    def __init__(self, progress: Progress) -> None:
        """Report to `progress`."""
        self._progress = progress

    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Rows]]:
        """Yield each job with its rows, in order."""
        for job in jobs:
            yield job, measure.run(job, self._progress)


class RayCluster:
    """One task a model; the sweep's folder must be one that every node sees."""

    def __init__(self, address: str) -> None:
        """Connect when jobs are run.

        Args:
            address: As `ray.init` takes it: `auto`, `HOST:PORT`, `ray://HOST:PORT`, or `local`
                for a cluster that lives as long as the sweep.
        """
        self._address = address

    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Rows]]:
        """Yield each job with its rows as it ends.

        Raises:
            EnvironmentFault: if Ray is not installed, or there is no cluster at the address.
        """
        try:
            import ray
        except ImportError as error:
            raise EnvironmentFault(
                "--ray needs Ray, which is not installed.", fix="pip install 'nmexport[ray]'"
            ) from error
        try:
            ray.init(address=self._address, include_dashboard=False, configure_logging=False)
        except (ConnectionError, ValueError, RuntimeError, OSError) as error:
            raise EnvironmentFault(
                f"There is no Ray cluster at {self._address}: {error}",
                allowed="auto, HOST:PORT, ray://HOST:PORT, local",
                fix="start one with `ray start --head`, or leave --ray out",
            ) from error
        try:
            task = ray.remote(max_retries=1)(_on_a_node)
            waiting = {task.remote(job): job for job in jobs}
            while waiting:
                done, _ = ray.wait(list(waiting), num_returns=1)
                yield waiting.pop(done[0]), ray.get(done[0])
        finally:
            ray.shutdown()


def _on_a_node(job: Job) -> Rows:
    """What a worker runs; its stderr reaches the driver."""
    return measure.run(job, on_stream(sys.stderr))
