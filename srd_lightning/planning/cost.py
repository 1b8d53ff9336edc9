"""What work costs: seconds that grow with passes and positions, from a few measured pieces of it. Without torch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Ints = NDArray[np.int64]


class Work(NamedTuple):
    """A piece of work.

    Args:
        passes: Through a model, each of which has a price of its own.
        positions: Rows times tokens, padding included, that go through it.
    """

    passes: int
    positions: int


NOTHING = Work(0, 0)


class Rate(NamedTuple):
    """What work costs, in seconds.

    Args:
        per_pass: Of each pass.
        per_position: Of each position.
    """

    per_pass: float
    per_position: float

    def seconds(self, work: Work) -> float:
        """Return what work takes."""
        return self.per_pass * work.passes + self.per_position * work.positions


def rate_of(pieces: Sequence[Work], seconds: Sequence[float]) -> Rate:
    """Return the rate that fits measured pieces best (least squares), neither part of it below 0.

    Args:
        pieces: Of work, at least one.
        seconds: That each took.

    Returns:
        Where all pieces have as many positions per pass, nothing can be told apart, and positions alone cost.

    Example:
        >>> rate_of([Work(1, 10), Work(1, 30)], [3.0, 5.0])
        Rate(per_pass=2.0, per_position=0.1)
    """
    measured, took = np.array(pieces, dtype=np.float64), np.array(seconds, dtype=np.float64)
    best, least = np.zeros(2), math.inf
    for parts in ([1], [0], [0, 1]):  # of two numbers that must not be negative, one or the other is 0, or none
        some = measured[:, parts]
        if np.linalg.matrix_rank(some) < len(parts):
            continue
        found = np.zeros(2)
        found[parts] = np.linalg.lstsq(some, took, rcond=None)[0]
        error = float(((measured @ found - took) ** 2).sum())
        if (found >= 0).all() and error < least - 1e-12:
            best, least = found, error
    return Rate(*(float(f"{value:.12g}") for value in best))


def evenly(number: int, of: int) -> list[int]:
    """Return places that are spread over a range, also the first few of them.

    Args:
        number: Of places, at most.
        of: Length of the range.

    Example:
        >>> evenly(3, of=8), evenly(9, of=2)
        ([4, 2, 6], [1, 0])
    """
    halves = ((2 * odd + 1) / 2**power for power in itertools.count(1) for odd in _mixed(power - 1))
    places = dict.fromkeys(int(share * of) for share in itertools.islice(halves, 4 * max(of, number)) if of)
    return list(places)[:number]


def _mixed(bits: int) -> list[int]:
    """Return the numbers of so many bits, each read backwards."""
    return [int(f"{number:0{bits}b}"[::-1], 2) if bits else 0 for number in range(2**bits)]


def batch_sizes(places: Ints, batch_size: int, texts: Sequence[Ints], multiple_of: int = 1) -> tuple[Ints, Ints]:
    """Return how many tokens and positions batches have.

    Args:
        places: Numbers of rows, batch after batch, ``[M]``.
        batch_size: Rows of a batch; the last may have fewer.
        texts: Lengths of N rows in tokens, ``[N]`` each; each text is padded for itself.
        multiple_of: Batches are as long as their longest row, rounded up to a multiple of this.

    Returns:
        Real tokens, and positions with what pads them, ``[B]`` each.

    Example:
        >>> batch_sizes(np.array([2, 0, 1]), 2, [np.array([3, 5, 9])], multiple_of=4)
        (array([12,  5]), array([24,  8]))
    """
    starts = np.arange(0, len(places), batch_size)
    rows = np.diff(np.append(starts, len(places)))
    tokens, positions = np.zeros_like(starts), np.zeros_like(starts)
    for text in texts:
        lengths = text[places].astype(np.int64)
        tokens += np.add.reduceat(lengths, starts)
        longest = np.maximum.reduceat(lengths, starts)
        positions += rows * -(-longest // multiple_of) * multiple_of
    return tokens, positions


def answering(answers: ArrayLike, at_once: int) -> Work:
    """Return the work of writing answers to a batch, where rows that have ended leave it every few steps.

    Args:
        answers: Their lengths in tokens, ``[B]``.
        at_once: Steps between two looks at which rows have ended.

    Example:
        >>> answering([1, 3, 6], at_once=4)  # four steps of all three rows, then two of the last one
        Work(passes=6, positions=14)
    """
    left, work = np.asarray(answers), Work(0, 0)
    while len(left):
        steps = int(min(left.max(), at_once))
        work = Work(work.passes + steps, work.positions + steps * len(left))
        left = left[left > at_once] - at_once
    return work


def added(pieces: Sequence[Work]) -> Work:
    """Return several pieces of work as one."""
    return Work(sum(piece.passes for piece in pieces), sum(piece.positions for piece in pieces))


def correlated_order(values: ArrayLike, correlation: float, seed: int = 0) -> Ints:
    """Return an order that agrees with that of some values as far as a rank correlation says.

    Each value's normal score is mixed with noise (a Gaussian copula), in which ranks of correlation r come from normal
    scores of correlation 2 sin(π r / 6).

    Args:
        values: ``[N]``
        correlation: Of ranks, from -1, the largest value first, to 1, the smallest first.
        seed: Of the noise.

    Returns:
        Places ``[N]``.

    Example:
        >>> correlated_order([0.3, 0.1, 0.2], 1.0), correlated_order([0.3, 0.1, 0.2], -1.0)
        (array([1, 2, 0]), array([0, 2, 1]))
    """
    values, chance = np.asarray(values), np.random.default_rng(seed)
    ties = chance.permutation(len(values))
    score, noise = (np.sort(chance.standard_normal(len(values))) for _ in range(2))
    scores = np.empty(len(values))
    scores[np.lexsort((ties, values))] = score
    share = 2 * math.sin(math.pi * correlation / 6)
    mixed = share * scores + math.sqrt(max(1 - share**2, 0.0)) * chance.permutation(noise)
    return np.argsort(mixed, kind="stable")


def rank_correlation(one: ArrayLike, other: ArrayLike) -> float:
    """Return Spearman's, 0 where there is nothing to correlate.

    Example:
        >>> rank_correlation([1, 5, 9], [2, 3, 8]), rank_correlation([1, 2], [7, 7])
        (1.0, 0.0)
    """
    ranks = [_ranks(np.asarray(values)) for values in (one, other)]
    spread = [float(np.std(values)) for values in ranks]
    if not all(spread):
        return 0.0
    return round(float(np.clip(np.corrcoef(ranks[0], ranks[1])[0, 1], -1, 1)), 12)


def _ranks(values: NDArray[np.number]) -> NDArray[np.float64]:
    """Return ranks; equal values share the mean of theirs."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    mean: NDArray[np.float64] = np.cumsum(counts) - (counts - 1) / 2
    return np.asarray(mean[which])
