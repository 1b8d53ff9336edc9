"""A row of data becomes a prompt and the response that is true for it.

A row says its text in one of three ways: ``instruction`` (with an optional ``input``) and ``output``; ``prompt`` and
``response``; or ``messages`` as chat models take them. `PromptTemplate` fills a plain text, as the paper does;
`ChatTemplate` uses the chat format that comes with the tokenizer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

INSTRUCTION_FIELDS = ("instruction", "prompt")
RESPONSE_FIELDS = ("output", "response", "completion")


class Example(NamedTuple):
    """A filled prompt and the true response to it; the response of a row without one is ``""``."""

    prompt: str
    response: str


@dataclass(frozen=True)
class PromptTemplate:
    r"""A plain-text template: ``{instruction}`` and ``{input}`` are replaced, everything else is kept.

    Args:
        with_input: Text for rows that have an ``input``; must contain ``{instruction}`` and ``{input}``.
        without_input: Text for rows that have none; must contain ``{instruction}``.

    Raises:
        ValueError: A placeholder is missing.

    Example:
        >>> template = PromptTemplate("{instruction}\n{input}\n", "{instruction}\n")
        >>> template({"instruction": "Add.", "input": "1 + 1", "output": "2"})
        Example(prompt='Add.\n1 + 1\n', response='2')
        >>> template({"prompt": "Say {hello}.", "response": "hello"})
        Example(prompt='Say {hello}.\n', response='hello')
    """

    with_input: str
    without_input: str

    def __post_init__(self) -> None:
        """Check that no placeholder is missing."""
        for name, placeholders in (("with_input", ("{instruction}", "{input}")), ("without_input", ("{instruction}",))):
            for placeholder in placeholders:
                if placeholder not in getattr(self, name):
                    raise ValueError(f"{name} must contain {placeholder}, but is {getattr(self, name)!r}")

    def __call__(self, row: Mapping[str, Any]) -> Example:
        """Fill the template with one row.

        Args:
            row: ``instruction | prompt`` and ``output | response | completion``, with an optional ``input``; or
                ``messages`` of one user turn and its answer.

        Returns:
            The prompt and the response.

        Raises:
            KeyError: The row has none of these fields; the message names what it has.
            ValueError: ``messages`` has several turns (`ChatTemplate` takes those).
        """
        if row.get("messages") is not None:
            *context, answer = _messages(row)
            if [turn["role"] for turn in context] != ["user"]:
                roles = " ".join(turn["role"] for turn in (*context, answer))
                raise ValueError(
                    f"PromptTemplate takes one user turn and its answer, but the roles are {roles!r}; use ChatTemplate"
                )
            return Example(self._fill(context[0]["content"], ""), answer["content"])
        return Example(self._fill(instruction_of(row), _optional(row, "input")), response_of(row))

    def bind(self, tokenizer: Any) -> PromptTemplate:
        """Return the template itself: plain text is the same for every tokenizer."""
        return self

    def _fill(self, instruction: str, context: str) -> str:
        text = self.with_input if context else self.without_input
        values = {"{instruction}": instruction, "{input}": context}
        return re.sub(r"\{instruction\}|\{input\}", lambda found: values[found[0]], text)


ALPACA = PromptTemplate(
    with_input=(
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
    ),
    without_input=(
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Response:\n"
    ),
)
"""The template of the paper (the same as Alpaca's and MiniLLM's)."""


@dataclass(frozen=True)
class ChatTemplate:
    """The chat format of the tokenizer, as its authors trained with it.

    Args:
        system: System message put before rows that bring none; ``None`` leaves it to the tokenizer's template.
        tokenizer: The tokenizer whose ``apply_chat_template`` is used; the data module binds its own.
    """

    system: str | None = None
    tokenizer: Any = None

    def __call__(self, row: Mapping[str, Any]) -> Example:
        """Render one row, all turns but the last as the prompt.

        Args:
            row: As for `PromptTemplate`; ``messages`` may have any number of turns.

        Returns:
            The prompt, ending where the assistant speaks next, and the last turn as the response.
        """
        if row.get("messages") is not None:
            *context, answer = _messages(row)
            response = answer["content"]
        else:
            text = "\n\n".join(part for part in (instruction_of(row), _optional(row, "input")) if part)
            context, response = [{"role": "user", "content": text}], response_of(row)
        if self.system is not None and context[0]["role"] != "system":
            context = [{"role": "system", "content": self.system}, *context]
        prompt: str = self.tokenizer.apply_chat_template(context, tokenize=False, add_generation_prompt=True)
        return Example(prompt, response)

    def bind(self, tokenizer: Any) -> ChatTemplate:
        """Return the same template with this tokenizer.

        Raises:
            ValueError: The tokenizer has no chat template.
        """
        if getattr(tokenizer, "chat_template", None) is None:
            raise ValueError("the tokenizer has no chat template; use a PromptTemplate such as ALPACA")
        return replace(self, tokenizer=tokenizer)


def instruction_of(row: Mapping[str, Any]) -> str:
    """Return what the row asks for, whatever the field is called."""
    return _field(row, INSTRUCTION_FIELDS)


def response_of(row: Mapping[str, Any]) -> str:
    """Return the true response of the row, whatever the field is called."""
    return _field(row, RESPONSE_FIELDS)


def _field(row: Mapping[str, Any], names: Sequence[str]) -> str:
    for name in names:
        if row.get(name) is not None:
            return str(row[name])
    present = ", ".join(name for name, value in row.items() if value is not None)
    raise KeyError(f"expected a field {' or '.join(names)}, but the row has {present or 'no field'}")


def _optional(row: Mapping[str, Any], name: str) -> str:
    return "" if row.get(name) is None else str(row[name])


def _messages(row: Mapping[str, Any]) -> Sequence[Mapping[str, str]]:
    messages: Sequence[Mapping[str, str]] = row["messages"]
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        roles = " ".join(turn["role"] for turn in messages)
        raise ValueError(
            f"messages must end with an assistant turn after at least one other, but the roles are {roles!r}"
        )
    if silent := [turn["role"] for turn in messages if turn.get("content") is None]:
        raise ValueError(f"every turn of messages needs content, but those of {', '.join(silent)} have none")
    return messages
