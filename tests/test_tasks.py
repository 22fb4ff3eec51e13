"""Tasks on the artifact: the harness's scores, with no network, for every kind of request."""

from __future__ import annotations

import json
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from nmexport.errors import EnvironmentFault, RecipeError, UserError
from nmexport.generation import load_tokenizer
from nmexport.progress import Silent
from nmexport.recipe import EvaluationSection
from nmexport.runtimes.onnxruntime import OrtSession
from nmexport.verification import tasks
from nmexport.verification.likelihood import ScoredText, scores
from nmexport.verification.reference import TorchSession

from tests.exported import Exported, export_folder
from tests.task_suite import CHOICE, CONTINUE, ROLLING, write_suite
from tests.tiny import VOCABULARY

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytest.importorskip("lm_eval", reason="the optional package of `nmexport[tasks]`")
TIGHT = 2e-5


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No hub; `datasets` keeps what it converts in a folder of the test's own."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="module")
def suite_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_suite(tmp_path_factory.mktemp("suite"))


@pytest.fixture(scope="module")
def exported(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_folder(tiny_llama, tmp_path_factory.mktemp("exported"))


@pytest.fixture(scope="module")
def text(tiny_llama: Path) -> tasks.TextSide:
    config = json.loads((tiny_llama / "config.json").read_text("utf-8"))
    return tasks.text_side(load_tokenizer(tiny_llama), config)


@pytest.fixture(scope="module")
def scored(exported: Exported, text: tasks.TextSide, suite_folder: Path) -> dict[str, Any]:
    with OrtSession(exported.dense_model) as dense, OrtSession(exported.model) as sparse:
        suite = tasks.Suite(names=(), folder=suite_folder)
        return tasks.compare(dense, sparse, text, suite, progress=Silent())


def harness_scores(model: Any, tokenizer: Any, folder: Path) -> dict[str, Any]:
    """What the harness itself makes of a torch module, through its own Hugging Face adapter."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        patch.chdir(folder)
        found = simple_evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, device="cpu"),
            tasks=[CHOICE, ROLLING, CONTINUE],
            task_manager=TaskManager(include_path=".", include_defaults=False),
        )
    return found["results"]


@pytest.mark.parametrize("side", ["dense", "sparse"])
def test_the_artifact_scores_as_the_torch_module_does(
    scored: dict[str, Any],
    exported: Exported,
    text: tasks.TextSide,
    suite_folder: Path,
    side: str,
) -> None:
    expected = harness_scores(getattr(exported, side), text.tokenizer, suite_folder)
    for task, metrics in (
        (CHOICE, ("acc", "acc_norm")),
        (ROLLING, ("word_perplexity", "bits_per_byte")),
        (CONTINUE, ("exact_match",)),
    ):
        for metric in metrics:
            ours = scored[task]["metrics"][metric]
            assert ours[side] == pytest.approx(expected[task][f"{metric},none"], rel=TIGHT)
            stderr = expected[task][f"{metric}_stderr,none"]
            if not isinstance(stderr, str):
                assert ours[f"{side}_stderr"] == pytest.approx(stderr, abs=1e-12)


def test_the_two_sides_are_two_models(scored: dict[str, Any]) -> None:
    perplexity = scored[ROLLING]["metrics"]["word_perplexity"]
    assert perplexity["sparse"] > 1.01 * perplexity["dense"]


def test_an_entry_has_the_contracts_keys_and_both_errors(scored: dict[str, Any]) -> None:
    entry = scored[CHOICE]
    assert entry["n"] == 6
    assert entry["metric"] == "acc"
    assert entry["stderr"] == entry["sparse_stderr"] > 0
    assert entry["dense_stderr"] > 0
    assert entry["dense"] == entry["metrics"]["acc"]["dense"]


def test_requests_of_each_kind_agree_one_by_one(
    exported: Exported, text: tasks.TextSide, suite_folder: Path
) -> None:
    """Aggregates of six questions forgive much; single answers do not."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from nmexport.verification.tasks_adapter import SessionLM

    pairs = [
        ("The quick brown", " fox jumps over"),
        ("", "per token"),
        ("A model reads ", "weights"),
        ("Keep", " the"),
        ("Keep", " zero"),
        ("per token. " * 80, " group"),  # longer than the window
    ]
    asked = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    stop = {"until": ["."], "max_gen_toks": 9, "do_sample": False}
    continued = [
        Instance("generate_until", {}, (context, stop), 0)
        for context in ("The quick", "A model", "every group, per", "x", "per token. " * 80)
    ]
    theirs = HFLM(pretrained=exported.sparse, tokenizer=text.tokenizer, batch_size=1, device="cpu")
    with OrtSession(exported.model) as session, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = SessionLM(session, text, stepwise=False, progress=Silent(), label="")
        for mine, other in zip(ours.loglikelihood(asked), theirs.loglikelihood(asked), strict=True):
            assert mine[0] == pytest.approx(other[0], rel=TIGHT)
            assert mine[1] == other[1]
        assert ours.generate_until(continued) == theirs.generate_until(continued)


def test_verify_reports_tasks_and_decode_only(
    tiny_llama: Path, suite_folder: Path, tmp_path: Path
) -> None:
    """The whole way: options, stages, the engine's own sessions, report and pages."""
    from click.testing import CliRunner
    from nmexport.cli.main import cli

    text = tmp_path / "text.txt"
    text.write_text("Keep the largest scores of every group, per token.\n" * 60, "utf-8")
    done = CliRunner().invoke(
        cli,
        [
            "build", "--to", "verify", "--model", str(tiny_llama), "--work", str(tmp_path / "w"),
            "--calib", str(text), "--calib-samples", "2", "--calib-length", "24",
            "--calib-self-share", "0", "--eval-data", str(text), "--eval-windows", "2",
            "--eval-length", "24", "--criterion", "act", "--mitigation", "var",
            "--grouping", "balanced", "--tasks", f"{CHOICE},{ROLLING}",
            "--tasks-path", str(suite_folder), "--task-limit", "3",
        ],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    accuracy = json.loads((tmp_path / "w" / "report.json").read_text("utf-8"))["accuracy"]
    assert set(accuracy["tasks"]) == {CHOICE, ROLLING}
    for entry in accuracy["tasks"].values():
        assert {"dense", "sparse", "stderr", "n"} <= set(entry)
        assert entry["n"] == 3
    assert accuracy["decode_only"]["tokens"] == accuracy["second_half"]["tokens"] == 2 * 11
    assert "lm-evaluation-harness" in accuracy["tasks_protocol"]
    page = (tmp_path / "w" / "report.md").read_text("utf-8")
    assert f"| {ROLLING}, word_perplexity | 3 |" in page
    assert "Sparse in decode only" in page
    assert CHOICE in done.stdout


def test_step_by_step_is_the_same_where_phases_do_not_differ(
    exported: Exported, text: tasks.TextSide, suite_folder: Path, scored: dict[str, Any]
) -> None:
    with OrtSession(exported.dense_model) as dense, OrtSession(exported.model) as sparse:
        suite = tasks.Suite(names=(ROLLING, CHOICE), folder=suite_folder)
        stepwise = tasks.compare(dense, sparse, text, suite, phases="decode", progress=Silent())
    for task in (ROLLING, CHOICE):
        assert stepwise[task]["sparse"] == pytest.approx(scored[task]["sparse"], rel=TIGHT)


def test_limit_and_fewshot_reach_the_harness(
    exported: Exported, text: tasks.TextSide, suite_folder: Path
) -> None:
    suite = tasks.Suite(names=(CHOICE,), folder=suite_folder, limit=2, fewshot=1)
    with TorchSession(exported.dense, VOCABULARY) as dense:
        found = tasks.compare(dense, dense, text, suite, progress=Silent())
    assert found[CHOICE]["n"] == 2
    assert found[CHOICE]["difference_stderr"] == 0.0


def test_an_unknown_task_names_its_neighbours(suite_folder: Path) -> None:
    from lm_eval.tasks import TaskManager

    with pytest.MonkeyPatch.context() as patch:
        # The harness's own index takes seconds to read.
        patch.setattr(
            "lm_eval.tasks.TaskManager",
            lambda include_path, include_defaults=False: TaskManager(
                include_path=include_path, include_defaults=False
            ),
        )
        patch.chdir(suite_folder)
        with pytest.raises(RecipeError, match="local_choise") as caught:
            tasks._manager(tasks.Suite(names=("local_choise",), folder=suite_folder))
    assert CHOICE in str(caught.value.fix)


@pytest.mark.parametrize("contents", [None, {}], ids=["missing", "empty"])
def test_a_folder_without_tasks_is_refused(
    tmp_path: Path, contents: object, exported: Exported, text: tasks.TextSide
) -> None:
    folder = tmp_path / "suite"
    if contents is not None:
        folder.mkdir()
    with TorchSession(exported.dense, VOCABULARY) as dense, pytest.raises(RecipeError):
        tasks.compare(dense, dense, text, tasks.Suite(names=(), folder=folder), progress=Silent())


def test_data_out_of_reach_is_the_environments_fault(
    tmp_path: Path, exported: Exported, text: tasks.TextSide
) -> None:
    folder = write_suite(tmp_path / "suite")
    (folder / "questions.jsonl").unlink()
    suite = tasks.Suite(names=(CHOICE,), folder=folder)
    with (
        TorchSession(exported.dense, VOCABULARY) as dense,
        pytest.raises(EnvironmentFault, match=CHOICE),
    ):
        tasks.compare(dense, dense, text, suite, progress=Silent())


def test_the_identity_follows_the_files(tmp_path: Path) -> None:
    folder = write_suite(tmp_path / "suite")
    section = EvaluationSection(tasks_path=str(folder))
    before = tasks.identity(tasks.Suite.of(section))
    assert before == tasks.identity(tasks.Suite.of(section))
    with (folder / "texts.jsonl").open("a", encoding="utf-8") as stream:
        stream.write('{"text": "more"}\n')
    assert tasks.identity(tasks.Suite.of(section)) != before


def test_no_tasks_is_no_suite() -> None:
    assert tasks.Suite.of(EvaluationSection()) is None
    assert tasks.identity(None) is None


def test_without_the_harness_the_message_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from importlib import metadata

    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(EnvironmentFault, match=r"nmexport\[tasks\]"):
        tasks.harness_version()


def test_a_request_that_does_not_fit_is_said(exported: Exported, text: tasks.TextSide) -> None:
    from lm_eval.api.instance import Instance
    from nmexport.verification.tasks_adapter import SessionLM

    with TorchSession(exported.dense, VOCABULARY) as session:
        model = SessionLM(session, text, stepwise=False, progress=Silent(), label="")
        long = Instance("loglikelihood", {}, ("x", " per token" * 400), 0)
        with pytest.raises(UserError, match="does not fit"):
            model.loglikelihood([long])
        greedy = {"until": [], "max_gen_toks": 10_000}
        with pytest.raises(UserError, match="10000 new tokens"):
            model.generate_until([Instance("generate_until", {}, ("x", greedy), 0)])


def test_the_window_comes_from_the_config_then_the_tokenizer(text: tasks.TextSide) -> None:
    tokenizer = text.tokenizer
    assert tasks.text_side(tokenizer, {"text_config": {"n_ctx": 9}}).max_length == 9
    assert tasks.text_side(tokenizer, {}).max_length == 2048
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "model_max_length", 77)
        assert tasks.text_side(tokenizer, {}).max_length == 77


def test_the_context_is_cut_from_the_left() -> None:
    fitted = ScoredText.fitted([1, 2, 3, 4], [5, 6], max_length=3)
    assert fitted.context == (3, 4)
    assert fitted.read == (3, 4, 5)
    with pytest.raises(ValueError, match="cannot be scored"):
        ScoredText.fitted([], [5], max_length=3)


def test_equal_requests_are_answered_once(exported: Exported) -> None:
    seen: list[int] = []

    class Counting(TorchSession):
        def prefill(self, input_ids: np.ndarray) -> np.ndarray:
            seen.append(len(input_ids))
            return super().prefill(input_ids)

    # One question, two answers of a token each: the model reads the same tokens for both.
    texts = [ScoredText((7, 8), (9,)), ScoredText((7, 8), (10,)), ScoredText((7, 8), (9,))]
    advanced: list[None] = []
    with Counting(exported.dense, VOCABULARY) as session:
        found = scores(session, texts, stepwise=False, advance=lambda: advanced.append(None))
    assert seen == [1]
    assert found[0] == found[2] != found[1]
    assert len(advanced) == 3


def test_a_paired_error_is_smaller_than_the_errors_it_pairs() -> None:
    dense, sparse = [1.0, 0.0, 1.0, 1.0], [1.0, 0.0, 1.0, 0.0]
    differences = np.subtract(sparse, dense)
    expected = differences.std(ddof=1) / 2
    assert tasks.paired_stderr(dense, sparse) == pytest.approx(expected)
    assert tasks.paired_stderr([1.0], [0.0]) is None
