"""`reproduce`: run the experiments, check the ledger, read and cite its numbers.

Exit codes: 0 all is well; 1 something was found (a number differs, an erratum does not hold, the
machine lacks something, the command was interrupted); 2 the command cannot be done as asked.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from reproductions.harness.console import Commands, device_of, integers, notice, progress, say
from reproductions.harness.console import show as output
from reproductions.harness.data_commands import app as data_app
from reproductions.harness.errata import Kind
from reproductions.harness.profiles import (
    HarnessError,
    announcement,
    column_names,
    get_profile,
    load_column,
)

COLUMNS: Path | None = None  # the folder that holds the columns; None for the package itself

app = typer.Typer(
    cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__
)
app.add_typer(data_app, name="data")

ColumnArgument = Annotated[str, typer.Argument(help="A paper's column, such as pkt.")]
KeyArgument = Annotated[
    str,
    typer.Argument(help="column/profile/data/metric/arm, and @version or %machine (of an import) after it."),
]
ProfileOption = Annotated[str, typer.Option("--profile", "-p", help="quick, standard or paper.")]
JobsOption = Annotated[int, typer.Option(min=1, max=1024, help="Number of processes.")]
ThreadsOption = Annotated[int | None, typer.Option(min=1, max=1024, help="torch threads of each process.")]
DeviceOption = Annotated[str | None, typer.Option(help="cpu or cuda.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("list")
def list_columns(as_json: JsonOption = False) -> None:
    """List the columns, their profiles and what is recorded."""
    from reproductions.harness.ledger import column_ledger, machine_ledgers

    rows: list[dict[str, Any]] = []
    for name in column_names(COLUMNS):
        column, numbers = load_column(name, COLUMNS), column_ledger(name, COLUMNS).numbers.values()
        rows.append(
            {
                "column": name,
                "title": column.title,
                "profiles": {key: announcement(config) for key, config in column.profiles.items()},
                "numbers": len(numbers),
                "stale": sum(number.status == "stale" for number in numbers),
                "machines": {key: len(of.numbers) for key, of in machine_ledgers(name, COLUMNS).items()},
            }
        )
    table = Table("column", "paper", "profiles", "recorded")
    for row in rows:
        profiles = "\n".join(f"{key}: {text}" for key, text in row["profiles"].items())
        stale = f", {row['stale']} stale" if row["stale"] else ""
        recorded = [f"{row['numbers']} numbers{stale}"]
        recorded += [f"{count} from {machine}" for machine, count in row["machines"].items()]
        table.add_row(row["column"], row["title"], profiles, "\n".join(recorded))
    output(as_json, rows, table)


@app.command()
def run(
    column: ColumnArgument,
    profile: ProfileOption = "quick",
    seeds: Annotated[str | None, typer.Option(help="Such as 0,1,2 or 0-4.")] = None,
    arm: Annotated[list[str] | None, typer.Option(help="Only this arm; may be given several times.")] = None,
    data: Annotated[
        list[str] | None, typer.Option(help="Only this data; may be given several times.")
    ] = None,
    jobs: JobsOption = 1,
    threads: ThreadsOption = None,
    device: DeviceOption = None,
    record: Annotated[bool, typer.Option("--record", help="Write the results into the ledger.")] = False,
    probe: Annotated[bool, typer.Option("--probe", help="Take what `revalidate` needs in `quick`, too.")] = False,
    source: Annotated[
        str | None, typer.Option(help="Run nothing; take earlier results of this digest.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Run what is missing of a profile; interrupted, the same command goes on."""
    from reproductions.harness.claims import judge, load_claims
    from reproductions.harness.ledger import Ledger, column_ledger
    from reproductions.harness.recording import merged, require_planned, stored_results
    from reproductions.harness.recording import record as write
    from reproductions.harness.report import number_record, numbers_table, verdicts_table
    from reproductions.harness.runs import RunStore, chosen_runs, run_profile

    known = load_column(column, COLUMNS)
    config = get_profile(known, profile, None if seeds is None else integers(seeds))
    device = device_of(device)
    if source is not None:
        results = stored_results(RunStore(), column, profile, source)
    else:
        planned, store = chosen_runs(known, config, arm or None, data or None), RunStore()
        if record:
            require_planned(planned, known, column_ledger(column, COLUMNS), device or "cpu")
        store.require_writable()
        notice(f"{known.title}, profile {profile}: {announcement(config)}")
        results = run_profile(
            column,
            profile,
            seeds=config.seeds,
            arms=arm or None,
            data=data or None,
            jobs=jobs,
            threads=threads,
            device=device,
            store=store,
            probe=True if record or probe else None,
            on_result=progress(len(planned)),
            columns=COLUMNS,
        )
    here = merged(Ledger.empty(column, results[0].provenance.source), results, known)
    numbers = here.numbers.values()
    output(as_json, [number_record(number) for number in numbers], numbers_table(numbers))
    claims = [claim for claim in load_claims(column, COLUMNS) if profile in claim.keys]
    if claims and not as_json:
        output(False, None, verdicts_table(judge(claims, profile, here)))
    if record:
        write(results, known)
        notice(f"recorded in reproductions/{column}/ledger.json")


