"""New tokens: their rows start as the mean of their pieces, only they train under LoRA, and every export has them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from pico_runs import slow_but
from preference_runs import comparisons, preference_config, write_rows
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from loopos.config.diagnostics import UserError
from loopos.config.methods import method_row
from loopos.config.sft import SftConfig
from loopos.exporting.export import export
from loopos.exporting.settings import ExportSettings
from loopos.models.load import load_pretrained
from loopos.training.progress import RunProgress

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TOKENS = {"new_tokens": ["<thought>", "invoice7"], "new_special_tokens": ["<|call|>"]}


@pytest.fixture(scope="module", params=slow_but("tied", ["tied", "untied", "spare rows"]))
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, pico_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("base") / "base"
    tokenizer = AutoTokenizer.from_pretrained(pico_folder)
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=len(tokenizer) + (5 if request.param == "spare rows" else 0), hidden_size=32, intermediate_size=64,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        tie_word_embeddings=request.param != "untied", pad_token_id=0, bos_token_id=1, eos_token_id=2,
        initializer_range=0.1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def sft_config(run: Path, weights: Path, training: dict[str, Any], **data: Any) -> SftConfig:
    rows = [
        {"prompt": row["prompt"], "completion": f"<thought> {row['chosen']} <|call|> invoice7"}
        for row in comparisons(24)
    ]
    file = write_rows(run.parent / f"{run.name}.jsonl", rows)
    small = {
        "learning_rate": 1e-2,
        "batch_size": 8,
        "max_steps": 4,
        "precision": "fp32",
        "seed": 5,
        "schedule": "constant",
    }
    sources = {"pretrained_weights": str(weights), "training_data": str(file), "output_dir": str(run)}
    return SftConfig.model_validate(
        {
            "computation": {"mode": "posttraining", "method": "sft"},
            "training": {**small, "warmup": 0, "weight_decay": 0.1, "save_every": 2, "keep_last": 3, **training},
            "data": {**sources, "validation_share": 0.0, **TOKENS, **data},
        }
    )


def train(config: Any, *, resume: bool = False) -> Any:
    trainer = method_row(config.computation.method).trainer_class(config, progress=RunProgress(quiet=True))
    with patch("loopos.methods.base.write_report"):
        trainer.train(resume=resume)
    return trainer


def tables(model: Any) -> list[Tensor]:
    return [model.get_input_embeddings().weight.detach(), model.get_output_embeddings().weight.detach()]


@pytest.mark.parametrize("trainable", ["all", "lora"])
def test_rows_start_as_the_mean_of_their_pieces_and_are_exported(trainable: str, base: Path, tmp_path: Path) -> None:
    old, plain = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base)
    frozen = train(
        sft_config(tmp_path / "frozen", base, {"trainable": trainable, "learning_rate": 1e-12, "weight_decay": 0.0})
    )
    names = [*TOKENS["new_tokens"], *TOKENS["new_special_tokens"]]
    ids = frozen.tokenizer.convert_tokens_to_ids(names)
    assert ids == [len(old), len(old) + 1, len(old) + 2]
    for own, before in zip(tables(frozen.model.causal), tables(plain), strict=True):
        assert len(own) == max(len(before), len(old) + 3)
        for token, row in zip(names, ids, strict=True):
            torch.testing.assert_close(own[row], before[old(token)["input_ids"]].mean(0), atol=1e-6, rtol=0)
    run = tmp_path / "run"
    train(sft_config(run, base, {"trainable": trainable}))
    tokenizer, model = AutoTokenizer.from_pretrained(run / "model"), AutoModelForCausalLM.from_pretrained(run / "model")
    assert tokenizer.convert_tokens_to_ids(names) == ids
    assert tokenizer.decode(tokenizer("a <|call|> b")["input_ids"], skip_special_tokens=True).split() == ["a", "b"]
    assert tokenizer("<thought>", add_special_tokens=False)["input_ids"] == ids[:1]
    for after, before, start in zip(tables(model), tables(plain), tables(frozen.model.causal), strict=True):
        assert (after[ids] - start[ids]).norm(dim=1).min() > 1e-2
        rest = torch.ones(len(before), dtype=torch.bool)
        rest[[row for row in ids if row < len(before)]] = False
        assert torch.equal(after[: len(before)][rest], before[rest]) == (trainable == "lora")


def test_the_adapter_folder_brings_its_tokens(base: Path, tmp_path: Path) -> None:
    """As LoopOS opens it over the base, and as peft does over a base with as many rows."""
    from peft import PeftModel

    run = tmp_path / "run"
    train(sft_config(run, base, {"trainable": "lora"}))
    expected = load_pretrained(str(run / "model"), causal=True)
    found = load_pretrained(str(run / "adapter"), causal=True)
    assert found.tokenizer.get_vocab() == expected.tokenizer.get_vocab()
    ids = expected.tokenizer("where is <thought> invoice7 <|call|>", return_tensors="pt")["input_ids"]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logits = expected.model.eval()(input_ids=ids).logits
        torch.testing.assert_close(found.model.eval()(input_ids=ids).logits, logits, atol=1e-4, rtol=0)
        plain = AutoModelForCausalLM.from_pretrained(base)
        if len(expected.tokenizer) > plain.config.vocab_size:
            plain.resize_token_embeddings(len(expected.tokenizer), mean_resizing=False)
        opened = PeftModel.from_pretrained(plain, run / "adapter").eval()
        torch.testing.assert_close(opened(input_ids=ids).logits, logits, atol=1e-4, rtol=0)


def test_resumed_it_is_the_same_run_and_knows_its_tokens(base: Path, tmp_path: Path) -> None:
    lora = {"trainable": "lora"}
    train(sft_config(tmp_path / "whole", base, lora))
    train(sft_config(tmp_path / "cut", base, {**lora, "max_steps": 2}))
    with pytest.raises(UserError, match=r"data\.new_tokens"):
        train(sft_config(tmp_path / "cut", base, lora, new_tokens=["<thought>", "invoice8"]), resume=True)
    train(sft_config(tmp_path / "cut", base, lora), resume=True)
    for file in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_a_gguf_export_has_the_new_tokens(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    run = tmp_path / "run"
    train(sft_config(run, base, {"trainable": "lora"}))
    # The adapter is merged again over its base, with its rows; the check compares the logits of the file.
    export(str(run), tmp_path / "out", ExportSettings(format="gguf", type="f32"))
    (file,) = (tmp_path / "out").glob("*.gguf")
    found, expected = load_pretrained(str(file), causal=True), load_pretrained(str(run / "model"), causal=True)
    for token in ("<thought>", "<|call|>", "invoice7"):
        assert found.tokenizer.convert_tokens_to_ids(token) == expected.tokenizer.convert_tokens_to_ids(token)
    for own, other in zip(tables(found.model), tables(expected.model), strict=True):
        torch.testing.assert_close(own, other, atol=1e-6, rtol=1e-5)


def test_the_reference_of_dpo_has_the_rows_of_the_start(tmp_path: Path, pico_folder: Path) -> None:
    """The rows train beside the adapters, so the reference is cached before the first step."""
    training = {"trainable": "lora", "max_steps": 3}
    data = {"new_tokens": ["kind answer"]}
    trainer = train(preference_config(tmp_path / "run", pico_folder, training=training, data=data))
    assert trainer.config.caches_reference
    assert len(list((tmp_path / "run" / "reference").iterdir())) == 2
    problems = list(
        preference_config(
            tmp_path / "run", pico_folder, training=training, data=data, preference={"reference": "adapter"}
        ).check()
    )
    assert [problem.fields[0] for problem in problems] == ["preference.reference"]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [(["<pad>"], r"'<pad>' is a token already \(id 0\)"), (["the"], "'the' is a token already")],
)
def test_tokens_that_there_are_are_refused(tokens: list[str], message: str, tmp_path: Path, pico_folder: Path) -> None:
    if tokens == ["the"] and "the" not in AutoTokenizer.from_pretrained(pico_folder).get_vocab():
        tokens, message = ["er"], "'er' is a token already"
    with pytest.raises(UserError, match=rf"data\.new_tokens: {message}"):
        train(sft_config(tmp_path / "run", pico_folder, {}, new_tokens=tokens, new_special_tokens=[]))
