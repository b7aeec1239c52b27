"""The packed path equals a plain padded transformers forward, in losses and in gradients, and separates sequences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    BertConfig,
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    ModernBertConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
)

from loopos.functional.packing import PackedLayout, allowed_pairs
from loopos.models.attention import PackedUnsupported
from loopos.models.backbone import Backbone
from loopos.models.heads import PooledModel, pool

COMMON: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
GROUPED: dict[str, Any] = {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**COMMON, **GROUPED),
    "qwen2": lambda: Qwen2Config(**COMMON, **GROUPED),
    "qwen3": lambda: Qwen3Config(**COMMON, **GROUPED, head_dim=8),
    "gemma": lambda: GemmaConfig(**COMMON, **GROUPED, head_dim=8),
    "gpt2": lambda: GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=4, n_inner=64, bos_token_id=1, eos_token_id=2,
                               resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "bert": lambda: BertConfig(**COMMON, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
    # A band narrower than the longest sequence, causal and two-sided; soft-capped scores.
    "mistral sliding window": lambda: MistralConfig(**COMMON, **GROUPED, sliding_window=4),
    "gemma2 soft-capping": lambda: Gemma2Config(**COMMON, **GROUPED, head_dim=8, sliding_window=4, attn_logit_softcapping=2.0,
                                                query_pre_attn_scalar=8),
    "gemma3 sliding window": lambda: Gemma3TextConfig(**COMMON, **GROUPED, head_dim=8, sliding_window=4),
    "modernbert two-sided window": lambda: ModernBertConfig(**COMMON, **SPECIAL, cls_token_id=1, sep_token_id=2, local_attention=6,
                                                           embedding_dropout=0.0, mlp_dropout=0.0, attention_dropout=0.0),
}  # fmt: skip
LENGTHS = (5, 23, 1, 9, 14)


def tiny(name: str) -> nn.Module:
    torch.manual_seed(1)
    return AutoModel.from_config(CONFIGS[name](), attn_implementation="eager", dtype=torch.float32).eval()


def some_ids(seed: int = 0) -> Tensor:
    return torch.randint(3, 100, (sum(LENGTHS),), generator=torch.Generator().manual_seed(seed))


def padded_loss(model: nn.Module, ids: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """Mean-pooled cross-entropy sum by a plain padded forward, written only from the definition."""
    longest = max(LENGTHS)
    rows = [torch.cat([part, part.new_zeros(longest - len(part))]) for part in ids.split(LENGTHS)]
    mask = torch.tensor([[1] * n + [0] * (longest - n) for n in LENGTHS])
    hidden = model(input_ids=torch.stack(rows), attention_mask=mask).last_hidden_state
    pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    return nn.functional.cross_entropy(pooled @ head.T, labels, reduction="sum")


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradients_equal_the_padded_forward(name: str) -> None:
    ids, labels = some_ids(), torch.tensor([0, 1, 2, 0, 1])
    head = torch.randn(3, 32, generator=torch.Generator().manual_seed(5))

    reference = tiny(name)
    expected = padded_loss(reference, ids, head, labels)
    expected.backward()

    model = tiny(name)
    backbone = Backbone(model)
    assert backbone.path == "packed", backbone.reason
    layout = PackedLayout(LENGTHS)
    packed = PooledModel(backbone, num_outputs=3, pooling="mean", seed=0)
    with torch.no_grad():
        packed.head.weight.copy_(head)
    loss = nn.functional.cross_entropy(packed(ids, layout), labels, reduction="sum")
    loss.backward()

    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    compared = 0
    for (parameter_name, actual_output), expected_output in zip(
        model.named_parameters(), reference.parameters(), strict=True
    ):
        if expected_output.grad is None:
            assert actual_output.grad is None or not actual_output.grad.any(), parameter_name
            continue
        assert actual_output.grad is not None, parameter_name
        torch.testing.assert_close(
            actual_output.grad, expected_output.grad, atol=3e-5, rtol=1e-4, msg=lambda m, n=parameter_name: f"{n}: {m}"
        )
        compared += 1
    assert compared >= 14


@pytest.mark.parametrize("name", CONFIGS)
def test_one_sequence_does_not_touch_another(name: str) -> None:
    backbone = Backbone(tiny(name))
    layout = PackedLayout(LENGTHS)
    ids = some_ids()
    changed = ids.clone()
    second = slice(LENGTHS[0], LENGTHS[0] + LENGTHS[1])
    changed[second] = (changed[second] - 3 + 41) % 97 + 3
    with torch.no_grad():
        before, after = (pool(backbone(actual, layout), layout, "mean") for actual in (ids, changed))
    others = [0, 2, 3, 4]
    torch.testing.assert_close(after[others], before[others], atol=1e-6, rtol=0)
    assert (after[1] - before[1]).abs().max() > 1e-3


@pytest.mark.parametrize("pooling", ["mean", "last", "first", "max"])
def test_pooling_by_hand(pooling: str) -> None:
    hidden = torch.tensor([[1.0, -1.0], [3.0, -5.0], [2.0, 8.0]])
    expected = {
        "mean": [[2.0, -3.0], [2.0, 8.0]],
        "last": [[3.0, -5.0], [2.0, 8.0]],
        "first": [[1.0, -1.0], [2.0, 8.0]],
        "max": [[3.0, -1.0], [2.0, 8.0]],
    }
    assert pool(hidden, PackedLayout((2, 1)), pooling).tolist() == expected[pooling]


def test_allowed_pairs_by_hand() -> None:
    allowed = allowed_pairs((3, 2), causal=True, window=2, device=torch.device("cpu"))
    assert allowed.int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 1, 1, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 1, 1],
    ]


def test_long_sequences_take_the_fused_kernel_and_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = Backbone(tiny("mistral sliding window"))
    layout, ids = PackedLayout(LENGTHS), some_ids()
    with torch.no_grad():
        blocks = backbone(ids, layout)
        monkeypatch.setattr("loopos.models.attention.FUSED_FROM", 4)
        fused = backbone(ids, layout)
    torch.testing.assert_close(fused, blocks, atol=1e-5, rtol=1e-5)


def test_gradient_checkpointing_changes_nothing() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = tiny("llama")
        backbone = Backbone(model)
        if checkpointing:
            model.activation_checkpointing_enable()
        model.train()
        backbone(some_ids(), PackedLayout(LENGTHS)).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


# Positions that depend on the pad id, a bias on distances, attention sinks, recurrent states: no packed row serves these exactly.
UNSERVED: dict[str, Callable[[], PreTrainedConfig]] = {
    "roberta": lambda: RobertaConfig(**COMMON, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
    "bloom": lambda: BloomConfig(vocab_size=100, hidden_size=32, n_layer=2, n_head=4),
    "gpt-oss sinks": lambda: GptOssConfig(**COMMON, **GROUPED, head_dim=8, num_local_experts=2, num_experts_per_tok=1),
    "mamba": lambda: MambaConfig(vocab_size=100, hidden_size=32, num_hidden_layers=2, state_size=4),
}


@pytest.mark.parametrize("name", UNSERVED)
@pytest.mark.filterwarnings("ignore")
def test_unsupported_models_take_the_padded_path_with_a_reason(name: str) -> None:
    torch.manual_seed(1)
    model = AutoModel.from_config(UNSERVED[name](), attn_implementation="eager", dtype=torch.float32).eval()
    backbone = Backbone(model)
    assert backbone.path == "padded"
    assert backbone.reason
    ids = some_ids()
    with torch.no_grad():
        got = backbone(ids, PackedLayout(LENGTHS))
        separate = torch.cat([model(input_ids=part[None]).last_hidden_state[0] for part in ids.split(LENGTHS)])
    torch.testing.assert_close(got, separate, atol=1e-5, rtol=1e-4)
    with pytest.raises(PackedUnsupported, match=type(model).__name__):
        Backbone(model, attention="packed")
