"""The teacher: what it says to a batch, now or from a cache.

Imports `losses`, `data`, `distributed` and `models`. Begin with `live`: a teacher is whatever gives logits for a
slice of tokens. `handle` holds the one of a module.
"""
