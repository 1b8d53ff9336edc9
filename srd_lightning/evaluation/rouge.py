"""ROUGE-L, the same number as `rouge-score` gives, at the speed of a C++ alignment."""

from __future__ import annotations

import functools
from types import SimpleNamespace

from nltk.stem.porter import PorterStemmer
from rapidfuzz.distance import LCSseq
from rouge_score.tokenize import tokenize

_STEMMER = SimpleNamespace(stem=functools.lru_cache(maxsize=1_000_000)(PorterStemmer().stem))


def rouge_l(truth: str, answer: str) -> float:
    """Return ROUGE-L F1 with stemming, in [0, 1]: how much of the two texts is one sequence of words common to both.

    Words and stems are `rouge-score`'s (each word is stemmed once); the longest common subsequence is `rapidfuzz`'s.

    Args:
        truth: The true response.
        answer: What was answered.

    Returns:
        The harmonic mean of precision and recall (Lin 2004); 0 where either text has no word.

    Example:
        >>> rouge_l("the cat sat on the mat", "the cats sat on a mat")
        0.8333333333333334
    """
    true_words, words = tokenize(truth, _STEMMER), tokenize(answer, _STEMMER)
    common = LCSseq.similarity(true_words, words)
    if common == 0:
        return 0.0
    precision, recall = common / len(words), common / len(true_words)
    return 2 * precision * recall / (precision + recall)
