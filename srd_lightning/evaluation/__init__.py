"""Evaluation: answers, and how near they are to the reference response.

Imports `data` and `models`. Begin with `answers`; `text_metrics` scores one answer, and `answer_scores` says what all
answers of a test are worth.
"""
