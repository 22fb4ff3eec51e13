"""The maintainer's README names what is there: the way of `pattern` from options to kernels."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def rows() -> list[tuple[str, str]]:
    """Where `pattern` is, and in what form."""
    text = (ROOT / "nmexport" / "README.md").read_text("utf-8")
    section = text.partition("## Follow one value: `pattern`")[2].partition("\n## ")[0]
    return re.findall(r"^\| (`.+|.*`.*) \| (.+) \|$", section, re.MULTILINE)


def named(expression: str) -> list[str]:
    """Names in backquotes that an expression finds in the first column."""
    return [name for where, _ in rows() for name in re.findall(f"`({expression})`", where)]


PYTHON = named(r"\w+\.[\w.]+\.pattern")
NATIVE = named(r"[A-Z]\w+(?:::pattern)?")


def test_the_way_is_short() -> None:
    assert (len(PYTHON), len(NATIVE)) == (3, 4)
    assert len(rows()) == 7
    assert (
        sum(text in form for _, form in rows() for text in ("parsed once", "converted once")) == 2
    )


@pytest.mark.parametrize("name", PYTHON)
def test_python_holds_one_object(name: str) -> None:
    place, owner, field = f"nmexport.{name}".rsplit(".", 2)
    module = importlib.import_module(place)
    annotation = getattr(module, owner).__annotations__[field]
    assert "NMPattern" in f"{annotation} {getattr(module, annotation, None)}"


@pytest.mark.parametrize("name", NATIVE)
def test_native_code_holds_two_integers(name: str) -> None:
    owner = name.partition("::")[0]
    body = re.compile(rf"^(?:struct|class) {owner} [^;]*?\{{$.*?^\}};", re.MULTILINE | re.DOTALL)
    headers = [path.read_text("utf-8") for path in (ROOT / "plugins").rglob("*.h")]
    bodies = [found[0] for text in headers if (found := body.search(text))]
    assert len(bodies) == 1
    assert re.search(r"\bPattern pattern;|\bint32_t n\{", bodies[0])
