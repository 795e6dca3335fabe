"""`reproduce data`: the data sets, what they weigh, and fetching one."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer
from rich.table import Table

from reproductions.harness.console import say
from reproductions.harness.console import show as output
from reproductions.harness.profiles import HarnessError, suggestion

app = typer.Typer(no_args_is_help=True, help="The data sets: what there is, and fetching one.")


@app.command("list")
def list_data(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the data sets with what they weigh and whether they are here."""
    from kdrefs.data import is_cached, set_info, set_names

    infos = [dataclasses.asdict(set_info(name)) | {"present": is_cached(name)} for name in set_names()]
    table = Table("set", "download", "on disk", "here", "source")
    for info in infos:
        sizes = [f"{info[field] / 1e6:.0f} MB" for field in ("download_bytes", "disk_bytes")]
        table.add_row(info["name"], *sizes, "yes" if info["present"] else "no", info["source"])
    output(as_json, infos, table)


@app.command("get")
def get_data(names: list[str]) -> None:
    """Fetch data sets into the cache and check their digests."""
    from kdrefs.data import load_set, set_names

    for name in names:
        if name not in set_names() and not _is_here(name):
            raise HarnessError(f"no data set {name!r}{suggestion(name, set_names())}")
    for name in names:
        digests = load_set(name).digests
        say(f"{name}: " + ", ".join(f"{split} {digest[:12]}" for split, digest in digests.items()))


def _is_here(name: str) -> bool:
    """Whether a set that has no source is in the cache; a text that cannot be a name is not."""
    from kdrefs.data import is_cached

    try:
        return is_cached(name)
    except ValueError:
        return False
