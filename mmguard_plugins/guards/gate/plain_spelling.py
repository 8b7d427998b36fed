"""Spellings undone: letters turned into digits, words pulled apart, texts turned round.

All of it is guesswork over English words, so each change needs words that are known to come out.
"""

from __future__ import annotations

import codecs
import math
import re
from collections import Counter
from itertools import islice, pairwise, product

from mmguard_plugins.guards.gate.plain_words import WORDS

_LONGEST = 14  # letters of a word in a run without gaps
_SEGMENTED = 20_000  # letters cut into words; what follows in so long a run is joined without gaps
_FEWEST = 4  # letters of a run that is spelled out

_LEET = {
    "0": "o", "1": "il", "2": "z", "3": "e", "4": "a", "5": "s", "6": "gb", "7": "t", "8": "b",
    "9": "g", "@": "a", "$": "s", "!": "il", "|": "li", "+": "t", "(": "c", "€": "e",
}  # fmt: skip
_SIGNS = "0-9@$!|+(€"
_LEET_WORD = re.compile(rf"(?<![\w@$!|+(€/.=&#%:\\])[A-Za-z{_SIGNS}]++(?![\w/=&#%\\])")
_COUNTED = re.compile(r"\$?\d+[A-Za-z]{0,3}|[A-Za-z]{1,4}\d+|[A-Za-z]+[!(|+]*|\W*|\d+[x-]\d+")
_PAIRS = {
    pair: math.log(count)
    for pair, count in Counter(w[at : at + 2] for w in WORDS for at in range(len(w) - 1)).items()
}
_LETTER = rf"[A-Za-z{_SIGNS}]"
_SIGN_OR_LETTER = rf"[A-Za-z{_SIGNS}'’\",;:.?-]"
_SPACED = re.compile(
    rf"(?<![^\s\"'(:]){_LETTER}(?:(?: {{1,4}}|\n){_SIGN_OR_LETTER}(?![A-Za-z0-9])){{3,}}+"
)
_GAP = re.compile(r" {2,}|\n")
_PULLED = re.compile(
    rf"(?<![A-Za-z0-9.*_/|~+-])({_LETTER})([.*_/|~+-])"
    rf"({_LETTER}(?:\2{_SIGN_OR_LETTER})*+)(?![A-Za-z0-9])"
)
_HYPHENATED = re.compile(r"(?<![A-Za-z])([A-Za-z]{2,}+)-\r?\n[ \t]*([a-z]{2,})")
_EMPHASIS = re.compile(r"(?<=[A-Za-z])(?:\*{1,3}|_{2})(?=[A-Za-z])")
# Pairs that tell a text from its words in reverse order.
_IN_ORDER = re.compile(
    r"\b(?:(?:of|in|to|on|for|with|from|at|is|into) (?:an?|the)|(?:how|want|used|need) to|can be)\b"
)
_STRETCH = re.compile(r"[^\n:\".?]{1,2000}+")
_ENGLISH = re.compile(r"[a-z]+")


def respelled(text: str) -> str:
    """Return the text with words joined that were pulled apart, and digits read as letters."""
    return _without_leet(_joined(text))


def turned(text: str) -> str:
    """Return the text with those stretches turned round that are English only then."""
    return _STRETCH.sub(_turned_stretch, text)


def english_share(text: str) -> float:
    """Return the share of letters that stand in known words, in 0..1."""
    words = _ENGLISH.findall(text.lower())
    letters = sum(map(len, words))
    return sum(len(word) for word in words if word in WORDS) / letters if letters else 0.0


def _turned_stretch(found: re.Match[str]) -> str:
    given = found[0]
    if given.count(" ") < 2:
        return given
    least = english_share(given) + 0.3
    if least > 1:
        return given
    ways = (codecs.encode(given, "rot13"), given[::-1], codecs.encode(given[::-1], "rot13"),
            " ".join(word[::-1] for word in given.split(" ")))  # fmt: skip
    best = max(ways, key=lambda way: (english_share(way), len(_IN_ORDER.findall(way))))
    return best if english_share(best) >= max(least, 0.45) else given


