"""Check a built site without a network: links, anchors, ids, assets, alternative texts, tables, machine paths.

python -m book.check build/book/html
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from book.paths import machine_paths

# Templates that the theme leaves beside its scripts; no page links to them.
SKIPPED = ("webpack-macros.html",)
ASSETS = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "audio": "src"}
ASSET_LINKS = {"stylesheet", "icon", "preload", "prefetch", "modulepreload", "manifest", "preconnect"}
REMOTE_STYLE = re.compile(r"""(?:url\(\s*|@import\s+)["']?(?:https?:)?//""")
# A paragraph that begins as a row of a Markdown table: what printed it was not read as MyST.
RAW_TABLE = re.compile(r"<p>\s*(\| [^<\n]* \|)")
IMAGE_SUFFIXES = (".png", ".svg", ".jpg", ".jpeg", ".gif", ".webp")


@dataclass(frozen=True, order=True)
class Defect:
    """One defect of one page."""

    page: str
    kind: str
    detail: str

    def __str__(self) -> str:
        return f"{self.page}: {self.kind}: {self.detail}"


@dataclass
class Page(HTMLParser):
    """What one page offers and what it asks for."""

    ids: Counter[str] = field(default_factory=Counter)
    links: list[str] = field(default_factory=list)
    assets: list[str] = field(default_factory=list)
    unnamed_images: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note ids, links, assets and images without an alternative text."""
        values = {name: value or "" for name, value in attrs}
        if values.get("id"):
            self.ids[values["id"]] += 1
        if tag == "a":
            if values.get("name") and values["name"] != values.get("id"):
                self.ids[values["name"]] += 1
            self.links.append(values.get("href", ""))
        elif tag == "link" and ASSET_LINKS & set(values.get("rel", "").split()):
            self.assets.append(values.get("href", ""))
        elif tag in ASSETS and values.get(ASSETS[tag]):
            self.assets.append(values[ASSETS[tag]])
        if tag == "img" and not described(values):
            self.unnamed_images.append(values.get("src", "")[:80])

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Treat ``<img/>`` like ``<img>``."""
        self.handle_starttag(tag, attrs)


def described(image: dict[str, str]) -> bool:
    """Return whether an image has a text of its own; Sphinx fills in the file name where none is given."""
    text = image.get("alt", "").strip()
    if image.get("role") == "presentation" or image.get("aria-hidden") == "true":
        return True
    return bool(text) and not text.lower().endswith(IMAGE_SUFFIXES)


def read(path: Path) -> tuple[Page, str]:
    """Parse one page; return it with its text."""
    text = path.read_text(encoding="utf8")
    page = Page()
    page.feed(text)
    return page, text


def link_defect(link: str, page: Path, pages: dict[Path, Page], root: Path) -> str | None:
    """Return what is wrong with ``link`` on ``page``, or None."""
    parts = urlsplit(link)
    if parts.scheme or parts.netloc or link in ("", "#"):
        return None
    target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
    if target.is_dir():
        target = target / "index.html"
    if not target.is_relative_to(root) or not target.is_file():
        return "no such file"
    anchor = unquote(parts.fragment)
    if anchor and target in pages and not pages[target].ids[anchor]:
        return "no such anchor"
    return None


def check_site(folder: Path) -> list[Defect]:
    """Return the defects of the site in ``folder``, sorted; an empty list if there are none."""
    root = folder.resolve()
    files = [file for file in sorted(root.rglob("*.html")) if not file.name.endswith(SKIPPED)]
    read_pages = {file: read(file) for file in files}
    pages = {file: page for file, (page, _) in read_pages.items()}
    defects = set() if files else {Defect(folder.name, "empty site", "no page")}
    for file, (page, text) in read_pages.items():
        name = str(file.relative_to(root))
        defects |= {Defect(name, "duplicate id", one) for one, count in page.ids.items() if count > 1}
        defects |= {Defect(name, "missing alternative text", one) for one in page.unnamed_images}
        defects |= {Defect(name, "machine path", one) for one in machine_paths(text)}
        defects |= {Defect(name, "table that is not rendered", one) for one in RAW_TABLE.findall(text)}
        for link in [*page.links, *page.assets]:
            if problem := link_defect(link, file, pages, root):
                defects.add(Defect(name, problem, link))
        for asset in page.assets:
            if urlsplit(asset).netloc:
                defects.add(Defect(name, "remote asset", asset))
    for sheet in sorted(root.rglob("*.css")):
        text = sheet.read_text(encoding="utf8", errors="replace")
        if REMOTE_STYLE.search(text):
            defects.add(Defect(str(sheet.relative_to(root)), "remote asset", "address in a style sheet"))
    return sorted(defects)


def main() -> int:
    """Check the folder named on the command line; print its defects; return 1 if there are any."""
    defects = check_site(Path(sys.argv[1]))
    print(*defects or ("no defects",), sep="\n")
    return bool(defects)


if __name__ == "__main__":
    sys.exit(main())
