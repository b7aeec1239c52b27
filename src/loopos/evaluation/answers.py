"""Whether an answer is the expected one: as text, as a number, as a choice. Numbers are read in all common forms.

A number may have signs and dashes of Unicode, thousands separators (commas, points, apostrophes, thin and no-break
spaces), decimals, fractions and mixed numbers (also LaTeX's and Unicode's), powers and exponents, percent, currencies,
units, scales ("1.5 million") and be written in words. An expression to evaluate ("2 + 3"), an inequality, an interval
and algebra ("2x", "√2") are no number. Of a text with `\\boxed{...}` only the last box counts; a lead-in ("the answer
is") does not.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

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
_SCALE_NAMES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9}
_NUMBER_WORD = "|".join((*_SMALL, *_TENS, *_SCALE_NAMES))
_PHRASE = re.compile(
    rf"(-|minus |negative )?((?:{_NUMBER_WORD})(?:(?:[ -]| and )(?:{_NUMBER_WORD}))*)\b", re.IGNORECASE
)
_FRACTION_IN_WORDS = re.compile(rf"(?:({'|'.join(_SMALL)}|a)[ -])?({'|'.join(_PARTS)})s?\b", re.IGNORECASE)
_SHORT_UNIT = re.compile(r"%?(?: [^\W\d]+){0,2}[.!]?")


def in_digits(text: str) -> str:
    """The text with the number at its start in digits, if at most a unit of two words follows."""
    if re.search(r"\d", text):
        return text
    fraction = _FRACTION_IN_WORDS.match(text)
    if fraction is not None and _SHORT_UNIT.fullmatch(text[fraction.end() :]):
        top = _SMALL.get((fraction[1] or "a").casefold(), 1)
        return f"{top}/{_PARTS[fraction[2].casefold()]}{text[fraction.end() :]}"
    phrase = _PHRASE.match(text)
    if phrase is None or not _SHORT_UNIT.fullmatch(text[phrase.end() :]) or text[phrase.end() :].startswith(" of "):
        return text
    value = _spelled_value(re.split(r"[ -]+", phrase[2].casefold()))
    return text if value is None else f"{'-' if phrase[1] else ''}{value}{text[phrase.end() :]}"


def _spelled_value(names: list[str]) -> int | None:
    """The number that words spell; None for an order of words that no number has ("two three")."""
    total, part, last = 0, 0, ""
    for name in names:
        if name == "and":
            continue
        if name in _SCALE_NAMES:
            if name == "hundred":
                part = max(part, 1) * 100
            else:
                total, part = total + max(part, 1) * _SCALE_NAMES[name], 0
        elif (name in _SMALL and (last in _SMALL or part % 10)) or (name in _TENS and part % 100):
            return None
        else:
            part += _SMALL.get(name, _TENS.get(name, 0))
        last = name
    return total + part


AROUND = " \t\r\n\"'“”‘’`*_$"
ENDINGS = ".,;:!?"
# Longer runs of digits come from a model that repeats itself, and Python refuses to parse them.
_MOST_CHARACTERS = 1000
_MOST_DIGITS = 1000

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
_SUPERSCRIPT = re.compile(r"[⁺⁻]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+")
_BUILT_FRACTION = re.compile(r"(?<![⁰¹²³⁴⁵⁶⁷⁸⁹])([⁰¹²³⁴⁵⁶⁷⁸⁹]+)[⁄/∕]([₀₁₂₃₄₅₆₇₈₉]+)")
_BEFORE_VULGAR = re.compile(r"(?<=\d)(?=[¼-¾⅐-⅞])")
_DASHES = str.maketrans(dict.fromkeys("‐‑‒–—―−﹣－", "-"))
# Spaces that typesetting puts between groups of three digits.
_FIXED_SPACE = re.compile(r"(?<=\d)(?:[\u00a0\u2007-\u200a\u202f]|\\[,;:!])(?=\d{3}(?!\d))")
_LATEX_TEXT = re.compile(r"\\(?:text|textrm|textbf|textit|mathrm|mathbf|mathit|mbox|operatorname|emph)\s*\{([^{}]*)\}")
_LATEX_FRACTION = re.compile(r"\\[dtc]?frac\s*(?:\{([^{}]+)\}\s*\{([^{}]+)\}|(\d)\s*(\d)|(\d)\s*\{([^{}]+)\})")
_LATEX_NOISE = re.compile(r"\\left|\\right|\\displaystyle|\\[,!;: ]|\\\(|\\\)|\\\[|\\\]|\\quad")
TAG = re.compile(r"</?[A-Za-z][\w-]*>")
_QUOTED = re.compile(r"^\s*(?:>|#+(?=\s|\d|-))\s*", re.MULTILINE)
_EMPHASIS = re.compile(r"(?<!\w)([*_])(?=\S)([^*_]+)(?<=\S)\1(?!\w)")
_COMMAS = re.compile(r"(?<![\d,.])\d{1,3}(?:,\d{2,3})*,\d{3}(?![\d]|,\d)")
_POINTS = re.compile(r"(?<![\d.,])\d{1,3}(?:(?:\.\d{3}){2,}(?:,\d+)?|\.\d{3},\d+)(?![\d]|[.,]\d)")
_SPACES = re.compile(r"^([-+$€£¥₹ ]*\d{1,3}(?: \d{3})+)(?![\d]|\s*/|\s+\d)")
_SEPARATOR = re.compile(r"(?<=\d)['’_](?=\d{3}(?!\d))")
_PERCENT = re.compile(r"\s?(?:per\s?cent\b|pct\b|percentage\s+points?\b)", re.IGNORECASE)
_NEGATIVE = re.compile(r"\b(?:minus|negative)\s+(?=\d)", re.IGNORECASE)
_SPACED_DASH = re.compile(r"(?<=[^\W\d]{2}) - (?=\S)")
_CURRENCY_CODE = re.compile(r"\b(?:US|USD|AU|CA|A|C)\s?(?=\$)|\b(USD|EUR|GBP|JPY|INR|Rs)\b\.?\s?(?=\d)", re.IGNORECASE)
_CURRENCIES = {"$": "dollar", "€": "euro", "£": "pound", "¥": "yen", "₹": "rupee", "¢": "cent"}
_CODES = {"USD": "$", "EUR": "€", "GBP": "£", "JPY": "¥", "INR": "₹", "RS": "₹"}

_NUMBER = re.compile(
    r"""(?<![\w.])
    (?P<sign>[-+]?)\s?(?P<currency>[$€£¥₹]?)\s?(?P<inner_sign>-?)
    (?: (?P<whole>\d+)(?:\s+(?:and\s+|&\s*)?|-)(?P<mixed_top>\d+)\s*/\s*(?P<mixed_bottom>\d+)
      | (?P<top>\d+(?:\.\d+)?)\s*/\s*(?P<bottom>\d+(?:\.\d+)?)(?!\s*/\s*\d)
      | (?P<decimal>\d+(?:\.\d+)?|\.\d+)
        (?: e(?P<exponent>[-+]?\d+)
          | \s*[x×*]\s*10\s*\^\s*\{?(?P<power_of_ten>[-+]?\d+)\}?
          | \^\s*[{(]?(?P<power>[-+]?\d+)[)}]?
        )? (?!\w*\d)
    )
    (?:\s?(?P<scale>hundred|thousand|million|billion|trillion)s?\b|(?P<kilo>k)\b)?
    \s?(?P<percent>%?)\s?(?P<currency_after>[$€£¥₹¢]?)""",
    re.VERBOSE | re.IGNORECASE,
)
_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_UNIT_POWER = re.compile(r"(?<![\d.][eE])(?<=[^\W\d])\^?\s?\{?([23])\}?(?!\w)")
_UNIT = re.compile(r"[^\W\d]+[²³]?\.?(?:(?:\s*/\s*|\s*\^|[ -])[^\W\d]+[²³]?\.?){0,3}")
_ALGEBRA = re.compile(r"[abcefijnopqruvwxyzπθ](?![^\W\d])")
_MATHEMATICS = re.compile(
    r"[\\^√±<>≤≥≠∞π∪∩∈|+*/{}=]|\b(?:sqrt|log|ln|sin|cos|tan|pi)\b|(?<![^\W\d])[^\W\d]\s*\($", re.IGNORECASE
)
_UNIT_SLASH = re.compile(r"(?<=[^\W\d])\s*/\s*(?=[^\W\d])")
_OTHER_CLAIM = re.compile(r"\b(?:not|(?:more|less|greater|fewer|other)\s+than)\s*$", re.IGNORECASE)
_ASSIGNED = re.compile(r"(?<![^\W\d])([^\W\d])\s*=")
_EQUALS = re.compile(r"=|≈|≅|\\approx\b")
LEAD = re.compile(
    r"^(?:(?:so|thus|therefore|hence)\b,?\s*)?(?:(?:the|my)\s+)?(?:(?:final|correct|right)\s+)?answer\s*(?:is|=|:)+\s*",
    re.IGNORECASE,
)
"""Lead-ins of an answer."""
_ASSIGNMENT = re.compile(r"^(?:[^\W\d]\w?|\\?[A-Za-z]+_\{?\w+\}?)\s*=\s*(?=[^=]*$)", re.IGNORECASE)
_CONCLUSION = re.compile(
    r"\banswer\b[^\w\n]*(?:(?:is|would be|must be|equals)\b)?[^\w\n+\-$€£¥₹.√\\]*|\b(?:so|thus|therefore|hence)\b,?",
    re.IGNORECASE,
)
_REASON = re.compile(r"[.;,!?](?=\s|$)|\b(?:because|since|as|which|where)\b|\n", re.IGNORECASE)
_FILLERS = frozenset({"about", "more", "total", "in", "of", "the", "a", "left", "each", "only", "per", "altogether"})
_SYNONYMS = {
    "usd": "dollar", "buck": "dollar", "eur": "euro", "gbp": "pound", "jpy": "yen", "inr": "rupee", "rs": "rupee",
    "kilometer": "km", "kilometre": "km", "meter": "m", "metre": "m", "centimeter": "cm", "centimetre": "cm",
    "millimeter": "mm", "millimetre": "mm", "kilogram": "kg", "gram": "g", "hour": "h", "hr": "h", "minute": "min",
    "second": "s", "sec": "s", "liter": "l", "litre": "l", "milliliter": "ml", "millilitre": "ml", "feet": "foot",
    "ft": "foot", "inche": "inch", "mph": "mile", "yr": "year", "sq": "square",
}  # fmt: skip


class Quantity(NamedTuple):
    """A number in a text. `is_only`: the text contains nothing else but its unit and a lead-in. `unit`: the currency or
    the words of the unit, in the singular. 50% has the value 50. `scale`: the factor from a word after the number,
    already contained in `value`; 1 without one.
    """

    value: Fraction
    is_percent: bool
    unit: frozenset[str]
    is_only: bool
    scale: int = 1


def quantity(text: str) -> Quantity | None:
    """The number that a text states; None if it states none, or several.

    Of several numbers the one counts that is alone on the first line; else the one after the last "answer is", "so" or
    "therefore"; else the one after the last "=". A fraction over 0 is no number.
    """
    if len(text) > 20 * _MOST_CHARACTERS:
        return None
    plain = plain_number(text)
    found = _only(plain)
    if found is not None or not re.search(r"\d", plain):
        return found
    first, newline, _ = plain.partition("\n")
    if newline and (found := _only(first)) is not None and found.is_only:
        return found
    conclusions = list(_CONCLUSION.finditer(plain))
    if conclusions and (found := _only(_REASON.split(plain[conclusions[-1].end() :].strip())[0])) is not None:
        return found._replace(is_only=False)
    if len(set(_ASSIGNED.findall(plain))) > 1:
        return None
    for part in reversed(_EQUALS.split(plain)[1:]):
        if _NUMBER.search(part):
            found = _only(part.strip())
            return None if found is None else found._replace(is_only=found.is_only and newline == "")
    return None


def boxed(text: str) -> str:
    r"""The content of the text's last `\boxed{...}`; the text itself if there is none, or an unclosed one."""
    start = max(text.rfind(r"\boxed{"), text.rfind(r"\fbox{"))
    if start < 0:
        bare = re.findall(r"\\boxed\s+(\S+)", text)
        return bare[-1].rstrip("$.") if bare else text
    first, depth = text.index("{", start) + 1, 1
    for position in range(first, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[first:position]
    return text


def plain_latex(text: str) -> str:
    r"""The text with LaTeX's text, spaces and plain fractions as plain text: `\frac{3}{4}` becomes 3/4."""
    plain = _LATEX_NOISE.sub(" ", _LATEX_TEXT.sub(r" \1", text))
    plain = _LATEX_FRACTION.sub(_fraction, plain)
    return re.sub(r"\^\s*\{?\\circ\}?|\\degree", "°", plain)


def plain_unicode(text: str) -> str:
    """The text in Unicode's compatibility forms, without losing meaning: 10⁶ becomes 10^6, 1½ becomes 1 1/2."""
    plain = _BUILT_FRACTION.sub(lambda found: f" {unicodedata.normalize('NFKC', found[0])}", text)
    plain = _SUPERSCRIPT.sub(lambda found: "^" + found[0].translate(_SUPERSCRIPTS), _BEFORE_VULGAR.sub(" ", plain))
    return unicodedata.normalize("NFKC", plain).replace("⁄", "/").replace("∕", "/").translate(_DASHES)


def plain_number(text: str) -> str:
    """The text with its numbers as `_NUMBER` reads them, and without marks and lead-ins."""
    plain = plain_unicode(_FIXED_SPACE.sub("", TAG.sub(" ", boxed(text))))
    plain = plain_latex(plain.replace(r"\%", "%").replace(r"\$", "$").replace("{,}", ","))
    plain = re.sub(r"\\times\b|\\cdot\b|·", "*", re.sub(r"(?<=\d)\*\*(?=[-\d])", "^", plain))
    plain = _EMPHASIS.sub(r"\2", plain.replace("**", "").replace("__", "").replace("`", ""))
    plain = re.sub(r"\$([^$\n]+)\$", r" \1 ", plain.replace("$$", " "))
    plain = re.sub(r"^\s*\{([^{}]*)\}\s*$", r"\1", plain)
    plain = _QUOTED.sub("", plain).replace("°C", " celsius").replace("°F", " fahrenheit").replace("°", " degree")
    plain = _CURRENCY_CODE.sub(lambda found: _CODES[found[1].upper()] if found[1] else "", plain)
    plain = _SPACED_DASH.sub(" : ", _NEGATIVE.sub("-", _PERCENT.sub("%", plain))).strip(AROUND.replace("$", ""))
    plain = _ASSIGNMENT.sub("", LEAD.sub("", plain)).strip(AROUND.replace("$", ""))
    plain = _COMMAS.sub(lambda found: found[0].replace(",", ""), plain)
    plain = _POINTS.sub(lambda found: found[0].replace(".", "").replace(",", "."), plain)
    plain = _SPACES.sub(lambda found: re.sub(r"(?<=\d) (?=\d)", "", found[0]), _SEPARATOR.sub("", plain))
    return in_digits(plain)


def _fraction(found: re.Match[str]) -> str:
    top, bottom = found[1] or found[3] or found[5], found[2] or found[4] or found[6]
    number = r"\s*-?\s*\d+(?:\.\d+)?\s*"
    if re.fullmatch(number, top) and re.fullmatch(number, bottom):
        return f" {top.strip()}/{bottom.strip()}"
    return f"({top})/({bottom})"


def _only(plain: str) -> Quantity | None:
    """The only number of a text; None if there is none, several of different values, or mathematics around it."""
    found = list(_NUMBER.finditer(plain := _UNIT_POWER.sub(lambda power: "²³"[int(power[1]) - 2], plain)))
    if not found or (len(found) > 1 and not _all_the_same(found, plain)):
        return None
    match = found[0]
    value, before, after = _value_of_match(match), plain[: match.start()], plain[found[-1].end() :]
    behind = _UNIT_SLASH.sub(" ", after)
    if value is None or _OTHER_CLAIM.search(before) or _MATHEMATICS.search(before) or _MATHEMATICS.search(behind):
        return None
    if _ALGEBRA.match(after.lstrip()) and not match["percent"]:
        return None
    led, unit = before.strip(AROUND + ENDINGS + "([~"), after.strip(AROUND + ENDINGS + ")]")
    is_only = len(found) == 1 and not led and (not unit or _UNIT.fullmatch(unit) is not None)
    names = [_singular(name) for name in re.split(r"[ /.-]+", unit.casefold()) if name] if is_only else []
    names += [_CURRENCIES[symbol] for symbol in (match["currency"], match["currency_after"]) if symbol]
    scale = _SCALES[match["scale"].casefold()] if match["scale"] else 1000 if match["kilo"] else 1
    return Quantity(value * scale, bool(match["percent"]), frozenset(names) - _FILLERS, is_only, scale)


def _all_the_same(found: list[re.Match[str]], plain: str) -> bool:
    """Whether a text repeats one number, with words between: "42 apples. She has 42"."""
    between = [plain[one.end() : other.start()] for one, other in pairwise(found)]
    names = [set(re.findall(r"[^\W\d]{2,}", each.casefold())) - {"and", "or", "to"} for each in between]
    return len({_value_of_match(match) for match in found}) == 1 and all(names)


def _value_of_match(match: re.Match[str]) -> Fraction | None:
    if len(match[0]) > _MOST_CHARACTERS:
        return None
    value: Fraction | None
    if match["whole"] is not None:
        bottom = Fraction(match["mixed_bottom"])
        value = Fraction(match["whole"]) + Fraction(match["mixed_top"]) / bottom if bottom else None
    elif match["top"] is not None:
        bottom = Fraction(match["bottom"])
        value = Fraction(match["top"]) / bottom if bottom else None
    elif match["power"] is not None:
        value = _power(Fraction(match["decimal"]), int(match["power"]))
    else:
        ten = _power(Fraction(10), int(match["exponent"] or match["power_of_ten"] or 0))
        value = None if ten is None else Fraction(match["decimal"]) * ten
    negative = (match["sign"] == "-") != (match["inner_sign"] == "-")
    return -value if value is not None and negative else value


def _power(base: Fraction, exponent: int) -> Fraction | None:
    """base ^ exponent; None if it has more than `_MOST_DIGITS` digits, and for 0 to a negative power."""
    digits = len(str(max(abs(base.numerator), base.denominator)))
    if abs(exponent) * digits > _MOST_DIGITS * 2 or (base == 0 and exponent < 0):
        return None
    return base**exponent


def _singular(name: str) -> str:
    singular = name[:-1] if len(name) > 3 and name.endswith("s") and not name.endswith("ss") else name
    return _SYNONYMS.get(singular, singular)


__all__ = ["automatic", "boxed", "choice", "exact", "normalize", "numeric", "quantity", "vote_key"]

_PYTHON_POWER = re.compile(r"(?<=[\w)])\*\*(?=-?\d)")
_LATEX_SIGNS = {
    r"\cdot": "*", r"\times": "*", r"\pi": "π", r"\le": "≤", r"\leq": "≤", r"\ge": "≥", r"\geq": "≥", r"\neq": "≠",
    r"\ne": "≠", r"\pm": "±", r"\infty": "∞", r"\cup": "∪", r"\cap": "∩", r"\theta": "θ", r"\sqrt": "√",
    r"\{": "{", r"\}": "}", r"\approx": "≈", r"\in": "∈",
}  # fmt: skip
_MATHEMATICAL = re.compile(r"[\d=+*/^<>≤≥≠±√π∞|{}\[\]()]")
_YES_OR_NO = ("yes", "no", "true", "false")

_LONE_CHOICE = re.compile(r"\(?([A-Z])\)?[.:]?|\(([a-z])\)")
_LABELED = re.compile(r"(?:\(([A-Za-z])\)|([A-Z])\))\s+(\S.*)", re.DOTALL)
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
_CHOICE_STATED = re.compile(
    r"\b(?i:answer|option|choice|choose|pick|select)s?\b[\s:=*\"'–—-]*"
    r"(?i:(?:is|would\s+be|must\s+be|should\s+be|was)\b[\s:=*\"']*)?"
    r"(?i:(?:the\s+)?(?:option|choice|letter|answer)\b[\s:=*\"']*)?"
    rf"{_LETTER}(?![\w'’])"
)
_CHOICE_BRACKETED = re.compile(r"\(([A-Z])\)")
_NOT_CHOSEN = re.compile(
    r"\b(?:not|isn't|never|wrong|incorrect|rather\s+than|instead\s+of)\b[^.\n]{0,12}$", re.IGNORECASE
)

# Another letter next to the first one: "A or B", "A, B and C".
_SEVERAL = re.compile(r"[\[({*]*[A-Z][\])}*]*\s*(?:,|/|&|\b(?:or|and)\b)\s*[\[({*]*[A-Z](?![\w'’])")


def normalize(text: str) -> str:
    """The text without what does not change an answer: letter case, white space, Unicode's compatibility forms, quotes,
    Markdown and LaTeX marks around it, lead-ins, punctuation at the end.
    """
    plain = plain_unicode(plain_latex(TAG.sub(" ", boxed(text)))).casefold()
    plain = _PYTHON_POWER.sub("^", plain).replace("**", "")
    plain = " ".join(plain.split()).removeprefix(r"\(").removesuffix(r"\)")
    while plain != (stripped := LEAD.sub("", plain.strip(AROUND).rstrip(ENDINGS))):
        plain = stripped
    return plain


def exact(actual: str, expected: str) -> bool:
    """Equal after `normalize`, mathematics also without spaces. If one line is expected, the first line of several
    counts; if yes, no, true or false is, the first word of a sentence counts.
    """
    target = normalize(expected)
    forms = [normalize(actual)]
    if "\n" not in expected.strip() and "\n" in actual.strip():
        forms.append(normalize(actual.strip().partition("\n")[0]))
    if target in forms:
        return True
    if target in _YES_OR_NO:
        return any(re.match(rf"{target}(?=[.,;:!?\n—-]|\s+-|$)", each) is not None for each in forms)
    return bool(_MATHEMATICAL.search(target)) and _squeezed(target) in map(_squeezed, forms)


def numeric(actual: str, expected: str, *, tolerance: float = 1e-6) -> bool:
    """|actual − expected| <= tolerance · |expected| (for an expected 0: <= tolerance), for two texts with one number
    each.

    If both have a unit, they must share a word of it. 50% equals 0.5, and 50 too, since the sign is often omitted;
    likewise "million" of 1.5 million. 50 cents are 0.5 dollars.
    """
    found, target = quantity(actual), quantity(expected)
    if found is None or target is None:
        return False
    # By its decimal form: 0.03 as a binary number is slightly less, and 103 must be within 0.03 of 100.
    allowed = Fraction(str(tolerance))
    return any(abs(one - other) <= allowed * (abs(other) or 1) for one, other in _comparable(found, target))


def choice(actual: str, expected: str) -> bool:
    """The same letter of a multiple choice: "B", "(b)", "B) because ...", "the answer is: **B**"."""
    letter = _letter(actual)
    return letter is not None and letter == _letter(expected)


def automatic(actual: str, expected: str, *, tolerance: float = 1e-6) -> bool:
    """`numeric` if a number is expected, `choice` for a single capital letter, else `exact`. For a labeled choice such
    as "(B) Paris", label and text are both correct.
    """
    target = quantity(expected)
    if target is not None and target.is_only:
        return numeric(actual, expected, tolerance=tolerance) or exact(actual, expected)
    bare = boxed(expected).strip()
    if _LONE_CHOICE.fullmatch(bare):
        return choice(actual, expected)
    if exact(actual, expected):
        return True
    labeled = _LABELED.fullmatch(bare)
    return labeled is not None and (choice(actual, f"({labeled[1] or labeled[2]})") or exact(actual, labeled[3]))


def vote_key(answer: str) -> str:
    """The key that equal answers share when chains vote: the value of a number, the letter of a labeled choice, else
    the normal form.
    """
    found = quantity(answer)
    if found is not None and found.is_only:
        return f"{found.value}%" if found.is_percent else str(found.value)
    bare = boxed(answer).strip(AROUND)
    lone = _LONE_CHOICE.fullmatch(bare) or _LABELED.fullmatch(bare)
    return normalize(answer) if lone is None else str(lone[1] or lone[2]).casefold()


def _comparable(found: Quantity, target: Quantity) -> list[tuple[Fraction, Fraction]]:
    """The pairs of values to compare, for all possible meanings of the two; none if their units differ."""
    if found.unit and target.unit and not found.unit & target.unit:
        if {"cent"} <= found.unit and {"dollar"} <= target.unit:
            return [(found.value / 100, target.value)]
        if {"dollar"} <= found.unit and {"cent"} <= target.unit:
            return [(found.value * 100, target.value)]
        return []
    pairs = [(found.value, target.value)]
    if found.is_percent != target.is_percent:
        hundred = (found.value / 100, target.value) if found.is_percent else (found.value, target.value / 100)
        pairs.append(hundred)
    if (found.scale == 1) != (target.scale == 1):
        pairs.append((found.value / found.scale, target.value / target.scale))
    return pairs


def _squeezed(normal: str) -> str:
    """Mathematics in one notation: without spaces, LaTeX symbols as Unicode, no brackets around single tokens."""
    plain = re.sub(r"\\[a-z]+|\\[{}]", lambda found: _LATEX_SIGNS.get(found[0], found[0]), normal)
    plain = re.sub(r"\bsqrt\b", "√", re.sub(r"\bpi\b", "π", plain))
    plain = re.sub(
        r"(?<!\w)\s+|\s+(?!\w)", "", re.sub(r"<=", "≤", re.sub(r">=", "≥", plain)).replace("$", "").replace("·", "*")
    )
    plain = re.sub(r"([\^√])[{(](-?\w+)[)}]", r"\1\2", plain)
    plain = re.sub(r"(?<![a-z√])\((\w+)\)/\(?(\w+)\)?(?!\w)", r"\1/\2", plain)
    return re.sub(r"\*(?=[a-zπ√(])|(?<=[a-zπ)])\*(?=\d)", "", plain)


def _letter(text: str) -> str | None:
    """The letter that a text chooses; None if it chooses none, or several."""
    plain = TAG.sub(" ", plain_latex(boxed(text))).strip(AROUND)
    first = plain.partition("\n")[0].strip(AROUND)
    for each in (plain, first):
        for form in _CHOICE_FORMS:
            found = form.fullmatch(each)
            if found is not None and not _SEVERAL.match(each):
                return found[1].upper()
    matches = list(_CHOICE_STATED.finditer(plain)) or list(_CHOICE_BRACKETED.finditer(plain))
    chosen = {
        found[1].upper()
        for found in matches
        if not _NOT_CHOSEN.search(plain, max(0, found.start(1) - 40), found.start(1))
    }
    are_one = len(chosen) == 1 and not any(_SEVERAL.match(plain, found.start(1)) for found in matches)
    return chosen.pop() if are_one else None
