"""mmguard inside Hugging Face transformers.

    from mmguard_adapters.hf import guard
    model = guard(model, processor, config="mmguard.yaml")
    tokens = model.generate(**processor(text=..., images=..., return_tensors="pt"))

or `pipe = guard(pipe, config="mmguard.yaml")`. Read `entry` for the options, `processor` for where
requests are judged, `model` for where answers are, and for what is closed or stays open. What was
decided about a result is found with `decision_of`.
"""

from mmguard_adapters.hf.decisions import Decisions, decision_of
from mmguard_adapters.hf.entry import guard, is_guarded, unguard

__all__ = ["Decisions", "decision_of", "guard", "is_guarded", "unguard"]
