"""Calibrate: what the inputs of every linear look like, and the samples that this stands on.

Statistics are gathered for all linears at once, whatever the recipe targets, and depend on neither
the pattern nor the criterion: trying another one reruns only what comes after.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nmexport.calibration.corpus import check_samples, corpus_identity, load_samples
from nmexport.calibration.text_sources import SELF
from nmexport.errors import CorpusError
from nmexport.models.context import check_lengths
from nmexport.models.guard import unused_code
from nmexport.models.offload import check_layerwise, is_placed, open_dense
from nmexport.progress import busy
from nmexport.sparsity.statistics import ChannelStatistics
from nmexport.stages.fitting import check_fit, check_model
from nmexport.store.layers import FILENAME
from nmexport.store.records import read_record, write_record
from nmexport.store.tensors import load_tensors, save_tensors

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import nn

    from nmexport.calibration.corpus import SelfText
    from nmexport.calibration.text_sources import TokenIds
    from nmexport.models.offload import OpenedModel
    from nmexport.recipe import Recipe
    from nmexport.stages.inputs import StageInputs

UPSTREAM: tuple[str, ...] = ()
SCHEMA = 2
STATISTICS = "statistics.safetensors"
SAMPLES = "samples.safetensors"
_FIELDS = ("mean", "rms", "mean_magnitude")


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
class _Linears:
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
        return list(read_record(_Linears, path, schema=SCHEMA, fix=fix).linears)

    def samples(self) -> torch.Tensor:
        """Token ids of the calibration samples, `[samples, length]` int64; any few hold all."""
        kinds = self.samples_by_kind()
        return _mix(kinds["corpus"], kinds["written"])

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
                **{field: tensors[f"{linear.name}.{field}"] for field in _FIELDS},
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
        "reserved_tokens": _reserved_tokens(recipe),
        "seed": recipe.seed,
        # Activations are held against the range of float16, and of no other type.
        **({"range": "float16"} if recipe.model.dtype == "float16" else {}),
        "versions": {name: inputs.environment.version(name) for name in ("torch", "transformers")},
    }


def check(inputs: StageInputs) -> None:
    """Refuse a model, a text or a recipe that do not fit each other, before anything runs.

    Raises:
        CorpusError: if a file of text is missing, malformed or too short.
        RecipeError: if samples are longer than the model's context.
        ModelError: if the model's files are not whole, or export cannot take it.
        UserError: see `fitting.check_fit`.
    """
    from nmexport.models.loader import load_tokenizer
    from nmexport.models.text_files import known_tokens

    recipe, source = inputs.recipe, inputs.source
    tokenizer = load_tokenizer(source)
    check_lengths(source, recipe, measured=False)
    check_model(source, recipe.model.dtype)
    check_fit(recipe, source)
    check_samples(
        recipe.calibration,
        tokenizer,
        reserved_tokens=_reserved_tokens(recipe),
        vocabulary=known_tokens(source),
    )


def run(inputs: StageInputs) -> dict[str, object]:
    """Run the dense model over the samples.

    Raises:
        CorpusError: if the text is missing or too short.
        ModelError: if activations are not finite or overflow.
    """
    import torch

    from nmexport.calibration.forward_passes import gather_channel_statistics, on_best_device
    from nmexport.calibration.overflow import refuse_overflow
    from nmexport.models.loader import load_tokenizer
    from nmexport.sparsity.targets import linears_of

    recipe = inputs.recipe
    tokenizer = load_tokenizer(inputs.source)
    note = unused_code(inputs.source)
    if note is not None:
        inputs.progress.note(f"calibrate: {note}")
    with busy(inputs.progress, "calibrate: load the model"):
        opened = open_dense(
            inputs.source,
            offload=recipe.calibration.offload,
            progress=inputs.progress,
            folder=inputs.output,
        )
    model = opened.model
    if opened.layerwise is not None:
        check_layerwise(recipe)
    if opened.layerwise is None and not is_placed(model):
        model = on_best_device(model)
    loaded = load_samples(
        recipe.calibration,
        tokenizer,
        _writer(inputs, opened, tokenizer),
        seed=recipe.seed,
        reserved_tokens=_reserved_tokens(recipe),
        vocabulary=model.config.get_text_config().vocab_size,
    )
    kinds = {name: torch.from_numpy(ids) for name, ids in vars(loaded).items()}
    samples = _mix(kinds["corpus"], kinds["written"])
    linears = linears_of(model)
    with refuse_overflow(linears, getattr(torch, recipe.model.dtype)):
        statistics = gather_channel_statistics(
            model, linears, samples, progress=inputs.progress, layerwise=opened.layerwise
        )

    save_tensors(inputs.output / SAMPLES, {name: ids.int() for name, ids in kinds.items()})
    save_tensors(inputs.output / STATISTICS, _name_tensors(statistics))
    _write_linears(inputs.output, linears, statistics)
    return {
        "samples": samples.shape[0],
        "tokens": samples.numel(),
        "learning_samples": len(kinds["further"]),
        "linears": len(linears),
        "linears_reached": len(statistics),
    }


def _writer(inputs: StageInputs, opened: OpenedModel, tokenizer: Any) -> SelfText:
    """The model as an author, where it is in memory as a whole."""
    from nmexport.calibration.self_text import mixed_self_text

    if opened.layerwise is None:
        label = "calibrate: own text"
        return mixed_self_text(opened.model, tokenizer, progress=inputs.progress, label=label)

    def refuse(samples: int, length: int, seed: int) -> TokenIds:
        del samples, length, seed
        raise CorpusError(
            f"{inputs.source.id} does not fit into memory, and a model that runs layer by layer "
            "cannot write its own text.",
            allowed="calibration text from elsewhere, all of it",
            fix="--calib FILE.txt --calib-self-share 0",
        )

    return refuse


def _mix(corpus: torch.Tensor, written: torch.Tensor) -> torch.Tensor:
    """Both, spread evenly over each other, so that any first few are of both."""
    import torch

    places = [(torch.arange(len(texts)) + 0.5) / max(len(texts), 1) for texts in (corpus, written)]
    order = torch.argsort(torch.cat(places), stable=True)
    return torch.cat([corpus, written])[order]


def _reserved_tokens(recipe: Recipe) -> int:
    """Tokens that evaluation takes from the start of the corpus, where both name the same one."""
    evaluation = recipe.evaluation
    shared = evaluation.corpus == recipe.calibration.corpus != SELF
    return evaluation.windows * evaluation.length if shared else 0


def _name_tensors(statistics: dict[str, ChannelStatistics]) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{field}": getattr(channels, field)
        for name, channels in statistics.items()
        for field in _FIELDS
    }


def _write_linears(
    folder: Path, linears: dict[str, nn.Linear], statistics: dict[str, ChannelStatistics]
) -> None:
    from nmexport.sparsity.linear import bias_of

    rows = tuple(
        CalibratedLinear(
            name=name,
            in_features=linear.in_features,
            out_features=linear.out_features,
            has_bias=bias_of(linear) is not None,
            tokens=statistics[name].tokens if name in statistics else 0,
        )
        for name, linear in linears.items()
    )
    write_record(_Linears(linears=rows), folder / FILENAME, schema=SCHEMA)
