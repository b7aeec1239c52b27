"""MkDocs hook: makes the reference pages from the code: Python API, config keys, commands, what `loopos list` knows.

`mkdocs.yml` names this file and the pages that people write; the navigation of the generated pages is added here.
Run as a program, it writes the tables that stand between marks within pages that people write.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PYTHON: Mapping[str, str] = {
    "training": "train Run FitResult read_config Trainer FineTuner SftTrainer ChainOfThought PreferenceTrainer "
    "KtoTrainer RewardModelTrainer PpoTrainer ReinforcementTrainer DistillationTrainer Pretrainer",
    "plugins": "register_method register_loss register_algorithm register_reward register_format register_merge_method "
    "register_exporter register_tracker register_tool_parser register_environment register_study_strategy "
    "register_study_format",
    "models": "load Predictor RewardPredictor Reasoner ensemble ensembling.ensemble.EnsembleResult",
    "generation": "generate SamplingParams Engine",
    "compression_and_merging": "merge prune quantize merging.merge.MergeResult compression.pipeline.Changed "
    "compression.pipeline.ChangedModel",
    "export": "export exporting.export.Exported",
    "configs": "FineTuningConfig SftConfig ChainOfThoughtConfig PreferenceConfig RewardModelConfig PpoConfig "
    "RlhfConfig DistillationConfig PretrainingConfig MergeConfig PruningRecipe QuantizationRecipe",
    "errors": "UserError ConfigError DataError",
}
"""Page → its public names (each name of `loopos` stands on one page), and by their modules what functions return."""


def python_pages() -> Iterator[tuple[str, str, str]]:
    """Path, title and text of the pages of the Python API."""
    import loopos

    for page, names in PYTHON.items():
        title = _sentence(page.replace("_", " ")).rstrip(".")
        shown = {}
        for name in names.split():
            label = name.rpartition(".")[2] if "." in name else f"loopos.{name}"
            shown[label] = f"loopos.{name}" if "." in name else f"{loopos._MODULES[name]}.{name}"
        own = "\n      members: false" if page == "configs" else ""
        parts = [f"::: {place}\n    options:\n      heading: {name}{own}" for name, place in shown.items()]
        lead = "[Config keys](../config/fine_tuning.md) has the keys of each." if page == "configs" else ""
        yield f"reference/python/{page}.md", title, "\n\n".join(filter(None, [f"# {title}", lead, *parts])) + "\n"


def config_pages() -> Iterator[tuple[str, str, str]]:
    """Path, title and text of a page of keys for each method and recipe."""
    from loopos.config.compression import PruningRecipe, QuantizationRecipe
    from loopos.config.merge import MergeConfig
    from loopos.config.methods import METHODS
    from loopos.config.study import StudyConfig

    for name in METHODS:
        chosen = json.dumps({"mode": METHODS[name].mode, "method": name})
        head = f'# Config keys of `{name}`\n\n{_sentence(METHODS[name].summary)} `"computation": {chosen}`.'
        yield f"reference/config/{name}.md", name, f"{head}\n\n{_keys(METHODS[name].config_class.model_json_schema())}"
    for name, model in {"merge": MergeConfig, "prune": PruningRecipe, "quantize": QuantizationRecipe}.items():
        head = f"# Recipe keys of `{name}`\n\nFor `loopos {name}` and `loopos.{name}`."
        yield f"reference/config/{name}.md", f"{name} (recipe)", f"{head}\n\n{_keys(model.model_json_schema())}"
    head = "# Keys of a study\n\nFor `study.json` and `loopos study new`."
    yield "reference/config/study.md", "study", f"{head}\n\n{_keys(StudyConfig.model_json_schema())}"


def _keys(schema: Mapping[str, Any]) -> str:
    """A table of the top level, then one for each section."""
    parts, queue = [], [("", schema)]
    for name, section in queue:
        inner = {key: found for key, node in section["properties"].items() if (found := _section(node, schema))}
        # A section within a section has a table of its own.
        queue += [(f"{name}.{key}".lstrip("."), found) for key, found in inner.items() if name.count(".") < 4]
        shown = {key: node for key, node in section["properties"].items() if name or key not in inner}
        parts += [f"## {name}", _text(section.get("description", ""))] if name else []
        parts += [_keys_table(section, shown)] if shown else []
    return "\n\n".join(filter(None, parts)) + "\n"


def _section(node: Mapping[str, Any], schema: Mapping[str, Any]) -> dict[str, Any] | None:
    """The section that a key holds, alone or in a list; None for a plain value."""
    for each in (node, *node.get("anyOf", ()), node.get("items", {}), *node.get("items", {}).get("anyOf", ())):
        if "$ref" in each:
            found: dict[str, Any] = schema["$defs"][each["$ref"].rpartition("/")[2]]
            if "properties" in found:
                return found
    return None


def _keys_table(section: Mapping[str, Any], properties: Mapping[str, Any]) -> str:
    required, rows = section.get("required", ()), []
    for key, node in properties.items():
        default = f"`{json.dumps(node['default'], ensure_ascii=False)}`" if "default" in node else ""
        rows.append((f"`{key}`", _type(node), "required" if key in required else default, node.get("description", "")))
    return _table(("key", "type", "default", "meaning"), rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(map(_text, cells))} |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def _type(node: Mapping[str, Any]) -> str:
    """A JSON Schema type in words."""
    if "$ref" in node:
        return "section"
    if "anyOf" in node:
        return " or ".join(dict.fromkeys(_type(each) for each in node["anyOf"]))
    if "enum" in node or "const" in node:
        return ", ".join(f"`{value}`" for value in node.get("enum", [node.get("const")]))
    name = {"object": "dict", "array": "list"}.get(node.get("type", ""), node.get("type", "any"))
    if name == "list" and "items" in node:
        name = f"list of {_type(node['items'])}"
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = ", ".join(f"{sign} {node[key]}" for key, sign in signs.items() if key in node)
    return f"{name} ({bounds})" if bounds else name


def commands_page() -> str:
    """Every command of the command line with its arguments and options."""
    import typer

    from loopos.cli.commands import app

    parts = ["# Commands", "Every command with its arguments and options; [Command line](../cli.md) explains them."]
    for name, command in _commands(typer.main.get_command(app), ()):
        rows = [_option(each) for each in command.params if not each.hidden]
        parts += [f"## loopos {name}", _text((command.help or "").partition("\b")[0])]
        parts.append(_table(("argument or option", "meaning", "default"), rows))
    return "\n\n".join(parts) + "\n"


def _commands(group: Any, above: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, (*above, name))
        else:
            yield " ".join((*above, name)), command


def _option(parameter: Any) -> tuple[str, str, str]:
    """How an argument or option is written, what it means, and its default."""
    names, default = ", ".join([*parameter.opts, *parameter.secondary_opts]), parameter.default
    if parameter.param_type_name == "argument":
        names = parameter.metavar or parameter.name.upper()
    elif not parameter.is_flag:
        kind = getattr(parameter.type_descriptor.annotation, "__name__", "value").upper()
        names += f" {parameter.metavar or {'STR': 'TEXT', 'INT': 'INTEGER', 'FLOAT': 'NUMBER'}.get(kind, kind)}"
    shown = "required" if parameter.required else "" if default in (None, False, [], ()) else f"`{default}`"
    return f"`{names}`", parameter.help or "", shown


def registries_page() -> str:
    """What a config can name, as `loopos list` prints it."""
    from loopos.cli.configs import KINDS

    parts = ["# What a config can name", "`loopos list` prints these tables, with what installed plugins add."]
    for kind, (meaning, listed) in KINDS.items():
        rows = [(f"`{name}`", summary, source) for name, summary, source in listed()]
        parts += [f"## {kind}", _sentence(meaning), _table(("name", "what it does", "from"), rows)]
    return "\n\n".join(parts) + "\n"


def preference_losses_table() -> str:
    """The losses of preference optimization: what each computes, by its docstring, and which keys it reads."""
    from loopos.config.preference import PRESETS
    from loopos.config.registry import docstring_of
    from loopos.config.variants import LOSSES, PREFERENCE

    rows = []
    for name in LOSSES:
        row = LOSSES[name]
        if PREFERENCE not in row.methods:
            continue
        about, equation = docstring_of(row.function).split("\n\n")[:2]
        called, _, source = about.partition(": ")
        presets = [f"`{method}`" for method, preset in PRESETS.items() if next(iter(preset.losses)) == name]
        cells = (f"`{name}`", ", ".join(presets), called, equation.rstrip(".\n"), source.rstrip("."))
        rows.append((*cells, "yes" if row.reference else "no", ", ".join(f"`{key}`" for key in row.reads or ())))
    return _table(("loss", "method", "name", "equation", "source", "reference", "keys besides `beta`"), rows)


TABLES: Mapping[str, Mapping[str, Callable[[], str]]] = {
    "docs/post_training.md": {"preference losses": preference_losses_table}
}
"""Page → what stands between `<!-- NAME -->` and `<!-- end of NAME -->`."""


def with_tables(page: str, text: str) -> str:
    """The text of a page with its tables as the code has them. Raises `ValueError` for a mark that is missing."""
    for name, table in TABLES[page].items():
        first, last = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
        before, _, rest = text.partition(first)
        _, found, after = rest.partition(last)
        if not found:
            raise ValueError(f"{page}: got no marks {first.strip()} and {last.strip()}")
        text = f"{before}{first}{table()}{last}{after}"
    return text


def rewards_page() -> str:
    """Every built-in reward function with its options."""
    import inspect

    from loopos.config.reward_options import option_parameters
    from loopos.config.variants import REWARDS

    parts = ["# Reward functions", "What `reward.functions` names; [Rewards](../rewards.md) explains them."]
    for name in REWARDS:
        target = REWARDS[name].load()
        parts += [f"## {name}", *(_text(each) for each in inspect.cleandoc(target.__doc__).split("\n\n"))]
        rows = []
        for option, parameter in option_parameters(target).items():
            missing = parameter.default is inspect.Parameter.empty
            default = "required" if missing else f"`{json.dumps(parameter.default, ensure_ascii=False)}`"
            rows.append((f"`{option}`", f"`{parameter.annotation}`", default))
        parts += [_table(("option", "type", "default"), rows)] if rows else []
    return "\n\n".join(parts) + "\n"


def _text(text: str) -> str:
    """Text for a cell or a line: what Markdown or HTML would read as a sign is written out."""
    shown = []
    for part in re.split(r"(`[^`]*`)", " ".join(str(text).split())):
        plain = part.replace("<", "&lt;").replace("|", "&#124;")
        # Within backticks a table reads no escape.
        code = f"<code>{plain[1:-1]}</code>" if "|" in part else part
        shown.append(code if part.startswith("`") else plain)
    return "".join(shown)


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:].rstrip('.')}."


def pages() -> dict[str, str]:
    """Path → text of every generated page."""
    found = {path: text for path, _, text in (*python_pages(), *config_pages())}
    found |= {"reference/commands.md": commands_page(), "reference/registries.md": registries_page()}
    return {**found, "reference/rewards.md": rewards_page()}


def on_config(config: Any) -> Any:
    """Adds the generated pages to the navigation."""
    python = [{title: path} for path, title, _ in python_pages()]
    keys = [{title: path} for path, title, _ in config_pages()]
    own = [{"Commands": "reference/commands.md"}, {"Config keys": keys}, {"Python": python}]
    own += [{"What a config can name": "reference/registries.md"}, {"Reward functions": "reference/rewards.md"}]
    config.nav.append({"Reference (generated)": own})
    return config


def on_files(files: Any, config: Any) -> Any:
    """Adds the generated pages, and the README as the first page where docs has none."""
    from mkdocs.structure.files import File

    made = pages()
    if files.get_file_from_path("index.md") is None:
        made["index.md"] = (ROOT / "README.md").read_text(encoding="utf-8").replace("](docs/", "](")
    for path, text in made.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turns links to files of the repository that are no pages into their names; other broken links stay, and fail."""

    def plain(found: re.Match[str]) -> str:
        place = posixpath.normpath(posixpath.join(posixpath.dirname(page.file.src_uri), found[2].partition("#")[0]))
        exists = any((folder / place).is_file() for folder in (ROOT, ROOT / "docs"))
        return found[1] if exists and files.get_file_from_path(place) is None else found[0]

    return re.sub(r"(?<!!)\[([^\]\n]+)\]\(([^)\s]+)\)", plain, markdown)


if __name__ == "__main__":
    for name in TABLES:
        file = ROOT / name
        file.write_text(with_tables(name, file.read_text(encoding="utf-8")), encoding="utf-8")
