"""Roles that print what is known: ``{num}``, ``{fresh}``, ``{verdict}``, ``{badge}``, ``{erratum}``, ``{source}``.

An unknown key, claim, word, erratum or function is a warning that names close matches; warnings fail the build.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.nodes import Node, make_id
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging
from sphinx.util.docutils import SphinxRole

from book._ext import evidence
from book.paths import ROOT
from reproductions.harness.claims import Verdict
from reproductions.harness.ledger import LedgerError, Number
from reproductions.harness.profiles import HarnessError, suggestion

log = logging.getLogger(__name__)
Answer = tuple[list[Node], list[nodes.system_message]]

NOT_RECORDED = "not recorded"
FIELDS = ("mean", "interval", "n", "key")
TONES = {
    "reproduced": "good",
    "direction holds": "good",
    "not worse": "good",
    "verified": "good",
    "value differs": "bad",
    "contradicted": "bad",
    "worse": "bad",
    "refuted": "bad",
    "no effect beyond δ": "plain",
    "cannot tell": "plain",
    "underpowered": "plain",
    "other protocol": "plain",
    "not run": "plain",
}
SIGNS = {"good": "✓", "bad": "✗", "plain": "○"}


def number_text(number: Number, field: str = "") -> str:
    """Return a number as pages print it, or one field of it."""
    unit = f" {number.unit}" if number.unit else ""
    if field == "mean":
        return f"{number.mean:{number.format}}{unit}"
    if field == "n":
        return str(number.n)
    if field == "key":
        return number.full_key
    if field == "interval":
        if number.interval is None:
            return "no interval (one run)"
        low, high = number.interval
        return f"[{low:{number.format}}, {high:{number.format}}]"
    return number.text().replace(" ", "\N{NO-BREAK SPACE}")


def number_title(number: Number) -> str:
    """Return what a reader sees when pointing at a number."""
    return f"{number.full_key}: {number_text(number, 'interval')}, n = {number.n}, {number.status}"


def number_node(env: BuildEnvironment, number: Number, field: str = "", *, fresh: bool = False) -> Node:
    """Return a number, or a field of it: a recorded one links to its row on the page of results."""
    text = number_text(number, field)
    if fresh:
        return nodes.inline("", text, classes=["num", "num-fresh"])
    title = number_title(number)
    return link(env, text, "results", number_id(number.named), title=title, classes=["num"])


def link(
    env: BuildEnvironment, text: str, page: str, anchor: str, *, title: str, classes: Sequence[str]
) -> Node:
    """Return ``text`` as a link to an anchor of ``page``; plain where the book has no such page."""
    if page not in env.found_docs and not page.startswith("_modules/"):
        return nodes.inline("", text, classes=list(classes))
    uri = env.app.builder.get_relative_uri(env.docname, page)
    return nodes.reference(
        "", text, internal=True, refuri=f"{uri}#{anchor}", reftitle=title, classes=list(classes)
    )


def badge(word: str) -> nodes.inline:
    """Return a verdict's word as a badge; its sign says the same as its colour."""
    tone = TONES[word]
    return nodes.inline("", f"{SIGNS[tone]} {word}", classes=["verdict", f"verdict-{tone}"])


def verdict_node(env: BuildEnvironment, verdict: Verdict, *, profile: bool = True) -> Node:
    """Return a badge that links to its claim, followed by the profile it was judged on."""
    claim = verdict.claim
    title = f"{claim.title}: {verdict.text}"
    target = link(
        env,
        "",
        f"chapters/{claim.column}",
        claim_id(claim.column, claim.id),
        title=title,
        classes=["verdict-link"],
    )
    target += badge(verdict.verdict)
    whole = nodes.inline("", "", target)
    notes = [verdict.profile] if profile and not claim.check else []
    notes += ["stale"] if verdict.stale else []
    if notes:
        whole += nodes.inline("", " " + ", ".join(notes), classes=["verdict-note"])
    return whole


def claim_id(column: str, claim: str) -> str:
    """Return the anchor of a claim."""
    return make_id(f"claim-{column}-{claim}")


def number_id(key: str) -> str:
    """Return the anchor of a number, named by `key` or `key%machine`."""
    return make_id(f"num-{key}")


def erratum_id(column: str, erratum: str) -> str:
    """Return the anchor of an erratum."""
    return make_id(f"erratum-{column}-{erratum}")


