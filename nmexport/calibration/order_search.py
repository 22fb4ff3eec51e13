"""Search for the channel order that brings N:M selection closest to unstructured selection.

Unstructured selection keeps a token's largest scores wherever they are; N:M selection keeps n of
every group. The two agree where every group happens to hold exactly n wanted channels, for every
token. So channels that are wanted together belong into different groups: what is minimised is the
variance over tokens of the number of wanted channels in a group, which is the sum of the
covariances within it. Exchanges of two channels between groups are made until none helps.

"Wanted" is a soft 0 to 1, `s^2 / (s^2 + t^2)` with t the token's threshold, because a channel just
below the threshold costs next to nothing.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from nmexport.calibration.forward_passes import _hooked, run_samples
from nmexport.sparsity.linear import selection, shift_of
from nmexport.sparsity.mask import scores_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from torch import nn
    from torch.utils.hooks import RemovableHandle

    from nmexport.models.layerwise import LayerwiseModel
    from nmexport.progress import Progress
    from nmexport.sparsity.linear import Behaviour, Constants
    from nmexport.sparsity.pattern import NMPattern

MAX_SWEEPS = 200
# Statistics are K x K a linear: those that fit in this are gathered in one pass over the samples.
WAVE_BYTES = 2 << 30
# Channels compared with each other in one sweep: beyond, a sweep takes as many at random.
SWEEP_CHANNELS = 2048
# Rows of a K x K matrix that are worked on at a time: what a step needs beside it stays small.
_ROWS = 2048
_LEAST_GAIN = 1e-5
_TINY = 1e-30


@dataclass
class Coactivation:
    """Which channels of one linear's input are wanted together: streaming, mergeable sums."""

    tokens: int
    total: torch.Tensor
    """`[K]` float64, sum of wanted."""
    products: torch.Tensor
    """`[K, K]` float32, sum of wanted_i * wanted_j."""

    @classmethod
    def empty(cls, channels: int) -> Coactivation:
        """Of no tokens."""
        total = torch.zeros(channels, dtype=torch.float64)
        return cls(0, total, torch.zeros(channels, channels))

    def update(self, scores: torch.Tensor, density: float) -> None:
        """Count tokens in: scores `[T, K]`, and the share of channels that is kept."""
        want = wanted(scores, density)
        self.tokens += want.shape[0]
        self.total += want.sum(dim=0, dtype=torch.float64).cpu()
        for rows in _rows(want.shape[1]):
            self.products[rows] += (want[:, rows].t() @ want).cpu()

    def merge(self, other: Coactivation) -> None:
        """Count in what another observer saw."""
        self.tokens += other.tokens
        self.total += other.total
        self.products += other.products

    def deviations(self) -> torch.Tensor:
        """`[K, K]` float32: summed over a group's pairs, the mean squared deviation of its count.

        That of the count from its share, so a group that always holds too many counts as well.
        """
        mean = self.total / self.tokens
        off = mean - mean.mean()
        found = torch.empty_like(self.products)
        for rows in _rows(mean.numel()):
            covariance = self.products[rows].double() / self.tokens - torch.outer(mean[rows], mean)
            found[rows] = covariance + torch.outer(off[rows], off)
        return found


@dataclass(frozen=True, kw_only=True)
class OrderSearch:
    """A found order, and how far it came."""

    order: torch.Tensor
    """`[K]` int32."""
    start: float
    """Mean squared deviation of a group's wanted count before the search, summed over groups."""
    found: float
    """The same after it."""
    sweeps: int


@dataclass(frozen=True, kw_only=True)
class GroupingDistance:
    """Score energy that selection drops, of a linear's input: squares of scores, summed."""

    total: float
    consecutive: float
    ordered: float
    unstructured: float

    def closed(self) -> float | None:
        """Share of the distance from consecutive groups to unstructured that the order closes."""
        gap = self.consecutive - self.unstructured
        return None if gap <= 0 else (self.consecutive - self.ordered) / gap

    def __add__(self, other: GroupingDistance) -> GroupingDistance:
        """Over both sets of tokens."""
        return GroupingDistance(
            total=self.total + other.total,
            consecutive=self.consecutive + other.consecutive,
            ordered=self.ordered + other.ordered,
            unstructured=self.unstructured + other.unstructured,
        )


def wanted(scores: torch.Tensor, density: float) -> torch.Tensor:
    """How much unstructured selection wants each channel: `[T, K]` scores -> `[T, K]` in 0..1."""
    squares = scores.float().square()
    threshold = _thresholds(squares, density)
    return squares / (squares + threshold).clamp_min(_TINY)


