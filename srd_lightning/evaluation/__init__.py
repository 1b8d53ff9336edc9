"""Evaluation: answers, how near they are to the reference response, and how sure that is.

Imports `losses`, `data` and `models`. Begin with `answers`; `text_metrics` scores one answer, `next_token` one token,
and `answer_scores` says what all answers of a test are worth. `bootstrap` gives intervals.
"""
