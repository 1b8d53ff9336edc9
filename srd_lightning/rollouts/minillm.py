"""MiniLLM: the reverse KL of whole sequences, by policy gradient on the student's own text.

Gu et al., *MiniLLM: Knowledge Distillation of Large Language Models*, arXiv 2306.08543, section 2.2. Here the text of a
batch is trained on once, in the step for which it was written; theirs is written for many steps and gone over four
times, which is what their clipped ratio of new to old student is for. With one pass that ratio is 1, and is left out.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor

from srd_lightning.errors import SettingError
from srd_lightning.losses import divergences
from srd_lightning.losses.base import DistillationLoss, log_probabilities, response_mask, upcast
from srd_lightning.models.calling import extras
from srd_lightning.models.generation import Decoding
from srd_lightning.rollouts.base import Models, Moment, Rollouts, Text, check_share


class MiniLLM(Rollouts):
    """Policy gradient on the reverse KL of sequences, which are sampled from a mixture of student and teacher.

    Batches that are not the student's own, where there are any, are trained on by the module's loss and ``kd_weight``.

    Args:
        share: Probability that a batch is the student's own; the paper's is 1.
        teacher_mix: Share of the teacher in the distribution from which tokens are sampled (alpha).
        length_normalized: Take the mean of the rewards that follow a token, not their sum, which favours short texts.
        reward_clip: Most that the reward of a token may be, up or down.
        max_new_tokens: Longest text, in tokens.
        seed: Decides which batches are the student's own, and what is sampled.

    Raises:
        SettingError: A setting is out of range.

    Example:
        >>> MiniLLM(max_new_tokens=64).decoding.max_new_tokens
        64
    """

    def __init__(
        self,
        share: float = 1.0,
        teacher_mix: float = 0.2,
        length_normalized: bool = True,
        reward_clip: float = 100.0,
        max_new_tokens: int = 256,
        seed: int = 10,
    ) -> None:
        self.share = check_share("share", share)
        self.teacher_mix = check_share("teacher_mix", teacher_mix)
        self.decoding = Decoding(max_new_tokens=max_new_tokens, temperature=1.0, seed=seed)
        self._loss = _SequenceReverseKL(teacher_mix, length_normalized, reward_clip)

    def check(self, module: Any, trainer: Any, data: object) -> None:
        """Refuse what needs batches in parts, hidden states, or a teacher that is asked by one rank alone.

        Raises:
            SettingError: It does.
        """
        if module.step.micro_batch_tokens is not None:
            raise SettingError(
                "micro_batch_tokens takes batches in parts, but MiniLLM needs the logits of whole sequences; leave it "
                "out, and take a smaller batch_size, and accumulate_grad_batches of the trainer"
            )
        if len(module.auxiliary):
            raise SettingError("auxiliary losses need hidden states, but MiniLLM takes all logits; leave them out")
        if self.teacher_mix and module.teacher_handle.placement != "replicate":
            raise SettingError(
                f"teacher_placement {module.teacher_handle.placement} lets all ranks ask the teacher at once only, but "
                "MiniLLM asks it for every token of a text; use replicate, or teacher_mix 0"
            )

    def is_own(self, moment: Moment) -> bool:
        """Return whether the batch is the student's own."""
        return moment.draw(self.decoding.seed) < self.share

    def texts(self, rows: list[Text], models: Models) -> list[Text]:
        """Sample texts from the mixture."""

        def mixed(attention_mask: Tensor) -> LogitsProcessor:
            return TeacherMix(models.teacher, self.teacher_mix, models.vocabulary, attention_mask)

        return models.answer(rows, self.decoding, changes=mixed if self.teacher_mix else None)

    def loss(self, loss: DistillationLoss) -> DistillationLoss:
        """Return the sequences' reverse KL; the loss of the module is not used."""
        return self._loss


