"""What a row says: its fields become a prompt and the reference response to it, text and nothing but text.

A row asks by ``instruction``, ``prompt``, ``question`` or ``query``, with an optional ``input`` or ``context``, and
answers by ``output``, ``response``, ``completion`` or ``answer``; or it has ``messages``. Of several names for one
thing the first that has a value counts. Whole numbers are text in one way only, so they are taken; whatever could
become text in several ways is refused: nobody would see what was trained on.

`PromptTemplate` fills a plain text, as the paper does; `ChatTemplate` uses the chat format that comes with the
tokenizer. A row that asks nothing has the prompt ``""``. The functions below them read the fields of a row.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, NamedTuple

from jinja2 import TemplateError

from srd_lightning.errors import DataError, ModelError, SettingError

PROMPT_FIELDS = ("instruction", "prompt", "question", "query")
CONTEXT_FIELDS = ("input", "context")
RESPONSE_FIELDS = ("output", "response", "completion", "answer")
TURNS_FIELDS = ("messages", "conversations", "conversation")
TEXT_FIELDS = frozenset((*PROMPT_FIELDS, *CONTEXT_FIELDS, *RESPONSE_FIELDS))
NOT_TEXT = ("tool_calls", "function_call", "tools", "functions", "images", "image", "audio", "video", "videos")
"""Fields of rows and turns that a model would have to be given too; a row that has one is not trained on without."""
THOUGHTS = ("reasoning_content", "thinking")
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant"}
"""What ShareGPT calls the speakers."""
Turn = dict[str, str]


class Example(NamedTuple):
    """A filled prompt and the reference response to it; the response of a row without one is ``""``."""

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
                `srd_lightning.data.templates`.

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


def instruction_of(row: Mapping[str, Any]) -> str:
    """Return what the row asks for, whatever the field is called."""
    return _first(row, PROMPT_FIELDS)


def context_of(row: Mapping[str, Any]) -> str:
    """Return what the row's question is about, ``""`` where it does not say."""
    return next((text_of(row[name], name) for name in CONTEXT_FIELDS if not is_missing(row.get(name))), "")


def response_of(row: Mapping[str, Any]) -> str:
    """Return the reference response of the row, whatever the field is called."""
    return _first(row, RESPONSE_FIELDS)


def with_response(row: Mapping[str, Any], response: str) -> dict[str, Any]:
    """Return a row with another response in the place of its own, or with one where it had none.

    Args:
        row: As for `PromptTemplate` or `ChatTemplate`.
        response: Text.

    Example:
        >>> with_response({"question": "1 + 1?", "answer": "3", "source": None}, "2")
        {'question': '1 + 1?', 'output': '2'}
        >>> with_response({"messages": [{"role": "user", "content": "Hi"}]}, "Hello")["messages"][-1]
        {'role': 'assistant', 'content': 'Hello'}
    """
    if has_turns(row):
        turns = turns_of(row)
        context = turns[:-1] if turns[-1]["role"] == "assistant" else turns
        own: tuple[str, Any] = "messages", [*context, {"role": "assistant", "content": response}]
    else:
        own = "output", response
    others = TURNS_FIELDS if has_turns(row) else RESPONSE_FIELDS
    return dict([*((name, row[name]) for name in row if name not in others and not is_missing(row[name])), own])


def has_turns(row: Mapping[str, Any]) -> bool:
    """Return whether the row is a conversation."""
    return any(not is_missing(row.get(name)) for name in TURNS_FIELDS)


def turns_of(row: Mapping[str, Any]) -> list[Turn]:
    """Return the turns of a row, each a ``role`` and its ``content``.

    Args:
        row: Has ``messages`` (or ``conversations``): a list of turns with ``role`` and ``content``, or ``from`` and
            ``value``. Content is text, or a list of parts that are all text.

    Raises:
        DataError: A turn is something else, or brings along what is no text.

    Example:
        >>> turns_of({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]})
        [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello'}]
    """
    name = next(name for name in TURNS_FIELDS if not is_missing(row.get(name)))
    turns = row[name]
    if not isinstance(turns, Sequence) or isinstance(turns, (str, bytes)):
        raise DataError(f"{name} must be a list of turns, but is {kind_of(turns)}")
    return [_turn(turn, f"{name}[{number}]") for number, turn in enumerate(turns)]


