"""Preference optimization through its real entry point, on the pico model, beside plain padded computations."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pico_runs import slow_but
from preference_runs import comparisons, events_of, write_rows
from preference_runs import preference_config as config
from rich.console import Console
from transformers import AutoModelForCausalLM

import loopos
from loopos.config.diagnostics import ConfigError
from loopos.config.preference import PRESETS, PreferenceConfig
from loopos.functional.preference_losses import wpo_weights
from loopos.methods.preference import PreferenceTrainer
from loopos.training.distributed import World
from loopos.training.preference_objective import ranked
from loopos.training.progress import RunProgress


def trained(settings: PreferenceConfig) -> PreferenceTrainer:
    method = PreferenceTrainer(settings, progress=RunProgress(quiet=True))
    method.train()
    return method


def steps(run: Path) -> list[dict[str, Any]]:
    return events_of(run, "step")


@pytest.mark.parametrize("trainable", ["all", "lora"])
def test_the_first_loss_of_dpo_is_log_2_and_all_rewards_are_0(
    tmp_path: Path, pico_folder: Path, trainable: str
) -> None:
    training = {"trainable": trainable, "max_steps": 2, "shuffle": False}
    trained(config(tmp_path / "run", pico_folder, training=training))
    first, second = steps(tmp_path / "run")[:2]
    assert first["loss"] == pytest.approx(float(-torch.nn.functional.logsigmoid(torch.zeros(()))), abs=0)
    assert (first["rewards_chosen"], first["rewards_rejected"], first["reward_margin"], first["ties"]) == (0, 0, 0, 1)
    assert second["loss"] < math.log(2) or second["rewards_chosen"] != 0


def plain_logprobs(model: Any, prompt: Sequence[int], response: Sequence[int]) -> torch.Tensor:
    """Log-probabilities of a response's tokens, one sequence at a time."""
    ids = torch.tensor([[*prompt, *response]])
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(response)[:, None])[:, 0]


def _sigmoid(x: torch.Tensor) -> torch.Tensor:
    return 1 / (1 + torch.exp(-x))


def _log_sigmoid(x: torch.Tensor) -> torch.Tensor:
    return -torch.log1p(torch.exp(-x))


# Each from its paper, of sums (c, r), the reference's sums (rc, rr), token numbers (nc, nr) and beta, in fp64.
PAPERS: dict[str, Any] = {
    "dpo": lambda c, r, rc, rr, nc, nr, b: -_log_sigmoid(b * ((c - rc) - (r - rr))),
    "cdpo": lambda c, r, rc, rr, nc, nr, b: -0.8 * _log_sigmoid(b * ((c - rc) - (r - rr))) - 0.2 * _log_sigmoid(-b * ((c - rc) - (r - rr))),
    "robust_dpo": lambda c, r, rc, rr, nc, nr, b: -_log_sigmoid(b * ((c - rc) - (r - rr))),
    "ipo": lambda c, r, rc, rr, nc, nr, b: ((c - rc) / nc - (r - rr) / nr - 1 / (2 * b)) ** 2,
    "sigmoid_norm": lambda c, r, rc, rr, nc, nr, b: -_log_sigmoid(b * ((c - rc) / nc - (r - rr) / nr)),
    "slic": lambda c, r, rc, rr, nc, nr, b: torch.clamp(1 - b * ((c - rc) - (r - rr)), min=0),
    "simpo": lambda c, r, rc, rr, nc, nr, b: -_log_sigmoid(b * (c / nc - r / nr) - 0.5),
    "exo": lambda c, r, rc, rr, nc, nr, b: _kl2(b * ((c - rc) - (r - rr)), 1e-3),
    "nca": lambda c, r, rc, rr, nc, nr, b: -_log_sigmoid(b * (c - rc)) - (_log_sigmoid(-b * (c - rc)) + _log_sigmoid(-b * (r - rr))) / 2,
    "bco": lambda c, r, rc, rr, nc, nr, b: -_log_sigmoid(b * (c - rc)) - _log_sigmoid(-b * (r - rr)),
    "sppo": lambda c, r, rc, rr, nc, nr, b: ((c - rc) - 1 / (2 * b)) ** 2 + ((r - rr) + 1 / (2 * b)) ** 2,
    "apo_zero": lambda c, r, rc, rr, nc, nr, b: 1 - _sigmoid(b * (c - rc)) + _sigmoid(b * (r - rr)),
    "apo_down": lambda c, r, rc, rr, nc, nr, b: _sigmoid(b * (c - rc)) + 1 - _sigmoid(b * ((c - rc) - (r - rr))),
    "discopop": lambda c, r, rc, rr, nc, nr, b: _discopop(b * ((c - rc) - (r - rr))),
}  # fmt: skip


