"""The command line, behind `srd_lightning.cli`, which has all that ``srd --help`` needs.

Imports the module, the data module and every room before it. Begin with `commandline`.
"""
