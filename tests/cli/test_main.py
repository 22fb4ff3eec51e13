"""What could hurt: a wrong exit code, a result on stderr, a traceback for a typo, a slow --help."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner, Result
from nmexport.bench.kernels import Figures, KernelTimes, Row, Timing
from nmexport.cli.main import VERBS, Terminated, cli
from nmexport.cli.request import Request
from nmexport.errors import GateFailed, InternalError, UserError
from nmexport.inspect.doctor import NativeLibrary
from nmexport.report.model import DecodeTimes, Latency, PrefillTimes, SideTimes, Speedup
from nmexport.store.records import json_from

from tests.support.fake_stages import fake_pipeline, fake_stages

if TYPE_CHECKING:
    from nmexport.recipe import Recipe

ROOT = Path(__file__).resolve().parents[2]
REPORT = {
    "schema": 1,
    "model": {"id": "some/model", "revision": None, "parameters": 10},
    "pattern": "8:16",
    "criterion": "act",
    "mitigations": ["var"],
    "phases": "all",
    "target": "onnxruntime",
    "sparsity": {"linears": 7, "sparsified": 6, "achieved": 0.5, "layers": []},
    "accuracy": {
        "dataset": "self",
        "tokens": 99,
        "dense": {"perplexity": 20.0},
        "sparse": {"perplexity": 30.0},
        "perplexity_ratio": 1.5,
        "kl_mean": 0.25,
        "top1_agreement": 0.75,
    },
    "latency": {
        "runtime": "ONNX Runtime",
        "device": "cpu",
        "dense": {
            "prefill": {"tokens": 128, "p50_ms": 100.0},
            "decode": {"context": 64, "p50_ms": 9.0},
        },
        "sparse": {
            "prefill": {"tokens": 128, "p50_ms": 110.0},
            "decode": {"context": 64, "p50_ms": 6.0},
        },
        "speedup": {"prefill": 0.91, "decode": 1.5},
    },
    "memory": {"peak_rss_bytes": 10**9, "artifact_bytes": 5 * 10**8},
    "gates": [{"name": "max_kl_mean", "limit": 0.3, "value": 0.25, "passed": True}],
    "verdict": "pass",
}


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def fakes(in_folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stages that the command line runs in place of the real ones."""
    stages = fake_stages()

    def pipeline(self: Request) -> object:
        recipe = self.recipe()
        work = self.work_directory(recipe)
        return replace(fake_pipeline(work.root, stages, recipe=recipe), work=work)

    monkeypatch.setattr(Request, "pipeline", pipeline)
    return stages


def run(*words: object, code: int = 0, **options: Any) -> Result:
    result = CliRunner().invoke(cli, [str(word) for word in words], **options)
    assert result.exit_code == code, (result.output, result.exception)
    return result


def recipe_of(*words: str) -> Recipe:
    """The recipe that a `build` line asks for."""
    seen: list[Recipe] = []

    def keep(self: Request) -> object:
        seen.append(self.recipe())
        raise UserError("seen")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Request, "pipeline", keep)
        run("build", *words, code=1)
    return seen[0]


# -- shape ----------------------------------------------------------------------------------------


def test_verbs_are_pinned() -> None:
    assert list(VERBS) == [
        "build",
        "calibrate",
        "fold",
        "export",
        "engine",
        "verify",
        "package",
        "gate",
        "bench",
        "sweep",
        "evaluate",
        "generate",
        "serve",
        "client",
        "inspect",
        "diff",
        "estimate",
        "recipes",
        "doctor",
    ]


def test_help_and_version() -> None:
    shown = run("--help").output
    assert all(f"  {verb} " in shown for verb in VERBS)
    assert "...\n" not in shown.partition("Commands:")[2]  # no summary is cut
    assert run("--version").output.startswith("nmexport, version ")


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_and_json(verb: str) -> None:
    shown = run(verb, "--help").output
    if verb in {"bench", "recipes"}:
        names = cli.get_command(None, verb).commands  # type: ignore[arg-type,union-attr]
        for name in names:
            assert "--json" in run(verb, name, "--help").output
    else:
        assert "--json" in shown


SHARED = ("--model", "--recipe", "--work", "--pattern", "--json", "--verbose")
METHOD = ("--criterion", "--mitigation", "--effort", "--grouping", "--targets", "--phases")
EVALUATION = ("--eval-data", "--eval-windows", "--eval-length")
CALIBRATION = ("--calib", "--calib-samples", "--calib-length", "--calib-self-share")
TASKS = ("--tasks", "--tasks-path", "--task-limit", "--task-fewshot")
ENGINE = ("--target", "--compute-capability", "--embed-plugin", "--in-place-cache")
BUDGET = (
    *("--budget", "--budget-pattern", "--budget-criterion", "--budget-phases"),
    *("--budget-weights", "--budget-count-learned"),
)
STAGE_OPTIONS = {
    "calibrate": (
        *("--revision", "--trust-remote-code", "--offload", "--seed"),
        *(*METHOD, *CALIBRATION, *EVALUATION),
    ),
    "fold": (*METHOD, *BUDGET, "--offload", "--dtype", "--weights", "--activations"),
    "export": ("--no-dense-baseline",),
    "engine": ENGINE,
    "verify": (*EVALUATION, *TASKS),
    "package": ("--allow-failed",),
}


def options_of(verb: str) -> set[str]:
    command = cli.get_command(None, verb)  # type: ignore[arg-type]
    return {word for one in command.params for word in one.opts if word.startswith("--")}


