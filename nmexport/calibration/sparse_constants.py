"""Makes all constants of the linears that become sparse: derived, then learned.

sections ──► derive ──► remainders ──► local errors ──► static nu ──► learn ──► fold
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from nmexport.calibration import derivation
from nmexport.calibration.block_learning import learn_blocks
from nmexport.calibration.corpus import text_seed
from nmexport.calibration.effort import DISTANCE_SAMPLES, ERROR_SAMPLES
from nmexport.calibration.forward_passes import DenseRun, gather_errors
from nmexport.calibration.grouping_distance import grouping_distances
from nmexport.calibration.learning import learn
from nmexport.calibration.learning_chunks import without
from nmexport.calibration.learning_text import with_more_written
from nmexport.calibration.method import needs_static_variance
from nmexport.calibration.students import Targets
from nmexport.sparsity.fold import NOTHING_LEARNED, fold
from nmexport.sparsity.linear import bias_of
from nmexport.store.layers import LayerSpec

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import AbstractContextManager

    from torch import nn

    from nmexport.calibration.checkpoint import Checkpoints
    from nmexport.calibration.corpus import SelfText
    from nmexport.calibration.derivation import Derived
    from nmexport.calibration.effort import LearningSettings
    from nmexport.calibration.grouping_distance import GroupingDistance
    from nmexport.calibration.learning import Learned
    from nmexport.calibration.local_error import ErrorObserver
    from nmexport.calibration.sites import Site
    from nmexport.calibration.stored_orders import Integers
    from nmexport.models.layerwise import LayerwiseModel
    from nmexport.progress import Progress
    from nmexport.recipe import SparsitySection
    from nmexport.sparsity.statistics import ChannelStatistics


@dataclass(frozen=True, kw_only=True)
class DenseModel:
    """A dense model, its linears to make sparse, and what calibration knows of their inputs."""

    model: Any
    """A Hugging Face causal language model in evaluation mode."""
    linears: Mapping[str, nn.Linear]
    """The targets, in model order."""
    sites: Sequence[Site]
    """Which of them read the same tensor."""
    statistics: Mapping[str, ChannelStatistics]
    samples: torch.Tensor
    """`[samples, length]`, of all kinds."""
    kinds: Mapping[str, torch.Tensor]
    """The same by kind: see `nmexport.calibration.corpus.Samples`."""
    layerwise: LayerwiseModel | None
    """Runs the model where it does not fit into memory."""
    seed: int
    progress: Progress
    integers: Integers | None = None
    """Weights that came quantised and stay so; None where they are folded into."""
    balances: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """`[K]` by linear, in the input's own order: what operands are multiplied by before both sides
    are rounded, see `sparsity.balance`."""

    def loaded(self, linear: nn.Linear) -> AbstractContextManager[nn.Linear]:
        """Hold a linear's weight in memory."""
        return nullcontext(linear) if self.layerwise is None else self.layerwise.loaded(linear)


@dataclass(frozen=True, kw_only=True)
class Learning:
    """How constants are learned, and from what."""

    settings: LearningSettings
    write: SelfText
    """Lets the model write more text."""
    checkpoints: Checkpoints


