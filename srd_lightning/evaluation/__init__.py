"""Evaluation: answers, and how near they are to the truth.

Imports `losses`, `data` and `models`.
"""
