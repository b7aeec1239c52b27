"""The table of words: identifiers, help texts and documents use the field's terms and American spelling."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from source_trees import tree_of, uncollected  # noqa: F401  # the fixture is used by its name

import loopos
from loopos.cli.commands import app

pytestmark = pytest.mark.usefixtures("uncollected")
SOURCE = Path(loopos.__file__).parent
ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])

# A part of an identifier, split at underscores and capitals → what to say instead.
PARTS = {
    **dict.fromkeys(("told", "said"), "summary, message, describe()"),
    "asked": "request",
    "wanted": "expected",
    **dict.fromkeys(("fault", "faults", "finding", "findings"), "Diagnostic"),
    "masters": "master weights",
    **dict.fromkeys(("share", "shares"), "rank, data-parallel rank; fraction"),
    "ending": "stop criteria",
    **dict.fromkeys(("guard", "guards", "alarm", "alarms"), "monitor, alert"),
    "liveness": "heartbeat",
    **dict.fromkeys(("road", "roads", "place", "places"), "path, backend; position, location"),
    **dict.fromkeys(("trunk", "trunks"), "shared prefix; backbone"),
    **dict.fromkeys(("placing", "speaking", "measuring", "shipping"), "prefill; generate, evaluate, export"),
    "carried": "training state",
    "joined": "ensemble",
    "alone": "only",
    **dict.fromkeys(("licence", "colour", "behaviour", "neighbour", "labelled"), "American spelling"),
}
# A whole identifier that is a participle used as a noun.
WHOLE = {"kept": "what is kept: rows, layers, mask", "given": "actual", "asked": "request", "told": "message"}
# Identifiers that may stay, each with its reason.
ALLOWED = {
    **dict.fromkeys(
        ("guards", "GUARD", "GUARD_EXIT_CODE", "GuardSection"), "the config key `guards` and what reads it"
    ),
    "TypeGuard": "typing's name",
    "validation_share": "config key",
    "max_dropped_share": "config key",
    "entropy_share": "config key of `guards`",
    "decay_share": "the schedule's option",
    **dict.fromkeys(
        ("shares_prompts", "share_prompts", "shares_states"), "the verb: models share the states of a prompt"
    ),
    "_TEST_SHARE": "the fraction of rows that the split takes",
    **dict.fromkeys(("joined_text", "_joined_row"), "texts put together"),
}

# What a document or a help text must not say, outside code → what to say instead. The private sense only.
PHRASES = {
    r"\b(?:go|goes|going|went) on\b": "continue, resume",
    r"\balone\b": "only",
    r"\btold\b|\btells?\b": "list, report, show, describe",
    r"\bsaid\b": "reported, logged, printed",
    r"\basked\b": "requested",
    r"\bwanted\b": "expected",
    r"\bfaults?\b|\bfindings?\b": "error, diagnostic, problem",
    r"\b(?:at|in|by|from|whatever|that|the|its|their|any|same|a|of|own)\s+places?\b(?! of )": "path, position, location",
    r"\broads?\b": "path, pipeline",
    r"\btrunks?\b": "shared prefix; backbone",
    r"\b(?:a|an|the|its|their|each|every|as|equal|model's|other|of)\s+shares?\b(?! (?:one|a|the|its|their)\b)": "fraction; rank; shard",
    r"\bshar(?:es?|ed|ing) (?:it |the model |a model |weights )?out\b": "shard",
    r"\b(?:as|by|these|in|own|its) words\b(?! (?:of|per)\b)": "arguments; text",
    r"\bsigns? of life\b|\bliveness\b": "heartbeat",
    r"\bguards?\b|\balarms?\b": "monitor, alert",
    r"\bmasters\b": "master weights",
    r"\bleft alone\b": "uninterrupted; unchanged",
    r"\bkept zeros\b": "sparsity mask",
    r"\bspeak(?:s|ing)?\b|\bspoken\b": "generate",
    r"\bthe (?:first |whole )?house\b": "the package",
    r"\bas (?:it|they|text) stands?\b": "unchanged, raw",
    r"\b\w*(?:normalis|tokenis|optimis|initialis|recognis|summaris|standardis|dequantis|rationalis|penalis|serialis)\w*": "American spelling: -ize",
    r"\b(?:licen[c]e|colour|behaviour|neighbour|favour|honour|cent(?:re|ring)|labelled|labelling|modelling|cancelled|grey)\w*": "American spelling",
}
# Uses of those words in their ordinary sense.
ORDINARY = {r"--licence": "the option's older spelling", r"page faults": "the kernel's term"}


def parts_of(identifier: str) -> list[str]:
    return [part.lower() for part in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", identifier)]


def identifiers_of(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of everything that a file names itself: not attributes of other libraries' objects."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg


def private_identifiers(tree: ast.AST) -> list[str]:
    """`12: told (say summary, message, describe())` for every private word of a file's identifiers."""
    found = []
    for line, name in identifiers_of(tree):
        if name in ALLOWED:
            continue
        for part in parts_of(name):
            if part in PARTS:
                found.append(f"{line}: {name} (say {PARTS[part]})")
        if name in WHOLE and name not in PARTS:
            found.append(f"{line}: {name} (say {WHOLE[name]})")
    return found


