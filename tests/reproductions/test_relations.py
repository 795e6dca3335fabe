"""How the methods relate: every proof holds, and fails where what it rests on is changed."""

import re
from dataclasses import replace

import pytest

from reproductions.harness.errata import Evidence, load_errata
from reproductions.harness.profiles import column_names
from reproductions.relations import proofs
from reproductions.relations.relation import GROUPS, Relation, proved_by
from reproductions.relations.statements import RELATIONS

IDS = [relation.id for relation in RELATIONS]
BY_ID = dict(zip(IDS, RELATIONS, strict=True))
PROVED = [relation for relation in RELATIONS if relation.check is not None]

# What a proof rests on, changed in the way one would get it wrong; the others are checks of errata.
MUTANTS = {
    "R1": ("kd_loss", lambda right: lambda s, t, temperature: right(s, t, temperature=4.0)),
    "R4": ("attention_map", lambda right: lambda maps: right(maps, power=1.0)),
    "R5": ("nst_loss", lambda right: lambda s, t: right(s, t, kernel="linear")),
    "R6": ("ab_loss", lambda right: lambda s, t: (s - t).square().sum() / len(s)),
    "R7": ("soft_darkrank_loss", lambda right: lambda s, t: right(s[:, :8], t)),
    "R8": ("hint_loss", lambda right: lambda s, t: 0 * right(s, t)),
    "R11": ("_gap", lambda right: lambda mean, p: right(p, mean)),
    "R12": ("end2_loss", lambda right: lambda s, e, **_: -(e.softmax(-1).mean(1) * s.log_softmax(-1)).sum(-1).mean()),
    "R13": ("softened_cross_entropy", lambda right: lambda s, t, temperature: right(t, s.detach(), 1.0) + 0 * s.sum()),
    "R14": ("pairwise_loss", lambda right: lambda s, t: right(s, t) * s.shape[2] ** 4),
}  # fmt: skip


@pytest.mark.parametrize("relation", PROVED, ids=lambda relation: relation.id)
def test_relation_is_proved(relation):
    evidence = relation.check()
    assert evidence.holds, evidence.summary
    assert not re.search(r"\b(nan|inf)\b", evidence.summary)
    assert evidence.values


@pytest.mark.parametrize("name", MUTANTS)
def test_proof_fails_where_what_it_rests_on_is_changed(name, monkeypatch):
    function, mutate = MUTANTS[name]
    monkeypatch.setattr(proofs, function, mutate(getattr(proofs, function)))
    assert not BY_ID[name].check().holds


def test_every_proof_of_this_package_has_a_mutant():
    own = {one.id for one in PROVED if one.check.__module__ == proofs.__name__}
    assert own == MUTANTS.keys()


def test_every_group_has_statements_in_order():
    assert len(set(IDS)) == len(IDS) >= 13
    groups = [relation.group for relation in RELATIONS]
    assert groups == sorted(groups, key=GROUPS.index)
    assert set(groups) == set(GROUPS)


def test_errata_that_are_named_exist():
    for relation in RELATIONS:
        for name in relation.errata:
            column, _, wanted = name.partition("/")
            assert wanted in {erratum.id for erratum in load_errata(column)}


def test_relations_are_no_column():
    assert "relations" not in column_names()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group": "Others"}, "group of R1: got 'Others'"),
        ({"verdict": "maybe"}, "verdict of R1: got 'maybe'"),
        ({"statement": " "}, "statement: got ' '"),
        ({"check": None}, "check of R1: expected a proof"),
        ({"verdict": "open"}, "check of R1: expected a proof"),
    ],
)
def test_mistakes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        replace(RELATIONS[0], **change)


def test_a_proof_by_an_erratum_is_its_check():
    assert proved_by("nst/N2")() == {one.id: one for one in load_errata("nst")}["N2"].check()
    with pytest.raises(ValueError, match="erratum: got 'nst/N99'"):
        proved_by("nst/N99")()


def test_a_relation_is_data():
    one = Relation("R0", GROUPS[0], "here", "said", "holds", "so it is", lambda: Evidence(True, "proved"))
    assert one.errata == ()
