"""A statement about how methods relate: who says it, whether it holds, and what proves that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from reproductions.harness.errata import Evidence, load_errata

Verdict = Literal["holds", "holds with conditions", "does not hold", "open"]
GROUPS = (  # as the notes group the methods
    "Beginnings",
    "What to transfer",
    "Data and quality",
    "Ensembles and noise",
    "Intermediate layers and structure",
)


@dataclass(frozen=True)
class Relation:
    """One statement. The texts are Markdown with `$maths$`.

    Attributes:
        id: Such as `"R1"`.
        group: One of :data:`GROUPS`.
        where: Place in the notes, or whose saying it is.
        statement: What is said.
        verdict: Whether it holds.
        answer: What holds, and under which conditions.
        check: Proves the verdict by symbols or numbers; None exactly where the verdict is open.
        errata: Such as `"kd/K1"`: errata that say the same.
    """

    id: str
    group: str
    where: str
    statement: str
    verdict: Verdict
    answer: str
    check: Callable[[], Evidence] | None
    errata: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("id", "where", "statement", "answer"):
            if not getattr(self, name).strip():
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected a text")
        for name, value, known in (
            ("group", self.group, GROUPS),
            ("verdict", self.verdict, get_args(Verdict)),
        ):
            if value not in known:
                raise ValueError(f"{name} of {self.id}: got {value!r}, expected one of {', '.join(known)}")
        if (self.check is None) != (self.verdict == "open"):
            raise ValueError(f"check of {self.id}: expected a proof exactly where the verdict is not open")


def proved_by(erratum: str) -> Callable[[], Evidence]:
    """The check of an erratum, such as `"nst/N2"`, where it proves a relation too."""

    def check() -> Evidence:
        column, _, wanted = erratum.partition("/")
        found = {one.id: one for one in load_errata(column)}
        if wanted not in found:
            raise ValueError(f"erratum: got {erratum!r}, expected one of {', '.join(found)} of {column}")
        return found[wanted].check()

    return check
