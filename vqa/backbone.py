"""torchvision's ResNets by name, with weights by torchvision's name or from a file; every unmatched key is an error."""

import re
from pathlib import Path
from pickle import UnpicklingError

import torch
import torchvision
from torch import Tensor
from torchvision.models.resnet import BasicBlock, ResNet

from vqa.verified import load_tensors, read_safetensors


def build_resnet(name: str, weights: str | Path | None = None, classes: int = 1000) -> ResNet:
    """torchvision's ResNet by name, with weights by torchvision's name or from a file.

    Raises:
        ValueError: unknown network or weights, or a file that does not fit the network, naming the keys.
    """
    if name == "resnet10":
        build = _resnet10
    elif name in torchvision.models.list_models(torchvision.models) and re.match(r"(wide_)?resne(t|xt)", name):
        build = torchvision.models.get_model_builder(name)
    else:
        raise ValueError(
            f"{name!r} is no ResNet of torchvision; resnet18, 34, 50, 101 and 152 are, and resnet10 is ours"
        )
    resnet = build(num_classes=classes)
    if weights is None:
        return resnet
    if Path(weights).suffix in (".safetensors", ".pth", ".pt"):
        _load_exactly(resnet, _read_weights(Path(weights)), str(weights))
    else:
        file = _published_weights(name, str(weights))
        # the published files are older than these counts
        counts = {key: value for key, value in resnet.state_dict().items() if key.endswith("num_batches_tracked")}
        try:
            _load_exactly(resnet, counts | _read_weights(file), str(file))
        except ValueError as error:
            raise ValueError(f"{error}; remove it, and it is downloaded again") from None
    return resnet


def _resnet10(num_classes: int) -> ResNet:
    return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=num_classes)


def _published_weights(name: str, weights: str) -> Path:
    """torchvision's cached file of weights, which may be damaged; downloads it if it is missing."""
    try:
        known = torchvision.models.get_model_weights(name)
    except ValueError:
        raise ValueError(f"{name} has no published weights; give a file or none, not {weights!r}") from None
    if weights not in known.__members__:
        raise ValueError(f"{name} has the weights {', '.join(known.__members__)} (or a file, or none), not {weights!r}")
    url = known[weights].url
    file = Path(torch.hub.get_dir(), "checkpoints", Path(url).name)
    if not file.exists():
        try:
            known[weights].get_state_dict(check_hash=True)
        except (OSError, RuntimeError) as error:  # no network, or another file in its place: a login page
            raise ValueError(
                f"weights {weights} of {name} could not be downloaded ({error}); fetch {url} elsewhere and give the "
                "file"
            ) from None
    return file


def _read_weights(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise ValueError(f"{file}: no such file")
    try:
        if file.suffix == ".safetensors":
            return read_safetensors(file)[0]
        state = load_tensors(file)
    except UnpicklingError:
        raise ValueError(f"{file}: cannot be read as weights (damaged, or more than tensors: not executed)") from None
    except Exception as error:  # each format raises errors of its own kind on a broken file
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{file}: cannot be read as weights ({reason:.120})") from None

    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    ):
        raise ValueError(f"{file}: must hold weights by name alone (a state_dict)")
    return state


def _load_exactly(resnet: ResNet, state: dict[str, Tensor], source: str) -> None:
    """Loads every weight but the classifier's, which is not used."""
    expected = {key: value for key, value in resnet.state_dict().items() if not key.startswith("fc.")}
    state = {key: value for key, value in state.items() if not key.startswith("fc.")}
    wrong = [f"missing {key}" for key in expected.keys() - state.keys()]
    wrong += [f"unknown {key}" for key in state.keys() - expected.keys()]
    wrong += [f"shape of {key}" for key in expected.keys() & state.keys() if expected[key].shape != state[key].shape]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(f"{source}: not the weights of this ResNet: {', '.join(sorted(wrong)[:5])}{more}")
    for key, value in state.items():
        if not value.isfinite().all() or (key.endswith("running_var") and (value < 0).any()):
            raise ValueError(f"{source}: damaged weights: {key} holds values that are not finite or negative variances")
    resnet.load_state_dict(state | {key: value for key, value in resnet.state_dict().items() if key.startswith("fc.")})
