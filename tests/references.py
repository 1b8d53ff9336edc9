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


def alpha_beta(p: Tensor, q: Tensor, alpha: float = 0.2, beta: float = 0.7) -> Tensor:
    """Return the sum over tokens of what ABKD writes for one, and of its limits where a power is 0."""
    total = torch.zeros((), dtype=torch.float64)
    for a, b in zip(p, q, strict=True):
        if alpha == 0:
            total = total + (b**beta * (b**beta / a**beta).log() - b**beta + a**beta) / beta**2
        elif beta == 0:
            total = total + (a**alpha * (a**alpha / b**alpha).log() - a**alpha + b**alpha) / alpha**2
        else:
            both = alpha + beta
            term = a**alpha * b**beta - alpha / both * a**both - beta / both * b**both
            total = total - term / (alpha * beta)
    return total


def adaptive_kl(p: Tensor, q: Tensor, head: float = 0.5) -> Tensor:
    """Return both KLs, weighted by what the head and the tail of the teacher miss, walking down the likeliest."""
    missed = {"head": 0.0, "tail": 0.0}
    mass = 0.0
    for place, token in enumerate(sorted(range(len(p)), key=lambda token: -float(p[token]))):
        mass += float(p[token])
        missed["head" if mass <= head or place == 0 else "tail"] += abs(float(p[token]) - float(q.detach()[token]))
    share = missed["head"] / (missed["head"] + missed["tail"])
    return share * forward_kl(p, q) + (1 - share) * reverse_kl(p, q)


def taid(p: Tensor, q: Tensor, t: float = 0.4) -> Tensor:
    """Return KL(r ‖ q), where r is proportional to q^(1 - t) p^t and is not differentiated."""
    mixed = q.detach() ** (1 - t) * p**t
    return forward_kl(mixed / mixed.sum(), q)


def hellinger(p: Tensor, q: Tensor) -> float:
    """Return the Hellinger distance."""
    return math.sqrt(sum((math.sqrt(a) - math.sqrt(b)) ** 2 for a, b in zip(p.tolist(), q.tolist(), strict=True)) / 2)


def entropy(p: Tensor, q: Tensor) -> float:
    """Return the entropy of the student."""
    return -sum(b * math.log(b) for b in q.tolist())