@pytest.mark.parametrize("verb", STAGE_OPTIONS)
def test_a_stage_takes_what_changes_it_and_no_more(verb: str) -> None:
    assert options_of(verb) == {*SHARED, "--force", "--dry-run", *STAGE_OPTIONS[verb]}


def test_build_takes_what_the_stages_take() -> None:
    every = {option for options in STAGE_OPTIONS.values() for option in options}
    assert options_of("build") == {*every, *SHARED, *("--from", "--to", "--force", "--dry-run")} | {
        "--check"
    }


@pytest.mark.parametrize("verb", ["generate", "inspect", "serve", "evaluate", "gate"])
def test_reading_verbs_find_a_work_directory_and_set_nothing(verb: str) -> None:
    wanted = set(EVALUATION) if verb == "evaluate" else set()
    every = {option for options in STAGE_OPTIONS.values() for option in options}
    assert options_of(verb) & every - {"--seed"} == wanted
    assert set(SHARED) <= options_of(verb)


def test_options_of_a_stage_change_its_key() -> None:
    """Each means something: the stage is another one with it."""
    given = {
        "--criterion": "act",
        "--mitigation": "var",
        "--effort": "fast",
        "--grouping": "random",
        "--targets": "q_proj",
        "--phases": "decode",
        "--budget": "bytes=0.6",
        "--budget-pattern": "2:4",
        "--budget-criterion": "act",
        "--budget-phases": "decode",
        "--budget-weights": "int8",
        "--offload": "layerwise",
        "--dtype": "float16",
        "--weights": "int8",
        "--activations": "float",
        "--calib": "self",
        "--calib-samples": "3",
        "--calib-length": "99",
        "--calib-self-share": "0.25",
        "--eval-data": "other.txt",
        "--eval-windows": "3",
        "--eval-length": "99",
        "--task-limit": "3",
        "--task-fewshot": "3",
        "--tasks": "a",
        "--tasks-path": "suite",
        "--target": "onnxruntime",
        "--compute-capability": "8.9",
        "--in-place-cache": "off",
        "--seed": "3",
        "--revision": "r",
        "--pattern": "2:4",
    }
    flags = {"--budget-count-learned", "--no-dense-baseline", "--embed-plugin", "--allow-failed"}
    every = {option for options in STAGE_OPTIONS.values() for option in options}
    assert every - {"--trust-remote-code"} <= given.keys() | flags
    plain = recipe_of("--model", "a/b", "--calib", "c.txt")
    for option in sorted(every - {"--trust-remote-code"}):
        words = [option] if option in flags else [option, given[option]]
        if option.startswith("--budget-"):
            words += ["--budget", "bytes=0.5"]
        if option == "--calib":
            words = [option, given[option]]
        else:
            words += ["--calib", "c.txt"]
        assert recipe_of("--model", "a/b", *words) != plain, option


