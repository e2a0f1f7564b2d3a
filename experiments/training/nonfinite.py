"""Values that are not finite (NaN, infinity): where in the network they appear first, and for which questions."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data.batches import Batch
from vqa.io.errors import InputError


class NotFiniteError(InputError):
    """A loss or gradient is not finite: most often because the learning rate is too high."""

    def __init__(self, what: str, rows: list[int]) -> None:
        """`rows` are those of the questions in the question table."""
        super().__init__(what)
        self.rows = rows


def listed(ids: np.ndarray) -> str:
    """The first ids of some questions, for a message."""
    return f"(questions {', '.join(map(str, ids[:8]))}{', …' if len(ids) > 8 else ''})"


def located(
    what: str, model: nn.Module, parts: Iterable[Batch], loss_of: Callable[[Batch, str], Tensor]
) -> NotFiniteError:
    """Locates what is not finite in a step: the module, and the questions whose own loss it is (all, if none's is)."""
    losses: dict[int, Tensor] = {}

    def compute() -> None:
        for part in parts:
            losses.update(zip(part.rows.tolist(), loss_of(part, "none"), strict=True))

    place = first_place(model, compute)
    rows = [row for row, loss in losses.items() if not loss.isfinite()] or list(losses)
    return NotFiniteError(f"{what}; first not finite: {place or 'a gradient'}", rows)


@torch.no_grad()
def first_place(model: nn.Module, compute: Callable[[], Any]) -> str | None:
    """The weights, or the first module output while `compute` calls the model, that are not finite; None if all are."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    found = [f"the weights {name}" for name, value in model.state_dict().items() if not _is_finite(value)]

    def look(name: str, _module: nn.Module, _inputs: Any, result: Any) -> None:
        if not _is_finite(result):
            found.append(f"the output of {name}")

    # an inner module's hook runs before that of the module around it
    hooks = [module.register_forward_hook(partial(look, name)) for name, module in model.named_modules() if name]
    try:
        compute()
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


def _is_finite(result: Any) -> bool:
    if isinstance(result, Tensor):
        return bool(result.isfinite().all())
    return not isinstance(result, tuple | list) or all(map(_is_finite, result))