def _kl2(gap: torch.Tensor, epsilon: float) -> torch.Tensor:
    """KL of (σ(gap), σ(−gap)) to (1 − ε, ε)."""
    p = _sigmoid(gap)
    return p * torch.log(p / (1 - epsilon)) + (1 - p) * torch.log((1 - p) / epsilon)


def _discopop(gap: torch.Tensor) -> torch.Tensor:
    m = _sigmoid(gap / 0.05)
    return -(1 - m) * _log_sigmoid(gap) + m * torch.exp(-gap)


def _of_pairs(name: str, model: Any, reference: Any, rows: Sequence[Any], beta: float) -> torch.Tensor:
    """The mean loss of rows, one sequence at a time."""
    losses, log_odds, chosen_sum, chosen_tokens = [], [], [], 0
    for row in rows:
        both = [plain_logprobs(model, row.prompt, response).double() for response in row.responses]
        with torch.no_grad():
            start = [plain_logprobs(reference, row.prompt, response).double() for response in row.responses]
        (c, r), (rc, rr), (nc, nr) = [x.sum() for x in both], [x.sum() for x in start], [len(x) for x in both]
        chosen_sum.append(c)
        chosen_tokens += nc
        if name in PAPERS:
            losses.append(PAPERS[name](c, r, rc, rr, nc, nr, beta))
        elif name == "orpo":
            p, q = torch.exp(c / nc), torch.exp(r / nr)
            log_odds.append(-beta * _log_sigmoid(torch.log(p / (1 - p)) - torch.log(q / (1 - q))))
        elif name == "cpo":
            log_odds.append(-_log_sigmoid(beta * (c - r)))
        elif name == "mpo":
            log_odds.append(
                0.8 * PAPERS["dpo"](c, r, rc, rr, nc, nr, beta) + 0.2 * PAPERS["bco"](c, r, rc, rr, nc, nr, beta)
            )
    if losses:
        return torch.stack(losses).mean()
    return torch.stack(log_odds).mean() - torch.stack(chosen_sum).sum() / chosen_tokens


NOT_PRESETS = {"sigmoid_norm": {"loss": "sigmoid_norm"}, "cdpo": {"label_smoothing": 0.2}}


@pytest.mark.parametrize("name", [*sorted(set(PRESETS) - {"aot"}), *NOT_PRESETS])
def test_losses_and_gradients_equal_a_plain_computation(name: str, tmp_path: Path, pico_folder: Path) -> None:
    training = {"max_steps": 2, "learning_rate": 1e-3, "validate_every": "never"}
    if name in PRESETS:
        method = trained(config(tmp_path / "run", pico_folder, name, training=training))
    else:
        method = trained(config(tmp_path / "run", pico_folder, "dpo", training=training, preference=NOT_PRESETS[name]))
    rows = method.train_rows[:6]
    batch = method.rows(method.train_rows)([0, 1, 2, 3, 4, 5])
    parameters = dict(method.model.named_parameters())
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    sums, counts, weights = method.objective.loss(batch), method.objective.counts(batch), method.objective.weights
    loss = sum(weights[part] * sums[part] / counts[part] for part in weights)
    embedding = next(value for part, value in parameters.items() if "embed_tokens" in part)
    own = torch.autograd.grad(loss, embedding)[0]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", dtype=torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(pico_folder, dtype=torch.float32)
    plain = _of_pairs(name, model, reference, rows, method.config.beta)
    theirs = torch.autograd.grad(plain, model.get_input_embeddings().weight)[0]
    assert loss.item() == pytest.approx(plain.item(), abs=2e-5, rel=1e-5)
    scale = float(theirs.abs().max())
    assert scale > 0
    torch.testing.assert_close(own, theirs, atol=1e-4 * scale, rtol=1e-3)