def search_order(
    coactivation: Coactivation, pattern: NMPattern, *, seed: int = 0, sweeps: int = MAX_SWEEPS
) -> OrderSearch:
    """Exchange channels between groups while that lowers the deviation of the groups' counts.

    Args:
        coactivation: Of the linear's input.
        pattern: N:M; K is a multiple of M.
        seed: Of the order that the search starts from.
        sweeps: Most sweeps; each makes the best exchanges that touch different groups.
    """
    cost = coactivation.deviations()
    channels = cost.shape[0]
    generator = torch.Generator().manual_seed(seed)
    group_of = torch.empty(channels, dtype=torch.int64)
    start = torch.randperm(channels, generator=generator)
    group_of[start] = torch.arange(channels) // pattern.m
    begun = _within(cost, group_of)
    done = 0
    for done in range(1, sweeps + 1):  # noqa: B007 - reported
        among = _compared(channels, generator)
        exchanges = _best_exchanges(cost, group_of, among)
        for one, other in exchanges:
            group_of[one], group_of[other] = group_of[other].clone(), group_of[one].clone()
        if not exchanges and among.numel() == channels:
            break
    order = torch.argsort(group_of, stable=True)
    return OrderSearch(
        order=order.to(torch.int32), start=begun, found=_within(cost, group_of), sweeps=done
    )


def grouping_distance(
    scores: torch.Tensor, pattern: NMPattern, channel_order: torch.Tensor | None
) -> GroupingDistance:
    """What N:M selection drops of a batch of scores `[T, K]`, beside unstructured selection."""
    squares = scores.double().square()
    dropped = squares * (squares <= _thresholds(squares, pattern.density))

    def under(order: torch.Tensor | None) -> float:
        keep = selection(scores, pattern, None, order)
        return float(squares.masked_fill(keep, 0.0).sum())

    return GroupingDistance(
        total=float(squares.sum()),
        consecutive=under(None),
        ordered=under(channel_order),
        unstructured=float(dropped.sum()),
    )


def search_orders(
    model: nn.Module,
    linears: Mapping[str, nn.Module],
    constants: Mapping[str, Constants],
    behaviours: Mapping[str, Behaviour],
    samples: torch.Tensor,
    *,
    progress: Progress,
    seed: int = 0,
    wave_bytes: int = WAVE_BYTES,
    layerwise: LayerwiseModel | None = None,
) -> dict[str, OrderSearch]:
    """Gather co-activations and search, for as many linears at once as fit in memory.

    Whatever the model computes is what is looked at: a dense model gives dense activations, one
    whose linears are already sparse gives those that it will really meet. Layer by layer, the
    linears of a layer are searched as soon as it is done, in one pass over the model.

    Args:
        model: A Hugging Face causal language model in evaluation mode.
        linears: Its modules to find orders for, by name.
        constants: Their score scale and shift, by name.
        behaviours: Their pattern and shift, by name.
        samples: `[samples, length]` int64 token ids.
        progress: Counts samples, then linears; or layers.
        seed: Of all searches; the same, so that linears with the same input and scores agree.
        wave_bytes: Memory for statistics, where the model runs whole.
        layerwise: Runs the model with one layer in memory at a time; None runs it whole.

    Returns:
        Searches by name; a linear that no token reached is absent.
    """
    found: dict[str, OrderSearch] = {}
    channels = {name: _channels(linear) for name, linear in linears.items()}

    def search(seen: dict[str, Coactivation], names: Iterable[str] | None = None) -> None:
        for name in names or list(seen):
            found[name] = search_order(seen.pop(name), behaviours[name].pattern, seed=seed)

    for names in [list(linears)] if layerwise else _waves(channels, wave_bytes):
        seen: dict[str, Coactivation] = {}

        def update(name: str, scores: torch.Tensor, seen: dict[str, Coactivation] = seen) -> None:
            if name not in seen:
                seen[name] = Coactivation.empty(channels[name])
            seen[name].update(scores, behaviours[name].pattern.density)

        _each_input(
            model,
            {name: linears[name] for name in names},
            constants,
            behaviours,
            samples,
            update=update,
            progress=progress,
            label="fold: channel orders" if layerwise else "fold: co-activations",
            layerwise=layerwise,
            after_layer=functools.partial(search, seen),
        )
        search(seen, progress.track(list(seen), label="fold: channel orders", total=len(seen)))
    return {name: found[name] for name in linears if name in found}


def grouping_distances(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    constants: Mapping[str, Constants],
    behaviours: Mapping[str, Behaviour],
    samples: torch.Tensor,
    *,
    progress: Progress,
    layerwise: LayerwiseModel | None = None,
) -> dict[str, GroupingDistance]:
    """How close each linear's order (that of its constants) comes to unstructured selection."""
    distances: dict[str, GroupingDistance] = {}

    def update(name: str, scores: torch.Tensor) -> None:
        pattern, order = behaviours[name].pattern, constants[name].channel_order
        one = grouping_distance(scores, pattern, order)
        distances[name] = distances[name] + one if name in distances else one

    _each_input(
        model,
        linears,
        constants,
        behaviours,
        samples,
        update=update,
        progress=progress,
        label="fold: distance to unstructured",
        layerwise=layerwise,
    )
    return distances


