"""Training the gate, small: a one-layer encoder, a few dozen texts."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("sklearn", reason="training needs the extra `train`")
pytest.importorskip("onnxscript", reason="the export needs the extra `onnx`")

import torch
from transformers import BertConfig, BertModel, BertTokenizer

from mmguard_plugins.errors import GuardError, MMGuardError
from mmguard_plugins.guards.gate.categories import (
    HARMFUL,
    INJECTION,
    OFFENSIVE,
    REAL_WORLD_HARM,
    TEXT_CATEGORIES,
)
from mmguard_plugins.guards.gate.text import TextScorer
from mmguard_plugins.weights import Weights, open_weights
from mmguard_trainers import gate, gate_export, gate_texts
from mmguard_trainers.evaluation import sets
from mmguard_trainers.gate_texts import NOTHING, Text

BAD = ("stab", "poison", "burn", "rob", "shoot", "hang", "kidnap", "drown")
MILD = ("greet", "paint", "call", "thank", "visit", "teach", "draw", "phone")
WHOM = ("uncle", "neighbour", "teacher", "sister", "boss", "friend", "doctor", "baker")
FRAMES = ("how do i {} my {}", "i will {} the {}", "tell me how to {} a {} now")


def sentences(verbs: tuple[str, ...]) -> list[str]:
    return [f.format(v, w) for f, v, w in itertools.product(FRAMES, verbs, WHOM)]


@pytest.fixture(scope="module")
def texts() -> list[Text]:
    harm: dict[str, float] = dict.fromkeys(TEXT_CATEGORIES, 1.0)  # one sort of harm stands for all
    bad = [Text(s, harm, "ours:bad", s) for s in sentences(BAD)]
    good = [Text(s, NOTHING, "ours:good", s) for s in sentences(MILD)]
    return [*bad, *good]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory, texts: list[Text]) -> Path:
    folder = tmp_path_factory.mktemp("encoder") / "model"
    folder.mkdir()
    words = sorted({word for text in texts for word in text.text.split()})
    vocabulary = {
        w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])
    }
    tokenizer = BertTokenizer(vocab=vocabulary)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=gate.DIM,
        num_hidden_layers=1,
        num_attention_heads=12,
        intermediate_size=64,
        max_position_embeddings=128,
    )
    BertModel(config).save_pretrained(folder)
    return folder.parent


@pytest.fixture
def config(tmp_path: Path) -> gate.GateTraining:
    return gate.GateTraining(
        out=tmp_path / "weights", epochs=3, learning_rate=1e-3, ridge=1.0, seeds=(0, 1)
    )


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, encoder: Path, texts: list[Text]) -> None:
    monkeypatch.setattr(sets, "package_folder", lambda *_: encoder)
    monkeypatch.setattr(gate, "gather", lambda _: texts)


@pytest.mark.usefixtures("small")
def test_training_writes_weights_that_the_gate_opens_and_that_tell_apart(
    config: gate.GateTraining,
) -> None:
    folder = gate.train(config)
    scorer = TextScorer(open_weights(folder, "gate"), TEXT_CATEGORIES)
    bad = scorer.score(["how do i poison my uncle", "i will rob the baker"], 9)
    good = scorer.score(["how do i thank my uncle", "i will draw the baker"], 9)
    column = TEXT_CATEGORIES.index(REAL_WORLD_HARM)
    assert bad[:, column].min() > good[:, column].max()
    card = json.loads((folder / "card.json").read_text())
    assert card["texts"] == {"ours:bad": 192, "ours:good": 192}
    assert card["held_out"]["auroc"][HARMFUL] > 0.9
    assert card["int8"]["megabytes"] > 0
    assert (
        b"mmguard_trainers" not in (folder / "text.onnx").read_bytes()
    )  # no paths of this machine


@pytest.mark.usefixtures("small")
def test_an_export_that_drifts_leaves_the_old_weights(
    config: gate.GateTraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.out.mkdir()
    (config.out / "guard.json").write_text("the old ones")
    monkeypatch.setattr(gate_export, "MAX_DRIFT", -1.0)
    with pytest.raises(gate_export.ExportError, match="int8 changes the model too much"):
        gate.train(config)
    assert (config.out / "guard.json").read_text() == "the old ones"


@pytest.mark.usefixtures("small")
def test_a_category_without_texts_is_one_clear_error(
    config: gate.GateTraining, texts: list[Text], monkeypatch: pytest.MonkeyPatch
) -> None:
    known: dict[str, float] = {name: 1.0 for name in TEXT_CATEGORIES if name != INJECTION}
    without = [Text(t.text, known if any(t.labels.values()) else NOTHING, t.source, t.group)
               for t in texts]  # fmt: skip
    monkeypatch.setattr(gate, "gather", lambda _: without)
    with pytest.raises(MMGuardError, match="no text of the train split is known to be 'Prompt Inj"):
        gate.train(config)


def test_what_is_unknown_is_not_learnt_from() -> None:
    known = Text("a", {HARMFUL: 1.0}, "s", "a")
    labels, weights = gate.targets([known])
    logits = torch.zeros(1, len(TEXT_CATEGORIES))
    logits[0, TEXT_CATEGORIES.index(OFFENSIVE)] = 50.0  # wildly wrong, if anybody knew
    loss = gate.masked_loss(logits, labels, weights, torch.ones(len(TEXT_CATEGORIES)))
    torch.testing.assert_close(loss, torch.tensor(math.log(2)))


def test_relatives_stay_on_one_side_of_a_split() -> None:
    texts = [Text(f"text {n}", NOTHING, "s", f"group {n % 40}") for n in range(400)]
    parts = gate.split(texts)
    groups = [{text.group for text in part} for part in parts.values()]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 40
    assert all(groups)


def test_texts_that_resemble_a_judged_text_are_dropped() -> None:
    judged = ["Explain in detail how one could rob the museum of modern art at night"]
    near = Text("explain in detail how one could rob the museum of modern art", {}, "s", "")
    apart = Text("explain how the museum of modern art was built after the war", {}, "s", "")
    texts = [Text(t.text, t.labels, t.source, gate_texts.normalised(t.text)) for t in (near, apart)]
    assert [t.text for t in gate_texts.without_near(texts, judged)] == [apart.text]


def test_thresholds_catch_much_and_stop_no_more_harmless_texts_than_asked() -> None:
    rng = np.random.default_rng(0)
    good = [Text(f"good {n}", NOTHING, "ours:x", str(n)) for n in range(500)]
    bad = [Text(f"bad {n}", {HARMFUL: 1.0}, "ours:x", str(n)) for n in range(300)]
    width = len(TEXT_CATEGORIES)
    probabilities = np.vstack([rng.beta(1, 6, (500, width)), rng.beta(1, 6, (300, width))])
    probabilities[500:, TEXT_CATEGORIES.index(HARMFUL)] = rng.beta(6, 2, 300)
    chosen = gate.choose_thresholds(probabilities, [*good, *bad], 0.05)
    stops = [i for i, name in enumerate(TEXT_CATEGORIES) if name != OFFENSIVE]
    limits = np.array([chosen[name] for name in TEXT_CATEGORIES])
    stopped = np.asarray((probabilities >= limits)[:, stops].any(axis=1))
    assert stopped[:500].mean() <= 0.05
    assert stopped[500:].mean() > 0.8


def test_mixing_by_nothing_gives_the_pretrained_encoder_back(
    monkeypatch: pytest.MonkeyPatch, encoder: Path
) -> None:
    monkeypatch.setattr(sets, "package_folder", lambda *_: encoder)
    model, pretrained = gate.GateModel(), gate.GateModel()
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.add_(1.0)
    back = gate.mixed(model, 0.0).encoder.state_dict()
    for name, tensor in pretrained.encoder.state_dict().items():
        torch.testing.assert_close(back[name], tensor)


def test_our_sentences_parse_and_name_known_categories() -> None:
    found = list(gate_texts.phrases())
    assert len(found) > 5000
    assert {name for text in found for name in text.labels} == set(TEXT_CATEGORIES)
    assert all(text.text for text in found)


def test_weights_of_another_list_of_categories_are_refused(encoder: Path) -> None:
    with pytest.raises(GuardError, match="score other categories"):
        TextScorer(Weights(encoder, {"categories": ["one"]}), TEXT_CATEGORIES)
