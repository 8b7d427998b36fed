"""Build the reference VLM out of base weights from pip packages and the trained ones."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.internvl.configuration_internvl import InternVLVisionConfig
from transformers.models.internvl.modeling_internvl import InternVLMultiModalProjector
from transformers.utils.import_utils import is_torchvision_available
from transformers.video_processing_utils import BaseVideoProcessor

from mmguard_plugins.errors import MMGuardError
from mmguard_trainers import packages
from mmguard_trainers.reference_vlm_drawing import CANVAS
from mmguard_trainers.reference_vlm_lora import merge

IMAGE_TOKENS = (CANVAS // 14 // 2) ** 2
"""Tokens the language model sees for one picture: a pixel shuffle merges two by two patches."""

MARKS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
"""Special tokens that are added to the language model's, by the names its processor wants."""

IMAGE_TEXT = "<img>" + "<IMG_CONTEXT>" * IMAGE_TOKENS + "</img>"
"""What the processor writes in the place of a picture."""

WEIGHTS = Path(__file__).parent / "weights" / "reference_vlm"
"""Where this package keeps the weights it was released with."""

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] in ['image', 'image_url'] %}<IMG_CONTEXT>\n"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_LAYOUT = 1  # raise when assemble writes something else from the same weights

_VISION_NAMES = (
    ("norm1", "layernorm_before"),
    ("norm2", "layernorm_after"),
    ("attention.attention.query", "attention.q_proj"),
    ("attention.attention.key", "attention.k_proj"),
    ("attention.attention.value", "attention.v_proj"),
    ("attention.output.dense", "attention.projection_layer"),
    ("layer_scale1.lambda1", "lambda_1"),
    ("layer_scale2.lambda1", "lambda_2"),
)


class WeightsMissing(MMGuardError):
    """A weights folder is not there, or has no weights in it."""


def assemble(cache: Path | None = None, weights: Path | None = None) -> Path:
    """Merge `weights` into the base weights from pip; return a folder transformers can load.

    The folder is written beside its place in `cache` and renamed when whole, so a folder that is
    there is done; it is then returned as it is. Its name holds a hash of the weights and of the
    versions of the packages that the base weights come from. Takes about half a minute.
    """
    weights = WEIGHTS if weights is None else weights
    cache = default_cache() if cache is None else cache
    path = weights_file(weights)
    sources = {name: packages.installed(name) for name in packages.WEIGHTS}
    key = hashlib.sha256(path.read_bytes())
    key.update(json.dumps([_LAYOUT, sources], sort_keys=True).encode())
    folder = cache / f"reference-vlm-{key.hexdigest()[:16]}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".reference-vlm-", dir=cache) as scratch:
        part = Path(scratch) / "model"
        model, tokenizer = build_base()
        merge(model, load_file(path))
        move(model, torch.bfloat16)
        write_model(model, tokenizer, part)
        try:
            part.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first, with the same files
                raise
    return folder


def weights_file(weights: Path) -> Path:
    """Return the file with the tensors of a weights folder, which must be there."""
    path = weights / "model.safetensors"
    if not path.is_file():
        raise WeightsMissing(f"no weights in {weights.name!r}; run 'mmguard train reference-vlm'")
    return path