def _turn(turn: Any, place: str) -> Turn:
    if not isinstance(turn, Mapping):
        raise DataError(f"{place} must have role and content, but is {kind_of(turn)}")
    check_only_text(turn, place)
    if thoughts := [name for name in THOUGHTS if turn.get(name)]:
        raise DataError(f"{place} has {thoughts[0]} beside its content; write it into the content, or remove the field")
    role_name, content_name = ("from", "value") if "from" in turn else ("role", "content")
    role, content = turn.get(role_name), turn.get(content_name)
    if not isinstance(role, str):
        raise DataError(f"{place} must have role and content, or from and value, but has {', '.join(map(str, turn))}")
    if is_missing(content):
        raise DataError(f"every turn needs content, but {place} of {role} has none")
    return {
        "role": ROLES.get(role, text_of(role, f"{place}.{role_name}")),
        "content": text_of(content, f"{place}.{content_name}"),
    }


def check_only_text(fields: Mapping[str, Any], place: str = "the row") -> None:
    """Check that a row or turn brings along nothing but text.

    Raises:
        DataError: It has tools, images or the like.
    """
    for name in NOT_TEXT:
        if name in fields and not _is_empty(fields[name]):
            raise DataError(
                f"{place} has {name}, which is not trained on; write it into the text, or leave the row out"
            )


def _is_empty(value: Any) -> bool:
    return is_missing(value) or (isinstance(value, Sized) and not len(value))


def is_missing(value: Any) -> bool:
    """Return whether a value is null, or the NaN that tables have for it."""
    return value is None or (isinstance(value, float) and value != value)


def text_of(value: Any, name: str) -> str:
    r"""Return a value as the text that stands there.

    Args:
        value: Text, a whole number, or a list of parts ``{"type": "text", "text": …}``, whose texts are joined.
        name: Of the field, for the message.

    Raises:
        DataError: It is something else, or no text that can be written as UTF-8.

    Example:
        >>> text_of(7, "output"), text_of([{"type": "text", "text": "Hi"}], "content")
        ('7', 'Hi')
        >>> text_of(1.5, "output")
        Traceback (most recent call last):
        srd_lightning.errors.DataError: output must be text, but is the number 1.5; write it as text
    """
    if isinstance(value, str):
        if not value.isascii():
            _check_encodable(value, name)
        return value
    if isinstance(value, Integral) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, Iterable) and not isinstance(value, (bytes, Mapping)):
        return _joined(list(value), name)
    raise DataError(f"{name} must be text, but is {kind_of(value)}; {_remedy(value)}")


def _joined(parts: Sequence[Any], name: str) -> str:
    """Return the text of content parts."""
    for number, part in enumerate(parts):
        if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else None
            raise DataError(
                f"{name} must be text, but is a list whose entry {number} is {kind or kind_of(part)}; only text is "
                'trained on: give text, or parts that are all {"type": "text", "text": …}'
            )
    return "".join(text_of(part["text"], name) for part in parts)


def _check_encodable(text: str, name: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{name} has half a surrogate pair, {text[error.start]!r}, as character {error.start}, which is no text; "
            "the text was cut inside a character: repair it, or leave the row out"
        ) from None


def kind_of(value: Any) -> str:
    """Say what a value is that should be something else."""
    if isinstance(value, (bool, float)):
        return f"the {'truth value' if isinstance(value, bool) else 'number'} {value}"
    names: dict[type, str] = {str: "text", dict: "an object", list: "a list", tuple: "a tuple", type(None): "null"}
    return names.get(type(value), type(value).__name__)


def _remedy(value: Any) -> str:
    if isinstance(value, bytes):
        return "decode it first"
    if isinstance(value, Mapping):
        return "write one object per row, with a text in each field"
    return "write it as text"


def _first(row: Mapping[str, Any], names: Sequence[str]) -> str:
    for name in names:
        if not is_missing(row.get(name)):
            return text_of(row[name], name)
    present = ", ".join(str(name) for name, value in row.items() if not is_missing(value))
    raise DataError(f"expected a field {' or '.join(names)}, but the row has {present or 'no field'}")


def fields_read(row: Mapping[str, Any]) -> set[str]:
    """Return the names of the fields that a template takes of a row.

    Example:
        >>> sorted(fields_read({"instruction": "Add.", "prompt": "Add!", "context": None, "output": "2"}))
        ['instruction', 'output']
    """
    present = [name for name, value in row.items() if not is_missing(value)]
    kinds = (TURNS_FIELDS,) if has_turns(row) else (PROMPT_FIELDS, CONTEXT_FIELDS, RESPONSE_FIELDS)
    return {next(name for name in kind if name in present) for kind in kinds if any(name in present for name in kind)}


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
