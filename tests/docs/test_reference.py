"""The reference pages hold everything that the code has, and the navigation every page; no site is built here."""

from __future__ import annotations

import importlib.util
import re
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import typer
import yaml

import loopos
from loopos.cli.commands import app
from loopos.config.load import schema
from loopos.config.methods import METHODS
from loopos.config.preference import PRESETS
from loopos.config.variants import LOSSES

ROOT = Path(__file__).parents[2]
MKDOCS = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


def loaded() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference_pages", ROOT / "docs" / "reference_pages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HOOK = loaded()


@cache
def pages() -> dict[str, str]:
    """Path → text of every generated page, by the first test that reads one."""
    found: dict[str, str] = HOOK.pages()
    return found


def paths_in(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    entries = nav.values() if isinstance(nav, dict) else nav
    return [path for entry in entries for path in paths_in(entry)]


def test_the_navigation_and_the_files_agree() -> None:
    written = {file.name for file in (ROOT / "docs").glob("*.md")} | {"index.md"}
    listed = paths_in(MKDOCS["nav"])
    assert sorted(listed) == sorted(written)
    config = HOOK.on_config(SimpleNamespace(nav=list(MKDOCS["nav"])))
    assert sorted(paths_in(config.nav)) == sorted([*listed, *pages()])


@pytest.mark.parametrize("page", HOOK.TABLES)
def test_the_tables_within_a_page_are_those_of_the_code(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert HOOK.with_tables(page, text) == text, "run python docs/reference_pages.py"


def test_the_table_of_losses_has_every_loss_with_its_equation_and_source() -> None:
    rows = [line.split(" | ") for line in HOOK.preference_losses_table().splitlines()[2:]]
    assert [row[0] for row in rows] == [f"| `{name}`" for name in LOSSES if "preference" in LOSSES[name].methods]
    assert all(name and equation and source for _, _, name, equation, source, *_ in rows)
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row[1])} == set(PRESETS)


def test_nothing_is_loaded_from_the_network() -> None:
    assert MKDOCS["theme"]["font"] is False
    assert not [key for key in ("extra_javascript", "extra_css") if key in MKDOCS]
    assert "http" not in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")


def test_each_public_name_stands_on_one_page_of_the_reference() -> None:
    shown = [name for names in HOOK.PYTHON.values() for name in names.split() if "." not in name]
    assert sorted(shown) == sorted(set(loopos.__all__) - {"__version__"})
    text = "".join(page for path, page in pages().items() if path.startswith("reference/python/"))
    for name in shown:
        place = f"{loopos._MODULES[name]}.{name}"
        assert f"::: {place}\n    options:\n      heading: loopos.{name}\n" in text


def test_what_functions_return_is_there() -> None:
    places = [name for names in HOOK.PYTHON.values() for name in names.split() if "." in name]
    assert len(places) >= 5
    for place in places:
        module, _, name = place.rpartition(".")
        assert getattr(importlib.import_module(f"loopos.{module}"), name).__doc__


def cells(page: str) -> list[list[str]]:
    """The rows of all tables of a page."""
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]


@pytest.mark.parametrize("method", METHODS)
def test_every_key_of_a_method_is_listed_with_its_meaning(method: str) -> None:
    described = schema(METHODS[method].config_class)
    page = pages()[f"reference/config/{method}.md"]
    shown = cells(page)
    assert all(len(row) == 4 and row[1] and row[3] for row in shown)
    keys = [row[0].strip("`") for row in shown]
    sections = {
        name: node["$ref"].rpartition("/")[2] for name, node in described["properties"].items() if "$ref" in node
    }
    for name, section in sections.items():
        assert f"\n## {name}\n" in page
        properties = described["$defs"][section]["properties"]
        assert properties
        assert not [key for key in properties if key not in keys]


def test_a_key_has_its_type_bounds_and_default() -> None:
    rows = {row[0]: row[1:] for row in cells(pages()["reference/config/fine_tuning.md"])}
    assert rows["`batch_size`"] == ["integer (≥ 1)", "`16`", "sequences per process and forward pass"]
    assert rows["`learning_rate`"][:2] == ["number (> 0)", "required"]
    assert rows["`label_smoothing`"][0] == "number (≥ 0, &lt; 1)"
    assert rows["`lora`"][:2] == ["section or null", "`null`"]
    assert "\n## training.lora\n" in pages()["reference/config/fine_tuning.md"]


def commands(group: Any, above: tuple[str, ...] = ()) -> dict[str, Any]:
    found = {}
    for name, command in group.commands.items():
        path = (*above, name)
        found |= commands(command, path) if hasattr(command, "commands") else {" ".join(path): command}
    return found


def test_every_command_is_listed_with_its_options() -> None:
    every = commands(typer.main.get_command(app))
    assert len(every) >= 20
    page = pages()["reference/commands.md"]
    assert re.findall(r"^## loopos (.*)$", page, re.MULTILINE) == list(every)
    for name, command in every.items():
        section = page.split(f"\n## loopos {name}\n", 1)[1].split("\n## ", 1)[0]
        options = [option for parameter in command.params for option in parameter.opts if option.startswith("-")]
        assert not [option for option in options if not re.search(rf"[`\s]{option}[`,\s]", section)]


def test_signs_of_markdown_in_cells_are_written_out() -> None:
    assert HOOK._text("a < b | c `d < e` `f | g`") == "a &lt; b &#124; c `d < e` <code>f &#124; g</code>"


def test_what_loopos_list_knows_is_there() -> None:
    rows = {row[0] for row in cells(pages()["reference/registries.md"])}
    assert {f"`{name}`" for name in METHODS} <= rows


def test_a_link_to_a_file_of_the_repository_becomes_its_name_and_a_broken_one_stays() -> None:
    files = SimpleNamespace(get_file_from_path=lambda path: path if path == "cli.md" else None)
    page = SimpleNamespace(file=SimpleNamespace(src_uri="index.md"))
    text = "[a](cli.md#x) [b](CONTRIBUTING.md) [c](clii.md) [d](https://e.org) [e](#here) ![f](LICENSE)"
    shown = HOOK.on_page_markdown(text, page, None, files)
    assert shown == "[a](cli.md#x) b [c](clii.md) [d](https://e.org) [e](#here) ![f](LICENSE)"
