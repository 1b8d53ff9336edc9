"""The output head of a model of transformers, as it is now, taken off."""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from srd_lightning.losses.head import Head


def output_head(model: nn.Module) -> Head:
    """Return the head of a model, also under LoRA, whose weights are part of it and get their gradient through it.

    Args:
        model: With ``get_output_embeddings`` and ``config``, as transformers' models have them.
    """
    module = cast(Any, model).get_output_embeddings()
    config = cast(Any, model).config.get_text_config()
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    if hasattr(module, "modules_to_save"):  # PEFT's: a trained copy of the head
        module = module.modules_to_save[module.active_adapter]
    weight, bias = module.weight, module.bias
    if hasattr(module, "base_layer") and not module.merged:
        weight = sum((module.get_delta_weight(adapter) for adapter in module.active_adapters), weight)
    if (added := getattr(model, "final_logits_bias", None)) is not None:  # BART's, no part of its head
        bias = added.flatten() if bias is None else bias + added.flatten()
    return Head(weight, bias, scale, cap)
