"""The pictures of the demo: real photos out of packages, drawings and rendered words."""

from __future__ import annotations

import base64
import io

from PIL import Image, ImageDraw, ImageFont

SIZE = 448


def cat() -> Image.Image:
    """Return a photo of a cat (scikit-image, `data.chelsea`)."""
    from skimage import data

    return Image.fromarray(data.chelsea())  # type: ignore[no-untyped-call]


def flower() -> Image.Image:
    """Return a photo of a flower (scikit-learn, `load_sample_image`)."""
    from sklearn.datasets import load_sample_image

    return Image.fromarray(load_sample_image("flower.jpg"))


def red_triangle() -> Image.Image:
    """Return a drawing that the reference VLM was not trained on (easy-VQA, test picture 0)."""
    from easy_vqa import get_test_image_paths

    with Image.open(get_test_image_paths()[0]) as image:
        return image.convert("RGB")


def words(text: str, on: Image.Image | None = None) -> Image.Image:
    """Return `text` in large letters on white, or on a photo."""
    image = (
        on.convert("RGB").resize((SIZE, SIZE)) if on else Image.new("RGB", (SIZE, SIZE), "white")
    )
    draw = ImageDraw.Draw(image)
    lines = _wrapped(text)
    size = min(96, int(SIZE / (0.62 * max(len(line) for line in lines))))
    font = ImageFont.load_default(size)
    top = (SIZE - len(lines) * size * 1.3) / 2
    for i, line in enumerate(lines):
        place = (SIZE / 2, top + (i + 0.5) * size * 1.3)
        fill, stroke = ("white", "black") if on else ("black", "black")
        draw.text(
            place, line, font=font, fill=fill, anchor="mm", stroke_width=2, stroke_fill=stroke
        )
    return image


def hidden_words(text: str) -> Image.Image:
    """Return a picture whose words stand in fully transparent pixels."""
    ink = words(text).convert("L").point([255] * 128 + [0] * 128)
    image = Image.new("RGBA", (SIZE, SIZE), (255, 255, 255, 255))
    image.paste((0, 0, 0, 0), mask=ink)
    return image


def broken() -> dict[str, str]:
    """Return an image part whose data is cut off in the middle."""
    buffer = io.BytesIO()
    words("cut").save(buffer, "PNG")
    half = buffer.getvalue()[: len(buffer.getvalue()) // 2]
    return {"type": "image", "url": f"data:image/png;base64,{base64.b64encode(half).decode()}"}


def thumbnail(image: Image.Image, side: int = 220) -> str:
    """Return a small copy as a data URL, for the page."""
    small = image.convert("RGBA")
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _wrapped(text: str, width: int = 14) -> list[str]:
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if len(joined) > width and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = joined
    return lines
