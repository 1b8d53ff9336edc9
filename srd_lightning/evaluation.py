"""What a model answers, how likely it finds the truth, and how near the two are."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from rouge_score.rouge_scorer import RougeScorer
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from srd_lightning import divergences
from srd_lightning.losses import log_probabilities, response_mask, upcast


@dataclass(frozen=True)
class Decoding:
    """How an answer is generated; greedy by default.

    Args:
        max_new_tokens: Longest answer, in tokens.
        temperature: 0 is greedy; above 0 tokens are sampled.
        top_p: Sample from the smallest set of tokens with this probability; 1 is all.
        top_k: Sample from this many tokens; 0 is all.
        no_repeat_ngram_size: Forbid n-grams of this size to repeat, prompt included; 0 allows them.
        seed: Of the sampling.

    Example:
        >>> PAPER_DECODING.no_repeat_ngram_size
        6
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    no_repeat_ngram_size: int = 0
    seed: int = 10

    def __post_init__(self) -> None:
        """Check the two that have no meaning below their bound."""
        if self.max_new_tokens < 1 or self.temperature < 0:
            raise ValueError(f"expected max_new_tokens >= 1 and temperature >= 0, but got {self}")


PAPER_DECODING = Decoding(temperature=0.01, no_repeat_ngram_size=6)
"""How the authors let the student reflect: as good as greedy, with no 6-gram twice."""


class TokenSums(NamedTuple):
    """Sums over the response tokens of each row, ``[B]``, and the number of tokens, ``[B]``."""

    sums: Tensor
    tokens: Tensor


def end_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that end an answer: the tokenizer's and those in the model's own generation settings."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    return sorted({token for token in ids if token is not None})


@torch.no_grad()
def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    seed: int | None = None,
) -> list[str]:
    """Return one answer per prompt.

    Args:
        model: A model with transformers' ``generate``.
        tokenizer: Turns the generated ids into text.
        prompts: Token ids, not padded.
        decoding: How to generate.
        seed: Replaces the seed of ``decoding``; the global random state is left as it was.

    Returns:
        The answers as text, without the end token.
    """
    device = next(model.parameters()).device
    ends = end_tokens(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    width = max(len(prompt) for prompt in prompts)
    input_ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    attention_mask = (torch.arange(width, device=device) >= width - lengths[:, None]).long()
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), eval_mode(model), _without_own_settings(model):
        torch.manual_seed(decoding.seed if seed is None else seed)
        output: Tensor = model.generate(  # type: ignore[operator]
            input_ids=input_ids,
            attention_mask=attention_mask,
            generation_config=_generation_config(decoding, ends, pad),
        )
    return [
        tokenizer.decode(_until_end(row, ends), skip_special_tokens=True).strip() for row in output[:, width:].tolist()
    ]


def _generation_config(decoding: Decoding, ends: list[int], pad: int) -> GenerationConfig:
    sampling: dict[str, Any] = {"do_sample": False}
    if decoding.temperature > 0:
        sampling = {
            "do_sample": True,
            "temperature": decoding.temperature,
            "top_p": decoding.top_p,
            "top_k": decoding.top_k,
        }
    return GenerationConfig(
        max_new_tokens=decoding.max_new_tokens,
        no_repeat_ngram_size=decoding.no_repeat_ngram_size,
        eos_token_id=ends,
        pad_token_id=pad,
        **sampling,
    )


def _until_end(ids: list[int], ends: list[int]) -> list[int]:
    return next((ids[:position] for position, token in enumerate(ids) if token in ends), ids)


@contextlib.contextmanager
def _without_own_settings(model: Any) -> Iterator[None]:
    """Set the model's own generation settings aside: transformers fill in from them what a call leaves open."""
    own = getattr(model, "generation_config", None)
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout off for a while: a student that trains must not be left in eval mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@torch.no_grad()
def negative_log_likelihood(logits: Tensor, labels: Tensor) -> TokenSums:
    """Sum the token loss of every row's response.

    Args:
        logits: ``[B, T, V]``.
        labels: ``[B, T]``, unshifted, -100 where no token is scored.

    Returns:
        Sums in nats and numbers of tokens.

    Example:
        >>> negative_log_likelihood(torch.zeros(1, 3, 4), torch.tensor([[-100, 2, 1]]))
        TokenSums(sums=tensor([2.7726]), tokens=tensor([2]))
    """
    mask = response_mask(labels)
    losses = nn.functional.cross_entropy(upcast(logits[:, :-1][mask]), labels[:, 1:][mask], reduction="none")
    return _per_row(losses, mask)


@torch.no_grad()
def divergence_from_teacher(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> TokenSums:
    """Sum KL(teacher ‖ student) at temperature 1 over every row's response.

    Args:
        student_logits: ``[B, T, V]``.
        teacher_logits: ``[B, T, V]``.
        labels: ``[B, T]``, unshifted, -100 where no token is scored.

    Returns:
        Sums in nats and numbers of tokens.
    """
    mask = response_mask(labels)
    student_logp = log_probabilities(student_logits[:, :-1][mask], temperature=1.0)
    teacher_logp = log_probabilities(teacher_logits[:, :-1][mask], temperature=1.0)
    return _per_row(divergences.forward_kl(teacher_logp, student_logp), mask)


def _per_row(values: Tensor, mask: Tensor) -> TokenSums:
    rows = mask.nonzero()[:, 0]
    sums = torch.zeros(len(mask), dtype=values.dtype, device=values.device).index_add_(0, rows, values)
    return TokenSums(sums, mask.sum(dim=1))


def rouge_l(truth: str, answer: str) -> float:
    """Return ROUGE-L F1 with stemming, as `rouge-score` computes it, in [0, 1].

    Example:
        >>> rouge_l("the cat sat on the mat", "the cats sat on a mat")
        0.8333333333333334
    """
    return float(_scorer().score(truth, answer)["rougeL"].fmeasure)


@functools.cache
def _scorer() -> RougeScorer:
    return RougeScorer(["rougeL"], use_stemmer=True)
