"""Load batches in worker processes, within the system's limits, and copy them to a device."""

import math
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils import signal_handling

from data.batches import Batch, Planned, QuestionDataset
from vqa.io.errors import InputError
from vqa.io.files import size_text
from vqa.io.processes import SHARED_MEMORY, StopRequest, WorkerContext, calling, naming_worker_limits, require_files

_AHEAD = 2  # batches that a worker prepares in advance
_FILES_A_BATCH = 32  # at most open while a batch is handed from one process to another
_SECONDS_OF_WAITING = 5  # for a batch, between two checks for a signal


def make_loader(
    dataset: QuestionDataset | Planned, sampler: Iterable, workers: int, device: torch.device
) -> DataLoader:
    """Load batches of `dataset`, one for each item of the sampler, in `workers` processes (0: in this one)."""
    return DataLoader(
        _InWorker(dataset) if workers else dataset,
        batch_size=None,  # the sampler's items are whole batches
        sampler=sampler,
        num_workers=workers,
        prefetch_factor=_AHEAD if workers else None,
        pin_memory=device.type == "cuda",
        multiprocessing_context=WorkerContext() if workers else None,
        generator=torch.Generator(),  # starting the loader draws a number, which must not come from dropout's generator
    )


def check_shared_memory(dataset: QuestionDataset, sampler: Iterable[list[int]], workers: int) -> None:
    """Raise InputError if the batches that workers prepare in advance do not fit into shared memory."""
    if not workers or not Path(SHARED_MEMORY).is_dir():
        return
    batches = islice(sampler, workers * _AHEAD + 1)  # those that are ready, and the one in use
    needed, free = sum(map(dataset.image_bytes, batches)), shutil.disk_usage(SHARED_MEMORY).free
    if needed > free:
        raise InputError(
            f"{SHARED_MEMORY}: batches of {workers} workers need {size_text(needed)}, but it has {size_text(free)} "
            f"left; enlarge it (docker: --shm-size={math.ceil(needed / 2**29)}g), or set fewer `workers` (0 needs none)"
        )


def readable(loader: DataLoader, on_wait: Callable[[], None] | None = None) -> Iterator[Batch]:
    """Yield the batches of a loader. `on_wait` is called every few seconds without a batch; it may raise.

    Raises:
        InputError: an image is missing, damaged or cannot be read, or the workers cannot share memory.
        BrokenExecutor: a worker process was killed.
    """
    try:
        batches = iter(loader) if loader.num_workers == 0 else _start_workers(loader)
        while True:
            with calling(on_wait, _SECONDS_OF_WAITING) if on_wait else nullcontext():
                batch = next(batches, None)
            if batch is None:
                return
            if isinstance(batch, InputError):
                raise InputError(*batch.args)  # a new one: the traceback of this one would keep the loader alive
            yield batch
    except (InputError, RuntimeError):
        if loader.num_workers and loader.multiprocessing_context.any_was_killed():
            raise BrokenExecutor("a worker process was killed") from None
        raise


def _start_workers(loader: DataLoader) -> Iterator[Batch | InputError]:
    with naming_worker_limits("workers=0"):
        # tried first, because torch prints a traceback where a worker cannot start
        require_files(_FILES_A_BATCH + 8 * loader.num_workers)
        loader.multiprocessing_context.Lock()
        # torch's handler would raise wherever the main process is, also in a queue whose lock it never releases then
        signal_handling._SIGCHLD_handler_set = True
        with StopRequest():  # torch prints a traceback where a signal ends the start of its workers
            return iter(loader)


def moved(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Copy each batch to a device; a GPU copies the next batch while it computes with this one."""
    if device.type != "cuda":
        yield from (batch.to(device) for batch in batches)
        return
    copying, ahead = torch.cuda.Stream(device), None
    for batch in batches:
        with torch.cuda.stream(copying):
            copied = batch.to(device)
        if ahead is not None:
            yield ahead
        torch.cuda.current_stream(device).wait_stream(copying)
        for part in (*copied[:-1], *copied.extras.values()):
            part.record_stream(torch.cuda.current_stream(device))
        ahead = copied
    if ahead is not None:
        yield ahead


class _InWorker(Dataset):
    """A dataset in a worker process. It returns InputErrors as values: torch would make text of one that is raised."""

    def __init__(self, dataset: QuestionDataset | Planned) -> None:
        self.dataset = dataset

    def __getitem__(self, item: Any) -> "_Packed | InputError":
        try:
            batch = self.dataset[item]
            with naming_worker_limits("workers=0"):
                require_files(_FILES_A_BATCH)
                return _Packed(bytes(ForkingPickler.dumps(batch)))
        except InputError as error:
            return error


@dataclass(frozen=True)
class _Packed:
    """A pickled batch whose tensors are in shared memory; it arrives in the main process as a batch.

    The queue between the processes pickles in a thread, which would print an error and lose the batch, and the main
    process would wait forever: so it is pickled before.
    """

    pickled: bytes

    def __reduce__(self) -> tuple[Callable, tuple[bytes]]:
        return _unpacked, (self.pickled,)


def _unpacked(pickled: bytes) -> Batch | InputError:
    """Return the batch, or why it cannot be received: an exception would end the thread that pins memory."""
    try:
        return ForkingPickler.loads(pickled)
    except (OSError, EOFError, RuntimeError) as error:
        why = str(error) or "the connection is closed"
        return InputError(
            f"a batch cannot be received ({why}): its worker was killed, or too many files are open; "
            "raise `ulimit -n` or set fewer `workers`"
        )
