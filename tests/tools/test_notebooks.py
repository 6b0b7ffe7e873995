"""What a notebook and a terminal show of plans, reports and verifications."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest
from definition import Net, image, net, train_steps
from torch import nn

import mapsurgery


class Page(HTMLParser):
    """The cells of the tables of a piece of HTML, and its paragraphs; refuses what is not closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.tables: list[list[list[str]]] = []
        self.paragraphs: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert {name for name, _ in attrs} <= {"style"}  # no address that a page would load
        self.open.append(tag)
        self.tags.add(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "p":
            self.paragraphs.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data
        elif self.open[-1] == "p":
            self.paragraphs[-1] += data


def trained() -> Net:
    return train_steps(mapsurgery.patch(net(), "body", rank=2), image())


def test_a_plan_is_shown_as_tables() -> None:
    plan = mapsurgery.plan(net(), ["body", "all-linear"], train="norm", rank=2)
    page = Page(plan._repr_html_())
    layers, left = page.tables
    assert layers[0][:3] == ["layer", "n", "type"] and [row[0] for row in layers[1:]] == ["body.0", "body.2"]
    assert left[1][0] == "head" and "leaves heads out" in left[1][3]
    assert page.paragraphs == str(plan).splitlines()[-len(page.paragraphs) :]
    assert page.tags == {"table", "caption", "thead", "tbody", "tr", "th", "td", "p"}


def test_a_report_is_shown_as_a_table() -> None:
    report = mapsurgery.report(trained())
    (table,) = Page(report._repr_html_()).tables
    assert [row[0] for row in table] == ["layer", "body.0", "body.2"]
    assert table[1][4] == f"{report.layers['body.0']['change']:.4g}"


def test_a_verification_is_shown_with_its_failures() -> None:
    model = trained()
    good = Page(mapsurgery.verify(model, image())._repr_html_())
    assert good.paragraphs[0] == "2 of 2 adapters act on the output and learn" and not good.tables
    model.body[0].adapter.requires_grad_(False)
    with pytest.raises(mapsurgery.VerificationError) as caught:
        mapsurgery.verify(model, image())
    (table,) = Page(caught.value.verification._repr_html_()).tables
    assert [row[0] for row in table] == ["layer", "body.0"]


def test_names_are_text_and_no_markup() -> None:
    model = nn.Sequential()
    model.add_module("<b onload='x'>&amp;", nn.Linear(3, 3))
    plan = mapsurgery.plan(model, "<*")
    page = Page(plan._repr_html_())
    assert page.tables[0][1][0] == "<b onload='x'>&amp;" and "b" not in page.tags
    assert page.paragraphs[0] == "layers per pattern: '<*' 1"


def test_ipython_takes_the_html_and_the_short_repr() -> None:
    formatters = pytest.importorskip("IPython.core.formatters", reason="IPython is not installed")
    plan = mapsurgery.plan(net(), "body", rank=2)
    shown, _ = formatters.DisplayFormatter().format(plan)
    assert shown["text/html"] == plan._repr_html_()
    assert shown["text/plain"] == repr(plan) and "\n" not in shown["text/plain"]
