"""The whole job with the teacher's hidden states cached and large batches taken in parts."""

import distil

OPTIONS = {"teacher_cache": "hidden", "teacher_cache_dtype": "float32", "micro_batch_tokens": 400}


def main(**options):
    trainer = distil.main(module_options=OPTIONS, **options)
    assert trainer.lightning_module.teacher is not None  # it was given, and stays for evaluation
    return trainer
