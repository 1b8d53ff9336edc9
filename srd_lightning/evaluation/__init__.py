"""Evaluation: answers, and how near they are to the reference response.

Imports `data` and `models`. Begin with `answers`; `text_metrics` scores one.
"""
