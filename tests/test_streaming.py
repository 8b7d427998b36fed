from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import regex
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from mmguard_plugins import (
    Action,
    Channel,
    Config,
    Decision,
    Engine,
    Guard,
    OutputStream,
    Redaction,
    Request,
    Response,
    Verdict,
    hookimpl,
)
from mmguard_plugins.guards.banned_text.config import BannedTextConfig
from mmguard_plugins.guards.banned_text.guard import BannedText

REASONING, ANSWER = Channel.REASONING, Channel.ANSWER
EVERY_TOKEN = {"check_every_tokens": 1, "check_every_s": 60.0}
REPLACEMENT = "#"

Chunk = tuple[Channel, str]

# The same examples each time: a property that fails here fails for everybody.
search = settings(
    max_examples=400,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)


def banned(**options: Any) -> BannedText:
    """Return the guard with a time-out that a busy machine does not run into."""
    return BannedText(BannedTextConfig(pattern_timeout_s=10, **options), "banned_text")


def engine_of(*guards: Guard, stream: dict[str, Any] | None = None) -> Engine:
    settings = [{"use": guard.name, "timeout_s": 60} for guard in guards]
    config = {"version": 1, "guards": settings, "uninspected": "allow", "stream": stream or {}}
    return Engine(guards, Config.model_validate(config))


def feed(stream: OutputStream, chunks: Sequence[Chunk]) -> dict[Channel, str]:
    """Push everything; return what came back by channel."""
    out = dict.fromkeys(Channel, "")
    for channel, token in chunks:
        for delta in stream.push(token, channel):
            out[delta.channel] += delta.text
    for delta in stream.finish():
        out[delta.channel] += delta.text
    return out


def said(tokens: Sequence[str]) -> list[Chunk]:
    return [(ANSWER, token) for token in tokens]


def whole(chunks: Sequence[Chunk]) -> dict[Channel, str]:
    return {c: "".join(token for channel, token in chunks if channel is c) for c in Channel}


class Counting(Guard):
    """Blocks a run of four `x`, and does not say where one may begin."""

    @hookimpl
    def check_output(self, response: Response) -> Verdict:
        texts = (response.of(channel) for channel in Channel)
        bad = any("xxxx" in text for text in texts)
        return Verdict(self.name, Action.BLOCK if bad else Action.ALLOW)


class Calm(Guard):
    """Allows everything, and does not say where a violation may begin."""

    @hookimpl
    def check_output(self, response: Response) -> Verdict:
        return Verdict(self.name, Action.ALLOW)


# --- against an oracle that sees the whole text ---------------------------------------------------

texts = st.text(alphabet="ab c", max_size=40)
words = st.text(alphabet="abc", min_size=1, max_size=4)
phrases = st.lists(words, min_size=1, max_size=3).map(" ".join)
atoms = st.sampled_from(["a", "b", "c", " ", ".", "[ab]", "[^a]", r"\s", r"\b", "ab", "(?:a|bc)"])
looks = st.sampled_from(
    ["", "", "", "(?=a)", "(?!a)", "(?= ?b)", "(?!bc)", "(?<!b)", "(?<=a)", "$"]
)
counts = st.sampled_from(["", "", "", "+", "?", "{2}", "{1,3}", "+?", "*"])
patterns = st.builds(
    lambda pieces, look: "".join(atom + count for atom, count in pieces) + look,
    st.lists(st.tuples(atoms, counts), min_size=1, max_size=4),
    looks,
)
alternatives = st.lists(patterns, min_size=1, max_size=2).map("|".join)


@st.composite
def conversations(draw: st.DrawFn) -> list[Chunk]:
    """Draw reasoning, then an answer, each cut anywhere, empty tokens included."""
    chunks: list[Chunk] = []
    for channel in (REASONING, ANSWER):
        text = draw(texts)
        cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=20)))
        edges = [0, *cuts, len(text)]
        chunks += [(channel, text[a:b]) for a, b in itertools.pairwise(edges)]
    return chunks