def default_cache() -> Path:
    """Return the folder that assembled models are kept in where none is named."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "mmguard"


def load(folder: Path) -> tuple[InternVLForConditionalGeneration, InternVLProcessor]:
    """Return the model, in bf16, and the processor out of a folder that `assemble` wrote.

    Without torchvision the processor reads pictures only; videos need it.
    """
    model = InternVLForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16).eval()
    if is_torchvision_available():
        return model, AutoProcessor.from_pretrained(folder)
    settings = json.loads((folder / "processor_config.json").read_text())
    processor = _ImageOnlyProcessor(
        image_processor=image_processor(),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        video_processor=_NoVideo(),
        image_seq_length=settings["image_seq_length"],
        chat_template=(folder / "chat_template.jinja").read_text(),
    )
    return model, processor


def build_base() -> tuple[InternVLForConditionalGeneration, PreTrainedTokenizerBase]:
    """Return the model before training, in fp32, and its tokenizer; the projector is random.

    The four tokens that mark a picture get the mean word embedding, so that none is ever likely.
    """
    language, tokenizer = packages.smollm2(MARKS)
    mean = word_embeddings(language).mean(0)
    language.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        word_embeddings(language)[-len(MARKS) :] = mean
    side = CANVAS // 14
    config = InternVLConfig(
        text_config=language.config,
        vision_config=InternVLVisionConfig(
            hidden_size=384,
            intermediate_size=1536,
            num_hidden_layers=12,
            num_attention_heads=6,
            image_size=[CANVAS, CANVAS],
            patch_size=[14, 14],
            attention_bias=True,
            use_mean_pooling=False,  # keeps DINOv2's last norm
        ),
        image_token_id=len(tokenizer) - len(MARKS) + list(MARKS).index("context_image_token"),
        image_seq_length=IMAGE_TOKENS,
        downsample_ratio=0.5,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    model = InternVLForConditionalGeneration(config).float().eval()
    model.model.vision_tower.load_state_dict(vision_state(packages.dinov2_state(), side))
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.tie_weights()
    return model, tokenizer


def build_projector(dim: int) -> InternVLMultiModalProjector:
    """Return a projector to embeddings of size `dim`, with random weights."""
    config = InternVLConfig(
        text_config=LlamaConfig(hidden_size=dim),
        vision_config=InternVLVisionConfig(hidden_size=384),
        downsample_ratio=0.5,
    )
    return InternVLMultiModalProjector(config)


def vision_state(dinov2: dict[str, Tensor], side: int) -> dict[str, Tensor]:
    """Rename DINOv2's weights to InternVL's, with positions interpolated to `side` patches a side.

    The two encoders are the same function: patches, class token, pre-norm blocks, layer scale.
    """
    state: dict[str, Tensor] = {}
    for name, tensor in dinov2.items():
        renamed = name
        for old, new in _VISION_NAMES:
            renamed = renamed.replace(old, new)
        state[renamed] = tensor.float()
    positions = state["embeddings.position_embeddings"]  # (1, 1 + 37 * 37, 384)
    before = round((positions.shape[1] - 1) ** 0.5)
    grid = positions[:, 1:].unflatten(1, (before, before)).permute(0, 3, 1, 2)
    grid = nn.functional.interpolate(grid, (side, side), mode="bicubic", align_corners=False)
    grid = grid.flatten(2).transpose(1, 2)
    state["embeddings.position_embeddings"] = torch.cat([positions[:, :1], grid], dim=1)
    return state


def write_model(
    model: InternVLForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """Write model, tokenizer, chat template, processor and generation settings to `folder`."""
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=128,
        do_sample=False,
    )
    model.save_pretrained(folder)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(folder)
    size = {"height": CANVAS, "width": CANVAS}
    image = json.loads(image_processor().to_json_string())
    settings = {
        "processor_class": "InternVLProcessor",
        "image_seq_length": IMAGE_TOKENS,
        "image_processor": image,
        "video_processor": {
            "video_processor_type": "InternVLVideoProcessor",
            "size": size,
            "image_mean": image["image_mean"],
            "image_std": image["image_std"],
        },
    }
    (folder / "processor_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def image_processor() -> GotOcr2ImageProcessor:
    """Return what makes pixel values of a picture: one tile, `CANVAS` pixels a side."""
    return GotOcr2ImageProcessor(
        size={"height": CANVAS, "width": CANVAS},
        crop_to_patches=False,
        max_patches=1,  # the processor asks for tiles by default; one tile is the picture
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )


def word_embeddings(model: PreTrainedModel) -> Tensor:
    """Return the language model's word embeddings, the tensor itself: (words, dim)."""
    weight: Any = model.get_input_embeddings().weight
    embeddings: Tensor = weight.detach()
    return embeddings


def move(model: nn.Module, target: torch.device | torch.dtype) -> None:
    """Move or cast `model`, in place."""
    nn.Module.to(model, target)


class _NoVideo(BaseVideoProcessor):
    """Stands in for the video processor that InternVL's processor insists on."""

    # transformers builds no video processor without torchvision, pictures or not; remove this, and
    # _ImageOnlyProcessor, when AutoProcessor loads InternVL without torchvision.
    def __init__(self) -> None:
        pass

    def __call__(self, *_args: Any, **_kwargs: Any) -> Any:
        """Refuse."""
        raise packages.PackageMissing(
            "package 'torchvision' is not installed, which videos need; pip install torchvision"
        )


class _ImageOnlyProcessor(InternVLProcessor):
    """InternVL's processor, content with `_NoVideo`."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        """Check all parts but the stand-in, whose check itself needs torchvision."""
        if isinstance(argument, _NoVideo):
            return _NoVideo
        return super().check_argument_for_proper_class(argument_name, argument)  # type: ignore[no-untyped-call]