def test_help_of_every_verb_imports_nothing_heavy() -> None:
    """In one process of its own: modules once imported here would hide the fault."""
    heavy = ["torch", "transformers", "onnx", "onnxruntime", "pydantic", "matplotlib", "numpy"]
    code = f"""
import sys
from click.testing import CliRunner
from nmexport.cli.main import VERBS, cli
for words in [["--help"], *([verb, "--help"] for verb in VERBS)]:
    assert CliRunner().invoke(cli, words).exit_code == 0, words
found = [name for name in {heavy} if name in sys.modules]
assert not found, found
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_module_runs() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "nmexport", "recipes", "list", "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "smollm2" in [row["name"] for row in json.loads(done.stdout)]
    assert done.stderr == ""


# -- options --------------------------------------------------------------------------------------


def test_every_option_reaches_its_key() -> None:
    built = recipe_of(
        *("--model", "a/b", "--revision", "main", "--pattern", "2:4", "--criterion", "wina"),
        *("--mitigation", "d-pts", "--mitigation", "var", "--grouping", "consecutive"),
        *("--effort", "fast"),
        *("--targets", "*.mlp.*", "--targets", "!layer:0-1", "--phases", "decode"),
        *("--calib", "c.txt", "--calib-samples", "3", "--calib-length", "33"),
        *("--calib-self-share", "0.25", "--offload", "layerwise"),
        *("--tasks", "a,b", "--tasks", "c", "--tasks-path", "suite"),
        *("--task-limit", "7", "--task-fewshot", "2"),
        *("--eval-data", "e.jsonl", "--eval-windows", "5", "--eval-length", "55", "--seed", "9"),
        *("--dtype", "bfloat16", "--target", "onnxruntime", "--trust-remote-code"),
    )
    document = built.model_dump(mode="json")
    assert document["model"] == {
        "id": "a/b",
        "revision": "main",
        "trust_remote_code": True,
        "dtype": "bfloat16",
        "weights": "auto",
        "activations": "auto",
        "package": None,
        "dense_baseline": True,
    }
    assert document["sparsity"] == {
        "pattern": "2:4",
        "criterion": "wina",
        "mitigations": ["d-pts", "var"],
        "grouping": "consecutive",
        "phases": "decode",
        "targets": {"include": ["*.mlp.*"], "exclude": ["lm_head", "layer:0-1"]},
        "effort": "fast",
        "rank": 32,
        "remainder": 0.05,
    }
    assert document["calibration"] == {
        "corpus": "c.txt",
        "samples": 3,
        "length": 33,
        "self_share": 0.25,
        "learning_samples": 384,
        "offload": "layerwise",
    }
    assert built.evaluation.tasks == ("a", "b", "c")
    assert (built.evaluation.tasks_path, built.evaluation.task_limit) == ("suite", 7)
    assert built.evaluation.task_fewshot == 2
    assert (built.evaluation.corpus, built.evaluation.windows, built.evaluation.length) == (
        "e.jsonl",
        5,
        55,
    )
    assert (built.seed, built.target) == (9, "onnxruntime")


def test_remote_code_is_off_unless_asked_for() -> None:
    assert not recipe_of("--model", "a/b").model.trust_remote_code


def test_mitigation_none_clears_the_recipes(in_folder: Path) -> None:
    Path("r.yaml").write_text("model:\n  id: a/b\nsparsity:\n  mitigations: [var]\n")
    assert recipe_of("--recipe", "r.yaml").sparsity.mitigations == ("var",)
    assert recipe_of("--recipe", "r.yaml", "--mitigation", "none").sparsity.mitigations == ()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--model", "smolm"], "did you mean 'smollm"),
        (["--model", "a/b", "--pattern", "8:0"], "8:0 is out of range"),
        (["--model", "a/b", "--pattern", "17:16"], "17:16 is out of range"),
        (["--model", "a/b", "--pattern", "8-16"], "'8-16' is not an N:M pattern"),
        (["--model", "a/b", "--weights", "int3"], '--weights cannot be "int3"'),
        (["--model", "a/b", "--weights", "int8:33"], "a multiple of 16"),
        (["--model", "a/b", "--weights", "int8:0"], "a multiple of 16"),
        (["--model", "a/b", "--budget", "ppl=0.9"], "--budget cannot be 0.9"),
        (["--model", "a/b", "--budget", "bytes=nan"], "--budget cannot be"),
        (["--model", "a/b", "--budget", "bytes=0.6", "--pattern", "2:4"], "--pattern gives all"),
        (["--model", "a/b", "--budget-pattern", "2:4"], "says what a budget may choose"),
        (["--model", "a/b", "--targets", "lm_head", "--targets", "!lm_head"], "both includes"),
        (["--model", "a/b", "--calib-samples", "0"], "--calib-samples cannot be 0"),
        (["--recipe", "none.yaml"], "none.yaml cannot be read"),
        (["--work", "nowhere"], "is not a work directory"),
        ([], "No model was named"),
    ],
)
def test_bad_input_is_one_message_and_exit_1(in_folder: Path, words: list[str], says: str) -> None:
    result = run("build", *words, code=1)
    assert says in result.stderr
    assert "Traceback" not in result.output
    assert result.stdout == ""
    assert list(in_folder.iterdir()) == []
    as_json = run("build", *words, "--json", code=1)
    document = json.loads(as_json.stdout)
    assert document["exit_code"] == 1
    assert set(document["error"]) == {"type", "problem", "allowed", "fix"}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["build", "--no-such-option"], "No such option"),
        (["bake"], "No such command"),
        (["build", "--seed", "x"], "not a valid integer"),
        (["build", "--from", "bake"], "'bake' is none of calibrate, fold"),
        (["build", "--force", "pakage"], "Did you mean 'package'?"),
        (["build", "--criterion", "wima"], "Did you mean 'wina'?"),
        (["build", "--grouping", "exchange"], "Use balanced: the search by exchange was removed"),
        (["build", "--mitigation", "hope"], "'hope' is none of none, d-pts"),
        (["build", "--mitigation", "none", "--mitigation", "var"], "none goes with no other"),
        (["build", "--pattern", "2:4", "--pattern", "4:8"], "--pattern is given 2 times"),
        (["build", "--budget", "ppl=1.2", "--budget", "ppl=1.3"], "ppl is given twice"),
        (["build", "--budget", "ppl"], "'ppl' is not NAME=NUMBER"),
        (["build", "--budget", "none", "--budget", "ppl=1.2"], "none goes with no other"),
        (["build", "--tasks", "a,,b"], "holds an empty name"),
        (["package", "--criterion", "wina"], "No such option"),
        (["verify", "--weights", "int8"], "No such option"),
        (["bench", "engines", "--runs", "2"], "not in the range"),
        (["gate", "r.json", "--work", "w"], "two reports"),
        (["recipes", "show"], "Missing argument"),
    ],
)
def test_usage_errors(in_folder: Path, words: list[str], says: str) -> None:
    assert says in run(*words, code=2).stderr
    result = run(*words, "--json", code=2)
    assert says in json.loads(result.stdout)["error"]["problem"]
    assert list(in_folder.iterdir()) == []


# -- building -------------------------------------------------------------------------------------


def test_build_then_nothing_to_do(fakes: dict[str, Any], in_folder: Path) -> None:
    fakes["verify"].report = REPORT
    shown = run("build", "--model", "some/model", "--pattern", "2:4").stdout
    for figure in ("20.00", "30.00", "1.500x", "0.2500", "75.0 %", "9.0 ms", "6.0 ms", "1.50x"):
        assert figure in shown
    assert "Verdict: pass" in shown
    assert "In short: Keep the dense model" in shown
    assert "nmexport-work/model-2of4/report.html" in shown
    again = run("build", "--model", "some/model", "--pattern", "2:4").stdout
    assert "Everything is up to date" in again
    assert "Verdict: pass" in again


def test_a_build_ends_with_three_sides_what_each_writes_and_what_to_try(
    fakes: dict[str, Any], in_folder: Path
) -> None:
    del in_folder
    prompt = "Water boils when"
    times = {"decode": {"p50_ms": 7.5}, "prefill": {"p50_ms": 61.0}}
    fakes["verify"].report = {
        **REPORT,
        "weights": {"dense": "float32", "sparse": "int8"},
        "accuracy": {
            **REPORT["accuracy"],
            "examples": [{"prompt": prompt, "dense": "it is\nhot.", "sparse": "it sings."}],
        },
        "stored_dense": {
            "scores": {"sparse": {"perplexity": 20.25}, "kl_mean": 0.0021},
            "latency": {"dense": times, "speedup": {"decode": 1.25}},
            "texts": {prompt: "it is warm."},
        },
    }
    shown = run("build", "--model", "some/model", "--pattern", "2:4").stdout
    for words in ("dense float32", "dense int8", "sparse int8", "20.25", "0.0021", "7.5 ms"):
        assert words in shown
    lines = [line.split(maxsplit=2) for line in shown.splitlines()]
    at = shown.splitlines().index(f"{prompt} ...")
    assert lines[at + 1 : at + 4] == [
        ["dense", "float32", "it is hot."],
        ["dense", "int8", "it is warm."],
        ["sparse", "int8", "it sings."],
    ]
    assert "nmexport generate --work nmexport-work/model-2of4" in shown
    assert "nmexport serve nmexport-work/model-2of4" in shown


def test_build_as_json(fakes: dict[str, Any]) -> None:
    document = json.loads(run("build", "--model", "some/model", "--json").stdout)
    assert [row["action"] for row in document["stages"]] == ["run"] * 6
    assert not document["up_to_date"]
    again = json.loads(run("build", "--model", "some/model", "--json").stdout)
    assert again["up_to_date"]
    assert again["report"]["verdict"] == "none"


def test_failed_gate_is_exit_3_after_the_figures(fakes: dict[str, Any]) -> None:
    failed = {"name": "max_kl_mean", "limit": 0.1, "value": 0.25, "passed": False}
    fakes["verify"].report = {**REPORT, "verdict": "fail", "gates": [failed]}
    result = run("build", "--model", "some/model", code=3)
    assert "Gate max_kl_mean: FAIL" in result.stdout
    assert "failed: max_kl_mean" in result.stderr
    run("build", "--model", "some/model", code=3)  # a cached failure is one, too
    document = json.loads(run("build", "--model", "some/model", "--json", code=3).stdout)
    assert document["report"]["verdict"] == "fail"


def test_gate_that_fails_in_a_first_build_shows_what_ran_the_figures_and_the_report(
    fakes: dict[str, Any],
) -> None:
    failed = {"name": "max_kl_mean", "limit": 0.1, "value": 0.25, "passed": False}
    fakes["verify"].report = {**REPORT, "verdict": "fail", "gates": [failed]}
    fakes["package"].broken = GateFailed("not packaged: max_kl_mean")
    result = run("build", "--model", "some/model", code=3)
    lines = {line.split()[0]: line for line in result.stdout.splitlines() if line.strip()}
    assert "up to date" not in result.stdout
    assert "refused" in lines["package"]
    assert "1.500x" in result.stdout
    assert "nmexport-work/model-8of16/report.html" in result.stdout
    assert "not packaged" in result.stderr
    document = json.loads(
        run("build", "--model", "some/model", "--work", "w", "--json", code=3).stdout
    )
    actions = [row["action"] for row in document["stages"]]
    assert actions == ["run"] * 5 + ["refused"]
    assert all(row["seconds"] is not None for row in document["stages"][:5])
    assert document["report"]["verdict"] == "fail"
    assert not document["up_to_date"]


@pytest.mark.parametrize(
    ("words", "incomplete", "value"),
    [
        (["build", "--criterion"], "w", "wina"),
        (["build", "--model"], "smo", "smollm2"),
        (["build", "--force"], "ver", "verify"),
        (["build", "--budget"], "pp", "ppl="),
        (["build", "--weights"], "int8:", "int8:128"),
        (["fold", "--mitigation"], "low", "low-rank"),
        (["recipes", "show"], "mis", "mistral"),
        (["sweep"], "pap", "paper"),
    ],
)
def test_shells_complete_values(words: list[str], incomplete: str, value: str) -> None:
    complete = ShellComplete(cli, {}, "nmexport", "_NMEXPORT_COMPLETE")
    found = complete.get_completions(words, incomplete)
    assert value in [item.value for item in found]


def test_dry_run_says_why_and_writes_nothing(fakes: dict[str, Any], in_folder: Path) -> None:
    shown = run("build", "--model", "some/model", "--dry-run").stdout
    assert shown.count("not built yet") == 6
    assert "peak memory about" in shown
    assert not Path("nmexport-work").exists()
    run("build", "--model", "some/model", "--work", "w")
    document = json.loads(
        run(*("build", "--work", "w", "--pattern", "2:4", "--dry-run", "--json"), code=0).stdout
    )
    assert [row["action"] for row in document["stages"]] == ["cached"] + ["run"] * 5
    assert "8:16 -> 2:4" in document["stages"][1]["reason"]
    assert document["estimate"]["write_bytes"] > 0


def test_single_stage_and_the_manifests_own_line(fakes: dict[str, Any]) -> None:
    said = run("fold", "--model", "some/model", "--work", "w", code=1).stderr
    assert "needs the calibrate artifact" in said
    run("build", "--model", "some/model", "--work", "w", "--to", "fold")
    assert "up to date" in run("fold", "--work", "w").stdout
    manifest = json.loads(Path("w/fold/current/manifest.json").read_text())
    document = json.loads(run(*manifest["command"].split()[1:], "--json").stdout)
    assert [(row["stage"], row["action"]) for row in document["stages"]] == [("fold", "run")]
    assert "not" not in run("fold", "--work", "w", "--dry-run").stdout


def test_force_and_from(fakes: dict[str, Any]) -> None:
    run("build", "--model", "some/model", "--work", "w")
    shown = run("build", "--work", "w", "--force", "verify", "--from", "export", "--json").stdout
    assert [row["action"] for row in json.loads(shown)["stages"]] == [
        *("cached", "cached", "run", "cached")
    ]


# -- exit codes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("yours"), 1),
        (GateFailed("low"), 3),
        (InternalError("ours"), 70),
        (ValueError("ours"), 70),
        (OSError(errno.ENAMETOOLONG, "File name too long", "x" * 300), 1),
        (OSError(errno.ENOSPC, "No space left on device"), 1),
        (OSError(errno.EBADF, "Bad file descriptor"), 70),
        (KeyboardInterrupt(), 130),
        (Terminated(), 130),
    ],
)
def test_each_failure_has_its_code(fakes: dict[str, Any], error: BaseException, code: int) -> None:
    fakes["fold"].broken = error
    result = run("build", "--model", "some/model", code=code)
    assert ("Traceback" in result.stderr) == (code == 70)
    assert ("report it" in result.stderr) == (code == 70)
    assert list(Path("nmexport-work/model-8of16/fold").iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_with_130_and_leave_nothing(tmp_path: Path, number: signal.Signals) -> None:
    code = f"""
