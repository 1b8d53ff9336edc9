"""What of a module's settings, models and trainer does not go together, said before anything is read or loaded."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, get_args

import torch
from lightning import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from transformers import PreTrainedTokenizerBase

from srd_lightning.errors import ModelError, SettingError
from srd_lightning.loss_checks import check_loss
from srd_lightning.losses import DistillationLoss, needs_all_logits
from srd_lightning.models import Pretrained
from srd_lightning.objective import POWERS
from srd_lightning.placement import check_placement, shards_student


def check_run(module: Any, trainer: Trainer) -> None:
    """Check all that can be known of a run of a `KDLightningModule` before anything is read or loaded.

    Raises:
        SRDError: Of the first check that fails.
    """
    schedules = [getattr(callback, "schedules", {}) for callback in trainer.callbacks]  # type: ignore[attr-defined]
    trains = trainer.state.fn == "fit"
    live = module.teacher is not None or module._teacher_source is not None
    if module.student is not None and trains:
        check_student(module.student)
    if live and (module.teacher_cache == "none" or not trains):
        check_placement(trainer, module.teacher_placement)
        check_parts(trainer, module.micro_batch_tokens, module.teacher_placement)
    else:
        check_parts(trainer, module.micro_batch_tokens, "replicate")
    if trains:
        if type(module.loss).forward is DistillationLoss.forward:
            check_loss(module.loss)
        if module.teacher_cache == "topk":
            check_likeliest(schedules, module.loss, module.chunk)
        check_precision(trainer, module.optimizer)


def check_choice(name: str, value: object, choices: Any) -> None:
    """Check an argument that is one of several words.

    Args:
        name: Of the argument.
        value: What was given.
        choices: A `typing.Literal`.

    Raises:
        SettingError: It is none of them; lists them.
    """
    words = get_args(choices)
    if value not in words:
        raise SettingError(f"{name} must be {', '.join(words[:-1])} or {words[-1]}, but is {value!r}")


def check_sizes(**sizes: Any) -> None:
    """Check arguments that are whole numbers of at least 1, or ``None``.

    Raises:
        SettingError: One is not; names all that are wrong.
    """
    whole = {name: isinstance(size, int) and not isinstance(size, bool) for name, size in sizes.items()}
    if wrong := [f"{name}={size!r}" for name, size in sizes.items() if size is not None and not whole[name]]:
        raise SettingError(f"sizes must be whole numbers, but {', '.join(wrong)}")
    if wrong := [f"{name}={size}" for name, size in sizes.items() if size is not None and size < 1]:
        raise SettingError(f"sizes must be at least 1, but {', '.join(wrong)}")


def check_models(student: object, teacher: object) -> None:
    """Check that student and teacher are models, and two: the teacher is frozen, and with it all that it shares.

    Raises:
        SettingError: One is something else, such as a name.
        ModelError: They share weights, or are one.
    """
    for name, model in (("student", student), ("teacher", teacher)):
        if isinstance(model, str):
            raise SettingError(f'{name} must be a model, but is the text {model!r}; give {name}=Pretrained("{model}")')
        if not isinstance(model, (Pretrained, nn.Module)) and not (name == "teacher" and model is None):
            raise SettingError(f"{name} must be a Pretrained or a torch.nn.Module, but is {model!r}")
    if not (isinstance(student, nn.Module) and isinstance(teacher, nn.Module)):
        return
    remedy = "give the teacher weights of its own, such as copy.deepcopy(student)"
    if student is teacher:
        raise ModelError(f"student and teacher are one object, which would be frozen as a whole; {remedy}")
    frozen = {id(weight) for weight in teacher.parameters()}
    if shared := [name for name, weight in student.named_parameters() if id(weight) in frozen]:
        raise ModelError(
            f"student and teacher share {len(shared)} weights, such as {shared[0]}, which would be frozen; {remedy}"
        )


def check_student(student: nn.Module) -> None:
    """Check that something is to be trained, and say what is not trained of a mixture of experts that asks for it.

    Raises:
        ModelError: All weights are frozen.
    """
    if not any(weight.requires_grad for weight in student.parameters()):
        raise ModelError(
            f"nothing of the student {type(student).__name__} can be trained: none of its weights requires a gradient; "
            "call student.requires_grad_(True), or unfreeze those that shall be trained"
        )

    config: Any = getattr(student, "config", None)
    if getattr(config, "output_router_logits", False) and getattr(config, "router_aux_loss_coef", 0):
        rank_zero_warn(
            f"the student {type(student).__name__} is configured to add its router's auxiliary loss (router_aux_loss_"
            f"coef {config.router_aux_loss_coef}), but the objective is CE and distillation loss only: experts are not "
            "kept in balance; set output_router_logits to false in its configuration to agree"
        )


def check_loss_type(loss: object) -> None:
    """Check that the loss is one.

    Raises:
        SettingError: It is a class, or no `DistillationLoss` that was made by its constructor.
    """
    if isinstance(loss, type) and issubclass(loss, DistillationLoss):
        raise SettingError(f"loss must be an object, but is the class {loss.__name__}; give {loss.__name__}()")
    if not isinstance(loss, DistillationLoss):
        raise SettingError(
            f"loss must be a DistillationLoss, such as ForwardKL(), but is {loss!r}; a loss of your own derives from "
            "DistillationLoss and defines divergence(teacher_logp, student_logp)"
        )
    if not hasattr(loss, "_temperature"):
        raise SettingError(f"{type(loss).__name__}.__init__ must call super().__init__(), and did not")


def check_tokenizer(tokenizer: object) -> None:
    """Check that a tokenizer is an object.

    Raises:
        SettingError: It is a name.
    """
    if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise SettingError(
            f"tokenizer must be a tokenizer of transformers, but is {tokenizer!r}; give "
            "AutoTokenizer.from_pretrained(...), or leave it out: by default it is the student's, or the data module's"
        )


def check_makers(**makers: object) -> None:
    """Check arguments that make something later.

    Raises:
        SettingError: One cannot be called, such as an optimizer that is made already.
    """
    for name, maker in makers.items():
        if maker is not None and not callable(maker):
            raise SettingError(
                f"{name} must be a function that makes one, such as lambda params: AdamW(params, lr=1e-4), but is a "
                f"{type(maker).__name__}"
            )


def check_kd_weight(kd_weight: float, has_teacher: bool) -> None:
    """Check the share of the distillation loss, also where it is set later.

    Raises:
        SettingError: It is outside [0, 1], or needs a teacher that is not there.
    """
    if not 0 <= kd_weight <= 1:
        raise SettingError(f"kd_weight must lie in [0, 1], but is {kd_weight}")
    if kd_weight > 0 and not has_teacher:
        raise SettingError(f"kd_weight {kd_weight} needs a teacher; give one, or set kd_weight to 0 for fine-tuning")


def check_likeliest(
    schedules: Iterable[Mapping[str, Mapping[int, float]]], loss: DistillationLoss, chunk: int | None
) -> None:
    """Check what ``teacher_cache: topk`` cannot do.

    Args:
        schedules: Of attributes of the module, ``{name: {first epoch: value}}``.
        loss: The distillation loss.
        chunk: Of the module.

    Raises:
        SettingError: All logits are needed, or a temperature that was not kept.
    """
    if chunk is None or needs_all_logits(loss):
        why = "chunk null" if chunk is None else f"the loss {type(loss).__name__}"
        raise SettingError(f"teacher_cache topk keeps no logits, but {why} needs all of them; use teacher_cache hidden")
    later = [schedule["loss.temperature"].values() for schedule in schedules if "loss.temperature" in schedule]
    least, most = 1 / POWERS[0], 1 / POWERS[-1]
    if wrong := [value for value in (loss.temperature, *itertools.chain(*later)) if not least <= value <= most]:
        raise SettingError(
            f"teacher_cache topk knows temperatures from {least:g} to {most:g}, but the loss comes to "
            f"{wrong[0]:g}; use such temperatures, or teacher_cache hidden"
        )


def check_parts(trainer: Trainer, micro_batch_tokens: int | None, teacher_placement: str) -> None:
    """Check that batches can be taken in parts, of which ranks may have unlike numbers.

    Args:
        trainer: Of the run.
        micro_batch_tokens: Of the module.
        teacher_placement: Of a teacher that runs within the steps.

    Raises:
        SettingError: A model that is gathered at every use would make ranks wait for each other for ever, or gradients
            would be made without the scale of 16-mixed.
    """
    if micro_batch_tokens is None:
        return
    other = "take a smaller batch_size, and accumulate_grad_batches of the trainer"
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
