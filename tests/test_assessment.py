"""`srd evaluate`: what it measures, that it goes on, the same on all ranks, and its files."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import references
import torch
import yaml
from conftest import run_cli
from tiny import PLAIN, lively_model, make_rows, tokenised

from srd_lightning import cli
from srd_lightning.assessment.evaluator import Evaluator
from srd_lightning.assessment.measures import AGREEMENT, OWN
from srd_lightning.assessment.protocol import EvaluationProtocol
from srd_lightning.assessment.summary import answer_lines, metrics, numbers, row_lines
from srd_lightning.criteria import base as criteria_base
from srd_lightning.curation.reflection import fixed_batches
from srd_lightning.curation.student_source import ReflectingStudent
from srd_lightning.errors import DataError, MissingDataError, ResumeError, SettingError
from srd_lightning.evaluation.bootstrap import paired_difference
from srd_lightning.evaluation.result_files import paired_values, write_results
from srd_lightning.evaluation.text_metrics import rouge_l
from srd_lightning.models.generation import Decoding, generate_ids

LIMIT = 6
PROTOCOL = EvaluationProtocol(seeds=(3, 4), decoding=Decoding(max_new_tokens=LIMIT, temperature=1.0))
CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.fixture
def model(tokenizer):
    """A model that ends some of its answers by itself."""
    model = lively_model()
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] *= 3
    return model


@pytest.fixture
def rows(tokenizer):
    return tokenised(tokenizer, make_rows(7))


@pytest.fixture
def evaluate(model, tokenizer, rows, tmp_path):
    """Evaluate with these settings; returns what was found."""

    def run(folder="kept", rows=rows, teacher=None, protocol=PROTOCOL, tokens=100, model=model, vocabulary=None):
        evaluator = Evaluator(protocol, tokens, 1, teacher, lambda _: vocabulary)
        student = ReflectingStudent(model, None, tokenizer, PLAIN)
        return evaluator.evaluate(rows, model, student, tmp_path / folder)

    return run


def of_files(found):
    return json.dumps([numbers(found, {}), list(answer_lines(found)), list(row_lines(found))])


def probabilities(model, ids, prompt):
    """What a model says of each token behind a prompt, in fp64, without padding or batches."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    return [references.softmax(logits[place - 1]) for place in range(prompt, len(ids))]


def greedy(model, prompt, end):
    answer = []
    while len(answer) < LIMIT and (not answer or answer[-1] != end):
        with torch.no_grad():
            answer.append(int(model(torch.tensor([prompt + answer])).logits[0, -1].argmax()))
    return answer


