"""``python -m srd_lightning …`` is ``srd …``. Imports `cli`."""

from srd_lightning.cli import main

if __name__ == "__main__":
    main()
