"""Settings that cannot be, or that do not go together."""

from typing import Any

from faults.fault import ROWS, TINY, Fault, laid_over


def with_callbacks(*callbacks: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    """Return settings of a trainer that has these callbacks, each a class and its arguments."""
    return {"trainer": {"callbacks": [{"class_path": name, "init_args": given} for name, given in callbacks]}}


def scheduled(**schedules: dict[int, float]) -> dict[str, Any]:
    """Return settings of a trainer with a schedule of the module's attributes."""
    names = {name.replace("__", "."): schedule for name, schedule in schedules.items()}
    return with_callbacks(("HyperparameterScheduler", {"schedules": names}))


WATCHED = (
    "curriculum/rows, curriculum/stage, runtime/backward_seconds, runtime/forward_seconds, runtime/mfu, "
    "runtime/optimizer_seconds, runtime/padding, runtime/positions_per_second, runtime/response_tokens_per_second, "
    "runtime/rows_per_second, runtime/teacher_seconds, runtime/waiting_seconds, schedule/kd_weight, "
    "schedule/loss.temperature, train_ce, train_kd, train_loss"
)
NAMED_ROWS = [{"id": f"row {number}", **row} for number, row in enumerate(ROWS)]
NAN = laid_over(TINY, {"init_args": {"config": {"init_args": {"rms_norm_eps": float("nan")}}}})
"""A model whose logits are NaN whatever its weights are."""
IN_FP16 = "check its weights, and load it in float32 or bfloat16, for float16 overflows"

FAULTS = [
    Fault(
        id="kd_weight_over_1",
        done="`--model.kd_weight 1.5`",
        argv=("fit", "--model.kd_weight", "1.5"),
        says="kd_weight must lie in [0, 1], but is 1.5",
    ),
    Fault(
        id="no_teacher",
        done="No teacher",
        settings={"model": {"teacher": None}},
        says="kd_weight 1.0 needs a teacher; give one, or set kd_weight to 0 for fine-tuning",
    ),
    Fault(
        id="own_text_and_a_cached_teacher",
        done="`--model.rollouts GKD` with a cached teacher",
        argv=("fit", "--model.rollouts", "GKD", "--model.teacher_cache", "hidden"),
        says="teacher_cache knows what the teacher says to the rows, but GKD trains on texts that nobody knows yet; set "
        "teacher_cache to none",
    ),
    Fault(
        id="a_replay_without_reflection",
        done="`--model.rollouts ReflectionReplay` with all data from the start",
        argv=("fit", "--model.rollouts", "ReflectionReplay"),
        settings={"data": {"schedule": {0: 1.0}}},
        says="ReflectionReplay trains on the student's answers, but schedule {0: 1.0} trains on all rows from the start, "
        "and the student is asked for none; give a schedule that ranks rows, such as {0: 0.25, 8: 0.5, 16: 0.75}",
    ),
    Fault(
        id="schedule_without_0",
        done="A schedule that does not begin at epoch 0",
        settings={"data": {"schedule": {1: 0.5}}},
        says="schedule must begin at epoch 0, but its epochs are [1]; add a value for 0 and none before it",
    ),
    Fault(
        id="beta_out_of_range",
        done="`--model.loss.beta 1.5`",
        argv=("fit", "--model.loss", "JensenShannon", "--model.loss.beta", "1.5"),
        says="beta must lie between 0 and 1, but is 1.5; at the ends use ReverseKL or ForwardKL",
    ),
    Fault(
        id="scheduled_weight_over_1",
        done="`HyperparameterScheduler` with a `kd_weight` over 1 in a later epoch",
        settings=scheduled(kd_weight={0: 0.5, 1: 1.5}),
        says="the schedule of kd_weight cannot begin 1.5 at epoch 1: kd_weight must lie in [0, 1], but is 1.5",
    ),
    Fault(
        id="scheduled_temperature_0",
        done="`HyperparameterScheduler` with a temperature of 0 in a later epoch",
        settings=scheduled(loss__temperature={0: 1.0, 1: 0.0}),
        says="the schedule of loss.temperature cannot begin 0.0 at epoch 1: temperature must be positive and finite, but "
        "is 0.0",
    ),
    Fault(
        id="scheduled_beta_1",
        done="`HyperparameterScheduler` with a share that the loss cannot have",
        settings={"model": {"loss": "JensenShannon"}, **scheduled(loss__beta={0: 0.5, 1: 1.0})},
        says="the schedule of loss.beta cannot begin 1.0 at epoch 1: beta must lie between 0 and 1, but is 1.0; at the "
        "ends use ReverseKL or ForwardKL",
    ),
    Fault(
        id="scheduled_name_misspelt",
        done="`HyperparameterScheduler` of an attribute that is not there",
        settings=scheduled(loss__temprature={0: 1.0}),
        says="KDLightningModule has no attribute 'loss.temprature' to schedule: 'ForwardKL' object has no attribute "
        "'temprature'",
    ),
    Fault(
        id="scheduled_what_is_no_number",
        done="`HyperparameterScheduler` of something that is not a number",
        settings=scheduled(optimizer={0: 1.0}),
        says="optimizer of KDLightningModule is a partial, not a number that can be scheduled",
    ),
    Fault(
        id="scheduled_twice",
        done="Two schedules of one attribute",
        settings=with_callbacks(
            ("HyperparameterScheduler", {"schedules": {"kd_weight": {0: 0.5}}}),
            ("HyperparameterScheduler", {"schedules": {"kd_weight": {0: 1.0}}}),
        ),
        says="two HyperparameterSchedulers have a schedule for kd_weight; leave one of them out",
    ),
    Fault(
        id="scheduled_from_epoch_3",
        done="`HyperparameterScheduler` with a schedule that does not begin at epoch 0",
        settings=scheduled(kd_weight={3: 0.5}),
        says="kd_weight must begin at epoch 0, but its epochs are [3]; add a value for 0 and none before it",
    ),
    Fault(
        id="monitor_misspelt",
        done="`EarlyStopping` on a name that is never logged",
        settings={
            "data": {"data": {"train": ROWS, "validation": ROWS}},
            **with_callbacks(("EarlyStopping", {"monitor": "val_loss"})),
        },
        says="EarlyStopping(monitor='val_loss') waits for 'val_loss', which is never logged in this run; there are "
        f"{WATCHED}, val_kl, val_nll",
    ),
    Fault(
        id="monitor_without_validation",
        done="`EarlyStopping` on `val_nll` without validation rows",
        settings={
            "data": {"data": {"train": ROWS}},
            **with_callbacks(("EarlyStopping", {"monitor": "val_nll"})),
        },
        says="EarlyStopping(monitor='val_nll') waits for 'val_nll', which is never logged in this run; there are "
        f"{WATCHED}",
    ),
    Fault(
        id="monitor_in_file_name",
        done="A name that is never logged in the file name of a checkpoint",
        settings={
            "trainer": {
                "enable_checkpointing": True,
                **with_callbacks(("ModelCheckpoint", {"filename": "{epoch}-{loss:.2f}"}))["trainer"],
            }
        },
        says="ModelCheckpoint(filename='{epoch}-{loss:.2f}') waits for 'loss', which is never logged in this "
        f"run; there are {WATCHED}, val_kl, val_nll",
    ),
    Fault(
        id="monitor_highest_loss",
        done="`EarlyStopping` with `mode: max` on a loss",
        settings=with_callbacks(("EarlyStopping", {"monitor": "train_loss", "mode": "max"})),
        says="EarlyStopping(monitor='train_loss', mode='max') would look for the highest loss; set mode to 'min'",
    ),
    Fault(
        id="temperature_0",
        done="`--model.loss.temperature 0`",
        argv=("fit", "--model.loss", "ForwardKL", "--model.loss.temperature", "0"),
        says="temperature must be positive and finite, but is 0.0",
    ),
    Fault(
        id="alpha_out_of_range",
        done="`--model.loss.alpha -0.1`",
        argv=("fit", "--model.loss", "SkewForwardKL", "--model.loss.alpha=-0.1"),
        says="alpha must lie in [0, 1), but is -0.1",
    ),
    Fault(
        id="sizes_below_1",
        done="`--model.chunk 0 --model.micro_batch_tokens 0`",
        argv=("fit", "--model.chunk", "0", "--model.micro_batch_tokens", "0"),
        says="sizes must be at least 1, but micro_batch_tokens=0, chunk=0",
    ),
    Fault(
        id="no_teacher_to_cache",
        done="`teacher_cache: hidden` without a teacher",
        settings={"model": {"teacher": None, "kd_weight": 0.0, "teacher_cache": "hidden"}},
        says="teacher_cache hidden needs a teacher, but none is given",
    ),
    Fault(
        id="topk_and_temperature",
        done="A temperature of 5 with `teacher_cache: topk`",
        settings={
            "model": {"teacher_cache": "topk", "loss": {"class_path": "ForwardKL", "init_args": {"temperature": 5}}}
        },
        says="teacher_cache topk knows temperatures from 0.5 to 4, but the loss comes to 5; use such temperatures, or "
        "teacher_cache hidden",
    ),
    Fault(
        id="topk_and_all_logits",
        done="`chunk: null` with `teacher_cache: topk`",
        settings={"model": {"teacher_cache": "topk", "chunk": None}},
        says="teacher_cache topk keeps no logits, but chunk null needs all of them; use teacher_cache hidden",
    ),
    Fault(
        id="placement_on_one_device",
        done="`--model.teacher_placement shard` on one device",
        argv=("fit", "--model.teacher_placement", "shard"),
        says="teacher_placement shard needs a strategy of several ranks, such as ddp (on one device too), but this is "
        "SingleDeviceStrategy; choose one, or replicate",
    ),
    Fault(
        id="layers_split",
        done="`tensor_parallel_size: 2` of the strategy `FSDP2`",
        settings={
            "trainer": {"strategy": {"class_path": "srd_lightning.FSDP2", "init_args": {"tensor_parallel_size": 2}}}
        },
        says="FSDP2 shards over all ranks, here 1, and splits no layers, but data_parallel_size is auto and "
        "tensor_parallel_size 2; leave them out, or use Lightning's ModelParallelStrategy with a configure_model of your "
        "own",
    ),
    Fault(
        id="weights_in_fp16",
        done="`--trainer.precision 16-true`",
        argv=("fit", "--trainer.precision", "16-true"),
        says="precision 16-true keeps the weights in fp16, in which small updates and gradients vanish; use bf16-mixed or "
        "16-mixed, whose weights are fp32, or bf16-true",
    ),
    Fault(
        id="learning_rate_below_0",
        done="A negative learning rate",
        argv=("fit", "--model.optimizer", "torch.optim.AdamW", "--model.optimizer.lr=-0.1"),
        says="the optimizer cannot be made: Invalid learning rate: -0.1; correct this setting of it",
    ),
    Fault(
        id="weight_that_needs_a_teacher_later",
        done="A schedule of `kd_weight` that rises in a run without a teacher",
        settings={
            "model": {"teacher": None, "kd_weight": 0.0},
            "trainer": {
                "max_epochs": 2,
                "callbacks": [
                    {
                        "class_path": "HyperparameterScheduler",
                        "init_args": {"schedules": {"kd_weight": {0: 0.0, 1: 0.5}}},
                    }
                ],
            },
        },
        says="the schedule of kd_weight cannot begin 0.5 at epoch 1: kd_weight 0.5 needs a teacher; give one, or set "
        "kd_weight to 0 for fine-tuning",
    ),
    Fault(
        id="decoding_no_tokens",
        done="`--data.decoding.max_new_tokens 0`",
        argv=("fit", "--data.decoding.max_new_tokens", "0"),
        says="decoding: max_new_tokens must be a whole number of at least 1, but is 0",
    ),
    Fault(
        id="decoding_top_p",
        done="`--data.decoding.top_p 0`",
        argv=("fit", "--data.decoding.top_p", "0"),
        says="decoding: top_p must lie in (0, 1], where 1 is all tokens, but is 0.0",
    ),
    Fault(
        id="decoding_temperature",
        done="`--data.decoding.temperature=-1`",
        argv=("fit", "--data.decoding.temperature=-1"),
        says="decoding: temperature must be 0 (greedy) or positive, finite too, but is -1.0",
    ),
    Fault(
        id="student_of_nan",
        done="A student whose logits are NaN",
        settings={"model": {"student": NAN}, "data": {"data": NAMED_ROWS[:2], "schedule": {0: 1.0}}},
        left=("run/config.yaml",),
        says="the loss is nan in batch 0 of epoch 0; its rows: row 0, row 1. No step was made with it, so what is saved is "
        f"sound: the student's logits are NaN or infinite before its first step: {IN_FP16}",
    ),
    Fault(
        id="teacher_of_nan",
        done="A teacher whose logits are NaN",
        settings={"model": {"teacher": NAN}, "data": {"data": NAMED_ROWS[:2], "schedule": {0: 1.0}}},
        left=("run/config.yaml",),
        says="the loss is nan in batch 0 of epoch 0; its rows: row 0, row 1. No step was made with it, so what is saved is "
        f"sound: the teacher's logits are NaN or infinite: {IN_FP16}",
    ),
    Fault(
        id="two_vocabularies",
        done="A student and a teacher with other vocabularies",
        settings={"model": {"teacher": laid_over(TINY, {"init_args": {"config": {"init_args": {"vocab_size": 448}}}})}},
        says="student and teacher give logits of 384 and 448 tokens, and their tokenizers are not known to be the same; "
        "give both as Pretrained, so that this can be checked, or choose two models of one family",
    ),
    Fault(
        id="no_compiler",
        done="`--model.compile true` where there is no compiler",
        argv=("fit", "--model.compile", "true"),
        environment={"CXX": "no-such-compiler"},
        says="compile needs the compiler no-such-compiler on a CPU, which is not there; install it, or set compile to false",
    ),
]
