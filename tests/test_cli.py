"""The command line: what it prints, what a machine may read, and its exit codes."""

import json
import re
import shutil

import pytest
from rich.console import Console
from typer.testing import CliRunner

from kdrefs.data import set_names
from reproductions import cli
from reproductions.harness import citation, console
from reproductions.harness.ledger import load_ledger
from reproductions.harness.profiles import load_column
from reproductions.harness.recording import record
from reproductions.harness.runs import RunStore, run_profile
from tests.harness.fakes import REPOSITORY, finish, make_column, start


@pytest.fixture
def column(request, tmp_path, monkeypatch):
    """The name of the recorded column in a test that asks for it, else of one without a ledger."""
    monkeypatch.setattr(cli, "COLUMNS", tmp_path)
    monkeypatch.setenv("KDREFS_RUNS", str(tmp_path / "store"))
    if "recorded" in request.fixturenames:
        return request.getfixturevalue("recorded").parent.name
    return make_column(tmp_path)


@pytest.fixture
def reproduce(column):
    """Call the command line in this process; return exit code, output and error output."""

    def call(*arguments):
        found = CliRunner().invoke(cli.app, list(map(str, arguments)))
        if found.exception and not isinstance(found.exception, SystemExit):
            raise found.exception
        return found.exit_code, found.stdout, found.stderr

    return call


@pytest.fixture(scope="module")
def master(tmp_path_factory):
    """A recorded column for the whole module: its folder."""
    folder = tmp_path_factory.mktemp("master")
    name = make_column(folder)
    results = run_profile(name, columns=folder, store=RunStore(folder / "store"), threads=1, probe=True)
    record(results, load_column(name, folder))
    return folder / name


@pytest.fixture
def recorded(master, tmp_path, monkeypatch):
    """Let the command line see a copy of the recorded column; return the path of its ledger."""
    shutil.copytree(master, tmp_path / master.name)
    return tmp_path / master.name / "ledger.json"


def key(column, arm="method", profile="quick"):
    return f"{column}/{profile}/synthetic/map/{arm}"


def test_run_announces_reports_and_records(reproduce, column, tmp_path):
    code, out, err = reproduce("run", column, "--threads", 1)
    assert code == 0
    assert "A fake column, profile quick: about 6 s · no download · 1 MB on disk" in err
    assert f"[16/16] {column}/quick/synthetic/twin#4 · map " in err
    assert re.search(r"synthetic +│ method +│ 5 +│ 4\d\.\d\d ± \d\.\d\d % +│ 5\d\.\d ± \d\.\d %", out)
    assert not (tmp_path / column / "ledger.json").exists()
    code, out, err = reproduce("run", column, "--threads", 1, "--record", "--json")
    assert code == 0
    assert {row["key"]: row["n"] for row in json.loads(out)}[f"{key(column)}@1"] == 5
    assert "recorded in" in err
    assert len(load_ledger(tmp_path / column / "ledger.json").runs) == 16


def test_run_prints_the_verdicts(reproduce, column, tmp_path):
    (tmp_path / column / "claims.toml").write_text(
        f'[[claim]]\nid = "helps"\ntitle = "The method [helps]"\nkind = "greater"\nsource = "a table"\ndelta = 1\n'
        f'keys.quick = ["{key(column)}", "{key(column, "student")}"]\nknown = "read in the paper"\n'
    )
    code, out, _ = reproduce("run", column, "--threads", 1)
    assert code == 0
    assert "The method [helps] (exploratory)" in out
    assert "direction holds" in out


def test_a_training_that_diverged_is_one_line(reproduce, column, monkeypatch):
    monkeypatch.setenv("FAKE_FAIL", "student")
    code, out, err = reproduce("run", column, "--threads", 1, "--arm", "student", "--seeds", "0")
    assert (code, out) == (1, "")
    run = f"{column}/quick/synthetic/student#0"
    assert err.splitlines()[-1] == f"reproduce: loss is not finite (in the run {run})"


def test_seeds_and_arms_choose(reproduce, column):
    code, out, _ = reproduce("run", column, "--seeds", "1,3-4", "--arm", "method", "--arm", "twin", "--json")
    rows = json.loads(out)
    assert code == 0
    assert {row["key"].split("/")[-1]: list(row["values"]) for row in rows} == {
        "method@1": ["1", "3", "4"],
        "twin@1": ["1", "3", "4"],
    }


