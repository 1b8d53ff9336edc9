"""What a model answers.

transformers generate; here rows that have ended leave the batch, so that nobody waits for the longest answer.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutput

from srd_lightning.data.batches import padded
from srd_lightning.data.families import EncoderDecoder, Family
from srd_lightning.distributed.fsdp2 import runs_inside
from srd_lightning.errors import SettingError
from srd_lightning.models.calling import eval_mode, router_off
from srd_lightning.models.family import family_of
from srd_lightning.models.lockstep import lockstep

ROUND = 16
"""Steps between two looks at which rows have ended."""
ALONE = ("rwkv", "recurrent_gemma")
"""Types of models whose answers, in transformers, change with the padding before a prompt: they get one at a time."""
MIN_LIMIT = 8
"""Tokens that `Decoding.max_length_ratio` leaves the answer to the shortest response."""


@dataclass(frozen=True)
class Decoding:
    """How an answer is generated; greedy by default.

    Args:
        max_new_tokens: Longest answer, in tokens.
        temperature: 0 is greedy; above 0 tokens are sampled.
        top_p: Sample from the smallest set of tokens with this probability; 1 is all.
        top_k: Sample from this many tokens; 0 is all.
        no_repeat_ngram_size: Forbid n-grams of this size to repeat, prompt included but for encoder-decoders; 0 allows
            them.
        seed: Of the sampling.
        max_length_ratio: Stop an answer that is this many times as long as the reference response, in tokens (but
            none before 8), where there is one; by default only ``max_new_tokens`` stops it.
        bf16: Compute answers with weights rounded to bfloat16, which takes half as much memory again; losses are not
            touched by it.

    Raises:
        SettingError: A setting that is out of range, or two that do not go together.

    Example:
        >>> Decoding(max_new_tokens=100, max_length_ratio=1.5).limits([4, 20, 90])
        [8, 30, 100]
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    no_repeat_ngram_size: int = 0
    seed: int = 10
    max_length_ratio: float | None = None
    bf16: bool = False

    def __post_init__(self) -> None:
        """Check the settings that have no meaning below their bound."""
        for name, least in {"max_new_tokens": 1, "top_k": 0, "no_repeat_ngram_size": 0}.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise SettingError(f"decoding: {name} must be a whole number of at least {least}, but is {value!r}")
        if not 0 <= self.temperature < math.inf:
            raise SettingError(
                f"decoding: temperature must be 0 (greedy) or positive, finite too, but is {self.temperature}"
            )
        if not 0 < self.top_p <= 1:
            raise SettingError(f"decoding: top_p must lie in (0, 1], where 1 is all tokens, but is {self.top_p}")
        if self.max_length_ratio is not None and not self.max_length_ratio > 0:
            raise SettingError(
                f"decoding: max_length_ratio must be positive, or None for no bound, but is {self.max_length_ratio}"
            )

    def limits(self, response_lengths: Sequence[int]) -> list[int]:
        """Return how many tokens each answer may have, from the tokens of the reference responses."""
        if self.max_length_ratio is None:
            return [self.max_new_tokens] * len(response_lengths)
        wanted = (max(MIN_LIMIT, math.ceil(self.max_length_ratio * length)) for length in response_lengths)
        return [min(self.max_new_tokens, limit) for limit in wanted]


PAPER_DECODING = Decoding(temperature=0.01, no_repeat_ngram_size=6)
"""How the authors let the student reflect: as good as greedy, with no 6-gram twice."""


Changes = Callable[[Tensor], LogitsProcessor]
"""Takes the attention mask of a batch that begins to be answered; returns what changes the scores of its tokens."""


def end_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that end an answer: the tokenizer's and those in the model's own generation settings."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    return sorted({token for token in ids if token is not None})


def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    seed: int | None = None,
    limits: Sequence[int] | None = None,
) -> list[str]:
    """Return one answer per prompt, as text without the end token; see `generate_ids`."""
    return texts(model, tokenizer, generate_ids(model, tokenizer, prompts, decoding, seed, limits))


def texts(model: nn.Module, tokenizer: PreTrainedTokenizerBase, answers: Sequence[list[int]]) -> list[str]:
    """Return answers as text without the end token.

    Args:
        model: That wrote them.
        tokenizer: Of the model.
        answers: Token ids, as `generate_ids` gives them.
    """
    ends = end_tokens(model, tokenizer)
    return [tokenizer.decode(ids[:-1] if ids[-1] in ends else ids, skip_special_tokens=True).strip() for ids in answers]


