"""What buys the gate its transfer: `python benchmarks/gate_ablation.py [--data FOLDER]`.

Each variant is trained as `mmguard train gate` trains, less one thing, and judged in float32 on
sets nobody trained on: AUROC of the strongest harm category (for injection_transfer, of its own
category). About ten minutes a variant on one core, two for those without training.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from mmguard_plugins.guards.gate.categories import HARMFUL, HARMS, INJECTION, TEXT_CATEGORIES
from mmguard_trainers import gate
from mmguard_trainers.evaluation import metrics, sets
from mmguard_trainers.reference_vlm_model import default_cache

SETS = ("openai_moderation", "hatecheck", "harmbench_vs_benign", "injection_transfer", "our_twins")
SYNTHETIC = ("ours",)  # all of our own sentences and pairs
PAIRS = ("ours:groups", "ours:wordnet", "ours:fragments")


def variants(data: Path | None) -> dict[str, gate.GateTraining]:
    """Return what is compared, the shipped recipe last."""
    base = gate.GateTraining(data=data, scratch=default_cache() / "gate", seeds=(0,), epochs=1)
    return {
        "frozen encoder, real sets only": base.model_copy(
            update={"mix": 0.0, "without": SYNTHETIC}
        ),
        "frozen encoder, all texts": base.model_copy(update={"mix": 0.0}),
        "fine-tuned, real sets only": base.model_copy(update={"without": SYNTHETIC}),
        "fine-tuned, no contrast pairs": base.model_copy(update={"without": PAIRS}),
        "fine-tuned all the way (mix 1)": base.model_copy(update={"mix": 1.0}),
        "fine-tuned, mix 0.7": base,
    }


def judged(model: gate.GateModel, data: Path | None) -> dict[str, float]:
    """Return the AUROC on each set, and the mean harm score of our harmless twins."""
    harms = [TEXT_CATEGORIES.index(name) for name in (*HARMS, HARMFUL)]
    out = {}
    for name in SETS:
        labelled = sets.load(name, data)
        logits = gate.logits_of(model, [row.text for row in labelled.rows])
        scores = logits[:, harms].max(axis=1)
        if labelled.kind == "injection":
            scores = logits[:, TEXT_CATEGORIES.index(INJECTION)]
        if labelled.kind == "benign":
            out[f"{name}: share above 0"] = float((scores > 0).mean())
            continue
        labels = np.array([row.label for row in labelled.rows])
        out[name] = metrics.auroc(labels, scores)
    return {name: round(value, 3) for name, value in out.items()}


def trained(config: gate.GateTraining) -> gate.GateModel:
    """Return the model of a variant."""
    train_on, tune_on = (gate.split(gate.gather(config))[part] for part in ("train", "tune"))
    model = gate.GateModel()
    if config.mix:
        model = gate.averaged([gate.fit(config, train_on, tune_on, s) for s in config.seeds])
    return gate.refitted(gate.mixed(model, config.mix), train_on, config.ridge)


def main() -> None:
    """Print one line of JSON a variant."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--only", nargs="*", default=[], help="variants whose name holds one")
    arguments = parser.parse_args()
    for name, config in variants(arguments.data).items():
        if arguments.only and not any(part in name for part in arguments.only):
            continue
        print(json.dumps({"variant": name, **judged(trained(config), arguments.data)}), flush=True)


if __name__ == "__main__":
    main()
