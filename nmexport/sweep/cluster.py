"""Runs the jobs of a sweep: here one after the other, or on a Ray cluster."""

from __future__ import annotations

import sys
import warnings
from typing import TYPE_CHECKING, Any, Protocol

from nmexport.errors import EnvironmentFault, UserError
from nmexport.progress import on_stream
from nmexport.sweep import measure
from nmexport.sweep.row import Row

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from nmexport.progress import Progress
    from nmexport.sweep.plan import Job

Rows = list[Row]


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
            measure.check(job)
        for job in jobs:
            yield job, measure.run(job, self._progress)


class RayCluster:
    """One task a model; the sweep's folder must be one that every node sees."""

    def __init__(self, address: str, *, cpus: int | None = None, gpus: float | None = None) -> None:
        """Connect when jobs are run.

        Args:
            address: As `ray.init` takes it: `auto`, `HOST:PORT`, `ray://HOST:PORT`, or `local`
                for a cluster that lives as long as the sweep.
            cpus: CPUs that a task reserves and computes with; None see `reservation`.
            gpus: GPUs that it reserves and sees; None likewise.
        """
        self._address = address
        self._cpus, self._gpus = cpus, gpus

    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Rows]]:
        """Yield each job with its rows as it ends.

        Raises:
            EnvironmentFault: if Ray is not installed, there is no cluster at the address, or none
                of its nodes has what a task reserves.
            UserError: whatever ended a task.
        """
        try:
            import ray
        except ImportError as error:
            raise EnvironmentFault(
                "--ray needs Ray, which is not installed.", fix="pip install 'nmexport[ray]'"
            ) from error
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # its tips are for who writes programs on it
                ray.init(address=self._address, include_dashboard=False, configure_logging=False)
        except (ConnectionError, ValueError, RuntimeError, OSError) as error:
            raise EnvironmentFault(
                f"There is no Ray cluster at {self._address}: {error}",
                allowed="auto, HOST:PORT, ray://HOST:PORT, local",
                fix="start one with `ray start --head`, or leave --ray out",
            ) from error
        try:
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            reserved = reservation(nodes, cpus=self._cpus, gpus=self._gpus)
            task = ray.remote(max_retries=1, **reserved)(_on_a_node)
            waiting = {task.remote(job): job for job in jobs}
            while waiting:
                done, _ = ray.wait(list(waiting), num_returns=1)
                yield waiting.pop(done[0]), _outcome(ray, done[0])
        finally:
            ray.shutdown()


def reservation(
    nodes: Sequence[Mapping[str, float]], *, cpus: int | None = None, gpus: float | None = None
) -> dict[str, float]:
    """Return what a task reserves, so that it gets a GPU and no two crowd a node.

    By default a GPU where the cluster has any; and of the CPUs of the largest node with
    enough of them an equal part for each task that its GPUs have room for, without GPUs all.

    Args:
        nodes: The resources of each node, as Ray names them.
        cpus: CPUs to reserve, where given.
        gpus: GPUs, if said; a part of one lets tasks share it.

    Raises:
        EnvironmentFault: if no node has that much: Ray would wait for one forever.
    """
    has_gpus = any(node.get("GPU", 0) >= 1 for node in nodes)
    wanted = (1.0 if has_gpus else 0.0) if gpus is None else gpus
    able = [node for node in nodes if node.get("GPU", 0) >= wanted and node.get("CPU", 0) >= 1]
    largest = max((node["CPU"] for node in able), default=0)
    if largest < (cpus or 1):
        raise EnvironmentFault(
            f"No node of the cluster has {cpus or 1} CPUs and {wanted:g} GPUs.",
            allowed="; ".join(
                f"{node.get('CPU', 0):g} CPUs, {node.get('GPU', 0):g} GPUs" for node in nodes
            ),
            fix="ask for less with --ray-cpus and --ray-gpus",
        )
    if cpus is None:
        tasks = max(node.get("GPU", 0) // wanted for node in able) if wanted else 1
        cpus = max(1, int(largest // max(tasks, 1)))
    return {"num_cpus": cpus, "num_gpus": wanted}


def _outcome(ray: Any, task: Any) -> Rows:
    """Return a task's rows, or raise what it raised, which Ray wraps."""
    try:
        rows: Rows = ray.get(task)
    except Exception as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, UserError):
            raise cause from None
        raise
    return rows


def _on_a_node(job: Job) -> Rows:
    """Run a job on a worker; its stderr reaches the driver."""
    measure.check(job)
    return measure.run(job, on_stream(sys.stderr))
