"""Merges of models with heads, of adapters and of different vocabularies; the greedy soup."""

from __future__ import annotations

import json
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from merge_models import recipe_of, rewrite_config, run, tensors_of, variant
from pico_runs import class_rows, config_of, slow_but, train, write_jsonl
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from loopos.config.diagnostics import UserError
from loopos.config.paths import MANIFEST
from loopos.evaluation.predictor import Predictor
from loopos.evaluation.quality import row_metrics
from loopos.merging.merge import merge


def classifier(folder: Path, weights: Path, seed: int, **keys: Any) -> Path:
    """A pico classifier of three classes, trained for an epoch."""
    labels = keys.pop("labels", ("a", "b", "c"))
    training = {"num_epochs": 2, "seed": seed, **keys.pop("training", {})}
    train(config_of(folder, weights, class_rows(36, labels), training=training, **keys))
    return folder


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory: pytest.TempPathFactory, pico_folder: Path) -> list[Path]:
    home = tmp_path_factory.mktemp("classifiers")
    return [classifier(home / f"run{seed}", pico_folder, seed, model={"pooling": "last"}) for seed in (1, 2)]


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_jsonl(tmp_path_factory.mktemp("rows") / "rows.jsonl", class_rows(30, ("a", "b", "c"))[15:]))


def test_heads_are_merged_too(classifiers: list[Path], held_out: str, tmp_path: Path) -> None:
    result = run("linear", classifiers, tmp_path / "out", evaluate=[held_out])
    one, two = (load_file(each / "model" / "head.safetensors")["weight"] for each in classifiers)
    head = load_file(tmp_path / "out" / "head.safetensors")["weight"]
    torch.testing.assert_close(head, (one + two) / 2)
    opened = Predictor.open(tmp_path / "out")
    answer = opened.predict(["good the parcel came late"])[0]
    assert answer["label"] in ("a", "b", "c")
    # transformers' own classifier holds the very head.
    twin = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", dtype="auto")
    assert torch.equal(twin.score.weight, head.to(twin.score.weight.dtype))
    [measured] = result.measured
    assert list(measured.values) == [str(classifiers[0]), str(classifiers[1]), "result"]
    assert measured.values["result"]["accuracy"] == pytest.approx(opened.evaluate_file(held_out)["accuracy"])
    assert "accuracy" in (tmp_path / "out" / "report.md").read_text()


def test_rows_over_the_positions_are_counted(pico_folder: Path, tmp_path: Path) -> None:
    """A loss over fewer rows than the file has is reported, for each model and the result."""
    texts = ["the parcel came late", "word " * 400, "good value", "my card " * 300]
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    result = run("linear", [pico_folder, pico_folder], tmp_path / "out", evaluate=[str(data)])
    [measured] = result.measured
    assert [values["dropped_rows"] for values in measured.values.values()] == [2.0, 2.0]
    summary = f"{data}: 2 rows exceed the positions of result"
    assert any(sentence.startswith(summary) for sentence in result.notes)
    assert summary in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    short = tmp_path / "short.jsonl"
    short.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[::2]), encoding="utf-8")
    alone = row_metrics(str(pico_folder), str(short))
    assert "dropped_rows" not in alone
    assert alone["loss"] == pytest.approx(measured.values["result"]["loss"], rel=1e-6)


