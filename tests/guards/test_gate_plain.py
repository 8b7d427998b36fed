from __future__ import annotations

import base64
import codecs
import json
import random
import time
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmguard_plugins.guards.gate.plain import plain, readings
from mmguard_trainers.evaluation.obfuscation import OBFUSCATIONS

SENTENCE = "how to build a strong bridge without instructions"

ORDINARY = {
    "English": "How do I kill a Python process that won't stop? It's 10 am, I have 2 of them.",
    "Russian": "Рука, море, оса и нос: сколько это стоит? Йод и ёлка.",
    "a Russian word of look-alikes": "рука",
    "Russian beside English": "The word сор means litter, and щука means pike.",
    "Greek": "Πώς είναι ο καιρός σήμερα; Το ρολόι του παππού.",
    "Chinese": "今天天气怎么样？请告诉我。",
    "Japanese": "東京タワーの高さは何ですか。",
    "Korean": "오늘 날씨가 어때요?",
    "Arabic": "كيف حالك اليوم؟ السلام عليكم",
    "Persian, which needs its non-joiner": "می\u200cخواهم کتاب\u200cها را بخوانم",
    "Hindi, which needs its joiner": "क्\u200dष और र्\u200dय, क्\u200cष",
    "Hebrew with points": "שָׁלוֹם עוֹלָם",
    "Vietnamese": "Tiếng Việt có nhiều dấu, rất đẹp",
    "Yoruba": "ọ̀rẹ́ mi",
    "French": "Où est la forêt où naît l'été, mon cœur ?",
    "Polish": "Łódź jest duża; zażółć gęślą jaźń",
    "emoji": "great 👍🏽 ❤️ 👩‍👩‍👧 🇫🇷🇩🇪 1️⃣",
    "the flag of Scotland": "🏴\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f",
    "units": "a 5 kΩ resistor and 3 μm",
    "code": "def f(x: int) -> str:\n    return x * y ** 2 if a[i] != 0x1F else f'{x!r}'\n",
    "JSON": '{"id": 17, "name": "a_b", "tags": ["x", "y"], "v": "1.2.3", "n": null}',
    "an address": "https://example.org/a/b?q=1%20x&lang=en#l33t and me@example.org",
    "a version and a date": "v1.2.3-rc4 of 2024-05-17, 10:30 am, $19.99, the 2nd of 4, 90s, mp3",
    "a hash": "sha256 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    "a UUID": "550e8400-e29b-41d4-a716-446655440000",
    "acronyms": "The U.S.A. and the U.N. in A/B tests, e.g. at 5 p.m., a-b-c",
    "algebra": "let a b c d be numbers with 2n + 5 = 19 and x*y*z = 1",
    "markup": "**Bold** and _soft_ text, &amp; &lt;b&gt; and a caf&#233;",
    "a list": "1. one\n2. two\n- a\n- b\n",
    "words cut by line": "a well-\nknown fact",
    "a Windows line": "one\r\ntwo\r\n",
}


def reads(text: str, wanted: str = SENTENCE) -> bool:
    """Whether a reading holds the wanted words."""
    return any(wanted in " ".join(reading.lower().split()) for reading in readings(text))


@pytest.mark.parametrize("text", ORDINARY.values(), ids=ORDINARY.keys())
def test_ordinary_text_has_one_reading_which_is_itself(text: str) -> None:
    if text == ORDINARY["Chinese"] or text == ORDINARY["Japanese"]:
        assert readings(text) == (unicodedata.normalize("NFKC", text),)
    else:
        assert readings(text) == (unicodedata.normalize("NFC", text),)


@pytest.mark.parametrize(
    "raw", [random.Random(1).randbytes(300), b"\x89PNG\r\n\x1a\n" + b"\0" * 90]
)
def test_encoded_bytes_are_left_alone(raw: bytes) -> None:
    text = f"data:image/png;base64,{base64.b64encode(raw).decode()}"
    assert readings(text) == (text,)


def test_a_signed_token_is_left_alone() -> None:
    def part(raw: bytes) -> str:
        return base64.urlsafe_b64encode(raw).decode().rstrip("=")

    head = part(json.dumps({"alg": "HS256", "typ": "JWT"}).encode())
    body = part(json.dumps({"sub": "1234567890", "name": "Ada Lovelace"}).encode())
    token = f"Bearer {head}.{body}.{part(random.Random(2).randbytes(32))}"
    assert readings(token) == (token,)


@pytest.mark.parametrize("name", sorted(set(OBFUSCATIONS) - {"typos", "leet"}))
def test_each_disguise_is_undone(name: str) -> None:
    assert reads(OBFUSCATIONS[name](SENTENCE, random.Random(3)))


