"""Settings that cannot be, or that do not go together."""

from typing import Any

from faults.fault import ROWS, Fault


def with_callbacks(*callbacks: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    """Return settings of a trainer that has these callbacks, each a class and its arguments."""
    return {"trainer": {"callbacks": [{"class_path": name, "init_args": given} for name, given in callbacks]}}


def scheduled(**schedules: dict[int, float]) -> dict[str, Any]:
    """Return settings of a trainer with a schedule of the module's attributes."""
    names = {name.replace("__", "."): schedule for name, schedule in schedules.items()}
    return with_callbacks(("HyperparameterScheduler", {"schedules": names}))


WATCHED = "train_ce, train_kd, train_loss"

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
        done="`HyperparameterScheduler` of what is no number",
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
        "run; there are train_ce, train_kd, train_loss, val_kl, val_nll",
    ),
    Fault(
        id="monitor_highest_loss",
        done="`EarlyStopping` with `mode: max` on a loss",
        settings=with_callbacks(("EarlyStopping", {"monitor": "train_loss", "mode": "max"})),
        says="EarlyStopping(monitor='train_loss', mode='max') would look for the highest loss; set mode to 'min'",
    ),
]
