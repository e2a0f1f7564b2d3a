"""The modulated ResNet is torchvision's: equal to it with no or zero deltas, moved by every other one."""

import copy
import functools
import itertools

import pytest
import torch
import torchvision
from torch import nn
from torch.optim.swa_utils import update_bn
from torchvision.models.resnet import BasicBlock, ResNet

from vqa import resnet
from vqa.backbone import build_resnet
from vqa.cbn import Modulation
from vqa.norms import ModulatedGroupNorm
from vqa.resnet import ModulatedResNet


def with_statistics(resnet):
    """Gives a random network non-trivial norms, as a pretrained one has."""
    for module in resnet.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return resnet.eval()


def stage4_map(resnet, x):
    """torchvision's own modules, called by hand."""
    x = resnet.maxpool(resnet.relu(resnet.bn1(resnet.conv1(x))))
    return resnet.layer4(resnet.layer3(resnet.layer2(resnet.layer1(x))))


@functools.lru_cache(maxsize=2)
def pretrained(name):
    torch.manual_seed(0)
    return with_statistics(build_resnet(name))


def pair(name, stages=(1, 2, 3, 4), **where):
    """torchvision's network, and ours with its weights."""
    plain = copy.deepcopy(pretrained(name))
    torch.manual_seed(0)
    net = ModulatedResNet(name, None, stages, **where)
    state = {f"network.{key}": value for key, value in plain.state_dict().items() if not key.startswith("fc.")}
    net.load_state_dict(state, strict="normaliser" not in where)
    return plain, net


def random_modulation(net, batch, size=0.1):
    width = sum(layer.channels for layer in net.layers)
    return Modulation(size * torch.randn(batch, width), size * torch.randn(batch, width))


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        *[(f"resnet{depth}", (1, 2, 3, 4)) for depth in (10, 18, 34, 50, 101, 152)],
        *itertools.product(["resnet10", "resnet50"], [(2, 3, 4), (3, 4), (4,), (1, 3), ()]),
    ],
)
@torch.inference_mode()
def test_zero_deltas_equal_torchvision(name, stages):
    plain, net = pair(name, stages)
    x = torch.randn(2, 3, 64, 64)
    expected = stage4_map(plain, x)
    assert torch.equal(net(x), expected)
    zero = torch.zeros(2, sum(layer.channels for layer in net.layers))
    torch.testing.assert_close(
        net(x, Modulation(zero, zero)), expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item()
    )


@torch.inference_mode()
def test_zero_deltas_equal_torchvision_with_stem_and_shortcuts():
    plain, net = pair("resnet18", stem=True, shortcuts=True)
    names = [layer.name for layer in net.layers]
    assert names[0] == "bn1"
    assert "layer2.0.downsample.1" in names
    assert len(names) == 1 + 16 + 3
    x, zero = torch.randn(2, 3, 64, 64), torch.zeros(2, sum(layer.channels for layer in net.layers))
    torch.testing.assert_close(net(x, Modulation(zero, zero)), stage4_map(plain, x), rtol=1e-4, atol=1e-4)


def test_resnet50_has_the_papers_counts():
    net = ModulatedResNet("resnet50")
    assert len(net.layers) == 48
    assert sum(layer.channels for layer in net.layers) == 22_656
    assert net.layers[0][:3] == ("layer1.0.bn1", 1, 64)
    assert net.layers[-1].name == "layer4.2.bn3"
    assert [layer.stage for layer in net.layers] == sorted(layer.stage for layer in net.layers)
    norms = sum(p.numel() for m in net.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters())
    assert norms < 0.01 * sum(p.numel() for p in net.parameters())


def test_every_resnet_of_torchvision_can_be_modulated():
    for name in ("resnext50_32x4d", "wide_resnet50_2"):
        net = ModulatedResNet(name, stages=(4,))
        assert net(torch.randn(1, 3, 32, 32), random_modulation(net, 1)).shape == (1, net.channels, 1, 1)


def test_a_block_of_another_kind_is_refused_by_name(monkeypatch):
    class Preactivated(BasicBlock):
        """Another forward pass over the same layers."""

    monkeypatch.setattr(resnet, "build_resnet", lambda *_: ResNet(Preactivated, [1, 1, 1, 1]))
    with pytest.raises(ValueError, match=r"layer1\.0 must be a BasicBlock or a Bottleneck .*, not Preactivated"):
        ModulatedResNet("resnet10")


