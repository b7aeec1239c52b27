"""Bytes that are not UTF-8 → the encoding that they may be in, for a hint.

Enters: the line with the first byte that does not fit. Leaves: a name for `data.encoding`, or nothing. A guess is never
used to read: a wrong one trains on garbled text. Each candidate decodes the line; the one whose characters beyond ASCII
are most often those that its languages write wins, the earlier one where two are equal.
"""

from __future__ import annotations

import re

_LATIN = "À-ÖØ-öø-ÿŒœŠšŽžŸ€‘’“”„–—…•™«»°§£©®¡¿ªº·´¨×±²³½¼¾µ\u00a0"
_CANDIDATES: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("cp1252", re.compile(f"[{_LATIN}]")),
    ("mac_roman", re.compile(f"[{_LATIN}]")),
    ("cp1250", re.compile(f"[{_LATIN}ĄąĆćĘęŁłŃńŚśŹźŻżČčĎďĚěŇňŘřŤťŮůŐőŰűĂăŞşŢţ]")),
    ("cp1251", re.compile("[А-яЁёІіЇїЄєҐґ№«»–—…“”„’\u00a0]")),
    ("koi8_r", re.compile("[А-яЁё]")),
    ("shift_jis", re.compile("[ぁ-んァ-ヶー一-龠々、。「」・！？（）]")),
    ("euc_kr", re.compile("[가-힣]")),
    ("gb18030", re.compile("[一-龠，。！？、：；（）“”《》…—]")),
    ("big5", re.compile("[一-龠，。！？、：；（）「」]")),
)
_CYRILLIC = ("cp1251", "koi8_r")
_WESTERN = ("cp1252", "mac_roman", "cp1250")
_SAMPLE_BYTES = 1 << 16


def guessed_encoding(raw: bytes) -> str | None:
    """The encoding that `raw`, which is not UTF-8, is most likely in; None where none fits."""
    best, most = None, 0.0
    sample = raw[:_SAMPLE_BYTES]
    for name, expected in _CANDIDATES:
        try:
            text = sample.decode(name)
        except UnicodeDecodeError:
            continue
        beyond = [place for place, character in enumerate(text) if character > "\x7f"]
        score = sum(_is_expected(text, place, expected) for place in beyond) / max(1, len(beyond))
        if name in _WESTERN:
            score -= _runs(text, beyond)
        if name in _CYRILLIC:
            # Each reads the other's small letters as capitals.
            score -= 0.5 * sum(text[place].isupper() for place in beyond) / max(1, len(beyond))
        if score > most + 1e-9:
            best, most = name, score
    return best if most >= 0.5 else None


def _is_expected(text: str, place: int, expected: re.Pattern[str]) -> bool:
    """Whether the character at `place` is one that these languages write there: a sign such as ³ is none in a word."""
    character, beside = text[place], text[place - 1 : place] + text[place + 1 : place + 2]
    is_sign_in_word = not character.isalpha() and character not in "’-" and len(beside) == 2 and beside.isalpha()
    return expected.match(character) is not None and not is_sign_in_word


def _runs(text: str, beyond: list[int]) -> float:
    """The share of letters beyond ASCII with another one on both sides: high for any alphabet that is not Latin."""
    letters = {place for place in beyond if text[place].isalpha()}
    return sum(place - 1 in letters and place + 1 in letters for place in letters) / max(1, len(beyond))
