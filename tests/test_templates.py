import pytest

from srd_lightning.data.templates import ALPACA, ChatTemplate, Example, PromptTemplate
from srd_lightning.errors import DataError

PLAIN = PromptTemplate(with_input="Q: {instruction} [{input}]\nA: ", without_input="Q: {instruction}\nA: ")


class FakeTokenizer:
    """Writes ``role: content`` lines, and the name of the assistant where it speaks next."""

    chat_template = "role: content"

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert not tokenize
        lines = "".join(f"{turn['role']}: {turn['content']}\n" for turn in messages)
        return f"{lines}assistant: " if add_generation_prompt else lines


def chat(**arguments):
    return ChatTemplate(**arguments).bind(FakeTokenizer())


def messages(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def test_alpaca_with_input():
    row = {"instruction": "Add the numbers.", "input": "1 + 1", "output": "2"}
    assert ALPACA(row) == Example(
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd the numbers.\n\n### Input:\n1 + 1\n\n### Response:\n",
        "2",
    )


@pytest.mark.parametrize("extra", [{}, {"input": ""}, {"input": None}], ids=["absent", "empty", "none"])
def test_alpaca_without_input(extra):
    assert ALPACA({"instruction": "Say hello.", "output": "Hello!", **extra}) == Example(
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSay hello.\n\n### Response:\n",
        "Hello!",
    )


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Hi", "output": "Hello"},
        {"prompt": "Hi", "response": "Hello"},
        {"prompt": "Hi", "completion": "Hello"},
        messages(("user", "Hi"), ("assistant", "Hello")),
    ],
    ids=["instruction_output", "prompt_response", "prompt_completion", "messages"],
)
class TestEveryWayToSayARow:
    def test_prompt_template(self, row):
        assert PLAIN(row) == Example("Q: Hi\nA: ", "Hello")

    def test_chat_template(self, row):
        assert chat()(row) == Example("user: Hi\nassistant: ", "Hello")


def test_an_empty_answer_is_an_empty_response():
    assert PLAIN({"instruction": "Hi", "output": ""}).response == ""


def test_a_null_is_a_missing_field():
    with pytest.raises(
        DataError, match="expected a field output or response or completion or answer, but the row has instruction"
    ):
        PLAIN({"instruction": "Hi", "output": None})


def test_braces_of_the_data_are_kept():
    row = {"instruction": "Fix {x} and {}", "input": "{{y}} {0}", "output": "{z}"}
    assert PLAIN(row) == Example("Q: Fix {x} and {} [{{y}} {0}]\nA: ", "{z}")


@pytest.mark.parametrize(
    ("instruction", "context", "prompt"),
    [
        ("What is {input}?", "a field", "Q: What is {input}? [a field]\nA: "),
        ("What is {input}?", "", "Q: What is {input}?\nA: "),
        ("What is this?", "{instruction} {input}", "Q: What is this? [{instruction} {input}]\nA: "),
    ],
    ids=["in_instruction", "in_instruction_without_input", "in_input"],
)
def test_placeholders_in_the_data_are_not_filled(instruction, context, prompt):
    assert PLAIN({"instruction": instruction, "input": context, "output": ""}).prompt == prompt


def test_input_may_stand_before_the_instruction():
    template = PromptTemplate("{input}\n{instruction}\n", "{instruction}\n")
    row = {"instruction": "Shorten {input}.", "input": "A {instruction} text", "output": ""}
    assert template(row).prompt == "A {instruction} text\nShorten {input}.\n"


def test_a_placeholder_may_stand_twice():
    template = PromptTemplate("{instruction} {input} {instruction} {input}", "{instruction} {instruction}")
    assert template({"instruction": "Add", "input": "1", "output": ""}).prompt == "Add 1 Add 1"


def test_prompt_template_binds_to_itself():
    assert PLAIN.bind(FakeTokenizer()) is PLAIN


