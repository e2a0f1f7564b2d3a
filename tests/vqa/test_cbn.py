"""Conditional batch normalisation against independent statements of its formula, and against `nn.BatchNorm2d`."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from vqa.cbn import ConditionalBatchNorm2d, DeltaMLP, Modulation, ModulationPredictor
from vqa.norms import ModulatedBatchNorm2d, ModulatedGroupNorm


def formula(x, mean, var, gamma, beta, eps):
    """y = γ̂ (x − mean) / sqrt(var + ε) + β̂, one value after the other."""
    y = torch.empty_like(x)
    for b in range(x.shape[0]):
        for c in range(x.shape[1]):
            y[b, c] = gamma[b, c] * (x[b, c] - mean[c]) / (var[c] + eps) ** 0.5 + beta[b, c]
    return y


def random_norm(channels=5, kind=ModulatedBatchNorm2d):
    """A norm with non-trivial γ, β and statistics, in float64."""
    norm = kind(channels).double()
    for value in (norm.weight, norm.bias, norm.running_mean):
        nn.init.normal_(value)
    nn.init.uniform_(norm.running_var, 0.3, 3.0)
    return norm


@pytest.mark.parametrize("training", [False, True])
def test_the_formula_and_running_statistics_that_move_as_those_of_batchnorm2d(training):
    norm, plain = random_norm().train(training), nn.BatchNorm2d(5).double().train(training)
    plain.load_state_dict(norm.state_dict())
    x, gamma, beta = torch.randn(3, 5, 4, 4).double(), torch.randn(3, 5).double(), torch.randn(3, 5).double()
    mean, var = norm.running_mean, norm.running_var
    if training:
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    expected = formula(x, mean, var, norm.weight + gamma, norm.bias + beta, norm.eps)
    torch.testing.assert_close(norm(x, Modulation(gamma, beta)), expected)
    plain(x)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(norm.state_dict()[name], value, msg=name)


@pytest.mark.parametrize("training", [False, True])
def test_zero_deltas_and_none_are_batchnorm2d(training):
    norm, plain = random_norm(), nn.BatchNorm2d(5).double()
    plain.load_state_dict(norm.state_dict())
    other = random_norm()
    other.load_state_dict(norm.state_dict())
    x, zero = torch.randn(4, 5, 3, 3).double(), torch.zeros(4, 5).double()
    expected = plain.train(training)(x)
    with torch.no_grad():  # where nothing is differentiated, to the bit
        assert torch.equal(norm.train(training)(x), expected)
    torch.testing.assert_close(norm.eval()(x), plain.eval()(x))
    torch.testing.assert_close(other.train(training)(x, Modulation(zero, zero)), expected)


def test_only_gamma_or_only_beta():
    norm = random_norm().eval()
    x, delta, zero = torch.randn(2, 5, 3, 3).double(), torch.randn(2, 5).double(), torch.zeros(2, 5).double()
    torch.testing.assert_close(norm(x, Modulation(delta, None)), norm(x, Modulation(delta, zero)))
    torch.testing.assert_close(norm(x, Modulation(None, delta)), norm(x, Modulation(zero, delta)))


def test_a_delta_of_another_batch_or_width_is_refused():
    norm = random_norm().eval()
    with pytest.raises(ValueError, match=r"\[B, C\] = \[2, 5\]"):
        norm(torch.randn(2, 5, 3, 3).double(), Modulation(torch.zeros(3, 5), None))


def test_a_norm_without_running_statistics_is_refused():
    with pytest.raises(ValueError, match="running statistics"):
        ModulatedBatchNorm2d.from_batch_norm(nn.BatchNorm2d(4, track_running_stats=False))


def test_the_stand_alone_layer_starts_near_batchnorm2d_and_takes_its_state():
    plain = nn.BatchNorm2d(8).eval()
    nn.init.normal_(plain.running_mean)
    norm = ConditionalBatchNorm2d(8, condition_size=16, hidden_size=32).eval()
    missing = norm.load_state_dict(plain.state_dict(), strict=False)
    assert not missing.unexpected_keys
    assert all(key.startswith(("delta_gamma", "delta_beta")) for key in missing.missing_keys)
    x, condition = torch.randn(4, 8, 5, 5), torch.randn(4, 16)
    difference = (norm(x, condition) - plain(x)).abs().mean() / plain(x).abs().mean()
    assert 0 < difference < 0.1
    assert not torch.equal(norm(x, condition), norm(x, condition + 1))


@pytest.mark.parametrize(
    "norm", [ModulatedBatchNorm2d(16).eval(), ModulatedBatchNorm2d(16).train(), ModulatedGroupNorm(4, 16)]
)
def test_bfloat16_maps_are_computed_in_float32(norm):
    x = (5 + torch.randn(2, 16, 4, 4)).bfloat16()
    if norm.training is False:
        nn.init.normal_(norm.running_mean, 5.0)
    gamma, beta = 0.1 * torch.randn(2, 16), 0.1 * torch.randn(2, 16)
    exact = norm(x.float(), Modulation(gamma, beta))
    ours = norm(x, Modulation(gamma, beta))
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours, exact.bfloat16())


def test_initial_deltas_have_zero_mean_and_small_variance():
    predictor = ModulationPredictor(32, ["a.bn1", "b.bn2"], [200, 300], 64, gamma=True, beta=True)
    deltas = predictor(torch.randn(64, 32))
    for part in deltas:
        assert part.shape == (64, 500)
        assert abs(part.mean()) < 0.01
        # 64 hidden units with a mean square of 1 (He et al. 2015), and weights of deviation 0.01
        assert part.std().item() == pytest.approx(0.08, rel=0.1)
    for part in predictor(torch.zeros(1, 32)):  # no bias outweighs a small condition
        assert not part.any()


@pytest.mark.parametrize(("gamma", "beta"), [(True, False), (False, True)])
def test_a_predictor_of_one_kind_gives_none_for_the_other(gamma, beta):
    deltas = ModulationPredictor(4, ["bn1"], [7], 5, gamma=gamma, beta=beta)(torch.randn(2, 4))
    assert (deltas.gamma is not None, deltas.beta is not None) == (gamma, beta)


def predictor_of_norms(**what):
    return ModulationPredictor(6, ["layer1.0.bn1", "layer2.0.bn2"], [4, 10], 5, **{"gamma": True, "beta": True} | what)


def test_a_predictor_is_one_mlp_a_norm_by_its_name():
    predictor = predictor_of_norms()
    state = predictor.state_dict()
    assert list(state)[:4] == [f"gamma.layer1_0_bn1.{rest}" for rest in ("0.weight", "0.bias", "2.weight", "2.bias")]
    condition = torch.randn(3, 6)
    for kind, deltas in zip(("gamma", "beta"), predictor(condition), strict=True):
        for name, columns in (("layer1_0_bn1", slice(0, 4)), ("layer2_0_bn2", slice(4, 14))):
            mlp = DeltaMLP(6, 5, columns.stop - columns.start)
            mlp.load_state_dict({key: state[f"{kind}.{name}.{key}"] for key in mlp.state_dict()})
            torch.testing.assert_close(deltas[:, columns], mlp(condition))


@pytest.mark.parametrize("samples", [3, 0])
def test_the_batched_product_for_gpus_gives_the_same(samples):
    mlps = predictor_of_norms().gamma
    hidden = torch.randn(samples, 10, requires_grad=True)
    results = []
    for together in (mlps._one_by_one, mlps._in_one_product):
        deltas = together(hidden)
        results.append((deltas, *torch.autograd.grad(deltas.square().sum(), (hidden, mlps.weight))))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_a_predictor_without_memory_takes_a_state_with_its_type():
    one = predictor_of_norms().double()
    with torch.device("meta"):
        other = predictor_of_norms()
    other.load_state_dict(one.state_dict(), assign=True)
    for ours, theirs in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert theirs.requires_grad


def test_a_predictors_state_comes_back():
    one, other = predictor_of_norms(), predictor_of_norms()
    other.load_state_dict(one.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    state = one.state_dict()
    del state["beta.layer2_0_bn2.2.bias"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"beta.layer2_0_bn2.2.bias"'):
        other.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"(?s)Unexpected key.*gamma.layer9.0.bias"):
        other.load_state_dict(one.state_dict() | {"gamma.layer9.0.bias": torch.zeros(2)})
    with pytest.raises(RuntimeError, match="size mismatch for gamma.layer1_0_bn1.0.bias"):
        other.load_state_dict(one.state_dict() | {"gamma.layer1_0_bn1.0.bias": torch.zeros(2)})


def test_a_predictor_takes_the_names_of_its_parameters_too():
    one, other = predictor_of_norms(), predictor_of_norms()
    other.load_state_dict(dict(one.named_parameters()))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    with pytest.raises(RuntimeError, match=r"Unexpected key.*gamma\.weight"):
        other.load_state_dict(one.state_dict() | {"gamma.weight": torch.zeros(14, 5)})


def test_the_state_of_a_pruned_predictor_comes_back():
    one, other = predictor_of_norms(), predictor_of_norms()
    for predictor in (one, other):
        prune.random_unstructured(predictor.gamma, "weight", 0.5)
    other.load_state_dict(one.state_dict())
    condition = torch.randn(3, 6)
    assert torch.equal(one(condition).gamma, other(condition).gamma)
