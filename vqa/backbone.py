"""torchvision's ResNets by name, with weights by name or from a file; a missing or unknown key is an error."""

import re
from argparse import Namespace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torchvision
from torch import Tensor
from torch.serialization import safe_globals
from torchvision.models.resnet import BasicBlock, ResNet

from vqa.io.errors import first_line
from vqa.io.weight_files import load_tensors, read_safetensors

ENDINGS = (".safetensors", ".pth", ".pt")  # such names are always files; others only if they exist


def build_resnet(name: str, weights: str | Path | None = None, classes: int = 1000) -> ResNet:
    """Build torchvision's ResNet by name, with weights by torchvision's name or from a file.

    A file is a .safetensors file or written by `torch.save`, with torchvision's keys (timm's are the same). It holds a
    state_dict, alone or as the only one in a checkpoint; all keys may share one prefix (`module.`).

    Raises:
        ValueError: unknown network or weights, or a file that does not fit the network, naming the keys.
    """
    if name == "resnet10":
        resnet = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=classes)
    elif name in torchvision.models.list_models(torchvision.models) and re.match(r"(wide_)?resne(t|xt)", name):
        resnet = torchvision.models.get_model(name, num_classes=classes)
    else:
        raise ValueError(f"{name!r} is not a ResNet of torchvision; use resnet18, 34, 50, 101 or 152, or resnet10")
    if weights is None:
        return resnet
    file = Path(weights)
    if file.suffix in ENDINGS or file.is_file():
        _load_exactly(resnet, _without_prefix(_read_weights(file)), str(file))
        return resnet
    file = _published_weights(name, str(weights))
    try:
        _load_exactly(resnet, _read_weights(file), str(file))
    except ValueError as error:
        raise ValueError(f"{error}; remove it to download it again") from None
    return resnet


def _published_weights(name: str, weights: str) -> Path:
    """Return torchvision's cached file of weights, which may be damaged; download it if it is missing."""
    try:
        known = torchvision.models.get_model_weights(name)
    except ValueError:
        raise ValueError(
            f"{name} has no published weights and {weights!r} is not a file; use a file, or none (in Python: None)"
        ) from None
    if weights not in known.__members__:
        names = ", ".join(known.__members__)
        raise ValueError(
            f"{weights!r} is neither a file nor one of the weights of {name}: {names}; or use none (in Python: None)"
        )
    url = known[weights].url
    file = Path(torch.hub.get_dir(), "checkpoints", Path(url).name)
    if not file.exists():
        try:
            known[weights].get_state_dict(check_hash=True)
        except (OSError, RuntimeError) as error:  # no network, or another file in its place: a login page
            raise ValueError(
                f"weights {weights} of {name} could not be downloaded ({error}); download {url} "
                "on another machine and name the file"
            ) from None
    return file


def _read_weights(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise ValueError(f"{file}: no such file")
    try:
        if _is_safetensors(file):
            return read_safetensors(file)[0]
        with safe_globals([Namespace]):  # many programs store their command-line arguments in a checkpoint
            content = load_tensors(file)
    except UnpicklingError as error:
        found = re.search(r"Unsupported (?:global|class)\W+(?:GLOBAL )?([\w.]+)", str(error))
        what = f"holds {found[1]}, more than tensors" if found else "damaged, or more than tensors"
        raise ValueError(f"{file}: cannot be read as weights ({what}: not executed)") from None
    except Exception as error:  # each format raises its own errors for a broken file
        raise ValueError(f"{file}: cannot be read as weights ({first_line(error):.120})") from None
    if _is_state(content):
        return content
    states = {key: value for key, value in content.items() if _is_state(value)} if isinstance(content, dict) else {}
    if len(states) > 1:
        raise ValueError(f"{file}: holds several networks ({', '.join(map(str, states))}); save one of them alone")
    if not states:
        raise ValueError(f"{file}: must hold weights by name (a state_dict), alone or as one part of a checkpoint")
    return next(iter(states.values()))


def _is_safetensors(file: Path) -> bool:
    with file.open("rb") as opened:
        return file.suffix == ".safetensors" or opened.read(9)[8:] == b"{"


def _is_state(content: Any) -> bool:
    return (
        isinstance(content, dict)
        and bool(content)
        and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items())
    )


def _without_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove the prefix (`module.`, `_orig_mod.`, …) if all keys have the same one."""
    stem = min((key for key in state if key.endswith("conv1.weight")), key=len, default="")
    prefix = stem.removesuffix("conv1.weight")
    if all(key.startswith(prefix) for key in state):
        return {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _load_exactly(resnet: ResNet, state: dict[str, Tensor], source: str) -> None:
    """Load every weight but the classifier's, which is not used; raise ValueError if one is missing or unknown."""
    expected = {key: value for key, value in resnet.state_dict().items() if not key.startswith("fc.")}
    state = {key: value for key, value in state.items() if not key.startswith("fc.")}
    counters = {key for key in expected if key.endswith(".num_batches_tracked")}  # not used, and not in all files
    wrong = {
        "missing": expected.keys() - state.keys() - counters,
        "unknown": state.keys() - expected.keys(),
        "shape of": {key for key in expected.keys() & state.keys() if expected[key].shape != state[key].shape},
    }
    if count := sum(map(len, wrong.values())):
        named = [f"{what} {key}" for what, keys in wrong.items() for key in sorted(keys)[:2]]
        more = f" and {count - len(named)} more" if count > len(named) else ""
        raise ValueError(f"{source}: not the weights of this ResNet: {', '.join(named)}{more}")
    for key, value in state.items():
        if not value.isfinite().all() or (key.endswith("running_var") and (value < 0).any()):
            raise ValueError(f"{source}: damaged weights: {key} holds values that are not finite or negative variances")
    resnet.load_state_dict(resnet.state_dict() | state)
