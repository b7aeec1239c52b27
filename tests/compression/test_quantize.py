"""Quantization of folders: output files, programs that open them, reports, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pico_runs import class_rows, config_of, save_pico, slow_but, train
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import loopos
from loopos.compression.pipeline import Rate
from loopos.compression.quantize import Quantizer
from loopos.config.compression import QuantizationRecipe
from loopos.config.diagnostics import ConfigError, UserError
from loopos.config.load import read_recipe
from loopos.evaluation.reasoning import Reasoner
from loopos.generation.decoders import probed
from loopos.generation.settings import SamplingParams
from loopos.models.folders import open_model
from loopos.models.load import load_pretrained
from loopos.models.quantized import quantized_layers

pytestmark = pytest.mark.usefixtures("few_goes")


def recipe_of(model: Path, method: str, text: Path | None = None, **keys: Any) -> QuantizationRecipe:
    """A small recipe with checked keys."""
    values: dict[str, Any] = {"model": str(model), "method": method, "calibration_rows": 4, "calibration_tokens": 24}
    if text is not None:
        values["calibration_text"] = str(text)
    recipe = QuantizationRecipe.model_validate({**values, **keys})
    assert list(recipe.check()) == []
    return recipe


def written_out(folder: Path) -> dict[str, Tensor]:
    """The weights that a folder's codes stand for, read off the file by torchao's own rules for these tensors."""
    tensors = load_file(folder / "model.safetensors")
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        names = json.loads(file.metadata()["tensor_names"])
        kinds = {name: json.loads(file.metadata()[name])["_type"] for name in names}
    found = {}
    for name, kind in kinds.items():
        stem = name.removesuffix(".weight")
        if kind == "Tensor":
            found[name] = tensors[name].float()
            continue
        codes, scale = (tensors[f"{stem}._weight_{part}"] for part in ("qdata", "scale"))
        if kind == "Int8Tensor":
            found[name] = codes.float() * scale.float()
        else:
            assert kind == "Int4Tensor"
            zero, low, high = tensors[f"{stem}._weight_zero_point"], (codes & 15), (codes >> 4) & 15
            halves = torch.stack([low, high], -1).flatten(1).float()
            halves = torch.where(halves > 7, halves - 16, halves)
            groups = halves.unflatten(1, (len(scale), -1)) * scale.t().float()[..., None]
            found[name] = (groups + zero.t().float()[..., None]).flatten(1)
        factors = tensors.get(f"{stem}._weight_act_pre_scale")
        if factors is not None:
            found[name] *= factors.float()
    return found


CASES: list[tuple[str, str]] = [
    ("int8", "none"),
    ("int8", "gptq"),
    ("int8-dynamic", "none"),
    ("int4", "none"),
    ("int4", "gptq"),
    ("int4", "awq"),
]


@pytest.mark.parametrize(("method", "calibration"), slow_but([CASES[1], CASES[2], CASES[5]], CASES))
def test_the_folder_gives_the_outputs_of_its_dequantized_weights(
    method: str, calibration: str, pico_folder: Path, text: Path, tmp_path: Path
) -> None:
    read = None if calibration == "none" else text
    result = Quantizer(recipe_of(pico_folder, method, read, calibration=calibration)).quantize(tmp_path / "out")
    weights = written_out(tmp_path / "out")
    before = load_file(pico_folder / "model.safetensors")
    assert set(weights) == set(before)
    model = AutoModelForCausalLM.from_pretrained(pico_folder)
    model.load_state_dict(weights)
    ids = torch.arange(3, 23)[None]
    opened = open_model(str(tmp_path / "out"), quantized=True).model
    for _, layer in quantized_layers(opened):
        if method == "int8-dynamic":
            layer.rounds_activations = False
    with torch.no_grad():
        torch.testing.assert_close(opened(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
    # 14 linear layers, the embedding and the output layer.
    assert sum(name.endswith("_weight_qdata") for name in load_file(tmp_path / "out" / "model.safetensors")) == 16
    [after] = result.after
    assert after.measured.parameters == result.before.parameters == sum(p.numel() for p in model.parameters())
    assert after.size_ratio < (0.75 if method == "int4" else 0.9)
    assert sum(kind.weights for kind in after.details) == after.measured.parameters
    assert sum(kind.num_bytes for kind in after.details) == after.measured.weight_bytes


def test_every_door_opens_it(pico_folder: Path, text: Path, tmp_path: Path) -> None:
    """One row and many rows decode with our cache, which use different kernels; perplexity is measured."""
    recipe = recipe_of(pico_folder, "int8", evaluate=str(text), window=64)
    result = Quantizer(recipe).quantize(tmp_path / "out")
    was, became = result.before.metrics["perplexity"], result.after[0].measured.metrics["perplexity"]
    assert became == pytest.approx(was, rel=0.02)
    reasoner = Reasoner.open(str(tmp_path / "out"))
    assert reasoner.model.dtype == torch.bfloat16
    settings = SamplingParams(max_new_tokens=3, stop_at_end=False)
    for number in (1, 6):
        written = reasoner.engine.generate([[5, 6, 7 + index] for index in range(number)], settings, logprobs=False)
        assert [len(each.token_ids) for each in written] == [3] * number
    decode_path = probed(reasoner.model)
    assert decode_path.why_plain == ""
    assert decode_path.kernel_layout == torch.ops.mkldnn._is_mkldnn_bf16_supported()


def test_transformers_opens_it_where_torchao_is(pico_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    Quantizer(recipe_of(pico_folder, "int8")).quantize(tmp_path / "out")
    ids = torch.arange(3, 23)[None]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    ours = open_model(str(tmp_path / "out"), quantized=True).model.to(torch.bfloat16)
    assert type(theirs.model.layers[0].self_attn.q_proj.weight).__name__ == "Int8Tensor"
    assert type(theirs.model.embed_tokens.weight).__name__ == "Int8Tensor"
    with torch.no_grad():
        expected, found = (model(input_ids=ids).logits.float() for model in (theirs, ours))
    assert float((found - expected).abs().max()) < 0.03 * float(expected.abs().max())


@pytest.mark.slow
def test_layers_that_are_kept_are_as_they_were(pico_folder: Path, tmp_path: Path) -> None:
    recipe = recipe_of(pico_folder, "int8", keep=["*.down_proj", "lm_head"])
    result = Quantizer(recipe).quantize(tmp_path / "out")
    before, after = (load_file(folder / "model.safetensors") for folder in (pico_folder, tmp_path / "out"))
    kept = [name for name in before if "down_proj" in name or "lm_head" in name]
    assert len(kept) == 3
    assert all(torch.equal(after[name], before[name].bfloat16()) for name in kept)
    assert "embedding in eight bits" in result.after[0].summary
    assert len([name for name in after if name.endswith("_weight_qdata")]) == 13
    with pytest.raises(UserError, match=r"keep: got \*\.mlp, which matches no layer"):
        Quantizer(recipe_of(pico_folder, "int8", keep=["*.mlp"])).quantize(tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_a_group_that_does_not_fit_leaves_eight_bits(pico_folder: Path, tmp_path: Path) -> None:
    """32 inputs are no group of 64; the 64 of the MLP's last layer are."""
    result = Quantizer(recipe_of(pico_folder, "int4", group_size=64)).quantize(tmp_path / "out")
    assert any("12 of them in eight bits, because a group of 64" in sentence for sentence in result.after[0].summary)
    assert {kind.name: kind.layers for kind in result.after[0].details}["linear layers, 4 bits, groups of 64"] == 2


