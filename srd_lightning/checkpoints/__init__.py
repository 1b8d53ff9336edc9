"""Checkpoints: whole or not there, and resumed exactly or refused.

Imports `distributed`. Begin with `resume_state`; where a resume is refused, `refusals` is the file to open.
"""
