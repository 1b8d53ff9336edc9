"""The whole job with the teacher's hidden states cached and large batches taken in parts."""

import distil

from srd_lightning import CacheSettings

OPTIONS = {"teacher_cache": CacheSettings("hidden", dtype="float32"), "micro_batch_tokens": 400}


def main(**options):
    trainer = distil.main(module_options=OPTIONS, **options)
    assert trainer.lightning_module.teacher is not None  # it was given, and stays for evaluation
    return trainer
