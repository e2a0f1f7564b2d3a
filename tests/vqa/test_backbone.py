"""Files of backbone weights: every form in which they are unambiguous loads the same network, every other is named."""

from argparse import Namespace

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file

from tests.resnets import stage4_map, with_statistics
from vqa.backbone import build_resnet
from vqa.resnet import ModulatedResNet


@pytest.fixture(scope="module")
def state():
    """The weights of a small ResNet, with random statistics."""
    torch.manual_seed(0)
    weights = build_resnet("resnet10").state_dict()
    return {key: torch.rand_like(value) if "running" in key else value for key, value in weights.items()}


def loads(file, state, name="resnet10"):
    ours = build_resnet(name, file).state_dict()
    kept = {key: value for key, value in state.items() if not key.startswith("fc.")}
    return all(torch.equal(ours[key], value) for key, value in kept.items())


def with_prefix(prefix, state):
    return {f"{prefix}{key}": value for key, value in state.items()}


FORMS = {
    "with nothing around it": lambda state: state,
    "without counters, as before torch 0.4.1": lambda state: {k: v for k, v in state.items() if "tracked" not in k},
    "with another classifier": lambda state: state | {"fc.weight": torch.ones(7, 9), "fc.bias": torch.ones(7)},
    "without a classifier": lambda state: {k: v for k, v in state.items() if not k.startswith("fc.")},
    "of DataParallel": lambda state: with_prefix("module.", state),
    "of DataParallel and torch.compile": lambda state: with_prefix("module._orig_mod.", state),
    "in a checkpoint": lambda state: {"epoch": 90, "arch": "resnet10", "state_dict": state, "best_acc1": 70.1},
    "in torchvision's checkpoint": lambda state: {
        "model": state,
        "optimizer": torch.optim.SGD([torch.zeros(1)], 0.1).state_dict(),
        "args": Namespace(lr=0.1, model="resnet10"),
    },
    "in a checkpoint of DataParallel": lambda state: {"state_dict": with_prefix("module.", state)},
}


@pytest.mark.parametrize("form", FORMS)
def test_weights_in_every_unambiguous_form(tmp_path, state, form):
    torch.save(FORMS[form](state), tmp_path / "weights.pth")
    assert loads(tmp_path / "weights.pth", state)


@pytest.mark.parametrize("name", ["w.bin", "w.pth.tar", "w.ckpt", "w"])
def test_a_file_is_read_whatever_its_ending(here, state, name):
    torch.save(state, here / name)
    assert loads(name, state)
    save_file(with_prefix("module.", state), name)
    assert loads(name, state)