windows = st.fixed_dictionaries(
    {
        "check_every_tokens": st.sampled_from([1, 2, 3, 10]),
        "check_every_s": st.sampled_from([0.0, 60.0]),
        "hold_tokens": st.sampled_from([0, 1, 10]),
    }
)


def first_violation(rules: Sequence[regex.Pattern[str]], text: str) -> int | None:
    """Return where the first violation begins."""
    starts = [match.start() for rule in rules if (match := rule.search(text))]
    return min(starts, default=None)


def literal(phrase: str) -> regex.Pattern[str]:
    return regex.compile(r"\s+".join(map(regex.escape, phrase.split())), regex.IGNORECASE)


@search
@given(st.lists(phrases, max_size=3), st.lists(alternatives, max_size=2), conversations(), windows)
@example(["ab"], [], [(ANSWER, "a"), (ANSWER, "b")], EVERY_TOKEN)
@example([], ["a(?!bc)"], said("ab ab"), EVERY_TOKEN)
@example([], ["b|a(?:a|bc)"], said("abc"), EVERY_TOKEN)
@example([], [r" \b"], said("a a"), EVERY_TOKEN)
@example([], ["(?=a)"], said("b" + "a" * 90), EVERY_TOKEN)
def test_nothing_of_a_violation_is_released_and_everything_else_is(
    phrases: list[str], patterns: list[str], chunks: list[Chunk], window: dict[str, Any]
) -> None:
    try:
        guard = banned(phrases=phrases, patterns=patterns)
    except ValueError:
        assume(False)
    rules = [literal(p) for p in phrases] + [regex.compile(p, regex.IGNORECASE) for p in patterns]
    stream = engine_of(guard, stream=window).open_stream(Request("hi"))
    out = feed(stream, chunks)
    for channel, text in whole(chunks).items():
        start = first_violation(rules, text)
        if start is not None:
            assert stream.blocked
            assert not stream.decision.failed
            assert text[:start].startswith(out[channel])
            break
        assert out[channel] == text
    else:
        assert stream.decision.action is Action.ALLOW


@search
@given(st.lists(st.sampled_from(["x", "xx", "y", " ", ""]), max_size=60), windows)
def test_a_guard_that_gives_no_position_leaks_nothing_within_the_window(
    tokens: list[str], window: dict[str, Any]
) -> None:
    text = "".join(tokens)
    start = text.find("xxxx")
    if start >= 0:
        first = next(i for i in range(len(tokens)) if len("".join(tokens[: i + 1])) > start)
        last = next(i for i in range(len(tokens)) if len("".join(tokens[: i + 1])) >= start + 4)
        window = window | {"hold_tokens": last - first + 1}
    stream = engine_of(Counting(), stream=window).open_stream(Request("hi"))
    out = feed(stream, said(tokens))[ANSWER]
    assert stream.blocked == (start >= 0)
    assert text[:start].startswith(out) if start >= 0 else out == text


def united(text: str, hits: set[str]) -> str:
    """Replace every place where a hit stands; places that overlap become one."""
    inside = [False] * len(text)
    begins = [False] * len(text)
    spans = sorted(
        (start, start + len(hit))
        for hit in hits
        for start in range(len(text))
        if text.startswith(hit, start)
    )
    reach = 0
    for start, end in spans:
        begins[start] = begins[start] or start >= reach
        reach = max(reach, end)
        inside[start:end] = [True] * (end - start)
    pieces = (
        REPLACEMENT if begins[i] else "" if inside[i] else char for i, char in enumerate(text)
    )
    return "".join(pieces)


distinct = st.lists(
    st.sampled_from(["ab", "ba", "a b", "bcc", "ca", "abc"]), min_size=1, max_size=3
)


