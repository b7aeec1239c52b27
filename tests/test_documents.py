"""Documents: links and anchors resolve, one title a page, paths of the source exist, Python blocks are Python."""

from __future__ import annotations

import ast
import re
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
DOCS = [page for page in PAGES if page.parent != ROOT]


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def anchor(heading: str) -> str:
    """As GitHub and mkdocs make it: lower case, no marks, blanks as dashes."""
    plain = re.sub(r"[^\w\- ]", "", heading.strip().lower())
    return plain.replace(" ", "-")


def anchors_of(page: Path) -> set[str]:
    return {anchor(found) for found in re.findall(r"^#+ (.*)$", without_code(page.read_text(encoding="utf-8")), re.M)}


def links_of(page: Path) -> list[str]:
    found = re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text(encoding="utf-8")))
    return [link for link in found if not link.startswith("http")]


def broken(page: Path) -> list[str]:
    found = []
    for link in links_of(page):
        name, _, wanted_anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (wanted_anchor and wanted_anchor not in anchors_of(target)):
            found.append(link)
    return found


def test_the_pages_have_links() -> None:
    assert len(PAGES) >= 20
    assert sum(len(links_of(page)) for page in PAGES) >= 120


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_anchors_resolve(page: Path) -> None:
    assert broken(page) == []


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_pages_of_the_site_link_only_within_it(page: Path) -> None:
    assert [link for link in links_of(page) if link.startswith("..")] == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Title\n\n[a](#title) [b](#other) [c](nowhere.md)\n\n```\n[d](code.md)\n```\n", encoding="utf-8")
    assert broken(page) == ["#other", "nowhere.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_has_one_title(page: Path) -> None:
    assert len(re.findall(r"^# ", without_code(page.read_text(encoding="utf-8")), re.M)) == 1


@pytest.mark.parametrize("page", [ROOT / "ARCHITECTURE.md", ROOT / "README.md"], ids=lambda page: page.name)
def test_the_paths_of_the_source_exist(page: Path) -> None:
    found = set(re.findall(r"`(?:src/loopos/)?((?:\w+/)+\w*(?:\.py)?)`", page.read_text(encoding="utf-8")))
    paths = {path for path in found if path.endswith((".py", "/"))}
    if page.name == "ARCHITECTURE.md":
        assert len(paths) >= 40
    # The folders of a run, which ARCHITECTURE.md lists too.
    of_a_run = {"model/", "adapter/", "checkpoints/", "rounds/N/"}
    known = {
        str(path.relative_to(ROOT)) + "/" * path.is_dir()
        for path in ROOT.glob("[!.]*/**/*")
        if path.suffix in ("", ".py")
    }
    known |= {f"{path.name}/" for path in ROOT.iterdir() if path.is_dir()}
    missing = [
        path for path in paths - of_a_run if "NAME" not in path and not any(each.endswith(path) for each in known)
    ]
    assert sorted(missing) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_are_python(page: Path) -> None:
    for block in re.findall(r"^```python[^\n]*\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        ast.parse(block)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_prose_is_not_wrapped(page: Path) -> None:
    """A sentence or a paragraph is one line: no line ends in the middle of a sentence."""
    lines = without_code(page.read_text(encoding="utf-8")).splitlines()
    wrapped = [
        number
        for number, (line, following) in enumerate(pairwise(lines), 1)
        if re.search(r"[\w,;]$", line) and re.match(r" *[a-zA-Z0-9`(]", following) and not line.startswith(("#", "|"))
    ]
    assert wrapped == []


def test_pictures_are_small_and_complete() -> None:
    pictures = [path for path in (ROOT / "docs" / "assets").iterdir() if path.suffix in (".svg", ".png")]
    assert {path.name for path in pictures} == {
        "terminal.svg",
        "report.png",
        "board.png",
        "board_dark.png",
        "board_phone.png",
    }
    assert sum(path.stat().st_size for path in pictures) < 400_000
    # A page that is read offline shows them whole.
    assert "url(http" not in (ROOT / "docs" / "assets" / "terminal.svg").read_text(encoding="utf-8").replace('"', "")
