"""Train with the student's own text (GKD), which vLLM writes with the student's weights as they are.

    pip install vllm
    python examples/rollouts_with_vllm.py --model gpt2 --teacher gpt2-xl --data train.jsonl --output student

`VLLM` is all that one's own script needs: it is the ``engine`` of `GKD` or `DistiLLM`, and a callback of the trainer,
by which it knows the student. Before it writes it takes over the weights, once for each optimizer step.

For one GPU, on which student, teacher and vLLM are beside each other: ``--engine`` says how much of the memory is
vLLM's. Each rank of DDP may have a `VLLM` of its own in the same way. It is not for weights that are not whole (FSDP2,
FSDP1) or have other names (adapters). vLLM has no ``no_repeat_ngram_size``.

This follows the API of vLLM 0.15 (`LLM.generate` on token ids, `LLM.apply_model`, `LLM.reset_prefix_cache`). It has
been tested with a stand-in for vLLM only, not yet with vLLM on a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

from lightning import Callback, LightningModule, Trainer, seed_everything

from srd_lightning import (
    GKD,
    Decoding,
    HuggingFaceExport,
    JensenShannon,
    KDLightningModule,
    Pretrained,
    SRDDataModule,
)


class VLLM(Callback):
    """An engine of rollouts that writes with the weights of the student that is trained.

    Args:
        arguments: Of ``vllm.LLM``.
    """

    def __init__(self, **arguments: Any) -> None:
        self.arguments = arguments
        self.engine: Any = None
        self.module: Any = None
        self.step: int | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start vLLM, in this process: so late because the rows are read before minutes go into the engine."""
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # so that it takes the weights from where they are
        from vllm import LLM

        self.engine = self.engine or LLM(**self.arguments)
        self.module, self.step = pl_module, None

    def __call__(self, prompts: list[list[int]], decoding: Decoding, seed: int) -> list[list[int]]:
        """Return the tokens of an answer to each prompt, the end token included unless it was cut."""
        from vllm import SamplingParams

        self._take_over_weights()
        settings = {
            "max_tokens": decoding.max_new_tokens,
            "temperature": decoding.temperature,
            "top_p": decoding.top_p,
            "top_k": decoding.top_k or -1,
            "stop_token_ids": [self.module.tokenizer.eos_token_id],
            "detokenize": False,
        }
        each = [SamplingParams(seed=(seed + place) % 2**63, **settings) for place in range(len(prompts))]
        outputs = self.engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], each, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def _take_over_weights(self) -> None:
        """Give vLLM the weights of the student, unless it has had those of this step."""
        if self.step != self.module.global_step:
            weights = self.module.student.state_dict()
            self.engine.apply_model(lambda model: model.load_weights(weights.items()))
            self.engine.reset_prefix_cache()  # which is of other weights
            self.step = self.module.global_step


def main() -> None:
    """Train a student on all rows, half of the batches with its own text."""
    args = parse()
    seed_everything(0)
    longest = max(args.max_length, args.max_prompt_length + args.max_new_tokens)
    engine = VLLM(model=args.model, max_model_len=longest, **args.engine)
    decoding = Decoding(max_new_tokens=args.max_new_tokens, temperature=args.temperature)
    module = KDLightningModule(
        Pretrained(args.model),
        Pretrained(args.teacher),
        JensenShannon(),
        rollouts=GKD(share=args.share, decoding=decoding, engine=engine),
    )
    lengths = {"max_length": args.max_length, "max_prompt_length": args.max_prompt_length}
    data = SRDDataModule(args.data, tokenizer=args.model, schedule={0: 1.0}, batch_size=args.batch_size, **lengths)
    callbacks = [engine, HuggingFaceExport(args.output)]
    Trainer(max_epochs=args.epochs, devices=1, callbacks=callbacks, logger=False).fit(module, datamodule=data)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="the student: folder or hub id")
    parser.add_argument("--teacher", required=True, help="the teacher: folder or hub id")
    parser.add_argument("--data", required=True, help="training data: file, save_to_disk folder or hub id")
    parser.add_argument("--output", required=True, help="folder of the trained student")
    parser.add_argument("--share", type=float, default=0.5, help="of the batches that are the student's own text")
    parser.add_argument("--temperature", type=float, default=1.0, help="at which it is written")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="tokens of a text")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of prompt and response")
    parser.add_argument("--max-prompt-length", type=int, default=256, help="tokens of the prompt")
    parser.add_argument("--batch-size", type=int, default=8, help="rows of a step")
    parser.add_argument("--epochs", type=int, default=1, help="over all rows")
    engine = 'other arguments of vllm.LLM, as JSON: {"gpu_memory_utilization": 0.3}'
    parser.add_argument("--engine", type=json.loads, default={"gpu_memory_utilization": 0.3}, help=engine)
    return parser.parse_args()


if __name__ == "__main__":
    main()
