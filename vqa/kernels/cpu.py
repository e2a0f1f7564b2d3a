"""`modulate` as two C++ kernels for float32 maps on a CPU: one pass over the maps forward, one backward.

`cpu.cpp` is compiled for this machine's CPU at first use, by `c++` or the compiler that CXX names, and cached
in `~/.cache/modern-vqa` (XDG_CACHE_HOME moves it). It is not linked with an OpenMP library, so that it uses the one
that torch has loaded: a second one would have its own threads, which spin while those of the first work.

A map is contiguous or channels-last.
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
# Without contraction, scale · x + shift is rounded alike forward and backward, where its sign decides again.
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-fno-exceptions", "-fopenmp", "-fPIC")
_SERIAL = 2**15  # elements of a map up to which waking other threads takes longer than it saves


def can(x: Tensor, *others: Tensor | None) -> bool:
    """Return whether the kernels take these tensors; x must not be empty. The first call compiles the kernels."""
    parts = [x, *(part for part in others if part is not None)]
    # a subclass may have no storage
    fit = all(type(part) is Tensor and part.device.type == "cpu" and part.dtype == torch.float32 for part in parts)
    return fit and _library() is not None


def forward(
    x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, relu: bool, keeps_bits: bool
) -> tuple[Tensor, Tensor | None]:
    """As `eager.forward`."""
    scale, shift = scale.contiguous(), shift.contiguous()
    y = torch.empty_like(x)
    rows, columns = (x.shape[1], x[0, 0].numel()) if x.is_contiguous() else (x[0, 0].numel(), x.shape[1])
    bits = torch.empty(len(x), rows, -(-columns // 8), dtype=torch.uint8) if keeps_bits else None
    _library().modulate_forward(_shape(x, relu), *map(_memory, (x, scale, shift, residual, y, bits)))
    return y, bits


def backward(
    gradient: Tensor,
    x: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    bits: Tensor | None,
    relu: bool,
    wants: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """As `eager.backward`."""
    scale, shift = (None if part is None else part.contiguous() for part in (scale, shift))
    wants_x, wants_scale, wants_shift, wants_residual = wants
    of_x = torch.empty_like(gradient) if wants_x else None
    of_scale = gradient.new_empty(gradient.shape[:2]) if wants_scale else None
    of_shift = gradient.new_empty(gradient.shape[:2]) if wants_shift else None
    of_residual = torch.empty_like(gradient) if wants_residual and relu else None
    parts = (gradient, x, scale, shift, bits, of_x, of_scale, of_shift, of_residual)
    _library().modulate_backward(_shape(gradient, relu), *map(_memory, parts))
    return of_x, of_scale, of_shift, of_residual if relu or not wants_residual else gradient


class _Shape(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("samples", "channels", "positions")),
        *((name, ctypes.c_int32) for name in ("channels_last", "relu", "threads")),
    )


def _shape(x: Tensor, relu: bool) -> _Shape:
    samples, channels, height, width = x.shape
    threads = torch.get_num_threads() if x.numel() > _SERIAL else 1
    return _Shape(samples, channels, height * width, not x.is_contiguous(), relu, threads)


def _memory(part: Tensor | None) -> int | None:
    return None if part is None else part.data_ptr()


@cache
def _library() -> ctypes.CDLL | None:
    """Load the compiled kernels; warn and return None where they cannot be compiled or loaded."""
    try:
        library = ctypes.CDLL(str(_built()))
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or "").strip() or str(error)  # by the compiler, which may say nothing
        reason = said.splitlines()[0]
        warnings.warn(f"norms are computed without the C++ kernel, which is slower: {reason}", stacklevel=2)
        return None
    for function, pointers in ((library.modulate_forward, 6), (library.modulate_backward, 9)):
        function.restype, function.argtypes = None, (ctypes.POINTER(_Shape), *[ctypes.c_void_p] * pointers)
    return library


def _built() -> Path:
    """Return the library's file; build it if it is missing or damaged.

    Its name is a hash of everything it depends on. It ends with the SHA-256 of the bytes before: loading a truncated
    library would end the process with SIGBUS.

    Raises:
        OSError: there is no compiler, or the folder cannot be written.
        subprocess.SubprocessError: the compiler failed.
    """
    compiler = shlex.split(os.environ.get("CXX") or "c++")

    def run(*words: str) -> str:
        return subprocess.run([*compiler, *words], check=True, capture_output=True, text=True, timeout=300).stdout

    # the predefined macros name the compiler's version and the CPU's instruction sets
    depends = [_SOURCE.read_text(encoding="utf-8"), *compiler, *_FLAGS]
    depends.append(run(*_FLAGS, "-dM", "-E", "-x", "c++", os.devnull))
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "modern-vqa"
    file = folder / f"modulate_{hashlib.sha256(chr(0).join(depends).encode()).hexdigest()[:32]}.so"
    if not _is_whole(file):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            compiled, linked = Path(scratch, "modulate.o"), Path(scratch, "modulate.so")
            run(*_FLAGS, "-Wno-psabi", "-c", str(_SOURCE), "-o", str(compiled))
            run("-shared", "-nostdlib", str(compiled), "-o", str(linked))
            with linked.open("rb+") as library:
                library.write(hashlib.sha256(library.read()).digest())
                library.flush()
                os.fsync(library.fileno())
            linked.replace(file)
    return file


def _is_whole(file: Path) -> bool:
    content = file.read_bytes() if file.exists() else b""
    return content[-32:] == hashlib.sha256(content[:-32]).digest()