@dataclass(frozen=True, kw_only=True)
class SparseConstants:
    """Constants of the linears that become sparse, by name, with their errors."""

    derived: Mapping[str, Derived]
    errors: Mapping[str, ErrorObserver]
    """Measure what selection costs each linear alone, before anything is learned."""
    distances: Mapping[str, GroupingDistance]
    """How close each order comes to unstructured selection; absent without an order."""
    learned: Learned | None

    def folded(self, dense: DenseModel, name: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Inputs of one linear's op, W in type T: see `nmexport.sparsity.fold`."""
        derived = self.derived[name]
        learned = NOTHING_LEARNED if self.learned is None else self.learned.corrections[name]
        with dense.loaded(dense.linears[name]) as linear:
            return fold(linear, derived.behaviour, derived.constants, learned, dtype=dtype)

    def layer(self, name: str, linear: nn.Linear) -> LayerSpec:
        """Make the record of one linear in `layers.json`."""
        derived, distance = self.derived[name], self.distances.get(name)
        section, behaviour, constants = derived.section, derived.behaviour, derived.constants
        nu = 1.0 if constants.nu is None else constants.nu
        remainder = constants.remainder
        return LayerSpec(
            name=name,
            in_features=linear.in_features,
            out_features=linear.out_features,
            pattern=section.pattern,
            criterion=section.criterion,
            mitigations=section.mitigations,
            grouping=section.grouping,
            phase=section.phases,
            dynamic_shift=behaviour.dynamic_shift,
            variance_correction=behaviour.variance_correction,
            has_bias=bias_of(linear) is not None,
            relative_error=_round(self.errors[name].relative_error(nu)),
            gap_closed=None if distance is None else _round(distance.closed()),
            remainder_rank=None if remainder is None else remainder.inner.shape[1],
        )


def make_constants(
    dense: DenseModel,
    sections: Mapping[str, SparsitySection],
    *,
    learning: Learning | None,
    unlearned: torch.Tensor | None = None,
    checkpoint: str = "learning",
) -> SparseConstants:
    """Derive and learn the constants of all linears that have a section.

    Args:
        dense: Model, linears, statistics, text.
        sections: What each sparse linear is to compute, by name.
        learning: None learns nothing.
        unlearned: `[W, L]` windows that nothing may be learned from.
        checkpoint: Names the checkpoint of learning.

    Raises:
        CorpusError: if there is too little text to learn from.
        ModelError: if the loss is not finite.
    """
    derived = derivation.derive(
        dense.sites,
        dense.linears,
        dense.statistics,
        sections,
        seed=dense.seed,
        loaded=dense.loaded,
        integers=dense.integers,
    )
    derived = derivation.with_remainders(
        derived, dense.linears, seed=dense.seed, loaded=dense.loaded
    )
    errors = gather_errors(_run(dense, derived, dense.samples[:ERROR_SAMPLES]))
    derived = _with_static_variance(derived, errors)
    distances = _distances(dense, derived)
    learned = None
    if learning is not None:
        learned = _learn(dense, derived, learning, unlearned, checkpoint)
    return SparseConstants(derived=derived, errors=errors, distances=distances, learned=learned)


def _with_static_variance(
    derived: Mapping[str, Derived], errors: Mapping[str, ErrorObserver]
) -> dict[str, Derived]:
    """Add nu, where a section asks for it, from the dense model's activations.

    Those of the model that is sparse already change no result: on SmolLM2 at 8:16 each nu was the
    same within half a percent, and perplexity within the noise of what near ties decide.
    """
    return {
        name: replace(linear, constants=replace(linear.constants, nu=errors[name].static_nu()))
        if needs_static_variance(linear.section)
        else linear
        for name, linear in derived.items()
    }


def _distances(dense: DenseModel, derived: Mapping[str, Derived]) -> dict[str, GroupingDistance]:
    """Measure the orders; consecutive groups have none."""
    ordered = {
        name: linear
        for name, linear in derived.items()
        if linear.constants.channel_order is not None
    }
    if not ordered:
        return {}
    return grouping_distances(_run(dense, ordered, dense.samples[-DISTANCE_SAMPLES:]))


def _run(dense: DenseModel, derived: Mapping[str, Derived], samples: torch.Tensor) -> DenseRun:
    return DenseRun(
        model=dense.model,
        linears={name: dense.linears[name] for name in derived},
        constants={name: linear.constants for name, linear in derived.items()},
        behaviours={name: linear.behaviour for name, linear in derived.items()},
        samples=samples,
        progress=dense.progress,
        layerwise=dense.layerwise,
    )


def _learn(
    dense: DenseModel,
    derived: Mapping[str, Derived],
    learning: Learning,
    unlearned: torch.Tensor | None,
    checkpoint: str,
) -> Learned:
    """Learn corrections of all linears, together or block by block."""
    settings, kept = learning.settings, learning.checkpoints
    corpus = torch.cat([dense.kinds["corpus"], dense.kinds["further"]])
    own = dense.kinds["written"]
    if unlearned is not None:
        corpus, own = without(corpus, unlearned), without(own, unlearned)
    if dense.layerwise is None:
        own = with_more_written(
            corpus,
            own,
            learning.write,
            settings=settings,
            seed=text_seed(dense.seed, "learning"),
            checkpoint=kept.named("text"),
        )
    targets = Targets(
        linears={name: dense.linears[name] for name in derived},
        constants={name: linear.constants for name, linear in derived.items()},
        behaviours={name: linear.behaviour for name, linear in derived.items()},
        sites=[site.names for site in dense.sites],
    )
    if dense.layerwise is not None:
        return learn_blocks(
            dense.layerwise,
            targets,
            [corpus, own],
            settings=settings,
            progress=dense.progress,
            checkpoint_of=lambda index: kept.named(f"{checkpoint}-block-{index}", of=str(settings)),
        )
    return learn(
        dense.model,
        targets,
        [corpus, own],
        settings=settings,
        progress=dense.progress,
        checkpoint=kept.named(checkpoint, of=str(settings)),
    )


def _round(value: float | None) -> float | None:
    """Round to six digits: the rest is the machine's summation order."""
    return None if value is None else float(f"{value:.6g}")
