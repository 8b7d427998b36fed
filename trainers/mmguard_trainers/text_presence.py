"""Train the text-in-image test of `image_text`: a small net that says where text may stand.

Words of drawn letters on photos from Debian's wallpaper packages, on flat colours and on what only
looks like text. DejaVu's fonts and the pictures of scikit-image are kept for the benchmark.
"""

from __future__ import annotations

import json
import random
import subprocess
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - as everybody calls it
from PIL import Image
from pydantic import Field
from torch import Tensor, nn
from tqdm import tqdm

from mmguard_plugins.guard import StrictModel
from mmguard_plugins.guards.image_text.presence import CELL, MODEL, NAME, TextPresence
from mmguard_plugins.weights import MANIFEST, manifest_of
from mmguard_trainers import checkpoints, packages
from mmguard_trainers.packages import PackageMissing
from mmguard_trainers.text_presence_drawing import SIDE, Sample, sample

WALLPAPERS = {
    "gnome-backgrounds": "CC-BY-SA-3.0, GPL-2",
    "lomiri-wallpapers-16.04": "CC-BY-4.0, CC-BY-SA-3.0, CC-BY-SA-4.0, CC0-1.0, Expat",
    "lomiri-wallpapers-20.04": "CC-BY-4.0, CC-BY-SA-3.0, CC-BY-SA-4.0, CC0-1.0, Expat",
    "mate-backgrounds": "GPL-2+, CC-BY-SA-4.0",
    "palapeli-data": "GPL-2+, CC0, LGPL-2+, GFDL-1.2+",
    "plasma-workspace-wallpapers": "GPL-2+",
    "ukui-wallpapers": "CC-BY-SA-3.0",
}
LETTERED = (
    "logo", "MATE", "screenshot", "Radioactive", "Konqui", "GreenTraditional", "puzzletable",
    "firstgeneration", "kylin",
)  # fmt: skip
KEPT_FONTS = ("DejaVu",)  # the benchmark's
NO_LETTERS = ("LastResort", "Siz", "cmex", "cmsy", "cmmi", "NonUni")
KEEP_EVERY = 6  # of the photos, one in so many judges the training
LONGEST = 1400
MEAN, SPREAD = 127.5, 64.0


class TextPresenceConfig(StrictModel):
    """What to draw, how long to learn, and where to write."""

    output: Path = Field(description="The weights folder to write.")
    photos: Path = Field(
        description="Folder with the wallpapers; what is missing is downloaded with apt-get."
    )
    steps: int = Field(default=2500, ge=1)
    batch: int = Field(default=32, ge=2)
    learning_rate: float = Field(default=4e-3, gt=0)
    judged_every: int = Field(default=250, ge=1, description="Steps between two judgements.")
    judged: int = Field(default=1000, ge=10, description="Pictures in a judgement.")
    patience: int = Field(default=4, ge=1, description="Judgements without progress to stop after.")
    recall: float = Field(default=0.99, gt=0, lt=1, description="What the threshold must find.")
    seed: int = 0


