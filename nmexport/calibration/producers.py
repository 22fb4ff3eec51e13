"""Finds linears that make another's input channel by channel, to lay them out for it.

Names say nothing, so a module's code is asked: the linears in it are exchanged for stand-ins that
return noise, and the input of the one in question has to follow what is done to that noise.

    producers ─► noise ─► the module's own code ─► input of the reader     follows the noise
                                               └─► everything else         does not move
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from nmexport.calibration.forward_passes import hooked, run_samples
from nmexport.progress import Silent
from nmexport.sparsity.output_order import OutputOrders, columns_for

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from torch.utils.hooks import RemovableHandle

    from nmexport.calibration.sparse_constants import DenseModel, SparseConstants
    from nmexport.models.layerwise import LayerwiseModel

_TOKENS = 3
"""More than one: over a single token attention is the identity."""
_MODEL_TOKENS = 8  # enough for every module to be called
_HALVES = (1, 2)
"""Outputs of a producer, in widths of the reader's input: two where gate and up are one linear."""
_RELATIVE, _ABSOLUTE = 1e-5, 1e-6
"""Rounding: a vector's last elements may be computed apart from the others, in another way."""

Change = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Feed:
    """Linears whose outputs alone make the input of another, each channel its own."""

    reader: str
    producers: tuple[str, ...]


def output_orders(dense: DenseModel, constants: SparseConstants) -> OutputOrders:
    """Decide which linears' outputs are laid out for their reader.

    All of them are sparse linears: the weights of others are not folded, and stay as they are.

    Args:
        dense: The dense model.
        constants: Of the linears that become sparse.
    """
    orders = {
        name: derived.constants.channel_order.cpu()
        for name, derived in constants.derived.items()
        if derived.constants.channel_order is not None
    }
    feeds = [
        feed
        for feed in find_feeds(dense.model, orders, dense.samples[0], layerwise=dense.layerwise)
        if all(name in constants.derived for name in feed.producers)
    ]
    return OutputOrders(
        readers={name: feed.reader for feed in feeds for name in feed.producers},
        orders={feed.reader: orders[feed.reader] for feed in feeds},
    )


def find_feeds(
    model: nn.Module,
    readers: Collection[str],
    sample: torch.Tensor,
    *,
    layerwise: LayerwiseModel | None = None,
) -> list[Feed]:
    """Find what makes the inputs of linears, where that is certain.

    Args:
        model: A Hugging Face causal language model in evaluation mode; its weights may be on the
            meta device.
        readers: Names of the linears.
        sample: `[length]` int64 token ids.
        layerwise: Runs the model with one layer in memory at a time; None runs it whole.
    """
    feeds = []
    for reader in readers:
        parent, _, own = reader.rpartition(".")
        names = producers_of(model.get_submodule(parent), own)
        if names:
            prefix = f"{parent}." if parent else ""
            feeds.append(Feed(reader, tuple(f"{prefix}{name}" for name in names)))
    return _find_called_inside(model, feeds, sample, layerwise) if feeds else []


def producers_of(parent: nn.Module, reader: str, *, seed: int = 0) -> tuple[str, ...]:
    """Children of a module whose outputs make the input of another child, channel by channel.

    If the channels of all of them change places alike, so do those of the reader's input, and
    nothing else that the module computes sees it. Found by running the module on noise; none where
    anything is in doubt.

    Args:
        parent: A module in evaluation mode; not changed.
        reader: Name of a linear, a child of it.
        seed: Of the noise.

    Returns:
        Names of linears, in the parent's order, each with as many outputs as the reader has inputs
        or twice as many.
    """
    with torch.no_grad():
        try:
            return _producers(_Bench(parent, reader, seed))
        except Exception:  # noqa: BLE001  a module of a model's author may raise anything
            return ()


class _Seen(NamedTuple):
    """Tensors seen in one run of a module."""

    reader: torch.Tensor
    """The reader's input, `[1, tokens, K]`."""
    others: Sequence[Any]
    """The inputs of the other linears, and what the module returns."""


class _Doubtful(Exception):
    """The module does not run as a layer between linears does."""


def _producers(bench: _Bench) -> tuple[str, ...]:
    base = bench.run({})
    channels = base.reader.shape[-1]
    names = tuple(
        name for name in bench.others if not _same(bench.run({name: _negate}).reader, base.reader)
    )
    widths = {bench.others[name].out_features for name in names}
    if not names or not widths <= {channels * count for count in _HALVES}:
        return ()
    noise = torch.Generator().manual_seed(bench.seed)
    order = torch.randperm(channels, generator=noise)
    moved = bench.run(dict.fromkeys(names, _move(order)))
    if not (_same(moved.reader, base.reader[..., order]) and _same(moved.others, base.others)):
        return ()
    # Sums over channels do not mind their order: what one channel holds must not reach another.
    touched = torch.rand(channels, generator=noise) < 0.5  # noqa: PLR2004
    partly = bench.run(dict.fromkeys(names, _negate_where(touched)))
    is_local = _same(partly.reader[..., ~touched], base.reader[..., ~touched])
    return names if is_local and _same(partly.others, base.others) else ()


