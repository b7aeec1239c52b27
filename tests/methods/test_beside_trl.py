"""Losses and gradients of preference optimization beside TRL's trainers, on the same rows and weights, in fp32.

Slow, and only where TRL is installed. ORPO's and CPO's likelihood term is the mean over the tokens of the chosen
responses here and over prompts too in TRL's ORPO, so that their preference terms are compared apart from it.
"""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from preference_runs import comparisons, thumbs
from preference_runs import preference_config as config
from test_preference import plain_logprobs
from transformers import AutoModelForCausalLM, AutoTokenizer

from loopos.config.registry import loaded
from loopos.config.variants import LOSSES
from loopos.data.answer_batches import AnswerRows
from loopos.data.response_batches import PreferenceBatch
from loopos.methods.kto import KtoTrainer
from loopos.methods.preference import PreferenceTrainer
from loopos.training.distributed import World
from loopos.training.preference_objective import ranked
from loopos.training.progress import RunProgress

pytest.importorskip("trl")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

# Ours → theirs, and the label smoothing.
DPO = {
    "dpo": ("sigmoid", 0.0), "ipo": ("ipo", 0.0), "slic": ("hinge", 0.0), "exo": ("exo_pair", 0.1),
    "nca": ("nca_pair", 0.0), "bco": ("bco_pair", 0.0), "sppo": ("sppo_hard", 0.0), "apo_zero": ("apo_zero", 0.0),
    "apo_down": ("apo_down", 0.0), "discopop": ("discopop", 0.0), "robust_dpo": ("robust", 0.1), "aot": ("aot", 0.1),
}  # fmt: skip
DIVERGENCES = {"forward_kl": "forward_kl", "jensen_shannon": "js_divergence", "alpha": "alpha_divergence"}
NUMBER = 8


def started(run: Path, weights: Path, name: str, **preference: Any) -> PreferenceTrainer:
    """A run of two steps, after which the policy is no longer the reference."""
    settings = config(
        run, weights, name, training={"max_steps": 2, "learning_rate": 1e-3},
        data={"chat_template": "none", "validation_share": 0.0}, preference=preference,
    )  # fmt: skip
    method = PreferenceTrainer(settings, progress=RunProgress(quiet=True))
    method.train()
    for parameter in method.model.parameters():
        parameter.requires_grad_(True)
    return method


def theirs(run: Path, weights: Path, **arguments: Any) -> tuple[Any, Any, dict[str, Any]]:
    """TRL's trainer on the weights of `run`, its model, and its batch of the first rows."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    policy, reference = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in (run / "model", weights))
    rows = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in comparisons(40)[:NUMBER]]
    settings = DPOConfig(
        output_dir=str(run / "trl"), per_device_train_batch_size=NUMBER, beta=0.1, report_to=[], use_cpu=True,
        bf16=False, max_length=None, disable_tqdm=True, **arguments,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(weights)
    trainer = DPOTrainer(policy, reference, settings, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    policy.eval()
    return trainer, policy, next(iter(trainer.get_train_dataloader()))


def same_rows(method: PreferenceTrainer, batch: dict[str, Any]) -> PreferenceBatch:
    """Our batch of the rows of TRL's, in its order: its first half is the chosen responses."""
    known = {(*row.prompt, *row.responses[0]): index for index, row in enumerate(method.train_rows)}
    chosen = zip(batch["input_ids"][:NUMBER], batch["attention_mask"][:NUMBER], strict=True)
    return method.rows(method.train_rows)([known[tuple(ids[mask.bool()].tolist())] for ids, mask in chosen])


def report(loss: float, theirs: float, largest: float) -> None:
    """A row of the table of all losses: `pytest -m slow -s` shows it."""
    name = os.environ["PYTEST_CURRENT_TEST"].partition("::")[2].removesuffix(" (call)").removeprefix("test_")
    print(f"\n| {name} | {loss:.6f} | {theirs:.6f} | {abs(loss - theirs) / abs(theirs):.0e} | {largest:.1e} |")