def _each_input(
    model: nn.Module,
    linears: Mapping[str, nn.Module],
    constants: Mapping[str, Constants],
    behaviours: Mapping[str, Behaviour],
    samples: torch.Tensor,
    *,
    update: Callable[[str, torch.Tensor], None],
    progress: Progress,
    label: str,
    layerwise: LayerwiseModel | None,
    after_layer: Callable[[], None] = lambda: None,
) -> None:
    """Hand the scores `[T, K]` of every input of every linear to `update`."""

    def watch(name: str, linear: nn.Module) -> RemovableHandle:
        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            del module
            update(name, _scores(arguments[0], behaviours[name], constants[name]))

        return linear.register_forward_pre_hook(hook)

    with _hooked(watch(name, linear) for name, linear in linears.items()):
        run_samples(
            model,
            samples,
            progress=progress,
            label=label,
            layerwise=layerwise,
            after_layer=after_layer,
        )


def _scores(x: torch.Tensor, behaviour: Behaviour, constants: Constants) -> torch.Tensor:
    """`[T, K]` of an input `[..., K]`: those that its selection ranks."""
    tokens = x.detach().reshape(-1, x.shape[-1]).float()
    scale = constants.score_scale
    z = tokens - shift_of(tokens, behaviour, constants)
    return scores_of(z, None if scale is None else scale.to(tokens.device))


def _channels(module: nn.Module) -> int:
    channels = module.in_features
    if not isinstance(channels, int):
        raise TypeError(f"{type(module).__name__} has no in_features")
    return channels


def _waves(channels: Mapping[str, int], wave_bytes: int) -> Iterator[list[str]]:
    """Names in order, cut where their `[K, K]` float32 sums together exceed the limit."""
    wave: list[str] = []
    held = 0
    for name, count in channels.items():
        size = count * count * 4
        if wave and held + size > wave_bytes:
            yield wave
            wave, held = [], 0
        wave.append(name)
        held += size
    if wave:
        yield wave


def _rows(channels: int) -> Iterator[slice]:
    """All rows of a K x K matrix, block by block."""
    for start in range(0, channels, _ROWS):
        yield slice(start, start + _ROWS)


def _thresholds(squares: torch.Tensor, density: float) -> torch.Tensor:
    """`[T, 1]`: the largest value of each row that unstructured selection drops."""
    channels = squares.shape[-1]
    dropped = min(max(channels - round(channels * density), 1), channels)
    return squares.kthvalue(dropped, dim=-1, keepdim=True).values


def _compared(channels: int, generator: torch.Generator) -> torch.Tensor:
    if channels <= SWEEP_CHANNELS:
        return torch.arange(channels)
    return torch.randperm(channels, generator=generator)[:SWEEP_CHANNELS].sort().values


def _within(cost: torch.Tensor, group_of: torch.Tensor) -> float:
    """Sum of the costs of all pairs that share a group, a channel with itself included."""
    return float(cost.gather(1, _members(group_of)[group_of]).sum(dtype=torch.float64))


def _members(group_of: torch.Tensor) -> torch.Tensor:
    """`[G, m]`: the channels of each group, ascending."""
    groups = int(group_of.max()) + 1
    return torch.argsort(group_of, stable=True).view(groups, -1)


def _costs_to_groups(costs: torch.Tensor, group_of: torch.Tensor) -> torch.Tensor:
    """Summed costs with all of a group: `[A, K]` -> `[A, G]`.

    Of few channels a product with their memberships is fastest; of many, most of it is zeros.
    """
    members = _members(group_of)
    if costs.shape[1] > SWEEP_CHANNELS:
        return costs.index_select(1, members.flatten()).view(-1, *members.shape).sum(dim=2)
    membership = torch.nn.functional.one_hot(group_of, len(members)).to(costs.dtype)  # [K, G]
    return costs @ membership


def _best_exchanges(
    cost: torch.Tensor, group_of: torch.Tensor, among: torch.Tensor
) -> list[tuple[int, int]]:
    """Exchanges that lower the cost, best first, no two of which touch the same group.

    With S[i, g] the summed cost of channel i with all of group g, exchanging i of group a for j of
    group b changes the sum over ordered pairs within groups by

        2 (S[j,a] + S[i,b] - S[i,a] - S[j,b]) - 4 cost[i,j] + 2 (cost[i,i] + cost[j,j]).
    """
    groups = int(group_of.max()) + 1
    own = group_of[among]
    costs = cost.index_select(0, among)  # [A, K]
    towards = _costs_to_groups(costs, group_of).t()[own]  # [j, i]: channel i with the group of j
    stay = towards.diagonal() - cost.diagonal()[among]
    change = towards + towards.t()
    change -= stay.unsqueeze(0)
    change -= stay.unsqueeze(1)
    change -= 2 * costs.index_select(1, among)
    change.masked_fill_(own.unsqueeze(0) == own.unsqueeze(1), 0.0)
    gain, partner = change.min(dim=1)
    best_first = torch.argsort(gain, stable=True)[: 4 * groups].tolist()
    touched: set[int] = set()
    chosen: list[tuple[int, int]] = []
    for place in best_first:
        if float(gain[place]) > -_LEAST_GAIN:
            break
        one, other = int(among[place]), int(among[partner[place]])
        pair = {int(group_of[one]), int(group_of[other])}
        if not pair & touched:
            touched |= pair
            chosen.append((one, other))
    return chosen
