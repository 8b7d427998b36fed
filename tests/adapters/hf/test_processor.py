"""What the guards see of a processor call."""

from __future__ import annotations

import contextlib
import copy
import inspect
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

from mmguard_adapters.hf import decision_of, guard  # noqa: E402
from mmguard_adapters.hf.provenance import Admission  # noqa: E402
from mmguard_plugins import Action, Decision, PartKind, Request, Stage  # noqa: E402
from tests import tiny  # noqa: E402
from tests.adapters.hf import guarding  # noqa: E402

LONG = {"min_new_tokens": 4, "max_new_tokens": 6, "do_sample": False}
RED = Image.new("RGB", (70, 50), guarding.BAD_COLOUR)


class Guarded:
    def __init__(self, family: str = "llava", **settings: Any) -> None:
        self.vlm = tiny.FAMILIES[family]()
        self.watcher = guarding.Watcher()
        engine = guarding.engine_of(self.watcher, **settings)
        guard(self.vlm.model, self.vlm.processor, engine)

    def __call__(self, text: Any, images: Any, **options: Any) -> Any:
        return self.vlm.processor(
            text=text, images=images, return_tensors="pt", padding=True, **options
        )

    def blocked(self, inputs: Any) -> list[bool]:
        result = self.vlm.model.generate(**inputs, **LONG)
        return [d.blocked for d in result.mmguard]

    @property
    def request(self) -> Request:
        return self.watcher.requests[-1]


def shown(request: Request) -> list[Any]:
    return [part.data.tobytes() for part in request.images]


# --- which image belongs to which row -------------------------------------------------------------

A, B, C = (tiny.image(seed=i) for i in range(3))
SEVERAL = (
    "llava",
    "llava_next",
    "llava_onevision",
    "qwen2_vl",
    "qwen3_vl",
    "internvl",
    "gemma3",
    "mllama",
    "idefics3",
    "smolvlm",
    "mistral3",
)


@pytest.mark.parametrize("family", [name for name in SEVERAL if name in tiny.buildable()])
@pytest.mark.parametrize("bad", [0, 1, 2])
def test_rows_may_hold_one_and_two_images(family: str, bad: int) -> None:
    guarded = Guarded(family)
    one = guarded.vlm.prompt
    placeholder = one.removesuffix(tiny.QUESTION)
    images = [A, B, C]
    free = guarded([one, placeholder + one], [[A], [B, C]])
    assert guarded.blocked(free) == [False, False]
    assert shown(guarded.watcher.requests[0]) == [A.tobytes()]
    assert shown(guarded.watcher.requests[1]) == [B.tobytes(), C.tobytes()]
    images[bad] = RED
    inputs = guarded([one, placeholder + one], [images[:1], images[1:]])
    expected = guarded.vlm.model.generate(**free, **LONG)
    result = guarded.vlm.model.generate(**inputs, **LONG)
    assert [d.blocked for d in result.mmguard] == [bad == 0, bad != 0]
    kept = 1 if bad == 0 else 0
    length = expected.shape[1]
    assert result[kept, :length].tolist() == expected[kept].tolist()


@pytest.mark.parametrize(
    "images, expected",
    [
        ([A, B, C], [[A], [B, C]]),  # by placeholder
        ([[A], [B, C]], [[A], [B, C]]),
    ],
)
def test_a_flat_list_is_shared_out_by_placeholder(images: Any, expected: Any) -> None:
    guarded = Guarded()
    guarded(["<image> a", "<image> <image> b"], images)
    seen = [shown(r) for r in guarded.watcher.requests]
    assert seen == [[i.tobytes() for i in row] for row in expected]


def test_without_placeholders_each_row_has_one_image() -> None:
    guarded = Guarded("blip2")
    assert guarded.blocked(guarded(["a", "b"], [A, RED])) == [False, True]


