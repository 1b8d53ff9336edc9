"""Two ranks that share sharded models, each with work of its own: ``together.py FOLDER``.

Each rank writes what it saw of each case (``rank0.json``, …), beside what a whole model gives.
"""

import copy
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import drive
import torch
import torch.distributed as dist
from lightning import seed_everything
from peft import LoraConfig, get_peft_model
from tiny import lively_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import ByT5Tokenizer

from srd_lightning import FSDP2
from srd_lightning.digests import weights_digest
from srd_lightning.distributed.fsdp2 import gathered_digest, shard, whole_tensors, with_weights, without_weights
from srd_lightning.distributed.process_group import Ranks
from srd_lightning.models.calling import logits_of
from srd_lightning.models.generation import Decoding, generate
from srd_lightning.models.lockstep import lockstep
from srd_lightning.training.student import StudentHandle

PROMPTS = [[70, 71, 72], [80, 81, 82, 83, 84], [90, 91], [100, 101, 102, 103]]
OF_RANK = [PROMPTS, []]
"""The second rank has nothing to ask."""
TOKENIZER = ByT5Tokenizer()
GREEDY, SAMPLED = Decoding(max_new_tokens=20), Decoding(max_new_tokens=20, temperature=1.0)


def adapted():
    torch.manual_seed(3)
    return get_peft_model(lively_model(), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))


def answers(model, rank, limits=None):
    mine = OF_RANK[rank]
    return [
        generate(model, TOKENIZER, mine, GREEDY, limits=limits and limits[: len(mine)]),
        generate(model, TOKENIZER, mine[: 3 - 2 * rank], SAMPLED, seed=rank),
        generate(model, TOKENIZER, OF_RANK[1 - rank], GREEDY),
    ]


def is_spread(model):
    return all(isinstance(weight, DTensor) for weight in model.parameters())


def generation(make, mesh, rank):
    """What a sharded model answers and how it is left, beside what a whole one answers."""
    whole = make().train()
    sharded = copy.deepcopy(whole)
    shard(sharded, mesh)
    before = torch.get_rng_state()
    found = answers(sharded, rank, limits=[3, 20, 9, 17])
    left = [sharded.training, torch.equal(torch.get_rng_state(), before), is_spread(sharded)]
    return {"found": found, "expected": answers(whole, rank, limits=[3, 20, 9, 17]), "left": left}


def batch(rows, rank):
    torch.manual_seed(rank)
    ids = torch.randint(2, 384, (rows, 7))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def scoring(mesh, rank):
    """Other forward passes, and generation among them, three of one rank against seven of the other."""
    whole = lively_model()
    sharded = copy.deepcopy(whole)
    shard(sharded, mesh)
    with torch.no_grad(), lockstep(sharded):
        found = [logits_of(sharded, batch(rows + 1, rank)) for rows in range(3 + 4 * rank)]
        answered = generate(sharded, TOKENIZER, PROMPTS[: 1 + rank], GREEDY)
    with torch.no_grad():
        expected = [logits_of(whole, batch(rows + 1, rank)) for rows in range(3 + 4 * rank)]
    return {
        "equal": [torch.equal(*pair) for pair in zip(found, expected, strict=True)],
        "answered": answered == generate(whole, TOKENIZER, PROMPTS[: 1 + rank], GREEDY),
    }


def answering(mesh, rank):
    """Batches to answer from a loader that gives one rank three of them, and the other one."""
    whole = lively_model(attention_dropout=0.5).train()
    sharded, handle, before = copy.deepcopy(whole), StudentHandle(None, False), torch.get_rng_state()
    shard(sharded, mesh)
    strategy = FSDP2()
    strategy._device_mesh = {"data_parallel": mesh}
    module = SimpleNamespace(trainer=SimpleNamespace(strategy=strategy, world_size=2))
    handle.begin_answering(sharded, module)
    found = []
    for _ in range(3 - 2 * rank):
        handle.begin_batch()
        found.append(generate(sharded, TOKENIZER, PROMPTS, GREEDY))
    handle.end_predicting()
    left = [sharded.training, torch.equal(torch.get_rng_state(), before), is_spread(sharded)]
    expected = generate(whole, TOKENIZER, PROMPTS, GREEDY)
    return {"equal": [answers == expected for answers in found], "left": left}


def training(mesh, rank):
    """A step after the model has answered, against one without."""
    weights = []
    for asked in (False, True):
        model = lively_model()
        shard(model, mesh)
        if asked:
            answers(model, rank)
        logits_of(model, batch(2, rank)).logsumexp(-1).mean().backward()
        torch.optim.SGD(model.parameters(), lr=1.0).step()
        weights.append(dict(whole_tensors(model)))
    return {"equal": all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])}


def failing(mesh, rank):
    """A rank that fails between two passes."""
    model = lively_model()
    shard(model, mesh)
    try:
        with torch.no_grad(), lockstep(model):
            for rows in range(5):
                logits_of(model, batch(rows + 1, rank))
                if rank == 1 and rows == 2:
                    raise OSError("no space left on the disk")
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def rounded(mesh, rank):
    """Weights that are gathered in bfloat16, and answers under `Decoding.bf16`."""
    model = lively_model()
    digest = weights_digest(model)
    shard(model, mesh)
    found = {"same": [gathered_digest(model) == digest, weights_digest(model) == digest]}
    found["answers"] = generate(model, TOKENIZER, OF_RANK[rank], Decoding(max_new_tokens=4, bf16=True))
    half = lively_model()
    shard(half, mesh, torch.bfloat16)
    found["half"] = [weights_digest(half) == digest, gathered_digest(half) == f"{digest} as torch.bfloat16"]
    return found


def copying(mesh, rank):
    """A copy of a student with tied weights and adapters, made on the first rank, a tensor at a time."""
    torch.manual_seed(0)
    model = get_peft_model(lively_model(tie_word_embeddings=True), LoraConfig(r=4, target_modules=["q_proj"]))
    expected, skeleton = copy.deepcopy(model), without_weights(model)
    shard(model, mesh)
    if rank:
        return {"names": [name for name, _ in whole_tensors(model)]}
    found = with_weights(skeleton, whole_tensors(model), torch.device("cpu"))
    own, known = found.state_dict(), expected.state_dict()
    tied = found.get_output_embeddings().weight is found.get_input_embeddings().weight
    return {"names": list(own), "equal": all(torch.equal(own[name], known[name]) for name in known), "tied": tied}


def waiting(mesh, rank):
    """Shares of unlike length, without a model."""
    done = []
    with Ranks().work_then_wait() as check:
        for _ in range(3 * rank):
            check()
            done.append(rank)
    return {"done": len(done)}


def main(folder):
    dist.init_process_group("gloo")
    rank, mesh = dist.get_rank(), init_device_mesh("cpu", (2,))
    seed_everything(0, verbose=False)
    found = {
        "plain": generation(lambda: lively_model(attention_dropout=0.5), mesh, rank),
        "tied": generation(lambda: lively_model(tie_word_embeddings=True), mesh, rank),
        "lora": generation(adapted, mesh, rank),
        **{
            case.__name__: case(mesh, rank)
            for case in (scoring, answering, training, rounded, copying, waiting, failing)
        },
    }
    Path(folder, f"rank{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
    drive.end_together()
