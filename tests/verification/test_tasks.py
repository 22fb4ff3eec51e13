"""Tasks on the artifact: the harness's scores, with no network, for every kind of request."""

from __future__ import annotations

import json
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from nmexport.errors import EnvironmentFault, RecipeError, UserError
from nmexport.generation.tokenizer import Tokenizer
from nmexport.progress import Silent
from nmexport.recipe import EvaluationSection
from nmexport.runtimes import native
from nmexport.runtimes.onnxruntime_session import OrtSession
from nmexport.runtimes.session import Limits
from nmexport.verification import suite as suites
from nmexport.verification import tasks
from nmexport.verification.likelihood import ScoredText, scores
from nmexport.verification.reference import TorchSession

from tests.support.exported import Exported, export_folder
from tests.support.task_suite import CHOICE, CONTINUE, ROLLING, write_suite
from tests.support.tiny import VOCABULARY

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
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
    return tasks.text_side(Tokenizer(tiny_llama), config)


@pytest.fixture(scope="module", params=["function bodies", "native op"])
def scored(
    exported: Exported, text: tasks.TextSide, suite_folder: Path, request: pytest.FixtureRequest
) -> dict[str, Any]:
    library = None
    if request.param == "native op":
        if native.find_library() is None:
            pytest.skip(f"no native library: {native.why_missing()}")
        library = native.require_library()
    with (
        OrtSession(exported.dense_model) as dense,
        OrtSession(exported.model, library=library) as sparse,
    ):
        suite = suites.Suite(names=(), folder=suite_folder)
        return tasks.compare(dense, sparse, text, suite, progress=Silent())


class Small(TorchSession):
    """A session built for little, as a TensorRT engine is: more than that is an error."""

    limits = Limits(batch=3, tokens=40)

    def prefill(self, input_ids: np.ndarray) -> np.ndarray:
        self.length = 0
        return self._checked(input_ids, super().prefill)

    def decode_step(self, input_ids: np.ndarray) -> np.ndarray:
        return self._checked(input_ids, super().decode_step)

    def _checked(self, input_ids: np.ndarray, run: Callable[[np.ndarray], np.ndarray]) -> Any:
        self.length += input_ids.shape[1]
        assert len(input_ids) <= self.limits.batch
        assert self.length <= self.limits.tokens
        self.largest = max(getattr(self, "largest", 0), len(input_ids))
        return run(input_ids)


@pytest.fixture
def their_tokenizer(tiny_llama: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_llama)


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
    their_tokenizer: Any,
    suite_folder: Path,
    side: str,
) -> None:
    expected = harness_scores(getattr(exported, side), their_tokenizer, suite_folder)
    for task, metrics in (
        (CHOICE, ("acc", "acc_norm")),
        (ROLLING, ("word_perplexity", "bits_per_byte")),
        (CONTINUE, ("exact_match",)),
    ):
        for metric in metrics:
            ours = scored[task].metrics[metric]
            assert getattr(ours, side) == pytest.approx(expected[task][f"{metric},none"], rel=TIGHT)
            stderr = expected[task][f"{metric}_stderr,none"]
            if not isinstance(stderr, str):
                assert getattr(ours, f"{side}_stderr") == pytest.approx(stderr, abs=1e-12)


def test_the_two_sides_are_two_models(scored: dict[str, Any]) -> None:
    perplexity = scored[ROLLING].metrics["word_perplexity"]
    assert perplexity.sparse > 1.01 * perplexity.dense


def test_an_entry_has_the_contracts_keys_and_both_errors(scored: dict[str, Any]) -> None:
    entry = scored[CHOICE]
    assert entry.n == 6
    assert entry.metric == "acc"
    assert entry.stderr == entry.sparse_stderr > 0
    assert entry.dense_stderr > 0
    assert entry.dense == entry.metrics["acc"].dense


