"""``srd``, under its name."""

import sys

from srd_lightning.cli import main

if __name__ == "__main__":
    sys.argv[0] = "srd"
    main()
