"""The quickstart, ``python -m srd_lightning.quickstart``, and what it fetches.

Imports `models`, `callbacks`, `command` and `cli`; nothing imports it.
"""
