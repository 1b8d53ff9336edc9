"""Files and folders that a run cannot write, or that are damaged."""

from faults.fault import Fault

FAULTS: list[Fault] = []
