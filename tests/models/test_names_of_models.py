"""A name means the same model to every command: kind of name × command, on outputs of the opened weights."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from pico_runs import class_rows, config_of, save_pico, slow_but, train
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import loopos
from loopos.compression.prune import Pruner
from loopos.config.compression import PruningRecipe
from loopos.config.diagnostics import UserError
from loopos.config.load import read_recipe
from loopos.config.merge import MergeConfig
from loopos.evaluation.predictor import Predictor
from loopos.evaluation.reasoning import Reasoner
from loopos.exporting.export import export
from loopos.exporting.settings import ExportSettings
from loopos.merging.merge import merge
from loopos.models import resolve as resolving
from loopos.models.folders import open_generation_model, open_model, save_language_model
from loopos.models.load import load_pretrained
from loopos.models.resolve import ModelRef, resolve, resolve_trained

IDS = torch.tensor([[3, 390, 17, 8, 250]])
TEXTS = ["good cold food again", "where is it", "bad"]
DESCRIPTION = {"precision": "fp32", "stop_tokens": [2], "method": "chain_of_thought"}


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    found: Tensor = model.float().eval()(input_ids=IDS).logits
    return found


def of_folder(folder: Path) -> Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(folder))


def exported(name: str, out: Path) -> Path:
    export(name, out, ExportSettings(format="huggingface", type="f32", check=False))
    return out


def merged(name: str, out: Path) -> Path:
    models = [{"model": name}, {"model": name}]
    merge(MergeConfig.model_validate({"method": "linear", "models": models, "output_dir": str(out)}))
    return out


def _reasoner(name: str, out: Path) -> Tensor:
    model = Reasoner.open(name).model
    assert isinstance(model, PreTrainedModel)
    return logits(model)


def _evaluated(name: str, out: Path) -> Tensor:
    model = open_generation_model(name).model
    assert isinstance(model, PreTrainedModel)
    return logits(model)


COMMANDS: dict[str, Callable[[str, Path], Tensor]] = {
    "generate": _reasoner,
    "evaluate": _evaluated,
    "export": lambda name, out: of_folder(exported(name, out)),
    "merge": lambda name, out: of_folder(merged(name, out)),
    "prune": lambda name, out: logits(open_model(name).model),
    "train": lambda name, out: logits(load_pretrained(name, causal=True).model),
}


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory, pico_folder: Path, pico_tokenizer: Path) -> Path:
    """`run/` with model/ and adapter/ over the pico model, and `both/`: a checkpoint with another model below it."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("house")
    torch.manual_seed(5)
    lora = LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    with warnings.catch_warnings():
        # peft asks transformers by an old name.
        warnings.simplefilter("ignore", FutureWarning)
        wrapped = get_peft_model(AutoModelForCausalLM.from_pretrained(pico_folder), lora)
    wrapped.peft_config["default"].base_model_name_or_path = str(pico_folder)
    wrapped.save_pretrained(folder / "run" / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(pico_folder)
    save_language_model(folder / "run" / "model", wrapped.merge_and_unload(), tokenizer, DESCRIPTION)
    shutil.copytree(folder / "run" / "adapter", folder / "alone")
    shutil.copytree(pico_folder, folder / "both")
    shutil.copytree(folder / "run" / "model", folder / "both" / "model")
    return folder


# Kind of name → the name below the house ("" = the pico model's folder), and the folder with the same weights.
NAMES = {
    "checkpoint": ("", ""),
    "run": ("run", "run/model"),
    "model folder": ("run/model", "run/model"),
    "adapter of a run": ("run/adapter", "run/model"),
    "adapter": ("alone", "run/model"),
    "checkpoint above a model": ("both", ""),
    "weights file": ("run/model/model.safetensors", "run/model"),
}


@pytest.mark.parametrize("command", slow_but(["generate", "export", "train"], COMMANDS))
@pytest.mark.parametrize("kind", NAMES)
def test_every_command_opens_the_same_weights(
    kind: str, command: str, house: Path, pico_folder: Path, tmp_path: Path
) -> None:
    name, reference = ((house / part if part else pico_folder) for part in NAMES[kind])
    expected = of_folder(reference)
    if (kind, command) == ("weights file", "export"):
        with pytest.raises(UserError, match="expected the folder of a model"):
            COMMANDS[command](str(name), tmp_path / "out")
        return
    torch.testing.assert_close(COMMANDS[command](str(name), tmp_path / "out"), expected, atol=1e-5, rtol=1e-5)
    different = of_folder(pico_folder if reference != pico_folder else house / "run" / "model")
    assert (different - expected).abs().max() > 1e-2


@pytest.mark.slow
def test_a_gguf_file_is_one_model_to_every_command(house: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    export(str(house / "run"), tmp_path / "file", ExportSettings(format="gguf", type="f32", check=False))
    [file] = (tmp_path / "file").glob("*.gguf")
    expected = of_folder(house / "run" / "model")
    for command, opened in COMMANDS.items():
        found = opened(str(file), tmp_path / f"out-{command}")
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("part", slow_but("adapter", ["", "model", "adapter"]))
def test_a_model_with_a_head_is_the_same_to_every_command(part: str, tmp_path: Path, head_run: Path) -> None:
    """The adapter of a run stands for the run's model, which alone has the head."""
    name = str(head_run / part)
    expected = [each["probabilities"] for each in Predictor.open(head_run).predict(TEXTS)]
    folders = [name, str(exported(name, tmp_path / "exported")), str(merged(name, tmp_path / "merged"))]
    for folder in folders:
        for found, row in zip(loopos.load(folder, "head").predict(TEXTS), expected, strict=True):
            assert found["probabilities"] == pytest.approx(row, abs=1e-6)
    assert resolve(name).kind == "head"
    assert resolve(name).columns == {"text": "text", "label": "label"}
    with pytest.raises(UserError, match="it cannot generate text"):
        Reasoner.open(name)


@pytest.fixture(scope="module")
def head_run(tmp_path_factory: pytest.TempPathFactory, pico_folder: Path) -> Path:
    """A classifier of three words, trained with LoRA."""
    run = tmp_path_factory.mktemp("head") / "run"
    training = {"trainable": "lora", "learning_rate": 0.02}
    train(config_of(run, pico_folder, class_rows(24, ("a", "b", "c")), training=training))
    return run


@pytest.mark.usefixtures("few_goes")
def test_a_name_is_resolved_once(house: Path, tmp_path: Path) -> None:
    """Whoever passes a ModelRef on has no file looked up a second time; a pruned model is a second name."""
    name = str(house / "run")
    ref = resolve(name)
    assert resolve(ref) is ref is resolve_trained(ref)
    looked_up: list[str] = []

    def counted(name: str, path: Path, key: str) -> Path:
        looked_up.append(name)
        return found(name, path, key)

    found = resolving._model_folder
    with patch.object(resolving, "_model_folder", counted):
        Reasoner.open(ref)
        assert looked_up == []
        Reasoner.open(name)
        assert looked_up == [name]
        looked_up.clear()
        recipe = read_recipe(PruningRecipe, {"model": name, "method": "magnitude", "sparsity": 0.5})
        Pruner(recipe).prune(tmp_path / "pruned")
        assert looked_up.count(name) == 1
        assert len(looked_up) == 2


def test_a_description_is_read_once(house: Path) -> None:
    ref = resolve(str(house / "run"))
    with patch.object(resolving, "read_description", wraps=resolving.read_description) as read:
        assert (ref.kind, ref.is_ensemble, ref.ensemble, ref.columns) == ("language", False, None, {})
        Reasoner.open(ref)
    assert read.call_count == 1


@pytest.mark.parametrize(
    ("name", "storage", "folder"),
    [("run", "folder", "run/model"), ("run/adapter", "adapter", "run/model"), ("alone", "adapter", None)],
)
def test_what_a_reference_says(name: str, storage: str, folder: str | None, house: Path, pico_folder: Path) -> None:
    ref = resolve(str(house / name))
    assert (ref.name, ref.storage) == (str(house / name), storage)
    assert ref.folder == (None if folder is None else house / folder)
    assert ref.adapter == (house / "alone" if name == "alone" else house / "run" / "adapter")
    assert ref.base == str(pico_folder)
    assert ref.title == ("alone" if name == "alone" else "run")
    assert bool(ref.description) is (folder is not None)


def test_a_bert_is_an_encoder_and_new_is_no_trained_model(tmp_path: Path, pico_tokenizer: Path) -> None:
    assert resolve(save_pico("bert", tmp_path / "bert", pico_tokenizer)).architecture == "encoder"
    assert resolve("new") == ModelRef("new", "new")
    with pytest.raises(UserError, match="learned nothing"):
        resolve_trained("new")
