"""The low-rank layers that stage 2 trains in the language model, and their way into its weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import InternVLForConditionalGeneration

LORA_SCALE = 2.0
"""What the low-rank path is multiplied by: alpha over rank, in LoRA's words."""

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")

_MLP = ("gate_proj", "up_proj", "down_proj")


class LoRALinear(nn.Module):
    """A frozen linear layer plus a trained low-rank one, which starts at nothing."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.empty(rank, base.in_features))  # fp32 beside a bf16 base
        self.up = nn.Parameter(torch.zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, hidden: Tensor) -> Tensor:
        """Add the low-rank path, scaled, to the frozen layer's output."""
        low = nn.functional.linear(hidden, self.down.to(hidden.dtype))
        added = nn.functional.linear(low, self.up.to(hidden.dtype))
        out: Tensor = self.base(hidden)
        return out + LORA_SCALE * added


def add_lora(
    model: InternVLForConditionalGeneration, *, rank_attention: int, rank_mlp: int
) -> None:
    """Put a `LoRALinear` around every linear layer of the language model, in place."""
    for layer in model.model.language_model.layers:
        ranks = dict.fromkeys(_ATTENTION, (layer.self_attn, rank_attention))
        ranks |= dict.fromkeys(_MLP, (layer.mlp, rank_mlp))
        for name, (parent, rank) in ranks.items():
            setattr(parent, name, LoRALinear(getattr(parent, name), rank))


def trained_state(model: InternVLForConditionalGeneration) -> dict[str, Tensor]:
    """Return what training changed: the projector and LoRA."""
    return {
        name: tensor.detach()
        for name, tensor in model.state_dict().items()
        if name.endswith((".down", ".up")) or ".multi_modal_projector." in name
    }


def merge(model: InternVLForConditionalGeneration, trained: dict[str, Tensor]) -> None:
    """Write `trained` into a `model` without LoRA, in place: the base plus up times down."""
    state = model.state_dict()
    with torch.no_grad():
        for name, tensor in trained.items():
            if name.endswith(".down"):
                layer = name.removesuffix(".down")
                up = trained[f"{layer}.up"].to(state[f"{layer}.weight"])
                state[f"{layer}.weight"] += LORA_SCALE * (up @ tensor.to(up))
            elif not name.endswith(".up"):
                state[name].copy_(tensor)
