"""How much of parity runs: all of a small model, the same part of a large one every time."""

from __future__ import annotations

import pytest
from nmexport.sparsity.pattern import NMPattern
from nmexport.store.layers import LayerSpec
from nmexport.verification.extent import LINEAR_WORK, Extent, extent_of

# Of a layer of Mistral 7B: q, k, v, o, gate, up, down.
MISTRAL = (
    *((4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096)),
    *((4096, 14336), (4096, 14336), (14336, 4096)),
)
SMOLLM2 = ((576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576))


def linears(shapes: tuple[tuple[int, int], ...], layers: int) -> list[LayerSpec]:
    return [
        LayerSpec(
            name=f"layers.{layer}.{place}",
            in_features=inputs,
            out_features=outputs,
            pattern=NMPattern(8, 16),
            criterion="act",
        )
        for layer in range(layers)
        for place, (inputs, outputs) in enumerate(shapes)
    ]


def chosen(
    shapes: tuple[tuple[int, int], ...], layers: int, device: str, *, prompts: int = 8
) -> Extent:
    return extent_of(
        linears(shapes, layers),
        device=device,  # type: ignore[arg-type]
        prompts=prompts,
        prompt_tokens=32,
        steps=64,
    )


@pytest.mark.parametrize(
    ("shapes", "layers", "device"),
    [(SMOLLM2, 30, "cpu"), (MISTRAL, 4, "cpu"), (MISTRAL, 32, "cuda")],
)
def test_all_of_it_runs_where_it_takes_minutes(
    shapes: tuple[tuple[int, int], ...], layers: int, device: str
) -> None:
    extent = chosen(shapes, layers, device)
    assert extent.is_whole
    assert (extent.prompts, extent.steps, len(extent.linears)) == (8, 64, 7 * layers)
    assert f"on the {'GPU' if device == 'cuda' else 'CPU'}, on all of 8 prompts" in extent.words()


def test_a_large_model_on_a_cpu_is_compared_in_part() -> None:
    extent = chosen(MISTRAL, 32, "cpu")
    assert extent == chosen(MISTRAL, 32, "cpu")
    assert (extent.prompts, extent.steps) == (1, 64)
    weights = sum(each.in_features * each.out_features for each in extent.linears)
    assert 0.9 * LINEAR_WORK["cpu"] < weights <= LINEAR_WORK["cpu"]
    names = [each.name for each in extent.linears]
    assert names == [each.name for each in linears(MISTRAL, 32) if each.name in set(names)]
    for kind in range(7):  # each kind of linear as often as it is there, all over the model
        places = [int(name.split(".")[1]) for name in names if name.endswith(f".{kind}")]
        assert len(places) >= 7
        assert min(places) < 6
        assert max(places) >= 24
    assert "1 of 8 prompts, 64 of 64 steps" in extent.words()
    assert f"{len(names)} of 224 linears" in extent.words()


def test_however_large_something_is_compared() -> None:
    wide = tuple((inputs * 64, outputs * 64) for inputs, outputs in MISTRAL)
    extent = chosen(wide, 2, "cpu")
    assert (extent.prompts, extent.steps, len(extent.linears)) == (1, 8, 1)
    few = extent_of(linears(wide, 2), device="cpu", prompts=1, prompt_tokens=32, steps=3)
    assert few.steps == 3