class _SequenceReverseKL(DistillationLoss):
    r"""Reverse KL of sequences, whose gradient is estimated from samples; arXiv 2306.08543, section 2.2.

    Of a token :math:`y_t` that was sampled from :math:`\tilde p = (1 - \alpha) q + \alpha p` the loss is

    .. math:: w_t \, [\mathrm{KL}(q_t \| p_t) - R_{t+1} \log q(y_t)], \quad w_t = q(y_t) / \tilde p(y_t)

    where the first term is exact, over the vocabulary, and the return :math:`R_{t+1}` is the mean (or sum) of the
    rewards :math:`\log p(y_s) - \log q(y_s)` of the tokens that follow in the same row. Weights and returns are
    constants, and the second term adds its gradient only, so the value is the weighted mean of the first.

    Args:
        teacher_mix: The teacher's share alpha of what was sampled from.
        length_normalized: Means of rewards, not sums.
        reward_clip: Most that the reward of a token may be, up or down.

    Raises:
        SettingError: A setting is out of range.

    Example:
        >>> loss = _SequenceReverseKL(teacher_mix=0.0)
        >>> student = torch.tensor([[[0.9, 0.1], [0.9, 0.1], [0.5, 0.5]]]).log()
        >>> loss(student, torch.zeros(1, 3, 2), labels=torch.tensor([[-100, 0, 1]]))
        tensor(0.3681)
    """

    def __init__(self, teacher_mix: float = 0.2, length_normalized: bool = True, reward_clip: float = 100.0) -> None:
        super().__init__()
        if not reward_clip > 0:
            raise SettingError(f"reward_clip must be positive, but is {reward_clip}")
        self.teacher_mix = check_share("teacher_mix", teacher_mix)
        self.length_normalized = length_normalized
        self.reward_clip = reward_clip

    @property
    def why_all_logits(self) -> str:
        """See `DistillationLoss.why_all_logits`."""
        return (
            "MiniLLM: the rewards of a token are those of the text behind it; where memory is short, lower "
            "max_new_tokens of MiniLLM, or batch_size, with accumulate_grad_batches of the trainer"
        )

    def divergence(self, teacher_logp: Tensor, student_logp: Tensor) -> Tensor:
        """Return the exact term."""
        return divergences.reverse_kl(teacher_logp, student_logp)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        """Return the mean over the tokens of the response; see `DistillationLoss.forward`."""
        mask = response_mask(labels, self.ignore_index)
        student = log_probabilities(student_logits[:, :-1][mask], 1.0)
        teacher = log_probabilities(teacher_logits[:, :-1][mask], 1.0)
        tokens = labels[:, 1:][mask].long()[:, None]
        said, theirs = student.gather(1, tokens)[:, 0], teacher.gather(1, tokens)[:, 0]
        with torch.no_grad():
            rewards = (theirs - said).clamp(-self.reward_clip, self.reward_clip)
            returns = self._returns(rewards, mask)
            weights = (said - _log_mixture(theirs, said, self.teacher_mix)).exp()
        ahead = returns * (said - said.detach())  # its value is 0
        values = weights * (self.divergence(teacher, student) - ahead)
        return upcast(values).sum() / mask.sum().clamp(min=1)

    def _returns(self, rewards: Tensor, mask: Tensor) -> Tensor:
        """Return sum or mean of the rewards of the tokens that follow each in its row, ``[N]``; 0 at the last."""
        grid = rewards.new_zeros(mask.shape).masked_scatter(mask, rewards)
        sums = grid.flip(1).cumsum(1).flip(1) - grid
        if self.length_normalized:
            sums = sums / (mask.flip(1).cumsum(1).flip(1) - mask.long()).clamp(min=1)
        return sums[mask]


class TeacherMix(LogitsProcessor):
    """Turns the scores of the student's next token into log-probabilities of a mixture with the teacher's.

    Args:
        teacher: Frozen, in eval mode.
        share: Of the teacher, in (0, 1].
        vocabulary: Tokens that both know, where their heads differ.
        attention_mask: Of the prompts, ``[B, T]``, padded on the left.
    """

    def __init__(self, teacher: nn.Module, share: float, vocabulary: int | None, attention_mask: Tensor) -> None:
        self.teacher = teacher
        self.share = share
        self.vocabulary = vocabulary
        self._mask = attention_mask
        self._cache: Any = None
        self._seen = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return ``[B, V]``, from tokens ``[B, T]`` and scores ``[B, V]``."""
        own, theirs = (
            log_probabilities(logits[:, : self.vocabulary], 1.0) for logits in (scores, self._next(input_ids))
        )
        mixed = torch.full_like(upcast(scores), -torch.inf)  # of tokens that only the student knows
        mixed[:, : own.shape[1]] = _log_mixture(theirs, own, self.share)
        return mixed

    def _next(self, input_ids: Tensor) -> Tensor:
        """Return what the teacher gives for the next token; it sees each token once, where it keeps what it saw."""
        grown = input_ids.shape[1] - self._mask.shape[1]
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(input_ids), grown)], dim=1)
        given = extras(self.teacher, self._mask, right_padded=False)
        if "position_ids" in given:
            given["position_ids"] = given["position_ids"][:, self._seen :]
        output = self.teacher(
            input_ids=input_ids[:, self._seen :],
            attention_mask=self._mask,
            past_key_values=self._cache,
            use_cache=True,
            **given,
        )
        self._cache = getattr(output, "past_key_values", None)
        self._seen = 0 if self._cache is None else input_ids.shape[1]
        logits: Tensor = output.logits[:, -1]
        return logits


def _log_mixture(theirs: Tensor, own: Tensor, share: float) -> Tensor:
    """Return the logarithm of share * theirs + (1 - share) * own, from logarithms."""
    if share == 0:
        return own
    if share == 1:
        return theirs
    return torch.logaddexp(theirs + math.log(share), own + math.log(1 - share))
