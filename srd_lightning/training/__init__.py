"""Training: one optimisation step, and what must be done around it.

Imports `losses`, `curriculum`, `data`, `distributed`, `models`, `teacher` and `rollouts`. Begin with `step`.
"""