def test_task_vectors_of_headless_models_from_a_language_model(pico_folder: Path, tmp_path: Path) -> None:
    """The names of the two differ by the base model's prefix, and the base has no such head."""
    trained = classifier(tmp_path / "run", pico_folder, 4, model={"pooling": "mean"}, training={"num_epochs": 1})
    # As another program writes the headless model.
    tensors = {name.removeprefix("model."): each for name, each in tensors_of(trained / "model").items()}
    save_file(tensors, trained / "model" / "model.safetensors", metadata={"format": "pt"})
    (trained / "model" / MANIFEST).unlink()
    run("task_arithmetic", [trained, trained], tmp_path / "out", base=pico_folder, scale=0.0)
    found, base = tensors_of(tmp_path / "out"), tensors_of(pico_folder)
    assert torch.equal(found["model.layers.1.mlp.up_proj.weight"], base["model.layers.1.mlp.up_proj.weight"])
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", trust_remote_code=False)
    own, head = (load_file(each / "head.safetensors")["weight"] for each in (trained / "model", tmp_path / "out"))
    torch.testing.assert_close(head, own)
    assert "averaged, because the base lacks them: head.weight" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize(
    ("method", "tied"),
    slow_but(
        [("linear", True), ("model_stock", False)],
        product(["linear", "slerp", "task_arithmetic", "model_stock"], [True, False]),
    ),
)
def test_a_classifier_and_a_language_model_share_their_layers(
    classifiers: list[Path], pico_folder: Path, held_out: str, tmp_path: Path, method: str, tied: bool
) -> None:
    """The result is what the first model is; both orders have the same layers, and embeddings and heads stay."""
    base, speaker = tmp_path / "base", variant(pico_folder, tmp_path / "speaker", 5)
    shutil.copytree(pico_folder, base)
    if tied:
        for folder in (base, speaker):
            tensors = load_file(folder / "model.safetensors")
            del tensors["lm_head.weight"]
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
            rewrite_config(folder, tie_word_embeddings=True)
    keys = {"base": base} if method in ("task_arithmetic", "model_stock") else {}
    labeled, spoken = tmp_path / "labeled", tmp_path / "spoken"
    result = run(method, [classifiers[0], speaker], labeled, evaluate=[held_out], **keys)
    run(method, [speaker, classifiers[0]], spoken, **keys)
    [measured] = result.measured
    assert list(measured.values) == [str(classifiers[0]), "result"]
    head = load_file(classifiers[0] / "model" / "head.safetensors")["weight"]
    torch.testing.assert_close(load_file(labeled / "head.safetensors")["weight"], head)
    assert any("a language model: its output embedding is ignored" in each for each in result.notes)
    one, two = tensors_of(labeled), tensors_of(spoken)
    for name in one.keys() - {"score.weight"}:
        torch.testing.assert_close(two[name], one[name], msg=name)
    assert not (spoken / "head.safetensors").exists()
    opened = AutoModelForCausalLM.from_pretrained(spoken)
    if tied:
        assert opened.lm_head.weight is opened.model.embed_tokens.weight
    else:
        torch.testing.assert_close(opened.lm_head.weight.detach(), tensors_of(speaker)["lm_head.weight"])
    assert Predictor.open(labeled).predict(["good the parcel came late"])[0]["label"] in ("a", "b", "c")


def test_a_soup_needs_models_of_one_kind(
    classifiers: list[Path], pico_folder: Path, held_out: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="no metric compares them"):
        run("greedy_soup", [classifiers[0], pico_folder], tmp_path / "out", validation_data=held_out)


def test_other_labels_are_named(classifiers: list[Path], pico_folder: Path, tmp_path: Path) -> None:
    other = classifier(
        tmp_path / "other",
        pico_folder,
        3,
        labels=("a", "b", "x"),
        model={"pooling": "last"},
        training={"num_epochs": 1},
    )
    with pytest.raises(UserError) as told:
        run("linear", [classifiers[0], other, pico_folder], tmp_path / "out")
    assert "it lacks c" in str(told.value)
    assert "lacks x" in str(told.value)
    assert not (tmp_path / "out").exists()


def test_a_greedy_soup_is_never_worse_than_its_best_model(
    classifiers: list[Path], held_out: str, tmp_path: Path
) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(classifiers[0], bad)
    head = load_file(bad / "model" / "head.safetensors")["weight"]
    save_file({"weight": -3 * head}, bad / "model" / "head.safetensors")
    (bad / "model" / MANIFEST).unlink()
    models = [bad, *classifiers]
    result = run("greedy_soup", models, tmp_path / "out", validation_data=held_out)
    best = max(row_metrics(str(each), held_out)["accuracy"] for each in models)
    assert row_metrics(str(tmp_path / "out"), held_out)["accuracy"] >= best
    assert len(result.trials) == 3
    assert 0 not in result.trials[-1].members
    assert [each.name for each in tmp_path.iterdir() if each.name.startswith(".")] == []
    assert "rejected" in (tmp_path / "out" / "report.md").read_text()
    with pytest.raises(UserError, match="metric: got bleu"):
        run("greedy_soup", classifiers, tmp_path / "more", validation_data=held_out, metric="bleu")


