"""The setup of a measurement, or of a check on a GPU."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:  # the processes of `scale` measure their memory and do without torch
    import torch

Rows = Iterator[dict[str, Any]]  # of a table


class Setup(NamedTuple):
    """Where and how thoroughly something is measured."""

    device: "torch.device"
    tiny: bool  # small sizes, to show on a CPU in minutes that it runs
    folder: Path  # for its own data and runs
    repeats: int = 7  # turns of each measurement
    images: int = 4_000  # of the part `scale`

    def pick(self, tiny: Any, real: Any) -> Any:
        return tiny if self.tiny else real

    @property
    def network(self) -> tuple[str, int]:
        """A ResNet and the side of its images, pixels."""
        return self.pick(("resnet10", 64), ("resnet50", 224))


Measurement = Callable[[Setup], Rows]