import os, signal, sys, threading, time
from pathlib import Path
from nmexport.cli.main import cli
from nmexport.cli.request import Request
from tests.support.fake_stages import fake_pipeline, fake_stages
stages = fake_stages()
stages["export"].pause = 60
Request.pipeline = lambda self: fake_pipeline(Path({str(tmp_path / "w")!r}), stages)
def strike():
    while not list(Path({str(tmp_path / "w")!r}).glob("export/*.partial-*/deep/part.bin")):
        time.sleep(0.01)
    os.kill(os.getpid(), {int(number)})
# A suite that runs in the background has SIGINT ignored, and so would this process.
signal.signal(signal.SIGINT, signal.default_int_handler)
threading.Thread(target=strike, daemon=True).start()
cli(["build", "--model", "some/model", "--json"])
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 130, done.stderr
    assert "goes on from here" in done.stderr
    error = json.loads(done.stdout)
    assert error["exit_code"] == 130
    assert error["error"]["problem"] in {"interrupted", "terminated"}
    assert list((tmp_path / "w/export").iterdir()) == []
    assert not list((tmp_path / "w").glob(".holder*"))


@pytest.mark.parametrize("verb", ["generate", "inspect"])
def test_verbs_that_do_not_resume_say_interrupted_alone(
    fakes: dict[str, Any], monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    def interrupt(self: Request) -> object:
        raise KeyboardInterrupt

    monkeypatch.setattr(Request, "existing_work", interrupt)
    words = [verb, "x"] if verb == "generate" else [verb]
    assert run(*words, code=130).stderr == "nmexport: interrupted\n"
    document = json.loads(run(*words, "--json", code=130).stdout)
    assert document["error"]["fix"] is None


def test_handler_of_the_caller_is_put_back(fakes: dict[str, Any]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    run("recipes", "list")
    assert signal.getsignal(signal.SIGTERM) is before


def test_debug_output_shows_what_raised(fakes: dict[str, Any]) -> None:
    fakes["fold"].broken = UserError("yours")
    assert "Traceback" in run("build", "--model", "some/model", "-vv", code=1).stderr


# -- the other verbs ----------------------------------------------------------------------------


@pytest.fixture
def report(in_folder: Path) -> Path:
    path = in_folder / "report.json"
    path.write_text(json.dumps(REPORT))
    return path


def test_gate_writes_for_ci_and_exits_3(report: Path) -> None:
    words = ("gate", report, "--max-kl-mean", "0.3", "--min-decode-speedup", "2")
    result = run(*words, "--junit", "out/j.xml", "--markdown", "out/s.md", code=3)
    assert "Verdict: fail" in result.stdout
    assert "latency.speedup.decode is 1.5" in result.stderr
    assert 'failures="1"' in Path("out/j.xml").read_text()
    assert "**fail**" in Path("out/s.md").read_text()
    document = json.loads(run(*words, "--json", code=3).stdout)
    assert [gate["passed"] for gate in document["gates"]] == [True, False]
    assert "Verdict: pass" in run("gate", report, "--max-kl-mean", "0.3").stdout


def test_gate_takes_limits_from_recipe_or_work_directory(report: Path) -> None:
    Path("r.yaml").write_text("model:\n  id: a/b\ngates:\n  max_kl_mean: 0.1\n")
    run("gate", report, "--recipe", "r.yaml", code=3)
    Path("resolved.yaml").write_text(Path("r.yaml").read_text())
    run("gate", report.parent, code=3)
    run("gate", "--work", ".", code=3)
    run("gate", "--work", ".", "--max-kl-mean", "1")


def test_gate_holds_a_report_to_the_gates_that_it_was_made_with(report: Path) -> None:
    assert "Verdict: pass" in run("gate", report).stdout
    failed = {"name": "max_kl_mean", "limit": 0.2, "value": 0.25, "passed": False}
    report.write_text(json.dumps({**REPORT, "verdict": "fail", "gates": [failed]}))
    assert "accuracy.kl_mean is 0.25" in run("gate", report, code=3).stderr
    run("gate", report, "--max-kl-mean", "0.3")  # thresholds given here replace them
    report.write_text(json.dumps({**REPORT, "verdict": "fail", "gates": []}))
    assert "does not say which gate" in run("gate", report, code=1).stderr


def test_gate_without_thresholds_is_a_failure_where_that_is_asked_for(report: Path) -> None:
    report.write_text(json.dumps({**REPORT, "verdict": "none", "gates": []}))
    assert "not gated: no threshold is set" in run("gate", report).stdout
    assert "not gated" in run("gate", report, "--strict", code=3).stderr
    run("gate", report, "--strict", "--max-kl-mean", "0.3")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ("[]", "other JSON"),
        ('{"a": 1}', "other JSON"),
        ('{"schema": 7, "verdict": "none"}', "schema 1"),
        ('{"schema": 1, "verdict": "none", "gates": [3]}', "gates[0] is 3, not an object"),
        ('{"schema": 1, "verdict": "none", "accuracy": null}', None),
        ('{"schema": 1, "verdict": "none", "accuracy": []}', "accuracy is [], not an object"),
        ('{"schema": 1, "verdict": "none", "latency": 7}', "latency is 7, not an object"),
        ('{"schema": 1, "verdict": "good"}', "verdict is 'good', not one of pass, fail, none"),
    ],
)
def test_gate_refuses_what_is_no_report(report: Path, text: str, says: str) -> None:
    report.write_text(text)
    assert (says or "") in run("gate", report, code=0 if says is None else 1).stderr


