"""Whether an answer is right, where one can tell."""

from __future__ import annotations

import re
import unicodedata
from decimal import Decimal

_NUMBER = re.compile(r"(?:(?<![\w)])-)?(?:\d[\d,]*(?:\.\d+)?|(?<!\w)\.\d+)")
"""A hyphen after a word or a bracket is none of the number's."""


def same_words(truth: str, answer: str) -> bool:
    """Return whether two texts are the same but for case, punctuation and spaces; symbols such as + and $ count.

    Example:
        >>> same_words("New York, USA", "new york (USA).")
        True
    """
    return _words(truth) == _words(answer)


def _words(text: str) -> list[str]:
    text = unicodedata.normalize("NFC", text).casefold()
    return "".join(" " if unicodedata.category(letter)[0] == "P" else letter for letter in text).split()


def same_number(truth: str, answer: str) -> bool:
    """Return whether the last numbers of two texts are equal.

    Example:
        >>> same_number("... so 1,200 are left. #### 1200", "That makes 1200.0 in all.")
        True
    """
    numbers = [_NUMBER.findall(text.replace("−", "-")) for text in (truth, answer)]
    if not all(numbers):
        return False
    first, second = (Decimal(found[-1].replace(",", "")) for found in numbers)
    return first == second
