"""Layer by layer is the whole model, bit for bit, in the memory of a layer."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from nmexport.errors import CorpusError, ModelError, WorkDirectoryError
from nmexport.models.layerwise import LayerwiseModel
from nmexport.models.loader import load_model
from nmexport.models.offload import (
    Memory,
    device_map,
    free_memory,
    is_placed,
    open_dense,
    parameter_count,
    placement,
    whole_device,
)
from nmexport.models.skeleton import skeleton
from nmexport.models.source import ModelSource, resolve
from nmexport.models.swap import replace_linears
from nmexport.progress import Silent
from nmexport.recipe import ModelSection
from nmexport.recipe import resolve as resolve_recipe
from nmexport.selection import Selection
from nmexport.sparsity.linear import Behaviour, Constants
from nmexport.sparsity.targets import linears_of
from nmexport.stages import calibrate
from nmexport.store.scratch import scratch_array

from tests.support.exported import PATTERN
from tests.support.pipelines import pipeline_in
from tests.support.tiny import FAMILIES, VOCABULARY, save_tiny_model, save_tokenizer
from tests.support.unfolded import folded_linear

if TYPE_CHECKING:
    from pathlib import Path

SAMPLES = torch.randint(3, VOCABULARY, (3, 24), generator=torch.Generator().manual_seed(5))


def source_of(folder: Path) -> ModelSource:
    return resolve(ModelSection(id=str(folder)))


def seen_inputs(model: Any) -> dict[str, list[torch.Tensor]]:
    """What reaches each linear from now on."""
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in linears_of(model)}
    for name, linear in linears_of(model).items():
        linear.register_forward_pre_hook(
            lambda _, arguments, name=name: seen[name].append(arguments[0].detach().clone())
        )
    return seen


def layerwise_logits(model: LayerwiseModel, **options: Any) -> list[torch.Tensor]:
    logits: dict[int, torch.Tensor] = {}
    model.run(
        SAMPLES,
        progress=Silent(),
        label="test",
        use_logits=lambda number, one: logits.__setitem__(number, one.clone()),
        **options,
    )
    return [logits[number] for number in range(len(SAMPLES))]


def whole_logits(model: Any, kept: int = 0) -> list[torch.Tensor]:
    with torch.inference_mode():
        return [
            model(input_ids=one[None], use_cache=False, logits_to_keep=kept).logits[0]
            for one in SAMPLES
        ]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_same_bits(family: str, tmp_path: Path) -> None:
    save_tiny_model(tmp_path, family)
    source = source_of(tmp_path)
    whole, layered = load_model(source), LayerwiseModel(source)
    expected_inputs, inputs = seen_inputs(whole), seen_inputs(layered.model)
    expected = whole_logits(whole, kept=5)
    for mine, other in zip(layerwise_logits(layered, logits_kept=5), expected, strict=True):
        assert torch.equal(mine, other)
    assert list(inputs) == list(expected_inputs)
    for name, seen in inputs.items():
        assert len(seen) == len(SAMPLES), name
        for mine, other in zip(seen, expected_inputs[name], strict=True):
            assert torch.equal(mine, other), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shards_in_half_precision_and_untied_heads(dtype: torch.dtype, tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "whole", "llama", tie_word_embeddings=False)
    model = load_model(source_of(tmp_path / "whole"), dtype=dtype)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    source = source_of(tmp_path)
    for mine, other in zip(
        layerwise_logits(LayerwiseModel(source), logits_kept=0),
        whole_logits(load_model(source)),
        strict=True,
    ):
        assert torch.equal(mine, other)


def test_only_one_layer_is_in_memory(tiny_llama: Path) -> None:
    layered = LayerwiseModel(source_of(tiny_llama))
    held: set[frozenset[str]] = set()

    def look() -> None:
        held.add(
            frozenset(
                name.split(".")[2]
                for name, parameter in layered.model.named_parameters()
                if name.startswith("model.layers.") and not parameter.is_meta
            )
        )

    layered.run(SAMPLES, progress=Silent(), label="test", after=look)
    assert held == {frozenset("0"), frozenset("1"), frozenset()}
    assert all(parameter.is_meta for parameter in layered.model.parameters())


@pytest.mark.parametrize("head", ["dense", "tied", "untied"])
def test_substitutes_are_the_model_with_those_modules(head: str, tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "llama", tie_word_embeddings=head != "untied")
    source = source_of(tmp_path)
    sparse = load_model(source)
    names = [name for name in linears_of(sparse) if head != "dense" or name != "lm_head"]
    folded = {
        name: folded_linear(sparse.get_submodule(name), Behaviour(pattern=PATTERN), Constants())
        for name in names
    }
    replace_linears(sparse, folded)
    layered = LayerwiseModel(source)
    substitutes = {name: lambda name=name: folded[name] for name in names}
    for mine, other in zip(
        layerwise_logits(layered, logits_kept=0, substitutes=substitutes),
        whole_logits(sparse),
        strict=True,
    ):
        assert torch.equal(mine, other)
    dense = layerwise_logits(layered, logits_kept=0)  # and they are gone afterwards
    assert torch.equal(dense[0], whole_logits(load_model(source))[0])


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("gemma4_text", "they are given more of a text than its hidden states"),
        ("gpt_neox_japanese", "something is computed between them"),
    ],
)
def test_layers_that_are_no_plain_list(family: str, why: str, tmp_path: Path) -> None:
    """Running them so would give other statistics, and nothing would say so."""
    save_tiny_model(tmp_path, family)
    model = LayerwiseModel(resolve(ModelSection(id=str(tmp_path))))
    samples = torch.arange(3, 35).reshape(2, 16)
    with pytest.raises(ModelError, match=f"{family}.* cannot be run one by one: {why}"):
        model.run(samples, progress=Silent(), label="")


def test_a_gguf_is_refused() -> None:
    source = ModelSource(id="m", revision=None, folder=None, gguf_file="m.gguf", digest="0")
    with pytest.raises(ModelError, match="gguf"):
        LayerwiseModel(source)
    with pytest.raises(ModelError, match="gguf"):
        placement(source, "layerwise", 10, Memory(host=1))


def test_weights_under_other_names_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(tiny_llama / "model.safetensors")
    moved = {name.replace("q_proj", "query"): tensor for name, tensor in tensors.items()}
    save_file(moved, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((tiny_llama / "config.json").read_bytes())
    source = ModelSource(id="m", revision=None, folder=tmp_path, gguf_file=None, digest="0")
    with pytest.raises(ModelError, match="q_proj"):
        LayerwiseModel(source)


@pytest.mark.parametrize(
    ("offload", "gguf", "memory", "expected"),
    [
        ("never", None, Memory(host=1), "whole"),
        ("auto", None, Memory(host=5000), "whole"),
        ("auto", None, Memory(host=4000), "layerwise"),
        ("auto", None, Memory(host=100, devices=(2500, 2500)), "mapped"),
        ("auto", None, Memory(host=4000, devices=(2000, 2000)), "layerwise"),
        ("auto", None, Memory(host=100, devices=(200,)), "layerwise"),
        ("auto", "m.gguf", Memory(host=4000), "whole"),  # all that can be tried
        # Read into a GPU where it also has room to learn, whatever the host has.
        ("auto", None, Memory(host=10**6, devices=(7000,)), "device"),
        ("never", None, Memory(host=1, devices=(7000, 10)), "device"),
        ("auto", None, Memory(host=10**6, devices=(6999,)), "whole"),
        ("auto", None, Memory(host=1, devices=(10, 7000)), "mapped"),
        ("layerwise", None, Memory(host=1, devices=(7000,)), "layerwise"),
        ("layerwise", None, Memory(host=10**12), "layerwise"),
    ],
)
def test_where_a_model_goes(
    offload: Any, gguf: str | None, memory: Memory, expected: str, tmp_path: Path
) -> None:
    source = ModelSource(id="m", revision=None, folder=tmp_path, gguf_file=gguf, digest="0")
    assert placement(source, offload, 1000, memory) == expected


def test_a_skeleton_counts_what_the_model_holds(tiny_llama: Path) -> None:
    source = source_of(tiny_llama)
    assert parameter_count(LayerwiseModel(source).model) == parameter_count(load_model(source))


@pytest.mark.parametrize("family", FAMILIES)
def test_gpus_share_a_model_by_whole_layers(family: str, tmp_path: Path) -> None:
    save_tiny_model(tmp_path, family)
    model = skeleton(source_of(tmp_path))
    size = 4 * parameter_count(model)
    placed = device_map(model, (size, size))
    assert set(placed.values()) == {0, 1}
    for name, _ in model.named_parameters():
        assert sum(name == part or name.startswith(f"{part}.") for part in placed) == 1, name
    assert not any(".self_attn" in part or ".mlp" in part for part in placed)
    assert device_map(model, (size // 4, size // 4)) is None
    assert set(device_map(model, (2 * size,)).values()) == {0}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog.\n" * 40, "utf-8")
    return path


def calibrated(model: Path, work: Path, **changes: Any) -> calibrate.Artifact:
    dotted = {
        "calibration.samples": 3,
        "calibration.length": 24,
        "calibration.self_share": 0,
        "sparsity.criterion": "act",
        "sparsity.mitigations": ["var"],
        **{f"calibration.{name}": value for name, value in changes.items()},
    }
    recipe = resolve_recipe(str(model), dotted)
    pipeline = pipeline_in(work, recipe)
    pipeline.run(Selection(last="calibrate"))
    return calibrate.Artifact(pipeline.work.require("calibrate"))


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_calibration_layer_by_layer_writes_the_same_bytes(
    family: str, text: Path, tmp_path: Path
) -> None:
    save_tiny_model(tmp_path / "model", family)
    whole, layered = (
        calibrated(tmp_path / "model", tmp_path / offload, corpus=str(text), offload=offload)
        for offload in ("never", "layerwise")
    )
    # Neither is keyed by how it ran: both are the same artifact.
    assert whole.path.name == layered.path.name
    for file in (calibrate.STATISTICS, calibrate.SAMPLES, "layers.json"):
        assert (whole.path / file).read_bytes() == (layered.path / file).read_bytes()


def test_a_model_that_does_not_fit_is_calibrated_layer_by_layer(
    tiny_llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def whole(*_: object, **__: object) -> None:
        raise AssertionError("loaded whole")

    monkeypatch.setattr("nmexport.models.offload.free_memory", lambda: Memory(host=100_000))
    monkeypatch.setattr("nmexport.models.loader.load_model", whole)
    found = calibrated(tiny_llama, tmp_path / "work", corpus=str(text))
    assert all(linear.tokens for linear in found.linears)


def test_a_model_layer_by_layer_writes_no_text(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="cannot write its own text") as caught:
        calibrated(tiny_llama, tmp_path / "work", corpus="self", offload="layerwise")
    assert "--calib-self-share 0" in str(caught.value.fix)


def built(model: Path, work: Path, text: Path, **dotted: Any) -> Path:
    """The fold artifact of a model."""
    options = {
        "calibration.corpus": str(text),
        "calibration.samples": 3,
        "calibration.length": 24,
        "calibration.self_share": 0,
        "sparsity.criterion": "act",
        "sparsity.mitigations": ["var", "r-sparse"],
        "sparsity.grouping": "balanced",
        **dotted,
    }
    recipe = resolve_recipe(str(model), options)
    pipeline = pipeline_in(work, recipe)
    pipeline.run(Selection(last="fold"))
    return pipeline.work.require("fold")


def same_fold(one: Path, other: Path) -> bool:
    return all(
        (one / file).read_bytes() == (other / file).read_bytes()
        for file in ("model.safetensors", "layers.json")
    )


def test_a_model_with_a_part_that_no_gpu_holds_is_folded_layer_by_layer(
    tiny_llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Together the GPUs have room; Accelerate would keep a part on the host all the same."""
    expected = built(tiny_llama, tmp_path / "whole", text)
    size = 4 * parameter_count(skeleton(source_of(tiny_llama)))
    memory = Memory(host=size, devices=(size // 8,) * 12)
    monkeypatch.setattr("nmexport.models.offload.free_memory", lambda: memory)
    assert placement(source_of(tiny_llama), "auto", size // 4, memory) == "mapped"
    assert same_fold(built(tiny_llama, tmp_path / "work", text), expected)


@pytest.mark.parametrize("mitigations", [["var", "r-sparse"], ["l-pts", "bias"]])
def test_a_model_that_accelerate_places_is_folded_where_it_is(
    tiny_llama: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mitigations: list[str],
) -> None:
    """Dispatched as over GPUs, with hooks around every layer, to this machine's only device."""
    from accelerate import dispatch_model

    changes = {
        "sparsity.mitigations": mitigations,
        "sparsity.grouping": "balanced",
        "calibration.samples": 8,
        "calibration.length": 32,
        "sparsity.effort": "fast",
    }
    expected = built(tiny_llama, tmp_path / "whole", text, **changes)
    memory = Memory(host=100_000, devices=(500_000, 500_000))
    asked: list[dict[str, int]] = []

    def dispatched(source: ModelSource, *, placing: dict[str, Any], **options: Any) -> Any:
        asked.append(placing["device_map"])
        parts = dict.fromkeys(placing["device_map"], "cpu")
        model = dispatch_model(load_model(source, **options), parts, force_hooks=True)
        assert is_placed(model)
        return model

    monkeypatch.setattr("nmexport.models.offload.free_memory", lambda: memory)
    monkeypatch.setattr("nmexport.models.loader.load_model", dispatched)
    assert same_fold(built(tiny_llama, tmp_path / "work", text, **changes), expected)
    assert [set(placed.values()) for placed in asked] == [{0, 1}] * 2  # calibrate and fold


def test_hidden_states_wait_where_the_stage_writes_and_leave_nothing(
    tiny_llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[Path] = []

    def seen(shape: tuple[int, ...], folder: Path | None) -> Any:
        used.append(folder)
        array = scratch_array(shape, folder)
        assert list(folder.iterdir()) == []  # a file without a name
        return array

    monkeypatch.setattr("nmexport.models.hidden_states.scratch_array", seen)
    calibrated(tiny_llama, tmp_path / "w", corpus=str(text), offload="layerwise")
    assert {folder.parent for folder in used} == {tmp_path / "w" / "calibrate"}


def test_a_disk_without_room_is_said_before_the_work(
    tiny_llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(WorkDirectoryError, match="is full"):
        calibrated(tiny_llama, tmp_path / "w", corpus=str(text), offload="layerwise")


def test_free_memory_is_that_of_this_machine() -> None:
    memory = free_memory()
    assert memory.host > 1 << 20
    assert len(memory.devices) == torch.cuda.device_count()


_WATCHED = """
import json, sys, threading, time
from pathlib import Path

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))

peak = 0
def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.002)

import torch
before = anonymous()
threading.Thread(target=watch, daemon=True).start()
"""
_RUN = """
from nmexport.models.layerwise import LayerwiseModel
from nmexport.models.source import ModelSource
from nmexport.progress import Silent

source = ModelSource(id="m", revision=None, folder=Path(sys.argv[1]), gguf_file=None, digest="0")
LayerwiseModel(source).run(torch.randint(3, 999, (4, 64)), progress=Silent(), label="")
"""
_BUILD = """
from nmexport.cli.main import cli

cli(
    ["build", "--to", "fold", "--model", sys.argv[1], "--work", sys.argv[2], "--calib", sys.argv[3],
     "--calib-samples", "1", "--calib-length", "32", "--calib-self-share", "0",
     "--offload", "layerwise", "--dtype", "bfloat16", "--criterion", "act", "--mitigation", "var",
     "--grouping", "balanced"],
    standalone_mode=False,
)
"""
_TELL = """
print(json.dumps(peak - before))
"""


def anonymous_peak(program: str, *arguments: Path) -> int:
    """Memory that a program took which no file backs, at most, in bytes."""
    done = subprocess.run(
        [sys.executable, "-c", _WATCHED + program + _TELL, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.slow
def test_a_billion_parameters_take_the_memory_of_a_layer(tmp_path: Path) -> None:
    from tests.support.large import save_large_model

    parameters = save_large_model(tmp_path)
    assert parameters > 1_000_000_000
    # The whole model in float32 would take 4 bytes a parameter.
    assert anonymous_peak(_RUN, tmp_path) < 0.25 * 4 * parameters


@pytest.mark.slow
def test_layers_as_wide_as_a_7b_are_calibrated_and_folded_in_little_memory(
    text: Path, tmp_path: Path
) -> None:
    """What a 7B takes beyond this is its output embedding, 0.5 GB; deeper takes no more."""
    from tests.support.large import WIDE, save_large_model

    save_large_model(tmp_path / "model", **WIDE)
    save_tokenizer(tmp_path / "model")
    assert anonymous_peak(_BUILD, tmp_path / "model", tmp_path / "work", text) < 3.5e9


def test_a_budget_is_refused_before_calibration(
    tiny_llama: Path, text: Path, tmp_path: Path
) -> None:
    recipe = resolve_recipe(
        str(tiny_llama),
        {
            "calibration.offload": "layerwise",
            "calibration.corpus": str(text),
            "calibration.samples": 3,
            "calibration.length": 24,
            "allocation.budget.max_kl": 0.1,
        },
    )
    pipeline = pipeline_in(tmp_path / "work", recipe)
    with pytest.raises(ModelError, match="--budget cannot"):
        pipeline.run(Selection(last="calibrate"))


@pytest.mark.parametrize("offload", ["auto", "never"])
def test_a_model_that_a_gpu_holds_is_read_straight_into_it(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, offload: Any
) -> None:
    size = 4 * parameter_count(skeleton(source_of(tiny_llama)))
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(
        "nmexport.models.offload.free_memory", lambda: Memory(host=1 << 40, devices=(2 * size,))
    )
    monkeypatch.setattr(
        "nmexport.models.loader.load_model", lambda _, **options: asked.append(options)
    )
    opened = open_dense(source_of(tiny_llama), offload=offload, progress=Silent())
    assert opened.layerwise is None
    assert [options["device"] for options in asked] == ["cuda"]
    assert whole_device(source_of(tiny_llama), offload=offload) == "cuda"
