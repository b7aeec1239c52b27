"""Both phases of learning from human preferences by one config: the guide's own, and what a resumed run does not change."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from preference_runs import comparisons, events_of, write_rows

from loopos.config.load import load
from loopos.config.methods import config_classes
from loopos.config.rlhf import RlhfConfig
from loopos.config.sections import LanguageModelSection
from loopos.evaluation.reward_predictor import RewardPredictor
from loopos.methods.rlhf import ReinforcementTrainer
from loopos.training.progress import RunProgress
from tests.conftest import drawing

GUIDE = Path(__file__).parents[2] / "configs" / "rlhf.json"


def write_guide_files(folder: Path, model: LanguageModelSection) -> None:
    """What the guide's config names: a model of these sizes as `models/pretrained_model.bin` beside a tokenizer of as many
    tokens, and comparisons as people write them.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "<end>": 1, **{f"word{i}": i for i in range(2, model.vocab_size)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>")
    fast.save_pretrained(folder / "models")
    torch.manual_seed(0)
    sizes = LlamaConfig(
        vocab_size=model.vocab_size, hidden_size=model.d_model, intermediate_size=model.d_ff,
        num_hidden_layers=model.num_layers, num_attention_heads=8, num_key_value_heads=8, tie_word_embeddings=True,
        max_position_embeddings=2048,
    )  # fmt: skip
    torch.save(LlamaForCausalLM(sizes).state_dict(), folder / "models" / "pretrained_model.bin")
    (folder / "data").mkdir()
    (folder / "data" / "human_preferences.txt").write_text(
        "".join(
            f"Prompt: word{20 + i} word{40 + i}\nChosen: word{5 + i % 3} word9\nRejected: word{60 + i}\n\n"
            for i in range(10)
        )
    )


@pytest.mark.parametrize(
    "smaller",
    [
        pytest.param(("model.d_model=48", "model.d_ff=96", "model.num_layers=2", "model.vocab_size=400"), id="smaller"),
        pytest.param((), marks=pytest.mark.slow, id="as it is"),
    ],
)
def test_the_guides_config_runs_both_phases(
    smaller: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    guide = load(GUIDE, smaller, config_classes(), check_files=False).config
    assert isinstance(guide, RlhfConfig)
    write_guide_files(tmp_path, guide.model)
    config = load(GUIDE, smaller, config_classes()).config
    assert config == guide
    # The smaller run is not drawn, which takes longer than it does.
    with nullcontext() if smaller else drawing():
        result = ReinforcementTrainer(config, progress=RunProgress(quiet=True)).train()
    run = tmp_path / "outputs" / "rlhf"
    # 9 of 10 prompts train, 8 an iteration, once each: 2 iterations of 4 inner epochs.
    assert (result.step, result.stopped_by) == (8, "epochs")
    rollouts = events_of(run, "rollout")
    assert [rollout["kl_coefficient"] for rollout in rollouts] == [0.1, 0.1]
    assert {step["learning_rate"] for step in events_of(run, "step")} <= {1e-6 * (8 - n) / 8 for n in range(8)}
    assert len(events_of(run / "reward_model", "step")) == 2
    scored = RewardPredictor.open(str(run / "reward_model")).score_file("data/human_preferences.txt", {})
    assert len(scored.rows) == 10
    assert 0.0 <= scored.metrics["pair_accuracy"] <= 1.0
    report = (run / "report.md").read_text(encoding="utf-8")
    assert "![frontier](curves/frontier.svg)" in report
    assert "## Answers before and after" in report
    assert "## Preferences" in (run / "reward_model" / "report.md").read_text(encoding="utf-8")


def test_a_first_phase_that_is_done_is_not_run_again(tmp_path: Path, pico_folder: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", comparisons(20))
    config = RlhfConfig.model_validate(
        {
            "computation": {"mode": "posttraining", "method": "rlhf"},
            "training": {
                "learning_rate": 1e-3,
                "batch_size": 4,
                "num_epochs": 1,
                "inner_epochs": 1,
                "precision": "fp32",
            },
            "reward_training": {"learning_rate": 1e-2, "batch_size": 8, "num_epochs": 1, "precision": "fp32"},
            "data": {
                "pretrained_weights": str(pico_folder),
                "preference_data": str(tmp_path / "rows.jsonl"),
                "output_dir": str(tmp_path / "run"),
            },
            "generation": {"max_new_tokens": 4},
        }
    )
    ReinforcementTrainer(config, progress=RunProgress(quiet=True)).train()
    log = tmp_path / "run" / "reward_model" / "events.jsonl"
    before = log.read_bytes()
    ReinforcementTrainer(config, progress=RunProgress(quiet=True)).train(resume=True)
    assert log.read_bytes() == before
    sessions = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in sessions].count("session") == 2
