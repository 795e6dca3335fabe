"""Errata: data and proof, found by folder."""

import pytest

from reproductions.harness.errata import Erratum, Evidence, errata_columns, errata_title, load_errata
from reproductions.harness.profiles import HarnessError, column_names

FIELDS = {
    "id": "P1",
    "where": "note, equation 3",
    "kind": "note",
    "printed": "$k \\ne j$",
    "right": "all $k$",
}
FILE = """
from reproductions.harness.errata import Erratum, Evidence

def check():
    return Evidence(1 + 1 == 2, "Two.", {"sum": 2.0})

def erratum(name):
    return Erratum(name, "note", "note", "printed", "right", check)

"""


@pytest.fixture
def load(column, columns):
    def call(code):
        (columns / column / "errata.py").write_text(FILE + code)
        return load_errata(column, columns)

    return call


def test_errata_are_found_and_proved(load):
    (found,) = load("ERRATA = (erratum('P1'),)")
    assert found.id == "P1"
    assert found.check() == Evidence(True, "Two.", {"sum": 2.0})


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("", "ERRATA must be a tuple of Erratum"),
        ("ERRATA = [erratum('P1')]", "ERRATA must be a tuple of Erratum"),
        ("ERRATA = ('P1',)", "ERRATA must be a tuple of Erratum"),
        ("ERRATA = (erratum('P1'), erratum('P1'))", "the id 'P1' stands twice"),
    ],
)
def test_a_file_that_breaks_the_rules_is_named(load, column, code, message):
    with pytest.raises(HarnessError, match=f"reproductions/{column}/errata.py: {message}"):
        load(code)


def test_a_column_without_errata_has_none(column, columns):
    assert load_errata(column, columns) == ()


def test_an_unknown_column_gets_close_matches(column, columns):
    with pytest.raises(HarnessError, match=f"did you mean '{column}'"):
        load_errata(column + "y", columns)


def test_toolboxes_have_errata_without_an_experiment(columns):
    (columns / "toolboxes").mkdir(parents=True)
    (columns / "toolboxes" / "errata.py").touch()
    assert errata_columns(columns) == ("toolboxes",)
    assert column_names(columns) == ()
    assert errata_title("toolboxes", columns) == "Public toolboxes"


def test_the_errata_of_a_column_stand_under_its_title(column, columns):
    assert errata_title(column, columns) == "A fake column"
    with pytest.raises(HarnessError, match=f"did you mean '{column}'"):
        errata_title(column + "y", columns)


@pytest.mark.parametrize(
    ("field", "value"),
    [("id", ""), ("where", " "), ("printed", ""), ("right", None), ("kind", "book"), ("check", "a proof")],
)
def test_an_erratum_is_complete(field, value):
    fields = {**FIELDS, "check": lambda: Evidence(True, "Proved.")}
    Erratum(**fields)
    with pytest.raises(ValueError, match=field):
        Erratum(**{**fields, field: value})
