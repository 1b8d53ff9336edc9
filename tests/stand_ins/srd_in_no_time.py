"""Stands in for ``srd`` in tests of studies: writes in a moment what a run would, from its arguments.

``fit`` logs a curve that falls by the arm's ``--model.fall`` from step to step; ``evaluate`` measures three rows.
``--fail``, ``--kill`` and ``--wait`` let it end otherwise, as long as a file of that name is in the current folder.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path


def main():
    command, *arguments = sys.argv[1:]
    settings = dict(argument.lstrip("-").partition("=")[::2] for argument in arguments)
    root, seed = Path(settings["trainer.default_root_dir"]), int(settings["seed_everything"])
    with Path("calls.txt").open("a") as calls:
        calls.write(f"{command} {root.parent.name} {seed}\n")
    print("nothing to worry about")
    if Path("wait").exists():
        Path("waiting.new").write_text(str(os.getpid()))
        Path("waiting.new").rename("waiting")
        time.sleep(600)
    if command == "fit":
        if Path("kill").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        if Path("fail").exists():
            sys.exit("srd fit: error: model.fall is to fall\n(The traceback is in srd-error.log.)")
        logs = root / "lightning_logs" / "version_0"
        logs.mkdir(parents=True, exist_ok=True)
        fall, speed = float(settings.get("model.fall", 1)), float(settings.get("model.speed", 1))
        lines = ["epoch,seconds,step,train_loss,val_nll,val_rouge_l"]
        for step in range(4):
            lines += [f"0,{(step + 1) / speed},{step},{9 - step},,"]
            lines += [f"0,{(step + 1) / speed},{step},,{10 + seed - fall * step},{step / 10}"]
        (logs / "metrics.csv").write_text("\n".join(lines) + "\n")
    if command == "predict":
        sys.exit("srd predict: error: there is no split predict")
    if command == "evaluate":
        folder = root / "evaluation"
        folder.mkdir(exist_ok=True)
        fall = float(settings.get("model.fall", 1))
        rows = [{"id": f"row{n}", "nll": n + seed - fall, "rouge_l": 0.5, "response_tokens": n + 1} for n in range(3)]
        answers = [
            {"id": row["id"], "seed": of, "prompt": "Say <b>it</b>.", "reference": "It.", "rouge_l": 0.5, "tokens": 3}
            | {"answer": f"<script>alert({seed})</script>", "cut": False}
            for row in rows
            for of in (None, 10)
        ]
        mean = sum(row["nll"] * row["response_tokens"] for row in rows) / 6
        metrics = {"nll": {"mean": mean, "low": mean - 1, "high": mean + 1}, "rouge_l": {"mean": 0.5, "sd": 0.0}}
        found = {"rows": 3, "metrics": metrics, "settings": {"seeds": [10]}}
        (folder / "evaluation.json").write_text(json.dumps(found))
        for name, lines in (("rows", rows), ("answers", answers)):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main()
