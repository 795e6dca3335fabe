"""MathJax from the package sphinx-mathjax-offline: no page asks the network for a script or a font.

The package would copy all of MathJax (24 MB); pages need the TeX to CHTML component, its fonts and the TeX
extensions that it loads on demand.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.util.fileutil import copy_asset

COMPONENT = "tex-chtml.js"
FOLDERS = ("input/tex/extensions", "output/chtml/fonts")


def copy_mathjax(app: Sphinx, exception: Exception | None) -> None:
    """Copy the parts of MathJax that pages use, once a build has succeeded."""
    spec = find_spec("sphinx-mathjax-offline")
    if exception is not None or spec is None or spec.origin is None:
        return
    source = Path(spec.origin).parent / "static" / "mathjax"
    target = Path(app.outdir) / "_static" / "mathjax"
    for part in FOLDERS:
        copy_asset(source / part, target / part)
    copy_asset(source / COMPONENT, target)


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the extension."""
    app.setup_extension("sphinx.ext.mathjax")
    app.config.mathjax_path = f"mathjax/{COMPONENT}"
    app.connect("build-finished", copy_mathjax)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
