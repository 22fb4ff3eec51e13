"""`rivals.json` in a work directory: what `bench rivals` measured, and how its report shows it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

from nmexport.errors import ArtifactError
from nmexport.report import pages
from nmexport.report.model import Rivals, read_report
from nmexport.store.artifact import plain
from nmexport.store.records import json_from, read_record

if TYPE_CHECKING:
    from nmexport.store.work_directory import WorkDirectory

FILENAME = "rivals.json"
SCHEMA = 1


def save(rivals: Rivals, work: WorkDirectory) -> None:
    """Write the file, in place of an older one.

    Raises:
        WorkDirectoryError: if the disk is full or cannot be written.
    """
    document = plain({"schema": SCHEMA, **json_from(rivals)})
    text = json.dumps(document, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    with work.disk_faults():
        work.replace(work.root / FILENAME, text.encode())


def read(work: WorkDirectory) -> Rivals | None:
    """Read the file; None where there is none that can be read."""
    fix = "run `nmexport bench rivals` again"
    try:
        return read_record(Rivals, work.root / FILENAME, schema=SCHEMA, fix=fix)
    except ArtifactError:
        return None


def show(work: WorkDirectory) -> bool:
    """Show the measurement in the reports at the top; they are left alone where it is not theirs.

    Returns:
        Whether there are reports, of the engine that was measured, which show it now.

    Raises:
        WorkDirectoryError: if the disk is full or cannot be written.
    """
    rivals, engine = read(work), work.current("engine")
    report = work.root / "report.json"
    if rivals is None or engine is None or engine.name != rivals.engine or not report.is_file():
        return False
    texts = pages.files(replace(read_report(report), rivals=rivals))
    with work.disk_faults():
        for name, text in texts.items():
            work.replace(work.root / name, text.encode())
    return True
