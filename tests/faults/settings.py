"""Settings that cannot be, or that do not go together."""

from faults.fault import Fault

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
]
