"""``python cli.py …`` is ``srd …``."""

from srd_lightning.cli import main

main()
