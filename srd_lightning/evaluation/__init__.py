"""Evaluation: answers, and how near they are to the truth.

Imports `losses`, `data` and `models`. Begin with `answers`; `text_metrics` scores one, `response_logits` needs none.
"""
