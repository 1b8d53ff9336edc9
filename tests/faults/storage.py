"""Files and folders that a run cannot write, or that are damaged."""

from typing import Any

from faults.fault import ROWS, Fault
from faults.settings import with_callbacks


def export_to(dirpath: str) -> dict[str, Any]:
    """Return settings of a run that exports its student."""
    return with_callbacks(("HuggingFaceExport", {"dirpath": dirpath}))


def answers_to(path: str) -> dict[str, Any]:
    """Return settings of a run that writes answers."""
    return with_callbacks(("AnswerWriter", {"path": path}))


def report_to(path: str) -> dict[str, Any]:
    """Return settings of a run that measures itself."""
    return with_callbacks(("RuntimeBenchmark", {"path": path}))


def caching(folder: str, kind: str = "hidden", **settings: str) -> dict[str, Any]:
    """Return settings of a run that caches its teacher."""
    return {"model": {"teacher_cache": {"kind": kind, "dir": folder, **settings}}}


FAULTS: list[Fault] = [
    Fault(
        id="export_here",
        done="`HuggingFaceExport` to the current folder",
        settings=export_to("."),
        says="HuggingFaceExport replaces its dirpath as a whole, but {folder} is or holds the current folder; "
        "give it a folder of its own, such as {folder}/student",
    ),
    Fault(
        id="export_to_the_run",
        done="`HuggingFaceExport` to the folder of the run itself",
        settings=export_to("run"),
        says="HuggingFaceExport replaces its dirpath as a whole, but {folder}/run is or holds default_root_dir "
        "of the trainer; give it a folder of its own, such as {folder}/run/student",
    ),
    Fault(
        id="export_over_files",
        done="`HuggingFaceExport` to a folder with other files",
        files={"runs/thesis.tex": "mine"},
        settings=export_to("runs"),
        says="HuggingFaceExport replaces its dirpath as a whole, but {folder}/runs holds thesis.tex, which no "
        "export has written; give it a folder of its own, or move this away",
    ),
    Fault(
        id="export_over_a_model",
        done="`HuggingFaceExport` to the folder of a model that is no export",
        files={"base/config.json": "{}", "base/model.safetensors": b"weights"},
        settings=export_to("base"),
        says="HuggingFaceExport replaces its dirpath as a whole, but {folder}/base holds config.json, "
        "model.safetensors, which no export has written; give it a folder of its own, or move this away",
    ),
    Fault(
        id="export_over_a_file",
        done="`HuggingFaceExport` to a file",
        files={"student": "mine"},
        settings=export_to("student"),
        says="HuggingFaceExport needs a folder, but {folder}/student is a file; name another dirpath",
    ),
    Fault(
        id="export_beside_older_files",
        done="`HuggingFaceExport` to `student`, where the user has a folder `student-older`",
        files={"student-older/weights.pt": "mine"},
        settings=export_to("student"),
        says="HuggingFaceExport replaces its dirpath as a whole, but {folder}/student-older holds weights.pt, "
        "which no export has written; give it a folder of its own, or move this away",
    ),
    Fault(
        id="export_below_a_file",
        done="`HuggingFaceExport` to a place below a file",
        files={"file": "mine"},
        settings=export_to("file/student"),
        says="HuggingFaceExport(dirpath=...) needs the folder {folder}/file, but {folder}/file is a file; name "
        "another place",
    ),
    Fault(
        id="export_not_writable",
        done="`HuggingFaceExport` to a place that cannot be written",
        settings=export_to("/proc/srd/student"),
        says="HuggingFaceExport(dirpath=...) needs the folder /proc/srd, but nothing can be written to /proc "
        "(No such file or directory); name another place, or make room and give yourself the right to "
        "write there",
    ),
    Fault(
        id="report_over_a_folder",
        done="`RuntimeBenchmark` to a folder",
        files={"results/mine.txt": "mine"},
        settings=report_to("results"),
        says="RuntimeBenchmark(path=...) must name a file, but results is a folder",
    ),
    Fault(
        id="report_over_other_results",
        done="`RuntimeBenchmark` to a file with something else",
        files={"results.json": '{"accuracy": 0.5}'},
        settings=report_to("results.json"),
        says="RuntimeBenchmark(path=...) would replace results.json, which does not hold the report of an "
        "earlier run; name another file, or move this one away",
    ),
    Fault(
        id="report_not_writable",
        done="`RuntimeBenchmark` to a place that cannot be written",
        settings=report_to("/proc/srd/report.json"),
        says="RuntimeBenchmark(path=...) needs the folder /proc/srd, but nothing can be written to /proc (No "
        "such file or directory); name another place, or make room and give yourself the right to write "
        "there",
    ),
    Fault(
        id="answers_over_rows",
        done="`AnswerWriter` to the file of the rows",
        files={"train.jsonl": ROWS},
        settings={"data": {"data": "train.jsonl"}, **answers_to("train.jsonl")},
        argv=("predict",),
        says="AnswerWriter(path=...) would replace train.jsonl, which does not hold the answers of an earlier "
        "run; name another file, or move this one away",
    ),
    Fault(
        id="answers_over_a_folder",
        done="`AnswerWriter` to a folder",
        files={"answers/mine.txt": "mine"},
        settings=answers_to("answers"),
        argv=("predict",),
        says="AnswerWriter(path=...) must name a file, but answers is a folder",
    ),
    Fault(
        id="answers_not_writable",
        done="`AnswerWriter` to a place that cannot be written",
        settings=answers_to("/proc/srd/answers.jsonl"),
        argv=("predict",),
        says="AnswerWriter(path=...) needs the folder /proc/srd, but nothing can be written to /proc (No such "
        "file or directory); name another place, or make room and give yourself the right to write there",
    ),
    Fault(
        id="export_offline",
        done="`HuggingFaceExport` with `push_to`, without a network",
        settings=with_callbacks(("HuggingFaceExport", {"push_to": {"repo": "organisation/student"}})),
        environment={"HF_TOKEN": "hf_some"},
        says="push_to is to write to organisation/student on the hub, but HF_HUB_OFFLINE is set; unset it, or leave "
        "push_to out",
    ),
    Fault(
        id="export_of_rows_as_csv",
        done="`srd curate --export rows.csv`",
        argv=("curate", "--export", "rows.csv"),
        says="export must name a .jsonl or .parquet file, but is rows.csv; give it such an ending",
    ),
    Fault(
        id="export_of_rows_over_a_file",
        done="`srd curate --export` to the file of the rows themselves",
        files={"rows.jsonl": ROWS},
        argv=("curate", "--export", "rows.jsonl"),
        says="export would replace rows.jsonl, which does not hold the rows of an earlier curation; name another file, "
        "or move this one away",
    ),
    Fault(
        id="curate_with_answers",
        done="`srd curate` with the `AnswerWriter` of a recipe, where answers stand",
        files={"answers.jsonl": [{"prompt": "a", "response": "b", "answer": "c"}]},
        settings={"data": {"schedule": {0: 1.0}}, **answers_to("answers.jsonl")},
        argv=("curate",),
        says="all 8 rows are trained on from the start; nothing was ranked",
        code=0,
        left=("run/config.yaml",),
    ),
    Fault(
        id="settings_over_a_recipe",
        done="A file `config.yaml` of the user's in the folder of the run, where Lightning saves the settings",
        files={"run/config.yaml": "mine: 1\n"},
        settings={"data": {"schedule": {0: 1.0}}},
        argv=("curate",),
        says="all 8 rows are trained on from the start; nothing was ranked",
        code=0,
        left=("run/srd-config.yaml",),
    ),
    Fault(
        id="cache_below_a_file",
        done="`teacher_cache.dir` below a file",
        files={"notes.txt": "mine"},
        settings=caching("notes.txt/cache"),
        says="teacher_cache.dir needs the folder notes.txt/cache, but {folder}/notes.txt is a file; name another place",
    ),
    Fault(
        id="cache_manifest_cut",
        done="a teacher's cache whose manifest was cut off",
        files={"cache/manifest.json": '{"teacher": "0123'},
        settings=caching("cache"),
        says="cache/manifest.json cannot be read (Unterminated string starting at: line 1 column 13 (char 12)), so nobody "
        "knows what the outputs of a teacher beside it were made of; delete the folder, or point `teacher_cache.dir` to "
        "another one",
    ),
    Fault(
        id="cache_manifest_none",
        done="a teacher's cache with another file as manifest",
        files={"cache/manifest.json": "[]"},
        settings=caching("cache"),
        says="cache/manifest.json cannot be read (it is not a manifest), so nobody knows what the outputs of a teacher "
        "beside it were made of; delete the folder, or point `teacher_cache.dir` to another one",
    ),
    Fault(
        id="cache_of_another",
        done="`teacher_cache.dir` with the cache of another teacher",
        files={"cache/manifest.json": '{"teacher": "another", "kind": "HiddenStates(dtype=torch.bfloat16)"}'},
        settings=caching("cache"),
        says="cache holds outputs of a teacher that were made with another teacher; point `teacher_cache.dir` to a new "
        "folder, or delete this one, to make them again",
    ),
    Fault(
        id="cache_of_another_kind",
        done="`teacher_cache.dir` with a cache of another kind",
        files={"cache/manifest.json": '{"teacher": "another", "kind": "HiddenStates(dtype=torch.bfloat16)"}'},
        settings=caching("cache", "topk"),
        says="cache holds outputs of a teacher that were made with another kind, teacher; point `teacher_cache.dir` to "
        "a new folder, or delete this one, to make them again",
    ),
    Fault(
        id="cache_dtype",
        done="a `teacher_cache.dtype` that torch does not know",
        settings=caching("cache", dtype="int8"),
        says="dtype must name a floating-point type of torch, such as float32 or bfloat16, but is 'int8'",
    ),
]
