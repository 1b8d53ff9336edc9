"""``srd``, killed when a number of optimizer steps is made: ``killed.py STEPS ARGUMENT …``."""

import os
import signal
import sys

from srd_lightning import ResumeCheckpoint
from srd_lightning.cli import main

if __name__ == "__main__":
    steps = int(sys.argv.pop(1))
    on_train_batch_end = ResumeCheckpoint.on_train_batch_end

    def killed(self, trainer, *args):
        if trainer.global_step == steps:
            os.kill(os.getpid(), signal.SIGKILL)
        on_train_batch_end(self, trainer, *args)

    ResumeCheckpoint.on_train_batch_end = killed
    main()
