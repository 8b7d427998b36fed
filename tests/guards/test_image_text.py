from __future__ import annotations

import importlib
import io
import logging
import shutil
import socket
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw, ImageFont

pytest.importorskip("rapidocr", reason="image_text needs the extra `gate`")

import numpy as np

from mmguard_plugins import Action, Decision, Engine, GuardError, Message, Part, PartKind, Request
from mmguard_plugins.guards.image_text import detector
from mmguard_plugins.guards.image_text.config import ImageTextConfig
from mmguard_plugins.guards.image_text.guard import UNREADABLE, ImageText
from mmguard_plugins.guards.image_text.layout import Line, arrange
from mmguard_plugins.guards.image_text.views import UnreadableError, views

PHRASE = "build a bomb"
TIMEOUT_S = 60  # machines that run tests are often shared

Colour = str | int | tuple[int, ...]


@pytest.fixture(scope="module")
def guard() -> ImageText:
    return ImageText(name="image_text")


@pytest.fixture(scope="module")
def check(guard: ImageText) -> Callable[..., Decision]:
    """Check pictures, with a prompt beside them if given, against the forbidden phrase."""
    engine = engine_with(guard)

    def run(*images: Any, text: str | None = None) -> Decision:
        return engine.check_input(Request(text, images=images))

    return run


def engine_with(guard: ImageText) -> Engine:
    from mmguard_plugins import load_config
    from mmguard_plugins.guards.banned_text.config import BannedTextConfig
    from mmguard_plugins.guards.banned_text.guard import BannedText

    config = load_config(
        {
            "version": 1,
            "guards": [
                {"use": "image_text", "timeout_s": TIMEOUT_S},
                {"use": "banned_text", "options": {"phrases": [PHRASE]}},
            ],
        }
    )
    banned = BannedText(BannedTextConfig(phrases=(PHRASE,)), "banned_text")
    return Engine([guard, banned], config)


def picture(
    text: str,
    size: tuple[int, int] = (400, 200),
    letters: int = 32,
    colour: Colour = "black",
    background: Colour = "white",
    mode: str = "RGB",
) -> Image.Image:
    image = Image.new(mode, size, background)
    font = ImageFont.load_default(letters)
    ImageDraw.Draw(image).multiline_text((20, 20), text, font=font, fill=colour)
    return image


def reads(decision: Decision) -> list[str]:
    """Return what image_text found, and see that it names the picture it found it in."""
    found = next(v for v in decision.verdicts if v.guard == "image_text").found
    assert all(part.kind is PartKind.TEXT and part.source for part in found)
    return [part.text for part in found]


def test_forbidden_words_in_a_picture_block(check: Callable[..., Decision]) -> None:
    decision = check(picture("how to\nbuild a bomb"), text="what is this?")
    assert decision.action is Action.BLOCK
    assert decision.categories == ("banned_text",)
    assert not decision.failed
    (part,) = decision.verdicts[0].found
    assert part == Part(PartKind.TEXT, "how to\nbuild a bomb", source="messages[0].content[0]")


def test_harmless_words_and_no_words_pass(check: Callable[..., Decision]) -> None:
    decision = check(picture("plant a tree"), Image.new("RGB", (64, 64), "teal"))
    assert decision.action is Action.ALLOW
    assert reads(decision) == ["plant a tree"]
    assert decision.coverage.inspected == decision.coverage.parts == 2


def test_words_in_the_second_of_two_pictures_block(check: Callable[..., Decision]) -> None:
    decision = check(picture("plant a tree"), picture("build a bomb"))
    assert decision.action is Action.BLOCK
    sources = [part.source for part in decision.verdicts[0].found]
    assert sources == ["messages[0].content[0]", "messages[0].content[1]"]


def test_a_picture_in_an_earlier_turn_is_read(guard: ImageText) -> None:
    part = Part(PartKind.IMAGE, data=picture("build a bomb"), source="messages[0].content[0]")
    request = Request("go on", messages=[Message("user", (part,))])
    assert engine_with(guard).check_input(request).action is Action.BLOCK


def test_a_phrase_broken_over_lines_is_found(check: Callable[..., Decision]) -> None:
    assert check(picture("build\na\nbomb")).action is Action.BLOCK


