"""An exported folder opens as the model that it was made from, describes it, and is complete or absent."""

from __future__ import annotations

import json
import shutil
import socket
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from killed_runs import digest, in_a_child
from pico_runs import class_rows, config_of, save_pico, train, write_jsonl
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaForCausalLM,
)

import loopos
from loopos.config.chain_of_thought import ChainOfThoughtConfig
from loopos.config.diagnostics import MissingRequirement, UserError
from loopos.evaluation.run_folder import run_of
from loopos.exporting.export import Exported, export
from loopos.exporting.settings import ExportSettings
from loopos.methods.chain_of_thought import ChainOfThought
from loopos.models.folders import open_language_model
from loopos.models.resolve import resolve
from loopos.storage.tensor_files import folder_tensors
from loopos.training.progress import RunProgress

IDS = torch.arange(3, 40)[None]
# peft 0.21 reads a name of transformers that 5.23 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def as_folder(source: Path | str, out: Path, kind: str | None = None, **named: Any) -> Exported:
    return export(str(source), out, ExportSettings(format="huggingface", type=kind, **named))


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    found: torch.Tensor = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(input_ids=IDS).logits
    return found


@pytest.fixture(scope="module")
def head_run(tmp_path_factory: pytest.TempPathFactory, pico_folder: Path) -> Path:
    """A run with a head over the last token, in bf16."""
    run = tmp_path_factory.mktemp("head") / "run"
    config = config_of(
        run, pico_folder, class_rows(24), model={"pooling": "last"}, training={"num_epochs": 1, "precision": "bf16"}
    )
    train(config)
    return run


@pytest.fixture(scope="module")
def lora_head_run(tmp_path_factory: pytest.TempPathFactory, pico_folder: Path) -> Path:
    run = tmp_path_factory.mktemp("lora_head") / "run"
    settings = {"num_epochs": 1, "precision": "bf16", "trainable": "lora", "lora": {"rank": 4, "alpha": 64}}
    train(config_of(run, pico_folder, class_rows(24), training=settings))
    return run


@pytest.fixture(scope="module")
def lora_language_run(tmp_path_factory: pytest.TempPathFactory, pico_folder: Path) -> Path:
    """A chain-of-thought run with adapters, in bf16."""
    folder = tmp_path_factory.mktemp("lora_language")
    problems = [
        {"problem": f"What is {i} + 1?", "reasoning": [f"{i} + 1 = {i + 1}"], "answer": str(i + 1)} for i in range(8)
    ]
    data = write_jsonl(folder / "data.jsonl", problems)
    config = ChainOfThoughtConfig.model_validate(
        {
            "computation": {"mode": "posttraining", "method": "chain_of_thought"},
            "training": {
                "learning_rate": 0.02, "optimizer": "adamw", "num_epochs": 1, "batch_size": 4, "precision": "bf16",
                "trainable": "lora", "lora": {"rank": 4, "alpha": 64},
            },
            "data": {
                "pretrained_weights": str(pico_folder), "training_data": str(data), "output_dir": str(folder / "run"),
                "validation_share": 0.0,
            },
        }
    )  # fmt: skip
    ChainOfThought(config, progress=RunProgress(quiet=True)).train()
    return folder / "run"


