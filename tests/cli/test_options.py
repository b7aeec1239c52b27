"""Each option is declared once: as a field of a dataclass, from which typer, settings and recipes are made."""

from __future__ import annotations

import json
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from loopos.cli.commands import LOOPOS, app
from loopos.cli.options import Columns, Overrides, Subset, argument, typer_function
from loopos.cli.sampling_options import SamplingOptions
from loopos.config.compression import PruningRecipe, QuantizationRecipe
from loopos.config.diagnostics import ConfigError, UserError
from loopos.config.load import load_recipe, read_recipe
from loopos.config.merge import MergeConfig
from loopos.config.source import read_source
from loopos.generation.settings import SamplingFields, SamplingParams
from loopos.serving.requests import ChatRequest
from tests.cli.conftest import Invoke


@dataclass(frozen=True, kw_only=True)
class Inner:
    width: int = field(default=2, metadata={"help": "How wide."})
    height: int = field(default=3, metadata={"help": "How high."})


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: Annotated[str, typer.Option("--name", "-n", help="A name.")]
    inner: Annotated[Inner, Subset(("width",), {"width": 7})]
    columns: Columns = ()
    sizes: tuple[int, ...] = field(default=(), metadata={"help": "Sizes.", "metavar": "SIZE"})


Thing = Annotated[str, argument("THING", "A thing.", parser=str)]


def called(arguments: list[str]) -> tuple[Any, list[Any]]:
    """The result of a command line, and what the command was called with."""
    seen: list[Any] = []

    def run(thing: Thing, options: Outer, more: Overrides = ()) -> int:
        seen.extend([thing, options, more])
        return 3

    run.__annotations__ = {"thing": Thing, "options": Outer, "more": Overrides}
    one = typer.Typer(rich_markup_mode=None)
    one.command()(typer_function(run))
    return CliRunner().invoke(one, arguments), seen


def test_a_dataclass_of_options_becomes_options_and_back() -> None:
    words = ["-n", "x", "--sizes", "1", "--sizes", "2", "--columns", "a=b", "t", "k=1", "k=2"]
    result, (thing, options, more) = called(words)
    assert result.exit_code == 3
    assert (thing, more) == ("t", ("k=1", "k=2"))
    assert options == Outer(name="x", inner=Inner(width=7, height=3), columns=("a=b",), sizes=(1, 2))
    _, (_, options, more) = called(["-n", "x", "--width", "5", "t"])
    assert more == ()
    assert options == Outer(name="x", inner=Inner(width=5, height=3))


def test_a_field_without_a_default_is_required_and_one_outside_the_subset_is_no_option() -> None:
    missing, seen = called(["t"])
    assert (missing.exit_code, seen) == (2, [])
    assert "--name" in missing.stderr
    no_thing, seen = called(["-n", "x"])
    assert (no_thing.exit_code, seen) == (2, [])
    unknown, seen = called(["-n", "x", "--height", "4", "t"])
    assert (unknown.exit_code, seen) == (2, [])
    assert "--height" in unknown.stderr


# The options whose defaults are not those of the settings: a chat at temperature 0 repeats itself.
OWN_DEFAULTS = {("chat", "temperature"): 0.7, ("chat", "max_new_tokens"): 512}


@pytest.mark.parametrize("command", ["generate", "chat", "evaluate", "winrate"])
def test_sampling_options_are_those_of_the_settings(command: str) -> None:
    group = typer.main.get_command(app)
    options = {each.name: each for each in group.commands[command].params}  # type: ignore[attr-defined]
    found = [each for each in fields(SamplingFields) if each.name in options]
    assert {"temperature", "top_k", "top_p", "max_new_tokens", "seed"} <= {each.name for each in found}
    for each in found:
        option = options[each.name]
        assert option.help == each.metadata["help"]
        expected = OWN_DEFAULTS.get((command, each.name), each.default)
        assert (option.default or None) == (expected or None), each.name
        assert option.opts == [f"--{each.name.replace('_', '-')}"]


def test_every_sampling_field_has_a_help_text_and_a_default_that_is_in_range() -> None:
    assert [each.name for each in fields(SamplingFields) if not each.metadata.get("help")] == []
    assert [each.name for each in fields(SamplingFields) if each.default is MISSING] == []
    assert SamplingFields().out_of_range() == []


