"""The folder of one model's builds: who holds it, whose it is, and how artifacts get into it.

<work>/resolved.yaml            the recipe of the last run that succeeded
<work>/<stage>/<key12>/         a finished artifact: its manifest.json was written last
<work>/<stage>/<key12>.partial-<pid>    one being written; nothing ever loads it
<work>/<stage>/<key12>.resume   where a killed run of it goes on from
<work>/<stage>/current          link to the artifact in use
<work>/report.{json,md,html}    copies of the last verification
<work>/rivals.json              what `bench rivals` last measured; the copies show it too
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from nmexport.errors import ArtifactError, UserError, WorkDirectoryError
from nmexport.recipe import dump, load
from nmexport.store.artifact import (
    KEY_CHARS,
    MANIFEST,
    Manifest,
    flush_to_disk,
    read_manifest,
)
from nmexport.store.disk_faults import disk_fault

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from nmexport.recipe import Recipe

RESOLVED = "resolved.yaml"
REPORTS = ("report.json", "report.md", "report.html")
CURRENT = "current"
_LOCK = ".lock"
_HOLDER = ".holder.json"
_UNFINISHED_BUILD = ".unfinished.json"
"""In a directory where no run has succeeded yet: the command line of the last one."""
_UNFINISHED = re.compile(r"\.(partial|old|link|new)-\d+$")


@dataclass(frozen=True)
class WorkDirectory:
    """One work directory; it need not exist yet."""

    root: Path

    # -- reading: no lock needed, nothing is written -------------------------------------------

    def folder(self, stage: str, key: str) -> Path:
        """Return the folder of a key's artifact, whether it exists or not."""
        return self.root / stage / key[:KEY_CHARS]

    def find(self, stage: str, key: str) -> Manifest | None:
        """Read the manifest of a finished artifact of this very key; None without one."""
        try:
            manifest = read_manifest(self.folder(stage, key))
        except ArtifactError:
            return None
        return manifest if (manifest.stage, manifest.key) == (stage, key) else None

    def current(self, stage: str) -> Path | None:
        """Return the folder of the stage's artifact in use; None where it was never built."""
        link = self.root / stage / CURRENT
        return link.resolve() if (link / MANIFEST).is_file() else None

    def current_manifest(self, stage: str) -> Manifest | None:
        """Read the manifest of the artifact in use; None where none can be read."""
        folder = self.current(stage)
        if folder is None:
            return None
        try:
            return read_manifest(folder)
        except ArtifactError:
            return None

    def require(self, stage: str) -> Path:
        """Return the folder of the stage's artifact in use.

        Raises:
            ArtifactError: if the stage was never built here.
        """
        folder = self.current(stage)
        if folder is None:
            raise ArtifactError(
                f"{self.root} holds no finished {stage} artifact.",
                fix=f"nmexport build --work {self.root} --to {stage}",
            )
        return folder

    def recipe(self) -> Recipe:
        """Read the recipe of the last run here that succeeded.

        Raises:
            WorkDirectoryError: if this is not a work directory, or no run here has succeeded.
        """
        path = self.root / RESOLVED
        if not path.is_file():
            command = self._unfinished_command()
            if command is not None:
                raise WorkDirectoryError(
                    f"{self.root} holds an unfinished build: no run has succeeded in it yet.",
                    fix=f"go on with it: {command}",
                )
            raise WorkDirectoryError(
                f"{self.root} is not a work directory: there is no {RESOLVED} in it.",
                fix="name one with --work DIR, or make one with `nmexport build --model NAME`",
            )
        return load(path)

    # -- holding ---------------------------------------------------------------------------------

    @contextlib.contextmanager
    def lock(self, command: str) -> Iterator[None]:
        """Hold the directory, making it where needed, and sweep what a killed run left.

        Raises:
            WorkDirectoryError: if another run holds it, or it cannot be written.
        """
        with self.disk_faults():
            self.root.mkdir(parents=True, exist_ok=True)
            self._refuse_foreign()
            lock = FileLock(self.root / _LOCK, timeout=0)
            try:
                lock.acquire()
            except Timeout:
                raise self._locked_error() from None
        try:
            with self.disk_faults():
                self._say_holder(command)
                self._sweep()
            yield
        finally:
            (self.root / _HOLDER).unlink(missing_ok=True)
            lock.release()

    def claim(self, command: str) -> None:
        """Mark a new directory as ours, so that an unfinished build can go on in it."""
        if not (self.root / RESOLVED).is_file():
            with self.disk_faults():
                text = json.dumps({"command": command})
                self.replace(self.root / _UNFINISHED_BUILD, text.encode())

    def refuse_other_model(self, recipe: Recipe) -> None:
        """Refuse a directory that was built from another model than the recipe's.

        Raises:
            WorkDirectoryError: naming both models.
        """
        if not (self.root / RESOLVED).is_file():
            return
        theirs = self.recipe().model.id
        if _identity(theirs) != _identity(recipe.model.id):
            raise WorkDirectoryError(
                f"{self.root} was built from the model {theirs}, not {recipe.model.id}.",
                allowed="one model a work directory; patterns and options may change",
                fix=f"name another with --work DIR, or remove {self.root}",
            )

    # -- writing ---------------------------------------------------------------------------------

    @contextlib.contextmanager
    def partial(self, stage: str, key: str) -> Iterator[Path]:
        """Make a folder to fill, removed afterwards unless `commit` took it.

        Raises:
            WorkDirectoryError: if the disk is full or cannot be written.
        """
        folder = self.partial_path(stage, key)
        try:
            with self.disk_faults():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
                yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def partial_path(self, stage: str, key: str) -> Path:
        """Return the folder that this process writes a key's artifact into."""
        finished = self.folder(stage, key)
        return finished.with_name(f"{finished.name}.partial-{os.getpid()}")

    def resume_path(self, stage: str, key: str) -> Path:
        """Return the folder where this key's checkpoints are saved for a later run."""
        finished = self.folder(stage, key)
        return finished.with_name(f"{finished.name}.resume")

    def forget_resume(self, stage: str, key: str) -> None:
        """Remove the checkpoints of a complete artifact."""
        shutil.rmtree(self.resume_path(stage, key), ignore_errors=True)

    def commit(self, partial: Path, manifest: Manifest) -> Path:
        """Write the manifest, last, and move the folder to its place.

        Where an artifact of that key is there already, it steps aside first: a crash between
        the two renames loses it, and never shows half of one.
        """
        flush_to_disk(partial)
        self.replace(partial / MANIFEST, manifest.to_json().encode())
        _flush_folder(partial)
        finished = self.folder(manifest.stage, manifest.key)
        aside = finished.with_name(f"{finished.name}.old-{os.getpid()}")
        if finished.exists():
            finished.rename(aside)
        partial.rename(finished)
        _flush_folder(finished.parent)
        shutil.rmtree(aside, ignore_errors=True)
        return finished

    def note_shares(self, keys: Mapping[str, str]) -> None:
        """Write each finished stage's share of the whole time into its manifest.

        A manifest keeps its time: whether a file was written after it still shows.
        """
        candidates = [self.find(stage, key) for stage, key in keys.items()]
        manifests = [manifest for manifest in candidates if manifest is not None]
        total = sum(manifest.seconds for manifest in manifests)
        for manifest in manifests:
            share = round(manifest.seconds / total, 4) if total else None
            if share == manifest.share:
                continue
            path = self.folder(manifest.stage, manifest.key) / MANIFEST
            times = path.stat()
            self.replace(path, replace(manifest, share=share).to_json().encode())
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))

    def put_in_use(
        self, recipe: Recipe, keys: Mapping[str, str], *, report: Path | None = None
    ) -> None:
        """Make artifacts current, and their recipe and report those of the directory.

        Everything is written under another name first: a full disk changes nothing.

        Args:
            recipe: What was built.
            keys: Keys by stage.
            report: Folder whose reports are copied to the top.

        Raises:
            WorkDirectoryError: if the disk is full or cannot be written.
        """
        files = {self.root / RESOLVED: dump(recipe).encode()}
        if report is not None:
            reports = [report / name for name in REPORTS if (report / name).is_file()]
            files |= {self.root / path.name: path.read_bytes() for path in reports}
        with self.disk_faults(), contextlib.ExitStack() as written:
            ready = [
                (written.enter_context(_partial_file(path, contents)), path)
                for path, contents in files.items()
            ]
            for stage, key in keys.items():
                self.use(stage, key)
            for partial, path in ready:
                partial.replace(path)
            (self.root / _UNFINISHED_BUILD).unlink(missing_ok=True)

    def use(self, stage: str, key: str) -> None:
        """Point `current` at an artifact, in one step."""
        link = self.root / stage / CURRENT
        target = key[:KEY_CHARS]
        if link.is_symlink() and link.readlink() == Path(target):
            return
        partial = link.with_name(f"{CURRENT}.link-{os.getpid()}")
        with self.disk_faults():
            partial.unlink(missing_ok=True)
            partial.symlink_to(target, target_is_directory=True)
            partial.replace(link)

    def discard(self, stage: str, key: str) -> None:
        """Remove a finished artifact that nothing will read again; the caller holds the lock."""
        folder = self.folder(stage, key)
        aside = folder.with_name(f"{folder.name}.old-{os.getpid()}")
        if folder.exists():
            link = folder.parent / CURRENT
            if link.is_symlink() and link.readlink() == Path(folder.name):
                link.unlink()
            folder.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)

    def withdraw_reports(self) -> None:
        """Remove the copies at the top, which no longer describe what is here."""
        with self.disk_faults():
            for name in REPORTS:
                (self.root / name).unlink(missing_ok=True)

    @staticmethod
    def replace(path: Path, contents: bytes) -> None:
        """Write a temporary file, flush it, then put it in place: readers see all or nothing."""
        with _partial_file(path, contents) as partial:
            partial.replace(path)

    @contextlib.contextmanager
    def disk_faults(self) -> Iterator[None]:
        """Turn disk errors into one message; let others pass.

        Raises:
            WorkDirectoryError: if the disk is full or cannot be written.
        """
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            fault = disk_fault(self.root, error)
            if fault is None:
                raise
            raise fault from error

    # -- inside ----------------------------------------------------------------------------------

    def _refuse_foreign(self) -> None:
        """Refuse a folder with other files: it is probably a mistyped --work."""
        names = {
            path.name
            for path in self.root.iterdir()
            if not path.name.startswith(".") and not _UNFINISHED.search(path.name)
        }
        if names and RESOLVED not in names and self._unfinished_command() is None:
            raise WorkDirectoryError(
                f"{self.root} is not empty and not a work directory: "
                f"it holds {', '.join(sorted(names)[:4])}.",
                allowed="a new or empty folder, or one that nmexport made",
                fix="name another with --work DIR",
            )

    def _unfinished_command(self) -> str | None:
        """Read the command line of a build that has not succeeded yet; None where there is none."""
        try:
            document = json.loads((self.root / _UNFINISHED_BUILD).read_text(encoding="utf-8"))
            return str(document["command"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _locked_error(self) -> WorkDirectoryError:
        try:
            holder = json.loads((self.root / _HOLDER).read_text(encoding="utf-8"))
            who = f"process {holder['pid']}: {holder['command']}"
        except (OSError, ValueError, KeyError, TypeError):
            who = "another process"
        return WorkDirectoryError(
            f"{self.root} is held by {who}",
            allowed="one run at a time in a work directory",
            fix="wait for it to end, or name another folder with --work DIR",
        )

    def _say_holder(self, command: str) -> None:
        text = json.dumps({"pid": os.getpid(), "command": command})
        self.replace(self.root / _HOLDER, text.encode())

    def _sweep(self) -> None:
        """Remove what killed runs left; under the lock no other run can be alive."""
        for path in [*self.root.glob("*"), *self.root.glob(".*"), *self.root.glob("*/*")]:
            if _UNFINISHED.search(path.name):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)


def _identity(model_id: str) -> str:
    """Return a model's name; for a local one its absolute path."""
    path = Path(model_id).expanduser()
    return str(path.resolve()) if path.exists() else model_id


@contextlib.contextmanager
def _partial_file(path: Path, contents: bytes) -> Iterator[Path]:
    """Write a temporary file and flush it; remove it if it was not moved."""
    partial = path.with_name(f"{path.name}.new-{os.getpid()}")
    try:
        with partial.open("wb") as stream:
            stream.write(contents)
            stream.flush()
            os.fsync(stream.fileno())
        yield partial
    finally:
        partial.unlink(missing_ok=True)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