def compare(method: PreferenceTrainer, trainer: Any, policy: Any, batch: dict[str, Any]) -> None:
    own = same_rows(method, batch)
    if method.objective.needs_ranks:
        own = ranked([own], method.objective, World())[0]
    sums, counts, weights = method.objective.loss(own), method.objective.counts(own), method.objective.weights
    loss = sum(weights[part] * sums[part] / counts[part] for part in weights)
    embedding = next(value for name, value in method.model.named_parameters() if "embed_tokens" in name)
    gradient = torch.autograd.grad(loss, embedding)[0]
    their_loss = trainer.compute_loss(policy, batch)
    their_loss.backward()
    their_gradient = policy.get_input_embeddings().weight.grad
    scale = float(their_gradient.abs().max())
    largest = float((gradient - their_gradient).abs().max()) / scale
    report(loss.item(), their_loss.item(), largest)
    assert loss.item() == pytest.approx(their_loss.item(), rel=1e-5)
    assert scale > 0
    # fp32 rounding differs by processor.
    assert largest < 3e-5


def test_the_loss_normalized_by_length(tmp_path: Path, pico_folder: Path) -> None:
    method = started(tmp_path / "run", pico_folder, "dpo", loss="sigmoid_norm")
    compare(method, *theirs(tmp_path / "run", pico_folder, loss_type=["sigmoid_norm"]))


@pytest.mark.parametrize("name", sorted(DPO))
def test_losses_of_dpo_s_family(name: str, tmp_path: Path, pico_folder: Path) -> None:
    loss_type, smoothing = DPO[name]
    method = started(tmp_path / "run", pico_folder, name, label_smoothing=smoothing)
    compare(method, *theirs(tmp_path / "run", pico_folder, loss_type=[loss_type], label_smoothing=smoothing))


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_divergences(name: str, tmp_path: Path, pico_folder: Path) -> None:
    """TRL's α counts the other way round: theirs is 1 − ours."""
    method = started(tmp_path / "run", pico_folder, "dpo", divergence=name, divergence_alpha=0.4)
    arguments = {"f_divergence_type": DIVERGENCES[name], "f_alpha_divergence_coef": 0.6}
    compare(method, *theirs(tmp_path / "run", pico_folder, **arguments))


def test_a_mix_of_losses(tmp_path: Path, pico_folder: Path) -> None:
    method = started(tmp_path / "run", pico_folder, "mpo")
    arguments = {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}
    compare(method, *theirs(tmp_path / "run", pico_folder, **arguments))


def test_length_desensitization(tmp_path: Path, pico_folder: Path) -> None:
    method = started(tmp_path / "run", pico_folder, "dpo", length_alpha=0.3)
    compare(method, *theirs(tmp_path / "run", pico_folder, ld_alpha=0.3))


@pytest.mark.parametrize("name", ["dpo", "ipo", "apo_zero", "nca"])
def test_weights_of_wpo(name: str, tmp_path: Path, pico_folder: Path) -> None:
    method = started(tmp_path / "run", pico_folder, name, wpo=True)
    compare(method, *theirs(tmp_path / "run", pico_folder, loss_type=[DPO[name][0]], use_weighting=True))


@pytest.mark.parametrize("name", ["simpo", "cpo", "orpo"])
def test_losses_without_a_reference(name: str, tmp_path: Path, pico_folder: Path) -> None:
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    method = started(tmp_path / "run", pico_folder, name)
    batch = method.rows(method.train_rows)(list(range(NUMBER)))
    with torch.no_grad():
        pairs = method.objective.score(batch)
        own = loaded(LOSSES[name].function)(pairs, method.objective.settings)
    trainer: Any = object.__new__(ORPOTrainer if name == "orpo" else CPOTrainer)
    trainer.accelerator = type("A", (), {"device": "cpu"})
    trainer.beta, trainer.label_smoothing, trainer.alpha = method.config.beta, 0.0, 0.0
    trainer.loss_type, trainer.simpo_gamma = "simpo" if name == "simpo" else "sigmoid", 0.5
    means = pairs.chosen / pairs.chosen_tokens, pairs.rejected / pairs.rejected_tokens
    if name == "orpo":
        expected = -trainer.odds_ratio_loss(*means)[0]
    else:
        expected = trainer.cpo_loss(*(means if name == "simpo" else (pairs.chosen, pairs.rejected)))[0]
    report(float(own.mean()), float(expected.mean()), math.nan)
    torch.testing.assert_close(own, expected, rtol=1e-6, atol=1e-6)


