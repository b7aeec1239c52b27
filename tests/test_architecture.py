"""Import rules between the rooms and limits of style, checked on the source."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from source_trees import tree_of, uncollected  # noqa: F401  # the fixture is used by its name

import loopos

pytestmark = pytest.mark.usefixtures("uncollected")
SOURCE = Path(loopos.__file__).parent
# functional, config and storage are the ground floor: every room may stand on them.
GROUND = {"functional", "config", "storage"}
ARROWS: dict[str, set[str]] = {
    "functional": set(),
    "config": set(),
    # A full disk is told as every other mistake is.
    "storage": {"config"},
    "data": GROUND,
    "models": GROUND,
    "generation": GROUND | {"models"},
    "training": GROUND | {"data"},
    "evaluation": GROUND | {"generation", "models", "data"},
    "rl": GROUND | {"training", "evaluation", "generation", "models", "data"},
    # People's judgments, without a model: what makes them from answers and what learns from them is elsewhere.
    "studies": GROUND | {"evaluation", "data"},
    "merging": GROUND | {"evaluation", "models"},
    "ensembling": GROUND | {"evaluation", "models", "data"},
    "exporting": GROUND | {"evaluation", "models", "data"},
    "compression": GROUND | {"evaluation", "generation", "models", "data"},
    "serving": GROUND | {"evaluation", "generation", "data"},
    # The server and its limits are those of `loopos serve`; runs are read from their folders.
    "web": GROUND | {"serving", "evaluation"},
    "methods": GROUND | {"rl", "training", "generation", "evaluation", "models", "data"},
    # A plan opens the data and counts the shapes that a run would have, and starts nothing.
    "planning": GROUND | {"methods", "rl", "training", "models", "data"},
    "cli": GROUND
    | {"planning", "methods", "rl", "training", "evaluation", "generation", "models", "data", "demo"}
    | {"merging", "ensembling", "exporting", "compression", "serving", "studies", "web"},
    # The packaged demo is data alone.
    "demo": set(),
}
# rlhf runs reward_model and then ppo; chain_of_thought is sft with steps, kto the method of preferences with other rows.
# reward_rows is no method, but what reward_model learns from.
METHODS_THAT_RUN_OTHERS = {
    "rlhf": {"reward_model", "ppo"}, "chain_of_thought": {"sft"}, "kto": {"preference"}, "reward_model": {"reward_rows"},
    # A student is fine-tuned as sft does, by other losses.
    "distillation": {"sft"},
}  # fmt: skip
MOST_LINES_OF_A_FILE = 500
MOST_LINES_OF_A_FUNCTION = 65
# The package's own front doors: its names, the functions and the run behind them, and `python -m loopos`.
FRONT = {"__init__.py", "__main__.py", "api.py", "changes.py", "run.py"}


@cache
def modules() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def room_of(file: Path) -> str:
    """The room of a file; "" for the files of the package itself."""
    parts = file.relative_to(SOURCE).parts
    return parts[0] if len(parts) > 1 else ""


@cache
def imports_of(file: Path) -> list[tuple[int, str]]:
    """Line and full name of everything that a file imports, anywhere in it, also those only for types."""
    return [*_imports_of(file)]


def _imports_of(file: Path) -> Iterator[tuple[int, str]]:
    package = ["loopos", *file.relative_to(SOURCE).parts[:-1]]
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{stem}.{alias.name}") for alias in node.names)


def at(file: Path, line: int, what: str) -> str:
    return f"{file.relative_to(SOURCE)}:{line}: {what}"


def test_the_whole_package_is_read() -> None:
    found = {room_of(file) for file in modules()} - {""}
    assert found <= set(ARROWS), f"rooms without arrows: {sorted(found - set(ARROWS))}"
    assert {"functional", "config", "storage", "data", "models", "training", "evaluation", "methods", "cli"} <= found
    assert len(modules()) >= 60
    assert sum(name.startswith("loopos.") for file in modules() for _, name in imports_of(file)) >= 200


def test_no_room_imports_against_the_arrows() -> None:
    wrong = []
    for file in modules():
        room = room_of(file)
        for line, name in imports_of(file):
            parts = name.split(".")
            if parts[0] != "loopos" or len(parts) < 2 or room == "" or parts[1] not in ARROWS:
                continue
            if parts[1] != room and parts[1] not in ARROWS[room]:
                wrong.append(at(file, line, f"{room} imports {name}"))
    assert not wrong, "\n".join(wrong)


def test_methods_never_import_each_other() -> None:
    wrong = []
    for file in modules():
        # The table names methods in strings, and imports none.
        if room_of(file) != "methods":
            continue
        allowed = METHODS_THAT_RUN_OTHERS.get(file.stem, set()) | {file.stem, "base"}
        for line, name in imports_of(file):
            parts = name.split(".")
            if parts[:2] == ["loopos", "methods"] and len(parts) > 2 and parts[2] not in allowed:
                wrong.append(at(file, line, name))
    assert not wrong, "\n".join(wrong)


def outside_imports(room: str) -> set[str]:
    """First names of the packages that a room imports, without the standard library and loopos itself."""
    names = {name.split(".")[0] for file in modules() if room_of(file) == room for _, name in imports_of(file)}
    return names - set(sys.stdlib_module_names) - {"loopos"}


def test_functional_imports_only_torch() -> None:
    assert outside_imports("functional") == {"torch"}


def test_storage_knows_no_model() -> None:
    # The hub is asked whether it can be reached, by the client of those that fetch from it.
    assert outside_imports("storage") == {"torch", "safetensors", "huggingface_hub", "datasets"}


def test_config_imports_nothing_heavy() -> None:
    assert {"pydantic", "yaml"} <= outside_imports("config") <= {"pydantic", "pydantic_core", "yaml"}


def test_maths_and_models_know_no_rank_and_no_run() -> None:
    for room in ("functional", "models", "data"):
        for file in modules():
            if room_of(file) == room:
                heavy = [name for _, name in imports_of(file) if name.startswith("torch.distributed")]
                assert not heavy, f"{file}: {heavy}"


def importers() -> dict[Path, set[Path]]:
    """Module → the modules that import it or a name of it."""
    named = {"loopos." + ".".join(file.relative_to(SOURCE).with_suffix("").parts): file for file in modules()}
    found: dict[Path, set[Path]] = {file: set() for file in modules()}
    for file in modules():
        for _, name in imports_of(file):
            imported = named.get(name) or named.get(name.rpartition(".")[0])
            if imported is not None and imported != file:
                found[imported].add(file)
    return found


def test_a_short_module_with_one_importer_says_why_it_stands_apart() -> None:
    small = [
        file
        for file, by in importers().items()
        if len(by) == 1 and file.name != "__init__.py" and len(file.read_text(encoding="utf-8").splitlines()) < 120
    ]
    assert 5 <= len(small) <= 20, sorted(map(str, small))
    reasons = {file: ast.get_docstring(tree_of(file)) or "" for file in small}
    silent = [str(file.relative_to(SOURCE)) for file, reason in reasons.items() if "Apart from" not in reason]
    assert not silent, f"fold them, or give the reason in a sentence that begins with Apart from: {silent}"


def test_files_and_functions_stay_short() -> None:
    wrong = []
    for file in modules():
        text = file.read_text(encoding="utf-8")
        if (lines := text.count("\n")) > MOST_LINES_OF_A_FILE:
            wrong.append(at(file, lines, f"{lines} lines, at most {MOST_LINES_OF_A_FILE}"))
        for node in ast.walk(tree_of(file)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
                length = node.end_lineno - node.lineno + 1
                if length > MOST_LINES_OF_A_FUNCTION:
                    wrong.append(at(file, node.lineno, f"{node.name} has {length} lines"))
    assert not wrong, "\n".join(wrong)


def catches_everything(node: ast.ExceptHandler) -> bool:
    """Bare, or `Exception`, on its own or in a tuple; `BaseException` too, unless it is raised again."""
    names = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
    caught = {name.id for name in names if isinstance(name, ast.Name)}
    rises = isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None
    return node.type is None or "Exception" in caught or ("BaseException" in caught and not rises)


# Calls the functions of users, from which anything may rise; it rises again with their name.
CALLS_FOREIGN_CODE = {"config/own_function.py", "config/registry.py", "rl/tool_runs.py"}


def test_nothing_is_caught_that_was_not_expected() -> None:
    wrong = []
    handlers = 0
    for file in modules():
        if file.relative_to(SOURCE).as_posix() in CALLS_FOREIGN_CODE:
            continue
        for node in ast.walk(tree_of(file)):
            if isinstance(node, ast.ExceptHandler):
                handlers += 1
                if catches_everything(node):
                    wrong.append(at(file, node.lineno, "except of everything"))
    assert handlers >= 30
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("try: f()\nexcept Exception: pass", True),
        ("try: f()\nexcept (ValueError, Exception): pass", True),
        ("try: f()\nexcept: pass", True),
        ("try: f()\nexcept BaseException:\n    g()\n    raise", False),
        ("try: f()\nexcept BaseException: g()", True),
        ("try: f()\nexcept (OSError, ValueError): pass", False),
    ],
)
def test_the_rule_itself_sees_what_it_should(code: str, expected: bool) -> None:
    handler = next(node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ExceptHandler))
    assert catches_everything(handler) == expected


def test_every_module_says_what_it_is() -> None:
    missing = [str(file.relative_to(SOURCE)) for file in modules() if not ast.get_docstring(tree_of(file))]
    assert not missing


def test_no_room_is_called_after_nothing() -> None:
    empty_names = {"utils", "helpers", "common", "core", "misc", "tools"}
    assert not [file for file in modules() if file.stem in empty_names or room_of(file) in empty_names]


def test_the_package_itself_has_only_its_front_doors() -> None:
    assert {file.name for file in modules() if room_of(file) == ""} <= FRONT


def test_no_room_imports_the_front_doors() -> None:
    doors = {file.removesuffix(".py") for file in FRONT} - {"__init__", "__main__"}
    wrong = [
        at(file, line, name)
        for file in modules()
        if room_of(file) != ""
        for line, name in imports_of(file)
        if name.split(".")[0] == "loopos" and name.split(".")[1:2] and name.split(".")[1] in doors
    ]
    assert not wrong, "\n".join(wrong)


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other in a loop (Tarjan's strongly connected components)."""
    found: list[list[str]] = []
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for other in graph[module]:
            if other not in index:
                visit(other)
            if other in stack:
                low[module] = min(low[module], low[other])
        if low[module] == index[module]:
            group = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(group) > 1:
                found.append(sorted(group))

    for module in graph:
        if module not in index:
            visit(module)
    return found


def test_no_modules_import_each_other_in_a_circle() -> None:
    names = {".".join(("loopos", *file.relative_to(SOURCE).with_suffix("").parts)): file for file in modules()}
    graph = {}
    for name, file in names.items():
        imported = [each for _, full in imports_of(file) for each in (full, full.rpartition(".")[0])]
        graph[name] = {each for each in imported if each in names} - {name}
    assert sum(map(len, graph.values())) > 500
    assert circles(graph) == []


def test_a_circle_is_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]
