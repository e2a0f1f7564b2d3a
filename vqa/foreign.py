"""Condition the batch norms of any network, also one whose forward pass has no argument to spare.

    condition_norms(network, condition_size=256, where=lambda name: name.startswith("layer4"))
    with conditioned(condition):                                # [B, 256]
        y = network(images)

The condition is a context variable, not an attribute of a module: threads and asynchronous tasks each have their own,
and outside the `with` block no condition exists. Everything else in this package passes the modulation as an argument.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from vqa.cbn import ConditionalBatchNorm2d

_CONDITION: ContextVar[tuple[Tensor, tuple[int, bool]] | None] = ContextVar("condition", default=None)
_OUTSIDE_OF_GRAPHS = torch.compiler.disable(reason="the condition of `conditioned` is read outside of compiled graphs")


@_OUTSIDE_OF_GRAPHS
def _now() -> tuple[int, bool]:
    """Return the number of the backward pass in progress (−1: none), and whether a network is exported or traced."""
    return torch._C._current_graph_task_id(), torch.compiler.is_exporting() or torch.jit.is_tracing()


@contextmanager
def conditioned(condition: Tensor) -> Iterator[None]:
    """Inside the `with` block, the norms that `condition_norms` made use this condition [B, D].

    A function that is recomputed (gradient checkpointing), exported or traced has to take the condition as an argument
    and enter the block itself; a block around it is refused there.
    """
    token = _CONDITION.set((condition, _now()))
    try:
        yield
    finally:
        _CONDITION.reset(token)


@_OUTSIDE_OF_GRAPHS
def _present_condition() -> Tensor:
    found, now = _CONDITION.get(), _now()
    if found and found[1] == now:
        return found[0]
    if now == (-1, False):
        raise RuntimeError("a conditioned norm needs its condition: call the network in `with conditioned(condition):`")
    raise RuntimeError(
        "a conditioned norm is recomputed in a backward pass, exported or traced, where the block around may have "
        "another condition, or none: give the condition to the function that is recomputed, exported or traced as an "
        "argument, and enter `with conditioned(condition):` in that function"
    )


class _ConditionedBatchNorm2d(ConditionalBatchNorm2d):
    """A conditional batch norm that takes its condition from the `with` block around it."""

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] → [B, C, H, W]."""
        return super().forward(x, _present_condition())


def condition_norms(
    model: nn.Module,
    condition_size: int,
    where: Callable[[str], bool] = lambda _: True,
    *,
    hidden_size: int = 512,
    gamma: bool = True,
    beta: bool = True,
) -> list[str]:
    """Replace batch norms of a network, in place, by conditional ones that share their γ, β and statistics.

    Args:
        model: any network.
        condition_size: size D of the condition.
        where: whether the `nn.BatchNorm2d` of this name is replaced; all by default.
        hidden_size: hidden units of each predicting MLP.
        gamma, beta: what is predicted.

    Returns:
        The names of the norms that were replaced.

    Raises:
        ValueError: no norm was chosen; one is of a subclass, which may compute something else, or has no γ and β or no
            running statistics; or nothing is predicted. Nothing is replaced.
    """
    norms = dict(model.named_modules(remove_duplicate=False))
    norms = {name: norm for name, norm in norms.items() if name and isinstance(norm, nn.BatchNorm2d) and where(name)}
    if not norms:
        raise ValueError(f"{type(model).__name__} has no nn.BatchNorm2d inside that `where` chooses")
    for name, norm in norms.items():
        if type(norm) is not nn.BatchNorm2d:
            raise ValueError(f"{name} is a {type(norm).__name__}, not nn.BatchNorm2d; let `where` skip it")
        if not (norm.affine and norm.track_running_stats):
            raise ValueError(f"{name} has no γ and β, or no running statistics; let `where` skip it")
    options = {"hidden_size": hidden_size, "gamma": gamma, "beta": beta}
    made = {norm: _ConditionedBatchNorm2d.from_batch_norm(norm, condition_size, **options) for norm in norms.values()}
    for name, norm in norms.items():
        model.set_submodule(name, made[norm])  # one norm under two names stays one
    return list(norms)
