"""Does what vLLM does for one who calls it, with transformers on a CPU, one row at a time and without a cache.

It writes the number of rows of every call of `LLM.generate` as a line to the file ``VLLM_CALLS``, and kills the process
at the call with the number ``VLLM_KILLED_AT``.
"""

import os
import signal
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


@dataclass
class SamplingParams:
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    max_tokens: int = 16
    stop_token_ids: list[int] | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    text: str
    token_ids: list[int]
    finish_reason: str


@dataclass
class RequestOutput:
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput]


class LLM:
    def __init__(self, model, dtype="auto", max_model_len=None, tensor_parallel_size=1):
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
        self.model.load_weights = self._load_weights
        self.prefixes_are_of_these_weights = True
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        most = self.model.config.max_position_embeddings
        self.max_model_len = max_model_len or most
        if self.max_model_len > most:
            raise ValueError(f"User-specified max_model_len ({max_model_len}) is greater than the derived {most}")

    def apply_model(self, function):
        return [function(self.model)]

    def _load_weights(self, weights):
        self.model.load_state_dict(dict(weights))
        self.prefixes_are_of_these_weights = False

    def reset_prefix_cache(self):
        self.prefixes_are_of_these_weights = True

    def generate(self, prompts, sampling_params, use_tqdm=True):
        assert self.prefixes_are_of_these_weights, "states of prompts are kept that other weights have made"
        calls = Path(os.environ["VLLM_CALLS"])
        before = calls.read_text() if calls.exists() else ""
        if before.count("\n") + 1 == int(os.environ.get("VLLM_KILLED_AT", 0)):
            os.kill(os.getpid(), signal.SIGKILL)
        calls.write_text(f"{before}{len(prompts)}\n")
        each = sampling_params if isinstance(sampling_params, list) else [sampling_params] * len(prompts)
        return [self._answer(prompt["prompt_token_ids"], params) for prompt, params in zip(prompts, each, strict=True)]

    @torch.no_grad()
    def _logprobs(self, ids):
        return self.model(torch.tensor([ids])).logits[0].log_softmax(-1)

    def _answer(self, prompt, params):
        assert params.temperature == 0, "only greedy"
        if len(prompt) >= self.max_model_len:
            raise ValueError(
                f"The decoder prompt (length {len(prompt)}) plus the number of requested output tokens (at least 1) is "
                f"longer than the maximum model length of {self.max_model_len}."
            )
        own = self.model.generation_config.eos_token_id
        ends = {self.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own]), *(params.stop_token_ids or [])}
        limit = min(params.max_tokens, self.max_model_len - len(prompt))
        answer: list[int] = []
        while len(answer) < limit and not ends & set(answer):
            answer.append(int(self._logprobs([*prompt, *answer])[-1].argmax()))
        text = self.tokenizer.decode(answer, skip_special_tokens=True) if params.detokenize else ""
        output = CompletionOutput(text, answer, "stop" if answer[-1] in ends else "length")
        return RequestOutput(list(prompt), self._prompt_logprobs(prompt, params.prompt_logprobs), [output])

    def _prompt_logprobs(self, prompt, number):
        """Return the likeliest tokens at each position and the one that stands there; none at the first."""
        if number is None:
            return None
        found = []
        for token, logprobs in zip(prompt[1:], self._logprobs(prompt)[:-1], strict=True):
            tokens = [*logprobs.topk(number).indices.tolist(), token]
            found.append({token: Logprob(float(logprobs[token])) for token in tokens})
        return [None, *found]