def chosen_by_row(
    divergence: Callable[[Tensor, Tensor], Tensor],
    student_logits: Tensor,
    teacher_logits: Tensor,
    rows: Sequence[int],
    temperature: float,
    share: float = 1.0,
    by: Callable[[Tensor, Tensor], float] = entropy,
    strength: float = 0.0,
) -> Tensor:
    """Return the mean over N tokens of what is distilled of each row: its best by a score, each at a temperature.

    Args:
        divergence: Of one token.
        student_logits: ``[N, V]``.
        teacher_logits: ``[N, V]``.
        rows: Tokens of each row.
        temperature: At which tokens are scored.
        share: Of a row.
        by: Scores a token.
        strength: Of the temperatures of hard and easy tokens, which are told apart by Hellinger distance.
    """
    total, first = torch.zeros((), dtype=torch.float64), 0
    for length in rows:
        tokens = list(range(first, first + length))
        first += length
        pairs = {n: (softmax(teacher_logits[n], temperature), softmax(student_logits[n], temperature)) for n in tokens}
        scores = {n: by(p.detach(), q.detach()) for n, (p, q) in pairs.items()}
        best = sorted(tokens, key=lambda n: -scores[n])[: math.ceil(share * length)]
        distances = {n: hellinger(pairs[n][0].detach(), pairs[n][1].detach()) for n in best}
        for n in best:
            median = sorted(distances.values())[(len(best) - 1) // 2]
            own = temperature * math.exp(-strength * math.tanh(math.log(distances[n] / median)))
            value = divergence(softmax(teacher_logits[n], own), softmax(student_logits[n], own))
            total = total + length / len(best) * own**2 * value
    return total / sum(rows)


def paper_loss(name: str, p: Tensor, q: Tensor, temperature: float) -> Tensor:
    """Return what the authors' code minimises of a token, p and q being at the temperature."""
    squared = temperature * temperature
    if name == "tfkl":
        return -squared * (p * q.log()).sum()
    if name == "trkl":
        return (q * (q.log() - p.log())).sum()
    if name == "tjsd":
        m = (1 - 0.9) * p + 0.9 * q
        return squared * (0.9 * (q * (q / m).log()).sum() + (1 - 0.9) * (p * (p / m).log()).sum())
    if name == "ttvd":
        return 0.5 * (p - q).abs().sum()
    if name == "tsfkl":
        return -(p * (0.1 * p + (1 - 0.1) * q).log()).sum()
    assert name == "tsrkl"
    return squared * (q * (q.log() - ((1 - 0.1) * p + 0.1 * q).log())).sum()


def following_t(losses: Sequence[float], start: float, end: float, alpha: float, momentum: float) -> list[float]:
    """Return TAID's t of each step, from the losses of all steps."""
    ts, trend = [start], 0.0
    for step in range(1, len(losses)):
        hastened = 0.0
        if step > 1:
            change = (losses[step - 2] - losses[step - 1]) / losses[step - 2]
            trend = momentum * trend + (1 - momentum) * change
            hastened = alpha * (1 - ts[-1]) / (1 + math.exp(-trend))
        linear = start + (end - start) * step / len(losses)
        ts.append(min(end, max(linear, ts[-1] + hastened)))
    return ts


def mapped_layers_mse(student: Sequence[Tensor], teacher: Sequence[Tensor], projections: Sequence[Tensor]) -> Tensor:
    """Return the mean over tokens and pairs of layers of the mean squared difference; ``[N, d]`` and ``[e, d]``."""
    total = torch.zeros((), dtype=torch.float64)
    for own, other, projection in zip(student, teacher, projections, strict=True):
        for state, target in zip(own, other, strict=True):
            for unit in range(len(target)):
                total = total + ((projection[unit] * state).sum() - target[unit]) ** 2 / len(target)
    return total / (len(student) * len(student[0]))


def hidden_state_cosine(student: Tensor, teacher: Tensor, projection: Tensor) -> Tensor:
    """Return the mean over tokens of one minus the cosine; ``[N, d]``, ``[N, e]`` and ``[e, d]``."""
    total = torch.zeros((), dtype=torch.float64)
    for state, target in zip(student, teacher, strict=True):
        made = [(row * state).sum() for row in projection]
        dot = sum(one * other for one, other in zip(made, target, strict=True))
        lengths = sum(one * one for one in made).sqrt() * sum(other * other for other in target).sqrt()
        total = total + 1 - dot / lengths
    return total / len(student)


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


def sequence_reverse_kl(
    student: Tensor, teacher: Tensor, labels: Tensor, alpha: float, normalized: bool, clip: float
) -> Tensor:
    """Return MiniLLM's loss of some rows, token by token: what it differentiates, with all constants detached."""
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for row in range(len(labels)):
        places = [place for place in range(1, labels.shape[1]) if labels[row, place] != -100]
        q = {place: softmax(student[row, place - 1]) for place in places}
        p = {place: softmax(teacher[row, place - 1]) for place in places}
        said = {place: int(labels[row, place]) for place in places}
        reward = {}
        for place in places:
            gain = math.log(p[place][said[place]].item()) - math.log(q[place][said[place]].item())
            reward[place] = max(-clip, min(clip, gain))
        for number, place in enumerate(places):
            later = [reward[other] for other in places[number + 1 :]]
            ahead = sum(later) / (len(later) if normalized and later else 1)
            own, theirs = q[place][said[place]], p[place][said[place]]
            weight = own.item() / ((1 - alpha) * own.item() + alpha * theirs.item())
            total = total + weight * (reverse_kl(p[place], q[place]) - ahead * own.log())
            tokens += 1
    return total / tokens


def resampled_means(
    values: Sequence[float], weights: Sequence[float], resamples: int, draw: Callable[[int], Sequence[int]]
) -> list[float]:
    """Return the weighted mean of each resample, sorted; ``draw`` gives the numbers of the rows of the next one."""
    means = []
    for _ in range(resamples):
        total, weight = 0.0, 0.0
        for row in draw(len(values)):
            total += weights[row] * values[row]
            weight += weights[row]
        means.append(total / weight)
    return sorted(means)


def calibration_error(predictions: Iterable[tuple[float, bool]], bins: int) -> float:
    """Return how far accuracy and mean confidence are apart, bin by bin, weighed by the predictions in each."""
    pairs = list(predictions)
    error = 0.0
    for number in range(bins):
        inside = [pair for pair in pairs if number < Fraction(pair[0]) * bins <= number + 1]
        if inside:
            confidence = sum(pair[0] for pair in inside) / len(inside)
            accuracy = sum(pair[1] for pair in inside) / len(inside)
            error += len(inside) / len(pairs) * abs(accuracy - confidence)
    return error
