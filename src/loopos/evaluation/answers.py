r"""Whether an answer is the expected one: as text, as a number, as a choice.

Enters: two answers, the model's and the expected one. Leaves: True or False. Of a text with `\boxed{...}` only the last
box counts; words that lead to an answer ("the answer is") do not. Left out: where in a chain the answer stands
(`data.step_format`), reading a number (`quantities`); checkers of other packages and of users (`checkers`); metrics
(`answer_metrics`).
"""

from __future__ import annotations

import re
from fractions import Fraction

from loopos.evaluation.quantities import (
    AROUND,
    ENDINGS,
    LEAD,
    TAG,
    Quantity,
    boxed,
    plain_latex,
    plain_unicode,
    quantity,
)

__all__ = ["automatic", "boxed", "choice", "exact", "normalise", "numeric", "quantity", "vote_key"]

_PYTHON_POWER = re.compile(r"(?<=[\w)])\*\*(?=-?\d)")
_LATEX_SIGNS = {
    r"\cdot": "*", r"\times": "*", r"\pi": "π", r"\le": "≤", r"\leq": "≤", r"\ge": "≥", r"\geq": "≥", r"\neq": "≠",
    r"\ne": "≠", r"\pm": "±", r"\infty": "∞", r"\cup": "∪", r"\cap": "∩", r"\theta": "θ", r"\sqrt": "√",
    r"\{": "{", r"\}": "}", r"\approx": "≈", r"\in": "∈",
}  # fmt: skip
_MATHEMATICAL = re.compile(r"[\d=+*/^<>≤≥≠±√π∞|{}\[\]()]")
_YES_OR_NO = ("yes", "no", "true", "false")

_LONE_CHOICE = re.compile(r"\(?([A-Z])\)?[.:]?|\(([a-z])\)")
_LABELLED = re.compile(r"(?:\(([A-Za-z])\)|([A-Z])\))\s+(\S.*)", re.DOTALL)
_LETTER = r"[\[({<\"'*]*([A-Z])[\])}>\"'*]*"
_ANY_CASE = r"[\[({<\"'*]*([A-Za-z])[\])}>\"'*]*"
_BEHIND_LETTER = r"(?:[.:,;]|\s*$|\s+(?:because|since|as|for|is)\b|\s+[-–—]\s)"
_CHOICE_FORMS = (
    re.compile(rf"{_ANY_CASE}[.:,]?"),
    re.compile(rf"(?:option|choice|answer)\s+{_ANY_CASE}[.:,]?", re.IGNORECASE),
    re.compile(r"[*]*\(?([A-Z])[*]*[).:][*]*(?:\s.*)?", re.DOTALL),
    re.compile(r"[*]*\(([A-Za-z])\)[*]*(?:\s.*)?", re.DOTALL),
    re.compile(
        rf"{_LETTER}(?:,?\s+(?:because|since|as|for|is\s+(?:the\s+)?(?:correct|right|true))\b|\s+[-–—]\s).*", re.DOTALL
    ),
)
_CHOICE_SAID = re.compile(
    r"\b(?i:answer|option|choice|choose|pick|select)s?\b[\s:=*\"'–—-]*"
    r"(?i:(?:is|would\s+be|must\s+be|should\s+be|was)\b[\s:=*\"']*)?"
    r"(?i:(?:the\s+)?(?:option|choice|letter|answer)\b[\s:=*\"']*)?"
    rf"{_LETTER}(?![\w'’])"
)
_CHOICE_BRACKETED = re.compile(r"\(([A-Z])\)")
_NOT_CHOSEN = re.compile(
    r"\b(?:not|isn't|never|wrong|incorrect|rather\s+than|instead\s+of)\b[^.\n]{0,12}$", re.IGNORECASE
)

# Another letter beside the first one: "A or B", "A, B and C".
_SEVERAL = re.compile(r"[\[({*]*[A-Z][\])}*]*\s*(?:,|/|&|\b(?:or|and)\b)\s*[\[({*]*[A-Z](?![\w'’])")


def normalise(text: str) -> str:
    """The text without what does not change an answer: letter case, white space, Unicode's compatible forms, quotes,
    Markdown's and LaTeX's marks around it, words that lead to it, punctuation at its end.
    """
    plain = plain_unicode(plain_latex(TAG.sub(" ", boxed(text)))).casefold()
    plain = _PYTHON_POWER.sub("^", plain).replace("**", "")
    plain = " ".join(plain.split()).removeprefix(r"\(").removesuffix(r"\)")
    while plain != (stripped := LEAD.sub("", plain.strip(AROUND).rstrip(ENDINGS))):
        plain = stripped
    return plain


def exact(given: str, wanted: str) -> bool:
    """Equal after `normalise`, of mathematics also without its spaces. Where one line is expected, the first line of
    several counts; where yes, no, true or false is, the first word of a sentence does.
    """
    asked = normalise(wanted)
    said = [normalise(given)]
    if "\n" not in wanted.strip() and "\n" in given.strip():
        said.append(normalise(given.strip().partition("\n")[0]))
    if asked in said:
        return True
    if asked in _YES_OR_NO:
        return any(re.match(rf"{asked}(?=[.,;:!?\n—-]|\s+-|$)", each) is not None for each in said)
    return bool(_MATHEMATICAL.search(asked)) and _squeezed(asked) in map(_squeezed, said)


