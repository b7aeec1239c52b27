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
        score = sum(expected.match(text[place]) is not None for place in beyond) / max(1, len(beyond))
        if name in _WESTERN:
            score -= _runs(text, beyond) + _signs_in_words(text, beyond)
        if name in _CYRILLIC:
            # Each reads the other's small letters as capitals.
            score -= 0.5 * sum(text[place].isupper() for place in beyond) / max(1, len(beyond))
        if score > most + 1e-9:
            best, most = name, score
    return best if most >= 0.5 else None


def _signs_in_words(text: str, beyond: list[int]) -> float:
    """The share of characters beyond ASCII that are signs, such as ³, between two letters."""
    beside = {place: text[place - 1 : place] + text[place + 1 : place + 2] for place in beyond}
    in_words = [place for place in beyond if len(beside[place]) == 2 and beside[place].isalpha()]
    signs = [place for place in in_words if not text[place].isalpha() and text[place] not in "’–"]
    return len(signs) / max(1, len(beyond))


def _runs(text: str, beyond: list[int]) -> float:
    """The share of letters beyond ASCII with another one on both sides: high for any alphabet that is not Latin."""
    letters = {place for place in beyond if text[place].isalpha()}
    return sum(place - 1 in letters and place + 1 in letters for place in letters) / max(1, len(beyond))