def test_gate_without_report_or_place_to_write(report: Path) -> None:
    run("gate", "nowhere.json", code=1)
    Path("file").write_text("")
    assert "cannot be written" in run("gate", report, "--junit", "file/j.xml", code=1).stderr
    assert "--min-top1-agreement" in run("gate", report, "--min-top1-agreement", 2, code=1).stderr


@pytest.mark.parametrize("verb", ["generate", "client"])
def test_a_prompt_that_is_no_utf8_is_one_message(
    fakes: dict[str, Any], monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr("nmexport.generation.loop.generate", never)
    monkeypatch.setattr("nmexport.serving.client.stream", never)
    if verb == "generate":
        run("build", "--model", "some/model")
    assert "not UTF-8" in run(verb, "caf\udce9", code=1).stderr
    assert "not UTF-8" in run(verb, input=b"caf\xe9", code=1).stderr


def test_a_home_folder_is_expanded_where_the_shell_leaves_it(
    fakes: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "text.txt").write_text("some text")
    (tmp_path / "tasks").mkdir()
    run("build", "--model", "some/model", "--work=~/work", "--calib=~/text.txt",
        "--eval-data=~/text.txt", "--tasks-path=~/tasks")  # fmt: skip
    resolved = (tmp_path / "work" / "resolved.yaml").read_text()
    assert resolved.count(f"{tmp_path}/text.txt") == 2
    assert f"{tmp_path}/tasks" in resolved
    assert "~" not in resolved
    (tmp_path / "recipe.yaml").write_text(resolved)
    run("build", "--recipe=~/recipe.yaml", "--work=~/other")
    assert (tmp_path / "other" / "resolved.yaml").read_text() == resolved


def test_generate_streams_and_answers_in_json(
    fakes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def generate(work: Path, prompt: str, options: Any, **others: Any) -> Any:
        asked.update(work=work, prompt=prompt, **vars(options), **others)
        return iter(["Par", "is."])

    monkeypatch.setattr("nmexport.generation.loop.generate", generate)
    assert "no work directory under" in run("generate", "Hello", code=1).stderr
    run("build", "--model", "some/model", "--to", "export")
    assert "no finished engine artifact" in run("generate", "Hello", code=1).stderr
    run("build", "--model", "some/model")
    shown = run("generate", "The capital", "--max-tokens", "4", "--chat", "--stop", "x").stdout
    assert shown == "Paris.\n"
    assert asked["work"] == Path("nmexport-work/model-8of16")
    assert (asked["max_tokens"], asked["chat"], asked["stop"]) == (4, True, ("x",))
    assert json.loads(run("generate", "--json", input="from stdin").stdout)["text"] == "Paris."
    assert asked["prompt"] == "from stdin"
    run("generate", "x", "--model", "some/model")
    run("generate", "x", "--model", "other/model", code=1)


def test_bench_engines(fakes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    times: dict[str, Any] = {"p50_ms": 1.0, "p90_ms": 2.0, "tokens_per_s": 4.0}
    side = SideTimes(prefill=PrefillTimes(**times), decode=DecodeTimes(**times))
    latency = Latency(
        runtime="ONNX Runtime",
        device="cpu",
        dense=side,
        sparse=side,
        speedup=Speedup(prefill=1.0, decode=1.5),
    )
    monkeypatch.setattr("nmexport.bench.engines.bench_engines", lambda work, **options: latency)
    run("build", "--model", "some/model", "--work", "w")
    assert "1.50x in decode" in run("bench", "engines", "--work", "w").stdout
    document = json.loads(run("bench", "engines", "--work", "w", "--json").stdout)
    assert document["latency"] == json_from(latency)
    assert "GPU ms" not in run("bench", "engines", "--work", "w").stdout
    decode = DecodeTimes(**times, device_ms=0.9521, host_us=47.9)
    latency = replace(latency, sparse=SideTimes(prefill=PrefillTimes(**times), decode=decode))
    monkeypatch.setattr("nmexport.bench.engines.bench_engines", lambda work, **options: latency)
    (row,) = (
        line
        for line in run("bench", "engines", "--work", "w").stdout.splitlines()
        if line.lstrip().startswith("decode sparse")
    )
    assert row.split()[-2:] == ["0.952", "48"]
    latency = replace(latency, stored=side, over_stored=Speedup(prefill=0.9, decode=1.25))
    monkeypatch.setattr("nmexport.bench.engines.bench_engines", lambda work, **options: latency)
    shown = run("bench", "engines", "--work", "w").stdout
    assert "decode dense in integers" in shown
    assert "1.25x in decode" in shown


def test_bench_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def bench_kernels(shapes: Any, tokens: Any, settings: Any) -> KernelTimes:
        asked.update(shapes=shapes, tokens=tokens, **vars(settings))
        time = Timing(p10_us=8.0, median_us=8.5, p90_us=9.0)
        own = Figures(
            ratio=1.75,
            ratio_own_dense=1.75,
            ratio_matmul_float32=2.0,
            kept_gb_per_s=20.0,
            share_of_read=0.5,
            selection_share=0.03,
        )
        row = Row(
            in_features=32,
            out_features=64,
            tokens=1,
            threads=1,
            weights=3,
            runs=9,
            sides=dict.fromkeys(("matmul", "dense_int8", "sparse_int8"), time),
            read_gb_per_s=40.0,
            figures=dict.fromkeys(settings.dtypes, own),
        )
        return KernelTimes(
            runtime="x",
            variant="x",
            device="x",
            pattern=settings.pattern,
            dtypes=settings.dtypes,
            grouped=False,
            rotated_bytes=1,
            results=(row,),
        )

    monkeypatch.setattr("nmexport.bench.kernels.bench_kernels", bench_kernels)
    assert "1.75" in run("bench", "kernels", "--shape", "32x64", "--tokens", "1").stdout
    assert (asked["shapes"], asked["tokens"]) == ([(32, 64)], (1,))
    assert str(asked["pattern"]) == "8:16"
    options = ("--dtype", "int8", "--threads", "2", "--llm")
    row = json.loads(run("bench", "kernels", *options, "--json").stdout)["results"][0]
    assert row["int8"]["ratio"] == 1.75
    assert (asked["shapes"][0], asked["threads"]) == ((4096, 6144), (2,))
    assert "50%" in run("bench", "kernels", *options).stdout
    assert asked["tokens"] == (1, 2, 3, 4)
    run("bench", "kernels", "--llm")
    assert (asked["threads"], asked["dtypes"]) == ((1, 2), ("float32", "bfloat16", "int8"))
    run("bench", "kernels")
    assert asked["shapes"][0] == (576, 960)
    assert (asked["tokens"], asked["threads"], asked["dtypes"]) == ((1, 128), (1,), ("float32",))
    assert "such as 576x1536" in run("bench", "kernels", "--shape", "32", code=1).stderr
    assert "17:16" in run("bench", "kernels", "--pattern", "17:16", code=1).stderr


def test_recipes(in_folder: Path) -> None:
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in run("recipes", "list").stdout
    text = run("recipes", "show", "smollm2").stdout
    Path("mine.yaml").write_text(text)
    assert "is valid" in run("recipes", "validate", "mine.yaml").stdout
    shown = json.loads(run("recipes", "show", "smollm2", "--json").stdout)
    assert json.loads(run("recipes", "validate", "mine.yaml", "--json").stdout)["recipe"] == shown
    Path("mine.yaml").write_text(text.replace("pattern", "patern"))
    assert "did you mean 'pattern'" in run("recipes", "validate", "mine.yaml", code=1).stderr
    run("recipes", "show", "nothing", code=1)


def test_inspect_work_directory_artifact_and_report(fakes: dict[str, Any]) -> None:
    fakes["verify"].report = REPORT
    run("build", "--model", "some/model", "--work", "w")
    assert "work directory" in run("inspect", "w").stdout
    found = json.loads(run("inspect", "w", "--json").stdout)
    assert [row["stage"] for row in found["stages"]] == list(fakes)
    assert found["report"]["pattern"] == "8:16"
    assert "data.txt" in run("inspect", "w/fold/current").stdout
    found = json.loads(run("inspect", "w/fold/current", "--json").stdout)
    assert found["kind"] == "fold artifact"
    assert json.loads(run("inspect", "w/report.json", "--json").stdout)["report"] == REPORT
    run("inspect", "--work", "w")


@pytest.mark.parametrize("name", ["nowhere", "empty", "x.json", "y.json", "x.onnx", "x.bin"])
def test_inspect_refuses_the_rest(in_folder: Path, name: str) -> None:
    (in_folder / "empty").mkdir()
    for file, text in (("x.json", "{}"), ("y.json", "{"), ("x.onnx", "no"), ("x.bin", "")):
        (in_folder / file).write_text(text)
    assert "Traceback" not in run("inspect", name, code=1).stderr


def test_diff_says_what_changed(fakes: dict[str, Any]) -> None:
    run("build", "--model", "some/model", "--work", "a")
    run("build", "--model", "some/model", "--work", "b", "--pattern", "2:4")
    run("build", "--model", "some/model", "--work", "c")
    assert "No difference" in run("diff", "a/fold/current", "c/fold/current").stdout
    assert "No difference" in run("diff", "a", "c").stdout
    document = json.loads(run("diff", "a", "b", "--json").stdout)
    what = {row["what"]: row for row in document["differences"]}
    assert what["recipe.sparsity.pattern"]["after"] == "2:4"
    assert "stages[fold].digest" in what
    assert "stages[calibrate].digest" not in what
    assert "inputs.sparsity.pattern" in run("diff", "a/fold/current", "b/fold/current").stdout
    assert "two paths of one kind" in run("diff", "a", "b/fold/current", code=1).stderr


def test_diff_and_inspect_begin_with_what_matters(in_folder: Path) -> None:
    layers = {f"layer{index}": float(index) for index in range(300)}
    other = {f"layer{index}": index + 0.5 for index in range(300)}
    for name, kl, values in (("a", 0.25, layers), ("b", 0.5, other)):
        accuracy = {**REPORT["accuracy"], "kl_mean": kl}
        report = {**REPORT, "accuracy": accuracy, "parity": values}
        Path(f"{name}.json").write_text(json.dumps(report))
    shown = run("diff", "a.json", "b.json").stdout
    assert len(shown.splitlines()) < 20
    assert "accuracy.kl_mean" in shown
    assert "300 more differences: 300 in report.parity" in shown
    whole = run("diff", "a.json", "b.json", "-v").stdout
    assert "layer299" in whole
    assert len(json.loads(run("diff", "a.json", "b.json", "--json").stdout)["differences"]) == 301
    shown = run("inspect", "a.json").stdout
    assert "1.500x" in shown
    assert "layer299" not in shown
    assert "layer299" in run("inspect", "a.json", "-v").stdout


def test_diff_gives_the_ratio_of_figures(in_folder: Path) -> None:
    other = {**REPORT, "accuracy": {**REPORT["accuracy"], "kl_mean": 0.5}}
    Path("a.json").write_text(json.dumps(REPORT))
    Path("b.json").write_text(json.dumps(other))
    (row,) = json.loads(run("diff", "a.json", "b.json", "--json").stdout)["differences"]
    assert row == {"what": "report.accuracy.kl_mean", "before": 0.25, "after": 0.5, "ratio": 2.0}


def test_inspect_onnx_counts_our_nodes_without_reading_weights(in_folder: Path) -> None:
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 32])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 8])
    node = helper.make_node("NMLinear", ["x", "w"], ["y"], domain="nmexport", n=8, m=16)
    weight = numpy_helper.from_array(np.zeros((32, 8), np.float32), "w")
    graph = helper.make_graph([node], "g", [value], [out], [weight])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("nmexport", 2)]
    onnx.save(
        helper.make_model(graph, opset_imports=opsets),
        "m.onnx",
        save_as_external_data=True,
        location="m.data",
        size_threshold=0,
    )
    Path("m.data").unlink()
    found = json.loads(run("inspect", "m.onnx", "--json").stdout)
    assert found["sparse_nodes"] == [
        {"op": "NMLinear", "pattern": "8:16", "phase": "all", "count": 1}
    ]
    assert found["inputs"] == [{"name": "x", "type": "float", "shape": ["batch", 32]}]
    assert (found["weight_bytes"], found["external_files"]) == (1024, ["m.data"])
    assert "nmexport::NMLinear" in run("inspect", "m.onnx").stdout


