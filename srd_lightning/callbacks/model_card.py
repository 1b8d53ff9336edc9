"""`model_card`: what a student is and came of, as the ``README.md`` of its folder, from plain values.

What a run has used stands in `run_facts`. All text of users (paths, names, templates, settings) goes into code spans
and blocks that it cannot end, so that none of it is read as Markdown or HTML.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

PAPER = "https://arxiv.org/abs/2508.06135"
CITATION = """\
@article{liu2025less,
  title = {Less is More: Selective Reflection for Compatible and Efficient Knowledge Distillation in
    Large Language Models},
  author = {Liu and Zhang},
  journal = {arXiv preprint arXiv:2508.06135},
  year = {2025}
}"""


def model_card(facts: Mapping[str, Any]) -> ModelCard:
    """Return the card of a student.

    Args:
        facts: What is known, by name; all but ``name`` and ``student`` may be left out. ``name`` (folder or repository
            to load from), ``student`` and ``teacher`` (``name``, ``revision``, ``on_hub``, ``settings``), ``license``
            (fields of the head), ``datasets`` (of the hub), ``adapters``, ``encoder_decoder``, ``data`` (by split
            ``sources`` and ``rows``), ``training``, ``curriculum`` and ``decoding`` (values by name), ``prompts``
            (templates by name), ``measures`` (``values`` by name, ``rows``, ``step``, ``of_steps``, ``before``).

    Returns:
        Its head says ``base_model``, ``datasets``, ``library_name``, ``license`` and ``tags``, each as far as it is
        known.

    Example:
        >>> card = model_card({"name": "me/small", "student": {"name": "gpt2", "on_hub": True}})
        >>> card.data.to_dict()
        {'base_model': 'gpt2', 'library_name': 'transformers', 'tags': ['distillation', 'srd']}
    """
    student = facts["student"]
    head = ModelCardData(
        base_model=student["name"] if student.get("on_hub") else None,
        datasets=list(facts.get("datasets", ())) or None,
        library_name="peft" if facts.get("adapters") else "transformers",
        tags=["distillation", "srd"],
        **facts.get("license", {}),
    )
    sections = {
        "": _about(facts),
        "How to load it": _loading(facts),
        "Prompts": "\n\n".join(f"{name}:\n\n{block(text)}" for name, text in facts.get("prompts", {}).items()),
        "Data": "\n".join(map(_split, facts.get("data", {}).items())),
        "Curriculum": _values(facts.get("curriculum", {})),
        "Training": _values(facts.get("training", {})),
        "Decoding": _decoding(facts.get("decoding", {})),
        "Measures": _measures(facts.get("measures", {})),
        "Citation": block(CITATION, "bibtex"),
    }
    body = "\n\n".join((f"## {title}\n\n{text}" if title else text) for title, text in sections.items() if text)
    return ModelCard(f"---\n{head.to_yaml()}\n---\n\n{body}\n")


def span(value: object) -> str:
    """Return a value as a code span on one line.

    Example:
        >>> span("a`b <i>")
        '``a`b <i>``'
    """
    text = " ".join(str(value).split()) or " "
    fence = "`" * (_longest_run(text) + 1)
    edge = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{edge}{text}{edge}{fence}"


def block(text: str, language: str = "") -> str:
    """Return a text as a code block, whatever stands in it."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall(r"`+", text)), default=0)


def _about(facts: Mapping[str, Any]) -> str:
    lines = [
        f"# {span(facts['name'])}",
        "",
        f"A student of [Selective Reflection Distillation]({PAPER}), trained with `srd_lightning`.",
        "",
        f"- base model: {_model(facts['student'])}",
    ]
    if teacher := facts.get("teacher"):
        lines.append(f"- teacher: {_model(teacher)}")
    return "\n".join(lines)


def _model(model: Mapping[str, Any]) -> str:
    revision = f", revision {span(model['revision'])}" if model.get("revision") else ""
    settings = "".join(f", {name} {span(value)}" for name, value in model.get("settings", {}).items())
    return f"{span(model['name'])}{revision}{settings}"


def _loading(facts: Mapping[str, Any]) -> str:
    kind, start = "AutoModelForCausalLM", "inputs.input_ids.shape[1]"
    if facts.get("encoder_decoder"):
        kind, start = "AutoModelForSeq2SeqLM", "0"
    name = json.dumps(facts["name"], ensure_ascii=False)
    lines = f"""\
from transformers import {kind}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({name})
model = {kind}.from_pretrained({name})
inputs = tokenizer("…", return_tensors="pt")  # a prompt as under Prompts
answer = model.generate(**inputs, max_new_tokens=256)
print(tokenizer.decode(answer[0, {start}:], skip_special_tokens=True))"""
    needs = "These are adapters: `pip install peft`, and transformers load the base model along.\n\n"
    return f"{needs if facts.get('adapters') else ''}{block(lines, 'python')}"


def _split(item: tuple[str, Mapping[str, Any]]) -> str:
    split, data = item
    rows = "" if data.get("rows") is None else f": {data['rows']:,} rows"
    sources = ", ".join(map(span, data["sources"]))
    return f"- {span(split)}, {f'from {sources}' if sources else 'given in Python'}{rows}"


def _values(values: Mapping[str, Any]) -> str:
    return "\n".join(f"- {name}: {span(value)}" for name, value in values.items() if value is not None)


def _decoding(decoding: Mapping[str, Any]) -> str:
    said = "\n\nNone of this is in `generation_config.json`: that is the base model's, with the end token of training."
    return f"{_values(decoding)}{said}" if decoding else ""


def _measures(measures: Mapping[str, Any]) -> str:
    if not measures.get("values"):
        return ""
    rows = "" if measures.get("rows") is None else f" on {measures['rows']:,} rows"
    step, steps, before = (measures.get(name) for name in ("step", "of_steps", "before"))
    when = "" if step is None else f", after step {step:,} of {steps:,}"
    averaged = f", before {span(before)} averaged the weights" if before else ""
    names = "\n".join(f"| {span(name)} | {value:.6g} |" for name, value in measures["values"].items())
    return f"The last validation of the run{rows}{when}{averaged}:\n\n| measure | value |\n|---|--:|\n{names}"