def test_images_alone_are_rows() -> None:
    guarded = Guarded("blip2")
    inputs = guarded.vlm.processor(images=[A, RED], return_tensors="pt")
    assert guarded.blocked(inputs) == [False, True]


@pytest.mark.parametrize("kind", [np.array, lambda i: torch.tensor(np.array(i)).permute(2, 0, 1)])
def test_arrays_are_images(kind: Any) -> None:
    guarded = Guarded()
    assert guarded.blocked(guarded(guarded.vlm.prompt, kind(A))) == [False]
    assert guarded.blocked(guarded(guarded.vlm.prompt, kind(RED))) == [True]
    assert guarded.request.images[0].data.size == (70, 50)


def test_an_image_over_the_limits_is_refused() -> None:
    guarded = Guarded(limits={"max_image_pixels": 1000})
    inputs = guarded(guarded.vlm.prompt, A)
    decision = decision_of(guarded.vlm.model.generate(**inputs, **LONG)).input
    assert decision.blocked
    assert decision.coverage.refused == 1


# --- text -----------------------------------------------------------------------------------------


def test_text_is_judged_wherever_it_stands() -> None:
    guarded = Guarded("paligemma")
    inputs = guarded("<image> what ?", A, suffix="forbidden")
    assert "forbidden" in guarded.request.text
    inputs.pop("labels")
    assert guarded.blocked(inputs) == [True]


@pytest.mark.parametrize("key", ["videos", "audio"])
def test_video_and_audio_are_parts_of_the_request(key: str) -> None:
    guarded = Guarded()
    with contextlib.suppress(Exception):  # a processor that takes none says so its own way
        guarded(guarded.vlm.prompt, A, **{key: [np.zeros((2, 8, 8, 3), np.uint8)]})
    assert guarded.request.parts[1].kind.value == key.removesuffix("s")


def test_a_chat_template_is_judged_by_turns_and_tools() -> None:
    guarded = Guarded()
    chat = [
        {"role": "user", "content": [{"type": "image", "image": A}, {"type": "text", "text": "x"}]},
        {"role": "assistant", "content": "y", "tool_calls": [{"name": "forbidden"}]},
        {"role": "user", "content": "z"},
    ]
    before = copy.deepcopy(chat)
    inputs = guarded.vlm.processor.apply_chat_template(
        chat, tokenize=True, return_dict=True, return_tensors="pt", tools=[{"name": "look"}]
    )
    assert chat == before
    assert guarded.blocked(inputs) == [True]
    assert [(m.role, len(m.parts)) for m in guarded.request.messages] == [
        ("tools", 1),
        ("user", 2),
        ("assistant", 2),
        ("user", 1),
    ]


@pytest.mark.parametrize("kind", ["video", "audio", "input_audio", "unheard_of"])
def test_parts_nobody_looks_at_are_refused(kind: str) -> None:
    guarded = Guarded()
    chat = [{"role": "user", "content": [{"type": kind}, {"type": "text", "text": "x"}]}]
    prompt = guarded.vlm.processor.apply_chat_template(chat, add_generation_prompt=True)
    assert guarded.blocked(guarded(prompt, None)) == [True]


def test_a_rendered_chat_is_known_again_by_its_prompt() -> None:
    guarded = Guarded()
    chats = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
        for text in ("what ?", "forbidden")
    ]
    prompts = guarded.vlm.processor.apply_chat_template(chats, add_generation_prompt=True)
    chats[1][0]["content"] = []  # what was rendered counts, not what became of the chat
    assert guarded.blocked(guarded(prompts, [A, B])) == [False, True]
    (message,) = guarded.request.messages
    assert message.role == "user"
    assert [p.kind for p in message.parts] == [PartKind.IMAGE, PartKind.TEXT]
    assert guarded.blocked(guarded(prompts[0] + " forbidden", A)) == [True]


