"""What of a module's settings, models and trainer does not go together, said before anything is read or loaded."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from transformers import PreTrainedTokenizerBase

from srd_lightning.data.families import DECODER
from srd_lightning.distributed.placement import check_placement, shards_student
from srd_lightning.errors import ModelError, SettingError
from srd_lightning.losses.auxiliary import LAST, check_auxiliary
from srd_lightning.losses.base import DistillationLoss, needs_all_logits
from srd_lightning.losses.by_token import has_token_temperatures
from srd_lightning.losses.checks import check_loss
from srd_lightning.losses.top_k import POWERS
from srd_lightning.models.family import family_of
from srd_lightning.models.pretrained import Pretrained
from srd_lightning.models.quantised import check_trainable
from srd_lightning.models.soundness import check_module
from srd_lightning.models.vocabulary import check_same_tokenizer
from srd_lightning.preflight import callbacks_of
from srd_lightning.teacher.precompute import depth_of, width_of


def check_run(module: Any, trainer: Trainer) -> None:
    """Check all that can be known of a run of a `KDLightningModule` before anything is read or loaded.

    Raises:
        SRDError: Of the first check that fails.
    """
    check_not_compiled(module)
    schedules = [getattr(callback, "schedules", {}) for callback in callbacks_of(trainer)]
    trains = trainer.state.fn == "fit"
    teacher, step = module.teacher_handle, module.step
    if module.student is not None and trains:
        check_student(module.student, module.student_handle.activation_checkpointing, trainer)
    if module.student is not None and teacher.model is not None:
        module.shared_vocabulary(teacher.model)
    if teacher.given is not None:
        check_placement(trainer, teacher.placement)
    if teacher.given is not None and (teacher.cache is None or not trains):
        check_parts(trainer, step.micro_batch_tokens, module.loss, teacher.placement)
    else:
        check_parts(trainer, step.micro_batch_tokens, module.loss, "replicate")
    if trains and len(module.auxiliary):
        check_hidden_states(trainer, module)
    if trains:
        if type(module.loss).forward is DistillationLoss.forward:
            check_loss(module.loss)
        if teacher.cache is not None and teacher.cache.kind == "topk":
            check_likeliest(schedules, module.loss, step.chunk)
        check_precision(trainer, module.optimizer)
        if step.compile:
            check_compiler(trainer)


def check_models(models: Mapping[str, Any], tokenizer: Any) -> None:
    """See whether student and teacher can be used, as far as that is known before they are loaded.

    Args:
        models: By name: a model, a `Pretrained`, or nothing.
        tokenizer: Of the rows, if it is known.

    Raises:
        SRDError: They cannot, with the reason.
    """
    for name, model in models.items():
        if isinstance(model, Pretrained):
            model.check(tokenizer)
        elif model is not None:
            check_module(model, f"the {name}", tokenizer)


def check_same_family(student: Pretrained, teacher: Pretrained, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that two models that are loaded by name have one tokenizer, and say where they are one model.

    Args:
        student: To be loaded.
        teacher: To be loaded.
        tokenizer: Of the student.

    Raises:
        ModelError: They have not.
    """
    check_same_tokenizer(tokenizer, teacher.tokenizer())
    if student == teacher:
        rank_zero_warn(
            f"student and teacher are the same model {student.name}: the distillation loss begins at 0, and only holds "
            "the student where it is"
        )


def check_families(models: Mapping[str, Any], step: Any, rollouts: object = None) -> None:
    """Check that student and teacher are of one family, and that a step can do with it what it is asked to.

    Args:
        models: ``student`` and ``teacher``: a model, a `Pretrained`, or nothing.
        step: The `DistillationStep`.
        rollouts: What trains with the student's own text, if anything does.

    Raises:
        ModelError: One is a decoder and the other an encoder-decoder, or their decoders begin with different tokens.
        SettingError: A setting is for decoders only.
    """
    families = {
        name: family_of(model.config() if isinstance(model, Pretrained) else getattr(model, "config", None))
        for name, model in models.items()
        if model is not None
    }
    student, teacher = families["student"], families.get("teacher", families["student"])
    if student != teacher:
        raise ModelError(
            f"the student is {student} and the teacher {teacher}, so no batch is made for both; choose two decoders, "
            "or two encoder-decoders whose decoders begin with the same token"
        )
    if student == DECODER:
        return
    settings = {"packing": step.packing, "compile": step.compile, "micro_batch_tokens": step.micro_batch_tokens}
    settings["rollouts"] = rollouts is not None
    if asked := [name for name, value in settings.items() if value]:
        raise SettingError(
            f"{asked[0]} is for decoders, but the student is an encoder-decoder; leave it out, and for less memory "
            "take a smaller batch_size and accumulate_grad_batches of the trainer"
        )


