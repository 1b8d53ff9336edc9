"""Sharded models in one process: what is whole when. That two ranks train as one does, test_strategies.py shows."""

import copy
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.precision import FSDPPrecision
from lightning.pytorch.strategies import FSDPStrategy
from tiny import tiny_model, tokenised
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecision, fully_shard
from torch.distributed.tensor import DTensor
from transformers import ByT5Tokenizer, GPT2Config, GPT2LMHeadModel

from srd_lightning import FSDP2, CacheSettings, ForwardKL, KDLightningModule, Pretrained
from srd_lightning.curation.student_source import ReflectingStudent
from srd_lightning.data.batches import collate
from srd_lightning.distributed.fsdp2 import blocks, inside, is_sharded, release, shard, with_weights, without_weights
from srd_lightning.distributed.placement import shard_along, shard_student
from srd_lightning.errors import ModelError, SettingError
from srd_lightning.teacher.handle import TeacherHandle
from srd_lightning.training.step import DistillationStep
from srd_lightning.training.student import StudentHandle


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def batch():
    rows = [{"instruction": "Say a.", "output": "abcd"}, {"instruction": "Say more.", "output": "ab"}]
    return collate(list(tokenised(ByT5Tokenizer(), rows)), pad_token_id=0)


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=384, n_positions=64, n_embd=32, n_layer=3, n_head=2))


def test_blocks_are_the_layers_whatever_their_name():
    llama = tiny_model()
    assert blocks(llama) == list(llama.model.layers)
    assert blocks(model := gpt2()) == list(model.transformer.h)
    experts = nn.ModuleList([nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(1, 1)])})])
    assert blocks(nn.Sequential(experts)) == list(experts)


@pytest.mark.parametrize("make", [lambda: tiny_model(tie_word_embeddings=True), tiny_model, gpt2])
def test_a_sharded_model_is_whole_only_inside(make, mesh):
    model = make().eval()
    expected = model(input_ids=batch()["input_ids"]).logits
    shard(model, mesh)
    seen = inside(model, lambda: type(model.get_output_embeddings().weight))
    assert seen is nn.Parameter
    release(model)
    assert all(isinstance(weight, DTensor) for weight in model.parameters())
    torch.testing.assert_close(model(input_ids=batch()["input_ids"]).logits, expected)


def test_a_step_leaves_nothing_of_a_sharded_teacher_whole(mesh):
    student, teacher = tiny_model(0), tiny_model(1).requires_grad_(False).eval()
    whole = DistillationStep().attach(copy.deepcopy(student), copy.deepcopy(teacher))
    whole = whole.objective(batch(), ForwardKL(), 0.5)
    shard(student, mesh)
    shard(teacher, mesh)
    for chunk in (256, None):
        step = DistillationStep(chunk).attach(student, teacher)
        found = step.objective(batch(), ForwardKL(), 0.5)
        assert (step.parts is None) == (chunk is None)
        torch.testing.assert_close(found.loss, whole.loss)
        assert all(isinstance(weight, DTensor) for weight in teacher.parameters())


def test_weights_tied_over_two_blocks_cannot_be_sharded(mesh):
    model = nn.Sequential(nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]), nn.Linear(2, 2))
    model[1].weight = model[0][1].weight
    with pytest.raises(ModelError, match=r"cannot be sharded: 1\.weight|unties weights of"):
        shard(model, mesh)


def test_a_copy_has_the_weights_and_their_ties_but_shares_none():
    model = tiny_model(tie_word_embeddings=True)
    skeleton = without_weights(model)
    assert {weight.device.type for weight in skeleton.parameters()} == {"meta"}
    found = with_weights(skeleton, model.state_dict().items(), torch.device("cpu"))
    assert found.lm_head.weight is found.model.embed_tokens.weight
    assert found.lm_head.weight is not model.lm_head.weight
    inputs = {"input_ids": batch()["input_ids"]}
    assert torch.equal(found(**inputs).logits, model(**inputs).logits)


def test_activations_are_made_again_where_that_is_asked_for():
    module = KDLightningModule(tiny_model(), kd_weight=0.0, activation_checkpointing=True)
    module.configure_model()
    calls = []
    module.student.model.layers[0].input_layernorm.register_forward_hook(lambda *_: calls.append(1))
    module.training_step(batch(), 0)  # looks at the model first, and then takes its parts
    before = len(calls)
    module.training_step(batch(), 0).backward()
    assert len(calls) == before + 2