@torch.no_grad()
def generate_ids(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    seed: int | None = None,
    limits: Sequence[int] | None = None,
    changes: Changes | None = None,
) -> list[list[int]]:
    """Return the tokens of one answer per prompt.

    Of a model that is sharded all ranks must ask together, each with prompts of its own, or with none: they go on in
    `lockstep` until all have their answers, which are those of a whole model. Nothing else need be done for that.

    Args:
        model: A model with transformers' ``generate``.
        tokenizer: Knows the end token.
        prompts: Token ids, not padded.
        decoding: How to generate.
        seed: Replaces the seed of ``decoding``; the global random state is left as it was.
        limits: Most tokens of each answer, see `Decoding.limits`; ``max_new_tokens`` by default.
        changes: Changes the scores of tokens before one is chosen.

    Returns:
        Of each answer at least one token; the last is the end token, unless the answer was cut at its limit.
    """
    limits = limits or [decoding.max_new_tokens] * len(prompts)
    sharded = runs_inside(model)
    ends = end_tokens(model, tokenizer)
    family = family_of(getattr(model, "config", None))
    config = _generation_config(decoding, ends, tokenizer.pad_token_id, family)
    device = next(model.parameters()).device
    devices = [device] if device.type == "cuda" else []
    rounded: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if decoding.bf16 and sharded:  # a copy would have to be sharded as well
        rounded = torch.autocast(device.type, torch.bfloat16, cache_enabled=False)  # else it would keep all weights
    elif decoding.bf16:
        model = _in_bf16(model)
    with (
        torch.random.fork_rng(devices=devices),
        eval_mode(model),
        _without_own_settings(model),
        rounded,
        lockstep(model),
        torch.compiler.set_stance("force_eager"),  # a compiled body would be compiled again as texts grow
    ):
        torch.manual_seed(decoding.seed if seed is None else seed)
        if getattr(getattr(model, "config", None), "model_type", None) in ALONE:
            rows = zip(prompts, limits, strict=True)
            answers = [_answer_in_rounds(model, [prompt], config, [limit], changes)[0] for prompt, limit in rows]
        else:
            answers = _answer_in_rounds(model, prompts, config, limits, changes)
    return [_through_end(ids, ends)[:limit] for ids, limit in zip(answers, limits, strict=True)]


def _generation_config(decoding: Decoding, ends: list[int], pad: int | None, family: Family) -> GenerationConfig:
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
        pad_token_id=ends[0] if pad is None else pad,
        decoder_start_token_id=family.decoder_start_token_id if isinstance(family, EncoderDecoder) else None,
        return_dict_in_generate=True,
        **sampling,
    )


def _answer_in_rounds(
    model: Any,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    limits: Sequence[int],
    changes: Changes | None,
) -> list[list[int]]:
    """Generate some steps for all rows, then some more for those that have not ended, with the cache of these."""
    answers: list[list[int]] = [[] for _ in prompts]
    running, steps, cache = list(range(len(prompts))), 0, None
    if not prompts:
        return []
    start, device, states = config.decoder_start_token_id, next(model.parameters()).device, None
    if start is not None:  # an encoder-decoder reads its prompts once, and begins its answers with this token
        ids, attention_mask = padded(prompts, config.pad_token_id), padded([[1] * len(ids) for ids in prompts], 0)
        ids, attention_mask = ids.to(device), attention_mask.to(device)
        states = model.get_encoder()(input_ids=ids, attention_mask=attention_mask).last_hidden_state
        text = ids.new_full((len(prompts), 1), start)
    else:
        text, attention_mask = _pad_left(prompts, config.pad_token_id, device)
    while running:
        of_round = copy.copy(config)
        of_round.max_new_tokens = min(ROUND, max(limits[row] for row in running) - steps)
        given: dict[str, Any] = {"input_ids": text}
        if states is not None:
            given = {"decoder_input_ids": text, "encoder_outputs": BaseModelOutput(last_hidden_state=states)}
        output = model.generate(
            **given,
            **router_off(model),
            attention_mask=attention_mask,
            past_key_values=cache,
            generation_config=of_round,
            **({"synced_gpus": False} if runs_inside(model) else {}),  # ranks are in lockstep already
            logits_processor=LogitsProcessorList([] if changes is None else [changes(attention_mask)]),
        )
        new = output.sequences[:, text.shape[1] :]
        steps += new.shape[1]
        for row, ids in zip(running, new.tolist(), strict=True):
            answers[row] += ids
        left = [
            place
            for place, (row, ids) in enumerate(zip(running, new.tolist(), strict=True))
            if steps < limits[row] and not set(ids) & set(config.eos_token_id)
        ]
        running = [running[place] for place in left]
        places = torch.tensor(left, dtype=torch.int64, device=device)
        text, attention_mask = output.sequences[places], attention_mask[places]
        if states is None:
            attention_mask = torch.cat([attention_mask, torch.ones_like(new[places])], dim=1)
        else:
            states = states[places]
        cache = getattr(output, "past_key_values", None)
        if not isinstance(cache, Cache) or states is not None:  # there may be none, others may not know their rows, and
            cache = None  # BART's decoder forgets its place: the next round begins with the whole text
        elif running:
            cache.reorder_cache(places)  # meant for beams
    return answers


def _pad_left(prompts: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    return ids, (torch.arange(width, device=device) >= width - lengths[:, None]).long()


def _through_end(ids: list[int], ends: list[int]) -> list[int]:
    return next((ids[: position + 1] for position, token in enumerate(ids) if token in ends), ids)


@contextlib.contextmanager
def _without_own_settings(model: Any) -> Iterator[None]:
    """Set the model's own generation settings aside: transformers fill in from them what a call leaves open.

    An adapted model and the one in it have settings each, and peft copies from one to the other.
    """
    holders = [model, model.get_base_model()] if hasattr(model, "get_base_model") else [model]
    own = [getattr(holder, "generation_config", None) for holder in holders]
    for holder in holders:
        holder.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for holder, settings in zip(holders, own, strict=True):
            holder.generation_config = settings


def _in_bf16(model: nn.Module) -> nn.Module:
    """Return a copy with rounded weights; autocast would round them, and all that flows, at every step.

    The model itself must not be changed, not even for a while: at another type of its data autograd forgets the
    functions by which DDP averages gradients.
    """
    weights = {
        id(weight): nn.Parameter(weight.detach().to(torch.bfloat16), weight.requires_grad)
        for weight in model.parameters()
    }
    return copy.deepcopy(model, cast(Any, weights))  # for which weights are copied already
