"""English numbers in words → digits, where they are all that a text says.

Enters: a text. Leaves: it with its number in digits ("forty-two apples" → "42 apples"), or as it is: a text with a
digit counts by its digits, and "one of them" is no number.
"""

from __future__ import annotations

import re

_SMALL = {
    "zero": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9,
    "ten": 10, "eleven": 11, "twelve": 12, "thirteen": 13, "fourteen": 14, "fifteen": 15, "sixteen": 16,
    "seventeen": 17, "eighteen": 18, "nineteen": 19,
}  # fmt: skip
_TENS = {
    "twenty": 20, "thirty": 30, "forty": 40, "fifty": 50, "sixty": 60, "seventy": 70, "eighty": 80, "ninety": 90,
}  # fmt: skip
_PARTS = {
    "half": 2,
    "halve": 2,
    "third": 3,
    "quarter": 4,
    "fourth": 4,
    "fifth": 5,
    "sixth": 6,
    "eighth": 8,
    "tenth": 10,
}
_SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9}
_WORD = "|".join((*_SMALL, *_TENS, *_SCALES))
_PHRASE = re.compile(rf"(-|minus |negative )?((?:{_WORD})(?:(?:[ -]| and )(?:{_WORD}))*)\b", re.IGNORECASE)
_SHARE = re.compile(rf"(?:({'|'.join(_SMALL)}|a)[ -])?({'|'.join(_PARTS)})s?\b", re.IGNORECASE)
_UNIT = re.compile(r"%?(?: [^\W\d]+){0,2}[.!]?")


def in_digits(text: str) -> str:
    """The text with the number that it begins with in digits, where at most a unit of two words follows."""
    if re.search(r"\d", text):
        return text
    share = _SHARE.match(text)
    if share is not None and _UNIT.fullmatch(text[share.end() :]):
        top = _SMALL.get((share[1] or "a").casefold(), 1)
        return f"{top}/{_PARTS[share[2].casefold()]}{text[share.end() :]}"
    phrase = _PHRASE.match(text)
    if phrase is None or not _UNIT.fullmatch(text[phrase.end() :]) or text[phrase.end() :].startswith(" of "):
        return text
    value = _value(re.split(r"[ -]+", phrase[2].casefold()))
    return text if value is None else f"{'-' if phrase[1] else ''}{value}{text[phrase.end() :]}"


def _value(words: list[str]) -> int | None:
    """The number of its words; None for words in an order that no number has ("two three")."""
    total, part, last = 0, 0, ""
    for word in words:
        if word == "and":
            continue
        if word in _SCALES:
            if word == "hundred":
                part = max(part, 1) * 100
            else:
                total, part = total + max(part, 1) * _SCALES[word], 0
        elif (word in _SMALL and (last in _SMALL or part % 10)) or (word in _TENS and part % 100):
            return None
        else:
            part += _SMALL.get(word, _TENS.get(word, 0))
        last = word
    return total + part