def test_each_row_is_measured_as_if_it_were_alone(evaluate, model, tokenizer, rows):
    teacher = lively_model(seed=1)
    found = evaluate(teacher=teacher)
    lines, predictions, losses, kls = {line["id"]: line for line in row_lines(found)}, [], [], []
    answers = {line["id"]: line for line in answer_lines(found) if line["seed"] is None}
    for row in rows:
        line, length, ids = lines[row["id"]], row["prompt_length"], row["input_ids"]
        q, p = probabilities(model, ids, length), probabilities(teacher, ids, length)
        nll = [-float(said[token].log()) for said, token in zip(q, ids[length:], strict=True)]
        right = [int(said.argmax()) == token for said, token in zip(q, ids[length:], strict=True)]
        kl = [float(references.forward_kl(*pair)) for pair in zip(p, q, strict=True)]
        own = greedy(model, ids[:length], tokenizer.eos_token_id)
        own_q, own_p = (probabilities(one, ids[:length] + own, length) for one in (model, teacher))
        expected = {
            "response_tokens": len(ids) - length,
            "nll": np.mean(nll),
            "accuracy": np.mean(right),
            "confidence": np.mean([float(said.max()) for said in q]),
            "kl": np.mean(kl),
            "top1": np.mean([int(a.argmax()) == int(b.argmax()) for a, b in zip(p, q, strict=True)]),
            "own_kl": np.mean([float(references.forward_kl(*pair)) for pair in zip(own_p, own_q, strict=True)]),
            "own_top1": np.mean([int(a.argmax()) == int(b.argmax()) for a, b in zip(own_p, own_q, strict=True)]),
            "greedy_tokens": len(own),
            "greedy_cut": float(own[-1] != tokenizer.eos_token_id),
        }
        assert {name: line[name] for name in expected} == pytest.approx(expected, rel=1e-4)
        text = tokenizer.decode(own, skip_special_tokens=True).strip()
        answer = answers[row["id"]]
        assert (answer["answer"], answer["tokens"], answer["reference"]) == (text, len(own), row["response"])
        assert answer["rouge_l"] == line["greedy_rouge_l"] == rouge_l(row["response"], text)
        predictions += [(float(said.max()), hit) for said, hit in zip(q, right, strict=True)]
        losses, kls = losses + nll, kls + kl
    means = metrics(found)
    assert means["nll"]["mean"] == pytest.approx(np.mean(losses), rel=1e-5)  # over all tokens, not over rows
    assert means["kl"]["mean"] == pytest.approx(np.mean(kls), rel=1e-5)
    assert means["ece"]["mean"] == pytest.approx(references.calibration_error(predictions, 15), rel=1e-4)
    assert all(one["low"] <= one["mean"] <= one["high"] for name, one in means.items() if name != "ece")  # biased
    bins = numbers(found, {})["calibration"]
    assert sum(one["tokens"] for one in bins) == len(losses)
    assert {line["greedy_cut"] for line in lines.values()} == {0.0, 1.0}


def test_sampled_answers_are_those_of_their_seed(evaluate, model, tokenizer, rows):
    found = evaluate(tokens=1)  # each row a batch of its own
    answers = {(line["id"], line["seed"]): line for line in answer_lines(found)}
    assert len(answers) == 7 * 3
    for number, batch in enumerate(fixed_batches(rows, 1, PROTOCOL.decoding)):
        (row,) = rows.select(batch)
        for seed in PROTOCOL.seeds:
            prompt = row["input_ids"][: row["prompt_length"]]
            (ids,) = generate_ids(model, tokenizer, [prompt], replace(PROTOCOL.decoding, seed=0), seed + number)
            line = answers[row["id"], seed]
            assert (line["tokens"], line["cut"]) == (len(ids), ids[-1] != tokenizer.eos_token_id)
    means = metrics(found)
    by_seed = [np.mean([line["rouge_l"] for (_, of), line in answers.items() if of == seed]) for seed in (3, 4)]
    assert list(means["rouge_l"]["by_seed"].values()) == pytest.approx(by_seed)
    assert means["rouge_l"]["sd"] == pytest.approx(abs(by_seed[0] - by_seed[1]) / 2**0.5)
    of_seed = {seed: [answers[row, seed]["answer"] for row in rows["id"]] for seed in (None, 3, 4)}
    assert of_seed[3] != of_seed[4] != of_seed[None]
    again = evaluate("others", protocol=replace(PROTOCOL, seeds=(4,)), tokens=1)
    texts = [line["answer"] for line in answer_lines(again) if line["seed"] == 4]
    assert texts == of_seed[4]  # whichever other seeds there are


def test_a_stopped_evaluation_goes_on_and_gives_the_same_files(evaluate, monkeypatch, model):
    whole, calls = of_files(evaluate("whole", teacher=lively_model(seed=1))), []

    def answer(*arguments, **options):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return generate_ids(*arguments, **options)

    monkeypatch.setattr(criteria_base, "generate_ids", answer)
    with pytest.raises(KeyboardInterrupt):
        evaluate(teacher=lively_model(seed=1))
    assert of_files(evaluate(teacher=lively_model(seed=1))) == whole
    in_all = len(calls) - 1
    monkeypatch.setattr(model, "forward", None)
    assert of_files(evaluate(teacher=lively_model(seed=1))) == whole
    assert len(calls) - 1 == in_all