def test_requests_of_each_kind_agree_one_by_one(
    exported: Exported, text: tasks.TextSide, suite_folder: Path, their_tokenizer: Any
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
    theirs = HFLM(pretrained=exported.sparse, tokenizer=their_tokenizer, batch_size=1, device="cpu")
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
        suite = suites.Suite(names=(ROLLING, CHOICE), folder=suite_folder)
        stepwise = tasks.compare(dense, sparse, text, suite, phases="decode", progress=Silent())
    for task in (ROLLING, CHOICE):
        assert stepwise[task].sparse == pytest.approx(scored[task].sparse, rel=TIGHT)


@pytest.mark.parametrize("phases", ["all", "decode"])
def test_both_models_are_asked_what_the_engine_was_built_for(
    exported: Exported, text: tasks.TextSide, suite_folder: Path, phases: Any
) -> None:
    suite = suites.Suite(names=(), folder=suite_folder)
    with (
        TorchSession(exported.dense, VOCABULARY) as dense,
        Small(exported.dense, VOCABULARY) as sparse,
    ):
        found = tasks.compare(dense, sparse, text, suite, phases=phases, progress=Silent())
        assert sparse.largest == 3
        told = tasks.protocol(phases, text, dense, sparse)
        assert "holds 40 tokens, fewer than the model's 256" in told
        assert "holds" not in tasks.protocol(phases, text, dense)
    for entry in found.values():  # one model, read in the same pieces
        assert entry.sparse == pytest.approx(entry.dense, rel=TIGHT)


def test_what_an_engine_is_too_small_for_names_the_engine(
    exported: Exported, text: tasks.TextSide
) -> None:
    from lm_eval.api.instance import Instance
    from nmexport.verification.tasks_adapter import SessionLM

    greedy = {"until": [], "max_gen_toks": 60}
    with Small(exported.dense, VOCABULARY) as session:
        model = SessionLM(session, text, stepwise=False, progress=Silent(), label="")
        with pytest.raises(UserError, match="a window of 40") as caught:
            model.generate_until([Instance("generate_until", {}, ("x", greedy), 0)])
        assert "engine.max_context" in str(caught.value.fix)
        long = Instance("loglikelihood", {}, ("x", " per token" * 50), 0)
        with pytest.raises(UserError, match="window of 40") as caught:
            model.loglikelihood([long])
        assert "engine.max_context" in str(caught.value.fix)


class Notes(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


def test_what_is_fetched_is_said_before_it_is(
    tmp_path: Path, exported: Exported, text: tasks.TextSide, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_suite(tmp_path / "suite")
    away = (folder / f"{CHOICE}.yaml").read_text("utf-8")
    away = away.replace("dataset_path: json", "dataset_path: some/benchmark\ntag: tagged")
    for number in range(4):
        (folder / f"away{number}.yaml").write_text(away.replace(CHOICE, f"away{number}"), "utf-8")
    remote = (
        "task: remote\ndataset_path: json\ndataset_kwargs: {data_files: {test: 'https://a/b'}}\n"
    )
    (folder / "remote.yaml").write_text(remote, "utf-8")
    (folder / "code.yaml").write_text("task: code\nclass: any.Thing\n", "utf-8")
    members = f"[{CHOICE}, tagged, {{task: {ROLLING}, dataset_path: other/data}}, remote, code]"
    (folder / "group.yaml").write_text(f"group: all_of_it\ntask: {members}\n", "utf-8")
    progress, said = Notes(), []

    def load(*_: object) -> None:
        said.extend(progress.notes)
        raise OSError("no network")

    monkeypatch.setattr("lm_eval.tasks.TaskManager.load", load)
    suite = suites.Suite(names=("all_of_it",), folder=folder)
    with (
        TorchSession(exported.dense, VOCABULARY) as dense,
        pytest.raises(EnvironmentFault, match="no network"),
    ):
        tasks.compare(dense, dense, text, suite, progress=progress)
    assert [note.removeprefix("verify: ").partition(", which")[0] for note in said] == [
        "away0, away1, away2 and 1 more will read some/benchmark",
        f"{ROLLING} will read other/data",
        "remote will read https://a/b",
        "code will read what its own code asks for",
    ]


def test_local_data_is_nothing_to_say(
    exported: Exported, text: tasks.TextSide, suite_folder: Path
) -> None:
    progress = Notes()
    with TorchSession(exported.dense, VOCABULARY) as dense:
        suite = suites.Suite(names=(CHOICE,), folder=suite_folder, limit=1)
        tasks.compare(dense, dense, text, suite, progress=progress)
    assert progress.notes == []


def test_limit_and_fewshot_reach_the_harness(
    exported: Exported, text: tasks.TextSide, suite_folder: Path
) -> None:
    suite = suites.Suite(names=(CHOICE,), folder=suite_folder, limit=2, fewshot=1)
    with TorchSession(exported.dense, VOCABULARY) as dense:
        found = tasks.compare(dense, dense, text, suite, progress=Silent())
    assert found[CHOICE].n == 2
    assert found[CHOICE].difference_stderr == 0.0


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
            suites._manager(suites.Suite(names=("local_choise",), folder=suite_folder))
    assert CHOICE in str(caught.value.fix)


@pytest.mark.parametrize("contents", [None, {}], ids=["missing", "empty"])
def test_a_folder_without_tasks_is_refused(
    tmp_path: Path, contents: object, exported: Exported, text: tasks.TextSide
) -> None:
    folder = tmp_path / "suite"
    if contents is not None:
        folder.mkdir()
    with TorchSession(exported.dense, VOCABULARY) as dense, pytest.raises(RecipeError):
        tasks.compare(dense, dense, text, suites.Suite(names=(), folder=folder), progress=Silent())


def test_broken_yaml_names_file_and_line(tmp_path: Path) -> None:
    folder = write_suite(tmp_path / "suite")
    (folder / "deep").mkdir()
    (folder / "deep" / "broken.yaml").write_text("task: x\nmetric_list: [\n  - {metric: acc\n")
    with pytest.raises(RecipeError, match=r"deep/broken\.yaml:\d: not YAML"):
        suites.check(suites.Suite(names=(), folder=folder), Silent())
    suites.check(suites.Suite(names=(), folder=write_suite(tmp_path / "sound")), Silent())


def test_hub_that_does_not_answer_is_asked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its library would retry each file for half a minute, and log each try twice."""
    from huggingface_hub import constants

    asked = []

    def refuse(url: str, timeout: float) -> None:
        asked.append(url)
        raise OSError("no route")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    suites._hub_answers.cache_clear()
    (tmp_path / "far.yaml").write_text(
        "task: far\ndataset_path: nobody/nothing\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: a\ndoc_to_target: b\ndoc_to_choice: [a]\n"
    )
    suite = suites.Suite(names=("far",), folder=tmp_path)
    try:
        with pytest.raises(EnvironmentFault, match="far") as caught:
            suites.check(suite, Silent())
    finally:
        suites._hub_answers.cache_clear()
    assert len(asked) == 1
    assert "etry" not in capfd.readouterr().err
    assert "check the network" in str(caught.value)


def test_data_out_of_reach_is_the_environments_fault(
    tmp_path: Path, exported: Exported, text: tasks.TextSide
) -> None:
    folder = write_suite(tmp_path / "suite")
    (folder / "questions.jsonl").unlink()
    suite = suites.Suite(names=(CHOICE,), folder=folder)
    with (
        TorchSession(exported.dense, VOCABULARY) as dense,
        pytest.raises(EnvironmentFault, match=CHOICE),
    ):
        tasks.compare(dense, dense, text, suite, progress=Silent())


def test_the_identity_follows_the_files(tmp_path: Path) -> None:
    folder = write_suite(tmp_path / "suite")
    section = EvaluationSection(tasks_path=str(folder))
    before = suites.identity(suites.Suite.of(section))
    assert before == suites.identity(suites.Suite.of(section))
    with (folder / "texts.jsonl").open("a", encoding="utf-8") as stream:
        stream.write('{"text": "more"}\n')
    assert suites.identity(suites.Suite.of(section)) != before


def test_no_tasks_is_no_suite() -> None:
    assert suites.Suite.of(EvaluationSection()) is None
    assert suites.identity(None) is None


def test_without_the_harness_the_message_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from importlib import metadata

    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(EnvironmentFault, match=r"nmexport\[tasks\]"):
        suites.harness_version()


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
