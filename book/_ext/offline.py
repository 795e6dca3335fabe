"""No page asks the network for a script or a font.

MathJax comes from the package sphinx-mathjax-offline. It would copy all of MathJax (24 MB); pages need the
TeX to CHTML component, its fonts and the TeX extensions that it loads on demand. Thebe, which Jupyter Book
adds to every page, would be fetched from a content network and is not used here: its scripts are left out.
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


def drop_thebe(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: object) -> None:
    """Remove Thebe's scripts from a page."""
    context["script_files"] = [
        script
        for script in context.get("script_files", [])
        if "thebe" not in f"{script} {getattr(script, 'attributes', {}).get('body', '')}".lower()
    ]


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the extension."""
    app.setup_extension("sphinx.ext.mathjax")
    app.config.mathjax_path = f"mathjax/{COMPONENT}"
    app.connect("html-page-context", drop_thebe, priority=900)
    app.connect("build-finished", copy_mathjax)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