def check_hidden_states(trainer: Trainer, module: Any) -> None:
    """Check that auxiliary losses get the hidden states that they ask for, as far as that is known.

    Args:
        trainer: Of a training.
        module: With auxiliary losses.

    Raises:
        SettingError: A strategy, the cache, the loss or ``chunk`` keeps them away, or there is no such layer or width.
    """
    cache, needed = module.teacher_handle.cache, "auxiliary losses need hidden states"
    if isinstance(trainer.strategy, FSDPStrategy):
        raise SettingError(f"{needed} and parameters that FSDP1 does not shard by themselves; use FSDP2 or ddp")
    if module.step.chunk is None:
        raise SettingError(f"{needed}, which are not looked at where chunk is null; set it to auto")
    if needs_all_logits(module.loss):
        raise SettingError(
            f"{needed}, but the loss {type(module.loss).__name__} takes all logits instead; choose one that defines "
            "divergence only"
        )
    if cache is not None and cache.kind == "topk":
        raise SettingError(f"{needed}, which teacher_cache topk does not keep; use teacher_cache hidden")
    models = module.models_by_name()
    for loss in module.auxiliary:
        for name, layers in (("student", loss.student_layers), ("teacher", loss.teacher_layers)):
            depth = depth_of(models[name])
            if depth is not None and max(layers) > depth:
                raise SettingError(f"{name}_layers {list(layers)} go beyond the {depth} blocks of the {name}")
        if cache is not None and set(loss.teacher_layers) != {LAST}:
            raise SettingError(
                f"teacher_layers {list(loss.teacher_layers)} are not in a cache, which keeps the final states; set "
                "them to [-1], or teacher_cache to none"
            )
        student, teacher = width_of(models["student"]), width_of(models["teacher"])
        if student is not None and teacher is not None:
            check_auxiliary(loss, student, teacher)


def check_student(student: nn.Module, activation_checkpointing: bool, trainer: Trainer) -> None:
    """Check that something is to be trained, and say what is not trained of a mixture of experts that asks for it.

    Raises:
        ModelError: All weights are frozen, or quantised without adapters, or activations cannot be made again.
        SettingError: The device cannot train quantised weights.
    """
    check_trainable(student, trainer.strategy.root_device.type == "cpu")
    if not any(weight.requires_grad for weight in student.parameters()):
        raise ModelError(
            f"nothing of the student {type(student).__name__} can be trained: none of its weights requires a gradient; "
            "call student.requires_grad_(True), or unfreeze those that shall be trained"
        )

    if activation_checkpointing and not getattr(student, "supports_gradient_checkpointing", False):
        raise ModelError(
            f"activation_checkpointing needs a model of transformers that supports it, which {type(student).__name__} "
            "does not; set it to false"
        )
    config: Any = getattr(student, "config", None)
    if getattr(config, "output_router_logits", False) and getattr(config, "router_aux_loss_coef", 0):
        rank_zero_warn(
            f"the student {type(student).__name__} is configured to add its router's auxiliary loss (router_aux_loss_"
            f"coef {config.router_aux_loss_coef}), but the objective is CE and distillation loss only: experts are not "
            "kept in balance; set output_router_logits to false in its configuration to agree"
        )


def check_likeliest(
    schedules: Iterable[Mapping[str, Mapping[int, float]]], loss: DistillationLoss, chunk: int | str | None
) -> None:
    """Check what ``teacher_cache: topk`` cannot do.

    Args:
        schedules: Of attributes of the module, ``{name: {first epoch: value}}``.
        loss: The distillation loss.
        chunk: Of the module.

    Raises:
        SettingError: All logits are needed, or a temperature that was not kept, or one for each token.
    """
    if chunk is None or needs_all_logits(loss):
        why = "chunk null" if chunk is None else f"the loss {type(loss).__name__}"
        raise SettingError(f"teacher_cache topk keeps no logits, but {why} needs all of them; use teacher_cache hidden")
    if has_token_temperatures(loss):
        raise SettingError(
            "teacher_cache topk knows one temperature for all tokens, but TokenTemperature gives each its own; use "
            "teacher_cache hidden"
        )
    later = [schedule["loss.temperature"].values() for schedule in schedules if "loss.temperature" in schedule]
    least, most = 1 / POWERS[0], 1 / POWERS[-1]
    if wrong := [value for value in (loss.temperature, *itertools.chain(*later)) if not least <= value <= most]:
        raise SettingError(
            f"teacher_cache topk knows temperatures from {least:g} to {most:g}, but the loss comes to "
            f"{wrong[0]:g}; use such temperatures, or teacher_cache hidden"
        )


