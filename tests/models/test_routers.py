"""The routers of a mixture of experts: auxiliary loss and load, and what a run trains and logs of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from causal_families import pico_causal
from transformers import AutoTokenizer
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from loopos.config.chain_of_thought import ChainOfThoughtConfig
from loopos.config.diagnostics import UserError
from loopos.functional.packing import PackedLayout
from loopos.methods.chain_of_thought import ChainOfThought
from loopos.models.backbone import Backbone, headless
from loopos.storage.events import read


@pytest.mark.parametrize("attention", ["packed", "padded"])
def test_the_auxiliary_loss_is_transformers_own(attention: str) -> None:
    lengths = (7, 3, 5)
    ids = torch.randint(3, 400, (sum(lengths),), generator=torch.Generator().manual_seed(2))
    causal = pico_causal("mixtral")
    outputs = [causal(input_ids=row[None], output_router_logits=True).router_logits for row in ids.split(lengths)]
    logits = tuple(torch.cat(layer) for layer in zip(*outputs, strict=True))
    expected = load_balancing_loss_func(logits, num_experts=4, top_k=2)
    backbone = Backbone(headless(causal), attention=attention)
    assert backbone.routers is not None
    layout = PackedLayout(lengths, ids.device)
    backbone(ids, layout)
    found = backbone.routers.take(layout)
    torch.testing.assert_close(found.auxiliary_loss, expected)
    # Each layer's busiest expert: the share of the tokens that it is among the two chosen of, over an even half.
    counts = [torch.stack([(layer.topk(2).indices == expert).any(-1).sum() for expert in range(4)]) for layer in logits]
    torch.testing.assert_close(found.load, sum(count.max() / sum(lengths) / 0.5 for count in counts) / len(counts))


def test_a_run_trains_the_loss_and_logs_the_load(tmp_path: Path, pico_tokenizer: Path) -> None:
    """Only the router's auxiliary loss differs between the runs; a large weight spreads the tokens more evenly."""
    pico_causal("mixtral").save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(pico_tokenizer).save_pretrained(tmp_path / "base")
    rows = [{"prompt": f"what is {i}?", "completion": f"it is {i * i}"} for i in range(16)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    steps: dict[float, list[dict[str, Any]]] = {}
    for weight in (0.0, 5.0):
        config = config_of(tmp_path, f"run-{weight}", weight)
        ChainOfThought(config).train()
        events = read(tmp_path / f"run-{weight}" / "events.jsonl")
        steps[weight] = [event["metrics"] for event in events if event["event"] == "step"]
    without, evened = steps[0.0], steps[5.0]
    assert without[0]["router_aux_loss"] == evened[0]["router_aux_loss"] >= 2.0
    assert evened[-1]["router_aux_loss"] < without[-1]["router_aux_loss"]
    assert all(1.0 <= step["expert_load"] <= 2.0 for step in (*without, *evened))


def test_a_model_without_routers_refuses_the_loss(tmp_path: Path, pico_folder: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "what?", "completion": "this"}\n' * 4)
    config = config_of(tmp_path, "run", 0.1, base=pico_folder)
    with pytest.raises(UserError, match=r"training\.router_aux_loss: got 0\.1, but LlamaModel has no routers"):
        ChainOfThought(config).train()


def config_of(folder: Path, run: str, weight: float, base: Path | None = None) -> ChainOfThoughtConfig:
    return ChainOfThoughtConfig.model_validate(
        {
            "computation": {"mode": "posttraining", "method": "chain_of_thought"},
            "training": {
                "learning_rate": 1e-2,
                "batch_size": 4,
                "max_steps": 8,
                "precision": "fp32",
                "router_aux_loss": weight,
            },
            "data": {
                "pretrained_weights": str(base or folder / "base"),
                "reasoning_examples": str(folder / "rows.jsonl"),
                "validation_share": 0.0,
                "output_dir": str(folder / run),
            },
        }
    )