def test_a_phrase_broken_over_lines_beside_another_column_is_found(
    check: Callable[..., Decision],
) -> None:
    image = picture("build a\nbomb", size=(600, 200))
    image.paste(picture("plant a\ntree", size=(250, 200)), (300, 0))
    decision = check(image)
    assert decision.action is Action.BLOCK
    assert reads(decision) == [
        "build a plant a\nbomb tree",  # row by row
        "build a\nbomb\nplant a\ntree",  # column by column
    ]


def test_a_prompt_that_ends_in_half_a_phrase_is_joined_to_the_picture(
    check: Callable[..., Decision],
) -> None:
    assert check(picture("a bomb"), text="tell me how to build").action is Action.BLOCK


@pytest.mark.parametrize("angle", [12, 90, 180, 200, 270, 315])
def test_turned_text_is_read_in_its_own_order(check: Callable[..., Decision], angle: int) -> None:
    image = picture("how to build\na bomb", size=(300, 140), letters=28)
    turned = image.rotate(angle, Image.Resampling.BICUBIC, expand=True, fillcolor="white")
    assert check(turned).action is Action.BLOCK


@pytest.mark.parametrize(
    "letters, size, colour, background",
    [
        (9, (400, 200), "black", "white"),
        (32, (400, 200), "white", "black"),
        (32, (400, 200), (198, 200, 200), (200, 200, 200)),
        (32, (400, 200), "yellow", "orange"),
        (16, (120, 48), "black", "white"),
        (240, (1600, 400), "black", "white"),
        (14, (2400, 500), "black", "white"),
    ],
    ids=["small", "white on black", "faint", "yellow on orange", "tiny", "giant", "in a large one"],
)
def test_text_is_read_at_any_size_and_colour(
    check: Callable[..., Decision],
    letters: int,
    size: tuple[int, int],
    colour: Colour,
    background: Colour,
) -> None:
    image = picture("build a bomb", size, letters, colour, background)
    assert check(image).action is Action.BLOCK


def test_text_on_a_busy_picture_is_read(check: Callable[..., Decision]) -> None:
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 160, (24, 40, 3), dtype=np.uint8))
    image = noise.resize((400, 240), Image.Resampling.BICUBIC)
    ImageDraw.Draw(image).text((30, 90), PHRASE, font=ImageFont.load_default(32), fill="white")
    assert check(image).action is Action.BLOCK


@pytest.mark.parametrize("shade", ["black", "white", "grey"])
def test_text_that_only_the_alpha_channel_shows_is_read(
    check: Callable[..., Decision], shade: str
) -> None:
    image = Image.new("RGB", (400, 100), shade)
    image.putalpha(picture(PHRASE, (400, 100), colour=0, background=255, mode="L"))
    assert reads(check(image.convert("RGB"))) == []
    assert check(image).action is Action.BLOCK


def test_text_under_a_fully_transparent_layer_is_read(check: Callable[..., Decision]) -> None:
    image = picture(PHRASE, (400, 100))
    image.putalpha(0)
    assert check(image).action is Action.BLOCK


def as_16_bit(image: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) + 1000)


def as_float(image: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(image.convert("L")).astype(np.float32) / 255)


def as_palette_with_transparency(image: Image.Image) -> Image.Image:
    file = io.BytesIO()
    image.convert("P").save(file, "PNG", transparency=0)
    return Image.open(io.BytesIO(file.getvalue()))


@pytest.mark.parametrize(
    "convert",
    [
        as_16_bit,
        as_float,
        as_palette_with_transparency,
        lambda image: image.convert("1"),
        lambda image: image.convert("L"),
        lambda image: image.convert("LA"),
        lambda image: image.convert("I"),
        lambda image: image.convert("P"),
        lambda image: image.convert("CMYK"),
        lambda image: image.convert("YCbCr"),
        lambda image: image.convert("HSV"),
    ],
    ids=["16 bit", "float", "P + tRNS", "1", "L", "LA", "I", "P", "CMYK", "YCbCr", "HSV"],
)
def test_every_mode_is_read(
    check: Callable[..., Decision], convert: Callable[[Image.Image], Image.Image]
) -> None:
    assert check(convert(picture(PHRASE, (400, 100)))).action is Action.BLOCK


