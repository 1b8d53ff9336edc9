"""Tokens: what a model knows, what its tokenizer makes, and whether two models mean the same by them."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from srd_lightning.errors import ModelError


def check_same_tokenizer(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Check that token ids mean the same to both models.

    Raises:
        ModelError: The vocabularies differ.
    """
    student_vocab, teacher_vocab = student.get_vocab(), teacher.get_vocab()
    if student_vocab != teacher_vocab:
        different = student_vocab.items() ^ teacher_vocab.items()
        raise ModelError(
            f"student and teacher have different tokenizers ({len(student_vocab)} and {len(teacher_vocab)} tokens, "
            f"{len({token for token, _ in different})} differ), so their distributions cannot be compared; "
            "choose two models of one family"
        )


def check_ends(tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that a tokenizer can end a response.

    Raises:
        ModelError: It has no end token.
    """
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer {tokenizer.name_or_path or type(tokenizer).__name__} has no eos_token, so no response "
            "would end; set tokenizer.eos_token to the token that ends an answer, and save it beside the model"
        )


def check_tokens(size: int | None, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Check that a model has an embedding for each token that rows can contain.

    Tokens that were added to a tokenizer count where it pads, begins or ends texts with them, or its chat template
    names them: Gemma 3 has one for images, of which its language model knows nothing.

    Args:
        size: Tokens that the model knows, if it says so.
        tokenizer: Of the rows.
        name: Of the model, for the message.

    Raises:
        ModelError: There is a token beyond the last that the model knows.
    """
    if size is None:
        return
    template = str(getattr(tokenizer, "chat_template", None) or "")
    ends = {token for token in tokenizer.special_tokens_map.values() if isinstance(token, str)}  # lists have no place
    added = tokenizer.get_added_vocab()
    beyond = {
        token: number
        for token, number in tokenizer.get_vocab().items()
        if number >= size and (token not in added or token in ends or token in template)
    }
    if beyond:
        token, last = max(beyond.items(), key=lambda item: item[1])
        raise ModelError(
            f"{name} knows {size} tokens, but the tokenizer goes up to {last} ({token!r}); choose the tokenizer that "
            "belongs to the model, or make room with model.resize_token_embeddings and save it"
        )


def vocabulary_size(model: object) -> int | None:
    """Return how many tokens a model gives logits, if it says so before it is run."""
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    return None if head is None else int(head.weight.shape[0])


def shared_vocabulary(
    student: int | None, teacher: int | None, tokenizer: PreTrainedTokenizerBase | None
) -> int | None:
    """Return how many tokens of two heads are compared, where one has more rows than any tokenizer uses.

    Args:
        student: Tokens of the student's head, if they are known.
        teacher: Tokens of the teacher's head, if they are known.
        tokenizer: Of both, where they were seen to be the same.

    Returns:
        How many, or nothing where all are.

    Raises:
        ModelError: The heads differ by tokens that are used, or nobody knows.

    Example:
        >>> shared_vocabulary(384, 384, tokenizer=None) is None
        True
    """
    if student is None or teacher is None or student == teacher:
        return None
    sizes = f"student and teacher give logits of {student} and {teacher} tokens"
    if tokenizer is None:
        raise ModelError(
            f"{sizes}, and their tokenizers are not known to be the same; give both as Pretrained, so that this can be "
            "checked, or choose two models of one family"
        )
    used = max(tokenizer.get_vocab().values()) + 1
    if used > min(student, teacher):
        raise ModelError(f"{sizes}, but their tokenizer uses {used}; choose two models of one family")
    return min(student, teacher)