def timms_names():
    """The keys of timm's resnet18 with their shapes, stated by hand."""
    shapes = {"conv1.weight": (64, 3, 7, 7), "fc.weight": (1000, 512), "fc.bias": (1000,)}
    norms = {"bn1": 64}
    for stage, channels in enumerate((64, 128, 256, 512), 1):
        for block in range(2):
            before = max(channels // 2, 64) if block == 0 else channels
            for number, given in ((1, before), (2, channels)):
                shapes[f"layer{stage}.{block}.conv{number}.weight"] = (channels, given, 3, 3)
                norms[f"layer{stage}.{block}.bn{number}"] = channels
        if stage > 1:
            shapes[f"layer{stage}.0.downsample.0.weight"] = (channels, channels // 2, 1, 1)
            norms[f"layer{stage}.0.downsample.1"] = channels
    for name, channels in norms.items():
        shapes |= {f"{name}.{part}": (channels,) for part in ("weight", "bias", "running_mean", "running_var")}
        shapes[f"{name}.num_batches_tracked"] = ()
    return shapes


def test_a_file_of_timm(tmp_path):
    state = {key: torch.rand(shape) for key, shape in timms_names().items()}
    state |= {key: torch.tensor(7) for key in state if key.endswith("tracked")}
    save_file(state, tmp_path / "model.safetensors")
    assert loads(tmp_path / "model.safetensors", state, "resnet18")
    checkpoint = {"epoch": 3, "arch": "resnet18", "state_dict": state, "version": 2, "args": Namespace(amp=True)}
    torch.save(checkpoint, tmp_path / "last.pth.tar")
    assert loads(tmp_path / "last.pth.tar", state, "resnet18")


WRONG = {
    r"several networks \(model, model_ema\); save one of them": lambda state: {"model": state, "model_ema": state},
    "must hold weights by name": lambda _: {"epoch": 3, "state_dict": {}},
    "unknown encoder_k.bn1.bias": lambda state: with_prefix("encoder_q.", state) | with_prefix("encoder_k.", state),
    "this ResNet: unknown last_linear.bias$": lambda state: {**state, "last_linear.bias": torch.zeros(3)},
    r"holds numpy[\w.]+scalar, more than tensors": lambda state: {"state_dict": state, "best": np.float64(1)},
}


@pytest.mark.parametrize("message", WRONG)
def test_weights_in_another_form_are_named(tmp_path, state, message):
    torch.save(WRONG[message](state), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"weights.pth: ") as caught:
        build_resnet("resnet10", tmp_path / "weights.pth")
    assert caught.match(message)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("here")
def test_what_is_no_file_and_no_name_of_weights_is_named():
    with pytest.raises(ValueError, match=r"'w.bin' is neither a file nor one of the weights of resnet18: "):
        build_resnet("resnet18", "w.bin")
    with pytest.raises(ValueError, match=r"resnet10 has no published weights and 'w.bin' is not a file"):
        build_resnet("resnet10", "w.bin")
    with pytest.raises(ValueError, match=r"w.pth: no such file"):
        build_resnet("resnet18", "w.pth")


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """Where torchvision caches the weights IMAGENET1K_V1 of resnet18."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    file.parent.mkdir(parents=True)
    return file


def test_published_weights_are_read_from_torchvisions_cache(cached):
    plain = with_statistics(torchvision.models.resnet18())
    state = plain.state_dict()
    torch.save({key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}, cached)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(ModulatedResNet("resnet18", "IMAGENET1K_V1")(x), stage4_map(plain, x))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_damaged_file_in_torchvisions_cache_is_to_be_removed(cached, zipped):
    torch.save(torchvision.models.resnet18().state_dict(), cached, _use_new_zipfile_serialization=zipped)
    whole = cached.read_bytes()
    for damaged in (whole[:2_000_000], whole[:2000], b"", b"<!DOCTYPE html><html>Please log in</html>"):
        cached.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"^{cached}: .*; remove it to download it again$"):
            ModulatedResNet("resnet18", "IMAGENET1K_V1")


def test_a_login_page_in_place_of_published_weights_is_not_kept(cached, monkeypatch, tmp_path):
    (tmp_path / "page").write_text("<!DOCTYPE html><html>Please log in</html>")
    opened = torch.hub.urlopen
    monkeypatch.setattr(torch.hub, "urlopen", lambda _: opened((tmp_path / "page").as_uri()))
    with pytest.raises(ValueError, match="IMAGENET1K_V1 of resnet18 could not be downloaded .*name the file"):
        ModulatedResNet("resnet18", "IMAGENET1K_V1")
    assert not cached.exists()


def test_weights_that_do_not_fit_name_their_keys(tmp_path):
    state = torchvision.models.resnet18().state_dict()
    del state["layer1.0.bn1.running_var"]
    state["layer1.0.bn9.weight"] = torch.zeros(1)
    state["conv1.weight"] = torch.zeros(1)
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="other.pth") as caught:
        ModulatedResNet("resnet18", tmp_path / "other.pth")
    for key in ("missing layer1.0.bn1.running_var", "unknown layer1.0.bn9.weight", "shape of conv1.weight"):
        assert key in str(caught.value)


def test_a_file_that_is_no_weights_runs_nothing(tmp_path):
    (tmp_path / "evil.pth").write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR.")
    for name in ("evil.pth", "absent.pth"):
        with pytest.raises(ValueError, match=name):
            ModulatedResNet("resnet18", tmp_path / name)
    assert not (tmp_path / "ran").exists()
