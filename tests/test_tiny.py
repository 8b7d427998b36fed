"""The tiny models are models: they build, read their image and generate."""

import pytest
import torch

from tests import tiny

families = pytest.mark.parametrize("family", tiny.buildable())


def test_there_are_sixteen_families() -> None:
    assert len(tiny.FAMILIES) == 16


@families
def test_a_family_generates(family: str) -> None:
    vlm = tiny.FAMILIES[family]()
    inputs = vlm.processor(text=vlm.prompt, images=tiny.image(), return_tensors="pt")
    tokens = vlm.model.generate(**inputs, min_new_tokens=3, max_new_tokens=3, do_sample=False)
    prompt_length = 1 if vlm.model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    assert tokens.shape == (1, prompt_length + 3)


@families
def test_a_family_sees_its_image(family: str) -> None:
    vlm = tiny.FAMILIES[family]()

    def logits(seed: int) -> torch.Tensor:
        inputs = vlm.processor(text=vlm.prompt, images=tiny.image(seed=seed), return_tensors="pt")
        if vlm.model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = torch.tensor([[vlm.processor.tokenizer.eos_token_id]])
        with torch.inference_mode():
            output: torch.Tensor = vlm.model(**inputs).logits
        return output

    assert (logits(1) - logits(2)).abs().max() > 1e-5
    torch.testing.assert_close(logits(1), logits(1))


@families
def test_a_family_has_the_same_weights_each_time(family: str) -> None:
    state = torch.random.get_rng_state()
    first, second = (tiny.FAMILIES[family]().model.state_dict() for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("text", ["what is this ?", "Ärger 漢字 🙂 \u202e\x00", "a  b\n\n c ,"])
def test_any_text_survives_the_tokenizer(text: str) -> None:
    tokenizer = tiny.make_tokenizer()
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_an_image_depends_on_its_seed_only() -> None:
    assert tiny.image(9, 7, seed=3).size == (9, 7)
    assert tiny.image(seed=3).tobytes() == tiny.image(seed=3).tobytes()
    assert tiny.image(seed=3).tobytes() != tiny.image(seed=4).tobytes()
