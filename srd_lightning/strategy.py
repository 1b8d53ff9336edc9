"""`FSDP2`: Lightning's strategy for sharded models, with sizes that suit distillation."""

from __future__ import annotations

from datetime import timedelta
from typing import Literal

from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.constants import default_pg_timeout


class FSDP2(ModelParallelStrategy):
    """Shards student and teacher over all processes; without it, Lightning's own would split layers within a node.

    Args:
        data_parallel_size: Processes that see different rows and hold a shard each; by default all.
        tensor_parallel_size: Processes that see the same rows.
        save_distributed_checkpoint: Each process writes its shard into a folder; else the first writes one file.
        process_group_backend: By default NCCL on GPUs and gloo on CPUs.
        timeout: For collective operations.

    Example:
        >>> FSDP2().sizes(num_processes=8)
        (8, 1)
    """

    def __init__(
        self,
        data_parallel_size: Literal["auto"] | int = "auto",
        tensor_parallel_size: int = 1,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__(
            data_parallel_size, tensor_parallel_size, save_distributed_checkpoint, process_group_backend, timeout
        )

    def sizes(self, num_processes: int) -> tuple[int, int]:
        """Return how many processes see different rows, and how many the same, of so many in all."""
        same = int(self._tensor_parallel_size)
        different = self._data_parallel_size
        return (num_processes // same if different == "auto" else different), same

    def setup_environment(self) -> None:
        """Settle the sizes before Lightning does."""
        self._data_parallel_size, self._tensor_parallel_size = self.sizes(self.num_nodes * self.num_processes)
        super().setup_environment()
