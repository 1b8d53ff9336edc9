"""What the package must compute, written a second time in the plainest way: loops, exact fractions, probabilities.

Nothing here is fast or numerically careful, and nothing imports the package. Teacher is p, student is q.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def chained_sorts(
    rouge_l: Sequence[float], loss: Sequence[float], k: int = 60, weights: tuple[float, float] = (1, 1)
) -> list[int]:
    """Return the rows in the order of the paper's code: three stable sorts, each of the list the last one left."""
    rows = sorted(range(len(rouge_l)), key=lambda row: rouge_l[row], reverse=True)
    rank_rouge_l = {row: rank for rank, row in enumerate(rows, start=1)}
    rows = sorted(rows, key=lambda row: loss[row])
    rank_loss = {row: rank for rank, row in enumerate(rows, start=1)}
    fused = {row: weights[0] / (k + rank_rouge_l[row]) + weights[1] / (k + rank_loss[row]) for row in rows}
    return sorted(rows, key=lambda row: fused[row], reverse=True)


def average_rank(values: Sequence[float], row: int) -> Fraction:
    """Return the mean of the ranks that the rows of this row's value take together, highest value first."""
    easier = sum(value > values[row] for value in values)
    equal = sum(value == values[row] for value in values)
    return Fraction(sum(range(easier + 1, easier + equal + 1)), equal)


def fused_scores(*ease: Sequence[float], k: int = 60, weights: Sequence[float] | None = None) -> list[Fraction]:
    """Return the weighted sum of reciprocal average ranks of every row, as exact fractions."""
    exact = [Fraction(weight) for weight in weights or [1] * len(ease)]
    return [
        sum(weight / (k + average_rank(values, row)) for values, weight in zip(ease, exact, strict=True))
        for row in range(len(ease[0]))
    ]


def average_rank_fusion(*ease: Sequence[float], k: int = 60, weights: Sequence[float] | None = None) -> list[int]:
    """Return the rows by fused score, then by each criterion in turn, easiest first."""
    fused = fused_scores(*ease, k=k, weights=weights)
    return sorted(range(len(fused)), key=lambda row: (fused[row], *(values[row] for values in ease)), reverse=True)


def unique_and_lexsort(criteria: Sequence[NDArray[np.float64]], k: float, weights: Sequence[float]) -> list[int]:
    """Return `average_rank_fusion` as float64 rounds it, where the shares of a row are added smallest first."""
    shares = []
    for values, weight in zip(criteria, weights, strict=True):
        _, group, size = np.unique(-values, return_inverse=True, return_counts=True)
        rank = np.cumsum(size) - (size - 1) / 2
        shares.append(weight / (k + rank[group]))
    fused = np.sort(shares, axis=0).sum(axis=0)
    return np.lexsort([-values for values in reversed(criteria)] + [-fused]).tolist()


def staged_value(schedule: Mapping[int, float], epoch: int) -> float:
    """Return the value of the last key that has been reached, walking epoch by epoch."""
    value = schedule[0]
    for passed in range(epoch + 1):
        value = schedule.get(passed, value)
    return value


def stage_size(fraction: float, num_rows: int) -> int:
    """Return the whole rows in a fraction, taken as the decimal number that it is written as."""
    return math.floor(Fraction(str(fraction)) * num_rows)


def count_steps(sizes: Iterable[int], batch_size: int, world_size: int = 1, accumulate: int = 1) -> int:
    """Return the optimizer steps of epochs of these sizes, by walking through the batches of rank 0."""
    steps = 0
    for size in sizes:
        rows = list(range(size))
        while len(rows) % world_size != 0:
            rows.append(rows[0])
        mine = rows[::world_size]
        batches = 0
        while mine:
            mine = mine[batch_size:]
            batches += 1
            if batches % accumulate == 0 or not mine:
                steps += 1
    return steps


def deal(order: Sequence[int], batch_size: int, world_size: int) -> list[list[list[int]]]:
    """Return the batches of each rank, as if rows were cards; the first rows fill up until all have as many."""
    cards = list(order)
    while len(cards) % world_size != 0:
        cards.append(cards[len(cards) - len(order)])
    hands: list[list[int]] = [[] for _ in range(world_size)]
    for turn, card in enumerate(cards):
        hands[turn % world_size].append(card)
    return [[hand[first : first + batch_size] for first in range(0, len(hand), batch_size)] for hand in hands]


def share_of_padding(batches: Iterable[Sequence[int]]) -> float:
    """Return which share of the positions pads, where the rows of a batch have these lengths."""
    real, positions = 0, 0
    for lengths in batches:
        for length in lengths:
            real += length
            positions += max(lengths)
    return 1 - real / positions


def softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the probabilities of one token, ``[V]``, float64."""
    weights = (logits.double() / temperature).exp()
    return weights / weights.sum()


def forward_kl(p: Tensor, q: Tensor) -> Tensor:
    """Return KL(p ‖ q)."""
    return (p * (p / q).log()).sum()


def reverse_kl(p: Tensor, q: Tensor) -> Tensor:
    """Return KL(q ‖ p)."""
    return (q * (q / p).log()).sum()


def jensen_shannon(p: Tensor, q: Tensor, beta: float = 0.5) -> Tensor:
    """Return beta KL(p ‖ m) + (1 - beta) KL(q ‖ m) with m = beta p + (1 - beta) q."""
    m = beta * p + (1 - beta) * q
    return beta * (p * (p / m).log()).sum() + (1 - beta) * (q * (q / m).log()).sum()


def total_variation(p: Tensor, q: Tensor) -> Tensor:
    """Return half the summed absolute difference."""
    return (p - q).abs().sum() / 2


def skew_forward_kl(p: Tensor, q: Tensor, alpha: float = 0.1) -> Tensor:
    """Return KL(p ‖ alpha p + (1 - alpha) q)."""
    m = alpha * p + (1 - alpha) * q
    return (p * (p / m).log()).sum()


def skew_reverse_kl(p: Tensor, q: Tensor, alpha: float = 0.1) -> Tensor:
    """Return KL(q ‖ (1 - alpha) p + alpha q)."""
    m = (1 - alpha) * p + alpha * q
    return (q * (q / m).log()).sum()


def response_positions(labels: Tensor, ignore_index: int = -100) -> list[tuple[int, int]]:
    """Return (row, position) of every position whose next token belongs to the response."""
    positions = []
    for row, tokens in enumerate(labels.tolist()):
        for position in range(len(tokens) - 1):
            if tokens[position + 1] != ignore_index:
                positions.append((row, position))
    return positions


def distillation_loss(
    divergence: Callable[[Tensor, Tensor], Tensor],
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    scale_by_temperature: bool = True,
) -> Tensor:
    """Return the mean divergence over the response, token by token in float64, times the temperature squared."""
    total = torch.zeros((), dtype=torch.float64)
    positions = response_positions(labels)
    for row, position in positions:
        p = softmax(teacher_logits[row, position], temperature)
        q = softmax(student_logits[row, position], temperature)
        total = total + divergence(p, q)
    mean = total / len(positions)
    return mean * temperature * temperature if scale_by_temperature else mean


def hidden_state_mse(
    student: Tensor, teacher: Tensor, labels: Tensor, projection: Tensor
) -> tuple[float, Tensor, Tensor]:
    """Return the mean over response tokens, and its gradients by the student's states and by the projection.

    Args:
        student: ``[B, T, d]``.
        teacher: ``[B, T, e]``.
        labels: ``[B, T]``.
        projection: ``[e, d]``.
    """
    value, by_states, by_projection = 0.0, torch.zeros_like(student), torch.zeros_like(projection)
    places = response_positions(labels)
    for row, token in places:
        for unit in range(len(projection)):
            difference = sum(projection[unit, k] * student[row, token, k] for k in range(student.shape[2]))
            difference = difference - teacher[row, token, unit]
            share = 2 * difference / (len(projection) * len(places))
            value += float(difference) ** 2 / (len(projection) * len(places))
            for k in range(student.shape[2]):
                by_states[row, token, k] += share * projection[unit, k]
                by_projection[unit, k] += share * student[row, token, k]
    return value, by_states, by_projection


def paper_step(
    student: Any,
    teacher: Any,
    rows: Sequence[Mapping[str, Any]],
    pad_token_id: int,
    temperature: float,
    kd_weight: float,
    length: int | None = 512,
) -> Tensor:
    """Return (1 - w) CE + w T² KL(p ‖ q) at the cost of the authors' loop: all rows padded, all logits made.

    Rows have ``input_ids`` and ``prompt_length``; a length of None pads to the longest. Fp32, and vectorised: it is
    also what speed is compared with.
    """
    width = max(len(row["input_ids"]) for row in rows) if length is None else length
    padding = [width - len(row["input_ids"]) for row in rows]
    input_ids = [list(row["input_ids"]) + [pad_token_id] * pads for row, pads in zip(rows, padding, strict=True)]
    mask = [[1] * len(row["input_ids"]) + [0] * pads for row, pads in zip(rows, padding, strict=True)]
    response = [[row["prompt_length"] <= position < len(row["input_ids"]) for position in range(width)] for row in rows]
    device = next(student.parameters()).device
    batch = {
        "input_ids": torch.tensor(input_ids, device=device),
        "attention_mask": torch.tensor(mask, device=device),
    }
    student_logits = student(**batch).logits[:, :-1].float()
    with torch.no_grad():
        teacher_logits = teacher(**batch).logits[:, :-1].float()
    labels = batch["input_ids"][:, 1:]
    wanted = torch.tensor(response, device=device)[:, 1:].float()
    log_q = (student_logits / temperature).log_softmax(-1)
    log_p = (teacher_logits / temperature).log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1) * temperature**2
    ce = -student_logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return (((1 - kd_weight) * ce + kd_weight * kl) * wanted).sum() / wanted.sum()
