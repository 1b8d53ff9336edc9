"""Let vLLM do the reflection, and train on what it found.

    pip install vllm
    python examples/scores_from_vllm.py --model gpt2 --data train.jsonl --output scores.parquet
    srd fit --config configs/gpt2_dolly.yaml --data.scores scores.parquet

The file holds ``id``, ``answer`` and ``nll`` of every training row; ROUGE-L, and any other criterion that looks at
answers alone, is computed from ``answer`` when `SRDDataModule` reads it. The data module also makes the rows here, so
ids, prompts, tokens and dropped rows are those of the training, if it is given the same data, template and lengths.

Answers are greedy. vLLM computes with float32 weights in half precision, unless it is told ``--dtype float32``; the
reflection of `SRDDataModule` computes with the weights as they are.

What is done is kept in ``OUTPUT.partial`` until all is: after a kill, the same command goes on from there.

This follows the API of vLLM 0.15 (`LLM.generate` on token ids, `SamplingParams`, `RequestOutput`). It has been tested
with a stand-in for vLLM only, not yet with vLLM on a GPU.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from srd_lightning import ALPACA, ChatTemplate, Decoding, PromptTemplate, SRDDataModule
from srd_lightning.curation.reflection import SCORING_VERSION, fingerprint
from srd_lightning.curation.score_store import ScoreStore
from srd_lightning.data.tokenization import ids_of
from srd_lightning.storage import write_atomically

TEMPLATES: dict[str, PromptTemplate | ChatTemplate] = {"alpaca": ALPACA, "chat": ChatTemplate()}


def main() -> None:
    """Score the rows that have no scores yet, then write all scores to one file."""
    args = parse()
    template, decoding = TEMPLATES[args.template], Decoding(max_new_tokens=args.max_new_tokens)
    lengths = {"max_length": args.max_length, "max_prompt_length": args.max_prompt_length}
    data = SRDDataModule(args.data, tokenizer=args.model, template=template, **lengths)
    data.read_rows("fit")
    rows = data.rows["train"]
    made_of = fingerprint(rows, nn.Identity(), data.tokenizer, template, decoding, SCORING_VERSION)
    made_of["student"] = f"{args.model} in {args.dtype}"
    with ScoreStore.locked(args.output.with_suffix(".parquet.partial"), made_of, criteria={}) as store:
        todo = rows.select(np.flatnonzero(np.isnan(store.columns(ids_of(rows), ["nll"])["nll"])))
        if len(todo):
            reflect(todo, data.tokenizer, store, args)
        write(store, ids_of(rows), args.output)
    shutil.rmtree(store.folder)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="the student: folder or hub id")
    parser.add_argument("--data", required=True, help="training data: file, save_to_disk folder or hub id")
    parser.add_argument("--output", required=True, type=Path, help="the file to write, *.parquet")
    parser.add_argument("--template", choices=TEMPLATES, default="alpaca", help="how rows become prompts")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of prompt and response")
    parser.add_argument("--max-prompt-length", type=int, default=256, help="tokens of the prompt")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="tokens of an answer")
    parser.add_argument("--dtype", default="auto", help="in which vLLM computes: auto, float32, bfloat16, ...")
    engine = 'other arguments of vllm.LLM, as JSON: {"tensor_parallel_size": 8, "gpu_memory_utilization": 0.8}'
    parser.add_argument("--engine", type=json.loads, default={}, help=engine)
    parser.add_argument("--rows-per-part", type=int, default=10_000, help="rows that a kill can cost")
    args = parser.parse_args()
    if args.output.suffix != ".parquet":
        parser.error(f"--output must end in .parquet, but is {args.output}")
    if args.output.exists():
        parser.error(f"{args.output} is there already; move it away, or name another --output")
    return args


def reflect(rows: Dataset, tokenizer: PreTrainedTokenizerBase, store: ScoreStore, args: argparse.Namespace) -> None:
    """Let the student answer every prompt and read every reference response; store what comes of it part by part."""
    from vllm import LLM, SamplingParams  # so late because the rows are looked at before minutes go into the engine

    longest = max(args.max_length + 1, args.max_prompt_length + args.max_new_tokens)  # one more, as it must generate
    engine = LLM(**{"model": args.model, "dtype": args.dtype, "max_model_len": longest, **args.engine})
    greedy = {"temperature": 0.0, "stop_token_ids": [tokenizer.eos_token_id], "detokenize": False}
    answering = SamplingParams(max_tokens=args.max_new_tokens, **greedy)
    reading = SamplingParams(max_tokens=1, prompt_logprobs=1, **greedy)
    with tqdm(total=len(rows), desc="reflection", unit="row") as progress:
        for part in rows.iter(args.rows_per_part):
            texts, lengths = part["input_ids"], part["prompt_length"]
            prompts = [ids[:length] for ids, length in zip(texts, lengths, strict=True)]
            answers = engine.generate([{"prompt_token_ids": ids} for ids in prompts], answering, use_tqdm=False)
            readings = engine.generate([{"prompt_token_ids": ids} for ids in texts], reading, use_tqdm=False)
            columns = {
                "id": part["id"],
                "answer": [answer_text(output, tokenizer) for output in answers],
                "nll": [mean_loss(output, length) for output, length in zip(readings, lengths, strict=True)],
            }
            store.append(pa.table(columns).to_pylist())
            progress.update(len(texts))


def answer_text(output: Any, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the answer in a ``RequestOutput`` of vLLM as text, without the token that stopped it."""
    answer = output.outputs[0]
    ids = answer.token_ids[:-1] if answer.finish_reason == "stop" else answer.token_ids
    return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()


def mean_loss(output: Any, prompt_length: int) -> float:
    """Return the mean loss of the tokens after the prompt, end token included, in nats, from a ``RequestOutput``."""
    tokens = list(zip(output.prompt_token_ids, output.prompt_logprobs, strict=True))[prompt_length:]
    return -statistics.fmean(found[token].logprob for token, found in tokens)


def write(store: ScoreStore, ids: pa.Array, path: Path) -> None:
    """Write one file of all scores, in the order of ``ids``; it is there as a whole or not at all."""
    answers = store.answers(ids)
    columns = {"id": ids, "answer": [answers[row_id] for row_id in ids.to_pylist()], **store.columns(ids, ["nll"])}
    content = io.BytesIO()
    pq.write_table(pa.table(columns), content)
    write_atomically(path, content.getvalue())


if __name__ == "__main__":
    main()
