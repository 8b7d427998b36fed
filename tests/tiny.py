"""Sixteen vision-language models with random weights, small enough to build in every test.

Nothing is downloaded: configurations, tokenizer and processor are made here. A family built twice
has the same weights. Works with and without torchvision, except for the families that `buildable`
leaves out: their image processors cannot be imported without it.
"""

from __future__ import annotations

import functools
import math
import string
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers.processing_utils import ProcessorMixin
from transformers.video_processing_utils import BaseVideoProcessor

hf: Any = transformers  # what its constructors declare is both more and less than what they take
HAS_TORCHVISION = find_spec("torchvision") is not None

QUESTION = "what is this ?"
SPECIAL_TOKENS = {
    "pad_token": "<pad>",
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "unk_token": "<unk>",
}
# Enough to learn words that tests use, so that a token is more than a byte.
CORPUS = (
    "what is in this picture ? a photo of a cat . describe the image",
    "the model should refuse unsafe requests . yes no harmful harmless",
    "Safe Unsafe Refusal Compliance <think> </think> <answer> </answer>",
)
CHAT_TEMPLATE = string.Template(
    "{% for message in messages %}{{ message['role'] }}: "
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}$image"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)

VIT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
CLIP = VIT | {"num_hidden_layers": 3, "projection_dim": 32}  # LLaVA reads the last layer but one
SIGLIP = VIT | {"vision_use_head": False}
SQUARE = {"height": 28, "width": 28}
TILINGS = [[28, 56], [56, 28], [56, 56]]
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}


@dataclass(frozen=True)
class TinyVLM:
    """A model, the processor that prepares its inputs, and a prompt with room for one image."""

    model: Any
    processor: Any
    prompt: str


Builder = Callable[[], TinyVLM]


