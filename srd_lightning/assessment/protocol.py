"""`EvaluationProtocol`: how the answers come about by which a model is measured."""

from __future__ import annotations

from dataclasses import dataclass, replace

from srd_lightning.errors import SettingError
from srd_lightning.models.generation import Decoding


@dataclass(frozen=True)
class EvaluationProtocol:
    """One greedy answer per row, and one that is sampled per row and seed.

    By default as the paper: temperature 1, all tokens, five seeds, at most 256 tokens after a prompt of at most 256;
    ``configs/paper_evaluation.yaml`` has what else its authors' code does.

    Args:
        seeds: Of the sampling, each an answer to every row; none for the greedy answer alone.
        decoding: How answers are sampled; the greedy one has the same limits, and temperature 0.

    Raises:
        SettingError: A seed stands twice, there is nothing to sample by, or the reference bounds the answer.

    Example:
        >>> [decoding.temperature for decoding in EvaluationProtocol(seeds=(1, 2)).decodings().values()]
        [0.0, 1.0, 1.0]
    """

    seeds: tuple[int, ...] = (10, 20, 30, 40, 50)
    decoding: Decoding = Decoding(temperature=1.0)  # noqa: RUF009 (frozen)

    def __post_init__(self) -> None:
        """Check the settings."""
        if len(set(self.seeds)) < len(self.seeds):
            raise SettingError(f"protocol.seeds must be different ones, but are {list(self.seeds)}")
        if self.seeds and self.decoding.temperature == 0:
            raise SettingError(
                f"protocol.decoding.temperature must be positive, for {len(self.seeds)} answers are sampled, but is 0; "
                "set protocol.seeds to [] for the greedy answer alone"
            )
        if self.decoding.max_length_ratio is not None:
            raise SettingError(
                "protocol.decoding.max_length_ratio bounds an answer by the reference response, which would tell the "
                "model its length; set protocol.decoding.max_new_tokens"
            )

    def decodings(self) -> dict[int | None, Decoding]:
        """Return how the answers of each seed come about; ``None`` is the greedy one."""
        greedy: dict[int | None, Decoding] = {None: replace(self.decoding, temperature=0.0)}
        return {**greedy, **{seed: replace(self.decoding, seed=seed) for seed in self.seeds}}