def adapter(base: Path, folder: Path, *, rank: int, seed: int, targets: list[str]) -> Path:
    """A random adapter, written by peft itself."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM"
    )
    made = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    made.save_pretrained(folder)
    return folder


def folded(base: Path, adapters: list[tuple[Path, float]]) -> dict[str, torch.Tensor]:
    """The base's tensors with each adapter's change added by peft, times its weight."""
    from peft import PeftModel

    plain = AutoModelForCausalLM.from_pretrained(base).state_dict()
    found = {name: tensor.clone() for name, tensor in plain.items()}
    for folder, weight in adapters:
        merged = (
            PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
            .merge_and_unload()
            .state_dict()
        )
        for name in found:
            found[name] += weight * (merged[name] - plain[name])
    return found


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_adapters_into_the_base_and_with_each_other(pico_folder: Path, tmp_path: Path) -> None:
    one = adapter(pico_folder, tmp_path / "one", rank=4, seed=1, targets=["q_proj", "up_proj"])
    two = adapter(pico_folder, tmp_path / "two", rank=2, seed=2, targets=["q_proj", "v_proj"])
    run("linear", [one], tmp_path / "into_base")
    expected = folded(pico_folder, [(one, 1.0)])
    for name, tensor in tensors_of(tmp_path / "into_base").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-5)

    models = [{"model": str(one), "weight": 0.5}, {"model": str(two), "weight": -2.0}]
    run("task_arithmetic", models, tmp_path / "sum", result="adapter")
    config = json.loads((tmp_path / "sum" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (6, 6)
    exact, made = folded(pico_folder, [(one, 0.5), (two, -2.0)]), folded(pico_folder, [(tmp_path / "sum", 1.0)])
    for name in exact:
        torch.testing.assert_close(made[name], exact[name], rtol=1e-5, atol=1e-5)

    # Whole deltas: the same sum as a model.
    run("task_arithmetic", models, tmp_path / "model", base=pico_folder)
    for name, tensor in tensors_of(tmp_path / "model").items():
        torch.testing.assert_close(tensor, exact[name], rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match='got "adapter" with ties'):
        recipe_of("ties", [one, two], tmp_path / "out", result="adapter")
    with pytest.raises(UserError, match="not an adapter folder"):
        run("linear", [one, pico_folder], tmp_path / "out", result="adapter")


def with_token(model: Path, folder: Path, tokens: list[str], seed: int) -> Path:
    """The model with tokens added, whose rows are random."""
    torch.manual_seed(seed)
    causal, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(tokens)
    size = len(tokenizer)
    rows = {name: torch.randn(size, 32) for name in ("in", "out")}
    old = tokenizer.vocab_size
    with torch.no_grad():
        for key, embedding in (("in", causal.get_input_embeddings()), ("out", causal.get_output_embeddings())):
            rows[key][:old] = embedding.weight[:old]
        causal.resize_token_embeddings(size)
        causal.get_input_embeddings().weight.copy_(rows["in"])
        causal.get_output_embeddings().weight.copy_(rows["out"])
    causal.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_other_vocabularies_are_refused_or_united(pico_folder: Path, tmp_path: Path) -> None:
    one = with_token(pico_folder, tmp_path / "one", ["<plus>", "<step>"], 1)
    two = with_token(variant(pico_folder, tmp_path / "moved", 5), tmp_path / "two", ["<step>", "<end>"], 2)
    with pytest.raises(UserError) as told:
        run("linear", [one, two], tmp_path / "out")
    assert "1 that" in str(told.value)
    assert '"<end>"' in str(told.value)
    assert '1 that it lacks ("<plus>")' in str(told.value)
    assert '1 with another number ("<step>")' in str(told.value)
    run("linear", [one, two], tmp_path / "out", tokenizer="union")
    tokenizers = [AutoTokenizer.from_pretrained(each) for each in (one, two, tmp_path / "out")]
    names = set(tokenizers[0].get_vocab()) | set(tokenizers[1].get_vocab())
    assert set(tokenizers[2].get_vocab()) == names
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.vocab_size == len(tokenizers[2])
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        a, b, found = (tensors_of(each)[key] for each in (one, two, tmp_path / "out"))
        for token in ("a", "<plus>", "<step>", "<end>"):
            place = [tokenizer.get_vocab().get(token) for tokenizer in tokenizers]
            own = [rows[where] for rows, where in ((a, place[0]), (b, place[1])) if where is not None]
            torch.testing.assert_close(found[place[2]], sum(own) / len(own))
    text = "the parcel <step> came <end> late"
    assert tokenizers[2].decode(tokenizers[2].encode(text)) == text


def test_two_tokenizers_that_were_trained_apart_are_united(pico_folder: Path, tmp_path: Path) -> None:
    """Pieces and merge rules of both: a text of the second's words is cut by its rules too."""

    def with_a_row(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([tensor, torch.ones(1, 32)]) if "embed_tokens" in name or "lm_head" in name else tensor

    other = variant(pico_folder, tmp_path / "other", 1, change=with_a_row)
    rewrite_config(other, vocab_size=401)
    content = json.loads((other / "tokenizer.json").read_text())
    content["model"]["vocab"]["zq"] = 400
    content["model"]["merges"].append(["z", "q"])
    (other / "tokenizer.json").write_text(json.dumps(content))
    run("linear", [pico_folder, other], tmp_path / "out", tokenizer="union")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.tokenize("zq") == ["zq"]
    assert torch.equal(tensors_of(tmp_path / "out")["lm_head.weight"][tokenizer.get_vocab()["zq"]], torch.ones(32))
    assert AutoTokenizer.from_pretrained(pico_folder).tokenize("zq") == ["z", "q"]


def test_a_gguf_file_is_a_model_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pico_folder: Path) -> None:
    """By the project's own conversion, which is tested elsewhere; here it is that its folder is merged."""
    from loopos.models import resolve

    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    monkeypatch.setattr(resolve, "converted_folder", lambda actual: pico_folder if actual == file else None)
    merge(recipe_of("linear", [file, pico_folder], tmp_path / "out"))
    found, expected = tensors_of(tmp_path / "out"), tensors_of(pico_folder)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
