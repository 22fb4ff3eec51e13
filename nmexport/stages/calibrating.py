"""Calibration as it runs: the dense model over its samples."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from nmexport.calibration.corpus import check_samples, load_samples
from nmexport.calibration.forward_passes import gather_channel_statistics, on_best_device
from nmexport.calibration.overflow import refuse_overflow
from nmexport.calibration.self_text import mixed_self_text
from nmexport.errors import CorpusError
from nmexport.models.context import check_lengths
from nmexport.models.guard import unused_code
from nmexport.models.loader import load_tokenizer
from nmexport.models.offload import check_layerwise, is_placed, open_dense
from nmexport.models.text_files import known_tokens
from nmexport.progress import busy
from nmexport.sparsity.linear import bias_of
from nmexport.sparsity.targets import linears_of
from nmexport.stages.calibrate import (
    FIELDS,
    SAMPLES,
    SCHEMA,
    STATISTICS,
    CalibratedLinear,
    Linears,
    mix,
    reserved_tokens,
)
from nmexport.stages.fitting import check_fit, check_model
from nmexport.store.layers import FILENAME
from nmexport.store.records import write_record
from nmexport.store.tensors import save_tensors

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from nmexport.calibration.corpus import SelfText
    from nmexport.calibration.text_sources import TokenIds
    from nmexport.models.offload import OpenedModel
    from nmexport.sparsity.statistics import ChannelStatistics
    from nmexport.stages.inputs import StageInputs


def check(inputs: StageInputs) -> None:
    """Refuse a model, a text or a recipe that do not fit each other, before anything runs.

    Raises:
        CorpusError: if a file of text is missing, malformed or too short.
        RecipeError: if samples are longer than the model's context.
        ModelError: if the model's files are not whole, or export cannot take it.
        UserError: see `fitting.check_fit`.
    """
    recipe, source = inputs.recipe, inputs.source
    tokenizer = load_tokenizer(source)
    check_lengths(source, recipe, measured=False)
    check_model(source, recipe.model.dtype)
    check_fit(recipe, source)
    check_samples(
        recipe.calibration,
        tokenizer,
        reserved_tokens=reserved_tokens(recipe),
        vocabulary=known_tokens(source),
    )


def run(inputs: StageInputs) -> dict[str, object]:
    """Run the dense model over the samples.

    Raises:
        CorpusError: if the text is missing or too short.
        ModelError: if activations are not finite or overflow.
    """
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
        reserved_tokens=reserved_tokens(recipe),
        vocabulary=model.config.get_text_config().vocab_size,
    )
    kinds = {name: torch.from_numpy(ids) for name, ids in vars(loaded).items()}
    samples = mix(kinds["corpus"], kinds["written"])
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
    """Let the model write text, where it is in memory as a whole."""
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


def _name_tensors(statistics: dict[str, ChannelStatistics]) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{field}": getattr(channels, field)
        for name, channels in statistics.items()
        for field in FIELDS
    }


def _write_linears(
    folder: Path, linears: dict[str, nn.Linear], statistics: dict[str, ChannelStatistics]
) -> None:

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
    write_record(Linears(linears=rows), folder / FILENAME, schema=SCHEMA)
