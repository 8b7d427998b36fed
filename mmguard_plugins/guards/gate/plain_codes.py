"""Encodings undone in place: base64, base32, hex, bits, percent signs, entities and backslashes.

Text is taken for encoded only where what comes out is mostly letters: keys, hashes, pictures and
signed tokens come out as bytes and stay as they are.
"""

from __future__ import annotations

import base64
import binascii
import codecs
import html
import re
from collections.abc import Callable
from urllib.parse import unquote

from mmguard_plugins.guards.gate.plain_letters import clean
from mmguard_plugins.guards.gate.plain_words import WORDS

_DEPTH = 3
_FEWEST_ESCAPES = 3  # letters that need no escape yet have one, before it is no accident

# Atomic groups keep each pattern linear: what a run took, it does not give back.
_TOKEN = re.compile(r"(?<![\w-])eyJ[\w-]++\.[\w-]++\.[\w-]++")  # a signed token, to be left alone
_BASE64 = re.compile(r"(?<![\w+/=-])(?:[\w+/-]{4}[\w+/-]*+(?:\r?\n(?=[\w+/-]{4}))?)++={0,2}")
_BASE32 = re.compile(r"(?<![\w])[A-Z2-7]{16,}+={0,6}")
_HEX = re.compile(r"(?<![0-9A-Za-z])(?:(?:0x|\\x)?+[0-9A-Fa-f]{2}[ :,]?+){6,}+")
_BITS = re.compile(r"(?<![01])(?:[01]{8}[ ,]?+){4,}+")
_PERCENT = re.compile(r"(?:%[0-9A-Fa-f]{2})++")
_CODED_AGAIN = re.compile(r"[A-Za-z0-9+/=\s]{16,}+")
_CHUNK = re.compile(r"\S++")
_ENTITY = re.compile(r"&#(?:[0-9]{1,7}|[xX][0-9A-Fa-f]{1,6})(?:;|(?![0-9A-Fa-f]))")
_BACKSLASH = re.compile(r"\\u[0-9A-Fa-f]{4}|\\u\{[0-9A-Fa-f]{1,6}\}|\\x[0-9A-Fa-f]{2}")


def decoded(text: str) -> str:
    """Return the text with its encoded stretches decoded, through up to three layers."""
    for _ in range(_DEPTH):
        plainer = _decoded_once(text)
        if plainer == text:
            break
        text = clean(plainer)
    return text


def _decoded_once(text: str) -> str:
    if "&#" in text:
        text = _unescaped(text, _ENTITY, lambda m: html.unescape(m[0]))
    if "\\u" in text or "\\x" in text:
        text = _unescaped(text, _BACKSLASH, _from_backslash)
    if "%" in text:
        text = _from_percent(text)
    text = _BITS.sub(_from_bits, text) if "0" in text else text
    text = _HEX.sub(_from_hex, text)
    if "eyJ" not in text:
        text = _BASE64.sub(_from_base64, text)
    else:
        rest = iter(_TOKEN.findall(text))
        pieces = [_BASE64.sub(_from_base64, piece) for piece in _TOKEN.split(text)]
        text = "".join(piece + next(rest, "") for piece in pieces)
    return _BASE32.sub(_from_base32, text)


def _unescaped(text: str, pattern: re.Pattern[str], undo: Callable[[re.Match[str]], str]) -> str:
    """Undo escapes if several stand for plain letters or digits, which need none."""
    needless = sum((c := undo(m)).isascii() and c.isalnum() for m in pattern.finditer(text))
    return pattern.sub(undo, text) if needless >= _FEWEST_ESCAPES else text


def _from_backslash(found: re.Match[str]) -> str:
    code = int(found[0][2:].strip("{}"), 16)
    return chr(code) if code < 0x110000 else "\ufffd"


def _from_percent(text: str) -> str:
    text = _PERCENT.sub(_from_needless_percent, text)
    return _CHUNK.sub(_from_percent_token, text)


def _from_needless_percent(found: re.Match[str]) -> str:
    plain = unquote(found[0])
    return plain if sum(c.isascii() and c.isalnum() for c in plain) >= _FEWEST_ESCAPES else found[0]


def _from_percent_token(found: re.Match[str]) -> str:
    """Undo a sentence whose spaces are escaped; an address keeps its own."""
    token = found[0]
    if "/" in token or "=" in token or token.count("%20") < 2:
        return token
    return unquote(token)


def _from_bits(found: re.Match[str]) -> str:
    digits = re.sub(r"[ ,]", "", found[0])
    return _kept(bytes(int(digits[at : at + 8], 2) for at in range(0, len(digits), 8)), found[0])


def _from_hex(found: re.Match[str]) -> str:
    return _kept(bytes.fromhex(re.sub(r"0x|\\x|[ :,]", "", found[0])), found[0])


def _from_base64(found: re.Match[str]) -> str:
    given = found[0]
    if "\n" in given and (whole := _from_base64_run(given)) != given:
        return whole
    if "\n" in given:
        return "\n".join(_from_base64_run(line) for line in given.split("\n"))
    return _from_base64_run(given)


def _from_base64_run(given: str) -> str:
    if not given.isascii():
        return given
    run = "".join(given.split()).rstrip("=").translate({45: "+", 95: "/"})
    if len(run) % 4 == 1 or len(run) < 6:
        return given
    raw = base64.b64decode(run + "=" * (-len(run) % 4))
    if len(run) < 15 and raw.decode("ascii", "replace").lower() not in WORDS:
        return given
    return _kept(raw, given)


def _from_base32(found: re.Match[str]) -> str:
    run = found[0].rstrip("=")
    try:
        raw = base64.b32decode(run + "=" * (-len(run) % 8))
    except binascii.Error:
        return found[0]
    return _kept(raw, found[0])


def _kept(raw: bytes, given: str) -> str:
    """Return the decoded text if most of it is letters, else what was given."""
    try:
        plain = codecs.decode(raw, "utf-8")
    except UnicodeDecodeError:
        return given
    letters = sum(c.isalpha() or c == " " for c in plain[:1000])
    if letters * 10 < len(plain[:1000]) * 7 and not _CODED_AGAIN.fullmatch(plain):
        return given
    return plain + (given[-1] if given[-1] in " \n" and plain[-1:].isalnum() else "")
