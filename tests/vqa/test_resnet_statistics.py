"""The statistics of the norms: population, batch, and estimated on other images."""

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from tests.resnets import pair, random_modulation
from vqa.backbone import build_resnet
from vqa.cbn import Modulation
from vqa.resnet import ModulatedResNet


def test_batch_statistics_are_those_of_a_network_in_training_mode():
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
        with pytest.raises(ValueError, match="more than one value per channel"):
            net(torch.randn(least - 1, 3, size, size))


def test_population_statistics_are_those_of_evaluation_mode_and_nothing_is_kept_between_calls():
    net = ModulatedResNet("resnet10", statistics="population").train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    x = torch.randn(2, 3, 64, 64)
    plain = net(x)
    torch.testing.assert_close(plain[:1], net(x[:1]), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(net(x, random_modulation(net, 2)), plain)
    assert torch.equal(net(x), plain)
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


def test_recomputed_stages_refuse_the_policy_batch_at_once_and_later():
    with pytest.raises(ValueError, match="averages would move twice"):
        ModulatedResNet("resnet10", statistics="batch", recompute=(4,))
    net = ModulatedResNet("resnet10", recompute=(2,))
    with pytest.raises(ValueError, match="averages would move twice"):
        net.set_statistics("batch")
    assert net.statistics == "population"


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


def test_an_unknown_policy_changes_nothing():
    net = ModulatedResNet("resnet10")
    with pytest.raises(ValueError, match="unknown 'reestimated'; there are population, batch"):
        net.set_statistics("reestimated")
    assert net.statistics == "population"


def test_an_unknown_way_of_computing_is_refused():
    with pytest.raises(ValueError, match="fused must be True, False or 'eager', not 'no'"):
        ModulatedResNet("resnet10", fused="no")
