"""What could hurt: running what is cached, loading what is broken, or losing what was finished."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
import yaml
from nmexport.cli import running
from nmexport.errors import (
    ArtifactError,
    EnvironmentFault,
    GateFailed,
    InternalError,
    RecipeError,
    UserError,
    WorkDirectoryError,
)
from nmexport.progress import Lines
from nmexport.recipe import load
from nmexport.selection import STAGES, Selection, StageRefused
from nmexport.store.artifact import MANIFEST, read_manifest
from nmexport.store.work_directory import WorkDirectory

from tests.support.fake_stages import ORDER, fake_pipeline, fake_stages

EVERYTHING = Selection()


def digests(work: Path) -> dict[str, str]:
    return {stage: read_manifest(work / stage / "current").digest for stage in ORDER}


def actions(pipeline, selection=EVERYTHING) -> dict[str, str]:
    return {step.stage: step.action for step in pipeline.plan(selection)}


def test_first_run_builds_all_and_second_does_nothing(tmp_path: Path) -> None:
    log: list[str] = []
    first = fake_pipeline(tmp_path / "w", fake_stages(log)).run(EVERYTHING)
    assert log == list(ORDER)
    assert [step.action for step in first] == ["run"] * 6
    second = fake_pipeline(tmp_path / "w", fake_stages(log)).run(EVERYTHING)
    assert log == list(ORDER)
    assert [step.action for step in second] == ["cached"] * 6
    assert (tmp_path / "w/report.json").read_text() == (
        tmp_path / "w/verify/current/report.json"
    ).read_text()


def test_layout_and_manifest_are_the_contract(tmp_path: Path) -> None:
    work = tmp_path / "w"
    fake_pipeline(work).run(EVERYTHING)
    assert (work / "fold/current").is_symlink()
    document = json.loads((work / "fold/current" / MANIFEST).read_text())
    assert list(document) == [
        "schema",
        "stage",
        "key",
        "inputs",
        "upstream",
        "files",
        "environment",
        "metrics",
        "started",
        "seconds",
        "command",
        "peak_memory_bytes",
        "share",
    ]
    assert document["peak_memory_bytes"] > 1e6
    assert (work / "fold/current").resolve().name == document["key"][:12]
    assert [set(row) for row in document["files"]] == [{"path", "bytes", "sha256"}] * 2
    assert document["metrics"] == {"lines": 2, "not_a_number": None}
    words = document["command"].split()
    assert words[:2] == ["nmexport", "fold"]
    assert load(Path(words[words.index("--recipe") + 1])) == load(work / "resolved.yaml")


def test_shares_of_a_build_are_in_its_manifests(tmp_path: Path) -> None:
    work = tmp_path / "w"
    stages = fake_stages()
    stages["fold"].pause = 0.3
    fake_pipeline(work, stages).run(EVERYTHING)
    manifests = {stage: read_manifest(work / stage / "current") for stage in ORDER}
    assert sum(one.share for one in manifests.values()) == pytest.approx(1, abs=1e-3)
    assert max(ORDER, key=lambda stage: manifests[stage].share) == "fold"
    assert set(actions(fake_pipeline(work)).values()) == {"cached"}


def test_memory_of_a_stage_is_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage after a large one is not told the large one's peak."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the kernel keeps one mark for all of a process's life")
    stages = fake_stages()
    run = stages["calibrate"].run

    def large(inputs):
        block = bytearray(300 << 20)
        block[:: 1 << 12] = b"x" * len(block[:: 1 << 12])
        return run(inputs)

    monkeypatch.setattr(stages["calibrate"], "run", large)
    steps = fake_pipeline(tmp_path / "w", stages).run(EVERYTHING)
    first, second, *_ = (step.peak_memory_bytes for step in steps)
    assert first - second > 200 << 20


def test_plan_says_which_input_changed_and_runs_only_what_follows(tmp_path: Path) -> None:
    work = tmp_path / "w"
    fake_pipeline(work).run(EVERYTHING)
    plan = fake_pipeline(work, sparsity__pattern="2:4").plan(EVERYTHING)
    assert {step.stage: step.action for step in plan}["calibrate"] == "cached"
    fold = next(step for step in plan if step.stage == "fold")
    assert fold.action == "run"
    assert fold.reason == "changed: sparsity.pattern: 8:16 -> 2:4"
    export = next(step for step in plan if step.stage == "export")
    assert export.reason == "what it is made from changed upstream"


def test_plan_writes_nothing(tmp_path: Path) -> None:
    plan = fake_pipeline(tmp_path / "w").plan(EVERYTHING)
    assert [step.reason for step in plan] == ["not built yet"] * 6
    assert not (tmp_path / "w").exists()


def test_going_back_to_old_options_needs_no_work(tmp_path: Path) -> None:
    work, log = tmp_path / "w", []
    fake_pipeline(work, fake_stages(log)).run(EVERYTHING)
    before = digests(work)
    fake_pipeline(work, fake_stages(log), sparsity__pattern="2:4").run(EVERYTHING)
    assert digests(work) != before
    log.clear()
    fake_pipeline(work, fake_stages(log)).run(EVERYTHING)
    assert log == []
    assert digests(work) == before


def test_a_model_with_other_contents_is_another_key(tmp_path: Path) -> None:
    fake_pipeline(tmp_path / "w").run(EVERYTHING)
    assert set(actions(fake_pipeline(tmp_path / "w", digest="d1")).values()) == {"run"}


def test_forced_stage_with_equal_files_leaves_later_stages_alone(tmp_path: Path) -> None:
    log: list[str] = []
    fake_pipeline(tmp_path / "w").run(EVERYTHING)
    force = Selection(force=frozenset({"fold"}))
    pipeline = fake_pipeline(tmp_path / "w", fake_stages(log))
    assert actions(pipeline, force) == {
        "calibrate": "cached",
        "fold": "run",
        "export": "depends",
        "engine": "depends",
        "verify": "depends",
        "package": "depends",
    }
    pipeline.run(force)
    assert log == ["fold"]


def test_forced_stage_with_other_files_runs_later_stages(tmp_path: Path) -> None:
    log: list[str] = []
    fake_pipeline(tmp_path / "w").run(EVERYTHING)
    stages = fake_stages(log)
    stages["fold"].salt = "other"
    steps = fake_pipeline(tmp_path / "w", stages).run(Selection(force=frozenset({"fold"})))
    assert log == ["fold", "export", "engine", "verify", "package"]
    assert steps[2].reason == "fold was rebuilt, with other contents"


@pytest.mark.parametrize("keep_times", [True, False])
def test_same_size_corruption_is_found_before_it_is_read(tmp_path: Path, keep_times: bool) -> None:
    work, log = tmp_path / "w", []
    fake_pipeline(work).run(EVERYTHING)
    before = digests(work)
    path = work / "fold/current/data.txt"
    status = path.stat()
    path.write_bytes(b"X" + path.read_bytes()[1:])
    if keep_times:  # bit rot: nothing on the surface tells
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    pipeline = fake_pipeline(work, fake_stages(log))
    pipeline.run(Selection(force=frozenset({"export"})))
    assert log == ["fold", "export"]
    assert digests(work) == before


def test_check_finds_silent_corruption_in_a_run_with_nothing_to_do(tmp_path: Path) -> None:
    work = tmp_path / "w"
    fake_pipeline(work).run(EVERYTHING)
    path = work / "package/current/data.txt"
    status = path.stat()
    path.write_bytes(b"X" + path.read_bytes()[1:])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert actions(fake_pipeline(work))["package"] == "cached"
    assert actions(fake_pipeline(work), Selection(check=True))["package"] == "run"


@pytest.mark.parametrize("harm", ["truncate", "remove", "no manifest", "manifest of nonsense"])
def test_harmed_artifacts_are_built_again(tmp_path: Path, harm: str) -> None:
    work = tmp_path / "w"
    fake_pipeline(work).run(EVERYTHING)
    before = digests(work)
    folder = work / "export/current"
    match harm:
        case "truncate":
            (folder / "data.txt").write_text("")
        case "remove":
            (folder / "deep/part.bin").unlink()
        case "no manifest":
            (folder / MANIFEST).unlink()
        case _:
            (folder / MANIFEST).write_text("{}")
    assert actions(fake_pipeline(work))["export"] == "run"
    fake_pipeline(work).run(EVERYTHING)
    assert digests(work) == before


def test_damaged_upstream_of_a_single_stage_is_an_error_with_the_mend(tmp_path: Path) -> None:
    work = tmp_path / "w"
    fake_pipeline(work).run(EVERYTHING)
    (work / "fold/current/data.txt").write_text("x" * 9)
    only = Selection(first="export", last="export", force=frozenset({"export"}))
    with pytest.raises(ArtifactError, match=r"fold artifact .* is damaged"):
        fake_pipeline(work).run(only)


def test_single_stage_needs_what_it_reads(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="export needs the fold artifact") as caught:
        fake_pipeline(tmp_path / "w").run(Selection(first="export", last="export"))
    assert "nmexport build --to export" in str(caught.value)


def test_report_of_other_options_does_not_stay_at_the_top(tmp_path: Path) -> None:
    work = tmp_path / "w"
    fake_pipeline(work).run(EVERYTHING)
    fake_pipeline(work, sparsity__pattern="2:4").run(Selection(last="export"))
    assert not (work / "report.json").exists()
    fake_pipeline(work).run(EVERYTHING)
    assert (work / "report.json").exists()


def test_missing_copy_of_the_report_comes_back(tmp_path: Path) -> None:
    work = tmp_path / "w"
    fake_pipeline(work).run(EVERYTHING)
    (work / "report.html").unlink()
    fake_pipeline(work).run(EVERYTHING)
    assert (work / "report.html").exists()


def test_build_that_does_not_fit_the_disk_is_refused_before_its_first_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []
    pipeline = fake_pipeline(tmp_path / "w", fake_stages(log))
    context = click.Context(click.Command("build"))
    disk = "nmexport.inspect.estimate.shutil.disk_usage"
    monkeypatch.setattr(disk, lambda _: SimpleNamespace(free=9))
    with pytest.raises(EnvironmentFault, match="9 B are free") as caught:
        running.run(context, pipeline, EVERYTHING)
    assert "--no-dense-baseline" in str(caught.value)
    assert log == []


def test_build_says_first_what_it_will_take(tmp_path: Path) -> None:
    stream = io.StringIO()
    pipeline = replace(fake_pipeline(tmp_path / "w"), progress=Lines(stream))
    with click.Context(click.Command("build")):
        running.run(click.get_current_context(), pipeline, EVERYTHING)
        first, *_ = stream.getvalue().splitlines()
        assert first.startswith("Writes about ")
        stream.truncate(0)
        running.run(click.get_current_context(), pipeline, EVERYTHING)
    assert "Writes about" not in stream.getvalue()


# -- failures -----------------------------------------------------------------------------------


def top_of(work: Path) -> dict[str, Any]:
    """What a later command reads: recipe, report, and the artifacts in use."""
    links = {stage: (work / stage / "current").resolve().name for stage in ORDER}
    files = {path.name: path.read_text() for path in work.iterdir() if path.is_file()}
    return {**files, **links, "digests": digests(work)}


@pytest.mark.parametrize("stage", ORDER)
@pytest.mark.parametrize("error", [UserError("no"), ValueError("ours"), KeyboardInterrupt()])
def test_run_that_fails_changes_nothing_that_a_later_command_reads(
    tmp_path: Path, stage: str, error: BaseException
) -> None:
    work = tmp_path / "w"
    fake_pipeline(work).run(EVERYTHING)
    before = top_of(work)
    stages = fake_stages()
    stages[stage].broken = error
    other = {"sparsity__pattern": "2:4", "evaluation__windows": 3, "digest": "d1"}
    with pytest.raises(type(error)):
        fake_pipeline(work, stages, **other).run(EVERYTHING)
    assert top_of(work) == before
    assert set(actions(fake_pipeline(work)).values()) == {"cached"}
    log: list[str] = []
    fake_pipeline(work, fake_stages(log), **other).run(EVERYTHING)
    assert log == list(ORDER[ORDER.index(stage) :])  # what was finished is kept


def test_disk_that_fills_up_at_the_very_end_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "w"
    fake_pipeline(work).run(EVERYTHING)
    before = top_of(work)
    opened = Path.open

    def full(self: Path, *args: Any, **kwargs: Any) -> Any:
        if self.name.startswith("report.md.new"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return opened(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        with pytest.raises(WorkDirectoryError, match="is full"):
            fake_pipeline(work, sparsity__pattern="2:4").run(EVERYTHING)
    assert top_of(work) == before


def test_failed_gate_leaves_its_report_and_keeps_the_package_before_it(tmp_path: Path) -> None:
    work = tmp_path / "w"
    fake_pipeline(work).run(EVERYTHING)
    package = (work / "package/current").resolve()
    stages = fake_stages()
    stages["verify"].report = {"schema": 1, "verdict": "fail", "gates": []}
    stages["package"].broken = GateFailed("too far from dense")
    with pytest.raises(StageRefused, match="too far") as caught:
        fake_pipeline(work, stages, sparsity__pattern="2:4").run(EVERYTHING)
    assert [step.action for step in caught.value.steps] == ["cached", *["run"] * 4, "refused"]
    assert json.loads((work / "report.json").read_text())["verdict"] == "fail"
    assert "2:4" in (work / "resolved.yaml").read_text()
    assert (work / "package/current").resolve() == package


def test_unfinished_first_build_says_how_it_goes_on(tmp_path: Path) -> None:
    work = tmp_path / "w"
    stages = fake_stages()
    stages["export"].broken = UserError("no")
    with pytest.raises(UserError, match="no"):
        fake_pipeline(work, stages).run(EVERYTHING)
    with pytest.raises(WorkDirectoryError, match="unfinished build") as caught:
        WorkDirectory(work).recipe()
    assert "nmexport build" in str(caught.value)
    fake_pipeline(work).run(EVERYTHING)
    assert WorkDirectory(work).recipe().model.id == "some/model"
    assert sorted(path.name for path in work.glob(".*")) in ([], [".lock"])


def test_report_stays_where_what_it_speaks_of_is_still_in_use(tmp_path: Path) -> None:
    work = tmp_path / "w"
    fake_pipeline(work).run(EVERYTHING)
    fake_pipeline(work).run(Selection(last="export", force=frozenset({"export"})))
    assert (work / "report.json").exists()


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "is full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "is full"),
        (RuntimeError("SafetensorError: I/O error: No space left on device (os error 28)"), "full"),
        (OSError(errno.EROFS, "Read-only file system"), "cannot be written"),
        (PermissionError(errno.EACCES, "Permission denied"), "cannot be written"),
    ],
)
def test_what_the_disk_refuses_is_one_message_and_leaves_nothing(
    tmp_path: Path, error: Exception, says: str
) -> None:
    work = tmp_path / "w"
    stages = fake_stages()
    stages["export"].broken = error
    with pytest.raises(WorkDirectoryError, match=says):
        fake_pipeline(work, stages).run(EVERYTHING)
    assert [path.name for path in (work / "export").iterdir()] == []
    log: list[str] = []
    fake_pipeline(work, fake_stages(log)).run(EVERYTHING)
    assert log == ["export", "engine", "verify", "package"]


def test_permission_refused_elsewhere_is_not_blamed_on_the_work_directory(tmp_path: Path) -> None:
    stages = fake_stages()
    stages["fold"].broken = PermissionError(errno.EACCES, "no", str(tmp_path / "model/weights"))
    with pytest.raises(PermissionError):
        fake_pipeline(tmp_path / "w", stages).run(EVERYTHING)


def test_wrapped_disk_errors_are_seen(tmp_path: Path) -> None:
    stages = fake_stages()
    wrapped = RuntimeError("export failed")
    wrapped.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    stages["export"].broken = wrapped
    with pytest.raises(WorkDirectoryError, match="is full"):
        fake_pipeline(tmp_path / "w", stages).run(EVERYTHING)


def test_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkDirectoryError, match="is a file"):
        fake_pipeline(tmp_path / "file" / "w").run(EVERYTHING)
    with pytest.raises(WorkDirectoryError, match="is a file"):
        fake_pipeline(tmp_path / "file").run(EVERYTHING)
    (tmp_path / "link").symlink_to("unmounted")
    (tmp_path / "loop").symlink_to("loop")
    for name, target in (("link", "unmounted"), ("loop", "loop")):
        with pytest.raises(WorkDirectoryError, match=f"it is a link to {target}, which is not"):
            fake_pipeline(tmp_path / name).run(EVERYTHING)


def test_read_only_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *args: object, **kwargs: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(WorkDirectoryError, match="cannot be written") as caught:
        fake_pipeline(tmp_path / "w").run(EVERYTHING)
    assert "--work" in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_directory_for_real(tmp_path: Path) -> None:
    (tmp_path / "w").mkdir(mode=0o500)
    with pytest.raises(WorkDirectoryError, match="cannot be written"):
        fake_pipeline(tmp_path / "w").run(EVERYTHING)


def test_interrupt_leaves_nothing_that_would_be_loaded(tmp_path: Path) -> None:
    work = tmp_path / "w"
    stages = fake_stages()
    stages["fold"].broken = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        fake_pipeline(work, stages).run(EVERYTHING)
    assert list((work / "fold").iterdir()) == []
    fake_pipeline(work).run(EVERYTHING)


def test_another_model_is_refused_and_other_options_are_not(tmp_path: Path) -> None:
    work = tmp_path / "w"
    fake_pipeline(work).run(EVERYTHING)
    with pytest.raises(WorkDirectoryError, match="built from the model some/model, not other/one"):
        fake_pipeline(work, model="other/one").run(EVERYTHING)
    fake_pipeline(work, sparsity__criterion="wina").run(EVERYTHING)


def test_folder_with_other_things_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(WorkDirectoryError, match=r"holds thesis\.tex"):
        fake_pipeline(tmp_path).run(EVERYTHING)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_stage_that_leaves_a_link_is_a_bug(tmp_path: Path, monkeypatch) -> None:
    stages = fake_stages()
    run = stages["fold"].run

    def linking(inputs):
        (inputs.output / "link").symlink_to("/dev/null")
        return run(inputs)

    monkeypatch.setattr(stages["fold"], "run", linking)
    with pytest.raises(InternalError, match="link"):
        fake_pipeline(tmp_path / "w", stages).run(EVERYTHING)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"first": "bake"}, "no stage 'bake'"),
        ({"first": "export", "last": "fold"}, "--from export comes after --to fold"),
        ({"first": "export", "force": frozenset({"fold"})}, "--force fold is outside"),
    ],
)
def test_selections_that_make_no_sense(given: dict, says: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(says)):
        Selection(**given)


def test_stage_order_is_pinned() -> None:
    assert tuple(STAGES) == ORDER


# -- other processes ------------------------------------------------------------------------------

_BUILD = """
import sys
from pathlib import Path
from nmexport.selection import Selection
from tests.support.fake_stages import fake_pipeline, fake_stages
stages = fake_stages()
stages[sys.argv[2]].pause = 60
print("ready", flush=True)
fake_pipeline(Path(sys.argv[1]), stages).run(Selection())
"""


def start_build(work: Path, pause_in: str) -> subprocess.Popen[str]:
    """A build in a process of its own that stands still inside a stage."""
    process = subprocess.Popen(
        [sys.executable, "-c", _BUILD, str(work), pause_in],
        cwd=Path(__file__).parents[1],
        text=True,
        stdout=subprocess.PIPE,
    )
    deadline = time.monotonic() + 30
    while not list(work.glob(f"{pause_in}/*.partial-*/deep/part.bin")):
        assert process.poll() is None, "the build ended before its pause"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


def stop(process: subprocess.Popen[str], number: signal.Signals) -> None:
    process.send_signal(number)
    process.communicate()


@pytest.mark.parametrize("stage", ["calibrate", "export", "package"])
def test_killed_build_goes_on_and_ends_with_the_same_digests(tmp_path: Path, stage: str) -> None:
    fake_pipeline(tmp_path / "undisturbed").run(EVERYTHING)
    work, log = tmp_path / "w", []
    stop(start_build(work, stage), signal.SIGKILL)
    assert list(work.glob(f"{stage}/*.partial-*"))
    fake_pipeline(work, fake_stages(log)).run(EVERYTHING)
    assert log == list(ORDER[ORDER.index(stage) :])
    assert digests(work) == digests(tmp_path / "undisturbed")
    assert not list(work.rglob("*.partial-*"))


def test_crash_between_the_two_renames_of_a_forced_stage(tmp_path: Path) -> None:
    work = tmp_path / "w"
    fake_pipeline(work).run(EVERYTHING)
    before = digests(work)
    folder = (work / "fold/current").resolve()
    folder.rename(folder.with_name(f"{folder.name}.old-99"))
    (work / "resolved.yaml.new-99").write_text("half")
    assert actions(fake_pipeline(work))["fold"] == "run"
    fake_pipeline(work).run(EVERYTHING)
    assert digests(work) == before
    assert not list(work.rglob("*-99"))


def test_second_run_names_who_holds_the_directory(tmp_path: Path) -> None:
    process = start_build(tmp_path / "w", "fold")
    try:
        with pytest.raises(WorkDirectoryError, match=f"process {process.pid}: nmexport build"):
            fake_pipeline(tmp_path / "w").run(EVERYTHING)
    finally:
        stop(process, signal.SIGKILL)
    fake_pipeline(tmp_path / "w").run(EVERYTHING)


def test_moved_work_directory_still_loads(tmp_path: Path) -> None:
    fake_pipeline(tmp_path / "a").run(EVERYTHING)
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert set(actions(fake_pipeline(tmp_path / "b")).values()) == {"cached"}


def test_resolved_recipe_is_ordinary_yaml(tmp_path: Path) -> None:
    fake_pipeline(tmp_path / "w").run(EVERYTHING)
    document = yaml.safe_load((tmp_path / "w/resolved.yaml").read_text())
    assert document["sparsity"]["pattern"] == "8:16"


def test_inputs_that_change_during_a_run_do_not_split_it(tmp_path: Path, monkeypatch) -> None:
    """The manifest must hold what its key was made from, not what a file says minutes later."""
    stages = fake_stages()
    fields = stages["fold"].key_fields
    asked = []

    def drifting(inputs):
        asked.append(1)
        return {**fields(inputs), "corpus": len(asked)}

    monkeypatch.setattr(stages["fold"], "key_fields", drifting)
    fake_pipeline(tmp_path / "w", stages).run(Selection(last="fold"))
    assert read_manifest(tmp_path / "w/fold/current").inputs["corpus"] == 1