def test_plan_lists_each_run_with_the_command_that_executes_it_alone(reproduce, column, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "log"))
    code, out, _ = reproduce("plan", "--threads", 1, "--seeds", "0,3", "--json")
    plan = json.loads(out)
    assert code == 0
    assert [(run["arm"], run["seed"], run["done"]) for run in plan["runs"]] == [
        ("teacher", 0, False),
        *((arm, seed, False) for arm in ("student", "method", "twin") for seed in (0, 3)),
    ]
    run = plan["runs"][4]
    program, *arguments = run["command"].split()
    assert program == "reproduce"
    assert reproduce(*arguments)[0] == 0
    assert [str(path) for path in tmp_path.rglob("result.json")] == [run["result"]]
    assert run["result"].startswith(f"{plan['store']}/runs/{column}/")
    assert [line.rsplit(" ", 1)[0] for line in (tmp_path / "log").read_text().splitlines()] == [
        "method#3 None",
        "method#3 50",
    ]
    code, out, _ = reproduce("plan", column, "--threads", 1, "--seeds", "0,3", "--device", "cpu")
    assert code == 0
    assert re.search(rf"{column} +│ synthetic +│ method +│ 0, 3 +│ 1 of 2", out)
    assert re.search(r"teacher +│ 0 +│ 0 of 1", out)


def test_results_of_earlier_code_are_recorded_without_running(reproduce, column, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "log"))
    _, out, _ = reproduce("run", column, "--profile", "standard", "--json")
    source = json.loads(out)[0]["provenance"][0]["source"]
    executed = (tmp_path / "log").read_text()
    assert reproduce("run", column, "--profile", "standard", "--record", "--source", source[:12])[0] == 0
    assert (tmp_path / "log").read_text() == executed
    assert (tmp_path / column / "ledger.json").exists()


def test_show_tells_value_and_origin(reproduce, column, recorded):
    code, out, _ = reproduce("show", key(column))
    number = load_ledger(recorded).number(key(column))
    assert code == 0
    for text in (
        f"{key(column)}@1",
        number.text(),
        "(Student t, n = 5)",
        "fresh",
        number.runs[0].provenance.source[:12],
        "1 threads",
        f"reproduce run {column} --profile quick --data synthetic --arm method --seeds 0",
    ):
        assert text in out
    code, out, _ = reproduce("show", f"{key(column)}@1", "--json")
    found = json.loads(out)
    assert (found["mean"], found["n"], found["status"]) == (number.mean, 5, "fresh")
    assert found["interval"] == list(number.interval)
    assert len(found["provenance"]) == 5


def test_cite_gives_sentence_bibtex_version_and_digest(reproduce, column, recorded):
    code, out, _ = reproduce("cite", key(column))
    number = load_ledger(recorded).number(key(column))
    digest = number.runs[0].provenance.source
    assert code == 0
    assert (
        f"mAP of “method” on synthetic (profile quick): {number.text()} (mean and 95 % interval of 5 seeds;"
        in out
    )
    assert f"@misc{{kdrefs-{column}-quick-synthetic-map-method-1," in out
    assert r"\%" in out
    assert "@article{hinton2015kd," in out
    assert f"version 0.1.0, source digest {digest}, fresh" in out
    assert "url" not in out.split("@article")[0]
    code, out, _ = reproduce("cite", key(column), "--json")
    assert json.loads(out)["source_digest"] == digest


def test_bibtex_entries_are_copied_whole(tmp_path):
    path = tmp_path / "references.bib"
    path.write_text("@article{a,\n title = {{A} {nested {title}}},\n}\n\n@book{ab, title={B}}\n")
    assert citation.bibtex_entry(path, "a") == "@article{a,\n title = {{A} {nested {title}}},\n}"
    assert citation.bibtex_entry(path, "ab") == "@book{ab, title={B}}"
    for missing in ("b", "A"):
        with pytest.raises(citation.HarnessError, match="no entry"):
            citation.bibtex_entry(path, missing)


def test_a_url_is_cited_once_there_is_one(column, recorded, tmp_path):
    root = tmp_path / "checkout"
    (root / "book").mkdir(parents=True)
    text = (
        (REPOSITORY / "pyproject.toml")
        .read_text()
        .replace('repository = ""', 'repository = "https://example.org/r"')
    )
    (root / "pyproject.toml").write_text(text)
    (root / "book" / "references.bib").write_text((REPOSITORY / "book" / "references.bib").read_text())
    number = load_ledger(recorded).number(key(column))
    assert "{https://example.org/r}" in citation.cite(number, load_column(column, tmp_path), root).bibtex


def test_verify_agrees_then_differs(reproduce, column, recorded, monkeypatch):
    code, out, _ = reproduce("verify", column)
    assert code == 0
    assert "equal bits on 5 seeds" in out
    assert "differs" not in out
    monkeypatch.setenv("FAKE_SHIFT", "3")
    code, out, _ = reproduce("verify", column, "--json")
    assert code == 1
    assert {item["verdict"] for item in json.loads(out)["agreements"]} == {"differs"}