@pytest.mark.slow
def test_a_tied_embedding_is_written_once(pico_folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig.from_pretrained(pico_folder, tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "tied")
    open_model(str(pico_folder)).tokenizer.save_pretrained(tmp_path / "tied")
    result = Quantizer(recipe_of(tmp_path / "tied", "int8")).quantize(tmp_path / "out")
    assert "embedding in eight bits, shared with the output layer" in result.after[0].summary
    names = {name for name in load_file(tmp_path / "out" / "model.safetensors") if "layers" not in name}
    assert names == {"model.embed_tokens._weight_qdata", "model.embed_tokens._weight_scale", "model.norm.weight"}
    model = open_model(str(tmp_path / "out"), quantized=True).model
    assert model.lm_head._weight_qdata is model.model.embed_tokens._weight_qdata
    stays = Quantizer(recipe_of(tmp_path / "tied", "int8", keep=["lm_head"])).quantize(tmp_path / "kept")
    assert "embedding and output layer share one weight, and are not quantized" in stays.after[0].summary


@pytest.mark.slow
def test_gpt2_and_a_classifier(text: Path, tmp_path: Path, pico_tokenizer: Path) -> None:
    gpt2 = save_pico("gpt2", tmp_path / "gpt2", pico_tokenizer)
    Quantizer(recipe_of(gpt2, "int4", text, calibration="gptq")).quantize(tmp_path / "gpt2-4")
    assert load_pretrained(str(tmp_path / "gpt2-4"), causal=True, quantized=True).summary.count("GPT2LMHeadModel") == 1
    bert = save_pico("bert", tmp_path / "bert", pico_tokenizer)
    train(config_of(tmp_path / "run", bert, class_rows(24), training={"num_epochs": 1}))
    data = tmp_path / "run.jsonl"
    result = Quantizer(recipe_of(tmp_path / "run", "int8-dynamic", evaluate=str(data))).quantize(tmp_path / "small")
    predictor = loopos.load(tmp_path / "small")
    assert result.after[0].measured.metrics["accuracy"] == predictor.evaluate_file(str(data))["accuracy"]
    assert [rate.name for rate in result.after[0].rates] == ["reading"]


@pytest.mark.slow
def test_codes_can_be_neither_trained_nor_changed(pico_folder: Path, tmp_path: Path) -> None:
    Quantizer(recipe_of(pico_folder, "int8")).quantize(tmp_path / "out")
    with pytest.raises(UserError, match="cannot be trained or changed"):
        load_pretrained(str(tmp_path / "out"), causal=True)
    with pytest.raises(UserError, match="expected the model it was made from"):
        open_model(str(tmp_path / "out"))
    file = tmp_path / "out" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(UserError, match="damaged or changed"):
        load_pretrained(str(tmp_path / "out"), causal=True, quantized=True)
    (tmp_path / "out" / "loopos-manifest.json").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors: not a complete safetensors file"):
        load_pretrained(str(tmp_path / "out"), causal=True, quantized=True)


def test_a_slower_model_is_no_success(pico_folder: Path, tmp_path: Path) -> None:
    result = Quantizer(recipe_of(pico_folder, "int8")).quantize(tmp_path / "out")
    [after] = result.after
    told = replace(after, rates=[Rate("reading", 10, 8, 0.8), Rate("writing", 9, 12, 1.3)])
    assert told.verdict.startswith("no success for speed")
    assert told.verdict.endswith("slower than before on this machine in reading (×0.80)")
    fine = replace(after, rates=[Rate("reading", 10, 9.8, 0.98)])
    assert "reading as fast (×0.98)" in fine.verdict
    report = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert f"**{after.verdict}**" in report
    assert f"{after.measured.weight_bytes / 1e6:,.1f}" in report
    assert "only size and speed were measured" in report
    assert read_recipe(QuantizationRecipe, str(tmp_path / "out" / "recipe.json")) == recipe_of(pico_folder, "int8")


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"method": "int5"}, "method: got"),
        ({"group_size": 32}, "group_size: got 32 with method int8"),
        ({"method": "int4", "group_size": 48}, "group_size"),
        ({"calibration": "gptq"}, "calibration_text: got nothing with calibration gptq"),
        ({"calibration_text": "{text}"}, "calibration_text: got a text that is not used"),
        ({"evaluate": "no/such.txt"}, "evaluate: got"),
        ({"window": 8, "stride": 8}, "a stride below the window"),
    ],
)
def test_diagnostics_of_a_recipe(
    keys: dict[str, Any], told: str, pico_folder: Path, text: Path, tmp_path: Path
) -> None:
    values = {"model": str(pico_folder), "method": "int8", **keys}
    values = {name: str(text) if value == "{text}" else value for name, value in values.items()}
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(values, indent=1), encoding="utf-8")
    with pytest.raises(ConfigError, match=told) as raised:
        read_recipe(QuantizationRecipe, str(file))
    assert str(file) in str(raised.value)
