"""`FSDP2`: Lightning's strategy for sharded models, with sizes that suit distillation."""

from __future__ import annotations

from datetime import timedelta
from typing import Literal

from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.constants import default_pg_timeout

from srd_lightning.errors import SettingError


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
        sizes: dict[str, int | str] = {"tensor_parallel_size": tensor_parallel_size}
        if data_parallel_size != "auto":
            sizes["data_parallel_size"] = data_parallel_size
        if wrong := [f"{name}={size!r}" for name, size in sizes.items() if not isinstance(size, int) or size < 1]:
            raise SettingError(f"sizes must be whole numbers of at least 1, but {', '.join(wrong)}")
        super().__init__(
            data_parallel_size, tensor_parallel_size, save_distributed_checkpoint, process_group_backend, timeout
        )

    def sizes(self, num_processes: int) -> tuple[int, int]:
        """Return how many processes see different rows, and how many the same, of so many in all.

        Raises:
            SettingError: They do not multiply to the number of processes.
        """
        same = int(self._tensor_parallel_size)
        different = num_processes // same if self._data_parallel_size == "auto" else self._data_parallel_size
        if different * same != num_processes:
            raise SettingError(
                f"data_parallel_size {self._data_parallel_size} times tensor_parallel_size {same} must be the number "
                f"of processes, which is {num_processes} (devices times num_nodes)"
            )
        return different, same

    def setup_environment(self) -> None:
        """Settle the sizes before Lightning does."""
        self._data_parallel_size, self._tensor_parallel_size = self.sizes(self.num_nodes * self.num_processes)
        super().setup_environment()
