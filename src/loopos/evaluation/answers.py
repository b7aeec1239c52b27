r"""Whether an answer is the wanted one: as text, as a number, as a choice.

Enters: two answers, what a model said and what was wanted. Leaves: True or False. Of a text with `\boxed{...}` the last
box alone counts. Left out: where in a chain the answer stands (`data.step_format`); checkers of other packages and of
users (`checkers`); metrics (`answer_metrics`).
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction
from typing import NamedTuple

_AROUND = " \t\r\n\"'“”‘’`*$"
_ENDINGS = ".,;:!?"
_LATEX_TEXT = re.compile(r"\\(?:text|mathrm|mathbf|textbf|mbox)\s*\{([^{}]*)\}")
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\s*(?:\{([^{}]+)\}\s*\{([^{}]+)\}|(\d)(\d))")
_LATEX_NOISE = re.compile(r"\\left|\\right|\\[,!; ]|\\\(|\\\)|\\\[|\\\]|\^\s*\{?\\circ\}?")
_CURRENCIES = {"$": "dollar", "€": "euro", "£": "pound", "¥": "yen", "₹": "rupee"}
_NUMBER = re.compile(
    r"""(?<![\w.])
    (?P<sign>[-+]?)\s?(?P<currency>[$€£¥₹]?)\s?
    (?: (?P<whole>\d+)\s+(?P<mixed_top>\d+)\s*/\s*(?P<mixed_bottom>\d+)
      | (?P<top>\d+(?:\.\d+)?)\s*/\s*(?P<bottom>\d+(?:\.\d+)?)
      | (?P<decimal>\d+(?:\.\d+)?|\.\d+)
        (?: e(?P<exponent>[-+]?\d+) | \s*[x×*]\s*10\s*\^\s*\{?(?P<power>[-+]?\d+)\}? )? (?!\w*\d)
    )
    \s?(?P<percent>%?)""",
    re.VERBOSE | re.IGNORECASE,
)
_UNIT = re.compile(r"[^\W\d]+(?:[ /][^\W\d]+){0,2}")
_PERCENT = re.compile(r"\s?per\s?cent\b", re.IGNORECASE)
_MATH = re.compile(r"\$([^$]+)\$")
# Longer runs of digits are a model that repeats itself, and Python refuses to read them.
_MOST_CHARACTERS = 1000
_LONE_CHOICE = re.compile(r"\(?([A-Z])\)?[.:]?")
_CHOICE_FORMS = (
    re.compile(r"\(?([A-Za-z])\)?[.:,]?"),
    re.compile(r"\(?([A-Z])[).:](?:\s.*)?", re.DOTALL),
    re.compile(r"\(([A-Za-z])\)(?:\s.*)?", re.DOTALL),
)
_CHOICE_SAID = re.compile(r"\b(?i:answer|option|choice)\s*(?:is|:|=)?\s*\(?([A-Z])\b(?!')")
_CHOICE_BRACKETED = re.compile(r"\(([A-Z])\)")


class Quantity(NamedTuple):
    """A number in a text. `alone`: the text holds nothing else but its unit. `unit`: the currency or the words of it,
    in the singular. 50% has the value 50.
    """

    value: Fraction
    is_percent: bool
    unit: frozenset[str]
    alone: bool


def normalise(text: str) -> str:
    """The text without what does not change an answer: letter case, white space, Unicode's compatible forms, quotes,
    Markdown's and LaTeX's marks around it, punctuation at its end.
    """
    plain = unicodedata.normalize("NFKC", _LATEX_TEXT.sub(r"\1", boxed(text))).casefold()
    plain = " ".join(plain.split()).removeprefix(r"\(").removesuffix(r"\)")
    while plain != (stripped := plain.strip(_AROUND).rstrip(_ENDINGS)):
        plain = stripped
    return plain


def boxed(text: str) -> str:
    r"""What the last `\boxed{...}` of the text holds; the text itself where there is none, or one that does not end."""
    start = text.rfind(r"\boxed{")
    if start < 0:
        return text
    first, depth = start + len(r"\boxed{"), 1
    for place in range(first, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[first:place]
    return text


def quantity(text: str) -> Quantity | None:
    """The number of a text that holds just one, or just one behind its last "="; None else.

    Understood are thousands' commas, decimals, fractions and mixed numbers, exponents, percent, currencies, LaTeX's
    fractions. A fraction over 0 is no number.
    """
    plain = _plain_number(text)
    found = list(_NUMBER.finditer(plain))
    if len(found) > 1 and "=" in plain:
        plain = plain.rpartition("=")[2].strip()
        found = list(_NUMBER.finditer(plain))
    if len(found) != 1:
        return None
    match = found[0]
    value = _value(match)
    if value is None:
        return None
    around = f"{plain[: match.start()]} {plain[match.end() :]}".strip(_AROUND + _ENDINGS)
    alone = not plain[: match.start()].strip(_AROUND) and (not around or _UNIT.fullmatch(around) is not None)
    words = [_singular(word) for word in re.split(r"[ /]", around.casefold()) if word] if alone else []
    currency = [_CURRENCIES[match["currency"]]] if match["currency"] else []
    return Quantity(value, bool(match["percent"]), frozenset([*words, *currency]), alone)


def exact(given: str, wanted: str) -> bool:
    """Equal after `normalise`."""
    return normalise(given) == normalise(wanted)


def numeric(given: str, wanted: str, *, tolerance: float = 1e-6) -> bool:
    """|given − wanted| <= tolerance · |wanted| (for a wanted 0: <= tolerance), for two texts with one number each.

    Where both name a unit they must share a word of it. 50% equals 0.5, and 50 too, since the sign is often left out.
    """
    said, asked = quantity(given), quantity(wanted)
    if said is None or asked is None or (said.unit and asked.unit and not said.unit & asked.unit):
        return False
    pairs = [(said.value, asked.value)]
    if said.is_percent and not asked.is_percent:
        pairs.append((said.value / 100, asked.value))
    if asked.is_percent and not said.is_percent:
        pairs.append((said.value, asked.value / 100))
    # Through its decimal form: 0.03 as a binary number is a little less, and 103 must be within 0.03 of 100.
    allowed = Fraction(str(tolerance))
    return any(abs(one - other) <= allowed * (abs(other) or 1) for one, other in pairs)


def choice(given: str, wanted: str) -> bool:
    """The same letter of a multiple choice: "B", "(b)", "B) because ...", "the answer is B"."""
    said = _letter(given)
    return said is not None and said == _letter(wanted)


def automatic(given: str, wanted: str, *, tolerance: float = 1e-6) -> bool:
    """`numeric` where a number is wanted, `choice` where a lone capital letter is, else `exact`."""
    asked = quantity(wanted)
    if asked is not None and asked.alone:
        return numeric(given, wanted, tolerance=tolerance)
    if _LONE_CHOICE.fullmatch(boxed(wanted).strip()):
        return choice(given, wanted)
    return exact(given, wanted)


def vote_key(answer: str) -> str:
    """What answers that mean the same share when chains vote: the value of a number, else the normal form."""
    found = quantity(answer)
    if found is None or not found.alone:
        return normalise(answer)
    return f"{found.value}%" if found.is_percent else str(found.value)


def _plain_number(text: str) -> str:
    plain = unicodedata.normalize("NFKC", _LATEX_TEXT.sub(r" \1", boxed(text)))
    plain = plain.replace("−", "-").replace("⁄", "/").replace(r"\%", "%").replace(r"\$", "$").replace("{,}", ",")
    plain = _LATEX_FRACTION.sub(lambda found: f" {found[1] or found[3]}/{found[2] or found[4]}", plain)
    plain = _PERCENT.sub("%", _MATH.sub(r" \1 ", _LATEX_NOISE.sub("", plain)))
    return re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", plain).strip(_AROUND.replace("$", ""))


def _value(match: re.Match[str]) -> Fraction | None:
    if len(match[0]) > _MOST_CHARACTERS:
        return None
    if match["whole"] is not None:
        top, bottom = Fraction(match["mixed_top"]), Fraction(match["mixed_bottom"])
        value = Fraction(match["whole"]) + top / bottom if bottom else None
    elif match["top"] is not None:
        bottom = Fraction(match["bottom"])
        value = Fraction(match["top"]) / bottom if bottom else None
    else:
        power = int(match["exponent"] or match["power"] or 0)
        value = Fraction(match["decimal"]) * Fraction(10) ** power if abs(power) <= _MOST_CHARACTERS else None
    return -value if value is not None and match["sign"] == "-" else value


def _singular(word: str) -> str:
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


def _letter(text: str) -> str | None:
    plain = boxed(text).strip(_AROUND)
    for form in _CHOICE_FORMS:
        found = form.fullmatch(plain)
        if found is not None:
            return found[1].upper()
    said = _CHOICE_SAID.findall(plain) or _CHOICE_BRACKETED.findall(plain)
    letters = {letter.upper() for letter in said}
    return letters.pop() if len(letters) == 1 else None
