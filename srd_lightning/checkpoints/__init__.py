"""Checkpoints: whole or not there, and resumed exactly or refused.

Imports `distributed`. Where a resume is refused, `compatibility` is the file to open.
"""