def timms(name, **changed):
    """A network as timm writes it: blocks of that module with further layers that do nothing, a head of its own."""
    kinds = {kind: type(kind.__name__, (kind,), {"__module__": "timm.models.resnet"}) for kind in resnet.LAYERS}
    network = copy.deepcopy(pretrained(name))
    network.act1, network.global_pool = network.relu, network.avgpool
    del network.relu, network.avgpool
    for module in network.modules():
        if type(module) in kinds:
            module.__class__ = kinds[type(module)]
            module.act1, module.aa, module.se, module.drop_path = nn.ReLU(inplace=True), nn.Identity(), None, None
            module.drop_block = nn.Identity()
    for place, layer in changed.items():
        network.set_submodule(place.replace("_", "."), layer)
    return network


@pytest.mark.parametrize("name", ["resnet10", "resnet50"])
@pytest.mark.parametrize("make", [pretrained, timms])
def test_a_network_itself_is_copied_with_its_weights(make, name):
    given = make(name)
    before = {key: value.clone() for key, value in given.state_dict().items()}
    net = ModulatedResNet(given, statistics="batch")  # which resets the averages
    assert all(value.requires_grad for value in given.parameters())
    net = ModulatedResNet(given)
    assert all(torch.equal(before[key], value) for key, value in given.state_dict().items())
    x, expected = torch.randn(2, 3, 64, 64), pair(name)[1]
    assert [tuple(layer) for layer in net.layers] == [tuple(layer) for layer in expected.layers]
    modulation = random_modulation(net, 2)
    for part in (None, modulation):
        assert torch.equal(net(x, part), expected(x, part))
    assert net.channels == expected.channels


def test_a_network_without_its_classifier_and_only_without_other_weights():
    given = copy.deepcopy(pretrained("resnet10"))
    given.fc = nn.Identity()
    assert ModulatedResNet(given).channels == 512
    with pytest.raises(ValueError, match="a network has its own weights"):
        ModulatedResNet(given, "IMAGENET1K_V1")


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"layer2_0_aa": nn.AvgPool2d(2)}, r"layer2\.0\.aa must be Identity of torch, not AvgPool2d"),
        ({"layer1_0_act1": nn.GELU()}, r"layer1\.0\.act1 must be ReLU of torch, not GELU"),
        (
            {"layer2_0_downsample_0": nn.AvgPool2d(2)},
            r"layer2\.0\.downsample\.0 must be Conv2d of torch, not AvgPool2d",
        ),
        ({"layer1_0_bn1": nn.GroupNorm(1, 64)}, r"layer1\.0\.bn1 must be BatchNorm2d of torch, not GroupNorm"),
        ({"conv1": nn.Sequential()}, "^conv1 must be Conv2d of torch, not Sequential"),
        ({"act1": nn.SiLU()}, "^act1 must be ReLU of torch, not SiLU"),
        ({"attention": nn.Linear(1, 1)}, "^attention must be Identity of torch, not Linear"),
    ],
)
def test_a_network_of_another_form_is_refused_by_the_layers_name(changed, says):
    with pytest.raises(ValueError, match=says):
        ModulatedResNet(timms("resnet10", **changed))


def test_what_is_no_resnet_is_refused():
    with pytest.raises(ValueError, match="Linear has no conv1"):
        ModulatedResNet(nn.Linear(2, 2))


@pytest.mark.parametrize(("name", "last"), [("resnet18", "bn2"), ("resnet50", "bn3")])
def test_parameters_are_in_the_order_of_the_forward_pass(name, last):
    """The state of an optimiser, in a checkpoint, goes by this order."""
    names = [name for name, _ in ModulatedResNet(name).network.layer2[0].named_parameters()]
    assert names[-4:] == ["downsample.1.weight", "downsample.1.bias", f"{last}.weight", f"{last}.bias"]


def test_deltas_reach_their_layer_and_sample_only():
    _, net = pair("resnet18")
    x = torch.randn(3, 3, 64, 64)
    still = net(x)
    start = 0
    for layer in net.layers:
        gamma = torch.zeros(3, sum(other.channels for other in net.layers))
        gamma[1, start : start + layer.channels] = 0.5
        start += layer.channels
        moved = (net(x, Modulation(gamma, None)) - still).abs().amax((1, 2, 3))
        assert moved[1] > 1e-3, layer.name
        assert moved[[0, 2]].max() < 1e-4, layer.name