def test_aot_compares_ranks_over_the_whole_step(tmp_path: Path, pico_folder: Path) -> None:
    """The k-th largest difference of the policy meets the k-th largest of the reference, in any micro-batches."""
    found = []
    for size, accumulation in ((8, 1), (2, 4)):
        training = {"max_steps": 3, "batch_size": size, "gradient_accumulation": accumulation, "learning_rate": 1e-3}
        method = trained(config(tmp_path / f"run{size}", pico_folder, "aot", training={**training, "shuffle": False}))
        found.append([step["loss"] for step in steps(tmp_path / f"run{size}")])
    assert found[0] == pytest.approx(found[1], abs=1e-5)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run2" / "model", dtype=torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(pico_folder, dtype=torch.float32)
    rows = method.train_rows[:8]
    with torch.no_grad():
        own, start = (
            torch.stack([plain_logprobs(each, r.prompt, r.responses[0]).sum() - plain_logprobs(each, r.prompt, r.responses[1]).sum() for r in rows])
            for each in (model, reference)
        )  # fmt: skip
    expected = -_log_sigmoid(0.1 * (own.sort().values - start.sort().values)).mean()
    batches = [method.rows(method.train_rows)(part) for part in ([0, 1, 2], [3, 4, 5, 6], [7])]
    with torch.no_grad():
        loss = sum(method.objective.loss(each)["loss"] for each in ranked(batches, method.objective, World())) / 8
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)


def _of_turns(number: int) -> list[dict[str, Any]]:
    """Comparisons whose responses go on after the answer: the user thanks, and the assistant speaks again."""
    found = []
    for row in comparisons(number):
        asked, thanks = {"role": "user", "content": row["prompt"]}, {"role": "user", "content": "thank you"}
        last = {"role": "assistant", "content": "we love to change it"}
        sides = {side: {"role": "assistant", "content": row[side]} for side in ("chosen", "rejected")}
        found.append({"chosen": [asked, sides["chosen"], thanks, last], "rejected": [asked, sides["rejected"]]})
    return found


@pytest.mark.parametrize("name", slow_but("ipo", ["dpo", "ipo", "simpo"]))
def test_only_the_assistants_tokens_count_after_the_split(name: str, tmp_path: Path, pico_folder: Path) -> None:
    training = {"max_steps": 2, "learning_rate": 1e-3}
    method = trained(config(tmp_path / "run", pico_folder, name, rows=_of_turns(20), training=training))
    rows = method.train_rows[:4]
    batch = method.rows(method.train_rows)([0, 1, 2, 3])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", dtype=torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(pico_folder, dtype=torch.float32)
    losses = []
    for row in rows:
        assert row.masks is not None
        assert [sum(mask) < len(mask) for mask in row.masks] == [True, False]
        own, start = (
            [plain_logprobs(each, row.prompt, response)[torch.tensor(mask)] for response, mask in zip(row.responses, row.masks, strict=True)]
            for each in (model, reference)
        )  # fmt: skip
        sums = [x.double().sum() for x in (*own, *start)]
        losses.append(PAPERS[name](*sums, *(len(x) for x in own), PRESETS[name].beta))
    with torch.no_grad():
        loss = method.objective.loss(batch)["loss"] / len(rows)
    assert loss.item() == pytest.approx(torch.stack(losses).mean().item(), abs=2e-5, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "trainable"),
    slow_but(("mpo", "all"), [("dpo", "all"), ("dpo", "lora"), ("mpo", "all"), ("simpo", "all")]),
)
def test_micro_batches_change_nothing(name: str, trainable: str, tmp_path: Path, pico_folder: Path) -> None:
    found = []
    for size, accumulation in ((8, 1), (2, 4)):
        training = {"max_steps": 4, "batch_size": size, "gradient_accumulation": accumulation, "trainable": trainable}
        run = tmp_path / f"run{size}"
        trained(config(run, pico_folder, name, training={**training, "learning_rate": 1e-3}))
        found.append(
            [(step.get("loss", step.get("sft")), step["gradient_norm"], step["reward_margin"]) for step in steps(run)]
        )
    for one, other in zip(*found, strict=True):
        assert one == pytest.approx(other, abs=2e-5, rel=2e-4)


def test_it_learns_what_is_preferred_and_validates(tmp_path: Path, pico_folder: Path) -> None:
    trained(config(tmp_path / "run", pico_folder, "dpo", training={"learning_rate": 3e-3}))
    first, *_, last = events_of(tmp_path / "run", "validation")
    assert (first["loss"], first["accuracy"], first["ties"]) == (pytest.approx(math.log(2), abs=1e-6), 0.5, 1.0)
    assert last["accuracy"] > 0.9
    assert last["reward_margin"] > 0.5


