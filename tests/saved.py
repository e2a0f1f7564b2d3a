"""What autograd keeps for the backward pass."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


def saved_bytes(function: Callable[[], Any], besides: Iterable[Tensor] = ()) -> tuple[int, Any]:
    """Bytes of all different memory that is kept, except that of `besides`; and the result of the function."""
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor.detach()  # the tensor itself, if it is a result, would keep its own graph alive

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = function()
    for tensor in besides:
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(kept.values()), result
