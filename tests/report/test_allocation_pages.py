"""The report of an allocated build: front, ledger and plots are in it, and it stands alone."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import TYPE_CHECKING

import pytest
from nmexport.report import allocation_rows, pages, rows
from nmexport.report.model import MIXED, json_of, report_from
from nmexport.sparsity.pattern import NMPattern
from nmexport.store.allocation import Choice, as_dict

from tests.support.sample_allocation import sample_allocation
from tests.support.sample_report import sample_report

if TYPE_CHECKING:
    from pathlib import Path

    from nmexport.report.model import Report
    from nmexport.store.allocation import Allocation


@pytest.fixture(scope="module")
def allocation() -> Allocation:
    return sample_allocation()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, allocation: Allocation) -> Report:
    found = sample_report(tmp_path_factory.mktemp("model"), layers=6)
    return replace(found, allocation=allocation, pattern=MIXED, phases="mixed")


class Rows(HTMLParser):
    """Cells of the tables, row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self._inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "tr":
            self.rows.append([])
        self._inside = self._inside or tag in {"td", "th"}
        if tag in {"td", "th"}:
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = self._inside and tag not in {"td", "th"}

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.rows[-1][-1] += data.strip()


def test_every_site_and_linear_has_its_row(report: Report) -> None:
    page = pages.html(report)
    parser = Rows()
    parser.feed(page)
    first = {row[0]: row for row in parser.rows if row}
    site = first["model.layers.0.self_attn.{q_proj, k_proj, v_proj}"]
    assert site[1] == "dense"
    assert site[-1].startswith("Going on to")
    assert "measured" in site[3]  # 8:16 was tried; 12:16 follows from it
    assert "measured" not in site[2]
    for row in report.allocation.ledger:
        assert row.name in first
    for ledger in ("Ledger of sites", "Ledger of linears", "Points of the front"):
        part = page[page.index(f'aria-label="{ledger}"') :]
        parser = Rows()
        parser.feed(part[: part.index("</table>")])
        assert len({len(row) for row in parser.rows}) == 1, ledger


def test_plots_are_embedded_and_the_page_needs_nothing_else(report: Report) -> None:
    page = pages.html(report)
    for title in ("Pareto front", "Share of weight bytes that a decoded token reads"):
        assert re.search(rf'<svg[^>]*aria-label="{title}', page)
    assert "all linears alike" in page
    assert not re.search(r"<script|<link|<img|https?://(?!www\.w3\.org)", page)
    identifiers = re.findall(r'\sid="(layers|allocation|summary)"', page)
    assert sorted(identifiers) == ["allocation", "layers", "summary"]


def test_the_page_says_what_was_asked_for_and_what_came_out(report: Report) -> None:
    for page in (pages.html(report), pages.markdown(report)):
        assert "perplexity ratio at most 1.15, at most 70% of the weight bytes read" in page
        assert "37.5 %" in page
        assert "1.31x" in page
        assert "phases by linear" in page
        assert MIXED in page


def test_the_page_says_what_the_choice_came_to(report: Report) -> None:
    said = "As built, all constants folded: perplexity ratio 1.051 and mean KL 0.046 nats"
    for page in (pages.html(report), pages.markdown(report)):
        assert "before anything is learned" in page
        assert f"{said} on the same text, 36% of the budget of accuracy." in page
        assert "as built" in page  # a column of the ledger


def test_a_budget_that_is_broken_as_built_is_said_so(allocation: Allocation) -> None:
    broken = replace(allocation, built=replace(allocation.built, budget_used=1.2))
    words = allocation_rows.built(broken)
    assert words is not None
    assert words.endswith("120% of the budget of accuracy: the budget is exceeded.")
    free = replace(allocation, built=replace(allocation.built, budget_used=None))
    assert (allocation_rows.built(free) or "").endswith("on the same text.")
    assert allocation_rows.built(replace(allocation, built=None)) is None


def test_markdown_tables_are_whole(report: Report) -> None:
    text = pages.markdown(report)
    part = text[text.index("## Allocation") : text.index("## Sparsity")]
    tables = [table.splitlines() for table in re.findall(r"(?:^\|.*\n)+", part, flags=re.MULTILINE)]
    assert len(tables) == 3
    for table in tables:
        assert len({line.count("|") for line in table}) == 1, table[:3]
    assert len(tables[2]) == 2 + len(report.allocation.ledger)


def test_without_a_budget_the_report_has_no_such_part(tmp_path: Path) -> None:
    plain = sample_report(tmp_path, layers=2)
    assert plain.allocation is None
    assert 'id="allocation"' not in pages.html(plain)
    assert "## Allocation" not in pages.markdown(plain)
    old = {key: value for key, value in json_of(plain).items() if key != "allocation"}
    assert rows.method(report_from(old)) == rows.method(plain)


def test_rows_are_in_order_and_count(allocation: Allocation) -> None:
    saved = [row.bytes_saved for row in allocation_rows.front_rows(allocation)]
    assert saved == sorted(saved)
    assert allocation_rows.columns(allocation) == ["12:16 act", "8:16 act", "4:16 act"]
    mix = allocation_rows.chosen_mix(allocation)
    assert mix == "12 dense, 14 at 12:16 act, 9 at 8:16 act, 7 at 4:16 act"
    decode = Choice(pattern=NMPattern(8, 16), criterion="act", phase="decode")
    assert decode.label == "8:16 act, decode only"
    assert len(allocation_rows.site_rows(allocation)) == 24
    shares = allocation_rows.read_shares(allocation)
    assert {row.share for row in shares} == {1.0, 0.75, 0.5, 0.25}
    assert shares[0].name == "model.layers.0.self_attn.q+k+v"


def test_a_choice_without_gain_is_said_so() -> None:
    allocation = replace(sample_allocation(), remark="The cost model sees no gain.")
    printed = allocation_rows.rows(allocation)
    assert printed is not None
    assert printed.built.startswith("As built")
    assert printed.built.endswith("The cost model sees no gain.")


def test_an_allocation_is_read_back_from_the_report(report: Report) -> None:
    document = json_of(report)
    assert document["allocation"]["schema"] == 1
    read = report_from(document).allocation
    assert read is not None
    assert as_dict(read) == document["allocation"]