def test_the_cache_of_the_reference_is_read_again(tmp_path: Path, pico_folder: Path) -> None:
    shared = {"reference_cache": str(tmp_path / "reference")}
    one = config(tmp_path / "one", pico_folder, preference=shared, training={"max_steps": 3})
    trained(one)
    files = {file.name: file.read_bytes() for file in (tmp_path / "reference").iterdir()}
    assert len(files) == 2, "one of the training rows, one of the validation rows"
    said = _lines(config(tmp_path / "two", pico_folder, preference=shared, training={"max_steps": 3}))
    assert sum("read from" in line for line in said) == 2
    assert {file.name: file.read_bytes() for file in (tmp_path / "reference").iterdir()} == files
    assert [s["loss"] for s in steps(tmp_path / "one")] == [s["loss"] for s in steps(tmp_path / "two")]


def _lines(settings: PreferenceConfig) -> list[str]:
    stream = io.StringIO()
    PreferenceTrainer(settings, progress=RunProgress(console=Console(file=stream, width=300))).train()
    return stream.getvalue().splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("trainable", ["all", "lora"])
def test_the_reference_of_an_adapter_is_the_base_with_it(trainable: str, tmp_path: Path, pico_folder: Path) -> None:
    """From a folder of adapters: rewards are 0 in the first step, and the run equals one from the merged weights."""
    trained(config(tmp_path / "first", pico_folder, training={"trainable": "lora", "max_steps": 6}))
    found = {}
    for name in ("adapter", "model"):
        run = tmp_path / f"from_{name}"
        training = {"max_steps": 4, "trainable": trainable, "learning_rate": 1e-3}
        trained(config(run, tmp_path / "first" / name, training=training))
        found[name] = [(step["loss"], step["reward_margin"], step["logprob_chosen"]) for step in steps(run)]
    assert found["adapter"][0][:2] == (pytest.approx(math.log(2), abs=1e-7), 0)
    trained(config(tmp_path / "plain", pico_folder, training={"max_steps": 1}))
    assert steps(tmp_path / "plain")[0]["logprob_chosen"] != pytest.approx(found["adapter"][0][2], abs=0.5)
    for one, other in zip(found["adapter"], found["model"], strict=True):
        assert one == pytest.approx(other, abs=1e-4)


