"""What LoopOS does with one family of causal language models, through the same entry points that users take.

Each check returns what was found: "right", "right (padded: why)", "refused: the sentence", or raises: a wrong number is
an `AssertionError`, and anything but a `UserError` is a traceback that a user would see.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, PreTrainedModel

from loopos.config.chain_of_thought import ChainOfThoughtConfig
from loopos.config.diagnostics import UserError
from loopos.config.fine_tuning import FineTuningConfig
from loopos.config.merge import MergeConfig
from loopos.config.reward_model import RewardModelConfig
from loopos.evaluation.predictor import Predictor
from loopos.exporting.export import export
from loopos.exporting.settings import ExportSettings
from loopos.functional.packing import PackedLayout
from loopos.generation.engine import Engine
from loopos.generation.settings import SamplingParams
from loopos.merging.merge import merge
from loopos.methods.chain_of_thought import ChainOfThought
from loopos.methods.fine_tuning import FineTuner
from loopos.methods.reward_model import RewardModelTrainer
from loopos.models.folders import open_language_model
from loopos.models.language_model import LanguageModel
from loopos.models.load import load_pretrained

LENGTHS = (9, 4, 12)
CHECKS = ("loss", "full", "lora", "generate", "classify", "score", "export", "gguf", "merge")


class FamilyRun:
    """The folder of one pico model, and the result of each check."""

    def __init__(self, model: PreTrainedModel, tokenizer: Path, folder: Path) -> None:
        self.model, self.folder, self.base = model, folder, folder / "base"
        model.save_pretrained(self.base)
        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(self.base)
        # Some families open it by a class of their own, which adds tokens: what is saved holds them.
        self.tokenizer = AutoTokenizer.from_pretrained(self.base)
        self.tokenizer.save_pretrained(self.base)

    def results(self, checks: tuple[str, ...] = CHECKS) -> dict[str, str]:
        """The results of all checks; a failed one does not stop the others."""
        found = {}
        for name in checks:
            check: Callable[[], str] = getattr(self, name)
            try:
                found[name] = check()
            except UserError as refusal:
                sentence = str(refusal)
                assert sentence.count("\n") < 12, sentence
                found[name] = "refused: " + sentence.splitlines()[0].replace(str(self.folder), "FOLDER")
        return found

    def loss(self) -> str:
        """The loss and gradient of a packed row, compared with separate sequences in transformers."""
        causal = load_pretrained(str(self.base), causal=True).model.eval()
        model = LanguageModel(causal)
        ids = torch.randint(3, 400, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))
        packed = model(ids, PackedLayout(LENGTHS, ids.device))
        packed.backward()  # type: ignore[no-untyped-call]
        gradient = _gradient(causal)
        causal.zero_grad()
        plain = self._plain_loss(causal, ids)
        plain.backward()  # type: ignore[no-untyped-call]
        torch.testing.assert_close(packed, plain, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradient, _gradient(causal), rtol=2e-3, atol=2e-4)
        backbone = model.backbone
        return "right" if backbone.path == "packed" else f"right (padded: {backbone.reason})"

    @staticmethod
    def _plain_loss(causal: PreTrainedModel, ids: Tensor) -> Tensor:
        """With transformers' own attention, which the packed path has replaced in this model."""
        causal.set_attn_implementation("eager")
        losses = []
        for row in ids.split(LENGTHS):
            logits = causal(input_ids=row[None], use_cache=False).logits[0]
            losses.append(cross_entropy(logits[:-1].float(), row[1:], reduction="sum"))
        return torch.stack(losses).sum()

    def full(self) -> str:
        return self._language_run("full", {})

    def lora(self) -> str:
        return self._language_run("lora", {"trainable": "lora", "lora": {"rank": 2}})

    def _language_run(self, name: str, training: dict[str, object]) -> str:
        rows = [{"prompt": f"what is {i}?", "completion": f"it is {i * i}"} for i in range(8)]
        config = {
            "computation": {"mode": "posttraining", "method": "chain_of_thought"},
            "training": {**_TRAINING, **training},
            "data": {**self._data(name), "reasoning_examples": self._rows(name, rows), "validation_share": 0.0},
        }
        ChainOfThought(ChainOfThoughtConfig.model_validate(config)).train()
        opened = open_language_model(str(self.folder / name))
        assert all(bool(parameter.isfinite().all()) for parameter in opened.model.parameters())
        return "right"

    def generate(self) -> str:
        """Greedy tokens of batched rows, compared with separate prompts in transformers."""
        model = load_pretrained(str(self.base), causal=True).model.eval()
        prompts = [[5, 9, 33, 61], [7], [20, 21, 22, 23, 24, 25, 26]]
        expected = [_greedy(self.model, prompt) for prompt in prompts]
        engine = Engine(model, self.tokenizer)
        settings = SamplingParams(temperature=0.0, max_new_tokens=8)
        found = [completion.token_ids for completion in engine.generate(prompts, settings)]
        assert found == expected, (found, expected)
        return "right" if engine.path == "cached" else f"right (no cache: {engine.summary})"

    def classify(self) -> str:
        rows = [{"text": f"{'good' if i % 2 else 'bad'} film {i}", "label": i % 2} for i in range(12)]
        config = {
            "model": {"num_classes": 2},
            "computation": {"mode": "posttraining", "method": "fine_tuning"},
            "training": _TRAINING,
            "data": {**self._data("classify"), "training_data": self._rows("classify", rows)},
        }
        FineTuner(FineTuningConfig.model_validate(config)).train()
        [answer] = Predictor.open(self.folder / "classify").predict(["good film"])
        assert set(answer["probabilities"]) == {"0", "1"}
        return "right"

    def score(self) -> str:
        rows = [{"prompt": f"how is {i}?", "chosen": f"fine {i}", "rejected": f"bad, {i}"} for i in range(8)]
        config = {
            "computation": {"mode": "posttraining", "method": "reward_model"},
            "training": _TRAINING,
            "data": {**self._data("score"), "preference_data": self._rows("score", rows)},
        }
        RewardModelTrainer(RewardModelConfig.model_validate(config)).train()
        return "right"

    def export(self) -> str:
        """The trained model's weights, opened again by transformers and compared by `export` itself."""
        exported = export(
            str(self._trained()), self.folder / "export", ExportSettings(format="huggingface", type="f32")
        )
        assert exported.check is not None
        return "right"

    def gguf(self) -> str:
        """The weights as a file for llama.cpp."""
        export(str(self.base), self.folder / "gguf", ExportSettings(format="gguf", type="f32"))
        return "right"

    def merge(self) -> str:
        """The middle of the base and the trained model."""
        recipe = {
            "method": "linear",
            "models": [
                {"model": str(self.base), "weight": 0.5},
                {"model": str(self._trained() / "model"), "weight": 0.5},
            ],
            "output_dir": str(self.folder / "merge"),
        }
        merge(MergeConfig.model_validate(recipe))
        merged = load_pretrained(str(self.folder / "merge"), causal=True).model.state_dict()
        base = load_pretrained(str(self.base), causal=True).model.state_dict()
        trained = load_pretrained(str(self._trained() / "model"), causal=True).model.state_dict()
        for name, tensor in merged.items():
            if tensor.is_floating_point():
                torch.testing.assert_close(tensor, (base[name] + trained[name]) / 2, rtol=1e-4, atol=1e-5)
        return "right"

    def _trained(self) -> Path:
        run = self.folder / "full"
        if not (run / "model").is_dir():
            raise UserError("not trained, so there is nothing to take further")
        return run

    def _data(self, name: str) -> dict[str, object]:
        return {"pretrained_weights": str(self.base), "output_dir": str(self.folder / name)}

    def _rows(self, name: str, rows: list[dict[str, object]]) -> str:
        file = self.folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(file)


_TRAINING: dict[str, object] = {
    "learning_rate": 1e-3,
    "optimizer": "adamw",
    "batch_size": 4,
    "max_steps": 2,
    "precision": "fp32",
}


def _gradient(model: PreTrainedModel) -> Tensor:
    embeddings = model.get_input_embeddings().weight  # type: ignore[no-untyped-call]
    return embeddings.grad.clone()


@torch.no_grad()
def _greedy(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    """Eight tokens, each the likeliest of a whole pass over all before it; ends behind an end token."""
    tokens = list(prompt)
    for _ in range(8):
        tokens.append(int(model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
        if tokens[-1] == 2:
            break
    return tokens[len(prompt) :]