def check_parts(
    trainer: Trainer, micro_batch_tokens: int | None, loss: DistillationLoss, teacher_placement: str
) -> None:
    """Check that batches can be taken in parts, of which ranks may have unlike numbers.

    Args:
        trainer: Of the run.
        micro_batch_tokens: Of the module.
        loss: The distillation loss.
        teacher_placement: Of a teacher that runs within the steps.

    Raises:
        SettingError: A model that is gathered at every use would make ranks wait for each other for ever, or gradients
            would be made without the scale of 16-mixed.
    """
    if micro_batch_tokens is None:
        return
    other = "take a smaller batch_size, and accumulate_grad_batches of the trainer"
    if type(loss).forward is not DistillationLoss.forward:
        raise SettingError(
            f"micro_batch_tokens takes batches in parts, but {type(loss).__name__}.forward is made for whole ones; "
            f"leave it out, and {other}, or define divergence instead of forward"
        )
    if shards_student(trainer):
        raise SettingError(
            "micro_batch_tokens needs a student whose weights are whole, but the strategy "
            f"{type(trainer.strategy).__name__} shards them; leave it out, and {other}"
        )
    if teacher_placement != "replicate" and trainer.world_size > 1:
        raise SettingError(
            f"micro_batch_tokens and teacher_placement {teacher_placement} do not go together on several ranks: each "
            "would gather the teacher as often as it has parts of its own batch, and wait for ever; leave one of the "
            "two out, or use teacher_cache hidden"
        )
    if scales_gradients(trainer):
        raise SettingError(
            "micro_batch_tokens does not go with precision 16-mixed: parts would make gradients without its "
            f"scale, and these vanish in fp16; use precision bf16-mixed, or leave micro_batch_tokens out and {other}"
        )


def check_precision(trainer: Trainer, make_optimizer: Callable[[Any], Any]) -> None:
    """Check what half precision cannot do, and that the optimizer can be made.

    Args:
        trainer: Of a training.
        make_optimizer: Makes the optimizer from parameters.

    Raises:
        SettingError: Weights in fp16, clipping by a scaler that cannot, or an optimizer with settings out of range.
    """
    if trainer.precision == "16-true":
        raise SettingError(
            "precision 16-true keeps the weights in fp16, in which small updates and gradients vanish; use bf16-mixed "
            "or 16-mixed, whose weights are fp32, or bf16-true"
        )
    optimizer = _tried(make_optimizer)
    unscales_itself = getattr(optimizer, "_step_supports_amp_scaling", False)
    if trainer.gradient_clip_val and scales_gradients(trainer) and unscales_itself:
        raise SettingError(
            f"gradient_clip_val {trainer.gradient_clip_val} and precision 16-mixed need an optimizer that leaves "
            f"gradients to be unscaled first, which a fused {type(optimizer).__name__} does not; set fused to "
            "false for the optimizer, or use precision bf16-mixed"
        )


def check_not_compiled(module: Any) -> None:
    """Check that ``torch.compile`` was not given the module itself.

    Raises:
        SettingError: It was.
    """
    if module._compiler_ctx is not None:
        raise SettingError(
            f"torch.compile({type(module).__name__}) would compile what is counted and logged around the models too, "
            "which takes minutes or fails: give the module as it is, and compile=True to its class, or compile the "
            "student alone, student.compile()"
        )


def check_compiler(trainer: Trainer) -> None:
    """Check that there is what compiles for a CPU.

    Raises:
        SettingError: There is none.
    """
    compiler = os.environ.get("CXX", "g++")
    if trainer.strategy.root_device.type == "cpu" and shutil.which(compiler) is None:
        raise SettingError(
            f"compile needs the compiler {compiler} on a CPU, which is not there; install it, or set compile to false"
        )


def scales_gradients(trainer: Trainer) -> bool:
    """Return whether the loss is multiplied by a scale before the backward pass, as fp16 needs it."""
    return getattr(trainer.precision_plugin, "scaler", None) is not None


def _tried(make_optimizer: Callable[[Any], Any]) -> Any:
    """Return an optimizer of weights of no meaning, or nothing where it is one for certain weights only.

    Raises:
        SettingError: One of its settings is out of range.
    """
    try:
        return make_optimizer([nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2))])
    except ValueError as error:
        if str(error).startswith("Invalid"):  # so all of torch.optim begin
            raise SettingError(f"the optimizer cannot be made: {error}; correct this setting of it") from error
    except Exception:  # it may need the real weights, which come later
        pass
    return None
