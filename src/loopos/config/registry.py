"""Named variants of one kind: methods, algorithms, rewards, merge methods and so on, open to packages of users.

A variant is found by its name in a config. It is built in, or registered by a module that an installed package names
in the entry point group `loopos.plugins`, or named in the config itself as "module:name". Values are imported when they
are looked up, so that a config is checked without torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from loopos.config.diagnostics import UserError

PLUGINS = "loopos.plugins"
"""The entry point group: each entry names a module whose import registers variants."""

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


class Registry(Generic[Value]):
    """The variants of one kind, by name. `kind` is its name in messages, such as "merge method"."""

    def __init__(self, kind: str, builtin: Mapping[str, Value | Reference]) -> None:
        self.kind = kind
        self._rows: dict[str, Value | Reference] = dict(builtin)
        self._sources: dict[str, str] = dict.fromkeys(builtin, "loopos")

    def register(self, name: str, value: Value | Reference, *, source: str) -> None:
        """Adds a variant. source: the module that it comes from. Raises `UserError` for a name that is taken by another
        module: which one counts would depend on the order of imports.
        """
        if ":" in name or not name.strip():
            raise UserError(f"{source}: got the {self.kind} name {name!r}; expected a name without a colon")
        if self._sources.get(name, source) != source:
            raise UserError(
                f'{source}: the {self.kind} "{name}" is already registered by {self._sources[name]}; '
                "choose another name"
            )
        self._rows[name], self._sources[name] = value, source

    def __iter__(self) -> Iterator[str]:
        load_plugins()
        return iter(tuple(self._rows))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __contains__(self, name: object) -> bool:
        return name in list(iter(self))

    def __getitem__(self, name: str) -> Value:
        """The variant of this name, or the object that "module:name" names. Raises `UserError` for an unknown name."""
        if ":" in name:
            found: Value = Reference(name).load()
            return found
        names = list(iter(self))
        if name not in self._rows:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f'; did you mean "{close[0]}"?' if close else ""
            raise UserError(
                f'got the {self.kind} "{name}"; expected one of {", ".join(names)}, or "module:name" of your own{hint}'
            )
        row = self._rows[name]
        value: Value = row.load() if isinstance(row, Reference) else row
        return value

    def source(self, name: str) -> str:
        """The module or package that a variant comes from."""
        return self._sources[name]


@cache
def load_plugins() -> tuple[str, ...]:
    """Imports the modules that installed packages name in the group `loopos.plugins`, once; their names. Raises
    `UserError` that names the package whose module cannot be imported.
    """
    loaded = []
    for entry in sorted(entry_points(group=PLUGINS), key=lambda each: each.name):
        try:
            entry.load()
        except (ImportError, AttributeError) as problem:
            package = entry.dist.name if entry.dist is not None else entry.value
            raise UserError(
                f'the plugin "{entry.name}" of the package {package} cannot be imported ({entry.value}): {problem}; '
                "mend or uninstall the package"
            ) from problem
        loaded.append(entry.name)
    return tuple(loaded)
