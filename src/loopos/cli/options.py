"""How a command declares its options, and the options that several commands share.

A command is a function `run(ARGUMENT, ..., options)` that returns an exit code. `options` is a dataclass; each field is
one option: `Annotated[type, typer.Option(...)]`, a plain type with `metadata={"help": ...}`, or another such dataclass,
whose fields are options too. `typer_function` unfolds them for typer, so that each option is written once.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loopos.config.diagnostics import UserError
from loopos.config.paths import expanded

if TYPE_CHECKING:
    from loopos.data.decoding import TextRules

PRECISIONS = ("auto", "fp32", "bf16", "fp16")
DEVICES = ("auto", "cpu", "cuda", "mps")


def path(text: str | Path) -> Path:
    """A path from the command line. Expands "~", which no shell expands in `--output=~/run`. Takes a path too: typer
    passes the default value of an argument through its parser.
    """
    return Path(expanded(str(text)))


def argument(metavar: str, help: str, *, parser: Callable[[str], Any] = expanded) -> Any:
    """A required argument; by default a path or the name of something, in which "~" is expanded."""
    return typer.Argument(metavar=metavar, help=help, show_default=False, parser=parser)


def option(name: str) -> str:
    """The option for a field name."""
    return f"--{name.replace('_', '-')}"


def refuse(diagnostics: Sequence[str]) -> None:
    """Raises `UserError` with all messages, if there are any."""
    if diagnostics:
        raise UserError("\n".join(diagnostics))


@dataclass(frozen=True, slots=True)
class Subset:
    """In `Annotated[SamplingOptions, Subset(...)]`: the fields that this command has, and the defaults that differ."""

    names: tuple[str, ...]
    defaults: Mapping[str, object] = field(default_factory=dict)


def typer_function(run: Callable[..., int]) -> Callable[..., None]:
    """A function with one parameter for each argument and option of `run`, which exits with the code of `run`."""
    hints = typing.get_type_hints(run, include_extras=True)
    own = inspect.signature(run).parameters
    parameters = [each for name in own for each in _parameters(name, hints[name], own[name].default, {})]
    assert len({each.name for each in parameters}) == len(parameters), "two options share a name"

    def command(**values: Any) -> None:
        raise typer.Exit(run(**{name: _value(name, hints[name], values) for name in own}))

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {each.name: each.annotation for each in parameters}
    command.__name__ = run.__name__
    return command


def _parameters(name: str, hint: Any, default: Any, metadata: Mapping[str, Any]) -> Iterator[inspect.Parameter]:
    """The parameters of an argument, an option or a dataclass of options."""
    options_class, subset = _options_class(hint)
    if options_class is not None:
        hints = typing.get_type_hints(options_class, include_extras=True)
        for each in _shown(options_class, subset):
            changed = subset.defaults if subset is not None else {}
            yield from _parameters(each.name, hints[each.name], changed.get(each.name, each.default), each.metadata)
        return
    if metadata:
        hint = Annotated[hint, typer.Option(option(name), help=metadata["help"], metavar=metadata.get("metavar"))]
    is_required = default is MISSING or default is inspect.Parameter.empty
    yield inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if is_required else None if default == () else default,
        annotation=_for_typer(hint, is_required=is_required),
    )


def _value(name: str, hint: Any, values: Mapping[str, Any]) -> Any:
    """The value of an argument, an option or a dataclass of options."""
    options_class, subset = _options_class(hint)
    if options_class is not None:
        hints = typing.get_type_hints(options_class, include_extras=True)
        return options_class(
            **{each.name: _value(each.name, hints[each.name], values) for each in _shown(options_class, subset)}
        )
    return tuple(values[name] or ()) if _is_repeatable(hint) else values[name]


def _options_class(hint: Any) -> tuple[Any, Subset | None]:
    """The dataclass of options that a type is, and its subset; None for the type of one argument or option."""
    kind, *metadata = typing.get_args(hint) if hasattr(hint, "__metadata__") else (hint,)
    if not is_dataclass(kind):
        return None, None
    return kind, next((each for each in metadata if isinstance(each, Subset)), None)


def _shown(options_class: Any, subset: Subset | None) -> list[Field[Any]]:
    return [each for each in fields(options_class) if subset is None or each.name in subset.names]


def _is_repeatable(hint: Any) -> bool:
    kind = typing.get_args(hint)[0] if hasattr(hint, "__metadata__") else hint
    return typing.get_origin(kind) is tuple


def _for_typer(hint: Any, *, is_required: bool) -> Any:
    """The type as typer reads it: a repeatable option is a list, not a tuple."""
    if not _is_repeatable(hint):
        return hint
    kind, *metadata = typing.get_args(hint)
    items: Any = list[typing.get_args(kind)[0]]  # type: ignore[misc]
    return Annotated[(items if is_required else items | None, *metadata)]


def parse_columns(arguments: Sequence[str]) -> dict[str, str]:
    """Role → column, of --columns ROLE=COLUMN. Raises `UserError` for an argument without = and for a role that occurs
    twice.
    """
    columns: dict[str, str] = {}
    for argument in arguments:
        role, equals, column = argument.partition("=")
        if not equals or not role or not column:
            raise UserError(f"--columns: got {argument}; expected ROLE=COLUMN, for example text=review")
        if role in columns:
            raise UserError(f"--columns: got {role} twice ({columns[role]} and {column}); expected one column per role")
        columns[role] = column
    return columns


def text_rules(encoding: str | None) -> TextRules:
    """How text files are read under --encoding. Raises `UserError` for an unknown encoding."""
    from loopos.config.checks import is_text_encoding
    from loopos.data.decoding import TextRules

    if encoding is not None and not is_text_encoding(encoding):
        raise UserError(f"--encoding: got {encoding}; expected the name of a text encoding, for example cp1252")
    return TextRules(encoding)


def device_diagnostics(device: str, precision: str = "auto") -> Iterator[str]:
    """Messages for an unknown device or precision."""
    for name, actual, known in (("--device", device, DEVICES), ("--precision", precision, PRECISIONS)):
        if actual not in known:
            yield f"{name}: got {actual}; expected one of {', '.join(known)}"


Config = Annotated[Path, argument("CONFIG", "Config file, .json or .yaml.", parser=path)]
Overrides = Annotated[
    tuple[str, ...],
    typer.Argument(
        metavar="KEY.PATH=VALUE", help="Overrides of config keys, e.g. training.learning_rate=1e-4.", show_default=False
    ),
]
RunFolder = Annotated[
    Path,
    argument("RUN", "Output folder of a run, or its model/ folder.", parser=path),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object to standard output.")]
Columns = Annotated[
    tuple[str, ...],
    typer.Option(
        "--columns",
        metavar="ROLE=COLUMN",
        help="Column for a role (text, text_pair, label; problem, reasoning, answer, messages ...); repeatable.",
    ),
]
Encoding = Annotated[
    str | None,
    typer.Option(
        "--encoding",
        metavar="NAME",
        help="Encoding of text files, e.g. cp1252; default: UTF-8.",
        show_default=False,
    ),
]
Verbose = Annotated[bool, typer.Option("--verbose", help="Also show messages and progress bars of the libraries.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Allow a hub model to run its own Python code in this run.")
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or mps.")]
Precision = Annotated[
    str, typer.Option("--precision", help="fp32, bf16 or fp16; auto: as trained, fp32 for other models.")
]
LanguageModel = Annotated[
    str,
    argument("MODEL", 'Run folder, model folder, "smollm2-135m", weights file or hub id of a language model.'),
]
OutputFile = Annotated[
    Path | None, typer.Option("--output", "-o", help="Output file; default: standard output.", parser=path)
]
NewFolder = Annotated[
    Path,
    typer.Option("--output", "-o", help="New output folder.", show_default=False, parser=path),
]
System = Annotated[str | None, typer.Option("--system", metavar="TEXT", help="System message.")]
ToolParser = Annotated[
    str,
    typer.Option("--tool-parser", help="Parser of tool calls; auto: the one that reads what the chat template writes."),
]
Raw = Annotated[bool, typer.Option("--raw", help="No chat template: continue the prompt text as it is.")]
Limit = Annotated[int | None, typer.Option("--limit", help="Maximum number of rows to read.")]
Window = Annotated[int | None, typer.Option("--window", help="Plain text: context window in tokens; default: 1024.")]
Stride = Annotated[
    int | None, typer.Option("--stride", help="Plain text: tokens between two windows; default: half a window.")
]