class KnownRole(SphinxRole):
    """A role whose text names something that must exist."""

    def answer(self) -> Node:
        """Return the node; ``HarnessError`` if there is no such thing."""
        raise NotImplementedError

    def run(self) -> Answer:
        """Return the answer, or a warning and the text marked as a problem."""
        try:
            return [self.answer()], []
        except HarnessError as error:
            log.warning("{%s}`%s`: %s", self.name, self.text, error, location=self.get_location())
            return [nodes.problematic(self.rawtext, self.text)], []


class NumberRole(KnownRole):
    """``{num}`key``` or ``{num}`key.field```: a recorded number; ``{fresh}``: one computed in this build.

    A number of a profile that nobody has recorded yet says so in its place.
    """

    def __init__(self, *, fresh: bool = False) -> None:
        super().__init__()
        self.fresh = fresh

    def answer(self) -> Node:
        """Return the number, linked to its row on the page of results."""
        key, _, field = self.text.rpartition(".")
        if field not in FIELDS:
            key, field = self.text, ""
        self.env.note_dependency(str(evidence.columns_root() / key.split("/")[0] / "ledger.json"))
        try:
            number = evidence.find(key, fresh=self.fresh)
        except LedgerError:
            if self.fresh or not evidence.awaits_recording(key):
                raise
            return nodes.inline("", NOT_RECORDED, classes=["num", "num-missing"])
        return number_node(self.env, number, field, fresh=self.fresh)


class VerdictRole(KnownRole):
    """``{verdict}`column/claim``` or ``{verdict}`column/profile/claim```."""

    def answer(self) -> Node:
        """Return the badge, linked to the claim."""
        root = evidence.columns_root() / self.text.split("/")[0]
        self.env.note_dependency(str(root / "ledger.json"))
        self.env.note_dependency(str(root / "claims.toml"))
        return verdict_node(self.env, evidence.find_verdict(self.text))


class BadgeRole(KnownRole):
    """``{badge}`reproduced```: the badge of a verdict's word."""

    def answer(self) -> Node:
        """Return the badge."""
        if self.text not in TONES:
            raise HarnessError(f"no verdict {self.text!r}{suggestion(self.text, TONES)}")
        return badge(self.text)


class ErratumRole(KnownRole):
    """``{erratum}`column/id```: an erratum's id, linked to its card."""

    def answer(self) -> Node:
        """Return the link."""
        name, _, wanted = self.text.partition("/")
        known = {erratum.id: erratum for erratum, _ in evidence.errata(name)}
        if wanted not in known:
            raise HarnessError(f"no erratum {wanted!r} in {name}{suggestion(wanted, known)}")
        anchor = erratum_id(name, wanted)
        return link(self.env, wanted, "errata", anchor, title=known[wanted].where, classes=["erratum-link"])


def locate(name: str, root: Path = ROOT) -> tuple[Path, str, int]:
    """Return file, name within the module, and line of the function or class ``name``.

    Raises:
        HarnessError: There is no such module or definition.
    """
    parts = name.split(".")
    for size in range(len(parts) - 1, 0, -1):
        file = root.joinpath(*parts[:size]).with_suffix(".py")
        if file.is_file():
            break
    else:
        raise HarnessError(f"no module for {name!r}")
    body: list[ast.stmt] = ast.parse(file.read_text(encoding="utf8")).body
    line = 0
    for part in parts[size:]:
        known = {
            node.name: node
            for node in body
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        }
        if part not in known:
            raise HarnessError(f"{'.'.join(parts[:size])} has no {part!r}{suggestion(part, known)}")
        body, line = known[part].body, known[part].lineno
    return file, ".".join(parts[size:]), line


class SourceRole(KnownRole):
    """``{source}`kdrefs.methods.pkt.pkt_loss```: file and line, linked to the highlighted source."""

    def answer(self) -> Node:
        """Return the link."""
        file, inner, line = locate(self.text)
        page = "_modules/" + file.relative_to(ROOT).with_suffix("").as_posix()
        return link(
            self.env, f"{file.name}, line {line}", page, inner, title=self.text, classes=["source-link"]
        )


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the extension."""
    app.add_role("num", NumberRole())
    app.add_role("fresh", NumberRole(fresh=True))
    app.add_role("verdict", VerdictRole())
    app.add_role("badge", BadgeRole())
    app.add_role("erratum", ErratumRole())
    app.add_role("source", SourceRole())
    return {"parallel_read_safe": True, "parallel_write_safe": True}
