"""The command line, behind `srd_lightning.cli`, which has all that ``srd --help`` needs.

Imports `curriculum`, `distributed`, `models`, `criteria`, `curation`, `rollouts`, `checkpoints`, `training`,
`callbacks`, `module` and `datamodule`. Begin with `commandline`.
"""