def numeric(given: str, wanted: str, *, tolerance: float = 1e-6) -> bool:
    """|given − wanted| <= tolerance · |wanted| (for a wanted 0: <= tolerance), for two texts with one number each.

    Where both name a unit they must share a word of it. 50% equals 0.5, and 50 too, since the sign is often left out;
    so is "million" of 1.5 million. 50 cents are 0.5 dollars.
    """
    said, asked = quantity(given), quantity(wanted)
    if said is None or asked is None:
        return False
    # Through its decimal form: 0.03 as a binary number is a little less, and 103 must be within 0.03 of 100.
    allowed = Fraction(str(tolerance))
    return any(abs(one - other) <= allowed * (abs(other) or 1) for one, other in _comparable(said, asked))


def choice(given: str, wanted: str) -> bool:
    """The same letter of a multiple choice: "B", "(b)", "B) because ...", "the answer is: **B**"."""
    said = _letter(given)
    return said is not None and said == _letter(wanted)


def automatic(given: str, wanted: str, *, tolerance: float = 1e-6) -> bool:
    """`numeric` where a number is expected, `choice` where a lone capital letter is, else `exact`. Of a labelled choice
    such as "(B) Paris", label and text are both right.
    """
    asked = quantity(wanted)
    if asked is not None and asked.alone:
        return numeric(given, wanted, tolerance=tolerance) or exact(given, wanted)
    bare = boxed(wanted).strip()
    if _LONE_CHOICE.fullmatch(bare):
        return choice(given, wanted)
    if exact(given, wanted):
        return True
    labelled = _LABELLED.fullmatch(bare)
    return labelled is not None and (choice(given, f"({labelled[1] or labelled[2]})") or exact(given, labelled[3]))


def vote_key(answer: str) -> str:
    """What answers that mean the same share when chains vote: the value of a number, the letter of a labelled choice,
    else the normal form.
    """
    found = quantity(answer)
    if found is not None and found.alone:
        return f"{found.value}%" if found.is_percent else str(found.value)
    bare = boxed(answer).strip(AROUND)
    lone = _LONE_CHOICE.fullmatch(bare) or _LABELLED.fullmatch(bare)
    return normalise(answer) if lone is None else str(lone[1] or lone[2]).casefold()


def _comparable(said: Quantity, asked: Quantity) -> list[tuple[Fraction, Fraction]]:
    """The values to compare, in the ways that the two may be meant; none where their units differ."""
    if said.unit and asked.unit and not said.unit & asked.unit:
        if {"cent"} <= said.unit and {"dollar"} <= asked.unit:
            return [(said.value / 100, asked.value)]
        if {"dollar"} <= said.unit and {"cent"} <= asked.unit:
            return [(said.value * 100, asked.value)]
        return []
    pairs = [(said.value, asked.value)]
    if said.is_percent != asked.is_percent:
        hundred = (said.value / 100, asked.value) if said.is_percent else (said.value, asked.value / 100)
        pairs.append(hundred)
    if (said.scale == 1) != (asked.scale == 1):
        pairs.append((said.value / said.scale, asked.value / asked.scale))
    return pairs


def _squeezed(normal: str) -> str:
    """Mathematics in one way of writing: without spaces, signs of LaTeX as those of Unicode, brackets around one token
    left out.
    """
    plain = re.sub(r"\\[a-z]+|\\[{}]", lambda found: _LATEX_SIGNS.get(found[0], found[0]), normal)
    plain = re.sub(r"\bsqrt\b", "√", re.sub(r"\bpi\b", "π", plain))
    plain = re.sub(
        r"(?<!\w)\s+|\s+(?!\w)", "", re.sub(r"<=", "≤", re.sub(r">=", "≥", plain)).replace("$", "").replace("·", "*")
    )
    plain = re.sub(r"([\^√])[{(](-?\w+)[)}]", r"\1\2", plain)
    plain = re.sub(r"(?<![a-z√])\((\w+)\)/\(?(\w+)\)?(?!\w)", r"\1/\2", plain)
    return re.sub(r"\*(?=[a-zπ√(])|(?<=[a-zπ)])\*(?=\d)", "", plain)


def _letter(text: str) -> str | None:
    """The letter that a text chooses; None where it chooses none, or several."""
    plain = TAG.sub(" ", plain_latex(boxed(text))).strip(AROUND)
    first = plain.partition("\n")[0].strip(AROUND)
    for each in (plain, first):
        for form in _CHOICE_FORMS:
            found = form.fullmatch(each)
            if found is not None and not _SEVERAL.match(each):
                return found[1].upper()
    said = list(_CHOICE_SAID.finditer(plain)) or list(_CHOICE_BRACKETED.finditer(plain))
    chosen = {
        found[1].upper() for found in said if not _NOT_CHOSEN.search(plain, max(0, found.start(1) - 40), found.start(1))
    }
    are_one = len(chosen) == 1 and not any(_SEVERAL.match(plain, found.start(1)) for found in said)
    return chosen.pop() if are_one else None