def image(width: int = 70, height: int = 50, seed: int = 0) -> Image.Image:
    """Make an image of noise; the same seed gives the same image."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def buildable() -> list[str]:
    """Name the families that can be built in this environment."""
    if HAS_TORCHVISION:
        return list(FAMILIES)
    return [name for name in FAMILIES if name not in NEED_TORCHVISION]


def seeded(build: Builder) -> Builder:
    """Give every model of a family the same weights, and leave the global generator alone."""

    @functools.wraps(build)
    def build_seeded() -> TinyVLM:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return build()

    return build_seeded


# --- the families ---------------------------------------------------------------------------------


@seeded
def llava() -> TinyVLM:
    """CLIP, two linear layers, Llama."""
    tokenizer = make_tokenizer()
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**CLIP),
        text_config=text_config("LlamaConfig", tokenizer),
        image_token_id=tokenizer.image_token_id,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    processor = hf.LlavaProcessor(
        hf.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=SQUARE),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    )
    return assemble(hf.LlavaForConditionalGeneration, config, processor)


@seeded
def llava_next() -> TinyVLM:
    """LLaVA with the image cut into tiles."""
    tokenizer = make_tokenizer()
    config = hf.LlavaNextConfig(
        vision_config=hf.CLIPVisionConfig(**CLIP),
        text_config=text_config("LlamaConfig", tokenizer),
        image_token_id=tokenizer.image_token_id,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_grid_pinpoints=TILINGS,
    )
    processor = hf.LlavaNextProcessor(
        hf.LlavaNextImageProcessor(
            size={"shortest_edge": 28}, crop_size=SQUARE, image_grid_pinpoints=TILINGS
        ),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    )
    return assemble(hf.LlavaNextForConditionalGeneration, config, processor)


@seeded
def llava_onevision() -> TinyVLM:
    """SigLIP, tiles, Qwen2; takes videos too."""
    tokenizer = make_tokenizer(named={"video_token": "<video>"})
    config = hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(**SIGLIP),
        text_config=text_config("Qwen2Config", tokenizer),
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_grid_pinpoints=TILINGS,
    )
    processor = with_video(
        hf.LlavaOnevisionProcessor,
        hf.LlavaOnevisionImageProcessor(size=SQUARE, image_grid_pinpoints=TILINGS),
        tokenizer,
        "LlavaOnevisionVideoProcessor",
        num_image_tokens=4,
        vision_feature_select_strategy="full",
    )
    return assemble(hf.LlavaOnevisionForConditionalGeneration, config, processor)


@seeded
def qwen2_vl() -> TinyVLM:
    """Patches of any number packed in one sequence, merged four to one."""
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2, "patch_size": 14}
    return qwen("Qwen2VL", "Qwen2VL", vision, MROPE)


@seeded
def qwen2_5_vl() -> TinyVLM:
    """Qwen2-VL with attention in windows."""
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "out_hidden_size": 64,
        "patch_size": 14,
        "window_size": 56,
        "fullatt_block_indexes": [1],
    }
    return qwen("Qwen2_5_VL", "Qwen2VL", vision, MROPE)


@seeded
def qwen3_vl() -> TinyVLM:
    """Qwen-VL that also adds features of early vision layers to early text layers."""
    vision = {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 64,
        "out_hidden_size": 64,
        "patch_size": 16,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],
    }
    return qwen("Qwen3VL", "Qwen3VL", vision, MROPE | {"mrope_interleaved": True})


@seeded
def idefics3() -> TinyVLM:
    """SigLIP without padding images, pixel shuffle, Llama."""
    tokenizer = idefics_tokenizer()
    processor = hf.Idefics3Processor(
        hf.Idefics3ImageProcessor(size={"longest_edge": 64}, max_image_size={"longest_edge": 32}),
        tokenizer,
        image_seq_len=4,
        chat_template=tokenizer.chat_template,
    )
    config = idefics_config(hf.Idefics3Config, tokenizer)
    return assemble(hf.Idefics3ForConditionalGeneration, config, processor)


@seeded
def smolvlm() -> TinyVLM:
    """Idefics3 that takes videos."""
    tokenizer = idefics_tokenizer()
    processor = with_video(
        hf.SmolVLMProcessor,
        hf.SmolVLMImageProcessor(size={"longest_edge": 64}, max_image_size={"longest_edge": 32}),
        tokenizer,
        "SmolVLMVideoProcessor",
        image_seq_len=4,
    )
    config = idefics_config(hf.SmolVLMConfig, tokenizer)
    return assemble(hf.SmolVLMForConditionalGeneration, config, processor)


@seeded
def internvl() -> TinyVLM:
    """InternViT, pixel shuffle, Qwen2; up to three tiles."""
    tokenizer = make_tokenizer(
        image_token="<IMG_CONTEXT>",
        named={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    )
    config = hf.InternVLConfig(
        vision_config=VIT | {"image_size": [28, 28], "patch_size": [7, 7]},
        text_config=text_config("Qwen2Config", tokenizer),
        image_token_id=tokenizer.image_token_id,
        downsample_ratio=0.5,
    )
    processor = with_video(
        hf.InternVLProcessor,
        hf.GotOcr2ImageProcessor(size=SQUARE, crop_to_patches=True, min_patches=1, max_patches=3),
        tokenizer,
        "InternVLVideoProcessor",
        image_seq_length=4,
    )
    return assemble(hf.InternVLForConditionalGeneration, config, processor)


@seeded
def gemma3() -> TinyVLM:
    """SigLIP, average pooling, Gemma 3."""
    tokenizer = make_tokenizer(
        image_token="<image_soft_token>",
        named={"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"},
        placeholder="<start_of_image>",
    )
    text = text_config("Gemma3TextConfig", tokenizer, head_dim=16, sliding_window=64)
    config = hf.Gemma3Config(
        text_config=text,
        vision_config=SIGLIP | {"image_size": 56},
        mm_tokens_per_image=4,
        image_token_index=tokenizer.image_token_id,
        image_token_id=tokenizer.image_token_id,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
    )
    processor = hf.Gemma3Processor(
        hf.Gemma3ImageProcessor(size={"height": 56, "width": 56}),
        tokenizer,
        image_seq_length=4,
        chat_template=tokenizer.chat_template,
    )
    return assemble(
        hf.Gemma3ForConditionalGeneration, config, processor, placeholder="<start_of_image>"
    )


@seeded
def paligemma() -> TinyVLM:
    """SigLIP, one linear layer, Gemma; the prompt attends to itself both ways."""
    tokenizer = make_tokenizer()
    image_processor = hf.SiglipImageProcessor(size=SQUARE)
    image_processor.image_seq_length = 4
    processor = hf.PaliGemmaProcessor(
        image_processor, tokenizer, chat_template=tokenizer.chat_template
    )
    config = hf.PaliGemmaConfig(  # after the processor, which adds its location tokens
        text_config=text_config("GemmaConfig", tokenizer, head_dim=16),
        vision_config=SIGLIP,
        projection_dim=64,
        image_token_index=tokenizer.image_token_id,
        image_token_id=tokenizer.image_token_id,
    )
    return assemble(hf.PaliGemmaForConditionalGeneration, config, processor)


@seeded
def mllama() -> TinyVLM:
    """Tiles of one image side by side, read through cross-attention."""
    tokenizer = make_tokenizer(image_token="<|image|>", named={"python_token": "<|python_tag|>"})
    tilings = [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]]
    vision = VIT | {
        "num_global_layers": 1,
        "attention_heads": 4,
        "max_num_tiles": 4,
        "intermediate_layers_indices": [0, 1],
        "vision_output_dim": 96,  # three times 32: the output and two intermediate layers
        "supported_aspect_ratios": tilings,
    }
    rope = {"rope_type": "default", "rope_theta": 1e4}
    text = text_config(
        "MllamaTextConfig",
        tokenizer,
        num_hidden_layers=3,
        cross_attention_layers=[1],
        rope_parameters=rope,
    )
    config = hf.MllamaConfig(
        vision_config=hf.MllamaVisionConfig(**vision),
        text_config=text,
        image_token_index=tokenizer.image_token_id,
    )
    processor = hf.MllamaProcessor(
        hf.MllamaImageProcessor(size=SQUARE, max_image_tiles=4),
        tokenizer,
        chat_template=tokenizer.chat_template,
    )
    return assemble(hf.MllamaForConditionalGeneration, config, processor)


@seeded
def blip2() -> TinyVLM:
    """Four queries read the image for a Llama."""
    tokenizer = make_tokenizer(name_image_token=False)
    processor = hf.Blip2Processor(hf.BlipImageProcessor(size=SQUARE), tokenizer, num_query_tokens=4)
    config = blip_config(hf.Blip2Config, tokenizer)
    return assemble(hf.Blip2ForConditionalGeneration, config, processor, placeholder="")


@seeded
def instructblip() -> TinyVLM:
    """BLIP-2 whose queries have read the prompt."""
    tokenizer = make_tokenizer(name_image_token=False)
    processor = hf.InstructBlipProcessor(
        hf.BlipImageProcessor(size=SQUARE),
        tokenizer,
        make_tokenizer(name_image_token=False),
        num_query_tokens=4,
    )
    config = blip_config(hf.InstructBlipConfig, tokenizer)
    return assemble(hf.InstructBlipForConditionalGeneration, config, processor, placeholder="")


@seeded
def florence2() -> TinyVLM:
    """DaViT and an encoder-decoder; the vision features keep their two dimensions."""
    tokenizer = make_tokenizer()
    image_processor = hf.CLIPImageProcessor(size={"height": 64, "width": 64}, do_center_crop=False)
    image_processor.image_seq_length = 5
    processor = hf.Florence2Processor(image_processor, tokenizer, num_additional_image_tokens=1)
    config = hf.Florence2Config(
        text_config=bart_config(tokenizer),
        vision_config=davit_config(),
        image_token_id=tokenizer.image_token_id,
        is_encoder_decoder=True,
        decoder_start_token_id=tokenizer.eos_token_id,
    )
    return assemble(hf.Florence2ForConditionalGeneration, config, processor, placeholder="")


@seeded
def mistral3() -> TinyVLM:
    """Pixtral, whose images of any size share one sequence, and Mistral."""
    tokenizer = make_tokenizer(
        image_token="[IMG]",
        named={"image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"},
    )
    vision = VIT | {"image_size": 56, "patch_size": 7, "head_dim": 8}
    config = hf.Mistral3Config(
        vision_config=hf.PixtralVisionConfig(**vision),
        text_config=text_config("MistralConfig", tokenizer, head_dim=16),
        image_token_index=tokenizer.image_token_id,
        image_token_id=tokenizer.image_token_id,
        spatial_merge_size=2,
    )
    processor = hf.PixtralProcessor(
        hf.PixtralImageProcessor(size={"longest_edge": 56}, patch_size={"height": 14, "width": 14}),
        tokenizer,
        patch_size=7,
        spatial_merge_size=2,
        image_token="[IMG]",
        image_break_token="[IMG_BREAK]",
        image_end_token="[IMG_END]",
        chat_template=tokenizer.chat_template,
    )
    return assemble(hf.Mistral3ForConditionalGeneration, config, processor)


FAMILIES: dict[str, Builder] = {
    builder.__name__: builder
    for builder in (
        llava,
        llava_next,
        llava_onevision,
        qwen2_vl,
        qwen2_5_vl,
        qwen3_vl,
        idefics3,
        smolvlm,
        internvl,
        gemma3,
        paligemma,
        mllama,
        blip2,
        instructblip,
        florence2,
        mistral3,
    )
}
# PixtralProcessor always; the image processors of the other two up to transformers 5.19.
NEED_TORCHVISION = frozenset({"idefics3", "mistral3", "smolvlm"})


# --- what they share ------------------------------------------------------------------------------


def make_tokenizer(
    image_token: str = "<image>",
    named: Mapping[str, str] | None = None,
    extra: Iterable[str] = (),
    placeholder: str | None = None,
    name_image_token: bool = True,
) -> Any:
    """Train a byte-level tokenizer, which writes any text back exactly as it was.

    `named` become attributes of the tokenizer; `placeholder` stands for an image in a chat, if the
    image token itself does not. BLIP's processors want to find no `image_token` attribute.
    """
    names = dict(named or {})
    special = [*SPECIAL_TOKENS.values(), image_token, *names.values(), *extra]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400 + len(special),
        special_tokens=list(dict.fromkeys(special)),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(CORPUS * 20, trainer)
    if name_image_token:
        names["image_token"] = image_token
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=core,
        **SPECIAL_TOKENS,
        extra_special_tokens=names,
        padding_side="left",
        chat_template=CHAT_TEMPLATE.substitute(image=placeholder or image_token),
    )


def text_config(kind: str, tokenizer: Any, **options: Any) -> Any:
    """Configure a language model of two layers."""
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
    }
    return getattr(hf, kind)(**sizes | special_ids(tokenizer) | options)


def special_ids(tokenizer: Any) -> dict[str, int]:
    """Collect the ids that configurations and generation ask for."""
    return {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def assemble(kind: Any, config: Any, processor: Any, placeholder: str | None = None) -> TinyVLM:
    """Make the model, and let the image reach its output."""
    model = kind(config).eval()
    for weight in model.parameters():
        # As initialised for training, small weights, and gates and projections at zero, would all
        # but hide the image.
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.6 * math.sqrt(len(weight) / weight.numel()))
        elif weight.numel() == 1:
            torch.nn.init.constant_(weight, 0.5)
    tokenizer = processor.tokenizer
    model.generation_config.update(**special_ids(tokenizer), max_length=None)
    if placeholder is None:
        placeholder = tokenizer.image_token
    return TinyVLM(model, processor, f"{placeholder} {QUESTION}".lstrip())


class NoVideo(BaseVideoProcessor):
    """Takes the place of a video processor where torchvision, which all of them need, is absent."""

    def __init__(self) -> None:
        pass

    def to_dict(self) -> dict[str, Any]:
        return {"video_processor_type": "NoVideo"}


def with_video(
    kind: Any, image_processor: Any, tokenizer: Any, video_processor: str, **options: Any
) -> Any:
    """Make a processor that insists on a video processor."""
    options["chat_template"] = tokenizer.chat_template
    if HAS_TORCHVISION:
        return kind(image_processor, tokenizer, getattr(hf, video_processor)(), **options)
    # The check itself fails without torchvision, whatever it is given.
    with mock.patch.object(ProcessorMixin, "check_argument_for_proper_class"):
        return kind(image_processor, tokenizer, NoVideo(), **options)


def qwen(name: str, processors: str, vision: dict[str, Any], rope: dict[str, Any]) -> TinyVLM:
    """Build a Qwen-VL; `processors` is the generation that its pre-processing comes from."""
    placeholder = "<|vision_start|><|image_pad|><|vision_end|>"
    tokenizer = make_tokenizer(
        image_token="<|image_pad|>",
        named={"video_token": "<|video_pad|>"},
        extra=("<|vision_start|>", "<|vision_end|>"),
        placeholder=placeholder,
    )
    config = getattr(hf, f"{name}Config")(
        text_config=text_config(
            f"{name}TextConfig", tokenizer, head_dim=16, rope_parameters=rope
        ).to_dict(),
        vision_config={"num_heads": 4, "spatial_merge_size": 2, "temporal_patch_size": 2} | vision,
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    )
    token_area = (2 * vision["patch_size"]) ** 2
    image_processor = hf.Qwen2VLImageProcessor(
        size={"shortest_edge": token_area, "longest_edge": 16 * token_area},
        patch_size=vision["patch_size"],
        merge_size=2,
        temporal_patch_size=2,
    )
    kind = getattr(hf, f"{name}Processor")
    processor = with_video(kind, image_processor, tokenizer, f"{processors}VideoProcessor")
    model = getattr(hf, f"{name}ForConditionalGeneration")
    return assemble(model, config, processor, placeholder=placeholder)


def idefics_tokenizer() -> Any:
    """Make a tokenizer with the tokens that name a tile's place in the image."""
    return make_tokenizer(
        named={"video_token": "<video>"},
        extra=(
            "<fake_token_around_image>",
            "<end_of_utterance>",
            "<global-img>",
            *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
        ),
    )


