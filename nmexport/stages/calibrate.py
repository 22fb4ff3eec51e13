"""Calibrate: what the inputs of every linear look like, and the samples that this stands on.

Statistics are gathered for all linears at once, whatever the recipe targets, and depend on neither
the pattern nor the criterion: trying another one reruns only what comes after.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nmexport.calibration.corpus import corpus_identity
from nmexport.calibration.text_sources import SELF
from nmexport.sparsity.statistics import ChannelStatistics
from nmexport.store.layers import FILENAME
from nmexport.store.records import read_record
from nmexport.store.tensors import load_tensors

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from nmexport.recipe import Recipe
    from nmexport.stages.inputs import StageInputs

UPSTREAM: tuple[str, ...] = ()
SCHEMA = 2
STATISTICS = "statistics.safetensors"
SAMPLES = "samples.safetensors"
FIELDS = ("mean", "rms", "mean_magnitude")


@dataclass(frozen=True, kw_only=True)
class CalibratedLinear:
    """One linear of the dense model, as calibration met it."""

    name: str
    in_features: int
    out_features: int
    has_bias: bool
    tokens: int
    """Tokens its statistics stand on; 0 where none reached it, and then it has none."""


@dataclass(frozen=True, kw_only=True)
class Linears:
    """`layers.json`."""

    linears: tuple[CalibratedLinear, ...]


@dataclass(frozen=True)
class Artifact:
    """A finished calibration."""

    path: Path

    @property
    def linears(self) -> list[CalibratedLinear]:
        """All linears of the model, in model order.

        Raises:
            ArtifactError: if `layers.json` is missing, malformed, or of another schema.
        """
        fix = "rebuild the stage with --force"
        path = self.path / FILENAME
        return list(read_record(Linears, path, schema=SCHEMA, fix=fix).linears)

    def samples(self) -> torch.Tensor:
        """Token ids of the calibration samples, `[samples, length]` int64; any few hold all."""
        kinds = self.samples_by_kind()
        return mix(kinds["corpus"], kinds["written"])

    def samples_by_kind(self) -> dict[str, torch.Tensor]:
        """Token ids `[samples, length]` int64 of `corpus`, `written` and `further` samples.

        See `nmexport.calibration.corpus.Samples`.
        """
        return {name: ids.long() for name, ids in load_tensors(self.path / SAMPLES).items()}

    def statistics(self) -> dict[str, ChannelStatistics]:
        """Statistics by linear, of those that a token reached."""
        tensors = load_tensors(self.path / STATISTICS)
        return {
            linear.name: ChannelStatistics(
                tokens=linear.tokens,
                **{field: tensors[f"{linear.name}.{field}"] for field in FIELDS},
            )
            for linear in self.linears
            if linear.tokens
        }


def key_fields(inputs: StageInputs) -> dict[str, object]:
    """Model, samples and what computes on them."""
    recipe = inputs.recipe
    section = recipe.calibration
    return {
        "model": inputs.source.digest,
        "trust_remote_code": recipe.model.trust_remote_code,
        "corpus": corpus_identity(section.corpus),
        "samples": section.samples,
        "length": section.length,
        "self_share": section.self_share,
        "learning_samples": section.learning_samples,
        "reserved_tokens": reserved_tokens(recipe),
        "seed": recipe.seed,
        # Activations are held against the range of float16, and of no other type.
        **({"range": "float16"} if recipe.model.dtype == "float16" else {}),
        "versions": {name: inputs.environment.version(name) for name in ("torch", "transformers")},
    }


def check(inputs: StageInputs) -> None:
    """Refuse a model, a text or a recipe that do not fit each other; see `calibrating.check`."""
    from nmexport.stages import calibrating

    calibrating.check(inputs)


def run(inputs: StageInputs) -> dict[str, object]:
    """Run the dense model over the samples; see `calibrating.run`."""
    from nmexport.stages import calibrating

    return calibrating.run(inputs)


def mix(corpus: torch.Tensor, written: torch.Tensor) -> torch.Tensor:
    """Spread both evenly over each other, so that the first few hold some of both."""
    import torch

    places = [(torch.arange(len(texts)) + 0.5) / max(len(texts), 1) for texts in (corpus, written)]
    order = torch.argsort(torch.cat(places), stable=True)
    return torch.cat([corpus, written])[order]


def reserved_tokens(recipe: Recipe) -> int:
    """Count the tokens that evaluation takes from the start of a corpus that both name."""
    evaluation = recipe.evaluation
    shared = evaluation.corpus == recipe.calibration.corpus != SELF
    return evaluation.windows * evaluation.length if shared else 0