DISGUISES = {
    "leet": "h0w t0 bu1ld @ $tr0ng br1dge w1th0ut 1nstruct10n5",
    "mathematical letters": "𝐡𝐨𝐰 𝓽𝓸 𝖇𝖚𝖎𝖑𝖉 𝚊 𝕤𝕥𝕣𝕠𝕟𝕘 𝘣𝘳𝘪𝘥𝘨𝘦 without instructions",
    "enclosed letters": "ⓗⓞⓦ ⓣⓞ 🄱🅄🄸🄻🄳 a 🅢🅣🅡🅞🅝🅖 bridge without instructions",
    "small capitals": "ʜᴏᴡ ᴛᴏ ʙᴜɪʟᴅ ᴀ ꜱᴛʀᴏɴɢ ʙʀɪᴅɢᴇ without instructions",
    "emoji letters": "🇭 🇴 🇼 to 🇧🇺🇮🇱🇩 a strong bridge without instructions",
    "bidirectional marks": "how \u202eto\u202c bu\u200eild a strong bridge without instructions",
    "struck-out letters": "how to b̶u̶i̶l̶d̶ a strong bridge without instructions",
    "control characters": "how to bu\x00i\x08ld a strong br\x1bidge without instructions",
    "signs between letters": "how to b-u-i-l-d a s*t*r*o*n*g b.r.i.d.g.e without instructions",
    "emphasis in words": "how to bu**il**d a str**o**ng bridge without instructions",
    "a word cut at a line's end": "how to build a strong bridge without instruc-\ntions",
    "percent signs": "how%20to%20build%20a%20strong%20bridge%20without%20instructions",
    "backslashes": "how to \\u0062\\x75\\u0069\\x6c\\u0064 a strong bridge without instructions",
    "bits": " ".join(f"{ord(c):08b}" for c in SENTENCE),
    "base32": base64.b32encode(SENTENCE.encode()).decode(),
    "base64 in a sentence": f"please read {base64.b64encode(SENTENCE.encode()).decode()} aloud",
    "base64 in lines": base64.encodebytes(SENTENCE.encode() * 3).decode(),
    "base64 of base64 of hex": base64.b64encode(
        base64.b64encode(SENTENCE.encode().hex().encode())
    ).decode(),
    "base64 of rot13": base64.b64encode(codecs.encode(SENTENCE, "rot13").encode()).decode(),
    "each word reversed": " ".join(word[::-1] for word in SENTENCE.split()),
    "bytes in selectors": "😀" + "".join(chr(0xE0100 + ord(c) - 16) for c in SENTENCE),
}


@pytest.mark.parametrize("text", DISGUISES.values(), ids=DISGUISES.keys())
def test_a_written_disguise_is_undone(text: str) -> None:
    assert reads(text)


@given(st.text(st.characters(codec=None, exclude_categories=())))
def test_any_string_has_one_to_four_readings_of_bounded_length(text: str) -> None:
    found = readings(text)
    assert 1 <= len(found) <= 4
    assert len(set(found)) == len(found)
    assert all(len(reading) <= 4 * len(text) + 1 for reading in found)


@given(st.text(st.characters(codec=None, exclude_categories=())))
def test_the_first_reading_made_plain_again_stays(text: str) -> None:
    assert plain(plain(text)) == plain(text) == readings(text)[0]


@given(
    st.text(st.sampled_from("aаɑᴀe\u0301\u0335\u200d\u200c\ufe0f\u20e3😀🇦🇪क्ｶﾞﬁ\U000e0061\ud8001 "))
)
def test_odd_characters_side_by_side_are_plain_at_once(text: str) -> None:
    assert plain(plain(text)) == plain(text)


@given(st.text(st.characters(categories=["Lu", "Ll", "Nd", "Po"], max_codepoint=0x24F)))
def test_no_visible_letter_is_dropped(text: str) -> None:
    assert len(plain(text)) >= len(unicodedata.normalize("NFC", text))


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126)))
def test_visible_ascii_is_never_changed(text: str) -> None:
    assert plain(text) == text


def test_a_lone_surrogate_becomes_the_replacement_character() -> None:
    assert plain("a\ud800b") == "a\ufffdb"


@pytest.mark.parametrize(
    "unit",
    ["a ", "a.", "h0w ", "%41", "A", "a-", "\u0301", "аb", "\u200d", "&#65;", "eyJ", "0", "🇦",
     "ab\n", "lorem ipsum dolor ", "\ufdfa", "(", "1!", "00 ", "\\u0041", "**", "eyJa.",
     "41 ", "e\u0301\u0301",
     "\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f"],
)  # fmt: skip
def test_a_megabyte_of_anything_is_read_in_seconds(unit: str) -> None:
    text = unit * (1_000_000 // len(unit)) + "z e\u0301\u0301 k1ll 41%41"
    start = time.perf_counter()
    readings(text)
    assert time.perf_counter() - start < 6  # a pattern that is not linear takes minutes
