"""Quantised models: what can be done with one, by what its configuration or the loaded model says."""

from __future__ import annotations

from typing import Any

from transformers.quantizers.auto import AutoHfQuantizer

from srd_lightning.errors import ModelError, SettingError, in_one_line

BITSANDBYTES = "bitsandbytes"


def method_of(config: Any) -> str | None:
    """Return the name of the method by which a configuration says that weights are quantised, such as bitsandbytes."""
    settings = getattr(config, "quantization_config", None)
    method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    return None if method is None else str(getattr(method, "value", method))


def is_quantised(model: Any) -> bool:
    """Return whether the weights of a loaded model are quantised."""
    whole = model.get_base_model() if hasattr(model, "peft_config") else model
    return bool(getattr(whole, "is_quantized", False))


def check_can_load(config: Any, name: str) -> None:
    """Check that there is what quantised weights need.

    Args:
        config: Of the model.
        name: Of the model, for the message.

    Raises:
        SettingError: A package is not installed, or the device not there.
    """
    if (method := method_of(config)) is None:
        return
    try:
        AutoHfQuantizer.from_config(config.quantization_config, pre_quantized=True).validate_environment()
    except Exception as error:  # each method raises its own
        raise SettingError(
            f"{name} is quantised ({method}), which cannot be used here: {in_one_line(error)[:300]}; install what it "
            "needs, or name the model that it was made of"
        ) from error


def check_trainable(student: Any, on_cpu: bool) -> None:
    """Check that a loaded student can be trained, if it is quantised.

    Args:
        student: Loaded.
        on_cpu: Whether it is trained on a CPU.

    Raises:
        ModelError: It has no adapters.
        SettingError: It is of bitsandbytes, on a CPU.
    """
    if not is_quantised(student):
        return
    if not hasattr(student, "peft_config"):
        raise ModelError(
            f"the weights of the student {type(student).__name__} are quantised, so they cannot be trained; give it "
            "adapters with lora, or name the model that it was made of"
        )
    if on_cpu and method_of(student.config) == BITSANDBYTES:
        raise SettingError(
            "a student quantised by bitsandbytes cannot be trained on a CPU, where its weights, once they have "
            "answered a prompt, give wrong gradients; train it on a GPU, or name the model that it was made of"
        )