class Net(nn.Module):
    """Looks at cells of `CELL` pixels, each with some 100 pixels around it; answers in logits."""

    def __init__(self, width: int = 48) -> None:
        """Set up the layers; the first halves both sides twice, which is what makes it cheap."""
        super().__init__()
        self.look = _step(3, 32, kernel=6, stride=4, padding=1)
        self.down = _step(32, width, stride=2)
        self.mix = _step(width, width)
        self.around = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, 3, padding=d, dilation=d, groups=width, bias=False),
                *_step(width, width, kernel=1, padding=0),
            )
            for d in (1, 2, 3)
        )
        self.say = nn.Conv2d(width, 1, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return (n, 1, h / CELL, w / CELL) for (n, 3, h, w) pixels in 0..255."""
        x = self.mix(self.down(self.look((pixels - MEAN) / SPREAD)))
        for layer in self.around:
            x = x + layer(x)
        logits: Tensor = self.say(x)
        return logits


def presence_loss(logits: Tensor, wanted: Tensor) -> Tensor:
    """Return the loss of cells, and of the surest cell of each picture.

    `wanted` is 1 for text, 0 for none, -1 for either.
    """
    known = wanted >= 0
    cells = F.binary_cross_entropy_with_logits(logits, wanted.clamp(min=0), reduction="none")
    text, none = known & (wanted > 0), known & (wanted == 0)
    of_cells = cells[text].sum() / text.sum().clamp(min=1) + 2 * cells[none].mean()
    surest = logits.masked_fill(~known, -30.0).flatten(1).amax(1)
    has_text = text.flatten(1).any(1)
    whole = has_text | ~(wanted < 0).flatten(1).any(1)  # text of any other size: no answer is wrong
    of_pictures = F.binary_cross_entropy_with_logits(surest[whole], has_text[whole].float())
    return of_cells + of_pictures


def train(config: TextPresenceConfig) -> Path:
    """Train, choose the threshold and write the weights folder; return it."""
    torch.manual_seed(config.seed)
    photos = load_photos(fetch_photos(config.photos))
    kept, used = photos[::KEEP_EVERY], [p for i, p in enumerate(photos) if i % KEEP_EVERY]
    fonts = [p for n, p in packages.fonts().items() if not n.startswith(KEPT_FONTS)]
    fonts = [path for path in fonts if not any(mark in path.stem for mark in NO_LETTERS)]
    judges = fonts[::KEEP_EVERY]
    rng = random.Random(f"judge {config.seed}")
    trial = [_tensors([sample(rng, kept, judges)]) for _ in range(config.judged)]
    rng = random.Random(config.seed)
    learnt = [font for font in fonts if font not in judges]

    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), config.learning_rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=config.steps
    )
    best, state, worse = -1.0, net.state_dict(), 0
    figures: dict[str, float] = {}
    bar = tqdm(range(config.steps), desc="text presence")
    for step in bar:
        pixels, wanted = _tensors([sample(rng, used, learnt) for _ in range(config.batch)])
        loss = presence_loss(net(pixels), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % config.judged_every and step + 1 < config.steps:
            continue
        now = judge(net, trial, config.recall)
        bar.set_postfix({"loss": round(loss.item(), 3), **now})
        worse += 1
        if now["passed"] > best:
            best, worse, figures = now["passed"], 0, now | {"step": step + 1}
            state = {name: value.clone() for name, value in net.state_dict().items()}
        if worse >= config.patience:
            break
    net.load_state_dict(state)
    return save(config, net, figures)


@torch.inference_mode()
def judge(net: Net, trial: Sequence[tuple[Tensor, Tensor]], recall: float) -> dict[str, float]:
    """Return the threshold that finds `recall` of text, and the share without text it passes."""
    net.eval()
    with_text, without = list[float](), list[float]()
    for pixels, wanted in trial:
        surest = float(net(pixels).sigmoid().max())
        if bool((wanted == 1).any()):
            with_text.append(surest)
        elif not bool((wanted < 0).any()):
            without.append(surest)
    net.train()
    threshold = float(np.quantile(with_text, 1 - recall))
    passed = float((np.array(without) < threshold).mean())
    return {"threshold": round(threshold, 4), "passed": round(passed, 4)}


def save(config: TextPresenceConfig, net: Net, figures: dict[str, float]) -> Path:
    """Write model, card and manifest, the manifest last; see that the folder loads."""
    config.output.mkdir(parents=True, exist_ok=True)
    checkpoints.write(export(net), config.output / MODEL)
    card = {
        "what": "says where in a picture text may stand",
        "data": "letters drawn with the fonts of mmguard_trainers.packages.fonts(), less DejaVu,"
        " on flat colours, patterns and photos",
        "photos": WALLPAPERS,
        "licence": "Apache-2.0; no picture or font is part of the weights",
        "config": json.loads(config.model_dump_json(exclude={"output", "photos"})),
        "versions": packages.versions("torch", "onnx", "numpy", "pillow"),
        "parameters": sum(p.numel() for p in net.parameters()),
        "figures": figures | {"recall": config.recall, "pictures": config.judged},
        "figures of": "drawn pictures with photos and fonts that were not trained on",
    }
    checkpoints.write(json.dumps(card, indent=2) + "\n", config.output / "card.json")
    manifest = manifest_of(config.output, NAME, [MODEL, "card.json"], {})
    checkpoints.write(manifest, config.output / MANIFEST)
    TextPresence(config.output)
    return config.output


def export(net: Net) -> bytes:
    """Return the net as ONNX, its answers as probabilities."""
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        path = Path(scratch) / MODEL
        # torch deprecates this exporter; the newer one needs onnxscript. Change when it goes.
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(
            nn.Sequential(net, nn.Sigmoid()).eval(),
            (torch.zeros(1, 3, 64, 96),),
            path,
            input_names=["pixels"],
            output_names=["heat"],
            dynamic_axes={"pixels": {2: "height", 3: "width"}, "heat": {2: "rows", 3: "columns"}},
            dynamo=False,
            opset_version=17,
        )
        return path.read_bytes()


def fetch_photos(folder: Path) -> Path:
    """Unpack Debian's wallpaper packages into `folder` unless they are there."""
    for name in WALLPAPERS:
        if (folder / name).is_dir():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            command = ["apt-get", "download", name]
            try:
                subprocess.run(command, cwd=scratch, capture_output=True, check=True)  # noqa: S603 - apt-get
                archive = next(Path(scratch).glob("*.deb"))
                unpack = ["dpkg", "-x", str(archive), f"{scratch}/{name}"]
                subprocess.run(unpack, capture_output=True, check=True)  # noqa: S603 - dpkg
            except (OSError, subprocess.CalledProcessError, StopIteration) as error:
                raise PackageMissing(
                    f"Debian package {name!r} did not arrive; run 'apt-get download {name}'"
                    f" elsewhere and unpack it into {folder.name}/{name}"
                ) from error
            (Path(scratch) / name).rename(folder / name)
    return folder


def load_photos(folder: Path) -> list[Image.Image]:
    """Return the wallpapers, each once, none of those that bear letters."""
    found = [path for name in WALLPAPERS for path in _largest(folder / name)]
    if len(found) < 2:
        raise PackageMissing(f"folder {folder.name!r} holds {len(found)} photos; empty it")
    photos: list[Image.Image] = []
    for path in found:
        with Image.open(path) as image:
            image.draft("RGB", (LONGEST, LONGEST))
            photo = image.convert("RGB")
        photo.thumbnail((LONGEST, LONGEST))
        if min(photo.size) >= SIDE:
            photos.append(photo)
    return photos


def _largest(folder: Path) -> Iterator[Path]:
    """Yield the largest file of each folder of sizes, and every file of other folders."""
    files = sorted(p for e in ("jpg", "png", "webp") for p in folder.rglob(f"*.{e}"))
    sizes: dict[Path, Path] = {}
    for path in files:
        if any(mark in str(path.relative_to(folder)) for mark in LETTERED):
            continue
        if not path.stem[0].isdigit():
            yield path
        elif path.parent not in sizes or _bytes(path) > _bytes(sizes[path.parent]):
            sizes[path.parent] = path
    yield from sizes.values()


def _bytes(path: Path) -> int:
    return path.stat().st_size


def _tensors(samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    pixels = np.stack([np.asarray(s.picture, np.float32).transpose(2, 0, 1) for s in samples])
    text = torch.from_numpy(np.stack([s.text for s in samples]))[:, None]  # (n, 1, side, side)
    ignored = F.max_pool2d((text < 0).float(), CELL) > 0
    share = F.avg_pool2d((text > 0).float(), CELL)
    wanted = torch.where(share > 0.4, 1.0, torch.where(share > 0, -1.0, 0.0))
    wanted = torch.where(ignored & (wanted < 1), -1.0, wanted)
    return torch.from_numpy(pixels), wanted


def _step(
    before: int, after: int, kernel: int = 3, stride: int = 1, padding: int = 1
) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, after, kernel, stride, padding, bias=False),
        nn.BatchNorm2d(after),
        nn.ReLU(inplace=True),
    )