def idefics_config(kind: Any, tokenizer: Any) -> Any:
    """Configure Idefics3 or its like."""
    return kind(
        vision_config=VIT | {"image_size": 32, "patch_size": 8},
        text_config=text_config("LlamaConfig", tokenizer),
        image_token_id=tokenizer.image_token_id,
        pad_token_id=tokenizer.pad_token_id,
        scale_factor=2,
    )


def blip_config(kind: Any, tokenizer: Any) -> Any:
    """Configure BLIP-2 or its like."""
    queries = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "encoder_hidden_size": 32,
        "vocab_size": len(tokenizer),
        "cross_attention_frequency": 1,
    }
    return kind(
        vision_config=VIT,
        qformer_config=queries,
        text_config=text_config("LlamaConfig", tokenizer).to_dict(),
        num_query_tokens=4,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )


def bart_config(tokenizer: Any) -> dict[str, Any]:
    """Configure Florence-2's encoder and decoder."""
    sizes = {
        "vocab_size": len(tokenizer),
        "d_model": 64,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "max_position_embeddings": 512,
        "decoder_start_token_id": tokenizer.eos_token_id,
        "forced_bos_token_id": None,
        "forced_eos_token_id": None,
    }
    return sizes | special_ids(tokenizer)


def davit_config() -> dict[str, Any]:
    """Configure Florence-2's vision encoder of four stages."""
    return {
        "depths": [1, 1, 1, 1],
        "embed_dim": [16, 16, 32, 32],
        "num_heads": [2, 2, 2, 2],
        "num_groups": [2, 2, 2, 2],
        "patch_size": [7, 3, 3, 3],
        "patch_stride": [4, 2, 2, 2],
        "patch_padding": [3, 1, 1, 1],
        "patch_prenorm": [False, True, True, True],
        "window_size": 4,
        "projection_dim": 64,
        "max_temporal_embeddings": 10,
        "max_position_embeddings": 10,
        "drop_path_rate": 0.0,
    }