def test_options_and_settings_name_the_same_faults() -> None:
    wrong = SamplingOptions(top_k=-1, top_p=2.0, stop=("",))
    with pytest.raises(UserError, match="top_k") as raised:
        wrong.settings()
    lines = [line.replace("_", "-", 1) for line in str(raised.value).splitlines()]
    assert [f"--{line}" for line in lines] == list(wrong.diagnostics())
    assert len(lines) == 3


def test_a_request_without_parameters_samples_by_the_settings_but_for_openais_temperature() -> None:
    request = ChatRequest.model_validate({"model": "m", "messages": [{"role": "user", "content": "Hi"}], "seed": 0})
    assert request.settings() == SamplingParams(temperature=1.0)


FAULTS: list[tuple[Any, dict[str, Any]]] = [
    (PruningRecipe, {"method": "magnitud", "sparsity": 0.5}),
    (PruningRecipe, {"method": "magnitude", "sparsity": 1.5}),
    (PruningRecipe, {"method": "magnitude", "sparsity": [0.5, "half"]}),
    (PruningRecipe, {"method": "wanda", "sparsity": 0.5, "window": 8, "stride": 8}),
    (PruningRecipe, {"method": "magnitude", "sparsity": 0.5, "calibration_rows": 0, "seed": -1}),
    (PruningRecipe, {"method": "magnitude", "pattern": 'a "quoted" 2:4', "columns": {"text": "a\nb"}}),
    (QuantizationRecipe, {"method": "int8", "group_size": 32, "evaluate": "no/such.txt"}),
    (QuantizationRecipe, {"method": "int4", "keep": ["*.down_proj", ""]}),
]


@pytest.mark.parametrize(("recipe_class", "values"), FAULTS)
def test_options_and_a_recipe_file_have_the_same_faults(
    recipe_class: Any, values: dict[str, Any], pico_folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps({"model": str(pico_folder), **values}), encoding="utf-8")

    def faults(source: Any, changes: dict[str, Any], named: str) -> list[tuple[str, ...]]:
        with pytest.raises(ConfigError) as raised:
            read_recipe(recipe_class, source, changes)
        found = raised.value.diagnostics
        assert {each.source for each in found} == {named}
        return sorted((each.field, each.actual, each.expected, each.hint) for each in found)

    whole = {"model": str(pico_folder), **values}
    assert faults(None, whole, "command line") == faults(str(file), {}, str(file)) == faults(whole, {}, "config")


def test_an_invalid_item_is_one_fault_beside_those_of_other_keys(pico_folder: Path) -> None:
    values = {"model": str(pico_folder), "method": "magnitude", "sparsity": [0.5, "half"], "window": 8, "stride": 8}
    with pytest.raises(ConfigError) as raised:
        read_recipe(PruningRecipe, None, values)
    assert [each.field for each in raised.value.diagnostics] == ["sparsity.1", "stride"]


def test_options_take_precedence_over_the_recipe_and_none_leaves_its_value(pico_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "recipe.json"
    written = {"model": str(pico_folder), "method": "magnitude", "sparsity": 0.25, "seed": 7}
    file.write_text(json.dumps(written), encoding="utf-8")
    recipe = read_recipe(PruningRecipe, str(file), {"sparsity": [0.5, 0.75], "seed": None, "window": 16})
    assert recipe == PruningRecipe.model_validate({**written, "sparsity": [0.5, 0.75], "window": 16})


def test_all_options_without_a_place_in_the_recipe_are_named(tmp_path: Path) -> None:
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps({"method": "linear", "models": [{"model": "a"}], "output_dir": "out"}), encoding="utf-8")
    with pytest.raises(ConfigError) as raised:
        load_recipe(read_source(file), [], MergeConfig, values={f"models.{n}.weight": 0.5 for n in range(3)})
    assert [each.field for each in raised.value.diagnostics] == ["models.1.weight", "models.2.weight"]


def test_runs_are_listed_from_outputs_without_an_argument(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").mkdir()
    result = invoke("runs", "list")
    assert (result.exit_code, result.stdout) == (0, "outputs: no runs\n")


def test_the_summary_in_the_list_is_the_commands_help() -> None:
    group = typer.main.get_command(app)
    for name, listed in LOOPOS.listed.items():
        assert str(group.commands[name].help).splitlines()[0] == listed.summary  # type: ignore[attr-defined]