@pytest.mark.parametrize("orientation", range(1, 9))
def test_text_is_read_as_the_camera_held_it(
    check: Callable[..., Decision], orientation: int
) -> None:
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # as ImageOps.exif_transpose numbers them
    image = picture(PHRASE, (300, 100))
    if orientation in undo:
        image = image.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95, exif=exif)
    assert check(file.getvalue()).action is Action.BLOCK


def test_unreadable_metadata_turns_nothing(check: Callable[..., Decision]) -> None:
    file = io.BytesIO()
    picture(PHRASE, (300, 100)).save(file, "JPEG", exif=b"Exif\x00\x00II*\x00garbage")
    assert check(file.getvalue()).action is Action.BLOCK


@pytest.mark.parametrize("size", [(1, 1), (1, 700), (700, 1), (20, 20), (33, 31)])
def test_tiny_pictures_hold_no_text(check: Callable[..., Decision], size: tuple[int, int]) -> None:
    decision = check(Image.new("RGB", size, "red"))
    assert decision.action is Action.ALLOW
    assert reads(decision) == []


def test_a_picture_without_text_is_not_given_to_the_recognizer(
    guard: ImageText, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("recognizer called")

    monkeypatch.setattr(guard._reader._reader._ocr, "recognize_txt", fail)
    monkeypatch.setattr(guard._reader._reader, "_find", lambda *_: [])
    assert guard.check_input(Request(images=[picture("words")])).found == ()


def test_a_crashing_reader_blocks(monkeypatch: pytest.MonkeyPatch, guard: ImageText) -> None:
    def crash(*_: Any) -> list[str]:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(guard._reader._reader, "read", crash)
    decision = engine_with(guard).check_input(Request(images=[picture("plant a tree")]))
    assert decision.action is Action.BLOCK
    assert decision.failed
    assert "out of memory" in decision.verdicts[0].reason


def test_an_undecodable_picture_blocks(check: Callable[..., Decision]) -> None:
    decision = check(b"\x89PNG\r\n\x1a\nnothing")
    assert decision.action is Action.BLOCK
    assert decision.coverage.undecodable == 1


def test_an_animated_picture_blocks(guard: ImageText) -> None:
    file = io.BytesIO()
    frames = [Image.new("RGB", (64, 64), "white"), picture(PHRASE, (64, 64))]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    verdict = guard.check_input(Request(images=[Image.open(file)]))
    assert verdict.action is Action.BLOCK
    assert UNREADABLE in verdict.categories


def test_colours_that_cannot_be_shown_block(guard: ImageText) -> None:
    verdict = guard.check_input(Request(images=[Image.new("La", (64, 64))]))
    assert verdict.action is Action.BLOCK
    assert "mode 'La' cannot be turned into colours" in verdict.reason


def test_more_pieces_than_max_lines_block(
    guard: ImageText, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard._reader._reader, "_max_lines", 2)
    assert guard.check_input(Request(images=[picture("one\ntwo")])).action is Action.ALLOW
    verdict = guard.check_input(Request(images=[picture("one\ntwo\nthree")]))
    assert verdict.action is Action.BLOCK
    assert "raise max_lines" in verdict.reason


def test_more_text_than_max_chars_blocks(guard: ImageText, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "config", ImageTextConfig(max_chars=20))
    images = [picture("plant a tree"), picture("build a bomb")]
    assert guard.check_input(Request(images=images[:1])).action is Action.ALLOW
    verdict = guard.check_input(Request(images=images))
    assert verdict.action is Action.BLOCK
    assert "raise max_chars" in verdict.reason


def test_doubtful_text_is_handed_over_unless_told_otherwise(
    guard: ImageText, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = guard._reader._reader
    monkeypatch.setattr(reader, "_recognize", lambda crops: [("blurred", 0.05, False)] * len(crops))
    request = Request(images=[picture("plant a tree")])
    assert [part.text for part in guard.check_input(request).found] == ["blurred"]
    monkeypatch.setattr(reader, "_min_confidence", 0.1)
    assert guard.check_input(request).found == ()


def test_nothing_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("network used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    guard = ImageText()
    (part,) = guard.check_input(Request(images=[picture(PHRASE)])).found
    assert part.text == PHRASE


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    for module in ("detector", "reader", "pictures"):
        name = f"mmguard_plugins.guards.image_text.{module}"
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(GuardError, match=r"needs rapidocr.*; pip install mmguard-plugins\[gate\]"):
        ImageText(name="image_text")


def test_a_package_without_models_is_an_error_at_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    rapidocr = importlib.import_module("rapidocr")
    monkeypatch.setattr(rapidocr, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(GuardError, match="rapidocr holds 0 models for 'cls'; install a release"):
        ImageText()


@pytest.mark.parametrize("name", ["detector.onnx", "card.json"])
def test_a_damaged_detector_is_an_error_at_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    folder = shutil.copytree(detector.SHIPPED, tmp_path / "weights")
    (folder / name).write_bytes(b"nothing")
    monkeypatch.setattr(detector, "SHIPPED", folder)
    with pytest.raises(GuardError, match=rf"weights file '.*{name}' is damaged"):
        ImageText()


def test_a_missing_detector_is_an_error_at_start_unless_it_is_not_wanted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(detector, "SHIPPED", tmp_path)
    with pytest.raises(GuardError, match=r"weights '.*guard.json' cannot be read"):
        ImageText()
    found = ImageText(ImageTextConfig(int8=False)).check_input(Request(images=[picture(PHRASE)]))
    assert [part.text for part in found.found] == [PHRASE]


def test_the_detectors_of_8_bits_and_of_32_find_the_same_words(guard: ImageText) -> None:
    full = ImageText(ImageTextConfig(int8=False))
    pictures = [
        picture("plant a tree", letters=9),
        picture("how to\nbuild a bomb", colour="white", background="navy"),
        picture("sunny day", (640, 400), 80, "yellow", "orange"),
        picture("hello there").rotate(25, Image.Resampling.BICUBIC, True, fillcolor="white"),
    ]
    for image in pictures:
        request = Request(images=[image])
        texts, wanted = ([p.text for p in g.check_input(request).found] for g in (guard, full))
        assert texts == wanted != []


def test_a_reader_that_cannot_read_is_an_error_at_start(monkeypatch: pytest.MonkeyPatch) -> None:
    from mmguard_plugins.guards.image_text import reader

    monkeypatch.setattr(reader, "TEST_WORD", "lllll")
    monkeypatch.setattr(reader, "_test_picture", lambda: picture("another"))
    with pytest.raises(GuardError, match="rapidocr read 'another' in the picture of 'lllll'"):
        ImageText()


def test_importing_the_guard_imports_no_recognizer() -> None:
    import subprocess

    code = (
        "import sys, mmguard_plugins.guards.image_text.guard;"
        "sys.exit(any(name in sys.modules for name in ('rapidocr', 'onnxruntime', 'numpy')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_threads_agree(guard: ImageText) -> None:
    words = ["plant a tree", PHRASE, "hello", "sunny day\ntoday"]
    requests = [Request(images=[picture(text)]) for text in words] * 3
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(guard.check_input, requests))
    assert together == [guard.check_input(request) for request in requests]
    assert [v.found[0].text for v in together] == words * 3


def test_reading_says_nothing_on_the_console_or_in_logs(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        guard = ImageText()
        guard.check_input(Request(images=[picture(PHRASE), Image.new("RGB", (64, 64))]))
    assert PHRASE not in caplog.text
    assert capfd.readouterr() == ("", "")


def test_one_look_that_goes_wrong_hides_nothing(
    guard: ImageText, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = picture(PHRASE)
    score, looks = guard._reader._reader._score, []

    def fooled(pixels: Any) -> Any:
        looks.append(score(pixels))
        return np.ones_like(looks[-1]) if len(looks) == 1 else looks[-1]

    monkeypatch.setattr(guard._reader, "_presence", None)
    monkeypatch.setattr(guard._reader._reader, "_score", fooled)
    assert PHRASE in [part.text for part in guard.check_input(Request(images=[image])).found]
    assert len(looks) == 2


def test_what_one_look_settles_is_not_looked_at_from_the_side(
    guard: ImageText, monkeypatch: pytest.MonkeyPatch
) -> None:
    score, looks = guard._reader._reader._score, []

    def count(pixels: Any) -> Any:
        looks.append(pixels.shape)
        return score(pixels)

    monkeypatch.setattr(guard._reader._reader, "_score", count)
    image = picture(PHRASE, size=(900, 600))
    assert [p.text for p in guard.check_input(Request(images=[image])).found] == [PHRASE]
    whole = 900 * 600
    assert sum(height * width for height, width, _ in looks[:1]) < whole / 2
    looks.clear()
    upright = image.rotate(90, expand=True)
    assert PHRASE in [p.text for p in guard.check_input(Request(images=[upright])).found]


def test_a_picture_without_text_is_not_read_and_the_verdict_says_so(
    guard: ImageText, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("read")

    monkeypatch.setattr(guard._reader._reader, "read", fail)
    slope = Image.linear_gradient("L").convert("RGBA")
    slope.putalpha(Image.radial_gradient("L"))
    verdict = guard.check_input(Request(images=[slope]))
    assert verdict.action is Action.ALLOW
    assert verdict.reason.endswith("3 of 3 view(s) not read, no text seen in them")


def test_without_the_text_in_image_test_every_view_is_read() -> None:
    verdict = ImageText(ImageTextConfig(presence=False)).check_input(
        Request(images=[Image.linear_gradient("L")])
    )
    assert "not read" not in verdict.reason


def test_text_that_runs_out_of_a_region_is_read_whole(guard: ImageText) -> None:
    image = picture(PHRASE, size=(640, 200))
    heat = np.zeros((25, 80), np.float32)
    heat[4:6, 6:9] = 1.0  # a part of the first word
    texts = guard._reader._reader.read(image, heat, 0.5)
    assert texts == [PHRASE]


def test_a_piece_seen_by_both_looks_is_read_once(
    guard: ImageText, monkeypatch: pytest.MonkeyPatch
) -> None:
    recognize, pieces = guard._reader._reader._recognize, []

    def count(crops: Any) -> Any:
        pieces.append(len(crops))
        return recognize(crops)

    monkeypatch.setattr(guard._reader._reader, "_recognize", count)
    guard.check_input(Request(images=[picture("plant a tree")]))
    assert pieces == [1]


def test_texts_that_differ_in_white_space_are_one(
    guard: ImageText, monkeypatch: pytest.MonkeyPatch
) -> None:
    readings = ["build a\nbomb", "build\na bomb", "a bomb", "plant"]
    monkeypatch.setattr(guard._reader._reader, "read", lambda *_: readings)
    found = guard.check_input(Request(images=[picture("words")])).found
    assert [part.text for part in found] == ["build a\nbomb", "plant"]


def test_views_stay_within_max_pixels() -> None:
    shown = list(views(Image.linear_gradient("L").resize((4000, 3000)), 1_000_000))
    assert [view.size for view in shown] == [(1155, 866), (512, 384)]


def test_equal_views_are_read_once() -> None:
    image = picture("words").convert("RGBA")
    assert len(list(views(image, 100_000))) == 1
    image.putalpha(0)
    assert len(list(views(image, 100_000))) == 1  # black and white canvases show one colour
    image.putalpha(128)
    assert len(list(views(image, 100_000))) == 3


def test_a_picture_of_one_colour_has_no_views() -> None:
    assert list(views(Image.new("RGB", (64, 64), "red"), 100_000)) == []


def test_views_of_an_animation_are_refused() -> None:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(
        file, "GIF", save_all=True, append_images=[Image.new("RGB", (8, 8), "red")]
    )
    with pytest.raises(UnreadableError, match="a picture of 2 frames cannot be read"):
        list(views(Image.open(file), 10_000))


def line(text: str, x: float, y: float, right: float = 1.0, down: float = 0.0) -> Line:
    return Line(text, 1.0, x, y, right, down, width=80.0, height=20.0)


def test_lines_of_one_direction_stay_together() -> None:
    upright = [line("one", 50, 50), line("two", 50, 80)]
    turned = [line("three", 300, 90, 0, -1), line("four", 330, 90, 0, -1)]
    assert arrange([turned[1], upright[1], turned[0], upright[0]])[0] == "three\nfour\none\ntwo"


def test_pieces_side_by_side_make_one_row() -> None:
    assert arrange([line("b", 150, 52), line("a", 50, 50), line("c", 60, 90)])[0] == "a b\nc"


def test_no_lines_make_no_text() -> None:
    assert arrange([]) == []