def _negate(noise: torch.Tensor) -> torch.Tensor:
    # Not the sign alone: an even function does not see it.
    return 0.5 - 0.7 * noise


def _move(order: torch.Tensor) -> Change:
    return lambda noise: noise[..., columns_for(order, noise.shape[-1]).to(noise.device)]


def _negate_where(touched: torch.Tensor) -> Change:
    def change(noise: torch.Tensor) -> torch.Tensor:
        where = touched.repeat(noise.shape[-1] // len(touched)).to(noise.device)
        return torch.where(where, _negate(noise), noise)

    return change


def _same(one: Any, other: Any) -> bool:
    """Compare two results: tensors within rounding, containers by their items."""
    if isinstance(one, torch.Tensor):
        return one.shape == other.shape and torch.allclose(
            one, other, rtol=_RELATIVE, atol=_ABSOLUTE
        )
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(_same, one, other))
    if one is None:
        return other is None
    raise _Doubtful


class _Bench:
    """A copy of a module that computes with stand-ins for the linears among its children."""

    def __init__(self, parent: nn.Module, reader: str, seed: int) -> None:
        linears = {
            name: part for name, part in parent.named_children() if isinstance(part, nn.Linear)
        }
        device = linears[reader].weight.device
        device = torch.device("cpu") if device.type == "meta" else device
        self.seed = seed
        self.others = {name: part for name, part in linears.items() if name != reader}
        self._reader, self._parent = reader, parent
        self._stand_ins = {
            name: _StandIn(part.out_features, seed + place, device)
            for place, (name, part) in enumerate(linears.items(), start=1)
        }
        noise = torch.Generator().manual_seed(seed)
        width = next(iter(self.others.values())).in_features
        self._x = torch.randn(1, _TOKENS, width, generator=noise).to(device)

    def run(self, changes: Mapping[str, Change]) -> _Seen:
        """Run the module once with the noise of some stand-ins changed.

        Raises:
            _Doubtful: if the reader is not called once.
        """
        for name, one in self._stand_ins.items():
            one.seen, one.change = [], changes.get(name)
        # The class's own method: what is hooked onto the instance would run the original's parts.
        stage = copy.copy(self._parent)
        stage.__dict__["_modules"] = {**self._parent._modules, **self._stand_ins}  # noqa: SLF001
        output = type(stage).forward(stage, self._x)
        read = self._stand_ins[self._reader].seen
        if len(read) != 1:
            raise _Doubtful
        inputs = [one.seen for name, one in self._stand_ins.items() if name != self._reader]
        return _Seen(read[0], [*inputs, output])


class _StandIn(nn.Module):
    """Returns the same noise whatever it is given, and remembers what that was."""

    def __init__(self, outputs: int, seed: int, device: torch.device) -> None:
        super().__init__()
        self.seen: list[torch.Tensor] = []
        self.change: Change | None = None
        self._outputs, self._seed, self._device = outputs, seed, device

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(x)
        noise = torch.Generator().manual_seed(self._seed)
        made = torch.randn(*x.shape[:-1], self._outputs, generator=noise).to(self._device)
        return made if self.change is None else self.change(made)


def _find_called_inside(
    model: nn.Module,
    feeds: Sequence[Feed],
    sample: torch.Tensor,
    layerwise: LayerwiseModel | None,
) -> list[Feed]:
    """Keep feeds whose linears only their own module calls, tested on a few tokens."""
    outside: set[str] = set()

    def watch(feed: Feed) -> Iterator[RemovableHandle]:
        parent = model.get_submodule(feed.reader.rpartition(".")[0])
        running: list[bool] = []

        def enter(*_: Any) -> None:
            running.append(True)

        def leave(*_: Any) -> None:
            running.pop()

        def check(*_: Any) -> None:
            if not running:
                outside.add(feed.reader)

        yield parent.register_forward_pre_hook(enter)
        yield parent.register_forward_hook(leave)
        for name in (feed.reader, *feed.producers):
            yield model.get_submodule(name).register_forward_pre_hook(check)

    with hooked(handle for feed in feeds for handle in watch(feed)):
        run_samples(
            model,
            sample[None, :_MODEL_TOKENS],
            progress=Silent(),
            label="producers",
            layerwise=layerwise,
        )
    return [feed for feed in feeds if feed.reader not in outside]
