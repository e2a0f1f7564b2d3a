"""The modulated ResNet is torchvision's: equal to it with no or zero deltas, moved by every other one."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torchvision.models.resnet import BasicBlock, ResNet

from tests.resnets import pair, pretrained, random_modulation, stage4_map
from vqa import resnet
from vqa.backbone import build_resnet
from vqa.blocks import LAYERS
from vqa.cbn import Modulation
from vqa.norms import ModulatedGroupNorm
from vqa.resnet import ModulatedResNet


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        *[(f"resnet{depth}", (1, 2, 3, 4)) for depth in (10, 18, 34, 50, 101, 152)],
        *(("resnet10", stages) for stages in [(2, 3, 4), (3, 4), (4,), (1, 3), ()]),
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


def test_a_wide_resnet_of_torchvision_can_be_modulated():
    net = ModulatedResNet("wide_resnet50_2", stages=(4,))
    assert net(torch.randn(1, 3, 32, 32), random_modulation(net, 1)).shape == (1, net.channels, 1, 1)


def test_a_block_of_another_kind_is_refused_by_name(monkeypatch):
    class Preactivated(BasicBlock):
        """Another forward pass over the same layers."""

    monkeypatch.setattr(resnet, "build_resnet", lambda *_: ResNet(Preactivated, [1, 1, 1, 1]))
    with pytest.raises(ValueError, match=r"layer1\.0 must be a BasicBlock or a Bottleneck .*, not Preactivated"):
        ModulatedResNet("resnet10")


def timms(name, **changed):
    """A network as timm writes it: blocks of that module with further layers that do nothing, a head of its own."""
    kinds = {kind: type(kind.__name__, (kind,), {"__module__": "timm.models.resnet"}) for kind in LAYERS}
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


@pytest.mark.parametrize(("make", "name"), [(pretrained, "resnet10"), (timms, "resnet50")])
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
    assert ModulatedResNet(given).channels == 128
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
    _, net = pair("resnet10")
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


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"stages": (4, 5)}, "stages are 1, 2, 3 and 4, got 5"),
        ({"recompute": (0, 4)}, "stages are 1, 2, 3 and 4, got 0"),
        ({"normaliser": "spectral"}, "unknown 'spectral'; there are batch, instance, group, layer, adaptive"),
        ({"statistics": "reestimated"}, "unknown 'reestimated'; there are population, batch"),
    ],
)
def test_unknown_options_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        ModulatedResNet("resnet10", **options)


@pytest.mark.parametrize(
    ("option", "says"), [("track_running_stats", "needs running statistics"), ("affine", "needs γ and β")]
)
def test_a_norm_that_cannot_be_modulated_is_named(option, says):
    network = build_resnet("resnet10")
    network.layer2[0].bn1 = nn.BatchNorm2d(128, **{option: False})
    with pytest.raises(ValueError, match=rf"^layer2\.0\.bn1: a modulated .*{says}"):
        ModulatedResNet(network)


def test_a_layer_at_two_places_and_a_pruned_one_are_refused_by_name():
    network = build_resnet("resnet18")
    network.layer1[1] = network.layer1[0]
    with pytest.raises(ValueError, match=r"^layer1\.1\.conv1 is the same layer as layer1\.0\.conv1"):
        ModulatedResNet(network)
    network = build_resnet("resnet10")
    prune.l1_unstructured(network.layer1[0].conv1, "weight", 0.5)
    with pytest.raises(ValueError, match=r"^layer1\.0\.conv1: its weight must be a parameter"):
        ModulatedResNet(network)


def test_a_modulation_is_refused_with_the_map_of_a_conditioned_stage():
    net, images = ModulatedResNet("resnet10", stages=(3, 4)), torch.randn(2, 3, 32, 32)
    modulation = random_modulation(net, 2)
    expected = net(images, modulation)
    torch.testing.assert_close(net(net.prefix(images, 2), modulation), expected)
    map_ = net.prefix(images, 3)
    for forward in (net, net.stage_maps):
        with pytest.raises(ValueError, match="the map after stage 3 was computed without the modulation"):
            forward(map_, modulation)
    torch.testing.assert_close(net(map_), net(images))


def test_unknown_networks_are_refused():
    with pytest.raises(ValueError, match="not a ResNet"):
        ModulatedResNet("vgg16")
    with pytest.raises(ValueError, match="IMAGENET1K_V1"):
        ModulatedResNet("resnet18", "IMAGENET1K_V7")


def test_compiles_without_graph_breaks_recomputed_or_not():
    _, net = pair("resnet10", recompute=(2, 3))
    explained = torch._dynamo.explain(net)(torch.randn(2, 3, 32, 32), random_modulation(net, 2))
    assert explained.graph_break_count == 0


@pytest.mark.parametrize("stages", [(3, 4), (1, 2, 3, 4)])
def test_compiles_as_one_graph_where_questions_share_an_image(stages):
    _, net = pair("resnet10", stages)
    arguments = torch.randn(2, 3, 32, 32), random_modulation(net, 3), torch.tensor([0, 1, 1])
    torch.testing.assert_close(torch.compile(net, backend="eager", fullgraph=True)(*arguments), net(*arguments))


def test_is_exported_for_batches_of_any_size():
    _, net = pair("resnet10")
    batch = torch.export.Dim("batch")
    shapes = {"images": {0: batch}, "modulation": Modulation({0: batch}, {0: batch})}
    arguments = torch.randn(2, 3, 32, 32), random_modulation(net, 2)
    exported = torch.export.export(net, arguments, dynamic_shapes=shapes).module()
    images, modulation = torch.randn(3, 3, 32, 32), random_modulation(net, 3)
    torch.testing.assert_close(exported(images, modulation), net(images, modulation), rtol=1e-4, atol=1e-4)


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
    assert len(set(stage4 := net.trainable("stage4"))) == len(stage4)
    first = net.layers[0].name
    nn.init.constant_(names[f"{first}.a"], 0.5)
    nn.init.constant_(names[f"{first}.b"], 2.0)
    x, norm = torch.randn(2, net.layers[0].channels, 4, 4), batch.norm(first)
    expected = torch.relu(0.5 * x + 2 * norm(x) + 1)
    torch.testing.assert_close(net.norm(first)(x, None, torch.ones_like(x), True), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("normaliser", ["instance", "group", "layer"])
def test_other_normalisers_keep_the_pretrained_gamma_and_beta(normaliser):
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
