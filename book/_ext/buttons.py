"""Buttons that need the project's address: repository, issues, Colab."""

from __future__ import annotations

import tomllib
from typing import Any

from sphinx.application import Sphinx
from sphinx.config import Config

from book.paths import ROOT

COLAB = "https://colab.research.google.com/github"
PUBLISHED = "gh-pages"  # the branch that the built site is published from


def project() -> dict[str, str]:
    """Return the table ``[tool.kdrefs]``: owner, repository and site, each empty where unknown."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))
    return dict(table.get("tool", {}).get("kdrefs", {}))


def add_addresses(app: Sphinx, config: Config) -> None:
    """Show the repository and issue buttons where there is a repository; name the site where there is one."""
    config.html_baseurl = project().get("site", "")
    if repository := project().get("repository"):
        options = {"repository_url": repository, "use_repository_button": True, "use_issues_button": True}
        config.html_theme_options = config.html_theme_options | options


def colab_link(repository: str, page: str) -> str | None:
    """Return the Colab address of a published notebook; None where the repository is not on GitHub."""
    host, _, path = repository.rstrip("/").removesuffix(".git").partition("github.com/")
    return f"{COLAB}/{path}/blob/{PUBLISHED}/_sources/{page}.ipynb" if host and path else None


def add_colab(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: object) -> None:
    """Put a Colab button first in the header of a chapter, where there is a repository."""
    link = colab_link(project().get("repository", ""), page)
    if link is None or page not in app.env.found_docs or not app.env.doc2path(page).endswith(".ipynb"):
        return
    button = {
        "type": "link",
        "url": link,
        "tooltip": "Open in Colab",
        "icon": "fas fa-up-right-from-square",
        "text": "",
        "label": "colab-button",
    }
    context["header_buttons"].insert(0, button)


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the extension."""
    app.connect("config-inited", add_addresses)
    app.connect("html-page-context", add_colab, priority=600)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
