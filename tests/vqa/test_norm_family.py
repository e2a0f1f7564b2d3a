"""The relatives of conditional batch normalisation against independent statements of their formulas."""

import pytest
import torch
from torch import nn

from tests.vqa.test_norms import mlp
from vqa.norm_family import ConditionalAdaptiveNorm2d, ConditionalSwitchableNorm2d, SpatialConditionalBatchNorm2d

C = 3
FAMILY = {
    ConditionalAdaptiveNorm2d: torch.Size([2, 4]),
    ConditionalSwitchableNorm2d: torch.Size([2, 4]),
    SpatialConditionalBatchNorm2d: torch.Size([2, 4, 2, 1]),
}


def random_layer(kind, training):
    layer = kind(C, 4, 5, dtype=torch.float64, eps=1e-3).train(training)
    for value in (*layer.parameters(), layer.running_mean):
        nn.init.normal_(value)
    nn.init.uniform_(layer.running_var, 0.3, 3.0)
    return layer


def batch_statistics(layer, x):
    if not layer.training:
        return layer.running_mean[:, None, None], layer.running_var[:, None, None]
    return x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)


def affine(layer, condition):
    gamma, beta = layer.weight[None, :, None, None], layer.bias[None, :, None, None]
    return gamma + mlp(layer.delta_gamma, condition), beta + mlp(layer.delta_beta, condition)


def adaptive(layer, x, condition):
    gamma, beta = affine(layer, condition)
    mean, var = batch_statistics(layer, x)
    return layer.a * x + layer.b * (gamma * (x - mean) / (var + 1e-3).sqrt() + beta)


def switchable(layer, x, condition):
    gamma, beta = affine(layer, condition)
    sets = [(2, 3), (1, 2, 3)]
    means = [batch_statistics(layer, x)[0], *(x.mean(over, keepdim=True) for over in sets)]
    variances = [batch_statistics(layer, x)[1], *(x.var(over, correction=0, keepdim=True) for over in sets)]
    w, v = (logits.exp() / logits.exp().sum() for logits in (layer.mean_logits, layer.var_logits))
    mean = w[0] * means[0] + w[1] * means[1] + w[2] * means[2]
    var = v[0] * variances[0] + v[1] * variances[1] + v[2] * variances[2]
    return gamma * (x - mean) / (var + 1e-3).sqrt() + beta


def spatial(layer, x, condition):
    """Each value of the map from the position of the condition that nearest resizing assigns to it."""
    rows, columns = (torch.arange(size) * small // size for size, small in zip(x.shape[2:], (2, 1), strict=True))
    resized = condition[:, :, rows][:, :, :, columns]
    hidden = nn.functional.conv2d(resized, layer.hidden[0].weight, layer.hidden[0].bias, padding=1).clamp(min=0)
    deltas = nn.functional.conv2d(hidden, layer.deltas.weight, layer.deltas.bias, padding=1)
    mean, var = batch_statistics(layer, x)
    gamma, beta = layer.weight[:, None, None] + deltas[:, :C], layer.bias[:, None, None] + deltas[:, C:]
    return gamma * (x - mean) / (var + 1e-3).sqrt() + beta


FORMULAS = dict(zip(FAMILY, (adaptive, switchable, spatial), strict=True))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", FAMILY)
def test_a_layer_is_its_formula(kind, training):
    layer = random_layer(kind, training)
    x, condition = torch.randn(2, C, 4, 3).double(), torch.randn(FAMILY[kind]).double()
    expected = FORMULAS[kind](layer, x, condition)
    torch.testing.assert_close(layer(x, condition), expected)
    assert layer.num_batches_tracked == training


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", FAMILY)
def test_gradients_in_float64(kind, training):
    layer = random_layer(kind, training)
    x = torch.randn(2, C, 2, 3, dtype=torch.float64, requires_grad=True)
    condition = torch.randn(FAMILY[kind], dtype=torch.float64, requires_grad=True)
    learnt = [value for name, value in layer.named_parameters() if name in ("a", "b", "mean_logits", "var_logits")]
    assert torch.autograd.gradcheck(lambda x, condition, *_: layer(x, condition), (x, condition, *learnt))


@pytest.mark.parametrize("kind", [ConditionalAdaptiveNorm2d, SpatialConditionalBatchNorm2d])
def test_a_layer_starts_near_the_pretrained_norm(kind):
    plain = nn.BatchNorm2d(C).eval()
    nn.init.normal_(plain.running_mean)
    layer, x = kind.from_batch_norm(plain, 4, 5), torch.randn(2, C, 6, 6)
    assert layer.weight is plain.weight
    difference = (layer(x, torch.randn(FAMILY[kind])) - plain(x)).abs().mean() / plain(x).abs().mean()
    assert 0 < difference < 0.2


def test_switchable_statistics_start_at_thirds_and_the_batchs_alone_are_a_conditional_batch_norm():
    layer = ConditionalSwitchableNorm2d(C, 4, 5)
    assert torch.equal(layer.mean_logits.softmax(0), torch.full((3,), 1 / 3))
    plain, x = nn.BatchNorm2d(C), torch.randn(2, C, 4, 4)
    nn.init.zeros_(layer.delta_gamma[2].weight)
    nn.init.zeros_(layer.delta_beta[2].weight)
    for logits in (layer.mean_logits, layer.var_logits):
        logits.data = torch.tensor([0.0, -100.0, -100.0])
    torch.testing.assert_close(layer(x, torch.randn(2, 4)), plain(x))


@pytest.mark.parametrize("kind", FAMILY)
def test_a_condition_of_another_batch_is_refused_before_the_statistics_move(kind):
    layer = kind(C, 4, 5).train()
    with pytest.raises(ValueError, match="must be"):
        layer(torch.randn(3, C, 4, 4), torch.randn(FAMILY[kind]))
    assert layer.num_batches_tracked == 0


@pytest.mark.parametrize("kind", FAMILY)
def test_bfloat16_maps_keep_their_type(kind):
    layer = kind(C, 4, 5).eval()
    assert layer(torch.randn(2, C, 4, 4).bfloat16(), torch.randn(FAMILY[kind])).dtype == torch.bfloat16
