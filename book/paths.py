"""Where things lie, and how to notice a path of this machine in something about to be published."""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def machine_paths(text: str) -> list[str]:
    """Return the paths in ``text`` that exist on one machine only: checkout, home, environment, scratch."""
    folders = {str(ROOT), sys.prefix, str(Path.home()), tempfile.gettempdir()} - {"/"}
    known = "|".join(re.escape(folder) for folder in sorted(folders, key=len, reverse=True))
    # What precedes must not belong to a longer path or an address; what follows must end the folder's name.
    pattern = rf"(?<![\w.~/-])(?:{known})(?=[/\\])[^\s\"'<>)]*|[^\s\"'<>(]*site-packages/[^\s\"'<>)]*"
    return sorted(set(re.findall(pattern, text)))
