"""Pictures and questions that the reference VLM learns from and is judged on.

Three galleries: `shapes` (easy-VQA), `photos` (CIFAR-10) and `words` (short words drawn here, a
share of them on photos). A picture is drawn when asked for, always the same for the same seed.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from mmguard_trainers import packages
from mmguard_trainers import reference_vlm_drawing as drawing

COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")

OBJECT_QUESTIONS = (
    "What is in the picture?",
    "What is this?",
    "What does the image show?",
    "What do you see in this image?",
    "What object or animal is in the photo?",
)
CAPTION_QUESTIONS = (
    "Describe the image.",
    "Describe this picture.",
    "Write a caption for the image.",
    "What can you see? Describe it briefly.",
)
READ_QUESTIONS = (
    "What does the text say?",
    "What does the text in the image say?",
    "Read the text in the image.",
    "Which word is written here?",
    "Read aloud what is written.",
)
PRESENCE_QUESTIONS = ("Is there {} in the picture?", "Does the image show {}?")
TEXT_PRESENCE_QUESTIONS = ("Is there any text in the image?", "Does the image contain text?")

NAMES: dict[str, tuple[str, ...]] = {
    "thing": packages.CIFAR10_NAMES,
    "shape": SHAPES,
    "colour": COLOURS,
    "text": drawing.WORDS,
}
"""What stage 1 asks about a picture, by the field of `Picture` that holds the answer."""


@dataclass(frozen=True)
class Turn:
    """One question and the answer that is right for it."""

    question: str
    answer: str


@dataclass(frozen=True)
class Picture:
    """What one picture shows; a field is None where the question has no answer."""

    thing: str | None = None
    shape: str | None = None
    colour: str | None = None
    text: str | None = None
    questions: tuple[Turn, ...] = ()


@dataclass(frozen=True)
class Gallery:
    """Pictures of one source and split: what each shows, and how to draw it."""

    name: str
    pictures: tuple[Picture, ...]
    draw: Callable[[int], Image.Image]

    def __len__(self) -> int:
        return len(self.pictures)


def shapes(split: str) -> Gallery:
    """Return easy-VQA's `split`; training pictures come twice, the second time mirrored."""
    paths, asked = packages.easy_vqa(split)
    turns: dict[int, list[Turn]] = {}
    for question in asked:
        turns.setdefault(question.image, []).append(Turn(question.text, question.answer))
    pictures = tuple(shape(turns[index]) for index in range(len(paths)))
    copies = 2 if split == "train" else 1

    def draw(index: int) -> Image.Image:
        image = Image.open(paths[index % len(paths)]).convert("RGB")
        return _mirrored(image) if index >= len(paths) else image

    return Gallery(f"shapes-{split}", pictures * copies, draw)


def photos(split: str, sheets: Path) -> Gallery:
    """Return CIFAR-10's `split`."""
    pixels, labels = packages.cifar10(sheets, split)
    pictures = tuple(Picture(thing=packages.CIFAR10_NAMES[label]) for label in labels)
    return Gallery(f"photos-{split}", pictures, lambda index: Image.fromarray(pixels[index]))


def words(split: str, n_images: int, backs: Gallery) -> Gallery:
    """Return `n_images` drawn words; `backs` are the photos that one picture in five is drawn on.

    The words are the same in both splits ("train" and "test"); the test's font families are none
    of training's. Case, size, place, colours and slant are drawn afresh for each picture.
    """
    faces = drawing.faces(held_out=split == "test")
    seed = zlib.crc32(split.encode())
    picks = [_pick(random.Random(seed + index), len(backs)) for index in range(n_images)]
    pictures = tuple(
        Picture(text=word, thing=None if back is None else backs.pictures[back].thing)
        for word, back in picks
    )

    def draw(index: int) -> Image.Image:
        word, back = picks[index]
        rng = random.Random(seed + index + 1)
        face, photo = rng.choice(faces), None if back is None else backs.draw(back)
        return drawing.draw_word(word, face, rng, photo)

    return Gallery(f"words-{split}", pictures, draw)


