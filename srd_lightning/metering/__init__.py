"""What a run takes: time by parts, memory, energy, operations, and these as numbers and as a table.

Imports `losses` and `data`. Begin with `clock`, which divides time into parts; `work` is what was done in an epoch, and
what `callbacks.runtime.RuntimeBenchmark` adds up.
"""
