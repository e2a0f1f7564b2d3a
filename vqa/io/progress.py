"""Progress of long work: a bar on a terminal, occasional lines in a log."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
SECONDS = 20  # between two lines in a log


def progress(items: Iterable[T], total: int | None, what: str, done: int = 0) -> Iterator[T]:
    """Yield `items` and report on standard error how many of `total` (None: unknown) are done.

    `done` is the number of items of earlier runs. In a log, a line is printed every SECONDS seconds, and at the end of
    work that took longer.
    """
    if sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(items, total=total, initial=done, desc=what, dynamic_ncols=True, leave=False)
        return
    started = last = time.monotonic()
    count = done
    of = "" if total is None else f"/{total}"
    for item in items:
        yield item
        count += 1
        now = time.monotonic()
        if now - last >= SECONDS or (count == total and now - started >= SECONDS):
            rate = (count - done) / (now - started)
            print(f"{what}: {count}{of}, {rate:.1f}/s", file=sys.stderr, flush=True)
            last = now