@pytest.mark.parametrize(
    ("library", "says"),
    [
        (NativeLibrary(why_missing="no compiler"), "not built"),
        (NativeLibrary(path="/x.so", why_missing="wrong bits"), "cannot be loaded"),
        (NativeLibrary(path="/x.so", description={"variant": "avx2"}), "variant avx2"),
    ],
)
def test_doctor(monkeypatch: pytest.MonkeyPatch, library: NativeLibrary, says: str) -> None:
    monkeypatch.setattr("nmexport.inspect.doctor.native_library", lambda: library)
    shown = run("doctor").stdout
    assert says in shown
    assert "target onnxruntime: works" in shown
    assert ("native op library" in shown) == (library.why_missing is not None)
    assert "target tensorrt: does not work here" in shown
    assert "fix: " in shown
    document = json.loads(run("doctor", "--json").stdout)
    assert document["environment"]["packages"]["onnxruntime"]
    assert document["native_library"]["why_missing"] == library.why_missing
    assert all(one["fix"] for target in document["targets"] for one in target["missing"])


def test_tables_of_nested_values(in_folder: Path) -> None:
    report = {
        "schema": 1,
        "verdict": "none",
        "memory": {"peak_rss_bytes": 1_500_000_000, "why": None},
        "rows": [{"name": "a", "kept": 0.123456, "of": [{"x": 1}, 2]}, {"name": "b", "extra": {}}],
    }
    Path("r.json").write_text(json.dumps(report))
    shown = run("inspect", "r.json", "-v").stdout
    for text in ("1.5 GB", "0.1235", "x 1, 2", "extra"):
        assert text in shown
