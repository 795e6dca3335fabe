"""Small repairs between autodoc and nitpicky references.

Annotations name things as a module's own code does (``Tensor``, ``nn.Module``, ``Output``) or by a public
name that only re-exports (``kdrefs.data.DataError``). Such a name is looked up in its module and linked to
where the thing is defined. What is no name at all (a shape such as ``'batch width'``) is text.
"""

from __future__ import annotations

import importlib
from typing import Any

from docutils.nodes import Element
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.domains.python import PythonDomain
from sphinx.environment import BuildEnvironment
from sphinx.util.nodes import make_refnode

_PLAIN = "kdrefs-plain-docstring"


def find_object(module: str | None, name: str) -> object | None:
    """Return the object called ``name``, absolute or as seen from ``module``; None if there is none."""
    for full in [f"{module}.{name}"] * bool(module) + [name]:
        parts = full.split(".")
        for size in range(len(parts) - 1, 0, -1):
            try:
                found: object = importlib.import_module(".".join(parts[:size]))
            except ImportError:
                continue
            try:
                for part in parts[size:]:
                    found = getattr(found, part)
            except AttributeError:
                break
            return found
    return None


def resolve(app: Sphinx, env: BuildEnvironment, node: pending_xref, content: Element) -> Element | None:
    """Link a Python reference under the name of its definition; leave text that is no name as it is."""
    if node.get("refdomain") != "py":
        return None
    target = node["reftarget"]
    if not all(part.isidentifier() for part in target.split(".")):
        return content
    found = find_object(node.get("py:module"), target)
    module, name = getattr(found, "__module__", None), getattr(found, "__qualname__", None)
    if found is None:
        return None
    if not module or not name:  # an alias such as `Array = np.ndarray | Tensor`
        return content
    # The next handler in line, intersphinx, looks for the defining name too.
    node["reftarget"] = f"{module}.{name}"
    domain = env.get_domain("py")
    assert isinstance(domain, PythonDomain)
    for _, entry in domain.find_obj(env, "", "", node["reftarget"], None):
        return make_refnode(
            app.builder, node["refdoc"], entry.docname, entry.node_id, content, node["reftarget"]
        )
    return None


def keep(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Remember the comment of a module's constant before napoleon reads "text: text" as a type."""
    if what in ("data", "attribute"):
        app.env.temp_data[_PLAIN] = list(lines)


def restore(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Put the remembered comment back."""
    if what in ("data", "attribute"):
        lines[:] = app.env.temp_data.pop(_PLAIN)


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the extension."""
    app.setup_extension("sphinx.ext.autodoc")
    app.connect("missing-reference", resolve, priority=400)
    app.connect("autodoc-process-docstring", keep, priority=400)
    app.connect("autodoc-process-docstring", restore, priority=600)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