@app.command()
def plan(
    columns: Annotated[
        list[str] | None, typer.Argument(metavar="[COLUMN]...", help="Default: all that have the profile.")
    ] = None,
    profile: ProfileOption = "quick",
    seeds: Annotated[str | None, typer.Option(help="Such as 0,1,2 or 0-4.")] = None,
    threads: ThreadsOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the runs of a profile and which are done; as JSON with each one's command and result file."""
    import torch

    from reproductions.harness.plan import plan_runs, planned_records, planned_table
    from reproductions.harness.runs import RunStore

    store = RunStore()
    planned = plan_runs(
        profile,
        device=device_of(device, here=False) or "cpu",
        threads=threads or torch.get_num_threads(),
        names=columns or (),
        seeds=None if seeds is None else integers(seeds),
        store=store,
        columns=COLUMNS,
    )
    rows = {"store": str(store.root.absolute()), "runs": planned_records(planned)}
    output(as_json, rows, planned_table(planned))


@app.command()
def verify(
    column: ColumnArgument,
    profile: ProfileOption = "quick",
    jobs: JobsOption = 1,
    threads: ThreadsOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run a profile from scratch and compare it with the ledger."""
    from reproductions.harness.agreement import agree_all
    from reproductions.harness.ledger import Ledger, column_ledger
    from reproductions.harness.recording import merged
    from reproductions.harness.report import agreements_table
    from reproductions.harness.runs import RunStore, run_profile

    known = load_column(column, COLUMNS)
    config = get_profile(known, profile)
    ledger = column_ledger(column, COLUMNS)
    recorded = {key: n for key, n in ledger.numbers.items() if key.startswith(f"{column}/{profile}/")}
    if not recorded:
        raise HarnessError(f"nothing is recorded for {column}/{profile}; `reproduce run --record` does that")
    origin = next(iter(recorded.values())).runs[0].provenance
    device = device_of(device or origin.device)
    notice(f"{known.title}, profile {profile}: {announcement(config)}")
    with tempfile.TemporaryDirectory(prefix="reproduce-") as folder:
        results = run_profile(
            column,
            profile,
            jobs=jobs,
            threads=threads or origin.threads,
            device=device,
            store=RunStore(folder),
            probe=False,
            on_result=progress(len(known.plan(config))),
            columns=COLUMNS,
        )
    now = merged(Ledger.empty(column, ledger.source), results, known)
    pairs = [(now.number(key), number) for key, number in recorded.items() if key in now]
    gone = sorted(key for key in recorded if key not in now)
    agreements = agree_all(pairs)
    rows = {"agreements": [dataclasses.asdict(item) for item in agreements], "gone": gone}
    output(as_json, rows, agreements_table(agreements))
    for key in gone:
        notice(f"{key} is recorded, but the profile does not give it any more")
    if gone or any(item.verdict == "differs" for item in agreements):
        raise typer.Exit(1)


@app.command()
def revalidate(column: Annotated[str | None, typer.Argument(help="Default: every column.")] = None) -> None:
    """Run the first steps of stale runs again; those that give the same become valid on the new code."""
    from reproductions.harness.ledger import FILE
    from reproductions.harness.profiles import columns_root
    from reproductions.harness.revalidation import Probed
    from reproductions.harness.revalidation import revalidate as probe_again

    def show(item: Probed) -> None:
        say(f"{item.id}: {item.status}, {item.reason}")

    names = column_names(COLUMNS) if column is None else [load_column(column, COLUMNS).name]
    recorded = [name for name in names if (columns_root(COLUMNS) / name / FILE).exists()]
    outcomes = [item for name in recorded for item in probe_again(name, columns=COLUMNS, on_probe=show)]
    if not outcomes:
        say("nothing is stale")
    if any(item.status == "stale" for item in outcomes):
        raise typer.Exit(1)


@app.command()
def show(key: KeyArgument, as_json: JsonOption = False) -> None:
    """Show a number with its interval and where it comes from."""
    from reproductions.harness.ledger import find_number
    from reproductions.harness.report import number_lines, number_record

    number = find_number(key, COLUMNS)
    output(as_json, number_record(number), number_lines(number))


@app.command()
def compare(first: KeyArgument, second: KeyArgument, as_json: JsonOption = False) -> None:
    """Compare two numbers: two recordings of one, or two arms paired by seed."""
    from reproductions.harness.agreement import compare as compared
    from reproductions.harness.ledger import find_number

    found = compared(find_number(first, COLUMNS), find_number(second, COLUMNS))
    output(as_json, dataclasses.asdict(found), [(found.key, f"{found.text}: {found.verdict}")])


@app.command()
def cite(key: KeyArgument, as_json: JsonOption = False) -> None:
    """Print a sentence and BibTeX for a number."""
    from reproductions.harness.citation import cite as citation
    from reproductions.harness.ledger import find_number

    number = find_number(key, COLUMNS)
    found = citation(number, load_column(number.key.split("/")[0], COLUMNS))
    if found.status == "stale":
        notice("this number is stale: the code changed since; `reproduce revalidate` looks into it")
    if as_json:
        output(True, dataclasses.asdict(found), ())
        return
    for text in (found.sentence, found.bibtex, found.paper_bibtex):
        say(f"{text}\n")
    say(f"version {found.version}, source digest {found.source_digest}, {found.status}")


@app.command("export")
def export_numbers(
    column: ColumnArgument,
    file: Annotated[Path, typer.Argument(help="A new file.")],
    profile: ProfileOption = "quick",
) -> None:
    """Write what is recorded of a profile into a file that `import` takes in on another machine."""
    from reproductions.harness.exchange import export_profile
    from reproductions.harness.ledger import column_ledger

    get_profile(load_column(column, COLUMNS), profile)
    count = export_profile(column_ledger(column, COLUMNS), profile, file)
    notice(f"{count} numbers of {column}/{profile} are in {file}")


@app.command("import")
def import_numbers(
    file: Annotated[Path, typer.Argument(help="What `export` wrote on the other machine.")],
    name: Annotated[
        str | None, typer.Option("--as", help="Name of the machine; default: made from its device's.")
    ] = None,
) -> None:
    """Take numbers in from another machine, to be shown beside those recorded here as KEY%MACHINE.

    Code, configuration, data, seeds and digests are checked; runs of the column's own ledger are refused.
    """
    from reproductions.harness.exchange import import_file

    done = import_file(file, name, COLUMNS)
    what = f"{done.numbers} numbers of {done.column} from {done.machine}"
    notice(f"imported {what}" if done.changed else f"nothing new: {what} are here already")


@app.command()
def errata(
    columns: Annotated[
        list[str] | None, typer.Argument(metavar="[COLUMN]...", help="Default: all of them, and toolboxes.")
    ] = None,
    kind: Annotated[Kind | None, typer.Option(help="Only mistakes of this source.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Print the mistakes found in notes, papers and public code, and run the check of each."""
    from reproductions.harness.errata import errata_columns, load_errata

    chosen = {name: load_errata(name, COLUMNS) for name in columns or errata_columns(COLUMNS)}
    rows: list[dict[str, Any]] = []
    for name, known in chosen.items():
        for erratum in known:
            if kind not in (None, erratum.kind):
                continue
            values = {field: getattr(erratum, field) for field in ("kind", "where", "printed", "right")}
            evidence = dataclasses.asdict(erratum.check())
            rows.append({"id": f"{name}/{erratum.id}", **values, **evidence})
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column()
    for row in rows:
        table.add_row(f"[bold]{escape(row['id'])}[/]", f"{row['kind']} · {escape(row['where'])}")
        table.add_row("printed", escape(row["printed"]))
        table.add_row("right", escape(row["right"]))
        proof = row["summary"] if row["holds"] else f"DOES NOT HOLD: {row['summary']}"
        table.add_row("evidence", escape(proof))
        table.add_row()
    output(as_json, rows, table)
    failed = [row["id"] for row in rows if not row["holds"]]
    notice(f"checked: {len(rows)}; do not hold: {', '.join(failed) or 'none'}")
    if failed:
        raise typer.Exit(1)


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Look whether this machine has what the experiments need."""
    from reproductions.harness.doctor import examine
    from reproductions.harness.store import RunStore

    checks = list(examine(RunStore(), COLUMNS))
    signs = {True: "ok", False: "MISSING", None: ""}
    lines = [(check.name, f"{signs[check.ok]:8}{check.detail}") for check in checks]
    output(as_json, [dataclasses.asdict(check) for check in checks], lines)
    if any(check.ok is False for check in checks):
        raise typer.Exit(1)


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
