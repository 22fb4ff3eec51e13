"""The mistakes that are made most: each command line, its exit code, and the one sentence it gets.

Every message says what was given, and ends the search: what is allowed, or what to do next. None is
a traceback, none writes a file.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner
from nmexport.cli.main import cli
from nmexport.serving.addresses import Addresses

if TYPE_CHECKING:
    from pathlib import Path

FILES: dict[str, str | bytes] = {
    "notes.txt": "hello",
    "broken.yaml": "model: [\n",
    "list.yaml": "- a\n",
    "typo.yaml": "model:\n  id: a/b\nsparsity:\n  patern: 8:16\n",
    "kind.yaml": "model:\n  id: a/b\nseed: soon\n",
    "old.yaml": "schema: 9\nmodel:\n  id: a/b\n",
    "nameless.yaml": "schema: 1\n",
    "twice.yaml": "seed: 1\nseed: 2\nmodel:\n  id: a/b\n",
    "bare/readme.txt": "nothing",
    "config/config.json": json.dumps({"model_type": "llama"}),
    "torn/config.json": "{",
    "pickles/config.json": json.dumps({"model_type": "llama"}),
    "pickles/pytorch_model.bin": "x",
    "adapter/adapter_config.json": "{}",
    "adapter/adapter_model.safetensors": "",
    "cut/config.json": json.dumps({"model_type": "llama"}),
    "cut/model.safetensors": b"\x10",
    "short.gguf": "GG",
    "other.json": "{}",
    "torn.json": "{",
    "future.json": json.dumps({"schema": 9, "verdict": "pass"}),
}
USER, USAGE = 1, 2
LONG = "x" * 300
BUILD = "build --model a/b"

# Command line, exit code, words that the message must hold.
MISTAKES = (
    # -- the command line itself
    ("bake", USAGE, "No such command 'bake'"),
    ("build --no-such", USAGE, "No such option '--no-such'"),
    ("build --pattern", USAGE, "'--pattern' requires an argument"),
    ("build x y", USAGE, "unexpected extra arguments (x y)"),
    ("doctor now", USAGE, "unexpected extra argument (now)"),
    ("package --criterion wina", USAGE, "No such option '--criterion'"),
    ("verify --weights int8", USAGE, "No such option '--weights'"),
    ("recipes show", USAGE, "Missing argument 'NAME'"),
    ("diff bare", USAGE, "Missing argument 'AFTER'"),
    ("sweep", USAGE, "Missing argument 'FILE|NAME'"),
    (f"{BUILD} --pattern 2:4 --pattern 4:8", USAGE, "given 2 times; only one of them can count"),
    # -- which model
    ("build", USER, "No model was named"),
    ("fold", USER, "No model was named"),
    ("build --model smolm", USER, "Unknown model 'smolm'"),
    ("build --model llama-3", USER, "did you mean 'llama3'?"),
    ("build --model nowhere/", USER, "Unknown model 'nowhere/'"),
    ("build --model ./nowhere", USER, "no file or folder ./nowhere"),
    ("build --model none.gguf", USER, "no file or folder none.gguf"),
    ("build --model notes.txt", USER, "is a file, and not a .gguf"),
    ("build --model short.gguf", USER, "short.gguf are damaged or incomplete"),
    ("build --model bare", USER, "bare has no config.json"),
    ("build --model config", USER, "Next: complete the download"),
    ("build --model torn", USER, "torn/config.json cannot be read"),
    ("build --model pickles", USER, "convert them once with `save_pretrained"),
    ("build --model adapter", USER, "merge it into its base once"),
    ("build --model cut", USER, "cut/model.safetensors are damaged or incomplete"),
    # -- the pattern
    (f"{BUILD} --pattern 8-16", USER, "'8-16' is not an N:M pattern"),
    (f"{BUILD} --pattern a:b", USER, "'a:b' is not an N:M pattern"),
    (f"{BUILD} --pattern 8:0", USER, "Pattern 8:0 is out of range"),
    (f"{BUILD} --pattern 0:16", USER, "N is what is kept"),
    (f"{BUILD} --pattern 17:16", USER, "17:16 is out of range"),
    (f"{BUILD} --pattern 8:999", USER, "1 <= N <= M <= 64"),
    # -- choices
    (f"{BUILD} --criterion wima", USAGE, "Did you mean 'wina'?"),
    (f"{BUILD} --mitigation hope", USAGE, "'hope' is none of none, d-pts"),
    (f"{BUILD} --mitigation none --mitigation var", USAGE, "none goes with no other"),
    (f"{BUILD} --grouping sorted", USAGE, "'sorted' is none of consecutive, random, balanced"),
    (f"{BUILD} --effort max", USAGE, "'max' is none of fast, standard, thorough"),
    (f"{BUILD} --phases prompt", USAGE, "'prompt' is none of all, prefill, decode"),
    (f"{BUILD} --offload yes", USAGE, "'yes' is none of auto, never, layerwise"),
    (f"{BUILD} --dtype fp16", USAGE, "Did you mean 'float16'?"),
    (f"{BUILD} --dtype int8", USAGE, "'int8' is none of float32, float16, bfloat16"),
    (f"{BUILD} --target cuda", USAGE, "'cuda' is none of auto, onnxruntime, tensorrt"),
    (f"{BUILD} --compute-capability 89", USER, 'a compute capability such as "8.9"'),
    (f"{BUILD} --weights int3", USER, '--weights cannot be "int3"'),
    (f"{BUILD} --weights int8:33", USER, "a multiple of 16"),
    (f"{BUILD} --weights int8:0", USER, '--weights cannot be "int8:0"'),
    # -- budgets and targets
    (f"{BUILD} --budget ppl", USAGE, "'ppl' is not NAME=NUMBER"),
    (f"{BUILD} --budget speed=2", USAGE, "a NAME among ppl, kl, speedup, bytes"),
    (f"{BUILD} --budget ppl=0.9", USER, "Allowed: more than 1.0"),
    (f"{BUILD} --budget bytes=2", USER, "Allowed: less than 1.0"),
    (f"{BUILD} --budget bytes=nan", USER, "Allowed: a finite number"),
    (f"{BUILD} --budget ppl=1.2 --budget ppl=1.3", USAGE, "ppl is given twice"),
    (f"{BUILD} --budget none --budget ppl=1.2", USAGE, "none goes with no other"),
    (f"{BUILD} --budget bytes=0.6 --pattern 2:4", USER, "replace --pattern with --budget-pattern"),
    (f"{BUILD} --budget-pattern 2:4", USER, "add --budget bytes=0.6, say"),
    (f"{BUILD} --targets lm_head --targets !lm_head", USER, "both includes and excludes lm_head"),
    # -- numbers
    (f"{BUILD} --seed x", USAGE, "'x' is not a valid integer"),
    (f"{BUILD} --seed -1", USER, "--seed cannot be -1"),
    (f"{BUILD} --calib-samples 0", USER, "--calib-samples cannot be 0"),
    (f"{BUILD} --calib-length 1", USER, "Allowed: at least 8"),
    (f"{BUILD} --calib-self-share 2", USER, "Allowed: at most 1.0"),
    (f"{BUILD} --calib-self-share half", USAGE, "'half' is not a valid float"),
    (f"{BUILD} --eval-windows 0", USER, "--eval-windows cannot be 0"),
    (f"{BUILD} --eval-length 0", USER, "--eval-length cannot be 0"),
    (f"{BUILD} --tasks a,,b", USAGE, "'a,,b' holds an empty name"),
    (f"{BUILD} --task-limit 0", USER, "--task-limit cannot be 0"),
    (f"{BUILD} --task-fewshot -1", USER, "--task-fewshot cannot be -1"),
    # -- stages and work directories
    (f"{BUILD} --from bake", USAGE, "'bake' is none of calibrate, fold"),
    (f"{BUILD} --to bake", USAGE, "'bake' is none of calibrate, fold"),
    (f"{BUILD} --force pakage", USAGE, "Did you mean 'package'?"),
    (f"{BUILD} --from verify --to fold", USER, "--from verify comes after --to fold"),
    (f"{BUILD} --work notes.txt", USAGE, "Directory 'notes.txt' is a file"),
    ("build --work nowhere", USER, "nowhere is not a work directory"),
    ("verify --work nowhere", USER, "make one with `nmexport build --model NAME`"),
    ("evaluate --work nowhere", USER, "nowhere is not a work directory"),
    ("bench engines --work nowhere", USER, "nowhere is not a work directory"),
    ("bench serve --work nowhere", USER, "nowhere is not a work directory"),
    ("generate hi", USER, "There is no work directory under nmexport-work"),
    ("generate --work nowhere hi", USER, "nowhere is not a work directory"),
    ("generate --work bare hi", USER, "there is no resolved.yaml in it"),
    (f"{BUILD} --work {LONG}", USER, "cannot be used: File name too long."),
    (f"build --model ./{LONG}", USER, "File name too long"),
    (f"inspect {LONG}", USER, "File name too long"),
    (f"gate {LONG}", USER, "File name too long"),
    # -- recipes
    (f"build --recipe {LONG}.yaml", USER, "File name too long"),
    ("build --recipe none.yaml", USER, "none.yaml cannot be read: No such file or directory."),
    ("build --recipe bare", USER, "bare cannot be read: Is a directory."),
    ("build --recipe broken.yaml", USER, "check indentation, colons and quotes there"),
    ("build --recipe list.yaml", USER, "its top level must be keys"),
    ("build --recipe typo.yaml", USER, "typo.yaml:4: sparsity.patern is not a key"),
    ("build --recipe kind.yaml", USER, 'kind.yaml:3: seed cannot be "soon"'),
    ("build --recipe old.yaml", USER, "old.yaml:1: schema cannot be 9"),
    ("build --recipe nameless.yaml", USER, "model is missing"),
    ("build --recipe twice.yaml", USER, "'seed' is given twice, first on line 1"),
    ("recipes show llama-3", USER, "did you mean 'llama3'?"),
    ("recipes validate none.yaml", USER, "none.yaml cannot be read"),
    ("recipes validate typo.yaml", USER, "did you mean 'pattern'?"),
    ("sweep none.yaml", USER, "There is no sweep 'none.yaml'"),
    ("sweep typo.yaml", USER, "typo.yaml is no sweep"),
    # -- reports
    ("gate", USER, "There is no work directory under nmexport-work"),
    ("gate nowhere", USER, "The report nowhere cannot be read"),
    ("gate bare", USER, "bare/report.json cannot be read"),
    ("gate other.json", USER, "other.json is no report: it is other JSON"),
    ("gate torn.json", USER, "torn.json is no report: it is not JSON"),
    ("gate future.json", USER, "another version of nmexport wrote it"),
    ("gate other.json --max-kl-mean low", USAGE, "'low' is not a valid float"),
    ("gate r.json --work w", USAGE, "REPORT and --work name two reports"),
    ("inspect nowhere", USER, "There is no nowhere"),
    ("inspect notes.txt", USER, "notes.txt is nothing that can be inspected"),
    ("inspect bare --work w", USAGE, "PATH and --work name two things"),
    ("diff nowhere bare", USER, "There is no nowhere"),
    # -- serving and measuring
    ("serve nowhere", USAGE, "'nowhere' does not exist"),
    ("serve bare", USER, "bare holds no model_repository"),
    ("serve bare --http-port 0", USAGE, "0 is not in the range"),
    ("serve bare --openai-port 70000", USAGE, "70000 is not in the range"),
    ("client hi --url here", USER, "here is no URL of a server"),
    ("client hi --url {closed}", USER, "No server answers at {closed}: Connection refused"),
    ("bench engines --runs 2", USAGE, "2 is not in the range"),
    ("bench rivals --work nowhere", USER, "nowhere is not a work directory"),
    ("bench rivals --batch 0", USAGE, "0 is not in the range"),
    ("bench rivals --rival int4", USAGE, "'int4' is not one of 'dense', 'int8'"),
    ("bench kernels --dtype int3", USAGE, "'int3' is not one of 'float32'"),
    ("bench soak nowhere", USAGE, "'nowhere' does not exist"),
    ("estimate bare", USER, "There is no config.json at bare"),
    ("estimate torn", USER, "not a valid JSON file"),
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mistakes")
    for name, content in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def tree(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


def test_there_are_a_hundred() -> None:
    lines = [line for line, _, _ in MISTAKES]
    assert len(lines) == len(set(lines)) >= 100


@pytest.mark.parametrize(
    ("line", "code", "says"),
    MISTAKES,
    ids=[line.replace(LONG, "LONG").replace(" ", "_") for line, _, _ in MISTAKES],
)
def test_a_mistake_gets_its_sentence(
    made: Path, monkeypatch: pytest.MonkeyPatch, line: str, code: int, says: str
) -> None:
    monkeypatch.chdir(made)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    closed = f"http://127.0.0.1:{Addresses.unused().http_port}"
    line, says = line.replace("{closed}", closed), says.replace("{closed}", closed)
    before = tree(made)
    result: Any = CliRunner().invoke(cli, line.split())
    assert result.exit_code == code, result.output
    assert says in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert "Errno" not in result.stderr
    assert tree(made) == before
    if code == USER:  # a problem, and a way on
        first, *rest = result.stderr.strip().splitlines()
        assert first.startswith("nmexport: ")
        assert rest or says == "torn/config.json cannot be read"
