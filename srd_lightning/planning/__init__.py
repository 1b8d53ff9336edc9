"""What a run will cost, before it runs: rows and steps are counted, seconds are measured on a few real batches.

Imports `losses`, `curriculum`, `data`, `distributed`, `models`, `criteria`, `curation`, `teacher`, `training`,
`metering`, `callbacks`, `module` and `datamodule`. Begin with `make`: `survey` says what a run will do, `rehearsal`
tries a few of its batches, and `plan` puts them together by the arithmetic of `cost`, `schedule` and `memory`.
"""
