"""The page on how the methods relate: a verdict for each statement, its proof, and what happens when one fails."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from book._ext import relations
from book.paths import ROOT
from reproductions.harness.errata import Evidence
from reproductions.relations.relation import GROUPS
from reproductions.relations.statements import RELATIONS
from tests.book.pages import lines_of, rendered, text_of

PAGE = (ROOT / "book" / "relations.md").read_text(encoding="utf8")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    html, warnings = rendered(
        tmp_path_factory.mktemp("page"), PAGE + "\n```{bibliography}\n```\n", errata="# Errata"
    )
    assert warnings == ""
    return html


def test_table_has_every_statement_with_its_verdict(page: str) -> None:
    head, *rows = lines_of(page)
    assert head == ["", "Statement", "Verdict"]
    assert [row[0] for row in rows] == [one.id for one in RELATIONS]
    assert [row[2].split(" ", 1)[1] for row in rows] == [one.verdict for one in RELATIONS]
    assert all(f'href="#relation-{one.id.lower()}"' in page for one in RELATIONS)


def test_every_statement_has_a_card_with_its_proof_in_its_group(page: str) -> None:
    text = text_of(page)
    places = []
    for group in GROUPS:
        places.append(page.index(f'<section id="relations-{group.lower().replace(" ", "-")}">'))
    assert places == sorted(places)
    for one in RELATIONS:
        assert page.count(f'id="relation-{one.id.lower()}"') == 1
        assert f"{one.id} · {one.where}" in text
    assert text.count("Proof ") == sum(one.check is not None for one in RELATIONS)
    assert "the proof fails" not in text
    assert 'href="errata.html#erratum-nst-n2"' in page


def test_a_proof_that_fails_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = replace(RELATIONS[0], check=lambda: Evidence(False, "Two is not three."))
    monkeypatch.setattr(relations, "RELATIONS", (broken,))
    relations.proved.cache_clear()
    html, warnings = rendered(
        tmp_path, "# Page\n\n```{relations}\n```\n\n```{bibliography}\n```\n", errata="# Errata"
    )
    relations.proved.cache_clear()
    assert warnings == ""
    assert "✗ the proof fails" in text_of(html)
    assert "Two is not three." in text_of(html)