def test_kto(tmp_path: Path, pico_folder: Path) -> None:
    """With the mismatched answers that TRL chose."""
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    section = {"desirable_weight": 1.5, "undesirable_weight": 0.7}
    data = {"chat_template": "none", "validation_share": 0.0}
    settings = config(
        tmp_path / "run", pico_folder, "kto", rows=thumbs(NUMBER), preference=section, data=data,
        training={"max_steps": 2, "learning_rate": 1e-3, "batch_size": NUMBER},
    )  # fmt: skip
    method = KtoTrainer(settings, progress=RunProgress(quiet=True))
    method.train()
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", dtype=torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(pico_folder, dtype=torch.float32)
    arguments = KTOConfig(
        output_dir=str(tmp_path / "trl"), per_device_train_batch_size=NUMBER, beta=0.1, report_to=[], use_cpu=True,
        bf16=False, max_length=None, disable_tqdm=True, **section,
    )  # fmt: skip
    trainer = KTOTrainer(
        policy, reference, arguments, train_dataset=Dataset.from_list(thumbs(NUMBER)),
        processing_class=AutoTokenizer.from_pretrained(pico_folder),
    )  # fmt: skip
    policy.eval()
    batch = next(iter(trainer.get_train_dataloader()))
    their_loss = trainer.compute_loss(policy, batch)
    their_loss.backward()
    mismatched = [
        ids[mask.bool()].tolist() for ids, mask in zip(batch["KL_input_ids"], batch["KL_completion_mask"], strict=True)
    ]
    prompts = [
        ids[(mask.bool() & ~completion.bool())].tolist()
        for ids, mask, completion in zip(
            batch["input_ids"], batch["attention_mask"], batch["completion_mask"], strict=True
        )
    ]
    responses = [
        ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["completion_mask"], strict=True)
    ]
    known = {(tuple(row.prompt), tuple(row.response)): row for row in method.train_answers}
    rows = [
        replace(known[tuple(prompt), tuple(response)], mismatched=other)
        for prompt, response, other in zip(prompts, responses, mismatched, strict=True)
    ]
    with torch.no_grad():
        starts = [
            [
                plain_logprobs(reference, row.prompt, ids)
                for row in rows
                for ids in ([row.response] if own else [row.mismatched])
            ]
            for own in (True, False)
        ]
    own, others = (AnswerRows(rows, torch.device("cpu"), bool(kind), starts[kind]) for kind in (0, 1))
    baseline = max(0.0, float(method.objective.ratios(others(range(NUMBER))).mean()))
    for parameter in method.model.parameters():
        parameter.requires_grad_(True)
    loss = method.objective.loss(replace(own(range(NUMBER)), baseline=baseline))["loss"] / NUMBER
    embedding = next(value for name, value in method.model.named_parameters() if "embed_tokens" in name)
    gradient, their_gradient = torch.autograd.grad(loss, embedding)[0], policy.get_input_embeddings().weight.grad
    largest = float((gradient - their_gradient).abs().max() / their_gradient.abs().max())
    report(loss.item(), their_loss.item(), largest)
    assert baseline > 0
    assert loss.item() == pytest.approx(their_loss.item(), rel=1e-5)
    # fp32 rounding differs by processor.
    assert largest < 3e-5
