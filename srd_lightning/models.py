"""Pretrained models named in a configuration and loaded when they are needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Pretrained:
    """A causal language model and its tokenizer, by name; nothing is loaded until it is asked for.

    Args:
        name: Folder or hub id.
        dtype: Type of the weights, such as ``bfloat16``. Keep a student that trains in ``float32``.
        revision: Branch, tag or commit on the hub.
        gguf_file: File in the folder or repository to read (and dequantize) instead of safetensors.
        keep_layers: Numbers, from 0, of the decoder layers to keep; cuts a student in depth out of its teacher.
        lora: Arguments of ``peft.LoraConfig``; only the adapters then train. Needs the ``lora`` extra.
        attn_implementation: ``eager``, ``sdpa``, ``flash_attention_2``, …; the model's own choice by default.
        trust_remote_code: Run code that comes with the weights.
        liger: Use Liger's kernels for norms, rotary embeddings and feed-forward layers: for GPUs, needs the ``liger``
            extra.

    Example:
        >>> Pretrained("gpt2", keep_layers=[0, 1, 2, 9, 10, 11]).name
        'gpt2'
    """

    name: str
    dtype: str = "float32"
    revision: str | None = None
    gguf_file: str | None = None
    keep_layers: list[int] | None = None
    lora: dict[str, Any] | None = None
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    liger: bool = False

    def __post_init__(self) -> None:
        """Check the type, so that a typing error shows before the weights are loaded."""
        dtype_named(self.dtype)

    def model(self) -> nn.Module:
        """Load the model.

        Returns:
            The model, in eval mode as transformers leaves it.

        Raises:
            ValueError: ``keep_layers`` does not fit the model.
        """
        options: dict[str, Any] = {"dtype": dtype_named(self.dtype), "trust_remote_code": self.trust_remote_code}
        if self.attn_implementation is not None:
            options["attn_implementation"] = self.attn_implementation
        if self.gguf_file is not None:
            from transformers import GgufConfig  # transformers >= 5 only

            options |= {"gguf_file": self.gguf_file, "quantization_config": GgufConfig(dequantize=True)}
        with torch.device("cpu"):  # where Lightning says otherwise, every GPU would hold what is to be spread over all
            model = AutoModelForCausalLM.from_pretrained(self.name, revision=self.revision, **options)
        if self.keep_layers is not None:
            keep_layers(model, self.keep_layers)
        if self.liger:
            from liger_kernel.transformers import _apply_liger_kernel_to_instance

            # Not its losses: they would take the place of ours, and of the logits.
            _apply_liger_kernel_to_instance(model, cross_entropy=False, fused_linear_cross_entropy=False)
        if self.lora is not None:
            from peft import LoraConfig, get_peft_model

            with torch.random.fork_rng():
                torch.manual_seed(0)  # the same adapters in every process and every run
                model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **self.lora))
        return cast(nn.Module, model)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer."""
        return AutoTokenizer.from_pretrained(
            self.name, revision=self.revision, gguf_file=self.gguf_file, trust_remote_code=self.trust_remote_code
        )


def dtype_named(name: str) -> torch.dtype:
    """Return the torch type of a name.

    Raises:
        ValueError: There is none.

    Example:
        >>> dtype_named("bfloat16")
        torch.bfloat16
    """
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype must name a torch type such as float32 or bfloat16, but is {name!r}")
    return dtype


def keep_layers(model: PreTrainedModel, layers: Sequence[int]) -> None:
    """Cut a decoder in depth, in place.

    Args:
        model: A model whose decoder layers stand in one ``ModuleList`` of ``config.num_hidden_layers`` entries.
        layers: Numbers of the layers to keep, rising, from 0. Which ones matters more than how many: evenly spaced
            layers wreck a model that survives the loss of as many unimportant ones.

    Raises:
        ValueError: A number is out of range, repeated or out of order, or the model has no such list.
    """
    depth = model.config.num_hidden_layers
    if not layers or list(layers) != sorted(set(layers)) or layers[0] < 0 or layers[-1] >= depth:
        raise ValueError(f"keep_layers must be rising numbers from 0 to {depth - 1}, but is {list(layers)}")
    stacks = [(parent, name) for parent in model.modules() for name, child in parent.named_children()
              if isinstance(child, nn.ModuleList) and len(child) == depth]  # fmt: skip
    if len(stacks) != 1:
        raise ValueError(f"keep_layers needs one list of {depth} layers in {type(model).__name__}, found {len(stacks)}")
    parent, name = stacks[0]
    stack = nn.ModuleList([getattr(parent, name)[layer] for layer in layers])
    for position, layer in enumerate(stack):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):  # where the layer's keys and values stand in the cache
                module.layer_idx = position  # type: ignore[assignment]
    setattr(parent, name, stack)
    model.config.num_hidden_layers = len(layers)
    if getattr(model.config, "layer_types", None) is not None:
        model.config.layer_types = [model.config.layer_types[layer] for layer in layers]


def check_same_tokenizer(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Check that token ids mean the same to both models.

    Raises:
        ValueError: The vocabularies differ.
    """
    student_vocab, teacher_vocab = student.get_vocab(), teacher.get_vocab()
    if student_vocab != teacher_vocab:
        different = student_vocab.items() ^ teacher_vocab.items()
        raise ValueError(
            f"student and teacher have different tokenizers ({len(student_vocab)} and {len(teacher_vocab)} tokens, "
            f"{len({token for token, _ in different})} differ), so their distributions cannot be compared; "
            "choose two models of one family"
        )


def vocabulary_size(model: object) -> int | None:
    """Return how many tokens a model gives logits, if it says so before it is run."""
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    return None if head is None else int(head.weight.shape[0])


def shared_vocabulary(
    student: int | None, teacher: int | None, tokenizer: PreTrainedTokenizerBase | None
) -> int | None:
    """Return how many tokens of two heads are compared, where one has more rows than any tokenizer uses.

    Args:
        student: Tokens of the student's head, if they are known.
        teacher: Tokens of the teacher's head, if they are known.
        tokenizer: Of both, where they were seen to be the same.

    Returns:
        How many, or nothing where all are.

    Raises:
        ValueError: The heads differ by tokens that are used, or nobody knows.

    Example:
        >>> shared_vocabulary(384, 384, tokenizer=None) is None
        True
    """
    if student is None or teacher is None or student == teacher:
        return None
    sizes = f"student and teacher give logits of {student} and {teacher} tokens"
    if tokenizer is None:
        raise ValueError(
            f"{sizes}, and their tokenizers are not known to be the same; give both as Pretrained, so that this can be "
            "checked, or choose two models of one family"
        )
    used = max(tokenizer.get_vocab().values()) + 1
    if used > min(student, teacher):
        raise ValueError(f"{sizes}, but their tokenizer uses {used}; choose two models of one family")
    return min(student, teacher)