def test_a_checkpoint_keeps_its_numbers(pico_folder: Path, tmp_path: Path) -> None:
    exported = as_folder(pico_folder, tmp_path / "out")
    one, other = load_file(pico_folder / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert set(one) == set(other)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(logits(tmp_path / "out"), logits(pico_folder))
    assert exported.check is not None
    assert exported.check.largest == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(pico_folder).get_vocab()
    for name in ("README.md", "report.md", "recipe.json", "generation_config.json"):
        assert (tmp_path / "out" / name).is_file()


@pytest.mark.parametrize(("kind", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_another_number_format_is_one_rounding(
    kind: str, dtype: torch.dtype, pico_folder: Path, tmp_path: Path
) -> None:
    exported = as_folder(pico_folder, tmp_path / "out", kind)
    one, other = load_file(pico_folder / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(one[name].to(dtype), other[name]) for name in one)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == dtype
    assert exported.bytes_after < 0.6 * exported.bytes_before
    assert exported.check is not None
    assert 0 < exported.check.largest < 0.05


def test_a_model_with_a_head_opens_in_loopos_and_transformers(head_run: Path, tmp_path: Path) -> None:
    as_folder(head_run, tmp_path / "out", "f32")
    texts = ["good film", "where is it", "bad order"]
    expected, found = loopos.load(head_run).predict(texts), loopos.load(tmp_path / "out").predict(texts)
    assert [each["label"] for each in found] == [each["label"] for each in expected]
    for one, other in zip(expected, found, strict=True):
        assert other["probabilities"] == pytest.approx(one["probabilities"], abs=0.02)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")(texts[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        probabilities = torch.softmax(classifier(input_ids=ids).logits[0], -1)
    # The classifier's own copy of the head has the format of the run's training, bf16.
    assert probabilities.tolist() == pytest.approx(list(found[0]["probabilities"].values()), abs=2e-3)


def test_adapters_of_a_language_model_are_merged_in_fp32(
    lora_language_run: Path, pico_folder: Path, tmp_path: Path
) -> None:
    exported = as_folder(lora_language_run, tmp_path / "out", "f32")
    assert "adapter merged over its base in fp32" in exported.notes
    base, tuned = load_file(pico_folder / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    adapter = load_file(lora_language_run / "adapter" / "adapter_model.safetensors")
    changed = {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.weight") for name in adapter if "lora_A" in name
    }
    assert len(changed) == 14
    for name, weight in base.items():
        stem = name.removesuffix(".weight")
        if stem in changed:
            a, b = (adapter[f"base_model.model.{stem}.lora_{half}.weight"].float() for half in "AB")
            assert b.abs().max() > 0
            weight = weight + 64 / 4 * (b @ a)
        torch.testing.assert_close(tuned[name], weight, atol=1e-6, rtol=1e-6)
    # What the run wrote of itself was merged over a base in bf16, and rounded again.
    rounded = load_file(lora_language_run / "model" / "model.safetensors")
    for name in rounded:
        torch.testing.assert_close(rounded[name].float(), tuned[name], atol=2e-3, rtol=2**-7)
    assert open_language_model(str(tmp_path / "out")).description["method"] == "chain_of_thought"


def test_an_adapter_with_a_head_is_merged_in_fp32(lora_head_run: Path, tmp_path: Path) -> None:
    exported = as_folder(lora_head_run, tmp_path / "out", "f32")
    assert "adapter merged over its base in fp32" in exported.notes
    weights = load_file(tmp_path / "out" / "model.safetensors")
    rounded = load_file(lora_head_run / "model" / "model.safetensors")
    for name in rounded:
        torch.testing.assert_close(rounded[name].float(), weights[name], atol=2e-3, rtol=2**-7)
    assert any(not torch.equal(weights[name], rounded[name].float()) for name in rounded)
    assert loopos.load(tmp_path / "out").predict(["good"])[0]["label"] in (0, 1, 2)


def test_an_adapter_folder_opens_by_peft(lora_language_run: Path, pico_folder: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    exported = export(str(lora_language_run), tmp_path / "out", ExportSettings(format="adapter"))
    assert exported.check is not None
    assert exported.check.largest == 0
    base = AutoModelForCausalLM.from_pretrained(pico_folder, dtype=torch.float32)
    with torch.no_grad():
        found = PeftModel.from_pretrained(base, tmp_path / "out").eval()(input_ids=IDS).logits
    as_folder(lora_language_run, tmp_path / "merged", "f32")
    torch.testing.assert_close(found, logits(tmp_path / "merged"), atol=1e-4, rtol=1e-4)
    # The folder of an adapter is a model that is exported too.
    again = as_folder(lora_language_run / "adapter", tmp_path / "again", "f32")
    assert again.check is not None
    assert torch.equal(logits(tmp_path / "again"), logits(tmp_path / "merged"))


@pytest.mark.slow
def test_a_foreign_adapter_is_merged_over_the_base_that_it_names(
    lora_language_run: Path, pico_folder: Path, tmp_path: Path
) -> None:

    shutil.copytree(lora_language_run / "adapter", tmp_path / "alone")
    as_folder(tmp_path / "alone", tmp_path / "out", "f32")
    as_folder(lora_language_run, tmp_path / "merged", "f32")
    assert torch.equal(logits(tmp_path / "out"), logits(tmp_path / "merged"))


def test_encoders_are_copied_as_they_are(tmp_path: Path, pico_tokenizer: Path) -> None:
    folder = save_pico("bert", tmp_path / "bert", pico_tokenizer)
    exported = as_folder(folder, tmp_path / "out", "bf16")
    assert resolve(str(folder)).architecture == "encoder"
    assert exported.check is not None
    assert AutoModel.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_shards_are_read_one_tensor_at_a_time(pico_folder: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(pico_folder)
    model.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    AutoTokenizer.from_pretrained(pico_folder).save_pretrained(tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    seen: list[tuple[int, int, str]] = []
    settings = ExportSettings(format="huggingface", check=False)
    export(str(tmp_path / "shards"), tmp_path / "out", settings, on_progress=lambda *told: seen.append(told))
    names = list(folder_tensors(tmp_path / "shards"))
    assert sorted(name for _, _, name in seen[:-1]) == sorted(names)
    assert [done for done, _, _ in seen] == [*range(len(names)), len(names)]
    assert torch.equal(logits(tmp_path / "out"), logits(pico_folder))
    assert not list((tmp_path / "out").glob("*.index.json"))


def card_of(folder: Path) -> tuple[dict[str, Any], str]:
    _, head, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(head), text


def code_in(card: str) -> list[str]:
    return [part.split("```")[0] for part in card.split("```python\n")[1:]]


def test_the_card_lists_what_is_known_and_its_code_runs(
    tmp_path: Path, pico_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    rows = write_jsonl(tmp_path / "held_out.jsonl", class_rows(9))
    config = config_of(
        run, pico_folder, class_rows(24), model={"pooling": "last"}, training={"num_epochs": 1},
        data={"validation_data": str(rows)},
    )  # fmt: skip
    train(config)
    as_folder(run, tmp_path / "intents", license="cc-by-4.0")
    head, text = card_of(tmp_path / "intents")
    assert head["license"] == "cc-by-4.0"
    assert head["pipeline_tag"] == "text-classification"
    assert head["tags"] == ["loopos", "fine_tuning"]
    [result] = head["model-index"][0]["results"]
    told = {metric["type"]: metric["value"] for metric in result["metrics"]}
    best = run_of(run / "model")
    assert best is not None
    assert told["accuracy"] == best.exported_metrics["accuracy"]
    assert result["dataset"]["name"] == "held_out.jsonl"
    assert "`run.jsonl`" in text
    assert "| accuracy |" in text
    assert str(tmp_path) not in (tmp_path / "intents" / "README.md").read_text()
    monkeypatch.chdir(tmp_path)
    codes = code_in(text)
    assert len(codes) == 2
    for code in codes:
        exec(compile(code, "README.md", "exec"), {})


def test_the_code_for_a_language_model_runs(
    lora_language_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_folder(lora_language_run, tmp_path / "reasons")
    monkeypatch.chdir(tmp_path)
    [code] = code_in(card_of(tmp_path / "reasons")[1])
    assert "apply_chat_template" in code
    exec(compile(code, "README.md", "exec"), {})


def test_the_report_and_the_recipe(pico_folder: Path, tmp_path: Path) -> None:
    as_folder(pico_folder, tmp_path / "out", "bf16")
    report = (tmp_path / "out" / "report.md").read_text()
    assert "outputs differ by at most" in report
    assert "weights before" in report
    recipe = json.loads((tmp_path / "out" / "recipe.json").read_text())
    assert recipe["model"] == str(pico_folder)
    assert (recipe["command"], recipe["format"], recipe["type"]) == ("export", "huggingface", "bf16")


class FakeHub:
    """Notes what is asked of it; `problem` is what it answers with."""

    def __init__(self, problem: Exception | None = None) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.problem = problem

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        self.calls.append(("create_repo", {"repo_id": repo_id, "private": private, "exist_ok": exist_ok}))

    def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> None:
        assert (Path(folder_path) / "README.md").is_file()
        self.calls.append(("upload_folder", {"repo_id": repo_id, "folder_path": folder_path}))
        if self.problem is not None:
            raise self.problem


def test_a_push_sends_the_finished_folder(pico_folder: Path, tmp_path: Path) -> None:
    hub = FakeHub()
    settings = ExportSettings(format="huggingface", push="owner/name", check=False)
    done = export(str(pico_folder), tmp_path / "out", settings, client=lambda: hub)
    assert hub.calls == [
        ("create_repo", {"repo_id": "owner/name", "private": True, "exist_ok": True}),
        ("upload_folder", {"repo_id": "owner/name", "folder_path": str(tmp_path / "out")}),
    ]
    assert done.pushed == "owner/name"
    assert 'from_pretrained("owner/name")' in (tmp_path / "out" / "README.md").read_text()


def test_a_push_that_fails_leaves_the_folder_and_says_so(pico_folder: Path, tmp_path: Path) -> None:
    hub = FakeHub(OSError("no route to host"))
    settings = ExportSettings(format="huggingface", push="owner/name", check=False)
    with pytest.raises(MissingRequirement, match=r"no route to host; the export itself is complete in"):
        export(str(pico_folder), tmp_path / "out", settings, client=lambda: hub)
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_without_a_push_nothing_is_sent(pico_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub()

    def refuse(*arguments: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    made: list[FakeHub] = []
    export(
        str(pico_folder), tmp_path / "out", ExportSettings(format="huggingface"),
        client=lambda: made.append(hub) or hub,
    )  # fmt: skip
    assert made == []
    assert hub.calls == []


def check_refused(told: str, source: Path | str, out: Path, **settings: Any) -> None:
    """The message is `told`, and nothing new is beside `out`."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(UserError, match=told):
        export(str(source), out, ExportSettings(**settings))
    assert sorted(out.parent.iterdir()) == before


def test_a_broken_adapter_is_reported(lora_language_run: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "run" / "adapter"
    shutil.copytree(lora_language_run, tmp_path / "run")
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    check_refused(
        "adapter_model.safetensors: damaged or changed", adapter, tmp_path / "out", format="adapter", check=False
    )


def test_mistakes_are_reported_and_leave_nothing(head_run: Path, pico_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    check_refused('--format: got the export format "ggml"; expected "huggingface", ', pico_folder, out, format="ggml")
    check_refused(
        "--type: got q8_0; expected one of f32, f16, bf16", pico_folder, out, format="huggingface", type="q8_0"
    )
    check_refused("--push: got name; expected owner/name", pico_folder, out, format="gguf", push="name")
    check_refused("holds only language models", head_run, out, format="gguf")
    check_refused("no adapter here", head_run, out, format="adapter")
    check_refused("no trained model here", tmp_path, out, format="huggingface")
    check_refused("which has learned nothing|expected the folder", "new", out, format="huggingface")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "notes.txt").write_text("mine")
    check_refused("which exists", pico_folder, tmp_path / "there", format="huggingface")


def test_a_killed_export_leaves_no_half_folder(pico_folder: Path, tmp_path: Path) -> None:
    import os
    import signal

    out, total = tmp_path / "out", len(folder_tensors(pico_folder))
    settings = ExportSettings(format="gguf", type="q8_0", check=False)
    for moment in (0, total // 2, total):

        def die(done: int, of: int, name: str, moment: int = moment) -> None:
            if done == moment:
                os.kill(os.getpid(), signal.SIGKILL)

        status = in_a_child(partial(export, str(pico_folder), out, settings, on_progress=die), None)
        assert status == -signal.SIGKILL
        assert not out.exists()
        assert [path.name.split("-")[0] for path in tmp_path.iterdir()] == [".out.partial"]
    assert in_a_child(lambda: export(str(pico_folder), out, settings), None) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    export(str(pico_folder), tmp_path / "other" / "out", settings)
    name = "out-Q8_0.gguf"
    assert digest(out / name) == digest(tmp_path / "other" / "out" / name)


def test_the_embedded_base_is_named_by_its_home(tmp_path: Path, pico_folder: Path) -> None:
    """The license and the source of the embedded weights are known."""
    from loopos.exporting.model_card import model_card

    shutil.copytree(pico_folder, tmp_path / "model")
    described = {"format": 1, "precision": "fp32", "stop_tokens": [2], "pretrained_weights": "smollm2-135m"}
    (tmp_path / "model" / "loopos.json").write_text(json.dumps(described))
    model = resolve(tmp_path / "model")
    card = model_card(model, title="x", file="", output_format="huggingface", type_name="f32", license=None)
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["license"] == "apache-2.0"
    assert head["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.mark.slow
def test_a_gguf_of_a_run_is_made_from_the_merged_adapter(lora_language_run: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    exported = export(str(lora_language_run), tmp_path / "out", ExportSettings(format="gguf", type="f32"))
    assert exported.check is not None
    assert exported.check.largest <= 1e-5
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="out-F32.gguf", dtype=torch.float32)
    as_folder(lora_language_run, tmp_path / "merged", "f32")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    weight = opened.model.layers[1].self_attn.q_proj.weight
    assert torch.equal(weight, merged["model.layers.1.self_attn.q_proj.weight"])