def test_verify_runs_anew_and_leaves_the_ledger(reproduce, column, recorded, tmp_path, monkeypatch):
    before = recorded.read_bytes()
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "log"))
    reproduce("verify", column)
    assert len((tmp_path / "log").read_text().splitlines()) == 16
    assert recorded.read_bytes() == before


def test_verify_notices_a_number_that_is_gone(reproduce, column, recorded, monkeypatch):
    import importlib

    module = importlib.import_module(f"reproductions.{column}.run")
    monkeypatch.setitem(module.PROFILES, "quick", module.Config("quick", arms=("teacher", "student")))
    code, _, err = reproduce("verify", column)
    assert code == 1
    assert f"{key(column, 'twin')} is recorded, but the profile does not give it any more" in err


def test_revalidate_has_nothing_to_do_on_the_same_code(reproduce, column, recorded):
    assert reproduce("revalidate", column)[:2] == (0, "nothing is stale\n")


def test_compare(reproduce, column, recorded):
    code, out, _ = reproduce("compare", key(column), key(column, "student"))
    assert code == 0
    assert "paired difference +" in out
    code, out, _ = reproduce("compare", f"{key(column)}@1", key(column), "--json")
    assert json.loads(out)["verdict"] == "agrees"


def test_list(reproduce, column, recorded):
    code, out, _ = reproduce("list", "--json")
    (row,) = json.loads(out)
    assert code == 0
    assert (row["column"], row["numbers"], row["stale"]) == (column, 8, 0)
    assert list(row["profiles"]) == ["quick", "standard", "paper"]
    assert "8 numbers" in reproduce("list")[1]


def test_errata_run_their_checks(reproduce, column, tmp_path):
    text = (
        "from reproductions.harness.errata import Erratum, Evidence\n"
        "ERRATA = (Erratum('P1', 'note', 'note', 'x [0]', 'y', lambda: Evidence(HOLDS, 'Proved by 2 = 2.')),)\n"
    )
    path = tmp_path / column / "errata.py"
    path.write_text(text.replace("HOLDS", "True"))
    code, out, _ = reproduce("errata")
    assert code == 0
    assert "Proved by 2 = 2." in out
    assert "x [0]" in out
    code, out, _ = reproduce("errata", column, "--json")
    assert [(row["id"], row["holds"]) for row in json.loads(out)] == [(f"{column}/P1", True)]


def test_an_erratum_that_does_not_hold_is_an_error(reproduce, column, tmp_path):
    (tmp_path / column / "errata.py").write_text(
        "from reproductions.harness.errata import Erratum, Evidence\n"
        "ERRATA = (Erratum('P1', 'note', 'note', 'x', 'y', lambda: Evidence(False, '2 = 3.')),)\n"
    )
    code, out, err = reproduce("errata", column)
    assert code == 1
    assert "DOES NOT HOLD: 2 = 3." in out
    assert f"do not hold: {column}/P1" in err


def test_errata_of_chosen_columns_and_sources(reproduce, column, tmp_path):
    other = make_column(tmp_path)
    kinds = {column: ("note", "paper"), other: ("note", "code")}
    for name, (first, second) in kinds.items():
        (tmp_path / name / "errata.py").write_text(
            "from reproductions.harness.errata import Erratum, Evidence\n"
            "PROOF = lambda: Evidence(True, 'Proved.')\n"
            f"ERRATA = tuple(Erratum(kind, 'a place', kind, 'x', 'y', PROOF) for kind in ({first!r}, {second!r}))\n"
        )

    def ids(*arguments):
        code, out, err = reproduce("errata", *arguments, "--json")
        assert code == 0
        assert f"checked: {len(json.loads(out))}; do not hold: none" in err
        return [row["id"] for row in json.loads(out)]

    assert set(ids()) == {f"{name}/{kind}" for name, both in kinds.items() for kind in both}
    assert ids(other) == [f"{other}/note", f"{other}/code"]
    assert ids(other, column, other) == [
        f"{other}/note",
        f"{other}/code",
        f"{column}/note",
        f"{column}/paper",
    ]
    assert set(ids("--kind", "note")) == {f"{column}/note", f"{other}/note"}
    assert ids(column, "--kind", "code") == []


def test_errata_fit_a_narrow_terminal(reproduce, column, tmp_path, monkeypatch):
    long = "many words " * 30
    (tmp_path / column / "errata.py").write_text(
        "from reproductions.harness.errata import Erratum, Evidence\n"
        f"ERRATA = (Erratum('P1', {long!r}, 'code', {long!r}, {long!r}, lambda: Evidence(True, {long!r})),)\n"
    )
    monkeypatch.setattr(console, "Console", lambda **options: Console(**options | {"width": 60}))
    _, out, _ = reproduce("errata")
    lines = out.splitlines()
    assert max(map(len, lines)) <= 60
    assert out.count("many words") > 60  # some are broken between lines
    assert [line.split()[0] for line in lines if line[:1].strip()] == [
        f"{column}/P1",
        "printed",
        "right",
        "evidence",
    ]


