"""Episodes: tokens are appended, masks and log-probabilities are of what the model wrote, limits, failures and batches."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutput

from loopos.config.diagnostics import UserError
from loopos.config.environments import EnvironmentSection
from loopos.data.conversations import Message
from loopos.data.templates import ChatTemplate
from loopos.generation.engine import Engine
from loopos.generation.settings import SamplingParams
from loopos.rl.episodes import Episode, EpisodePlayer, episode_metrics
from tests.data.chat_templates import CHATML, HERMES, LAST_ONLY, TOOL_TOKENS

OWN = "tests.rl.own_environments"
SIZE = 512


class Actor(PreTrainedModel, GenerationMixin):
    """Writes the turns of a script: after the k-th header of a turn the k-th text, then the end."""

    config_class = PreTrainedConfig

    def __init__(self, header: list[int], turns: list[list[int]]) -> None:
        config = PreTrainedConfig(pad_token_id=0, bos_token_id=1, eos_token_id=2)
        config.vocab_size = SIZE
        super().__init__(config)
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.header, self.turns = header, turns

    def forward(self, input_ids: torch.Tensor, logits_to_keep: Any = 0) -> CausalLMOutput:
        logits = torch.full((*input_ids.shape, SIZE), -30.0)
        for row, ids in enumerate(input_ids.tolist()):
            starts = [n + len(self.header) for n in range(len(ids)) if ids[n : n + len(self.header)] == self.header]
            # The engine tries sequences without a turn first.
            turn = self.turns[min(len(starts), len(self.turns)) - 1] if starts else ids
            logits[row, -1, turn[len(ids) - starts[-1] if starts else 0]] = 30.0
        return CausalLMOutput(logits=logits)


@pytest.fixture(scope="module")
def tokenizer(pico_tokenizer: Path) -> PreTrainedTokenizerBase:
    opened = AutoTokenizer.from_pretrained(pico_tokenizer)
    opened.add_tokens(TOOL_TOKENS, special_tokens=True)
    opened.chat_template = HERMES
    return opened  # type: ignore[no-any-return]


def called(name: str, **arguments: object) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def section(name: str, **settings: Any) -> EnvironmentSection:
    return EnvironmentSection(name=name if ":" not in name else f"{OWN}{name}", **settings)


def acted(
    tokenizer: PreTrainedTokenizerBase, name: str, script: Sequence[str], row: dict[str, object], **settings: Any
) -> Episode:
    """The episode in which the model writes these turns."""
    header = tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    turns = [tokenizer(f"{text}<|im_end|>", add_special_tokens=False)["input_ids"] for text in script]
    engine = Engine(Actor(header, turns), tokenizer)
    player = EpisodePlayer(engine, ChatTemplate(tokenizer), section(name, **settings))
    (episode,) = player.play([row], SamplingParams(temperature=0, max_new_tokens=200))
    return episode


def written(tokenizer: PreTrainedTokenizerBase, episode: Episode, mask: bool) -> str:
    return tokenizer.decode([token for token, kept in zip(episode.ids, episode.mask, strict=True) if kept is mask])


def test_an_episode_of_calculator_and_search(tokenizer: PreTrainedTokenizerBase) -> None:
    script = [
        "I look it up.\n" + called("search", query="height of K2", limit=1) + "\n" + called("search", query="Mont Blanc", limit=1),
        called("calculate", expression="8611 - 4806"),
        "The difference is\n3805",
    ]  # fmt: skip
    row = {"question": "How much higher is K2 than Mont Blanc?", "answer": "3805"}
    episode = acted(tokenizer, "calculator_search", script, row)
    assert (episode.finish_reason, episode.ended, episode.reward) == ("answer", True, 1.0)
    assert (episode.turns, episode.calls, episode.failures) == (3, 3, {})
    assert written(tokenizer, episode, True) == "".join(f"{text}<|im_end|>" for text in script)
    assert written(tokenizer, episode, False) == (
        '\n<|im_start|>user\n<tool_response>\n["The height of K2 is 8611 meters."]\n</tool_response>\n'
        '<tool_response>\n["The height of Mont Blanc is 4806 meters."]\n</tool_response><|im_end|>\n<|im_start|>assistant\n'
        "\n<|im_start|>user\n<tool_response>\n3805\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )
    assert [message.role for message in episode.messages] == [
        "user",
        "assistant",
        "tool",
        "tool",
        "assistant",
        "tool",
        "assistant",
    ]
    assert episode.text == script[-1]
    # The tokens of an episode are those of its messages, rendered whole.
    rendered = tokenizer.apply_chat_template(
        [message.as_template() for message in episode.messages], tools=EpisodePlayer(
            Engine(Actor([0], [[0]]), tokenizer), ChatTemplate(tokenizer), section("calculator_search")
        ).environment.schemas, tokenize=False,
    )  # fmt: skip
    assert rendered == tokenizer.decode([*episode.prompt_ids, *episode.ids]) + "\n"
    metrics = episode_metrics([episode])
    assert (metrics["turns"], metrics["tool_calls"], metrics["tool_failures"]) == (3, 3, 0)
    assert metrics["model_tokens"] + metrics["tool_tokens"] == len(episode.ids)


@pytest.mark.parametrize(
    ("text", "failure", "piece"),
    [
        (called("fail"), "exception", "Error: RuntimeError: no parcel"),
        (called("leave"), "exception", "Error: SystemExit: 3"),
        (called("loop"), "timeout", "Error: loop took longer than 0.2 seconds"),
        (called("fly"), "unknown_tool", "Error: there is no tool fly; the tools are fail, leave, loop, long, slow, stop"),
        (called("fail", hard=1), "arguments", "Error: hard: Extra inputs are not permitted"),
        ('<tool_call>{"name": "fail"', "malformed", "Error: a tool call is not complete"),
        (called("long"), "", "xx\n[99900 more characters are left out]"),
    ],
)  # fmt: skip
def test_failures_are_text_to_the_model_and_counted(
    tokenizer: PreTrainedTokenizerBase, text: str, failure: str, piece: str
) -> None:
    limits = {"tool_seconds": 0.2, "max_result_characters": 100}
    episode = acted(tokenizer, ":Trouble", [text, "so"], {"prompt": "go"}, **limits)
    assert episode.failures == ({failure: 1} if failure else {})
    assert (episode.calls, episode.finish_reason) == (1, "answer")
    assert piece in written(tokenizer, episode, False)
    assert piece in episode.messages[2].content


def test_limits_end_an_episode(tokenizer: PreTrainedTokenizerBase) -> None:
    again = [called("slow")] * 9
    row: dict[str, object] = {"prompt": "go"}
    turns = acted(tokenizer, ":Trouble", again, row, max_turns=3)
    assert (turns.finish_reason, turns.turns, turns.calls, turns.ended) == ("turns", 3, 2, False)
    assert turns.mask[-1], "no result follows the last turn"
    tokens = acted(tokenizer, ":Trouble", again, row, max_tokens=100)
    assert tokens.finish_reason == "length"
    assert len(tokens.ids) <= 100
    seconds = acted(tokenizer, ":Trouble", again, row, max_seconds=0.04)
    assert (seconds.finish_reason, seconds.turns) == ("seconds", 1)
    done = acted(tokenizer, ":Trouble", [called("slow"), called("stop"), "so"], row)
    assert (done.finish_reason, done.ended, done.turns) == ("done", True, 2)
    assert done.messages[-1].content == "stopped"
    assert done.mask[-1]


def test_an_environment_without_tools_is_one_turn(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = CHATML
    try:
        episode = acted(tokenizer, ":NoTools", [called("fail")], {"prompt": "go", "score": 3})
        assert (episode.finish_reason, episode.turns, episode.calls, episode.reward) == ("answer", 1, 0, 3.0)
        with pytest.raises(UserError, match="it does not write tools"):
            acted(tokenizer, ":Trouble", ["x"], {"prompt": "go"})
        tokenizer.chat_template = LAST_ONLY + "{{ tools or '' }}"
        with pytest.raises(UserError, match=r"changes earlier text|leaves out"):
            acted(tokenizer, ":Trouble", ["x"], {"prompt": "go"}, tool_parser="hermes")
    finally:
        tokenizer.chat_template = HERMES


@pytest.fixture(scope="module")
def pico(pico_folder: Path, tokenizer: PreTrainedTokenizerBase) -> Any:
    model = AutoModelForCausalLM.from_pretrained(pico_folder)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return model


def played(pico: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], max_rows: int = 8) -> list[Episode]:
    """Episodes in which every turn is a call."""
    settings = section(":Counter", tool_parser=f"{OWN}:any_text", max_turns=3, max_tokens=150)
    player = EpisodePlayer(Engine(pico, tokenizer, max_rows=max_rows), ChatTemplate(tokenizer), settings)
    # The ends of turns are likely, so that turns are short.
    bias = {tokenizer.convert_tokens_to_ids("<|im_end|>"): 4.0}
    sampling = SamplingParams(temperature=1, max_new_tokens=12, seed=3, logit_bias=bias)
    return player.play([{"prompt": prompt} for prompt in prompts], sampling)


def test_logprobs_are_those_of_one_forward(pico: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = SHORT
    try:
        episodes = played(pico, tokenizer, ["a", "b b", "c c c", "the parcel"] * 4)
    finally:
        tokenizer.chat_template = HERMES
    assert max(episode.turns for episode in episodes) > 1
    for episode in episodes:
        assert len(episode.ids) == len(episode.mask) == len(episode.logprobs)
        whole = torch.tensor([[*episode.prompt_ids, *episode.ids]])
        with torch.no_grad():
            logprobs = pico(whole).logits[0].log_softmax(-1)
        start = len(episode.prompt_ids)
        expected = [float(logprobs[start + index - 1, token]) for index, token in enumerate(episode.ids)]
        for kept, found, reference in zip(episode.mask, episode.logprobs, expected, strict=True):
            assert found == (pytest.approx(reference, abs=1e-4) if kept else 0.0)


def test_an_episode_does_not_depend_on_the_others(pico: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = SHORT
    prompts = ["a", "b b", "a", "the parcel", "c"]
    try:
        together = played(pico, tokenizer, prompts)
        few = played(pico, tokenizer, prompts, max_rows=2)
        alone = {index: played(pico, tokenizer, [prompts[index]])[0] for index in (0, 3)}
    finally:
        tokenizer.chat_template = HERMES
    assert [episode.ids for episode in few] == [episode.ids for episode in together]
    assert [episode.messages for episode in few] == [episode.messages for episode in together]
    assert together[0].ids != together[2].ids, "the same row again is another sample"
    for index in (0, 3):
        assert alone[index].ids == together[index].ids


# A short template for a model of 256 positions.
SHORT = (
    "{% if tools %}{{ tools[0].function.name }}{% endif %}{% for message in messages %}{{ '<|user|>' if message.role == 'user' else '<|end|>' if message.role == 'tool' else '' }}"
    "{{ message.content }}{% for call in message.tool_calls or [] %}{{ call.function.name + (call.function.arguments | tojson) }}{% endfor %}"
    "{{ '<|im_end|>' if message.role == 'assistant' else '<|assistant|>' }}{% endfor %}"
)


def test_stop_strings_and_long_prompts_are_refused(pico: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    player = EpisodePlayer(Engine(pico, tokenizer), ChatTemplate(tokenizer), section(":Counter"))
    with pytest.raises(UserError, match="stop strings cut a turn"):
        player.play([{"prompt": "a"}], SamplingParams(stop=("x",)))
    with pytest.raises(UserError, match="the model has 256 positions"):
        player.play([{"prompt": "a " * 300}])
    assert Message("user", "a") == player.environment.begin({"prompt": "a"}, "row")[1][0]
