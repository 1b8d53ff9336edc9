"""Lines and recipes that cannot be understood."""

from faults.fault import Fault

FAULTS = [
    Fault(
        id="no_subcommand",
        done="`srd` alone",
        argv=(),
        bare=True,
        says="say what to do: fit, validate, test, evaluate, predict, plan, curate, cache-teacher, generate, study, report, init, doctor; srd --help explains them",
    ),
    Fault(
        id="misspelt_subcommand",
        done="`srd fot`",
        argv=("fot",),
        bare=True,
        says="there is no subcommand 'fot'; did you mean fit?",
    ),
    Fault(
        id="unknown_subcommand",
        done="`srd dance`",
        argv=("dance",),
        bare=True,
        says="there is no subcommand 'dance'; there are fit, validate, test, evaluate, predict, plan, curate, cache-teacher, generate, study, report, init, doctor",
    ),
    Fault(
        id="responses_in_place_of_data",
        done="`srd generate --path` with the name of one's data",
        files={"train.jsonl": '{"instruction": "a", "output": "b"}\n'},
        argv=("generate", "--path", "train.jsonl"),
        says="path would replace train.jsonl, which does not hold what an earlier run has written; name another file, or "
        "move this one away",
    ),
    Fault(
        id="no_settings",
        done="`srd fit` without a recipe",
        bare=True,
        says="model.student and data.data must be given, in a recipe (--config FILE) or on the command line",
    ),
    Fault(
        id="no_recipe",
        done="`--config` with a file that is not there",
        argv=("fit", "--config", "no.yaml"),
        bare=True,
        says="config: there is no file {folder}/no.yaml",
    ),
    Fault(
        id="recipe_not_yaml",
        done="A recipe that is not YAML",
        files={"bad.yaml": "data: {schedule: [\n"},
        argv=("fit", "--config", "bad.yaml"),
        says="bad.yaml: line 2 is not YAML: while parsing a flow node did not find expected node content",
    ),
    Fault(
        id="recipe_a_list",
        done="A recipe that is a list",
        files={"bad.yaml": "- data\n"},
        argv=("fit", "--config", "bad.yaml"),
        says="bad.yaml: settings are written by name, such as data: {batch_size: 8}, but it holds - data",
    ),
    Fault(
        id="group_not_settings",
        done="`data: 5` in a recipe",
        files={"bad.yaml": "data: 5\n"},
        argv=("fit", "--config", "bad.yaml"),
        says="bad.yaml: data: expected settings by name, but got 5",
    ),
    Fault(
        id="recipe_not_utf8",
        done="A recipe in latin-1",
        files={"bad.yaml": "data: {data: r\xe9ponses.jsonl}\n".encode("latin-1")},
        argv=("fit", "--config", "bad.yaml"),
        says="bad.yaml is not UTF-8 (byte 0xe9); save it as UTF-8",
    ),
    Fault(
        id="misspelt_option",
        done="`--data.schedul`, which begins as another setting does",
        argv=("fit", "--data.schedul", "{0: 1.0}"),
        says="there is no setting data.schedul; did you mean data.schedule?",
    ),
    Fault(
        id="abbreviated_option",
        done="`--trainer.max_epoch 3`",
        argv=("fit", "--trainer.max_epoch", "3"),
        says="there is no setting trainer.max_epoch; did you mean trainer.max_epochs?",
    ),
    Fault(
        id="misspelt_key",
        done="`data: {schedul: {0: 1.0}}` in a recipe",
        files={"bad.yaml": "data: {schedul: {0: 1.0}}\n"},
        argv=("fit", "--config", "bad.yaml"),
        says="bad.yaml: there is no setting data.schedul; did you mean data.schedule?",
    ),
    Fault(
        id="misspelt_group",
        done="`models:` instead of `model:` in a recipe",
        files={"bad.yaml": "models: {loss: ReverseKL}\n"},
        argv=("fit", "--config", "bad.yaml"),
        says="bad.yaml: there is no setting models; did you mean model?",
    ),
    Fault(
        id="misspelt_nested",
        done="`--model.kd_wieght 1`",
        argv=("fit", "--model.kd_wieght", "1"),
        says="there is no setting model.kd_wieght; did you mean model.kd_weight?",
    ),
    Fault(
        id="wrong_group",
        done="`--trainer.batch_size 8`",
        argv=("fit", "--trainer.batch_size", "8"),
        says="there is no setting trainer.batch_size; did you mean data.batch_size?",
    ),
    Fault(
        id="word_without_setting",
        done="A word that belongs to no setting",
        argv=("fit", "quickly"),
        says="quickly is no setting; settings are written --NAME VALUE",
    ),
    Fault(
        id="option_without_value",
        done="A setting without its value",
        argv=("fit", "--data.batch_size"),
        says="argument --data.batch_size: expected one argument",
    ),
    Fault(
        id="text_for_number",
        done="`--data.batch_size big`",
        argv=("fit", "--data.batch_size", "big"),
        says="data.batch_size: expected a whole number, but got big",
    ),
    Fault(
        id="fraction_for_whole_number",
        done="`--trainer.max_epochs 1.5`",
        argv=("fit", "--trainer.max_epochs", "1.5"),
        says="trainer.max_epochs: expected a whole number or null, but got 1.5",
    ),
    Fault(
        id="number_for_schedule",
        done="`--data.schedule 0.5`",
        argv=("fit", "--data.schedule", "0.5"),
        says="data.schedule: expected settings by name ({name: value}) or null, but got 0.5",
    ),
    Fault(
        id="one_criterion_for_a_list",
        done="`--data.criteria RougeL` instead of `[RougeL]`",
        argv=("fit", "--data.criteria", "RougeL"),
        says="data.criteria: expected a list or null, but got RougeL",
    ),
    Fault(
        id="unknown_precision",
        done="`--trainer.precision bf17`",
        argv=("fit", "--trainer.precision", "bf17"),
        says="trainer.precision: expected one of transformer-engine, transformer-engine-float16, 16-true, 16-mixed, "
        "bf16-true, bf16-mixed, 32-true, 64-true, 64, 32, 16, bf16 or null, but got bf17",
    ),
    Fault(
        id="unknown_teacher_cache",
        done="`--model.teacher_cache hiden`",
        argv=("fit", "--model.teacher_cache", "hiden"),
        says="model.teacher_cache: expected one of none, hidden, topk, but got hiden",
    ),
    Fault(
        id="unknown_setting_of_the_cache",
        done="`--model.teacher_cache.kid hidden`",
        argv=("fit", "--model.teacher_cache.kid", "hidden"),
        says="model.teacher_cache: CacheSettings: there is no setting kid; did you mean kind?",
    ),
    Fault(
        id="cache_without_a_kind",
        done="`--model.teacher_cache.k 16` without a kind",
        argv=("fit", "--model.teacher_cache.k", "16"),
        says="model.teacher_cache: CacheSettings: kind must be given",
    ),
    Fault(
        id="former_setting",
        done="`--model.top_k 16`, as in earlier versions",
        argv=("fit", "--model.top_k", "16"),
        says="there is no setting model.top_k any more; it is model.teacher_cache.k now, beside its kind, hidden or topk",
    ),
    Fault(
        id="setting_that_is_gone",
        done="`--data.near_duplicates 0.8`, as in earlier versions",
        argv=("fit", "--data.near_duplicates", "0.8"),
        says="there is no setting data.near_duplicates any more; leave similar prompts out of `data`; data.decontaminate "
        "drops those that are equal",
    ),
    Fault(
        id="setting_that_is_gone_in_a_recipe",
        done="`decoding: {continuous_batching: true}` in a recipe, as in earlier versions",
        settings={"data": {"decoding": {"continuous_batching": True}}},
        says="recipe.yaml: there is no setting data.decoding.continuous_batching any more; examples/scores_from_vllm.py makes "
        "scores with vLLM, which refills batches",
    ),
    Fault(
        id="unknown_ties",
        done="`--data.ties random`",
        argv=("fit", "--data.ties", "random"),
        says="data.ties: expected one of average, order, but got random",
    ),
    Fault(
        id="misspelt_loss",
        done="`--model.loss JensonShannon`",
        argv=("fit", "--model.loss", "JensonShannon"),
        says="model.loss: JensonShannon is not one of its classes; did you mean JensenShannon?",
    ),
    Fault(
        id="no_loss",
        done="`--model.loss torch.nn.Linear`, a class that is no loss",
        argv=("fit", "--model.loss", "torch.nn.Linear"),
        says="model.loss: torch.nn.Linear is not one of its classes; there are AdaptiveKL, AlphaBeta, ContrastivePair, "
        "DistillationLoss, ForwardKL, JensenShannon, ReverseKL, Selected, SkewForwardKL, SkewReverseKL, TAID, "
        "TokenTemperature, TotalVariation, or the import path of your own",
    ),
    Fault(
        id="loss_without_module",
        done="A loss in a module that cannot be imported",
        argv=("fit", "--model.loss", "nowhere.Loss"),
        says="model.loss: nowhere.Loss: No module named 'nowhere'",
    ),
    Fault(
        id="misspelt_setting_of_loss",
        done="`--model.loss.betta 0.1`",
        argv=("fit", "--model.loss", "JensenShannon", "--model.loss.betta", "0.1"),
        says="model.loss: JensenShannon: there is no setting betta; did you mean beta?",
    ),
    Fault(
        id="text_for_setting_of_loss",
        done="`--model.loss.beta half`",
        argv=("fit", "--model.loss", "JensenShannon", "--model.loss.beta", "half"),
        says="model.loss: JensenShannon: beta: expected a number, but got half",
    ),
    Fault(
        id="misspelt_criterion",
        done="`--data.criteria [Rouge]`",
        argv=("fit", "--data.criteria", "[Rouge]"),
        says="data.criteria: Rouge is not one of its classes; did you mean RougeL?",
    ),
    Fault(
        id="misspelt_arrangement",
        done="`--data.arrangement Random`",
        argv=("fit", "--data.arrangement", "Random"),
        says="data.arrangement: Random is not one of its classes; did you mean RandomOrder?",
    ),
    Fault(
        id="misspelt_optimizer",
        done="`--model.optimizer AdamWW`",
        argv=("fit", "--model.optimizer", "AdamWW"),
        says="model.optimizer: AdamWW is not one of its classes; did you mean AdamW?",
    ),
    Fault(
        id="misspelt_setting_of_optimizer",
        done="`--model.optimizer.lrr 1`",
        argv=("fit", "--model.optimizer", "AdamW", "--model.optimizer.lrr", "1"),
        says="model.optimizer: there is no setting lrr; did you mean lr?",
    ),
    Fault(
        id="misspelt_lr_scheduler",
        done="`--model.lr_scheduler CosineAnnealing`",
        argv=("fit", "--model.lr_scheduler", "CosineAnnealing"),
        says="model.lr_scheduler: CosineAnnealing is not one of its classes; did you mean CosineAnnealingLR?",
    ),
    Fault(
        id="misspelt_callback",
        done="A callback with a misspelt name",
        settings={"trainer": {"callbacks": [{"class_path": "CurriculumCalback"}]}},
        says="recipe.yaml: trainer.callbacks: CurriculumCalback is not one of its classes; did you mean "
        "CurriculumCallback?",
    ),
    Fault(
        id="callback_without_setting",
        done="A callback without a setting that it needs",
        settings={"trainer": {"callbacks": [{"class_path": "AnswerWriter"}]}},
        says="trainer.callbacks: AnswerWriter: path must be given",
    ),
    Fault(
        id="misspelt_setting_of_student",
        done="`--model.student.nam gpt2`",
        argv=("fit", "--model.student.nam", "gpt2"),
        says="model.student: LlamaForCausalLM: there is no setting nam; there are config",
    ),
    Fault(
        id="unknown_strategy",
        done="`--trainer.strategy dpp`",
        argv=("fit", "--trainer.strategy", "dpp"),
        says="trainer: You selected an invalid strategy name: `strategy='dpp'`. It must be either a string or an "
        "instance of `lightning.pytorch.strategies.Strategy`. Example choices: auto, ddp, ddp_spawn, deepspeed, ... "
        "Find a complete list of options in our documentation at https://lightning.ai",
    ),
    Fault(
        id="no_devices",
        done="`--trainer.devices 0`",
        argv=("fit", "--trainer.devices", "0"),
        says="trainer: `Trainer(devices='0')` value is not a valid input using cpu accelerator.",
    ),
    Fault(
        id="seed_out_of_range",
        done="`--seed_everything -1`",
        argv=("fit", "--seed_everything=-1"),
        says="seed_everything: -1 is not in bounds, numpy accepts from 0 to 4294967295",
    ),
]