def test_without_a_teacher_or_seeds_there_is_nothing_of_them(evaluate):
    means = metrics(evaluate(protocol=replace(PROTOCOL, seeds=())))
    assert list(means) == ["greedy_rouge_l", "greedy_tokens", "greedy_cut", "nll", "accuracy", "ece"]


def test_another_teacher_is_another_measurement(evaluate):
    greedy_only = replace(PROTOCOL, seeds=())
    found = [metrics(evaluate(teacher=lively_model(seed), protocol=greedy_only))["kl"]["mean"] for seed in (1, 2, 1)]
    assert found[0] == found[2] != found[1]


class TestPairedValues:
    @pytest.fixture
    def folders(self, evaluate, tmp_path):
        for name, seed in (("a", 0), ("b", 5)):
            found = evaluate(model=lively_model(seed), protocol=replace(PROTOCOL, seeds=()))
            write_results(tmp_path / name, numbers(found, {}), answer_lines(found), row_lines(found))
        return tmp_path / "a", tmp_path / "b"

    def test_are_of_the_same_rows_whatever_their_order(self, folders):
        first, second = paired_values(*folders, "nll")
        lines = (folders[1] / "rows.jsonl").read_text().splitlines()
        (folders[1] / "rows.jsonl").write_text("\n".join(reversed(lines)))
        np.testing.assert_array_equal(paired_values(*folders, "nll"), (first, second))
        assert paired_difference(first, second).mean == pytest.approx(np.mean(first) - np.mean(second))

    def test_of_other_rows_or_measures_are_refused(self, folders, tmp_path):
        with pytest.raises(DataError, match="have no 'kl'; they have response_tokens, greedy_rouge_l"):
            paired_values(*folders, "kl")
        lines = (folders[1] / "rows.jsonl").read_text().splitlines()
        (folders[1] / "rows.jsonl").write_text("\n".join(lines[1:]))
        with pytest.raises(DataError, match="are of other rows, 1 stand in one of them only"):
            paired_values(*folders, "nll")
        with pytest.raises(MissingDataError, match="srd evaluate writes it"):
            paired_values(folders[0], tmp_path / "c", "nll")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"seeds": (1, 1)}, "protocol.seeds must be different ones"),
        ({"decoding": Decoding()}, "temperature must be positive, for 5 answers are sampled"),
        ({"decoding": Decoding(temperature=1.0, max_length_ratio=2.0)}, "which would tell the model its length"),
    ],
)
def test_a_protocol_that_cannot_be_is_refused(settings, says):
    with pytest.raises(SettingError, match=says):
        EvaluationProtocol(**settings)


OPTIONS = [
    "--seed_everything=0",
    "--protocol.seeds=[1]",
    "--protocol.decoding.max_new_tokens=6",
    "--data.reflection_tokens=1024",
]
FILES = ("evaluation.json", "answers.jsonl", "rows.jsonl")


def debug(*more):
    return [f"--config={CONFIGS / 'debug.yaml'}", *OPTIONS, *more]


