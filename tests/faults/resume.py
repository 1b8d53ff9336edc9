"""Checkpoints that a run cannot go on from."""

from faults.fault import Fault

FAULTS: list[Fault] = []
