"""Conditional batch normalisation for visual question answering (de Vries et al., NIPS 2017).

Legend of the shape letters in this package: B samples (a question about an image each), I images, T words, V known
words, E embedding, D question embedding, C channels, H and W map size, G glimpses, A answers, S image side.
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from vqa.saved_model import SavedModel

__version__ = "0.1.0"


def load(folder: str | Path, device: "str | torch.device" = "cpu") -> "SavedModel":
    """Load a trained model to `ask` and `inspect`; torch is imported here, not with the package.

    Args:
        folder: a run directory, a copied `model/`, a folder for `transformers`, or a model's name on the Hub (a text
            such as "owner/name", where there is no folder "owner"), which is downloaded.
        device: auto, cpu, cuda, cuda:N or mps, or a `torch.device`.

    Raises:
        InputError: there is no model, it cannot be downloaded, a file of it is missing or broken, or there is no such
            device.
    """
    from vqa.devices import choose_device
    from vqa.io.files import is_hub_name
    from vqa.saved_model.files import download, load_model

    if isinstance(folder, str) and is_hub_name(folder):
        folder = download(folder)
    return load_model(Path(folder), choose_device(str(device)))