def test_a_named_model_is_loaded_into_the_memory_of_the_host(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    with torch.device("meta"):
        model = Pretrained(str(tmp_path)).model()
    assert {weight.device.type for weight in model.parameters()} == {"cpu"}


@pytest.mark.parametrize("given", [None, MixedPrecision(param_dtype=torch.float16)])
def test_fsdp1_learns_of_blocks_and_sums_in_full_precision(given, mesh):
    class OnCPU(FSDPStrategy):
        root_device = torch.device("cpu")

    strategy = OnCPU(mixed_precision=given, precision_plugin=FSDPPrecision("bf16-mixed"))
    student = tiny_model()
    shard_student(student, SimpleNamespace(strategy=strategy))
    policy = strategy.kwargs["auto_wrap_policy"]
    assert policy(student.model.layers[0], recurse=False, nonwrapped_numel=1)
    assert not policy(student.model.embed_tokens, recurse=False, nonwrapped_numel=1)
    if given is None:
        used = strategy.mixed_precision_config
        assert (used.param_dtype, used.reduce_dtype, used.buffer_dtype) == (torch.bfloat16, torch.float32, None)
    else:
        assert strategy.mixed_precision_config is given


@pytest.mark.parametrize(("of_rows", "of_layers"), [(0, "auto"), (3, 1), ("all", 1), ("auto", 2), (4, 2)])
def test_all_processes_see_different_rows(of_rows, of_layers):
    strategy = FSDP2(of_rows, of_layers)
    strategy.parallel_devices = [torch.device("cpu")] * 8
    said = f"here 8, .* data_parallel_size is {of_rows} and tensor_parallel_size {of_layers}; leave them out, or use"
    with pytest.raises(SettingError, match=said):
        strategy.setup_environment()


def test_a_student_that_others_have_sharded_does_not_reflect(mesh):
    module = KDLightningModule(tiny_model(), kd_weight=0.0)
    fully_shard(module.student, mesh=mesh)
    with pytest.raises(ValueError, match=r"reflects needs all of its weights, but .*: make a new module"):
        ReflectingStudent(None, module, None, None).untrained()
    with pytest.raises(ValueError, match=r"give SimpleNamespace a method whole_student\(\)"):
        ReflectingStudent(None, SimpleNamespace(student=module.student), None, None).as_trained()


def test_a_student_that_is_frozen_after_it_was_sharded(mesh):
    handle, student = StudentHandle(None, False), tiny_model()
    trainer = FSDP2Trainer(mesh)
    handle.spread(student, trainer)
    handle.prepare(student, SimpleNamespace(_trainer=trainer))
    next(student.parameters()).requires_grad_(False)
    with pytest.raises(ModelError, match=r"frozen or unfrozen after it was sharded, .* before fit"):
        handle.prepare(student, SimpleNamespace(_trainer=trainer))


class FSDP2Trainer(SimpleNamespace):
    """As much of a trainer as is asked of one where something is sharded."""

    def __init__(self, mesh):
        strategy = FSDP2()
        strategy.parallel_devices = [torch.device("cpu")]
        strategy._device_mesh = {"data_parallel": mesh}
        plugin = SimpleNamespace(forward_context=nullcontext)
        super().__init__(strategy=strategy, world_size=mesh.size(), precision_plugin=plugin)


@pytest.mark.parametrize("own", [False, True])
def test_a_student_reflects_sharded_unless_the_module_prepares_it_itself(own, mesh):
    class Own(KDLightningModule):
        def configure_model(self): ...

    trainer = FSDP2Trainer(mesh)
    module = (Own if own else KDLightningModule)(tiny_model(), kd_weight=0.0)
    assert is_sharded(ReflectingStudent(None, module, None, None, trainer=trainer).untrained()) == (not own)
    given = ReflectingStudent(tiny_model(), None, None, None, trainer=trainer)
    assert not is_sharded(given.untrained())
    shard(given.given, mesh)
    assert given.as_trained() is given.given


def test_what_is_no_part_of_the_student_is_sharded_along(mesh):
    loss = nn.Linear(2, 2)
    shard_along(loss, FSDP2Trainer(mesh))
    assert is_sharded(loss)


def test_a_teacher_that_is_sharded_has_the_digest_of_a_whole_one(mesh):
    handle = TeacherHandle(tiny_model(), CacheSettings("hidden"), "shard")
    whole = handle._made_of_for_first()()
    shard(handle.model, mesh)
    assert handle._made_of_for_first()() == whole