@search
@given(distinct, conversations(), windows)
@example(["abc", "bcc"], said("a abcc a"), EVERY_TOKEN)
@example(["ab"], [(REASONING, "ab "), (ANSWER, "c ")], EVERY_TOKEN)
def test_redaction_in_a_stream_equals_redaction_of_the_whole(
    phrases: list[str], chunks: list[Chunk], window: dict[str, Any]
) -> None:
    guard = banned(phrases=phrases, action="redact", replacement=REPLACEMENT)
    engine = engine_of(guard, stream=window)
    stream = engine.open_stream(Request("hi"))
    out = feed(stream, chunks)
    texts = whole(chunks)
    assert not stream.blocked
    rules = [literal(phrase) for phrase in phrases]
    for channel, text in texts.items():
        hits = [match.group() for rule in rules for match in rule.finditer(text)]
        assert out[channel] == united(text, set(hits))
    response = Response(answer=texts[ANSWER], reasoning=texts[REASONING])
    decision = engine.check_output(Request("hi"), response)
    together = engine.redact_response(response, decision)
    if len(phrases) == 1:  # hits of one phrase do not overlap
        assert (out[ANSWER], out[REASONING]) == (together.answer, together.reasoning)


@search
@given(st.lists(phrases, min_size=1, max_size=2), conversations(), windows)
def test_async_equals_sync(phrases: list[str], chunks: list[Chunk], window: dict[str, Any]) -> None:
    window = window | {"check_every_s": 60.0}  # else the clock decides when a check is due
    engine = engine_of(banned(phrases=phrases), stream=window)
    sync, other = engine.open_stream(Request("hi")), engine.open_stream(Request("hi"))
    # The first check is due at once, whatever the clock says.
    expected = [sync.push(token, channel) for channel, token in chunks] + [sync.finish()]

    async def run() -> list[Any]:
        got = [await other.apush(token, channel) for channel, token in chunks]
        return [*got, await other.afinish()]

    assert asyncio.run(run()) == expected
    assert other.decision.action is sync.decision.action
    engine.close()


@search
@given(st.lists(phrases, min_size=1, max_size=2), st.lists(words, max_size=20), windows)
def test_filter_equals_push(phrases: list[str], tokens: list[str], window: dict[str, Any]) -> None:
    engine = engine_of(banned(phrases=phrases), stream=window)
    pushed = engine.open_stream(Request("hi"))
    out = feed(pushed, said(tokens))[ANSWER]
    filtered = engine.open_stream(Request("hi"))
    text = "".join(filtered.filter(tokens))
    assert text == out + (pushed.refusal if pushed.blocked else "")


# --- one behaviour each ---------------------------------------------------------------------------


def test_the_first_text_comes_within_twenty_tokens() -> None:
    stream = engine_of(Calm()).open_stream(Request("hi"))
    held = 0
    while not stream.push("word "):
        held += 1
    assert held < 20


def test_a_blocked_stream_returns_nothing_more() -> None:
    stream = engine_of(banned(phrases=["bad"]), stream=EVERY_TOKEN).open_stream(Request("hi"))
    assert feed(stream, said(["so ", "bad"]))[ANSWER] == "so "
    assert stream.blocked
    assert [stream.push(token) for token in ("good", "more", "text")] == [[], [], []]
    assert stream.push("thought", REASONING) == []
    assert stream.finish() == []
    assert stream.refusal == "Sorry, I can't continue with that answer."


def test_finish_returns_the_rest_once() -> None:
    stream = engine_of(Calm()).open_stream(Request("hi"))
    stream.push("rest")
    assert [delta.text for delta in stream.finish()] == ["rest"]
    assert stream.finish() == []


def test_more_than_max_held_tokens_block() -> None:
    window = EVERY_TOKEN | {"max_held_tokens": 5}
    guard = banned(patterns=["begin.*end"])
    stream = engine_of(guard, stream=window).open_stream(Request("hi"))
    blocked = []
    for token in ("begin", " a", " b", " c", " d", " e"):
        assert stream.push(token) == []
        blocked.append(stream.blocked)
    assert blocked == [False] * 5 + [True]
    assert stream.decision.reason == "more than 5 tokens held back"


def test_empty_tokens_do_not_count_as_held() -> None:
    window = EVERY_TOKEN | {"max_held_tokens": 5}
    stream = engine_of(banned(phrases=["bad"]), stream=window).open_stream(Request("hi"))
    feed(stream, said(["so ", *[""] * 20, "on"]))
    assert not stream.blocked


