"""The command line, behind `srd_lightning.cli`, which has all that ``srd --help`` needs.

Imports `curriculum`, `data`, `distributed`, `models`, `evaluation`, `criteria`, `curation`, `assessment`, `rollouts`,
`checkpoints`, `training`, `callbacks`, `module`, `datamodule` and `planning`. Begin with `commandline`.
"""
