"""One process or many (torchrun): who this process is, and what the processes exchange."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Processes:
    """This process's place among all processes of the run."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes files: one over all hosts."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """The value of every process, in order of rank, in every process."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Waits for all processes."""
        if self.world_size > 1:
            dist.barrier()


@contextmanager
def joined(device_type: str) -> Iterator[Processes]:
    """Joins the processes that torchrun started (none: this one alone) and leaves them at the end."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield Processes()
        return
    if device_type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device_type == "cuda" else "gloo")
    try:
        yield Processes(int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"]), world_size)
    finally:
        dist.destroy_process_group()