def contents(folder):
    return [(Path(folder) / name).read_bytes() for name in FILES]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one rank makes of the debug recipe, and where."""
    folder = tmp_path_factory.mktemp("alone")
    cli.run(["evaluate", *debug(f"--trainer.default_root_dir={folder}")])
    return folder / "evaluation"


@pytest.mark.parametrize("strategy", [["--trainer.strategy=ddp"], [f"--config={CONFIGS / 'fsdp2.yaml'}"]])
def test_two_ranks_write_the_bytes_of_one(strategy, alone, tmp_path):
    arguments = debug(*strategy, "--trainer.accelerator=cpu", "--trainer.devices=2", "--model.teacher_cache=none")
    code, _, error = run_cli(["evaluate", *arguments], tmp_path, ranks=2)
    assert code == 0, error
    assert contents(tmp_path / "runs/debug/evaluation") == contents(alone)


def test_numbers_are_those_of_test(alone, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tested = cli.run(["test", debug()[0], "--model.decoding.max_new_tokens=6"]).trainer.callback_metrics
    found = json.loads((alone / "evaluation.json").read_text())
    assert found["rows"] == 8
    for name, of_test in {"nll": "nll", "kl": "kl", "greedy_rouge_l": "rouge_l"}.items():
        assert found["metrics"][name]["mean"] == pytest.approx(float(tested[f"test_{of_test}"]), rel=1e-4)


@pytest.mark.filterwarnings("ignore:the values of")  # the run is shorter than the recipe's schedule
def test_a_trained_student_from_its_export_and_from_its_checkpoint(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = cli.run(["fit", f"--config={CONFIGS / 'debug.yaml'}", "--trainer.max_epochs=1"])
    run.trainer.save_checkpoint("trained.ckpt")
    with pytest.raises(SettingError, match="evaluate needs a trainer that has run nothing before"):
        run.trainer.evaluate(run.model, run.datamodule)
    cli.run(["evaluate", *debug("--ckpt_path=trained.ckpt", "--path=of_checkpoint")])
    rows = yaml.safe_load((CONFIGS / "debug.yaml").read_text())["data"]["data"]["test"]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    student = {"class_path": "srd_lightning.Pretrained", "init_args": {"name": "runs/debug/student"}}
    options = [f"--model.student={json.dumps(student)}", "--sets.one=rows.jsonl", "--path=of_export"]
    cli.run(["evaluate", *debug(*options)])
    found = [json.loads(Path(folder, "evaluation.json").read_text()) for folder in ("of_checkpoint", "of_export")]
    of_teacher = {*AGREEMENT, *OWN}  # which is another random model where no student is made before it
    first, second = (one["metrics"] for one in found)
    assert first.keys() == second.keys() > of_teacher
    assert [first[name] for name in first.keys() - of_teacher] == [second[name] for name in first.keys() - of_teacher]
    assert found[1]["settings"]["student"] == "runs/debug/student"
    two = ["--sets.one=rows.jsonl", "--sets.two=rows.jsonl", "--path=of_two", "--protocol.seeds=[]"]
    capsys.readouterr()
    cli.run(["evaluate", *debug("--ckpt_path=trained.ckpt", *two)])
    assert contents("of_two/one")[1:] == contents("of_two/two")[1:]
    said = capsys.readouterr().out
    assert "one: 8 rows" in said
    assert "two: 8 rows" in said
    for checkpoint, says in {"none.ckpt": "is not there", "runs": "is a sharded checkpoint; make one file"}.items():
        with pytest.raises((MissingDataError, ResumeError), match=says):
            cli.run(["evaluate", *debug(f"--ckpt_path={checkpoint}")])
    torch.save({"state_dict": {}}, "other.ckpt")
    with pytest.raises(ResumeError, match="does not hold the weights of this module's student"):
        cli.run(["evaluate", *debug("--ckpt_path=other.ckpt")])
    with pytest.raises(SettingError, match="where a name becomes a folder's"):
        cli.run(["evaluate", *debug("--sets", json.dumps({"a/b": "rows.jsonl"}))])


def test_the_papers_protocol_is_on_top_of_a_recipe(capsys):
    recipes = [f"--config={CONFIGS / name}" for name in ("gpt2_dolly.yaml", "paper_evaluation.yaml")]
    with pytest.raises(SystemExit, match="0"):
        cli.run(["evaluate", *recipes, "--print_config"])
    merged = yaml.safe_load(capsys.readouterr().out)
    assert merged["protocol"]["seeds"] == [10, 20, 30, 40, 50]
    assert len(merged["sets"]) == 5
    decoding = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "no_repeat_ngram_size": 6, "max_new_tokens": 256}
    assert {name: merged["protocol"]["decoding"][name] for name in decoding} == decoding
    assert (merged["data"]["max_prompt_length"], merged["data"]["max_length"]) == (256, 512)
