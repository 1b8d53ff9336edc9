"""The quickstart, ``python -m srd_lightning.quickstart``, and what it fetches. Imports anything; nothing imports it."""
