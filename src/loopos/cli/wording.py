"""How a command names settings in messages: by its own options, if it has them, else by config keys."""

from __future__ import annotations

import json
import shlex
from collections.abc import Collection, Sequence

from loopos.config.diagnostics import IN_CONFIG, Remedy, UserError, Wording

COLUMNS, ENCODING, SKIP_BAD_ROWS = "--columns", "--encoding", "--skip-bad-rows"
_ARGUMENTS = frozenset({"data.pretrained_weights", "data.training_data"})
"""Keys that are positional arguments of commands without a config: messages need not name them."""
_OPTIONS = {
    "data.columns": COLUMNS,
    "data.encoding": ENCODING,
    "data.on_bad_row": SKIP_BAD_ROWS,
    "training.device": "--device",
    "training.precision": "--precision",
    "data.output_dir": "--output",
}
_SWITCHES = frozenset({SKIP_BAD_ROWS})
_TAKES_KEYS = "overrides"


class OptionWording(Wording):
    """Names settings by the options of a command that reads no config. options: those the command has."""

    def __init__(self, options: Collection[str]) -> None:
        self.options = frozenset(options)

    def field(self, key: str) -> str:
        if key in _ARGUMENTS:
            return ""
        return self._option(key) or key

    def remedy(self, remedy: Remedy) -> str:
        parts = []
        for key, value in remedy.settings:
            option = self._option(key)
            if option is None:
                return ""
            if option == COLUMNS:
                value = f"{key.removeprefix('data.columns.')}={value}"
            parts.append(option if option in _SWITCHES else f"{option} {_quoted(value)}")
        return f"{remedy.lead}: {' '.join(parts)}"

    def _option(self, key: str) -> str | None:
        option = _OPTIONS.get("data.columns" if key.startswith("data.columns.") else key)
        return option if option in self.options else None


def wording_of(options: Collection[str], arguments: Collection[str]) -> Wording:
    """The wording of a command with these options and arguments: a command that takes config keys names keys."""
    return IN_CONFIG if _TAKES_KEYS in arguments else OptionWording(options)


def refuse_keys_as_options(tokens: Sequence[str], options: Collection[str], arguments: Collection[str]) -> None:
    """Raises `UserError` for an argument such as `--lr` that is no option of the command but means a config key."""
    if _TAKES_KEYS not in arguments:
        return
    meant = []
    for index, token in enumerate(tokens):
        if token == "--":
            break
        name, equals, value = token.partition("=")
        if not token.startswith("-") or name in options:
            continue
        key = _key_of(name)
        if key is not None:
            following = tokens[index + 1] if index + 1 < len(tokens) and not tokens[index + 1].startswith("-") else ""
            meant.append((name, f"{key}={value if equals else following or 'VALUE'}"))
    if meant:
        names = ", ".join(name for name, _ in meant)
        raise UserError(
            f"no option {names}: config settings are written as key=value\n    "
            f"write {' '.join(_quoted(setting) for _, setting in meant)}"
        )


def _key_of(option: str) -> str | None:
    """The dotted key that an option such as `--lr`, `--batch-size` or `--training.seed` means."""
    from loopos.config.methods import config_classes
    from loopos.config.other_tools import OTHER_KEYS

    name = option.lstrip("-").replace("-", "_")
    keys: dict[str, str] = {}
    for config_class in config_classes().values():
        for section, field in config_class.model_fields.items():
            for key in getattr(field.annotation, "model_fields", {}):
                keys.setdefault(f"{section}.{key}", f"{section}.{key}")
                keys.setdefault(key, f"{section}.{key}")
    section, dot, key = name.rpartition(".")
    return keys.get(name) or OTHER_KEYS.get(key if dot else name)


def _quoted(text: str) -> str:
    """`text` quoted for a shell; in double quotes if they suffice, because these work in every shell."""
    if shlex.quote(text) == text:
        return text
    return shlex.quote(text) if set(text) & set('"$`\\!') else json.dumps(text, ensure_ascii=False)
