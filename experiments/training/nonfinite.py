"""Numbers that are not finite: of which questions, and where in the network they came up first."""

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vqa.io.errors import InputError

_LISTED = 8  # question ids in a message


class NotFiniteError(InputError):
    """A loss, gradient or answer that is not finite: most often a learning rate that is too high."""

    def __init__(self, what: str, rows: list[int]) -> None:
        """`rows` are the rows of the questions in the question table."""
        super().__init__(what)
        self.rows = rows

    def of(self, ids: np.ndarray) -> str:
        """The message with the official ids of the questions; `ids` are those of the whole table."""
        listed = ", ".join(str(ids[row]) for row in self.rows[:_LISTED]) + (", …" if len(self.rows) > _LISTED else "")
        return f"{self} (questions {listed})"


@torch.no_grad()
def place_of_first(model: nn.Module, compute: Callable[[], Any]) -> str | None:
    """Where numbers of a model first are not finite: in a weight, or else in what a module gives while `compute`, which
    calls the model, runs. None if all are finite (then it is the backward pass).
    """
    for name, value in chain(model.named_parameters(), model.named_buffers()):
        if not value.isfinite().all():
            return f"the weights {name.removeprefix('module.')}"
    found: list[str] = []

    def look_at(name: str) -> Callable[..., None]:
        def look(_module: nn.Module, _inputs: Any, result: Any) -> None:
            if not found and any(not value.isfinite().all() for value in _tensors(result)):
                found.append(f"the output of {name.removeprefix('module.')}")

        return look

    # inner modules end, and are looked at, before the ones they are in
    hooks = [module.register_forward_hook(look_at(name)) for name, module in model.named_modules() if name]
    try:
        compute()
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


def _tensors(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, tuple | list):
        for part in result:
            yield from _tensors(part)
