"""The quickstart, ``python -m srd_lightning.quickstart``, and what it fetches.

Imports `models`, `evaluation`, `assessment`, `callbacks`, `command` and `cli`; nothing imports it.
"""
