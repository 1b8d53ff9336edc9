"""Curation: the student reflects, its scores are kept, and rows get their order.

Imports `curriculum`, `data`, `distributed`, `models`, `criteria` and `checkpoints`. Begin with `curator`, which goes
from rows to a curriculum; `reflection` is the loop over batches, which `responses` uses to let a teacher write.
"""