def shape(asked: list[Turn]) -> Picture:
    """Read shape and colour off the questions: what they ask after is there unless denied."""
    held: set[str] = set()
    for turn in asked:
        words_ = turn.question.rstrip("?").split()
        denied = turn.answer == ("yes" if {"not", "no"} & set(words_) else "no")
        held.add(turn.answer)
        held.update(() if denied else words_)
    return Picture(
        shape=next((shape for shape in SHAPES if shape in held), None),
        colour=next((colour for colour in COLOURS if colour in held), None),
        questions=tuple(asked),
    )


def turns(picture: Picture, rng: random.Random) -> list[Turn]:
    """Return a few questions on `picture`, with answers: wordings and choice are drawn anew.

    Two for photos and words, one of them on what the picture is about; four for shapes.
    """
    sentence = caption(picture)
    asked = [Turn(rng.choice(CAPTION_QUESTIONS), sentence)] if sentence else []
    if picture.questions:
        few = _telling(picture.questions, rng)
        return few + (asked if rng.random() < 0.5 else [_text_presence(picture, rng)])
    if picture.text is not None:
        asked.insert(0, reading(picture, rng))
    if picture.thing is not None:
        question = rng.choice(OBJECT_QUESTIONS)
        asked.insert(len(asked) - 1, Turn(question, f"{article(picture.thing)}."))
    asked = rng.sample(asked, min(2, len(asked)))
    if rng.random() < 0.4:
        more = _presence if picture.thing is not None and rng.random() < 0.6 else _text_presence
        asked[-1] = more(picture, rng)
    return asked


def reading(picture: Picture, rng: random.Random) -> Turn:
    """Ask what is written in `picture`, which has text."""
    return Turn(rng.choice(READ_QUESTIONS), f'The text says "{picture.text}".')


def caption(picture: Picture) -> str | None:
    """Describe `picture` in one short sentence, or not where too little is known of it."""
    if picture.shape is not None and picture.colour is not None:
        return f"A {picture.colour} {picture.shape}."
    if picture.thing is None and picture.text is None:
        return None
    photo = None if picture.thing is None else f"A photo of {article(picture.thing).lower()}"
    if picture.text is None:
        return f"{photo}."
    return f'{photo or "An image"} with the word "{picture.text}" on it.'


def article(noun: str) -> str:
    """Put "A" or "An" before `noun`."""
    return f"{'An' if noun[0] in 'aeiou' else 'A'} {noun}"


def labels(picture: Picture) -> list[int]:
    """Return the place of `picture`'s answer in each of `NAMES`, or -1 where there is none."""
    answers = [getattr(picture, field) for field in NAMES]
    return [
        -1 if answer is None else names.index(answer)
        for answer, names in zip(answers, NAMES.values(), strict=True)
    ]


def _telling(questions: Sequence[Turn], rng: random.Random) -> list[Turn]:
    """Draw three questions, among them one whose yes or no the wording does not give away.

    easy-VQA answers four in five plain questions with no and negated ones with yes; drawn as they
    come, they teach a model to answer from the question alone.
    """
    kinds: tuple[list[Turn], list[Turn], list[Turn]] = ([], [], [])
    for turn in questions:
        negated = " not " in turn.question or " no " in turn.question
        usual = "yes" if negated else "no"
        kinds[2 if turn.answer not in ("yes", "no") else int(turn.answer == usual)].append(turn)
    drawn = [rng.choice(kind) for kind in kinds if kind]
    rng.shuffle(drawn)
    return drawn


def _presence(picture: Picture, rng: random.Random) -> Turn:
    named = picture.thing if rng.random() < 0.5 else rng.choice(packages.CIFAR10_NAMES)
    question = rng.choice(PRESENCE_QUESTIONS).format(article(str(named)).lower())
    return Turn(question, "yes" if named == picture.thing else "no")


def _text_presence(picture: Picture, rng: random.Random) -> Turn:
    answer = "yes" if picture.text is not None else "no"
    return Turn(rng.choice(TEXT_PRESENCE_QUESTIONS), answer)


def _pick(rng: random.Random, n_backs: int) -> tuple[str, int | None]:
    back = rng.randrange(n_backs) if rng.random() < 0.2 else None
    return rng.choice(drawing.WORDS), back


def _mirrored(image: Image.Image) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