def test_a_redaction_that_the_template_has_changed_blocks() -> None:
    guarded = Guarded()
    guarded.vlm.processor.chat_template = (
        "{% for message in messages %}{{ message['content'] | replace('secret', 'S') }}{% endfor %}"
    )
    chat = [{"role": "user", "content": "a secret"}]
    inputs = guarded.vlm.processor.apply_chat_template(
        chat, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert guarded.blocked(inputs) == [True]


def test_a_processor_keeps_its_signature() -> None:
    free, guarded = tiny.llava().processor, Guarded().vlm.processor
    for name in ("__call__", "apply_chat_template"):
        assert inspect.signature(getattr(free, name)) == inspect.signature(getattr(guarded, name))


# --- known again ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny.buildable())
def test_checked_inputs_are_known_again_after_what_people_do_with_them(family: str) -> None:
    guarded = Guarded(family)
    vlm = guarded.vlm
    texts = [vlm.prompt, f"{vlm.prompt} yes"]
    one = guarded(vlm.prompt, A)
    two = guarded(texts, [[A], [B]])
    checks = len(guarded.watcher.requests)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert _find(vlm, copy.deepcopy(two).to(dtype)) == [True, True]
    assert _find(vlm, dict(one)) == [True]
    if len(two["pixel_values"]) == 2:  # one slice a row
        for row in range(2):
            cut = {key: value[row : row + 1] for key, value in two.items()}
            assert _find(vlm, cut) == [True]
    assert len(guarded.watcher.requests) == checks


def _find(vlm: tiny.TinyVLM, inputs: Any) -> list[bool]:
    session = type(vlm.model)._mmguard_state
    return [found is not None for found in session.provenance.find(inputs)]


def test_lists_instead_of_tensors_are_known_again() -> None:
    guarded = Guarded()
    lists = guarded.vlm.processor(text=guarded.vlm.prompt, images=A)
    inputs = {key: torch.as_tensor(np.asarray(value)) for key, value in lists.items()}
    assert guarded.blocked(inputs) == [False]
    assert len(guarded.watcher.requests) == 1


@pytest.mark.parametrize("family", tiny.buildable())
def test_an_image_checked_with_other_text_is_not_known(family: str) -> None:
    guarded = Guarded(family)
    first = guarded(guarded.vlm.prompt, A)
    second = guarded(f"{guarded.vlm.prompt} yes", B)
    assert _find(guarded.vlm, dict(second) | {"pixel_values": first["pixel_values"]}) == [False]


def test_rows_that_were_not_judged_one_by_one_are_not_remembered() -> None:
    guarded = Guarded()
    options = {"truncation": True, "max_length": 8, "return_overflowing_tokens": True}
    tokens = guarded.vlm.processor.tokenizer("a long text " * 3, padding=True, **options)
    assert len(tokens["input_ids"]) > 1
    admission = Admission(Request("a"), Decision(Action.ALLOW, Stage.INPUT))
    provenance = type(guarded.vlm.model)._mmguard_state.provenance
    provenance.remember({"input_ids": torch.tensor(tokens["input_ids"])}, [admission])
    assert provenance.find({"input_ids": torch.tensor(tokens["input_ids"][:1])}) == [None]


def test_the_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    from mmguard_adapters.hf import provenance

    monkeypatch.setattr(provenance, "MAX_ROWS", 3)
    guarded = Guarded()
    batches = [guarded(f"{guarded.vlm.prompt} {i}", A) for i in range(5)]
    known = [_find(guarded.vlm, inputs) for inputs in batches]
    assert known == [[False], [False], [True], [True], [True]]
    monkeypatch.setattr(provenance, "MAX_BYTES", 2 * A.width * A.height * 4)
    guarded(f"{guarded.vlm.prompt} last", A)
    known = [_find(guarded.vlm, inputs) for inputs in batches]
    assert known == [[False]] * 4 + [[True]]
    assert guarded.blocked(batches[0]) == [False]
    assert len(guarded.watcher.requests) == 7
