"""How fast the student reflects: the paper's settings and padding against ours, one after the other, in one run.

    python benchmarks/reflection.py --model MODEL --data train.jsonl --rows 256 --paper-rows 48 --json reflection.json

- ``paper``: the authors' way. Batches of 16 in the order of the file, prompts padded to 256 tokens, 256 new tokens
  sampled at temperature 0.01 without repeated 6-grams, the loss from full logits of sequences padded to 512,
  `rouge-score`.
- ``paper's decoding``: the same answers are asked for, by this library.
- ``ours``: this library as it is: greedy.
- ``bf16``: answers computed in bf16, losses as before.
- ``bounded``: the same, and answers stop at ``--ratio`` times the tokens of the true response.

All score the same tokens, the end token included, in fp32. Prints and writes rows per second and the ratio to
``paper``; the largest difference of a row's loss to it; and how near each comes to ``ours`` in ranking: correlation
of ROUGE-L and of the fused order, and the share of the kept rows (the easiest 75 %) that are the same. ``paper`` may
run on fewer of the rows, evenly spaced: its batches are of one size and shape, so its rows per second do not depend
on how many there are, as ours do. Times are noisy: quote the ratio of one run, with the machine it was made on, and
let nothing else run beside it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from record import record, told
from rouge_score.rouge_scorer import RougeScorer
from torch import nn

from srd_lightning import ALPACA, Decoding, Pretrained
from srd_lightning.criteria import NegativeLogLikelihood, RougeL
from srd_lightning.criteria.base import Reflected, score_batch
from srd_lightning.curation.curator import rank
from srd_lightning.curation.reflection import fixed_batches
from srd_lightning.curriculum.ranking import average_ranks
from srd_lightning.data.row_reader import load_rows
from srd_lightning.data.tokenization import tokenize
from srd_lightning.models.generation import PAPER_DECODING

CRITERIA = [RougeL(), NegativeLogLikelihood()]
PROMPT, TOTAL, BATCH = 256, 512, 16
Scores = dict[str, tuple[float, float]]


@torch.no_grad()
def as_in_the_paper(model: Any, tokenizer: Any, rows: Any, device: str) -> Scores:
    scorer, pad, found = RougeScorer(["rougeL"], use_stemmer=True), tokenizer.eos_token_id, {}
    for first in range(0, len(rows), BATCH):
        batch = rows.select(range(first, min(first + BATCH, len(rows)))).to_list()
        prompts = [row["input_ids"][: row["prompt_length"]] for row in batch]
        responses = [row["input_ids"][row["prompt_length"] :] for row in batch]
        left = torch.tensor([[pad] * (PROMPT - len(prompt)) + prompt for prompt in prompts], device=device)
        mask = torch.tensor([[0] * (PROMPT - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
        output = model.generate(
            input_ids=left,
            attention_mask=mask,
            do_sample=True,
            temperature=0.01,
            top_p=1.0,
            top_k=0,
            no_repeat_ngram_size=6,
            max_new_tokens=TOTAL - PROMPT,
            pad_token_id=pad,
        )
        room = TOTAL - PROMPT
        right = torch.tensor([response + [pad] * (room - len(response)) for response in responses], device=device)
        real = torch.tensor(
            [[1] * len(response) + [0] * (room - len(response)) for response in responses], device=device
        )
        labels = torch.cat([torch.full_like(left, -100), torch.where(real == 1, right, -100)], dim=1)
        positions = (torch.cat([mask, real], dim=1).cumsum(1) - 1).clamp(min=0)
        logits = model(
            input_ids=torch.cat([left, right], dim=1),
            attention_mask=torch.cat([mask, real], dim=1),
            position_ids=positions,
        ).logits
        scored = labels[:, 1:] != -100
        token_losses = nn.functional.cross_entropy(
            logits[:, :-1][scored].float(), labels[:, 1:][scored], reduction="none"
        )
        sums = torch.zeros(len(labels), device=device).index_add_(0, scored.nonzero()[:, 0], token_losses)
        answers = tokenizer.batch_decode(output[:, PROMPT:], skip_special_tokens=True)
        for row, answer, loss in zip(batch, answers, (sums / scored.sum(1)).tolist(), strict=True):
            found[row["id"]] = scorer.score(row["response"], answer.strip())["rougeL"].fmeasure, loss
    return found


def by_the_library(model: nn.Module, tokenizer: Any, rows: Any, decoding: Decoding, tokens: int) -> Scores:
    found = {}
    for batch in fixed_batches(rows, tokens, decoding):
        for score in score_batch(Reflected(model, tokenizer, rows.select(batch).to_list(), decoding), CRITERIA):
            found[score["id"]] = score["rouge_l"], score["nll"]
    return found


def measure(arm: Callable[[], Scores]) -> tuple[float, Scores]:
    """Return the seconds that an arm takes, and its scores."""
    start = time.perf_counter()
    found = arm()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, found


def compare(arms: dict[str, tuple[float, Scores]]) -> dict[str, dict[str, float]]:
    """Compare speed and losses with the first arm, ranking with ``ours``, each on the rows that both have."""
    (paper_seconds, paper), (_, ours) = arms["paper"], arms["ours"]
    result = {}
    for name, (seconds, found) in arms.items():
        shared = sorted(paper.keys() & found.keys())
        differences = [abs(found[row][1] - paper[row][1]) for row in shared]
        rows_per_second, rate_of_paper = len(found) / seconds, len(paper) / paper_seconds
        result[name] = {
            "rows": len(found),
            "seconds": seconds,
            "rows_per_second": rows_per_second,
            "ratio": rows_per_second / rate_of_paper,
            "largest_nll_difference": max(differences),
            **compare_ranking(found, ours, sorted(found.keys() & ours.keys())),
        }
    return result


def compare_ranking(found: Scores, ours: Scores, ids: Sequence[str]) -> dict[str, float]:
    (rouge_l, order), (our_rouge_l, our_order) = (rank_by(scores, ids) for scores in (found, ours))
    kept = round(0.75 * len(ids))
    return {
        "rouge_l_correlation": float(np.corrcoef(average_ranks(rouge_l), average_ranks(our_rouge_l))[0, 1]),
        "order_correlation": float(np.corrcoef(np.argsort(order), np.argsort(our_order))[0, 1]),
        "same_rows_kept": len({*order[:kept]} & {*our_order[:kept]}) / kept,
    }


def rank_by(scores: Scores, ids: Sequence[str]) -> tuple[Any, Any]:
    rouge_l, nll = np.array([scores[row] for row in ids]).T
    return rouge_l, rank({"rouge_l": rouge_l, "nll": nll}, CRITERIA, pa.array(ids), "average").numpy()


def main() -> None:
    """Run the arms, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub id of the student")
    parser.add_argument("--keep-layers", type=int, nargs="+", help="layers of it to keep")
    parser.add_argument("--data", required=True, nargs="+", help="files of rows")
    parser.add_argument("--rows", type=int, default=256, help="rows to score, evenly spaced")
    parser.add_argument("--paper-rows", type=int, default=48, help="rows of these that the first arm scores")
    parser.add_argument("--tokens", type=int, default=32768, help="our tokens per batch")
    parser.add_argument("--ratio", type=float, default=1.5, help="bound of the last arm")
    parser.add_argument("--json", type=Path, help="file to write")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = Pretrained(options.model, keep_layers=options.keep_layers)
    tokenizer, model = source.tokenizer(), source.model().to(device)
    rows, _ = tokenize(load_rows(options.data), tokenizer, ALPACA, TOTAL, PROMPT)
    rows = rows.filter(lambda row: row["length"] - row["prompt_length"] <= TOTAL - PROMPT)  # the paper cuts these
    rows = rows.select(np.linspace(0, len(rows) - 1, options.rows).astype(int))
    some = rows.select(np.linspace(0, len(rows) - 1, options.paper_rows).astype(int))

    def ours(decoding: Decoding) -> Callable[[], Scores]:
        return lambda: by_the_library(model, tokenizer, rows, decoding, options.tokens)

    by_the_library(model, tokenizer, rows.select(range(2)), Decoding(max_new_tokens=4), options.tokens)  # warm up
    ways = {
        "paper": lambda: as_in_the_paper(model, tokenizer, some, device),
        "paper's decoding": ours(PAPER_DECODING),
        "ours": ours(Decoding()),
        "bf16": ours(Decoding(bf16=True)),
        "bounded": ours(Decoding(bf16=True, max_length_ratio=options.ratio)),
    }
    arms = {}
    for name, way in ways.items():
        seconds, found = arms[name] = measure(way)
        says = f"{len(found) / seconds:.4g} rows/s"
        print(told(name, says, rows=len(found), seconds=seconds), flush=True)
    settings = {name: str(value) for name, value in vars(options).items()}
    print(record({"arms": compare(arms), "options": settings, "threads": torch.get_num_threads()}, options.json))


if __name__ == "__main__":
    main()