def test_chat_puts_the_input_under_the_instruction():
    row = {"instruction": "Add.", "input": "1 + 1", "output": "2"}
    assert chat()(row) == Example("user: Add.\n\n1 + 1\nassistant: ", "2")


def test_chat_puts_its_system_message_first():
    row = {"instruction": "Hi", "output": "Hello"}
    assert chat(system="Be kind.")(row).prompt == "system: Be kind.\nuser: Hi\nassistant: "


def test_chat_keeps_the_system_message_of_the_row():
    row = messages(("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"))
    assert chat(system="Be kind.")(row).prompt == "system: Be brief.\nuser: Hi\nassistant: "


def test_chat_renders_all_turns_but_the_last():
    row = messages(("user", "Hi"), ("assistant", "Hello"), ("user", "How are you?"), ("assistant", "Fine."))
    assert chat(system="Be kind.")(row) == Example(
        "system: Be kind.\nuser: Hi\nassistant: Hello\nuser: How are you?\nassistant: ", "Fine."
    )


def test_chat_does_not_change_the_row():
    row = messages(("user", "Hi"), ("assistant", "Hello"))
    chat(system="Be kind.")(row)
    assert row == messages(("user", "Hi"), ("assistant", "Hello"))


def test_bind_keeps_the_system_message_and_leaves_the_original():
    template = ChatTemplate(system="Be kind.")
    assert template.bind(FakeTokenizer()).system == "Be kind."
    assert template.tokenizer is None


@pytest.mark.parametrize("template", [PLAIN, chat()], ids=["prompt_template", "chat_template"])
@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"ask": "Hi", "output": "Hello"}, "instruction or prompt or question or query, but the row has ask, output"),
        ({"prompt": "Hi", "say": "Hello"}, "output or response or completion or answer, but the row has prompt, say"),
        ({}, "the row has no field"),
    ],
    ids=["no_instruction", "no_response", "empty_row"],
)
def test_missing_field_names_what_the_row_has(template, row, message):
    with pytest.raises(DataError, match=message):
        template(row)


@pytest.mark.parametrize(
    ("with_input", "without_input", "message"),
    [
        ("{instruction}", "{instruction}", r"with_input must contain \{input\}"),
        ("{input}", "{instruction}", r"with_input must contain \{instruction\}"),
        ("{instruction}{input}", "hello", r"without_input must contain \{instruction\}, but is 'hello'"),
    ],
    ids=["with_input_lacks_input", "with_input_lacks_instruction", "without_input_lacks_instruction"],
)
def test_missing_placeholder(with_input, without_input, message):
    with pytest.raises(ValueError, match=message):
        PromptTemplate(with_input, without_input)


@pytest.mark.parametrize(
    ("row", "roles"),
    [
        (
            messages(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")),
            "user assistant user assistant",
        ),
        (messages(("system", "a"), ("user", "b"), ("assistant", "c")), "system user assistant"),
    ],
    ids=["multi_turn", "system"],
)
def test_prompt_template_takes_one_user_turn_only(row, roles):
    with pytest.raises(ValueError, match=f"the roles are '{roles}'; use ChatTemplate"):
        PLAIN(row)


@pytest.mark.parametrize("template", [PLAIN, chat()], ids=["prompt_template", "chat_template"])
@pytest.mark.parametrize(
    ("row", "roles"),
    [
        (messages(("user", "Hi")), "user"),
        (messages(("user", "Hi"), ("assistant", "Hello"), ("user", "Bye")), "user assistant user"),
        (messages(("assistant", "Hello")), "assistant"),
        (messages(), ""),
    ],
    ids=["question_only", "ends_with_user", "answer_only", "empty"],
)
def test_messages_must_end_with_an_answer(template, row, roles):
    with pytest.raises(ValueError, match=f"must end with an assistant turn .* the roles are '{roles}'"):
        template(row)


def test_tokenizer_without_chat_template():
    tokenizer = FakeTokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template; use a PromptTemplate"):
        ChatTemplate().bind(tokenizer)
