"""One process or many (torchrun): this process's rank, and what the processes exchange."""

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from vqa.devices import choose_device
from vqa.io.errors import InputError

Result = TypeVar("Result")
_PATIENCE = timedelta(days=1)  # the others wait while the main process stores feature maps, or waits for another run


class _Patient:
    """The group that exchanges objects, on the host: no GPU takes part or waits.

    The default group, which exchanges tensors, gives up after 10 or 30 minutes.
    """

    group: dist.ProcessGroup | None = None


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

    def device(self, name: str) -> torch.device:
        """This process's device for a `device` setting. Raises InputError as `choose_device`."""
        return choose_device(name, self.local_rank, self.world_size)

    def gather(self, value: Any) -> list[Any]:
        """The value of every process, in order of rank, in every process."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=_Patient.group)
        return values

    def say(self, text: str) -> None:
        """Prints a line, once for all processes."""
        if self.is_main:
            print(text, flush=True)

    def agreed(self, work: Callable[[], Result]) -> Result:
        """The result of this process's work; if some processes raise InputError, all raise the first one's."""
        if self.world_size == 1:
            return work()
        result = refusal = None
        try:
            result = work()
        except InputError as error:
            refusal = str(error)
        if refusals := list(filter(None, self.gather(refusal))):
            raise InputError(refusals[0])
        return result

    def on_main(self, work: Callable[[], Result]) -> Result:
        """The result of the main process's work, in every process. Raises InputError as `agreed`."""
        return self.gather(self.agreed(lambda: work() if self.is_main else None))[0]


def this_process() -> Processes:
    """This process's place as torchrun sets it; without torchrun it is alone. Raises InputError if it is no number."""
    places = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    try:
        return Processes(*(int(os.environ.get(name, alone)) for name, alone in places.items()))
    except ValueError:
        raise InputError(
            f"{', '.join(places)} in the environment: must be whole numbers, as torchrun sets them"
        ) from None


@contextmanager
def joined_group(processes: Processes, device: torch.device) -> Iterator[None]:
    """Joins the process group for the block, if there are several processes; raises InputError if a launcher set only a
    part of what torchrun sets.
    """
    if processes.world_size == 1:
        yield
        return
    if missing := [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise InputError(
            f"WORLD_SIZE is {processes.world_size}, but there is no {', '.join(missing)}; start it with torchrun"
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    ended = False
    try:
        _Patient.group = dist.new_group(backend="gloo", timeout=_PATIENCE)
        yield
        ended = True
    finally:
        _Patient.group = None
        if ended or device.type != "cuda":  # NCCL would wait for the others, which wait for this process that failed
            dist.destroy_process_group()


def averaging_gradients(model: nn.Module) -> DistributedDataParallel:
    """Wraps a model so that its gradients are averaged over the processes; its buffers are not exchanged."""
    known = inspect.signature(DistributedDataParallel).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # before torch 2.13
    return DistributedDataParallel(model, **{buffers: False})
