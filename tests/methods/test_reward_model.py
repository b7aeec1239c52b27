"""Reward modeling through its real entry point, on the pico model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from preference_runs import comparisons, events_of, reward_config
from transformers import AutoModel

from loopos.config.diagnostics import UserError
from loopos.config.reward_model import RewardModelConfig
from loopos.data.batches import ComparisonRows
from loopos.data.preference_tokens import EncodedComparison
from loopos.data.preferences import Pair
from loopos.evaluation.reward_predictor import Normalization, raw_scores
from loopos.methods.reward_model import RewardModelTrainer
from loopos.models.backbone import Backbone
from loopos.models.folders import open_reward_model
from loopos.models.heads import PooledModel
from loopos.training.objectives import PairObjective
from loopos.training.progress import RunProgress


def trained(config: RewardModelConfig) -> RewardModelTrainer:
    method = RewardModelTrainer(config, progress=RunProgress(quiet=True))
    method.train()
    return method


def test_the_first_loss_is_that_of_transformers_on_the_same_rows(tmp_path: Path, pico_folder: Path) -> None:
    config = reward_config(tmp_path / "run", pico_folder, training={"max_steps": 1, "shuffle": False, "batch_size": 5})
    method = RewardModelTrainer(config, progress=RunProgress(quiet=True))
    method.train()
    told = events_of(tmp_path / "run", "step")[0]
    # The head is drawn from the seed alone: N(0, 1/√(d + 1)), d = 32.
    head = torch.empty(1, 32).normal_(0.0, 33**-0.5, generator=torch.Generator().manual_seed(5))
    plain = AutoModel.from_pretrained(pico_folder)
    total = 0.0
    for row in method.train_rows[:5]:
        better, worse = (
            head @ plain(input_ids=torch.tensor([[*row.prompt, *response]])).last_hidden_state[0, -1]
            for response in row.responses
        )
        total += float(-torch.log(torch.sigmoid(better - worse)).detach())
    assert told["loss"] == pytest.approx(total / 5, abs=1e-5)


def test_shared_prompts_give_the_scores_and_gradients_of_prompts_apart(tmp_path: Path, pico_folder: Path) -> None:
    config = reward_config(tmp_path / "run", pico_folder, training={"max_steps": 1})
    method = RewardModelTrainer(config, progress=RunProgress(quiet=True))
    method.train()
    assert method.shares_prompts
    rows = [
        EncodedComparison([5, 6, 7, 8, 9], [[10, 11], [12, 13, 14, 2], [15]], (Pair(1, 0), Pair(1, 2, 0.7)), 0),
        EncodedComparison([20, 21], [[22, 2], [23, 24, 25, 26, 27, 2]], (Pair(0, 1),), 1),
    ]
    found = []
    for share in (False, True):
        batch = ComparisonRows(rows, share_prompts=share)([0, 1])
        assert batch.num_tokens == (34 if not share else 22)
        method.model.zero_grad()
        scores = method.model(batch.ids, batch.layout)
        PairObjective(method.model).loss(batch)["loss"].backward()
        gradients = [p.grad.clone() for p in method.model.parameters() if p.grad is not None]
        found.append((scores, gradients))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-5, rtol=1e-5)
    assert len(found[0][1]) == len(found[1][1]) > 10
    for apart, shared in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(apart, shared, atol=1e-5, rtol=1e-4)


def test_a_response_does_not_see_another_response_of_its_prompt(pico_folder: Path) -> None:
    backbone = Backbone(AutoModel.from_pretrained(pico_folder))
    one = ComparisonRows([EncodedComparison([5, 6], [[7, 8], [9, 10]], (Pair(0, 1),), 0)], share_prompts=True)([0])
    other = ComparisonRows([EncodedComparison([5, 6], [[70, 80, 90], [9, 10]], (Pair(0, 1),), 0)], share_prompts=True)(
        [0]
    )
    last = [backbone(batch.ids, batch.layout)[batch.layout.last_tokens()][1] for batch in (one, other)]
    torch.testing.assert_close(last[0], last[1], atol=1e-6, rtol=0)


def test_preferences_are_learned_and_scores_are_normalized(tmp_path: Path, pico_folder: Path) -> None:
    method = trained(reward_config(tmp_path / "run", pico_folder))
    validations = events_of(tmp_path / "run", "validation")
    assert validations[-1]["pair_accuracy"] == 1.0
    assert validations[-1]["loss"] < 0.2 < validations[0]["loss"]
    opened = open_reward_model(tmp_path / "run")
    responses = [[*row.prompt, *response] for row in method.train_rows for response in row.responses]
    scores = Normalization.read(opened.description)(raw_scores(opened.model, responses, torch.device("cpu")))
    assert float(scores.mean()) == pytest.approx(0.0, abs=1e-4)
    assert float(scores.std(correction=0)) == pytest.approx(1.0, abs=1e-4)
    told = events_of(tmp_path / "run", "preferences")[0]
    assert sum(bucket["pairs"] for bucket in told["by_margin"]) == len(method.validation_rows) == 8


def test_scores_are_normalized_over_the_requested_number_of_comparisons(tmp_path: Path, pico_folder: Path) -> None:
    config = reward_config(tmp_path / "run", pico_folder, training={"num_epochs": 1}, reward={"normalize_over": 3})
    method = trained(config)
    chosen = method._normalizing_rows()
    assert len(chosen) == 3 < len(method.train_rows)
    opened = open_reward_model(tmp_path / "run")
    responses = [[*row.prompt, *response] for row in chosen for response in row.responses]
    raw = raw_scores(opened.model, responses, torch.device("cpu"))
    assert opened.description["score_mean"] == pytest.approx([float(raw.mean())], abs=1e-4)
    assert opened.description["score_std"] == pytest.approx([float(raw.std(correction=0))], abs=1e-4)


@pytest.mark.parametrize("trainable", ["lora", "head"])
def test_only_adapters_or_the_head_train(trainable: str, tmp_path: Path, pico_folder: Path) -> None:
    method = trained(reward_config(tmp_path / "run", pico_folder, training={"trainable": trainable, "num_epochs": 1}))
    expected = {"lora": (".lora_", "head."), "head": ("head.",)}[trainable]
    assert method.trained.now
    assert all(any(part in name for part in expected) for name in method.trained.now)
    assert (open_reward_model(tmp_path / "run").adapter is not None) == (trainable == "lora")


def test_an_ensemble_has_heads_that_differ_and_a_spread_that_is_taken_off(tmp_path: Path, pico_folder: Path) -> None:
    trained(reward_config(tmp_path / "run", pico_folder, reward={"heads": 3}, training={"num_epochs": 1}))
    opened = open_reward_model(tmp_path / "run")
    normalise = Normalization.read(opened.description)
    assert len(normalise.mean) == 3
    raw = raw_scores(opened.model, [[5, 6, 7, 2], [8, 9, 2]], torch.device("cpu"))
    assert raw.shape == (2, 3)
    each = (raw - torch.tensor(normalise.mean)) / torch.tensor(normalise.std)
    torch.testing.assert_close(normalise(raw, ensemble_penalty=2.0), each.mean(1) - 2 * each.std(1, correction=0))
    assert float(each.std(1).min()) > 0


def test_soft_labels_margins_and_centring_change_the_loss_as_written(tmp_path: Path, pico_folder: Path) -> None:
    rows = [{**row, "p_human": 0.75} for row in comparisons(10)]
    losses = {}
    for name, reward in {
        "soft": {},
        "hard": {"soft_labels": False},
        "margins": {"soft_labels": False, "margins": True},
        "centred": {"soft_labels": False, "center_rewards": 0.1},
    }.items():
        training = {"max_steps": 1, "shuffle": False, "batch_size": 8}
        config = reward_config(tmp_path / name, pico_folder, rows=rows, reward=reward, training=training)
        method = RewardModelTrainer(config, progress=RunProgress(quiet=True))
        method.train()
        losses[name] = events_of(tmp_path / name, "step")[0]
    opened = AutoModel.from_pretrained(pico_folder)
    head = torch.empty(1, 32).normal_(0.0, 33**-0.5, generator=torch.Generator().manual_seed(5))
    gaps, sums = [], []
    for row in method.train_rows[:8]:
        scores = [
            float((head @ opened(input_ids=torch.tensor([[*row.prompt, *r]])).last_hidden_state[0, -1]).detach())
            for r in row.responses
        ]
        gaps.append(scores[0] - scores[1])
        sums.append((scores[0] + scores[1]) ** 2)
    gap = torch.tensor(gaps, dtype=torch.float64)
    margin = torch.tensor([row.pairs[0].margin for row in method.train_rows[:8]])
    hard = float(torch.log1p(torch.exp(-gap)).mean())
    soft = float((0.75 * torch.log1p(torch.exp(-gap)) + 0.25 * torch.log1p(torch.exp(gap))).mean())
    assert losses["hard"]["loss"] == pytest.approx(hard, abs=1e-5)
    assert losses["soft"]["loss"] == pytest.approx(soft, abs=1e-5)
    assert losses["margins"]["loss"] == pytest.approx(float(torch.log1p(torch.exp(margin - gap)).mean()), abs=1e-5)
    assert losses["centred"]["center_rewards"] == pytest.approx(sum(sums) / 8, abs=1e-5)
    assert float(margin.max()) > 0


def test_scores_that_are_no_numbers_end_in_one_line(
    tmp_path: Path, pico_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that are NaN, with on_nonfinite skip: no step is taken, and validation has nothing to measure."""
    built = RewardModelTrainer.build_model

    def spoiled(self: RewardModelTrainer) -> PooledModel:
        model = built(self)
        with torch.no_grad():
            model.head.weight.fill_(torch.nan)
        return model

    monkeypatch.setattr(RewardModelTrainer, "build_model", spoiled)
    for name, training in (("skip", {"on_nonfinite": "skip"}), ("stop", {})):
        with pytest.raises(UserError, match="scores of 16 of 16 responses are not finite numbers") as raised:
            trained(reward_config(tmp_path / name, pico_folder, training=training))
        assert raised.value.exit_code == 1
        assert "\n" not in str(raised.value)


def test_raw_scores_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(UserError, match="scores of 1 of 3 responses"):
        raw_scores(lambda ids, layout: torch.tensor([[1.0], [torch.inf], [2.0]]), [[1], [2], [3]], torch.device("cpu"))