def prose_of(markdown: str) -> str:
    """The text without fenced blocks, code spans, link targets and HTML tags; lines keep their numbers."""
    text = re.sub(
        r"^( *)(```|~~~).*?^\1\2", lambda block: "\n" * block[0].count("\n"), markdown, flags=re.DOTALL | re.MULTILINE
    )
    text = re.sub(r"`[^`\n]+`", "`code`", text)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    return re.sub(r"<[^>\n]+>", "", text)


def private_phrases(text: str) -> list[str]:
    for pattern in ORDINARY:
        text = re.sub(pattern, "", text)
    return [
        f"{text.count(chr(10), 0, match.start()) + 1}: {match[0]!r} (say {instead})"
        for pattern, instead in PHRASES.items()
        for match in re.finditer(pattern, text, flags=re.IGNORECASE)
    ]


def helps(group: Any, name: str = "loopos") -> Iterator[tuple[str, str]]:
    """Every help text of the command line with its command and parameter."""
    yield name, group.help or ""
    for parameter in group.params:
        yield f"{name} {parameter.name}", getattr(parameter, "help", None) or ""
    for child, command in getattr(group, "commands", {}).items():
        yield from helps(command, f"{name} {child}")


def test_identifiers_use_the_fields_words() -> None:
    files = sorted(SOURCE.rglob("*.py"))
    assert len(files) >= 200
    found = [f"{file.relative_to(ROOT)}:{each}" for file in files for each in private_identifiers(tree_of(file))]
    assert not found, "\n".join(found)


def test_help_texts_use_the_fields_words() -> None:
    texts = dict(helps(typer.main.get_command(app)))
    assert len(texts) >= 150
    found = [f"{name}: {each}" for name, text in texts.items() for each in private_phrases(prose_of(text))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_documents_use_the_fields_words(page: Path) -> None:
    found = private_phrases(prose_of(page.read_text(encoding="utf-8")))
    assert not found, "\n".join(f"{page.name}:{each}" for each in found)


def test_the_documents_are_these() -> None:
    names = {page.name for page in DOCUMENTS}
    assert {"README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "post_training.md", "cli.md", "serving.md"} <= names
    assert len(DOCUMENTS) >= 17


def test_what_is_allowed_is_still_used() -> None:
    used = {name for file in SOURCE.rglob("*.py") for _, name in identifiers_of(tree_of(file))}
    # typing's name is imported, not stored.
    assert sorted(set(ALLOWED) - used - {"TypeGuard"}) == []


@pytest.mark.parametrize(
    ("planted", "found"),
    [
        ("def told_of(config): ...", ["1: told_of (say summary, message, describe())"]),
        ("class MergeFault: ...", ["1: MergeFault (say Diagnostic)"]),
        ("for road in paths: ...", ["1: road (say path, backend; position, location)"]),
        ("lambda asked: 0", ["1: asked (say request)"]),
        ("self.kept = 1", ["1: kept (say what is kept: rows, layers, mask)"]),
        ("validation_share = 0.1\nos.path.join(a)\nnum_kept = replace", []),
    ],
)
def test_a_planted_identifier_is_found(planted: str, found: list[str]) -> None:
    assert private_identifiers(ast.parse(planted)) == found


@pytest.mark.parametrize(
    ("planted", "found"),
    [
        ("The run goes on.", ["1: 'goes on' (say continue, resume)"]),
        (
            "Fine.\n\nAs told by\nthe weights alone.",
            ["4: 'alone' (say only)", "3: 'told' (say list, report, show, describe)"],
        ),
        ("All faults at once.", ["1: 'faults' (say error, diagnostic, problem)"]),
        ("Each rank holds its share of the rows.", ["1: 'its share' (say fraction; rank; shard)"]),
        ("Normalised scores.", ["1: 'Normalised' (say American spelling: -ize)"]),
        ("Set `validation_share` and `guards`; processes share the weights.\n\n```\nloopos goes on alone\n```\n", []),
    ],
)
def test_a_planted_phrase_is_found(planted: str, found: list[str]) -> None:
    assert private_phrases(prose_of(planted)) == found
