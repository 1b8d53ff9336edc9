"""Whether the arguments of a module are of their kind: checked when it is made."""

from __future__ import annotations

from typing import Any, Literal, get_args

from torch import nn
from transformers import PreTrainedTokenizerBase

from srd_lightning.errors import ModelError, SettingError
from srd_lightning.losses.auxiliary import AuxiliaryLoss
from srd_lightning.losses.base import DistillationLoss
from srd_lightning.models.pretrained import Pretrained, dtype_named
from srd_lightning.rollouts.base import Rollouts
from srd_lightning.teacher.handle import CacheKind, CacheSettings


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


def cache_settings(value: CacheKind | CacheSettings) -> CacheSettings | None:
    """Return what ``teacher_cache`` asks for, or nothing where it asks for none.

    Raises:
        SettingError: It is neither `CacheSettings` nor one of the words, or a setting is out of range, or of the other
            kind.
    """
    if not isinstance(value, CacheSettings):
        check_choice("teacher_cache", value, CacheKind)
        return None if value == "none" else CacheSettings(value)
    check_choice("teacher_cache.kind", value.kind, Literal["hidden", "topk"])
    check_sizes(**{"teacher_cache.k": value.k})
    of_other_kind = {"hidden": "k", "topk": "dtype"}[value.kind]
    if (other := getattr(value, of_other_kind)) is not None:
        raise SettingError(
            f"teacher_cache.{of_other_kind} {other} does not belong to kind {value.kind}; leave it out, or choose the "
            "other kind"
        )
    if value.dtype is not None:
        dtype_named(value.dtype)
    return value


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
        SettingError: One is something else.
        ModelError: They share weights, or are one.
    """
    for name, model in (("student", student), ("teacher", teacher)):
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
    if not hasattr(loss, "temperature"):
        raise SettingError(f"{type(loss).__name__}.__init__ must call super().__init__(), and did not")


def check_auxiliary_types(losses: object) -> None:
    """Check that auxiliary losses are a list of such.

    Raises:
        SettingError: They are one loss, or one is something else, such as a class.
    """
    if not isinstance(losses, (list, tuple)):
        raise SettingError(f"auxiliary must be a list of losses, such as [HiddenStateMSE(64, 128)], but is {losses!r}")
    if wrong := [loss for loss in losses if not isinstance(loss, AuxiliaryLoss)]:
        raise SettingError(
            f"auxiliary must hold losses such as HiddenStateMSE(64, 128), but one is {wrong[0]!r}; one of your own "
            "derives from AuxiliaryLoss and defines token_losses(student, teacher)"
        )


def check_rollouts_type(rollouts: object) -> None:
    """Check that rollouts are a method, or none.

    Raises:
        SettingError: It is something else, such as a class.
    """
    if rollouts is not None and not isinstance(rollouts, Rollouts):
        raise SettingError(
            f"rollouts must be an object such as GKD(share=0.5), but is {rollouts!r}; one of your own derives from "
            "Rollouts and defines is_own(moment) and texts(rows, models)"
        )


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
