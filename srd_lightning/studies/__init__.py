"""Studies: many runs from one plan, and what runs have written, as numbers, tables and pages.

Imports nothing. Runs are processes of ``srd``, and are read from their folders. Begin with `plan` for ``srd study``,
and with `run_files` for ``srd report``.
"""
