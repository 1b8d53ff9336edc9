"""Rows and files of rows that cannot be used as they are."""

from faults.fault import Fault

FAULTS: list[Fault] = []
