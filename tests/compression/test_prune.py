"""Pruning of folders: exact counts, Wanda beside a plain loop, output files and messages, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pico_runs import class_rows, config_of, save_pico, slow_but, train
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import loopos
from loopos.compression.blocks import linears_of
from loopos.compression.calibration import read_calibration
from loopos.compression.prune import Pruner, prune_model, zeros_of
from loopos.config.compression import PruningRecipe
from loopos.config.diagnostics import ConfigError, UserError
from loopos.config.load import read_recipe
from loopos.models.adapters import layer_list
from loopos.models.folders import open_model

pytestmark = pytest.mark.usefixtures("few_goes")


def recipe_of(model: Path, method: str, text: Path | None = None, **keys: Any) -> PruningRecipe:
    """A small recipe with checked keys."""
    values: dict[str, Any] = {"model": str(model), "method": method, "calibration_rows": 6, "calibration_tokens": 24}
    if text is not None:
        values["calibration"] = str(text)
    recipe = PruningRecipe.model_validate({**values, **keys})
    assert list(recipe.check()) == []
    return recipe


def block_weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if "_proj" in name}


UNSTRUCTURED: list[tuple[str, dict[str, Any]]] = [
    ("magnitude", {"sparsity": 0.5}),
    ("magnitude", {"sparsity": 0.3, "scope": "global"}),
    ("magnitude", {"pattern": "2:4"}),
    ("wanda", {"sparsity": 0.5}),
    ("wanda", {"pattern": "4:8"}),
    ("sparsegpt", {"sparsity": 0.5}),
    ("sparsegpt", {"pattern": "2:4"}),
]


@pytest.mark.parametrize(
    ("method", "keys"), slow_but([UNSTRUCTURED[1], UNSTRUCTURED[4], UNSTRUCTURED[6]], UNSTRUCTURED), ids=str
)
def test_counts_are_exact_and_the_rest_is_unchanged(
    method: str, keys: dict[str, Any], pico_folder: Path, text: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(pico_folder, method, text if method != "magnitude" else None, **keys)
    result = Pruner(recipe).prune(tmp_path / "out")
    before, after = load_file(pico_folder / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    weights = block_weights(tmp_path / "out")
    share = keys.get("sparsity", 0.5)
    total = sum(tensor.numel() for tensor in weights.values())
    assert sum(int((tensor == 0).sum()) for tensor in weights.values()) == round(share * total)
    assert [each.zeros for each in result.after[0].details.zeros] == [
        sum(int((t == 0).sum()) for n, t in weights.items() if f"{each.kind}." in n)
        for each in result.after[0].details.zeros
    ]
    for name, tensor in weights.items():
        if keys.get("scope") != "global":
            assert int((tensor == 0).sum()) * 2 == tensor.numel()
        if "pattern" in keys:
            of = int(keys["pattern"].partition(":")[2])
            assert (tensor.reshape(-1, of) == 0).sum(1).tolist() == [of // 2] * (tensor.numel() // of)
        if method == "wanda":
            assert (tensor == 0).sum(1).tolist() == [tensor.shape[1] // 2] * len(tensor)
        if method != "sparsegpt":
            assert torch.equal(tensor, torch.where(tensor == 0, 0.0, before[name]))
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if name not in weights)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.slow
def test_a_global_threshold_is_one_for_all(pico_folder: Path, tmp_path: Path) -> None:
    before = block_weights(pico_folder)
    Pruner(recipe_of(pico_folder, "magnitude", sparsity=0.3, scope="global")).prune(tmp_path / "out")
    after = block_weights(tmp_path / "out")
    gone = np.concatenate([before[n][t == 0].abs().numpy() for n, t in after.items()])
    stays = np.concatenate([before[n][t != 0].abs().numpy() for n, t in after.items()])
    assert gone.max() < stays.min()


def test_wanda_beside_a_plain_loop(pico_folder: Path, text: Path) -> None:
    """|W_oi|·‖X_i‖ weight by weight; the second block sees what the pruned first one gives."""
    recipe = recipe_of(pico_folder, "wanda", text, sparsity=0.4)
    opened, model = open_model(str(pico_folder)), AutoModelForCausalLM.from_pretrained(pico_folder)
    rows = read_calibration(str(text), {}, opened.tokenizer, num_rows=6, num_tokens=24, seed=0).ids
    assert rows.shape == (6, 24)
    prune_model(opened.model, recipe, 0.4, rows, progress=lambda done, whole: None)
    for block in layer_list(model):
        seen: dict[str, list[np.ndarray]] = {linear.name: [] for linear in linears_of(block)}
        handles = [
            linear.module.register_forward_hook(
                lambda _m, args, _o, kept=seen[linear.name]: kept.append(args[0][0].numpy())
            )
            for linear in linears_of(block)
        ]
        with torch.no_grad():
            for row in rows:
                model(input_ids=row[None])
        for handle in handles:
            handle.remove()
        for linear in linears_of(block):
            entered = np.concatenate(seen[linear.name])
            norms = [np.sqrt(sum(float(token[i]) ** 2 for token in entered)) for i in range(entered.shape[1])]
            zeros = int(0.4 * entered.shape[1] + 0.5)
            for row_weights in linear.weight:
                scores = [abs(float(w)) * norm for w, norm in zip(row_weights, norms, strict=True)]
                for index in sorted(range(len(scores)), key=lambda i: scores[i])[:zeros]:
                    row_weights[index] = 0.0
    expected, found = model.state_dict(), opened.model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


STRUCTURED = [("heads", 0.5), ("channels", 0.25), ("layers", 0.5)]


@pytest.mark.parametrize(("method", "sparsity"), slow_but([("heads", 0.5), ("channels", 0.25)], STRUCTURED))
def test_a_shrunk_folder_is_an_ordinary_smaller_model(
    method: str, sparsity: float, pico_folder: Path, text: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(pico_folder, method, text, sparsity=sparsity, evaluate=str(text), window=64)
    result = Pruner(recipe).prune(tmp_path / "out")
    whole = AutoModelForCausalLM.from_pretrained(pico_folder)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    config = model.config
    sizes = (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads, config.intermediate_size)
    assert sizes == {"heads": (2, 2, 1, 64), "channels": (2, 4, 2, 48), "layers": (1, 4, 2, 64)}[method]
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters == result.after[0].measured.parameters
    lost = {
        "heads": 2 * (2 * 16 * 32 + 2 * 8 * 32),
        "channels": 2 * 3 * 16 * 32,
        "layers": 2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32 + 64,
    }
    assert result.before.parameters - parameters == lost[method]
    assert sum(p.numel() for p in whole.parameters()) == result.before.parameters
    assert result.after[0].measured.metrics["tokens"] == result.before.metrics["tokens"] > 100


@pytest.mark.slow
def test_gpt2_loses_channels_and_layers_and_keeps_its_heads(text: Path, tmp_path: Path, pico_tokenizer: Path) -> None:
    folder = save_pico("gpt2", tmp_path / "gpt2", pico_tokenizer)
    for method, sparsity in (("channels", 0.25), ("layers", 0.5), ("wanda", 0.5), ("sparsegpt", 0.5)):
        Pruner(recipe_of(folder, method, text, sparsity=sparsity)).prune(tmp_path / method)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "channels").config.n_inner == 96
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "layers").config.n_layer == 1
    with pytest.raises(UserError, match="gpt2: its config derives the size of a head"):
        Pruner(recipe_of(folder, "heads", text, sparsity=0.5)).prune(tmp_path / "heads")
    assert not (tmp_path / "heads").exists()


@pytest.mark.slow
def test_report_recipe_and_curve(pico_folder: Path, text: Path, tmp_path: Path) -> None:
    recipe = recipe_of(pico_folder, "magnitude", sparsity=[0.5, 0.25], evaluate=str(text), window=64)
    result = Pruner(recipe).prune(tmp_path / "out")
    assert [pruned.name for pruned in result.after] == ["sparsity-0.25", "sparsity-0.5"]
    for pruned in result.after:
        opened = open_model(str(tmp_path / "out" / pruned.name))
        zeros, weights = (sum(getattr(each, name) for each in zeros_of(opened.model)) for name in ("zeros", "weights"))
        assert zeros == pruned.details.sparsity * weights
    report = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    whole = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32)
    assert f"{whole // 4:,} of {whole:,} (25.00%)" in report
    assert f"{whole // 2:,} of {whole:,} (50.00%)" in report
    for measured in (result.before, *(pruned.measured for pruned in result.after)):
        assert f"{measured.metrics['perplexity']:.5g}" in report
    assert "zeros by themselves make a dense product no faster" in report
    assert "`self_attn.q_proj` | 2,048 | 1,024 | 50.00%" in report
    assert (tmp_path / "out" / "perplexity.svg").read_text(encoding="utf-8").startswith("<?xml")
    assert read_recipe(PruningRecipe, str(tmp_path / "out" / "recipe.json")) == recipe


@pytest.mark.slow
def test_the_same_recipe_gives_the_same_weights(pico_folder: Path, text: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        Pruner(recipe_of(pico_folder, "sparsegpt", text, sparsity=0.5, seed=3)).prune(tmp_path / name)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items())


@pytest.mark.parametrize(
    ("method", "sparsity"), slow_but(("layers", 0.5), [("wanda", 0.3), ("channels", 0.5), ("layers", 0.5)])
)
def test_a_classifier_stays_one(method: str, sparsity: float, pico_folder: Path, tmp_path: Path) -> None:
    """Its own training rows calibrate, its metric is measured, and every door still opens it."""
    rows = class_rows(40)
    config = config_of(tmp_path / "run", pico_folder, rows, model={"pooling": "last"})
    train(config)
    data = tmp_path / "run.jsonl"
    before = loopos.load(tmp_path / "run").evaluate_file(str(data))
    recipe = recipe_of(tmp_path / "run", method, data, sparsity=sparsity, evaluate=str(data))
    result = Pruner(recipe).prune(tmp_path / method)
    assert result.before.metrics["accuracy"] == before["accuracy"]
    after = loopos.load(tmp_path / method)
    assert result.after[0].measured.metrics["accuracy"] == after.evaluate_file(str(data))["accuracy"]
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / method)
    assert classifier.config.num_hidden_layers == (1 if method == "layers" else 2)


@pytest.mark.slow
def test_an_encoder_with_a_head_loses_layers(tmp_path: Path, pico_tokenizer: Path) -> None:
    folder = save_pico("bert", tmp_path / "bert", pico_tokenizer)
    train(config_of(tmp_path / "run", folder, class_rows(24), training={"num_epochs": 1}))
    data = tmp_path / "run.jsonl"
    result = Pruner(recipe_of(tmp_path / "run", "layers", data, sparsity=0.5)).prune(tmp_path / "out")
    assert result.after[0].measured.parameters < result.before.parameters
    assert len(loopos.load(tmp_path / "out").predict(["good film"])) == 1


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"method": "magnitud"}, 'did you mean "magnitude"'),
        ({"sparsity": 1.0}, "sparsity: got 1.0"),
        ({"sparsity": None}, "a fraction such as 0.5, or a pattern such as 2:4"),
        ({"sparsity": None, "pattern": "4:2"}, "N:M, N kept of every M"),
        ({"pattern": "1:4"}, r"sparsity: got 0.5 with pattern 1:4; expected 0.75"),
        ({"method": "wanda"}, "calibration: got nothing with method wanda"),
        ({"method": "layers", "pattern": "2:4", "calibration": "{text}"}, "pattern: got .* with method layers"),
        ({"scope": "global", "pattern": "2:4"}, "scope: got"),
        ({"evaluate": "no/such.txt"}, "evaluate: got"),
        ({"window": 8, "stride": 8}, "a stride below the window"),
        ({"sparsety": 0.5}, 'did you mean "sparsity"'),
    ],
)
def test_diagnostics_of_a_recipe(
    keys: dict[str, Any], told: str, pico_folder: Path, text: Path, tmp_path: Path
) -> None:
    values = {"model": str(pico_folder), "method": "magnitude", "sparsity": 0.5, **keys}
    values = {name: str(text) if value == "{text}" else value for name, value in values.items()}
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(values, indent=1), encoding="utf-8")
    with pytest.raises(ConfigError, match=told) as raised:
        read_recipe(PruningRecipe, str(file))
    assert str(file) in str(raised.value)


def test_sizes_that_do_not_fit_are_refused_and_nothing_is_left(pico_folder: Path, text: Path, tmp_path: Path) -> None:
    for method, keys, told in (
        ("wanda", {"pattern": "2:5"}, "self_attn.q_proj has 32 inputs; expected a pattern whose second number divides"),
        ("layers", {"sparsity": 0.1}, "which drops 0 of 2 layers"),
        ("layers", {"sparsity": 0.9}, "which drops 2 of 2 layers"),
        ("channels", {"sparsity": 0.999}, "which keeps 0 of 64 channels"),
    ):
        with pytest.raises(UserError, match=told):
            Pruner(recipe_of(pico_folder, method, text, **keys)).prune(tmp_path / "out")
    assert [place.name for place in tmp_path.iterdir()] == ["text.md"]


@pytest.mark.slow
def test_heads_go_to_the_nearest_number_that_can_be_written(pico_folder: Path, text: Path, tmp_path: Path) -> None:
    result = Pruner(recipe_of(pico_folder, "heads", text, sparsity=0.1)).prune(tmp_path / "out")
    assert "1 of 2 key-value groups of 2 query heads leave every block" in result.after[0].summary[0]
    assert "(sparsity 0.1 means 0; this is the nearest that can be written)" in result.after[0].summary[0]


def test_calibration_rows(text: Path, pico_folder: Path, tmp_path: Path) -> None:
    tokenizer = open_model(str(pico_folder)).tokenizer
    drawn = [read_calibration(str(text), {}, tokenizer, num_rows=5, num_tokens=16, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0].ids, drawn[1].ids)
    assert not torch.equal(drawn[0].ids, drawn[2].ids)
    assert drawn[0].ids.shape == (5, 16)
    messages = [{"role": "user", "content": "where is it?"}, {"role": "assistant", "content": "the parcel came late"}]
    file = tmp_path / "talk.jsonl"
    file.write_text("".join(json.dumps({"messages": messages}) + "\n" for _ in range(3)), encoding="utf-8")
    talk = read_calibration(str(file), {}, tokenizer, num_rows=99, num_tokens=20, seed=0)
    assert "where is it?" in tokenizer.decode(talk.ids.flatten())
    assert f"{len(talk.ids)} rows of 20 tokens, of 99 requested" in talk.summary
