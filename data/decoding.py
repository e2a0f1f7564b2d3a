"""Images decoded in several processes, each of which writes its pixels into the file itself.

Handing them over to one writer would copy every pixel four times, and that writer would be one process more than there
are cores.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

from data.errors import InputError
from data.files import naming_write_errors
from data.images import decode_image
from data.rows import RowPlace
from data.workers import WorkerContext

_IMAGES_A_TASK = 32  # large enough to hide the cost of handing a task over
_TASKS_A_PROCESS = 4  # one it works on; the others are there while the caller waits for the disk


def decode_into(
    place: RowPlace, size: int, files: Sequence[tuple[int, str]], processes: int
) -> Iterator[tuple[int, int | str]]:
    """Decodes images of (row, file name) into their rows, uint8 [S, S, 3], in `processes` processes.

    Yields:
        in the order of `files`, each row with its checksum once the task it is in is written (it may not be on the disk
        yet), or with what is wrong with its image.

    Raises:
        InputError: the pixels cannot be written.
    """
    tasks = [files[start : start + _IMAGES_A_TASK] for start in range(0, len(files), _IMAGES_A_TASK)]
    if processes == 1 or len(tasks) <= 1:
        for task in tasks:
            yield from _decode_task(place, size, task)
        return
    pool = ProcessPoolExecutor(processes, mp_context=WorkerContext())
    try:
        flying: deque[Future[list[tuple[int, int | str]]]] = deque()
        for task in tasks:
            flying.append(pool.submit(_decode_task, place, size, task))
            if len(flying) == _TASKS_A_PROCESS * processes:
                yield from flying.popleft().result()
        while flying:
            yield from flying.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _decode_task(place: RowPlace, size: int, files: Sequence[tuple[int, str]]) -> list[tuple[int, int | str]]:
    done: list[tuple[int, int | str]] = []
    with naming_write_errors(place.path), place.path.open("rb+", buffering=0) as file:
        for row, name in files:
            try:
                image = decode_image(Path(name), size)
            except InputError as error:
                done.append((row, str(error)))
                continue
            done.append((row, place.write(file.fileno(), row, image)))
    return done
