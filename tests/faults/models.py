"""Models and tokenizers that cannot do what is asked of them."""

from faults.fault import Fault

FAULTS: list[Fault] = []
