"""`modulate` as two C++ kernels for float32 maps on a CPU: one pass over the maps forward, one backward.

`modulate_cpu.cpp` is compiled for this very CPU at first use, by `c++` or what CXX names, and kept in
`~/.cache/modern-vqa` (XDG_CACHE_HOME moves it). It is not linked with an OpenMP library: it finds the one that torch
has loaded. A second one would have threads of its own, which wait busily while those of the first have work.

Legend: B samples, C channels, H and W map size; a map is contiguous or channels-last.
"""

import ctypes
import hashlib
import os
import shlex
import subprocess
import tempfile
import warnings
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

_SOURCE = Path(__file__).with_suffix(".cpp")
# without contraction a sum is rounded alike forward and backward, where its sign is asked for again
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-fno-exceptions", "-fopenmp", "-fPIC")
_ALONE = 2**15  # elements of a map for which to wake other threads takes longer than to do without


def can(x: Tensor, *others: Tensor | None) -> bool:
    """Whether the kernels take a map, which is not empty, and what belongs to it; at first use this compiles them."""
    parts = [x, *(part for part in others if part is not None)]
    # a subclass may have no memory of its own
    fit = all(type(part) is Tensor and part.device.type == "cpu" and part.dtype == torch.float32 for part in parts)
    return fit and _library() is not None


def forward(
    x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, relu: bool, keeps_bits: bool
) -> tuple[Tensor, Tensor | None]:
    """As `modulate_eager.forward`."""
    y = torch.empty_like(x)
    rows, columns = (x.shape[1], x[0, 0].numel()) if x.is_contiguous() else (x[0, 0].numel(), x.shape[1])
    bits = torch.empty(len(x), rows, -(-columns // 8), dtype=torch.uint8) if keeps_bits else None
    _library().modulate_forward(_shape(x, scale, shift, relu), *map(_memory, (x, scale, shift, residual, y, bits)))
    return y, bits


def backward(
    gradient: Tensor,
    x: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    bits: Tensor | None,
    relu: bool,
    wants_x: bool,
    wants_scale: bool,
    wants_shift: bool,
    wants_residual: bool,
) -> tuple[Tensor | None, ...]:
    """As `modulate_eager.backward`."""
    shape = _shape(gradient, scale, shift, relu)
    of_x = torch.empty_like(gradient) if wants_x else None
    of_scale, of_shift = (
        gradient.new_empty(gradient.shape[:2]) if wanted else None for wanted in (wants_scale, wants_shift)
    )
    of_residual = torch.empty_like(gradient) if wants_residual and relu else None
    sums = gradient.new_empty(_library().modulate_workspace(shape))
    parts = (gradient, x, scale, shift, bits, of_x, of_scale, of_shift, of_residual, sums)
    _library().modulate_backward(shape, *map(_memory, parts))
    return of_x, of_scale, of_shift, of_residual if relu or not wants_residual else gradient


class _Shape(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("samples", "channels", "positions", "scale_stride", "shift_stride")),
        *((name, ctypes.c_int32) for name in ("channels_last", "relu", "threads")),
    )


def _shape(x: Tensor, scale: Tensor | None, shift: Tensor | None, relu: bool) -> _Shape:
    samples, channels, height, width = x.shape
    strides = (0 if part is None else part.stride(0) for part in (scale, shift))
    threads = torch.get_num_threads() if x.numel() > _ALONE else 1
    return _Shape(samples, channels, height * width, *strides, not x.is_contiguous(), relu, threads)


def _memory(part: Tensor | None) -> int | None:
    return None if part is None else part.data_ptr()


@cache
def _library() -> ctypes.CDLL | None:
    """The compiled kernels; None, and a warning that says why, where there can be none."""
    try:
        library = ctypes.CDLL(str(_built()))
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[0]
        warnings.warn(f"norms are computed without the C++ kernel, which is slower: {reason}", stacklevel=2)
        return None
    library.modulate_workspace.restype = ctypes.c_int64
    library.modulate_workspace.argtypes = (ctypes.POINTER(_Shape),)
    for function, pointers in ((library.modulate_forward, 6), (library.modulate_backward, 10)):
        function.restype, function.argtypes = None, (ctypes.POINTER(_Shape), *[ctypes.c_void_p] * pointers)
    return library


def _built() -> Path:
    """Return the library's file, built where it is missing or damaged.

    Its name is a hash of all that it depends on. It ends with the SHA-256 of what comes before: a library that was cut
    off would end the process with SIGBUS.

    Raises:
        OSError: there is no compiler, or the folder cannot be written.
        subprocess.SubprocessError: the compiler failed.
    """
    compiler = shlex.split(os.environ.get("CXX", "c++"))

    def run(*words: str) -> str:
        return subprocess.run([*compiler, *words], check=True, capture_output=True, text=True, timeout=300).stdout

    # the predefined macros tell the compiler's version and what the CPU can do
    depends = [_SOURCE.read_text(encoding="utf-8"), *compiler, *_FLAGS]
    depends.append(run(*_FLAGS, "-dM", "-E", "-x", "c++", os.devnull))
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "modern-vqa"
    file = folder / f"modulate_{hashlib.sha256(chr(0).join(depends).encode()).hexdigest()[:32]}.so"
    if not _is_whole(file):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as apart:
            made, linked = Path(apart, "modulate.o"), Path(apart, "modulate.so")
            run(*_FLAGS, "-Wno-psabi", "-c", str(_SOURCE), "-o", str(made))
            run("-shared", "-nostdlib", str(made), "-o", str(linked))
            with linked.open("rb+") as library:
                library.write(hashlib.sha256(library.read()).digest())
                library.flush()
                os.fsync(library.fileno())
            linked.replace(file)
    return file


def _is_whole(file: Path) -> bool:
    content = file.read_bytes() if file.exists() else b""
    return content[-32:] == hashlib.sha256(content[:-32]).digest()
