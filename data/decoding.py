"""Images decoded in several processes, each of which writes its pixels into the file itself.

Handing them over to one writer would copy every pixel four times, and that writer would be one process more than there
are cores.
"""

import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from data.h5_rows import RowPlace
from vqa.io.errors import InputError
from vqa.io.files import naming_write_errors
from vqa.io.images import decode_image
from vqa.io.processes import WorkerContext, naming_worker_limits

_IMAGES_A_TASK = 32  # large enough to hide the cost of handing a task over
_SECONDS_BETWEEN = 0.25


class Decoding:
    """Decodes images into the rows of a file, uint8 [S, S, 3], from `begin` until the end of its block."""

    def __init__(self, size: int, processes: int) -> None:
        """`size` S; `processes` 1 decodes here, when the results are asked for."""
        self.size, self.processes = size, processes
        self._workers = WorkerContext()
        self._pool: ProcessPoolExecutor | None = None
        self._over = threading.Event()

    def __enter__(self) -> "Decoding":
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._pool is not None:
            self._workers.kill()  # what is not done by now is not wanted, and a stopped process would be waited for
            self._pool.shutdown(cancel_futures=True)

    def begin(self, place: RowPlace, files: Sequence[tuple[int, str]]) -> Iterator[tuple[int, int | str]]:
        """Begins with images of (row, file name).

        Returns:
            in the order of `files`, each row with its checksum once the task it is in is written (it may not be on the
            disk yet), or with what is wrong with its image. Asked for the next, it raises InputError if the pixels
            cannot be written, and BrokenExecutor if a worker process was killed.
        """
        decode = partial(_decode_task, place, self.size)
        tasks = [files[start : start + _IMAGES_A_TASK] for start in range(0, len(files), _IMAGES_A_TASK)]
        if self.processes == 1 or len(tasks) <= 1:
            done = map(decode, tasks)
        else:
            with naming_worker_limits("data.processes=1"):
                self._pool = ProcessPoolExecutor(self.processes, mp_context=self._workers)
                try:
                    done = self._pool.map(decode, tasks)
                except (OSError, ValueError) as error:  # that its queues are closed
                    if getattr(error, "errno", None) is not None:
                        raise
                    raise BrokenExecutor("a worker was lost while others were started") from error
            if hasattr(os, "posix_fadvise"):  # not on macOS
                threading.Thread(target=self._give_memory_back, args=(place.opened(),), daemon=True).start()
        return chain.from_iterable(done)

    def _give_memory_back(self, file: BinaryIO) -> None:
        """Has the pixels written from the start, and gives the memory back in which the system keeps them.

        Nobody reads them now. Writing to the same memory again is also faster than taking more of it, and much faster
        on a virtual machine, whose host has to provide it first.
        """
        with file:
            while not self._over.wait(_SECONDS_BETWEEN):
                # begins to write what is not, drops what is; an error is left to be met by who marks the rows
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _decode_task(place: RowPlace, size: int, files: Sequence[tuple[int, str]]) -> list[tuple[int, int | str]]:
    done: list[tuple[int, int | str]] = []
    with naming_write_errors(place.path), place.opened() as file:
        for _, name in files:
            _read_ahead(name)
        for row, name in files:
            try:
                image = decode_image(Path(name), size)
            except InputError as error:
                done.append((row, str(error)))
                continue
            done.append((row, place.write(file.fileno(), row, image)))
    return done


def _read_ahead(file: str) -> None:
    """Asks the system to read a file while others are decoded."""
    if hasattr(os, "posix_fadvise"):  # not on macOS
        with suppress(OSError, ValueError):  # said where it is decoded
            opened = os.open(file, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would wait for its writer
            try:
                os.posix_fadvise(opened, 0, 0, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(opened)