def test_a_layers_slice_is_the_named_norms_delta():
    plain, net = pair("resnet18")
    x = torch.randn(2, 3, 64, 64)
    place = [layer.name for layer in net.layers].index("layer3.1.bn2")
    start = sum(layer.channels for layer in net.layers[:place])
    change = torch.randn(256) * 0.3
    gamma = torch.zeros(2, sum(layer.channels for layer in net.layers))
    gamma[:, start : start + 256] = change
    with torch.no_grad():
        plain.get_submodule("layer3.1.bn2").weight += change
    torch.testing.assert_close(net(x, Modulation(gamma, None)), stage4_map(plain, x), rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_a_batch_is_its_samples_in_any_order():
    _, net = pair("resnet50")
    x, modulation = torch.randn(4, 3, 64, 64), random_modulation(net, 4)
    together = net(x, modulation)
    scale = together.abs().max().item()
    for i in range(4):
        alone = net(x[i : i + 1], Modulation(modulation.gamma[i : i + 1], modulation.beta[i : i + 1]))
        torch.testing.assert_close(alone, together[i : i + 1], rtol=1e-3, atol=1e-4 * scale)
    order = torch.tensor([2, 0, 3, 1])
    permuted = net(x[order], Modulation(modulation.gamma[order], modulation.beta[order]))
    torch.testing.assert_close(permuted, together[order], rtol=1e-3, atol=1e-4 * scale)


def test_nothing_is_kept_between_calls():
    _, net = pair("resnet18")
    x = torch.randn(2, 3, 64, 64)
    before = net(x)
    state = {key: value.clone() for key, value in net.state_dict().items()}
    net(x, random_modulation(net, 2))
    assert torch.equal(net(x), before)
    assert all(torch.equal(state[key], value) for key, value in net.state_dict().items())


def test_training_mode_thaws_nothing():
    _, net = pair("resnet18")
    net.train()
    state = {key: value.clone() for key, value in net.state_dict().items()}
    net(torch.randn(2, 3, 64, 64), random_modulation(net, 2)).sum()
    net(torch.randn(2, 3, 64, 64))
    assert all(torch.equal(state[key], value) for key, value in net.state_dict().items())
    assert not any(parameter.requires_grad for parameter in net.parameters())


def test_what_can_be_trained():
    _, net = pair("resnet18")
    assert net.trainable("none") == []
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    stage4 = {names[id(parameter)] for parameter in net.trainable("stage4")}
    assert stage4 == {name for name in names.values() if name.startswith("network.layer4.")}
    norms = {names[id(parameter)] for parameter in net.trainable("batchnorm")}
    assert norms == {name for name in names.values() if ".bn" in name or ".downsample.1." in name}
    with pytest.raises(ValueError, match="stage4"):
        net.trainable("stage3")


@pytest.mark.parametrize("shape", [(2, 5), (2, 3, 3)])
def test_a_modulation_of_another_width_is_refused(shape):
    net = ModulatedResNet("resnet18")
    with pytest.raises(ValueError, match="3840"):
        net(torch.randn(2, 3, 32, 32), Modulation(torch.zeros(shape), None))


def test_unknown_stages_and_networks_are_refused():
    with pytest.raises(ValueError, match="stages are 1, 2, 3 and 4, got 5"):
        ModulatedResNet("resnet18", stages=(4, 5))
    with pytest.raises(ValueError, match="no ResNet"):
        ModulatedResNet("vgg16")
    with pytest.raises(ValueError, match="IMAGENET1K_V1"):
        ModulatedResNet("resnet18", "IMAGENET1K_V7")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_from_a_file(tmp_path, suffix):
    from safetensors.torch import save_file

    plain = with_statistics(torchvision.models.resnet18(num_classes=7))
    file = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(plain.state_dict(), file)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(ModulatedResNet("resnet18", file)(x), stage4_map(plain, x))


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
        with pytest.raises(ValueError, match=f"^{cached}: .*; remove it, and it is downloaded again$"):
            ModulatedResNet("resnet18", "IMAGENET1K_V1")


def test_a_login_page_in_place_of_published_weights_is_not_kept(cached, monkeypatch, tmp_path):
    (tmp_path / "page").write_text("<!DOCTYPE html><html>Please log in</html>")
    opened = torch.hub.urlopen
    monkeypatch.setattr(torch.hub, "urlopen", lambda _: opened((tmp_path / "page").as_uri()))
    with pytest.raises(ValueError, match="IMAGENET1K_V1 of resnet18 could not be downloaded .*give the file"):
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


@pytest.mark.parametrize("recompute", [(), (2, 3)])
def test_compiles_without_graph_breaks(recompute):
    _, net = pair("resnet10", recompute=recompute)
    explained = torch._dynamo.explain(net)(torch.randn(2, 3, 32, 32), random_modulation(net, 2))
    assert explained.graph_break_count == 0


def test_is_exported_for_batches_of_any_size():
    _, net = pair("resnet10")
    batch = torch.export.Dim("batch")
    shapes = {"images": {0: batch}, "modulation": Modulation({0: batch}, {0: batch})}
    arguments = torch.randn(2, 3, 32, 32), random_modulation(net, 2)
    exported = torch.export.export(net, arguments, dynamic_shapes=shapes).module()
    images, modulation = torch.randn(3, 3, 32, 32), random_modulation(net, 3)
    torch.testing.assert_close(exported(images, modulation), net(images, modulation), rtol=1e-4, atol=1e-4)


def test_batch_statistics_are_those_of_a_network_in_training_mode():
    torch.manual_seed(0)
    plain = build_resnet("resnet10")
    net = ModulatedResNet("resnet10")
    net.load_state_dict({f"network.{k}": v for k, v in plain.state_dict().items() if not k.startswith("fc.")})
    net.set_statistics("batch")
    for norm in plain.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.reset_running_stats()
            norm.momentum = 0.01  # decay 0.99
    features = nn.Sequential(*list(plain.children())[:-2])
    x = torch.randn(6, 3, 64, 64)
    for _ in range(3):
        torch.testing.assert_close(net.train()(x), features.train()(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(net.eval()(x), features.eval()(x), rtol=1e-4, atol=1e-4)
    with_zeros = Modulation(*(torch.zeros(6, sum(layer.channels for layer in net.layers)) for _ in range(2)))
    torch.testing.assert_close(net.train()(x, with_zeros), features.train()(x), rtol=1e-4, atol=1e-4)
    assert not any(parameter.requires_grad for parameter in net.parameters())


@pytest.mark.parametrize(
    ("size", "where", "least"),
    [
        (32, {}, 2),
        (33, {}, 1),
        (32, {"stages": (4,), "normaliser": "layer"}, 2),  # the shortcut's norm is a batch norm still
        (32, {"stages": (4,), "normaliser": "layer", "shortcuts": True}, 1),
    ],
)
def test_the_least_batch_whose_statistics_can_be_taken(size, where, least):
    net = ModulatedResNet("resnet10", statistics="batch", **where).train()
    assert net.least_batch(size) == least
    net(torch.randn(least, 3, size, size))
    if least > 1:
        with pytest.raises(ValueError, match="more than one value a channel"):
            net(torch.randn(least - 1, 3, size, size))


def test_population_statistics_are_those_of_a_network_in_evaluation_mode():
    net = ModulatedResNet("resnet10", statistics="population").train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(net(x)[:1], net(x[:1]))
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_conversions_between_the_policies():
    net = ModulatedResNet("resnet10", statistics="batch")
    x = torch.randn(4, 3, 64, 64)
    net.train()(x)
    running = net.network.get_submodule("bn1").running_mean.clone()
    assert running.abs().max() > 0
    evaluated = net.eval()(x)
    net.set_statistics("population")
    torch.testing.assert_close(net.train()(x), evaluated)  # the averages it had are its statistics from now on
    assert torch.equal(net.network.get_submodule("bn1").running_mean, running)
    net.set_statistics("batch")
    assert torch.equal(net.network.get_submodule("bn1").running_mean, torch.zeros(64))  # fresh
    assert torch.equal(net.network.get_submodule("bn1").running_var, torch.ones(64))


@pytest.mark.parametrize("sizes", [[4, 4, 3], [1, 1, 1], [7]])
@pytest.mark.parametrize("modulated", [False, True])
def test_estimated_statistics_are_those_of_all_values_of_uneven_batches(sizes, modulated):
    net = pair("resnet10", stem=True)[1]
    batches = [(5 + size) * torch.randn(size, 3, 64, 64) + size for size in sizes]
    stem = torch.cat([net.network.conv1(batch) for batch in batches])
    with torch.inference_mode(), net.estimating_statistics():
        for batch in batches:
            net(batch, random_modulation(net, len(batch)) if modulated else None)
    bn1 = net.network.get_submodule("bn1")
    torch.testing.assert_close(bn1.running_mean, stem.mean((0, 2, 3)))
    torch.testing.assert_close(bn1.running_var, stem.var((0, 2, 3)))
    assert bn1.num_batches_tracked == len(sizes)
    assert not bn1.training
    torch.testing.assert_close(net(batches[0])[:1], net(batches[0][:1]), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("statistics", ["population", "batch"])
def test_an_estimate_that_is_interrupted_or_has_no_batch_changes_nothing(statistics):
    net = pair("resnet10", statistics=statistics)[1].train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(KeyboardInterrupt), net.estimating_statistics():
        net(torch.randn(2, 3, 64, 64))
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match="at least one batch"), net.estimating_statistics():
        assert net.norm("bn1").training
    with pytest.raises(ValueError, match="more than one value"), net.estimating_statistics():
        net(torch.randn(1, 3, 32, 32))
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert net.norm("bn1").training == (statistics == "batch")
    net(torch.randn(2, 3, 64, 64))
    moved = not torch.equal(before["network.bn1.running_mean"], net.norm("bn1").running_mean)
    assert moved == (statistics == "batch")


def test_update_bn_is_refused_where_no_batch_would_move_the_statistics():
    batches = [3 * torch.randn(4, 3, 64, 64) + 1 for _ in range(2)]
    net = pair("resnet10")[1]
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(RuntimeError, match="estimating_statistics"):
        update_bn(batches, net)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert not net.norm("bn1").training
    net.set_statistics("batch")
    update_bn(batches, net)
    means = [net.network.conv1(batch).mean((0, 2, 3)) for batch in batches]
    torch.testing.assert_close(net.norm("bn1").running_mean, torch.stack(means).mean(0))


def test_an_adaptive_norm_starts_as_the_pretrained_one_and_alone_is_trained():
    plain, net = pair("resnet10", (3, 4), normaliser="adaptive")
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(net(images), stage4_map(plain.eval(), images), rtol=1e-4, atol=1e-5)
    modulation = random_modulation(net, 2)
    batch = ModulatedResNet("resnet10", stages=(3, 4))
    batch.load_state_dict(net.state_dict(), strict=False)
    torch.testing.assert_close(net(images, modulation), batch(images, modulation), rtol=1e-4, atol=1e-5)
    names = {name: value for name, value in net.network.named_parameters() if name.endswith((".a", ".b"))}
    assert len(names) == 2 * len(net.layers)
    assert {id(value) for value in net.trainable("none")} == {id(value) for value in names.values()}
    first = net.layers[0].name
    nn.init.constant_(names[f"{first}.a"], 0.5)
    nn.init.constant_(names[f"{first}.b"], 2.0)
    x, norm = torch.randn(2, net.layers[0].channels, 4, 4), batch.norm(first)
    expected = torch.relu(0.5 * x + 2 * norm(x) + 1)
    torch.testing.assert_close(net.norm(first)(x, None, torch.ones_like(x), True), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("normaliser", ["instance", "group", "layer"])
def test_other_normalisers_keep_the_pretrained_gamma_and_beta(normaliser):
    torch.manual_seed(0)
    batch = ModulatedResNet("resnet10", stages=(3, 4))
    for layer in batch.layers:
        nn.init.normal_(batch.norm(layer.name).weight)
    other = ModulatedResNet("resnet10", stages=(3, 4), normaliser=normaliser)
    kept = other.load_state_dict(batch.state_dict(), strict=False)
    assert not kept.missing_keys
    conditioned = [layer.name for layer in other.layers]
    assert {key.removeprefix("network.").rsplit(".", 1)[0] for key in kept.unexpected_keys} == set(conditioned)
    for name in conditioned:
        assert isinstance(other.norm(name), ModulatedGroupNorm)
        assert torch.equal(other.norm(name).weight, batch.norm(name).weight)
    x = torch.randn(3, 3, 64, 64)
    together = other(x)
    assert not torch.allclose(together, batch(x))
    torch.testing.assert_close(together[1:2], other(x[1:2]), rtol=1e-4, atol=1e-4)
    assert len(other.trainable("batchnorm")) == len(batch.trainable("batchnorm"))
