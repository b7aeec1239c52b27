"""`loopos.generate` writes what `loopos generate` writes."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

import loopos
from loopos.cli.commands import app


def command(*words: object) -> str:
    result = CliRunner().invoke(app, ["generate", *map(str, words), "--device", "cpu"], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    return result.stdout.removesuffix("\n")


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ({}, ()),
        ({"system": "be kind"}, ("--system", "be kind")),
        ({"raw": True}, ("--raw",)),
        ({"temperature": 1.5, "top_k": 30, "seed": 4}, ("--temperature", 1.5, "--top-k", 30, "--seed", 4)),
    ],
)
def test_a_text_is_that_of_the_command(
    arguments: dict[str, object], options: tuple[object, ...], pico_folder: Path
) -> None:
    prompt = "the parcel came"
    text = loopos.generate(pico_folder, prompt, max_new_tokens=8, device="cpu", **arguments)  # type: ignore[call-overload]
    assert text
    assert text == command(pico_folder, "-p", prompt, "--max-new-tokens", 8, *options)


def test_prompts_have_texts_in_order(pico_folder: Path) -> None:
    model = loopos.load(pico_folder, "language", device="cpu")
    params = loopos.SamplingParams(temperature=1.0, max_new_tokens=6, seed=2)
    prompts = ["good", [{"role": "user", "content": "bad parcel"}]]
    good, bad = loopos.generate(model, prompts, params)
    assert loopos.generate(model, "good", params) == good
    assert (
        loopos.generate(model, [{"role": "user", "content": "bad parcel"}], params)
        == bad
        == loopos.generate(model, "bad parcel", params)
    )
    # An argument changes one field of the parameters.
    greedy = loopos.generate(model, "good", params, temperature=0.0)
    assert greedy == model.chat("good", loopos.SamplingParams(max_new_tokens=6))
    three = loopos.generate(model, ["good", "bad parcel"], params, n=3)
    assert [len(each) for each in three] == [3, 3]
    assert len(set(three[0])) > 1
    assert loopos.generate(model, "bad parcel", params, n=3) == three[1]
    assert loopos.generate(model, [], params) == []


def test_a_stop_is_a_text_or_several(pico_folder: Path) -> None:
    model = loopos.load(pico_folder, "language", device="cpu")
    text = loopos.generate(model, "good", max_new_tokens=12)
    stop = text[3:5]
    cut = text.partition(stop)[0]
    assert len(cut) < len(text)
    for each in (stop, [stop], (stop, "never that")):
        assert loopos.generate(model, "good", max_new_tokens=12, stop=each) == cut
    assert loopos.SamplingParams(stop=["ab"]) == loopos.SamplingParams(stop=("ab",))  # type: ignore[arg-type]


def test_mistakes_are_named(pico_folder: Path, tmp_path: Path) -> None:
    model = loopos.load(pico_folder, "language", device="cpu")
    with pytest.raises(loopos.UserError, match="top_p: got 3"):
        loopos.generate(model, "good", top_p=3)
    with pytest.raises(loopos.UserError, match="n: got 0; expected 1 or more"):
        loopos.generate(model, "good", n=0)
    with pytest.raises(loopos.UserError, match="raw: got messages"):
        loopos.generate(model, "good", raw=True, system="be kind")
    with pytest.raises(loopos.UserError, match=r'message 0: got .*"role" and "content"'):
        loopos.generate(model, [{"role": "user"}])
    with pytest.raises(loopos.UserError, match="no trained model here"):
        loopos.generate(tmp_path, "good")
    for call in (model.generate, model.answer):
        with pytest.raises(loopos.UserError, match=r"got the text 'good'; expected a list, such as \['good'\]"):
            call("good")  # type: ignore[operator]
    with pytest.raises(TypeError, match="max_tokens"):
        loopos.generate(model, "good", max_tokens=3)  # type: ignore[call-overload]