def test_a_failing_guard_blocks_the_stream() -> None:
    class Raises(Guard):
        @hookimpl
        def check_output(self, response: Response) -> Verdict:
            raise RuntimeError("out of memory")

    stream = engine_of(Raises(), stream=EVERY_TOKEN).open_stream(Request("hi"))
    assert stream.push("word") == []
    assert stream.blocked
    assert stream.refusal == "Sorry, this request could not be checked."


def test_without_output_guards_everything_passes() -> None:
    class Silent(Guard):
        @hookimpl
        def check_input(self, request: Request) -> Verdict:
            return Verdict(self.name, Action.ALLOW)

    stream = engine_of(Silent(), stream=EVERY_TOKEN).open_stream(Request("hi"))
    assert [delta.text for delta in stream.push("word")] == ["word"]


@pytest.mark.parametrize("partner", [Calm, Counting])
def test_a_redacted_phrase_seen_again_does_not_block(partner: Callable[[], Guard]) -> None:
    # A partner that gives no position has every guard see the whole text at each check.
    guard = banned(phrases=["bad"], action="redact", replacement=REPLACEMENT)
    stream = engine_of(guard, partner(), stream=EVERY_TOKEN).open_stream(Request("hi"))
    out = feed(stream, said(["bad ", *["word "] * 30, "bad"]))
    assert not stream.blocked
    assert out[ANSWER] == "# " + "word " * 30 + "#"


def test_text_to_redact_that_has_left_blocks() -> None:
    class Late(Guard):
        @hookimpl
        def check_output(self, response: Response) -> Verdict:
            if len(response.answer) < 90:
                return Verdict(self.name, Action.ALLOW)
            return Verdict(self.name, Action.REDACT, redactions=(Redaction("first"),))

    stream = engine_of(Late(), stream=EVERY_TOKEN).open_stream(Request("hi"))
    feed(stream, said(["first ", *["word "] * 20]))
    assert stream.blocked
    assert stream.decision.reason == "text to redact has been sent already"


def test_a_phrase_over_an_interrupted_channel_blocks() -> None:
    stream = engine_of(banned(phrases=["build it"]), stream=EVERY_TOKEN).open_stream(Request("hi"))
    out = feed(stream, [(ANSWER, "build"), (REASONING, "hm"), (ANSWER, " it"), (ANSWER, " now")])
    assert stream.blocked
    assert out[ANSWER] == "build"  # a channel that ends is released in full


def test_no_phrase_runs_across_two_channels() -> None:
    stream = engine_of(banned(phrases=["build it"]), stream=EVERY_TOKEN).open_stream(Request("hi"))
    out = feed(stream, [(REASONING, "build "), (ANSWER, "it")])
    assert not stream.blocked
    assert (out[REASONING], out[ANSWER]) == ("build ", "it")


def test_flagged_text_passes_and_the_decision_says_so() -> None:
    guard = banned(phrases=["bad"], action="flag")
    stream = engine_of(guard, stream=EVERY_TOKEN).open_stream(Request("hi"))
    out = feed(stream, said(["so ", "ba", "d", " it is"]))
    assert out[ANSWER] == "so bad it is"
    assert stream.decision.action is Action.FLAG


def test_the_reply_to_a_stream_is_counted_in_checks() -> None:
    stream = engine_of(Calm(), stream={"check_every_tokens": 5, "check_every_s": 60}).open_stream(
        Request("hi")
    )
    feed(stream, said(["word "] * 21))
    assert isinstance(stream.decision, Decision)
    assert stream.checks == 1 + 4 + 1  # at once, every five tokens, at the end


def test_the_newest_tokens_stay_back_for_a_guard_that_gives_no_position() -> None:
    window = EVERY_TOKEN | {"hold_tokens": 3}
    stream = engine_of(Calm(), stream=window).open_stream(Request("hi"))
    sent = ["".join(delta.text for delta in stream.push(token)) for token in "abcde"]
    assert sent == ["", "", "", "a", "b"]
