"""The list of the commands of `loopos`, and the groups that load them.

A command's module is imported when the command is named: the help of `loopos` imports none, the help of a command only
its own, which needs neither torch nor pydantic. Help is plain text (`rich_markup_mode=None`): rich's panels take three
times as long to start.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Annotated, Any, ClassVar, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup

import loopos
from loopos.cli.outcome import Commands


class Command(NamedTuple):
    """A command of the list: its help, and the function of a module in `loopos.cli` that runs it."""

    summary: str
    module: str
    function: str = "run"


class Group(NamedTuple):
    """Commands below a name: their help, and the list of them."""

    summary: str
    listed: Mapping[str, Command | Group]


DATA: Mapping[str, Command | Group] = {
    "check": Command(
        "Check a data file as training would read it: contents, lengths, duplicates, problems.",
        "data",
        "check",
    ),
    "preview": Command(
        "Show the first training rows as tokens: which are learned or pooled, context or cut.",
        "data",
        "preview",
    ),
}

RUNS: Mapping[str, Command | Group] = {
    "list": Command("List the runs in a folder with their state and best metrics.", "runs", "list_runs"),
    "show": Command(
        "Show one run: settings, state, validation metrics against the start, confusion table.", "runs", "show"
    ),
    "report": Command("Write report.md and report.html of a finished, running or killed run.", "runs", "report"),
    "diff": Command("Compare two runs: different settings, and metrics side by side.", "runs", "diff"),
}

RL: Mapping[str, Command | Group] = {
    "check": Command(
        "Sample answers before training: pass@k, groups with signal, each reward, and what to change.", "rl", "check"
    ),
    "audit": Command("Look for signs of reward hacking in the stored answers of a run.", "rl", "audit"),
}

STUDY: Mapping[str, Command | Group] = {
    "new": Command("Make a study: people compare, rate or thumb responses.", "study", "new"),
    "add": Command("Add items to a study from files of comparisons, groups, answers or prompts.", "study", "add"),
    "show": Command("Show progress, agreement, biases and the strengths of the sources.", "study", "show"),
    "vote": Command("Judge items in the terminal.", "study", "vote"),
    "export": Command("Write the votes as training data, or for other tools.", "study", "export"),
}

LOOPOS = Group(
    "Post-training of language models from one config and one command.",
    {
        "train": Command("Train a model from a config.", "train"),
        "validate": Command(
            "Check a config and report all problems at once, each with its line and column.",
            "configs",
            "validate",
        ),
        "list": Command("List what a config can name, with what installed plugins add.", "configs", "list_kind"),
        "schema": Command("Print the JSON Schema of a config.", "configs", "schema"),
        "predict": Command("Predict every row of the input, in order.", "predict"),
        "score": Command(
            "Score responses with a reward model; with --json print only its agreement with people.",
            "score",
        ),
        "merge": Command("Merge models or adapters into one.", "merge"),
        "plan": Command("Estimate memory and network traffic on a cluster.", "plan"),
        "evaluate": Command(
            "Evaluate a model on data or tasks: predictions, answers to problems, or language-model loss.",
            "evaluate",
        ),
        "winrate": Command("Compare the answers of two language models to the same prompts with a judge.", "winrate"),
        "sample": Command(
            "Sample answers to prompts, judge them, and write the best ones or pairs as training data.", "sample"
        ),
        "generate": Command("Generate text from prompts, or solve problems in steps.", "generate"),
        "chat": Command("Chat with a language model; type /help for its commands.", "chat"),
        "serve": Command(
            "Serve a model over an OpenAI-compatible HTTP API: chat, completions, embeddings, classification, scores.",
            "serve",
        ),
        "ui": Command("Open the local app: runs live, with curves, samples, settings and notes.", "ui"),
        "prune": Command("Prune a model: set weights to zero, or remove heads, channels or layers.", "prune"),
        "quantize": Command("Quantize a model to 8-bit or 4-bit weights: smaller on disk and in memory.", "quantize"),
        "export": Command("Export a model for other programs: one folder with a model card.", "export"),
        "ensemble": Command("Combine classifiers, regressors or language models into one ensemble.", "ensemble"),
        "doctor": Command("Print versions, cores, memory, devices, extras and settings in force.", "doctor"),
        "demo": Command(
            "Train a real 135M-parameter model on packaged data: fine-tuning, chain of thought, preferences.",
            "demo",
        ),
        "data": Group("Inspect data before training.", DATA),
        "runs": Group("Inspect finished and running runs.", RUNS),
        "study": Group("Collect human feedback on responses.", STUDY),
        "rl": Group("Inspect reinforcement learning before and after training.", RL),
    },
)


def typer_command(name: str, command: Command) -> TyperCommand:
    """A command as typer runs it; imports its module. A function `more_help` there adds to the help."""
    # Here, as the help of `loopos` needs no options.
    from loopos.cli.options import typer_function

    module = importlib.import_module(f"loopos.cli.{command.module}")
    more_help = f"\n\n{module.more_help()}" if hasattr(module, "more_help") else ""
    single = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    run = typer_function(getattr(module, command.function))
    single.command(name, help=f"{command.summary}{more_help}")(run)
    made = typer.main.get_command(single)
    assert isinstance(made, TyperCommand), "it has one command"
    return made


def typer_group(name: str, group: Group) -> TyperGroup:
    """A group as typer runs it; loads none of its commands."""
    return typer.main.get_group(
        typer.Typer(cls=group_class(group), name=name, help=group.summary, no_args_is_help=True, rich_markup_mode=None)
    )


def group_class(group: Group) -> type[ListedCommands]:
    """The class of a group with these commands: typer makes groups of classes."""
    return type("ListedCommands", (ListedCommands,), {"group": group})


class _Loaded(MutableMapping[str, Any]):
    """Name → command as typer runs it, loaded at its first use."""

    def __init__(self, listed: Mapping[str, Command | Group]) -> None:
        self._entries: dict[str, Any] = dict(listed)

    def __getitem__(self, name: str) -> Any:
        entry = self._entries[name]
        if isinstance(entry, Command):
            entry = self._entries[name] = typer_command(name, entry)
        elif isinstance(entry, Group):
            entry = self._entries[name] = typer_group(name, entry)
        return entry

    def __setitem__(self, name: str, command: Any) -> None:
        self._entries[name] = command

    def __delitem__(self, name: str) -> None:
        del self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


class ListedCommands(Commands):
    """A group of listed commands."""

    group: ClassVar[Group]

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands = _Loaded(self.group.listed)

    def list_commands(self, ctx: Any) -> list[str]:
        """The names in the order of the list; loads nothing."""
        return list(self.commands)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Writes the names with their summaries; loads nothing."""
        listed = self.group.listed
        room = formatter.width - 6 - max(map(len, listed))
        with formatter.section("Commands"):
            rows = [(name, TyperCommand(name, help=each.summary)) for name, each in listed.items()]
            formatter.write_dl([(name, each.get_short_help_str(room)) for name, each in rows])


app = typer.Typer(
    cls=group_class(LOOPOS),
    name="loopos",
    help=LOOPOS.summary,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    """Prints the version, with --version."""
    if version:
        typer.echo(f"loopos {loopos.__version__}")
        raise typer.Exit()
