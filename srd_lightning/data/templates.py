"""A row of data becomes a prompt and the response that is true for it.

`fields` says what the fields of a row may be called. `PromptTemplate` fills a plain text, as the paper
does; `ChatTemplate` uses the chat format that comes with the tokenizer. A row that asks nothing has the prompt ``""``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from jinja2 import TemplateError

from srd_lightning.data.fields import (
    Turn,
    check_only_text,
    context_of,
    has_turns,
    instruction_of,
    response_of,
    turns_of,
)
from srd_lightning.errors import DataError, ModelError, SettingError


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
        SettingError: A placeholder is missing.

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
                    raise SettingError(f"{name} must contain {placeholder}, but is {getattr(self, name)!r}")

    def __call__(self, row: Mapping[str, Any]) -> Example:
        """Fill the template with one row.

        Args:
            row: With a question and an answer, or ``messages`` of one user turn and its answer; see
                `srd_lightning.data.fields`.

        Returns:
            The prompt and the response.

        Raises:
            DataError: The row lacks one of them (the message names what it has), one is no text, or ``messages`` has
                several turns (`ChatTemplate` takes those).
        """
        check_only_text(row)
        if not has_turns(row):
            return Example(self._fill(instruction_of(row), context_of(row)), response_of(row))
        *context, answer = _conversation(row)
        if [turn["role"] for turn in context] != ["user"]:
            roles = " ".join(turn["role"] for turn in (*context, answer))
            raise DataError(
                f"PromptTemplate takes one user turn and its answer, but the roles are {roles!r}; use ChatTemplate"
            )
        return Example(self._fill(context[0]["content"], ""), answer["content"])

    def bind(self, tokenizer: Any) -> PromptTemplate:
        """Return the template itself: plain text is the same for every tokenizer."""
        return self

    def _fill(self, instruction: str, context: str) -> str:
        if _is_blank(instruction, context):
            return ""
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

        Raises:
            DataError: As for `PromptTemplate`, or the tokenizer's template refuses the row.
        """
        check_only_text(row)
        if has_turns(row):
            *context, answer = _conversation(row)
            response, last = answer["content"], context[-1]["content"]
        else:
            last = "\n\n".join(part for part in (instruction_of(row), context_of(row)) if part)
            context, response = [{"role": "user", "content": last}], response_of(row)
        if _is_blank(last):
            return Example("", response)
        if self.system is not None and context[0]["role"] != "system":
            context = [{"role": "system", "content": self.system}, *context]
        try:
            prompt: str = self.tokenizer.apply_chat_template(context, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            roles = " ".join(turn["role"] for turn in context)
            raise DataError(
                f"the tokenizer's chat template refuses the row, whose roles before the answer are {roles!r}: {error}"
            ) from error
        return Example(prompt, response)

    def bind(self, tokenizer: Any) -> ChatTemplate:
        """Return the same template with this tokenizer.

        Raises:
            ModelError: The tokenizer has no chat template.
        """
        if getattr(tokenizer, "chat_template", None) is None:
            raise ModelError("the tokenizer has no chat template; use a PromptTemplate such as ALPACA")
        return replace(self, tokenizer=tokenizer)


def _conversation(row: Mapping[str, Any]) -> list[Turn]:
    turns = turns_of(row)
    if len(turns) < 2 or turns[-1]["role"] != "assistant":
        roles = " ".join(turn["role"] for turn in turns)
        raise DataError(
            f"messages must end with an assistant turn after at least one other, but the roles are {roles!r}"
        )
    return turns


def _is_blank(*texts: str) -> bool:
    return not any(text.strip() for text in texts)