def test_data_list_and_get(reproduce):
    code, out, _ = reproduce("data", "list", "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert code == 0
    assert set(rows) == set(set_names())
    assert rows["digits"]["present"]
    assert "comes with scikit-learn" in reproduce("data", "list")[1]
    code, out, _ = reproduce("data", "get", "digits")
    assert code == 0
    assert re.fullmatch(r"digits: train [0-9a-f]{12}, test [0-9a-f]{12}\n", out)


def test_doctor(reproduce, column, recorded):
    code, out, _ = reproduce("doctor", "--json")
    checks = {check["name"]: check for check in json.loads(out)}
    assert code == (1 if any(check["ok"] is False for check in checks.values()) else 0)
    assert checks["Python"]["ok"]
    assert checks["run store"]["ok"] in (True, False)
    assert checks[f"ledger of {column}"]["detail"] == "8 numbers, 0 of them stale"
    recorded.write_text(recorded.read_text().replace('"unit": "%"', '"unit": "points"', 1))
    code, out, _ = reproduce("doctor")
    assert code == 1
    assert re.search(rf"ledger of {column} MISSING .* edited or damaged", " ".join(out.split()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "COLUMN/quick/synthetic/mop/method"], "did you mean 'COLUMN/quick/synthetic/map/method'"),
        (["show", "COLUMN/quick/synthetic/map/method@9"], "has no version '9'"),
        (["cite", "nothing"], "no number 'nothing'"),
        (["compare", "COLUMN/quick/synthetic/map/method", "COLUMN/x"], "no number 'COLUMN/x'"),
        (["run", "COLUM"], "no column 'COLUM'"),
        (["run", "COLUMN", "--profile", "quik"], "did you mean 'quick'"),
        (["run", "COLUMN", "--arm", "metod"], "did you mean 'method'"),
        (["run", "COLUMN", "--data", "syntetic"], "did you mean 'synthetic'"),
        (["run", "COLUMN", "--seeds", "a"], "expected something like 0,1,2 or 0-4"),
        (["run", "COLUMN", "--device", "tpu"], "expected cpu or cuda"),
        (["plan", "COLUM"], "no column 'COLUM'"),
        (["plan", "--profile", "quik"], "no column has a profile 'quik'; did you mean 'quick'"),
        (["plan", "--device", "tpu"], "expected cpu or cuda"),
        (
            ["run", "COLUMN", "-p", "paper", "--record", "--seeds", "9"],
            "lacks planned seeds: 0",
        ),
        (["verify", "COLUMN", "--profile", "paper"], "nothing is recorded for COLUMN/paper"),
        (["verify", "nothing"], "no column 'nothing'"),
        (["errata", "nothing"], "no column 'nothing'"),
        (["errata", "--kind", "book"], "'book' is not one of"),
        (["data", "get", "digit"], "did you mean 'digits'"),
        (["nothing"], "No such command"),
        (["show"], "Missing argument"),
    ],
)
def test_what_cannot_be_done_exits_with_2(reproduce, column, recorded, arguments, message):
    code, out, err = reproduce(*(argument.replace("COLUMN", column) for argument in arguments))
    assert code == 2
    assert out == "" or "--record" in arguments
    assert message.replace("COLUMN", column) in " ".join(err.split())


def test_a_damaged_ledger_is_named(reproduce, column, recorded):
    recorded.write_text(recorded.read_text().replace('"unit": "%"', '"unit": "points"', 1))
    code, _, err = reproduce("show", key(column))
    assert code == 2
    assert f"{column}/ledger.json: numbers → " in err


def test_ctrl_c_says_how_to_go_on(reproduce, column, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "load_column", interrupted)
    code, _, err = reproduce("run", column)
    assert code == 1
    assert "the same command goes on from here" in err


def test_reading_the_ledger_does_not_wait_for_torch():
    code = (
        "import sys; from reproductions.cli import app\n"
        "for words in (['--help'], ['show', 'pkt/quick/nothing/at/all']):\n"
        "    try: app(words)\n"
        "    except SystemExit as error: print(error.code)\n"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    (out,) = finish(start(code))
    commands = ["list", "run", "verify", "revalidate", "show", "compare", "cite", "errata", "data", "doctor"]
    commands += ["export", "import"]
    assert [name for name in commands if f" {name} " not in out] == []
    assert out.split()[-1] == "2"
