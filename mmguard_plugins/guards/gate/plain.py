"""Text as a reader means it: disguises from a classifier are undone before it is scored.

`plain` makes characters plain and changes no ordinary text; `readings` adds what the text may say
once it is decoded. The pieces are `plain_letters`, `plain_codes` and `plain_spelling`.
"""

from __future__ import annotations

import re

from mmguard_plugins.guards.gate.plain_codes import decoded
from mmguard_plugins.guards.gate.plain_letters import clean
from mmguard_plugins.guards.gate.plain_spelling import respelled, turned
from mmguard_plugins.guards.gate.plain_words import WORDS

_ORDINARY = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz \t\r\n.,;:'\"?-()"
_LONG = 12  # letters of a word that may be encoded
_ENGLISH = 0.85  # share of known words above which no stretch of a short text is turned round
_LEET = re.compile(r"[0-9@$|!+][A-Za-z]|[A-Za-z][0-9@$]|\*\*|__")
_BETWEEN_LETTERS = re.compile(r"[.*_/|~+-][A-Za-z0-9@$!][.*_/|~+-]")


def plain(text: str) -> str:
    """Return the text with unseen characters gone and letters of odd shape made plain.

    Every visible letter, digit and sign is still there, if in plainer shape; marks piled on a
    letter are not. Text hidden in tag characters and selectors follows at the end. Applied twice it
    changes nothing more. It never raises, takes linear time, and writes at most four characters for
    one.
    """
    return clean(text)


def readings(text: str) -> tuple[str, ...]:
    """Return what the text may say: `plain(text)`, then up to three readings that undo more.

    Each goes on from the one before: encodings decoded, English turned round or shifted by thirteen
    letters turned back, spelled-out words and digits for letters put right. Ordinary text in any
    language has one reading. Undoing the latter two knows English only.
    """
    found = [clean(text)]
    coded, turn, spelled = _worth_a_look(found[0])
    if coded:
        _add(found, decoded(found[-1]))
    if len(found) > 1:
        _, turn, spelled = _worth_a_look(found[-1])
    if turn:
        _add(found, turned(found[-1]))
    if spelled:
        _add(found, respelled(found[-1]))
    return tuple(found)


def _add(found: list[str], reading: str) -> None:
    if (reading := clean(reading)) != found[-1]:
        found.append(reading)


def _worth_a_look(text: str) -> tuple[bool, bool, bool]:
    """Say whether the text may be encoded, turned round, or oddly spelled; cheap on prose."""
    raw = text.encode("ascii", "replace")
    words = text.split()
    sizes = list(map(len, words))
    signs = raw.translate(None, _ORDINARY)
    coded = max(sizes, default=0) >= _LONG or b"&#" in signs or b"%" in signs or b"=" in signs
    coded = coded or sum(map(signs.count, b"0123456789")) >= _LONG
    spelled = (
        (bool(signs) and bool(_LEET.search(text)))
        or sizes.count(1) > 3
        or "-\n" in text
        or bool(_BETWEEN_LETTERS.search(text))
    )
    known = sum(map(WORDS.__contains__, raw.lower().decode().split()))
    turn = len(words) > 2 and (known < len(words) * _ENGLISH)
    return coded, turn, spelled
