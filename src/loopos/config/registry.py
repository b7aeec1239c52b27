"""Named variants of one kind: methods, losses, algorithms, rewards, merge methods and so on, open to packages of users.

A variant is found by its name in a config. It is built in, or registered by a module that an installed package names
in the entry point group `loopos.plugins`, or named in the config itself as "module:name". Built-in values are imported
when they are looked up, and the modules of packages when a name is not built in, so that a config is checked without
torch. `config.variants` has the tables.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Generic, TypeVar

from loopos.config.diagnostics import UserError

PLUGINS = "loopos.plugins"
"""The entry point group: each entry names a module whose import registers variants."""
OF_YOUR_OWN = '"module:name" of your own'
_SENTENCE_END = re.compile(r"(?<=[^\s.])(?:\.(?=\s+[A-Z]|$)|:(?=\s))")

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Reference:
    """An object by "module:name", imported when it is needed."""

    target: str

    def load(self) -> Any:
        """The object. Raises `UserError` where there is none."""
        module, _, name = self.target.partition(":")
        try:
            found: Any = import_module(module)
            for part in name.split("."):
                found = getattr(found, part)
        except (ImportError, AttributeError) as problem:
            raise UserError(
                f'"{self.target}": {problem}; expected "module:name" of something that this Python can import'
            ) from problem
        return found

    def docstring(self) -> str:
        """The docstring, read from the source without importing the module; empty where there is none."""
        module, _, name = self.target.partition(":")
        spec = find_spec(module)
        if spec is None or spec.origin is None:
            return ""
        body = ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body
        documented = (ast.FunctionDef, ast.ClassDef)
        node = next((each for each in body if isinstance(each, documented) and each.name == name), None)
        return (ast.get_docstring(node) or "") if node is not None else ""


Target = Reference | Callable[..., Any]
"""A function or class: built in, by reference; of a user, as it is."""


def loaded(target: Target) -> Any:
    """The function or class itself; importing one that is built in may import torch."""
    return target.load() if isinstance(target, Reference) else target


def docstring_of(target: Target) -> str:
    """The docstring; of a reference without importing its module."""
    return target.docstring() if isinstance(target, Reference) else inspect.getdoc(target) or ""


def summary_of(target: Target) -> str:
    """The first sentence of a docstring, on one line."""
    text = docstring_of(target)
    paragraph = " ".join(text.partition("\n\n")[0].split())
    end = _SENTENCE_END.search(paragraph)
    return paragraph[: end.start()] if end is not None else paragraph


def choices(names: Sequence[str], *, own: str = OF_YOUR_OWN) -> str:
    """Names that a config may have, as text. own: what users may write besides; empty for nothing."""
    shown = [*(f'"{name}"' for name in names), *([own] if own else [])]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} or {shown[-1]}"


def did_you_mean(name: str, names: Sequence[str]) -> str:
    """A question that names the closest of `names`; empty where none is close."""
    close = difflib.get_close_matches(name.lower(), names, n=1)
    return f'did you mean "{close[0]}"?' if close else ""


_registered: list[str] = []


def num_registered() -> int:
    """How many variants packages have registered so far, of all kinds; a key for what depends on their names."""
    load_plugins()
    return len(_registered)


class Registry(Generic[Value]):
    """The variants of one kind, by name. `kind` is its name in messages, such as "merge method"; `decorator` what
    registers a user's.
    """

    def __init__(
        self,
        kind: str,
        builtin: Mapping[str, Value | Reference],
        *,
        decorator: str = "",
        adopt: Callable[[Any], Value] | None = None,
    ) -> None:
        """adopt: makes a variant of an object that is named as "module:name" and not registered; None where only a
        decorator can tell what the variant needs.
        """
        self.kind, self.decorator, self._adopt = kind, decorator, adopt
        self._rows: dict[str, Value | Reference] = dict(builtin)
        self._sources: dict[str, str] = dict.fromkeys(builtin, "loopos")
        self._decorated: dict[str, object] = {}
        self._builtin = tuple(builtin)

    def register(self, name: str, value: Value | Reference, *, source: str, decorated: object = None) -> None:
        """Adds a variant. source: the module that it comes from; decorated: the object that "module:name" finds. Raises
        `UserError` for a name that is taken by another module: which one counts would depend on the order of imports.
        """
        if ":" in name or not name.strip():
            raise UserError(f"{source}: got the {self.kind} name {name!r}; expected a name without a colon")
        if self._sources.get(name, source) != source:
            raise UserError(
                f'{source}: the {self.kind} "{name}" is already registered by {self._sources[name]}; '
                "choose another name"
            )
        self._rows[name], self._sources[name], self._decorated[name] = value, source, decorated
        _registered.append(name)

    def __iter__(self) -> Iterator[str]:
        load_plugins()
        return iter(tuple(self._rows))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __contains__(self, name: object) -> bool:
        # A package cannot take a built-in name, so that its module need not be imported to know one.
        return name in self._builtin or name in list(iter(self))

    def __getitem__(self, name: str) -> Value:
        """The variant of this name, or the one that "module:name" names. Raises `UserError` for an unknown name."""
        if ":" in name:
            return self._own(name)
        if name not in self:
            names = list(iter(self))
            hint = did_you_mean(name, names)
            raise UserError(f'got the {self.kind} "{name}"; expected {choices(names)}' + (f"; {hint}" if hint else ""))
        row = self._rows[name]
        value: Value = row.load() if isinstance(row, Reference) else row
        return value

    def _own(self, name: str) -> Value:
        found = _imported(name)
        registered = self._name_of(found)
        if registered is not None:
            return self[registered]
        if self._adopt is None:
            raise UserError(f'the {self.kind} "{name}" is {self._unregistered(found)}')
        return self._adopt(found)

    def why_missing(self, name: str) -> str:
        """Why there is no variant of the name "module:name"; empty where there is one, and for another name."""
        if ":" not in name:
            return ""
        try:
            found = _imported(name)
        except UserError as problem:
            return _reason(problem.__cause__ or problem)
        return self._unregistered(found) if self._adopt is None and self._name_of(found) is None else ""

    def _name_of(self, found: object) -> str | None:
        return next((name for name, decorated in self._decorated.items() if decorated is found), None)

    def _unregistered(self, found: object) -> str:
        what = "class" if isinstance(found, type) else "function"
        return f"not registered; decorate the {what} with @loopos.{self.decorator}(...)"

    def source(self, name: str) -> str:
        """The module or package that a variant comes from."""
        return self._sources[name]


def _imported(name: str) -> Any:
    """The user's object "module:name". Raises `UserError`, whatever its module raises."""
    try:
        return Reference(name).load()
    except UserError:
        raise
    # The user's module may raise anything.
    except Exception as problem:
        raise UserError(f'"{name}": {_reason(problem)}') from problem


def _reason(problem: BaseException) -> str:
    """An error in a line; its kind too, where the message does not say it."""
    says_it = isinstance(problem, UserError | ImportError | AttributeError)
    return str(problem) if says_it else f"{type(problem).__name__}: {problem}"


@cache
def load_plugins() -> tuple[str, ...]:
    """Imports the modules that installed packages name in the group `loopos.plugins`, once; their names. Raises
    `UserError` that names the package whose module cannot be imported.
    """
    loaded_names = []
    for entry in sorted(entry_points(group=PLUGINS), key=lambda each: each.name):
        try:
            entry.load()
        # The user's package may raise anything.
        except Exception as problem:
            package = entry.dist.name if entry.dist is not None else entry.value
            raise UserError(
                f'the plugin "{entry.name}" of the package {package} cannot be imported ({entry.value}): '
                f"{_reason(problem)}; "
                "fix or uninstall the package"
            ) from problem
        loaded_names.append(entry.name)
    return tuple(loaded_names)
