"""Characters made plain: what is unseen goes, what looks like a Latin letter becomes one.

Letters of other scripts stay where they are that script's own words, joiners stay where a script or
an emoji needs them, and accents stay unless they are piled up.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

from mmguard_plugins.guards.gate.plain_words import WORDS

_MOST_LETTERS_FOR_ONE = 4  # U+FDFA would become 18 characters; a megabyte of it must not grow so
_PASSES = 4  # a fold may bring two characters together that fold again

# Pairs of look-alike and Latin letter, by script; letters with no Latin twin prove real words.
_TWINS = {
    "CYRILLIC": "аaвbеeзzгrіiїiјjкkмmоoпnрpсcтtуyхxһhѕsԁdԛqԝwьbѵvєe"
    "АAВBЕEЅSІIЈJКKМMНHОOРPСCТTУYХXҮYԌGЗ3",
    "GREEK": "αaβbγyεeηnιiκkνvοoρpσoτtυuχxωwΑAΒBΕEΖZΗHΙIΚKΜMΝNΟOΡPΤTΥYΧXϲcϳj",
    "ARMENIAN": "աwցgհhոnսuօoյjքpղnՕOՍUԼLլlզqէtՏS",
    "CHEROKEE": "ᎠDᎡRᎢTᎥiᎩYᎪAᎫJᎬEᎳWᎷMᎻHᎾOᏀGᏂhᏃZᏎ4ᏏbᏒRᏔWᏕSᏙVᏚSᏞLᏟCᏢPᏦKᏧdᏴB",
}
_LATIN_TWIN = {
    ord(twins[at]): twins[at + 1] for twins in _TWINS.values() for at in range(0, len(twins), 2)
}
_LOOK_ALIKES = frozenset(map(chr, _LATIN_TWIN))
_SMALL_CAPITALS = dict(
    zip("ᴀʙᴄᴅᴇꜰɢʜɪᴊᴋʟᴍɴᴏᴘʀꜱᴛᴜᴠᴡʏᴢıȷɑɡ", "abcdefghijklmnoprstuvwyzijag", strict=True)
)
_ODD_SPACES = {0x2800: " ", 0x1680: " ", 0x2028: "\n", 0x2029: "\n"}
_CONTROLS = {code: "\n" if code in (0x0B, 0x0C, 0x85) else "" for code in range(0xA0)
             if unicodedata.category(chr(code)) == "Cc" and chr(code) not in "\t\n\r"}  # fmt: skip
_UNSEEN = frozenset(
    "\u00ad\u034f\u115f\u1160\u17b4\u17b5\u180e\u200b\u200e\u200f\u061c\u3164\ufeff\uffa0"
) | frozenset(map(chr, [*range(0x202A, 0x202F), *range(0x2060, 0x2070), *range(0xFFF0, 0xFFFC),
                        *range(0x1BCA0, 0x1BCA4), *range(0x1D173, 0x1D17B)]))  # fmt: skip

_ASCII_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_SPECIAL = re.compile("[\u200c\u200d\ufe00-\ufe0f\U000e0000-\U000e01ef]")
# A joiner has a use after a letter or vowel sign of a script from Arabic to Balinese.
_IDLE_JOINER = re.compile(r"(?<![\u0600-\u109f\u1780-\u1bff\ua800-\uabff])[\u200c\u200d]|"
                          r"(?<=[\u200c\u200d])[\u200c\u200d]")  # fmt: skip
_EMOJI_JOINER = re.compile(
    r"(?<=[\u2190-\u2bff\ufe0f\U0001f000-\U0001faff])\u200d(?=[\u2190-\u2bff\U0001f000-\U0001faff])"
)
_EMOJI_STYLE = re.compile(r"([\u00a9\u00ae\u203c-\u3299\U0001f000-\U0001faff])([\ufe0e\ufe0f])|"
                          r"([0-9#*])(\ufe0f)(?=\u20e3)")  # fmt: skip
_SELECTOR = re.compile("[\ufe00-\ufe0f\U000e0100-\U000e01ef]")
_FLAG = re.compile("\U0001f3f4\U000e0067\U000e0062(?:\U000e0065\U000e006e\U000e0067|"
                   "\U000e0073\U000e0063\U000e0074|\U000e0077\U000e006c\U000e0073)"
                   "\U000e007f")  # fmt: skip
_TAG = re.compile("[\U000e0000-\U000e007f]")
_MARK = (
    "\u0300-\u036f\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20df\u20e1-\u20e2\u20e4-\u20ff\ufe20-\ufe2f"
)
_PILE = re.compile(rf"[{_MARK}]{{2}}|[\u0334-\u0338]")
_MARKED_WORD = re.compile(rf"[\w{_MARK}]++")
_MARKS = re.compile(rf"[{_MARK}]")
_WORD = re.compile(r"[^\W\d_]+(?:[^\W_]+)?")
_SINGLE_INDICATORS = re.compile(
    "(?<![\U0001f1e6-\U0001f1ff])[\U0001f1e6-\U0001f1ff](?:[ \u200b]+[\U0001f1e6-\U0001f1ff])+"
    "(?![\U0001f1e6-\U0001f1ff])|[\U0001f1e6-\U0001f1ff]{3,}"
)
_SURROGATE = re.compile("[\ud800-\udfff]")
_KEEP = "\ud800"  # stands for what is kept for a moment; the text has lost its own by then


def clean(text: str) -> str:
    """Return the text with every visible letter kept and made plain; what tags hid follows it."""
    if text.isascii():
        return _ASCII_CONTROL.sub(_control, text) if _ASCII_CONTROL.search(text) else text
    for _ in range(_PASSES):
        cleaned = _clean_once(text)
        if cleaned == text:
            break
        text = cleaned
    return text


def _control(found: re.Match[str]) -> str:
    return _CONTROLS[ord(found[0])]


def _clean_once(text: str) -> str:
    hidden = ""
    if _SPECIAL.search(text):
        text, hidden = _without_specials(text)
    characters = set(text)
    folds = {ord(c): fold for c in characters if (fold := _fold(c)) is not None}
    if folds:
        text = text.translate(folds)
    text = unicodedata.normalize("NFC", text)
    if not text.isascii():
        if any("\u0300" <= c <= "\ufe2f" and unicodedata.combining(c) for c in characters):
            text = _without_piles(text)
        if any(c in characters for c in "\U0001f1e6\U0001f1ea\U0001f1ee\U0001f1f4\U0001f1fa"):
            text = _SINGLE_INDICATORS.sub(_from_indicators, text)
        if not characters.isdisjoint(_LOOK_ALIKES):
            text = _in_latin(text)
    return f"{text} {hidden}" if hidden else text


@lru_cache(maxsize=16384)
def _fold(character: str) -> str | None:
    """Return what stands for the character, None for itself."""
    code = ord(character)
    if code < 0xA0:
        return _CONTROLS.get(code)
    if character in _UNSEEN:
        return ""
    if 0xD800 <= code < 0xE000:
        return "\ufffd"
    if 0x1F150 <= code <= 0x1F189 and (code - 0x1F150) % 32 < 26:  # letters on black
        return chr(65 + (code - 0x1F150) % 32)
    if fold := _SMALL_CAPITALS.get(character) or _ODD_SPACES.get(code):
        return fold
    fold = unicodedata.normalize("NFKC", character)
    if fold == character or len(fold) > _MOST_LETTERS_FOR_ONE:
        return None
    return fold


def _without_specials(text: str) -> tuple[str, str]:
    """Take out idle joiners, selectors and tags; return what the last two spelled, too."""
    text = _EMOJI_JOINER.sub(_KEEP, _SURROGATE.sub("\ufffd", text))
    text = _IDLE_JOINER.sub("", text).replace(_KEEP, "\u200d")
    flags = _FLAG.findall(text)
    bare = _FLAG.sub(_KEEP, text) if flags else text
    tags = [chr(ord(tag) - 0xE0000) for tag in _TAG.findall(bare)]
    hidden = "".join(tag for tag in tags if tag.isprintable())
    bare = _TAG.sub("", bare) if tags else bare
    if flags:
        in_order = iter(flags)
        bare = re.sub(_KEEP, lambda _: next(in_order), bare)
    bytes_hidden = bytes(map(_selected_byte, _SELECTOR.findall(bare)))
    if len(bytes_hidden) > 3 and (smuggled := _printable(bytes_hidden)):
        hidden = f"{hidden} {smuggled}".strip()
    styled = _EMOJI_STYLE.sub(lambda m: f"{m[1] or m[3]}{_KEEP}", bare)
    return _SELECTOR.sub("", styled).replace(_KEEP, "\ufe0f"), hidden


def _selected_byte(selector: str) -> int:
    code = ord(selector)
    return code - 0xFE00 if code < 0xFF00 else code - 0xE0100 + 16


def _printable(raw: bytes) -> str:
    """Return the bytes' letters where most of them are some."""
    letters = "".join(chr(b) for b in raw if 0x20 <= b < 0x7F)
    return letters if len(letters) * 10 >= len(raw) * 6 else ""