def _joined(text: str) -> str:
    text = _HYPHENATED.sub(_without_break, text)
    text = _EMPHASIS.sub(lambda _: "", text) if "**" in text or "__" in text else text
    pulled = [m for m in islice(_PULLED.finditer(text), 200) if _is_word_pulled_apart(m)]
    if pulled:
        signs = {m[2] for m in pulled}
        text = _PULLED.sub(lambda m: _together(m) if m[2] in signs else m[0], text)
    return _SPACED.sub(_from_spaced, text)


def _without_break(found: re.Match[str]) -> str:
    word = found[1] + found[2]
    return word if word.lower() in WORDS else found[0]


def _together(found: re.Match[str]) -> str:
    return found[0][::2]


def _is_word_pulled_apart(found: re.Match[str]) -> bool:
    word = _together(found)
    if len(word) < 3 or (word.isupper() and len(word) < 6):
        return False
    return bool({word.lower(), *_unleet(word)} & WORDS) or (len(word) > 6 and not word.isupper())


def _from_spaced(found: re.Match[str]) -> str:
    given = found[0]
    if sum(c.isalpha() for c in given) < _FEWEST:
        return given
    words = [word.replace(" ", "") for word in _GAP.split(given)]
    if len(words) > 1 and len(words) * 2 <= sum(map(len, words)):
        joined = " ".join(words)
    else:
        joined = _segmented("".join(words))
    known = english_share(_without_leet(joined, sure=True))
    if any(len(word) > 2 for word in joined.split()) and known >= 0.6:
        return joined
    return given


def _segmented(run: str) -> str:
    """Cut a run of letters into the fewest known words, counting what is in none as a loss."""
    letters = run[:_SEGMENTED].lower()
    letters = "".join(_LEET.get(c, c)[0] for c in letters)
    cost = [0.0]
    start = [0]
    for end in range(1, len(letters) + 1):
        best, at = cost[end - 1] + 4.0, end - 1
        for begin in range(max(0, end - _LONGEST), end):
            if cost[begin] + 1.0 < best and letters[begin:end] in WORDS:
                weight = 1.0 + (1.5 if end - begin < 3 else 0.0)
                if cost[begin] + weight < best:
                    best, at = cost[begin] + weight, begin
        cost.append(best)
        start.append(at)
    cuts = [len(letters)]
    while cuts[-1]:
        cuts.append(start[cuts[-1]])
    cuts.reverse()
    words = [run[a:b] for a, b in pairwise(cuts)]
    return " ".join(words) + run[_SEGMENTED:]


def _without_leet(text: str, *, sure: bool = False) -> str:
    """Read digits and signs as letters where words come out; `sure` says that they are no numbers.

    One word of some length decides for all of them, since a lone "t0" or "4" proves nothing.
    """
    words = {m[0] for m in _LEET_WORD.finditer(text)}
    odd = {word for word in words if not word.isalpha()}
    readings = {word: _unleet(word) for word in odd}
    known = {w: next((r for r in found if r in WORDS), "") for w, found in readings.items()}
    proofs = 9 if sure else sum(_proves(word, plain) for word, plain in known.items())
    if not proofs:
        return text
    for word, found in readings.items():
        if not known[word] and found and any(c.isalpha() for c in word):
            known[word] = "" if _COUNTED.fullmatch(word) else max(found, key=_likeness)
        elif word.isdigit() and (proofs < 2 or len(word) > 2):
            known[word] = ""
    return _LEET_WORD.sub(lambda m: _as_word(m[0], known.get(m[0], "")), text)


def _proves(word: str, plain: str) -> bool:
    return len(plain) > 3 and not _COUNTED.fullmatch(word)


def _as_word(word: str, plain: str) -> str:
    """Return the reading with the signs at the word's end that it left out."""
    return plain + word[len(plain) :] if plain else word


def _likeness(word: str) -> float:
    """Return how common the word's pairs of letters are in English, as a sum of logarithms."""
    return sum(_PAIRS.get(word[at : at + 2], 0.0) for at in range(len(word) - 1))


def _unleet(word: str) -> tuple[str, ...]:
    """Return what the word may read as, in lower case; signs at its end may be its punctuation."""
    whole = word.lower()
    bare = whole.rstrip("!|(+")
    found: list[str] = []
    for form in dict.fromkeys((whole, bare)):
        if form and not form.isalpha() and len(form) < 30:
            found += ["".join(way) for way in islice(product(*(_LEET.get(c, c) for c in form)), 16)]
        elif form.isalpha():
            found.append(form)
    return tuple(found)
