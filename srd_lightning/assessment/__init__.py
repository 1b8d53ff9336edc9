"""Assessment: a model answers held-out rows and is measured on them, by all ranks, and goes on where it was stopped.

Imports `data`, `models`, `evaluation`, `criteria` and `curation`. Begin with `evaluator`, which lets a
model answer and measures it; `summary` says what that comes to.
"""
