"""Tables of study strategies and formats. Apart from `study`, which imports pydantic: `loopos list` does not."""

from __future__ import annotations

from collections.abc import Callable

from loopos.config.registry import Registry
from loopos.config.variants import Function, FunctionRow, by_reference, registering

STUDY_STRATEGIES: Registry[FunctionRow] = Registry(
    "study strategy",
    by_reference(
        "loopos.studies.strategies",
        {"random": "at_random", "disagreement": "disagreement", "uncertainty": "uncertainty", "diversity": "Diversity"},
    ),
    decorator="register_study_strategy",
    adopt=FunctionRow,
)


def register_study_strategy(name: str) -> Callable[[Function], Function]:
    """Registers the decorated function as the study strategy `name`: `function(items, begun)` returns one number for
    each of `items`, those that nobody has judged; the item with the greatest comes next. `begun`: items that have
    votes or are being judged. Both are sequences of `studies.items.Item`.
    """
    return registering(STUDY_STRATEGIES, name)


STUDY_FORMATS: Registry[FunctionRow] = Registry(
    "study format",
    by_reference(
        "loopos.studies.exports",
        {
            "preferences": "preferences",
            "preferences_with_ties": "preferences_with_ties",
            "kto": "thumbs",
            "groups": "groups",
            "demonstrations": "demonstrations",
            "best": "best",
            "llama_factory": "llama_factory",
            "axolotl": "axolotl",
            "argilla": "argilla",
            "label_studio": "label_studio",
            "chatbot_arena": "chatbot_arena",
        },
    ),
    decorator="register_study_format",
    adopt=FunctionRow,
)


def register_study_format(name: str) -> Callable[[Function], Function]:
    """Registers the decorated function as the study format `name`: `function(judged)` takes a list of
    `studies.verdicts.Judged`, items with their votes, and returns rows, each a dict; a text instead is the reason why
    an item gives none, which is counted.
    """
    return registering(STUDY_FORMATS, name)
