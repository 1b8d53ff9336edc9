"""What a run will cost, before it runs: rows and steps are counted, seconds are measured on a few real batches.

Imports `curriculum`, `data`, `criteria`, `curation`, `models`, `distributed`, `teacher`, `training`, `callbacks`, `module` and `datamodule`. Begin with `plan`.
"""
