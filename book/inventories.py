"""Sphinx inventories written from a short list, so that links to other projects need no network to build."""

from __future__ import annotations

import tomllib
import zlib
from pathlib import Path


def inventory(project: str, objects: dict[str, dict[str, str]]) -> bytes:
    """Return an inventory (version 2) as bytes.

    Args:
        project: Name shown in link titles.
        objects: Role (``py:class``) to object name to address relative to the project's documentation;
            a trailing ``$`` stands for the object's name.
    """
    lines = [
        f"{name} {role} 1 {address} -\n"
        for role, entries in sorted(objects.items())
        for name, address in sorted(entries.items())
    ]
    header = f"# Sphinx inventory version 2\n# Project: {project}\n# Version: \n"
    header += "# The remainder of this file is compressed using zlib.\n"
    return header.encode() + zlib.compress("".join(lines).encode())


def write_all(source: Path, folder: Path) -> None:
    """Write ``folder/<project>.inv`` for every project listed in the TOML file ``source``."""
    folder.mkdir(parents=True, exist_ok=True)
    for project, objects in tomllib.loads(source.read_text(encoding="utf8")).items():
        (folder / f"{project}.inv").write_bytes(inventory(project, objects))
