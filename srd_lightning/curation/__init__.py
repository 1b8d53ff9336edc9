"""Curation: the student reflects, its scores are kept, and rows get their order.

Imports `criteria`, and what criteria import; `curriculum` and `distributed`. Begin with `curator`, which goes from
rows to a curriculum; `reflection` is the loop over batches.
"""
