"""Whether a large file fits on its disk, asked before hours of work."""

import shutil
from pathlib import Path

from data.errors import NotWrittenError


def check_room(file: Path, size: int, otherwise: str) -> None:
    """Refuses a file that will have `size` bytes where its disk has no room for what is missing of it.

    Args:
        file: it may be there already, wholly or partly written, with holes.
        size: bytes in the end.
        otherwise: what the user can do but make room.

    Raises:
        NotWrittenError: it does not fit.
    """
    missing = max(0, size - (file.stat().st_blocks * 512 if file.exists() else 0))
    free = shutil.disk_usage(next(folder for folder in file.absolute().parents if folder.exists())).free
    if missing > free:
        has = f"needs {shown(missing)} more, but its disk has {shown(free)} left"
        raise NotWrittenError(f"{file}: {has}; make room or {otherwise}")


def shown(size: int) -> str:
    """A number of bytes for people."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