@pytest.mark.parametrize(
    ("method", "preference", "message"),
    [
        ("dpo", {"loss": "sigmod"}, 'preference.loss: got "sigmod"; expected "sigmoid", '),
        ("dpo", {"loss": {"sigmoid": 1.0, "mse": 1.0}}, 'preference.loss: got "mse", a loss of fine_tuning'),
        ("kto", {"loss": "sigmoid"}, "KTO is one loss"),
        ("dpo", {"reference": "adapter"}, 'preference.reference: got "adapter" with trainable all'),
        ("dpo", {"beta": 0}, "preference.beta: got 0"),
        ("aot", {"wpo": True}, 'preference.wpo: got true with the loss "aot"; expected false'),
    ],
)
def test_mistakes_name_their_key(method: str, preference: dict[str, Any], message: str, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n', encoding="utf-8")
    written = {
        "computation": {"mode": "posttraining", "method": method},
        "training": {"learning_rate": 1e-4},
        "preference": preference,
        "data": {
            "pretrained_weights": "smollm2-135m",
            "preference_data": str(rows),
            "output_dir": str(tmp_path / "out"),
        },
    }
    with pytest.raises(ConfigError) as problem:
        loopos.read_config(written)
    assert message in str(problem.value)


def test_keys_that_the_loss_does_not_read_are_named(tmp_path: Path, pico_folder: Path) -> None:
    def notes(method: str, **preference: Any) -> str:
        return "\n".join(config(tmp_path / "run", pico_folder, method, preference=preference).notes())

    assert "preference.divergence has no effect: nca does not read it" in notes("nca", divergence="forward_kl")
    assert "preference.simpo_margin has no effect: sigmoid does not read it" in notes("dpo", simpo_margin=1.0)
    assert "preference.label_smoothing has no effect: KTO" in notes("kto", label_smoothing=0.1)
    assert "preference.reference has no effect: simpo has no reference" in notes("simpo", reference="cached")
    assert "preference.wpo has no effect: KTO does not read it" in notes("kto", wpo=True)
    assert "preference" not in notes("dpo", label_smoothing=0.1, divergence="alpha", divergence_alpha=0.3)


def test_the_likelihood_counts_every_token_of_the_chosen_response(tmp_path: Path, pico_folder: Path) -> None:
    """length_alpha weighs the tokens of pairs only."""
    found = []
    for alpha in (1.0, 0.2):
        section = {"loss": {"sigmoid": 1.0, "sft": 1.0}, "length_alpha": alpha}
        run = tmp_path / f"run{alpha}"
        trained(config(run, pico_folder, "dpo", preference=section, training={"max_steps": 1}))
        found.append(steps(run)[0]["sft"])
    assert found[0] == found[1]


def test_wpo_weighs_each_pair_by_how_likely_the_policy_writes_it(tmp_path: Path, pico_folder: Path) -> None:
    """In the first step every pair costs log 2, so the loss is log 2 times the mean weight."""
    training = {"max_steps": 3, "batch_size": 8, "shuffle": False, "learning_rate": 1e-3}
    method = trained(config(tmp_path / "run", pico_folder, preference={"wpo": True}, training=training))
    first = steps(tmp_path / "run")[0]
    model = AutoModelForCausalLM.from_pretrained(pico_folder, dtype=torch.float32)
    weights = []
    for row in method.train_rows[:8]:
        weight = 1.0
        for response in row.responses:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([[*row.prompt, *response]])).logits[0, len(row.prompt) - 1 : -1]
            p = torch.softmax(logits.double(), -1)
            own = p.gather(1, torch.tensor(response)[:, None])[:, 0]
            weight *= float((own / p.square().sum(-1)).log().mean().exp())
        weights.append(weight)
    assert len(set(weights)) > 1
    assert first["wpo_weight"] == pytest.approx(sum(weights) / 8, rel=1e-4)
    assert first["loss"] == pytest.approx(math.log(2) * sum(weights) / 8, rel=1e-4)
    trained(config(tmp_path / "plain", pico_folder, training=training))
    plain = steps(tmp_path / "plain")
    assert "wpo_weight" not in plain[0]
    # Adam hides a factor of all gradients, but not one of each pair.
    assert plain[2]["logprob_chosen"] != steps(tmp_path / "run")[2]["logprob_chosen"]


def test_weights_of_wpo_are_worked_by_hand() -> None:
    """A token as likely as two draws agree weighs 1; two tokens of 2 and 1/8 times that weigh √(2/8) = 1/2."""
    collisions = torch.tensor([0.5, 0.25, 0.25]).log()
    logprobs = torch.tensor([0.5, 0.5, 0.03125]).log().requires_grad_()
    found = wpo_weights(logprobs, collisions, torch.tensor([0, 1, 1]), torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(found, torch.tensor([1.0, 0.5]))
    assert not found.requires_grad


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dpo", "mpo", "simpo"])
def test_wpo_is_the_same_in_micro_batches(name: str, tmp_path: Path, pico_folder: Path) -> None:
    found = []
    for size, accumulation in ((8, 1), (2, 4)):
        training = {"max_steps": 3, "batch_size": size, "gradient_accumulation": accumulation, "learning_rate": 1e-3}
        run = tmp_path / f"run{size}"
        trained(config(run, pico_folder, name, training=training, preference={"wpo": True}))
        found.append([(step["wpo_weight"], step["gradient_norm"], step["reward_margin"]) for step in steps(run)])
    for one, other in zip(*found, strict=True):
        assert one == pytest.approx(other, abs=2e-5, rel=2e-4)


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_metrics_of_the_user_are_refused(method: str, tmp_path: Path, pico_folder: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", comparisons(8))
    written = {
        "computation": {"mode": "posttraining", "method": method},
        "training": {"learning_rate": 1e-4},
        "data": {
            "pretrained_weights": str(pico_folder),
            "preference_data": str(file),
            "output_dir": str(tmp_path / "out"),
        },
    }
    with pytest.raises(loopos.UserError, match=f"metrics: got functions; expected none with {method}"):
        loopos.train(written, metrics={"gap": lambda predictions, targets: 0.0}, quiet=True)
