"""Whole merges of pico models: what is written opens as the inputs did, and what does not fit is refused whole."""

from __future__ import annotations

import itertools
import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from merge_models import Made, recipe_of, rewrite_config, run, sharded, tensors_of, variant
from pico_runs import save_pico
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from loopos.config.diagnostics import UserError
from loopos.config.merge import MergeConfig
from loopos.merging.merge import merge
from loopos.merging.plan import at_depth
from loopos.merging.sources import Source


@pytest.fixture(scope="module")
def base(pico_folder: Path) -> Path:
    return pico_folder


@pytest.fixture(scope="module")
def one(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return variant(base, tmp_path_factory.mktemp("one") / "model", 1)


@pytest.fixture(scope="module")
def two(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return variant(base, tmp_path_factory.mktemp("two") / "model", 2)


def same(one: Made, two: Made, tolerance: float = 1e-6) -> None:
    assert set(one) == set(two)
    assert one
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=tolerance, atol=tolerance)


def test_linear_is_the_mean_and_opens_as_its_models_did(one: Path, two: Path, tmp_path: Path) -> None:
    result = run("linear", [one, two], tmp_path / "out")
    a, b, found = tensors_of(one), tensors_of(two), tensors_of(tmp_path / "out")
    same(found, {name: (a[name] + b[name]) / 2 for name in a})
    assert result.num_tensors == len(found)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    logits = model(input_ids=torch.arange(3, 9)[None]).logits
    assert logits.shape == (1, 6, 400)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == len(AutoTokenizer.from_pretrained(one))
    assert (tmp_path / "out" / "report.md").read_text().startswith("# Merge: linear")
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


def test_a_model_with_itself_is_the_model(one: Path, tmp_path: Path) -> None:
    for method, keys in (("linear", {}), ("slerp", {"t": 0.3}), ("model_stock", {"base": str(one)})):
        run(method, [one, one], tmp_path / method, **keys)
        same(tensors_of(tmp_path / method), tensors_of(one))


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_linear", "dare_ties", "della", "breadcrumbs"])
def test_methods_on_deltas(method: str, base: Path, one: Path, two: Path, tmp_path: Path) -> None:
    run(method, [one, two], tmp_path / "none", base=base, scale=0.0)
    same(tensors_of(tmp_path / "none"), tensors_of(base))
    run(method, [one, two], tmp_path / "some", base=base)
    found, before = tensors_of(tmp_path / "some"), tensors_of(base)
    moved = sum(float((found[name] - before[name]).abs().sum()) for name in found)
    assert moved > 1


def test_task_arithmetic_is_the_sum_of_deltas(base: Path, one: Path, two: Path, tmp_path: Path) -> None:
    models = [{"model": str(one), "weight": 0.5}, {"model": str(two), "weight": -1.0}]
    run("task_arithmetic", models, tmp_path / "out", base=base, scale=2.0)
    a, b, zero = tensors_of(one), tensors_of(two), tensors_of(base)
    expected = {name: zero[name] + 2 * (0.5 * (a[name] - zero[name]) - (b[name] - zero[name])) for name in a}
    same(tensors_of(tmp_path / "out"), expected, 1e-5)


@pytest.mark.parametrize("method", ["dare_ties", "della", "slerp"])
def test_shards_in_and_out_change_no_bit(method: str, base: Path, one: Path, two: Path, tmp_path: Path) -> None:
    keys: dict[str, Any] = {} if method == "slerp" else {"base": str(base)}
    run(method, [one, two], tmp_path / "plain", **keys)
    in_shards = [sharded(one, tmp_path / "a", 3), sharded(two, tmp_path / "b", 4)]
    run(method, in_shards, tmp_path / "from_shards", **keys)
    plain = (tmp_path / "plain" / "model.safetensors").read_bytes()
    assert (tmp_path / "from_shards" / "model.safetensors").read_bytes() == plain
    run(method, [one, two], tmp_path / "to_shards", **keys, shard_gigabytes=6e-5)
    files = sorted(file.name for file in (tmp_path / "to_shards").glob("*.safetensors"))
    assert len(files) >= 3
    index = json.loads((tmp_path / "to_shards" / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == files
    made, expected = tensors_of(tmp_path / "to_shards"), tensors_of(tmp_path / "plain")
    assert set(index["weight_map"]) == set(expected)
    assert index["metadata"]["total_size"] == sum(each.numel() * each.element_size() for each in expected.values())
    assert all(torch.equal(made[name], expected[name]) for name in expected)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "to_shards").state_dict()
    assert all(torch.equal(opened[name], expected[name]) for name in expected)


def test_a_seed_makes_it_repeatable(base: Path, one: Path, two: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run("dare_linear", [one, two], tmp_path / name, base=base, seed=seed)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_the_recipe_beside_the_model_runs_again(base: Path, one: Path, two: Path, tmp_path: Path) -> None:
    from loopos.config.load import load_recipe
    from loopos.config.source import read_source

    run("ties", [one, two], tmp_path / "out", base=base, density=0.3)
    first = (tmp_path / "out" / "model.safetensors").read_bytes()
    saved = load_recipe(read_source(tmp_path / "out" / "recipe.json"), [], MergeConfig).config
    assert isinstance(saved, MergeConfig)
    merge(saved)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == first


def test_anchors_are_spread_over_the_layers() -> None:
    # Three anchors over five layers, at depths 0, ¼, ½, ¾ and 1.
    assert [at_depth([0.0, 1.0, 0.5], layer / 4) for layer in range(5)] == [0.0, 0.5, 1.0, 0.75, 0.5]
    assert at_depth([0.3], 0.7) == 0.3
    assert at_depth(0.4, 1.0) == 0.4


def test_values_by_layer_and_by_pattern(one: Path, two: Path, tmp_path: Path) -> None:
    # The embedding stands with layer 0 (t = 0), norm and output with layer 1 (t = 1); patterns win over both.
    patterns = [{"tensors": "*.mlp.*", "t": 0.5}, {"tensors": r"re:layers\.1\..*q_proj", "t": 0.0}]
    run("slerp", [one, two], tmp_path / "out", t=[0.0, 1.0], patterns=patterns)
    a, b, found = tensors_of(one), tensors_of(two), tensors_of(tmp_path / "out")
    for name in found:
        if ".mlp." in name:
            assert not torch.equal(found[name], a[name])
            assert not torch.equal(found[name], b[name])
        elif "layers.0." in name or "embed" in name or "q_proj" in name:
            assert torch.equal(found[name], a[name]), name
        else:
            assert torch.equal(found[name], b[name]), name


def test_weights_by_layer_and_by_pattern(one: Path, two: Path, tmp_path: Path) -> None:
    models = [{"model": str(one), "weight": [1.0, 0.0]}, {"model": str(two), "weight": [0.0, 1.0]}]
    patterns = [{"tensors": "*norm*", "weights": [3.0, 1.0]}]
    run("linear", models, tmp_path / "out", patterns=patterns)
    a, b, found = tensors_of(one), tensors_of(two), tensors_of(tmp_path / "out")
    norm, query = "model.layers.1.input_layernorm.weight", "model.layers.1.self_attn.q_proj.weight"
    torch.testing.assert_close(found[norm], (3 * a[norm] + b[norm]) / 4)
    assert torch.equal(found[query], b[query])


def test_a_pattern_that_matches_nothing_is_a_diagnostic(one: Path, two: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"patterns: \*\.attention\.\* matches no tensor"):
        run("slerp", [one, two], tmp_path / "out", patterns=[{"tensors": "*.attention.*", "t": 0.1}])


def test_the_number_format_of_the_result(one: Path, two: Path, tmp_path: Path) -> None:
    run("linear", [one, two], tmp_path / "out", dtype="bf16")
    found, a, b = tensors_of(tmp_path / "out"), tensors_of(one), tensors_of(two)
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert all(torch.equal(found[name], ((a[name] + b[name]) / 2).bfloat16()) for name in found)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16


def test_tied_weights_stay_tied(base: Path, one: Path, tmp_path: Path) -> None:
    def tied(model: Path, folder: Path) -> Path:
        shutil.copytree(model, folder)
        tensors = {name: tensor for name, tensor in tensors_of(model).items() if name != "lm_head.weight"}
        save_file(tensors, folder / "model.safetensors")
        rewrite_config(folder, tie_word_embeddings=True)
        return folder

    a, b = tied(base, tmp_path / "a"), tied(one, tmp_path / "b")
    # One of them was saved with the twin too, as older programs do.
    twin = tensors_of(b)
    save_file({**twin, "lm_head.weight": twin["model.embed_tokens.weight"].clone()}, b / "model.safetensors")
    run("linear", [b, a], tmp_path / "out")
    assert "lm_head.weight" not in tensors_of(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_layers_are_stacked(base: Path, one: Path, tmp_path: Path) -> None:
    for folder in ((a := tmp_path / "a"), (b := tmp_path / "b")):
        shutil.copytree(base if folder == a else one, folder)
    rewrite_config(a, layer_types=["full_attention", "sliding_attention"])
    rewrite_config(b, layer_types=["sliding_attention", "full_attention"])
    models = [
        {"model": str(a), "layers": [0, 2]},
        {"model": str(b), "layers": [1, 2]},
        {"model": str(a), "layers": [0, 1]},
    ]
    run("passthrough", models, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == 4
    assert config["layer_types"] == ["full_attention", "sliding_attention", "full_attention", "full_attention"]
    found, first, second = tensors_of(tmp_path / "out"), tensors_of(a), tensors_of(b)
    for layer, (source, own) in enumerate(((first, 0), (first, 1), (second, 1), (first, 0))):
        name = "self_attn.k_proj.weight"
        assert torch.equal(found[f"model.layers.{layer}.{name}"], source[f"model.layers.{own}.{name}"])
    assert torch.equal(found["lm_head.weight"], first["lm_head.weight"])
    rewrite_config(tmp_path / "out", layer_types=["full_attention"] * 4)
    assert len(AutoModelForCausalLM.from_pretrained(tmp_path / "out").model.layers) == 4
    with pytest.raises(UserError, match=r"models\.0\.layers: got \[1, 3\]; expected at most 2"):
        run("passthrough", [{"model": str(a), "layers": [1, 3]}], tmp_path / "more")


def nothing_under(folder: Path) -> bool:
    return not any(name.startswith(("out", ".out")) for name in (each.name for each in folder.iterdir()))


def test_other_shapes_are_refused_all_at_once(base: Path, pico_tokenizer: Path, tmp_path: Path) -> None:
    def wider(name: str, tensor: Tensor) -> Tensor:
        return torch.zeros(80, 32) if name.endswith(("gate_proj.weight", "up_proj.weight")) else tensor

    wide = variant(base, tmp_path / "wide", 1, change=wider)
    other = save_pico("gpt2", tmp_path / "gpt2", pico_tokenizer)
    with pytest.raises(UserError) as told:
        run("linear", [base, wide, other], tmp_path / "out")
    assert "model_type gpt2" in str(told.value)
    assert "model.layers.0.mlp.gate_proj.weight [80, 32]" in str(told.value)
    assert "has [64, 32]" in str(told.value)
    assert "layers.1.mlp.up_proj.weight [80, 32]" in str(told.value)
    assert nothing_under(tmp_path)


def test_missing_tensors_and_pickles_are_refused(base: Path, one: Path, tmp_path: Path) -> None:
    short = tmp_path / "short"
    shutil.copytree(one, short)
    tensors = tensors_of(one)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, short / "model.safetensors")
    with pytest.raises(UserError, match=r"lacks tensors that .* has: model\.layers\.1\.mlp\.up_proj\.weight"):
        run("linear", [base, short], tmp_path / "out")
    pickled = tmp_path / "pickled"
    shutil.copytree(one, pickled)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    cut = tmp_path / "cut"
    shutil.copytree(one, cut)
    (cut / "model.safetensors").write_bytes((one / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(UserError) as told:
        run("linear", [base, pickled, cut], tmp_path / "out")
    assert "pytorch_model.bin is a torch pickle" in str(told.value)
    assert "not a complete safetensors file" in str(told.value)
    assert nothing_under(tmp_path)


def test_whole_numbers_are_copied_if_they_are_equal(base: Path, one: Path, tmp_path: Path) -> None:
    def with_buffer(model: Path, folder: Path, last: int) -> Path:
        shutil.copytree(model, folder)
        save_file({**tensors_of(model), "model.places": torch.tensor([0, 1, last])}, folder / "model.safetensors")
        return folder

    a, b, c = (
        with_buffer(model, tmp_path / name, last)
        for model, name, last in ((base, "a", 2), (one, "b", 2), (one, "c", 3))
    )
    run("linear", [a, b], tmp_path / "same")
    assert tensors_of(tmp_path / "same")["model.places"].tolist() == [0, 1, 2]
    with pytest.raises(UserError, match=r"model\.places: integers that differ"):
        run("linear", [a, c], tmp_path / "out")
    rewrite_config(b, quantization_config={"quant_method": "torchao"})
    with pytest.raises(UserError, match="quantized weights"):
        run("linear", [a, b], tmp_path / "out")
    assert nothing_under(tmp_path)


def test_numbers_that_are_not_finite_are_refused(base: Path, tmp_path: Path) -> None:
    def broken(name: str, tensor: Tensor) -> Tensor:
        return tensor.index_fill(0, torch.tensor([0]), float("nan")) if "layers.1.mlp.up" in name else tensor

    bad = variant(base, tmp_path / "bad", 1, change=broken)
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: .* non-finite"):
        run("linear", [base, bad], tmp_path / "out")
    assert nothing_under(tmp_path)


def test_an_ordinary_folder_is_never_replaced(one: Path, two: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letters.txt").write_text("mine")
    with pytest.raises(UserError, match="files that no merge wrote"):
        recipe_of("linear", [one, two], tmp_path / "out")


def test_at_most_a_tensor_of_each_model_is_alive(
    base: Path, one: Path, two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counts what is read and not yet let go: with N models, N and the base at once for an election, two for a sum."""
    alive: set[int] = set()
    numbers = itertools.count()
    most = 0
    whole = Source.read_float

    def counted(self: Source, name: str) -> Tensor:
        nonlocal most
        tensor = whole(self, name)
        key = next(numbers)
        alive.add(key)
        weakref.finalize(tensor, alive.discard, key)
        most = max(most, len(alive))
        return tensor

    monkeypatch.setattr(Source, "read_float", counted)
    for method, limit in (("linear", 3), ("task_arithmetic", 3), ("ties", 5), ("model_stock", 5)):
        alive.clear()
        most = 0
        keys = {} if method == "linear" else {"base": str(base)}
        run(method, [one, two, one], tmp_path / method, **keys)
        assert 2 <= most <= limit, method
