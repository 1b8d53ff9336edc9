"""How much memory a device needs, by a formula that is stated part by part. Without torch."""

from __future__ import annotations

from dataclasses import dataclass

VALUES_PER_LAYER = 17
"""Numbers of the width that a block keeps of a position for the backward pass, where attention keeps no scores:
34 bytes in half precision, arXiv 2205.05198, equation 1."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Args:
        parameters: Of the student.
        gradients: Of the weights that train.
        optimizer: Its state.
        teacher: Its weights, or its head where it is cached.
        activations: Of the largest batch, or part of one, kept for the backward pass.
        logits: Of a chunk, of student and teacher.
    """

    parameters: int
    gradients: int
    optimizer: int
    teacher: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """Sum of all."""
        return self.parameters + self.gradients + self.optimizer + self.teacher + self.activations + self.logits


@dataclass(frozen=True)
class Sizes:
    """What the memory depends on.

    Args:
        student: Bytes of the student's weights.
        trained: Of these, bytes of those that train.
        state: Bytes that the optimizer keeps for each byte that trains.
        teacher: Bytes of the teacher's weights, or of its head.
        ranks: Devices over which a strategy shards the student; 1 where it does not.
        teacher_ranks: Over which the teacher is sharded.
        positions: Of the largest batch, or part of one.
        layers: Of the student.
        width: Of its hidden states.
        vocabulary: Tokens of its head.
        chunk: Tokens whose logits exist at a time.
        teachers: 1 where a teacher's logits are made beside the student's, else 0.
        itemsize: Bytes of an activation.
        checkpointing: Whether a block keeps only what enters it.
    """

    student: int
    trained: int
    state: float
    teacher: int
    ranks: int
    teacher_ranks: int
    positions: int
    layers: int
    width: int
    vocabulary: int
    chunk: int
    teachers: int
    itemsize: int
    checkpointing: bool


def memory_of(sizes: Sizes) -> Memory:
    """Return what a device needs; that of temporary tensors, buffers of torch and communication comes on top.

    Args:
        sizes: Of models, batches and strategy.
    """
    blocks = sizes.layers + VALUES_PER_LAYER if sizes.checkpointing else sizes.layers * VALUES_PER_LAYER
    return Memory(
        parameters=sizes.student // sizes.ranks,
        gradients=sizes.trained // sizes.ranks,
        optimizer=round(sizes.trained * sizes.state) // sizes.ranks,
        teacher=sizes.teacher // sizes.teacher_ranks,
        activations=sizes.positions * sizes.width * blocks * sizes.itemsize,
        logits=sizes.chunk * sizes.vocabulary * (1 + sizes.teachers) * 4,
    )