def _without_piles(text: str) -> str:
    """Strip Latin words of all marks if marks are piled up anywhere, other words of piles."""
    if not _PILE.search(text):
        return text
    return _MARKED_WORD.sub(_without_marks, text)


def _without_marks(found: re.Match[str]) -> str:
    if found[0].isascii():
        return found[0]
    bare = _MARKS.sub("", unicodedata.normalize("NFD", found[0]))
    return bare if bare.isascii() or _PILE.search(found[0]) else found[0]


def _from_indicators(found: re.Match[str]) -> str:
    """Read regional indicators as letters where they cannot be flags or are a word."""
    word = "".join(chr(ord(c) - 0x1F1E6 + 97) for c in found[0] if ord(c) > 0x1F000)
    pairs = " " not in found[0] and len(word) % 2 == 0
    return found[0] if pairs and word not in WORDS else word


def _in_latin(text: str) -> str:
    """Spell words in Latin letters where they mix scripts, or only look-alikes in such company."""
    words = set(_WORD.findall(text))
    odd = {word for word in words if not word.isascii()}
    latin = {word: spelled for word in odd if (spelled := word.translate(_LATIN_TWIN)).isascii()}
    # A unit such as kΩ is no disguise, so a mixed word needs three letters to prove one.
    mixed = {word for word in latin if len(word) > 2 and any(map(str.isascii, word))}
    if not mixed:
        genuine = any(_is_genuine(word) for word in odd)
        company = any(word[0].isascii() for word in words)
        latin = {
            word: spelled
            for word, spelled in latin.items()
            if not genuine and (company or len(word) > 3) and spelled.lower() in WORDS
        }
    elif any(_is_genuine(word) for word in odd):
        latin = {word: latin[word] for word in mixed}
    return _WORD.sub(lambda m: latin.get(m[0], m[0]), text) if latin else text


def _is_genuine(word: str) -> bool:
    """Whether a word has several letters of another script and one that no Latin letter equals."""
    foreign = [c for c in word if c > "\u036f"]
    return len(foreign) > 1 and any(ord(c) not in _LATIN_TWIN for c in foreign)
