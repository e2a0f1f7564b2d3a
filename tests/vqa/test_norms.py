"""The family of conditional norms against independent statements of their formulas, stand-alone and over processes."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.processes import start_two
from vqa.cbn import (
    CategoricalConditionalBatchNorm2d,
    CategoricalPredictor,
    ConditionalBatchNorm2d,
    ConditionalGroupNorm,
    ConditionalInstanceNorm2d,
    ConditionalLayerNorm2d,
    Modulation,
)
from vqa.norms import ModulatedBatchNorm2d, ModulatedGroupNorm, groups_of

C = 6
CONDITIONAL = {
    "batch": lambda: ConditionalBatchNorm2d(C, 4, 5),
    "instance": lambda: ConditionalInstanceNorm2d(C, 4, 5),
    "group": lambda: ConditionalGroupNorm(3, C, 4, 5),
    "layer": lambda: ConditionalLayerNorm2d(C, 4, 5),
}


def statistics(kind, x, norm):
    """Mean and variance of each value's own set, in the shape of x, stated set by set."""
    mean, var = torch.empty_like(x), torch.empty_like(x)
    for b in range(x.shape[0]):
        for c in range(C):
            if kind == "batch":
                values = x[:, c]
            elif kind == "instance":
                values = x[b, c]
            elif kind == "group":
                values = x[b, c // 2 * 2 : c // 2 * 2 + 2]
            else:
                values = x[b]
            mean[b, c] = values.mean()
            var[b, c] = ((values - values.mean()) ** 2).mean()
    if kind == "batch" and not norm.training:
        mean, var = (part[None, :, None, None].expand_as(x) for part in (norm.running_mean, norm.running_var))
    return mean, var


def mlp(layers, condition):
    hidden = (condition @ layers[0].weight.T + layers[0].bias).clamp(min=0)
    return (hidden @ layers[2].weight.T + layers[2].bias)[:, :, None, None]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", CONDITIONAL)
def test_a_conditional_norm_is_its_formula(kind, training):
    norm = CONDITIONAL[kind]().double().train(training)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    if kind == "batch":
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.3, 3.0)
    x, condition = torch.randn(3, C, 4, 5).double(), torch.randn(3, 4).double()
    mean, var = statistics(kind, x, norm)
    gamma = norm.weight[None, :, None, None] + mlp(norm.delta_gamma, condition)
    beta = norm.bias[None, :, None, None] + mlp(norm.delta_beta, condition)
    torch.testing.assert_close(norm(x, condition), gamma * (x - mean) / (var + norm.eps).sqrt() + beta)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", CONDITIONAL)
def test_gradients_of_conditional_norms_in_float64(kind, training):
    norm = CONDITIONAL[kind]().double().train(training)
    x = torch.randn(2, C, 3, 2, dtype=torch.float64, requires_grad=True)
    condition = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(norm, (x, condition))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", CONDITIONAL)
def test_the_gradient_of_a_conditional_norm_can_be_differentiated(kind, training):
    norm = CONDITIONAL[kind]().train(training)
    x, condition = torch.randn(2, C, 3, 2, requires_grad=True), torch.randn(2, 4)
    penalties = []
    for norm.fused in (True, "eager", False):
        (gradient,) = torch.autograd.grad(norm(x, condition).sum(), x, create_graph=True)
        penalties.append(torch.autograd.grad(gradient.square().sum(), norm.delta_gamma.parameters()))
    for fused, composed in zip(penalties[0] + penalties[1], penalties[2] * 2, strict=True):
        torch.testing.assert_close(fused, composed, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training", [False, True])
def test_the_categorical_norm_is_a_batch_norm_for_each_class(training):
    norm = CategoricalConditionalBatchNorm2d(C, 3).double()
    assert torch.equal(norm.weight, torch.ones(3, C).double())
    assert torch.equal(norm.bias, torch.zeros(3, C).double())
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    plain = [nn.BatchNorm2d(C).double().train(training) for _ in range(3)]
    for own, weight, bias in zip(plain, norm.weight, norm.bias, strict=True):
        own.load_state_dict(own.state_dict() | {"weight": weight, "bias": bias})
    x, classes = torch.randn(4, C, 3, 3).double(), torch.tensor([2, 0, 2, 1])
    ours = norm.train(training)(x, classes)
    for sample, number in enumerate(classes):
        torch.testing.assert_close(ours[sample], plain[number](x)[sample])
    torch.testing.assert_close(norm.running_var, plain[1].running_var)
    x.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda some: norm(some, classes), (x,))


@pytest.mark.parametrize(
    ("classes", "says"),
    [
        ([0, 1, -1], r"must be from 0 to 2, got \[0, 1, -1\]"),
        ([0, 1, 3], r"must be from 0 to 2, got \[0, 1, 3\]"),
        ([1], r"must be \[B\] = \[3\], got \[1\]"),
        ([[0], [1], [2]], r"must be \[B\] = \[3\], got \[3, 1\]"),
    ],
)
def test_wrong_classes_are_refused_before_the_statistics_move(classes, says):
    norm = CategoricalConditionalBatchNorm2d(C, 3).train()
    with pytest.raises(ValueError, match=says):
        norm(torch.randn(3, C, 2, 2), torch.tensor(classes))
    assert norm.num_batches_tracked == 0
    assert not norm.running_mean.any()


@pytest.mark.parametrize("kind", ["instance", "group", "layer"])
def test_a_group_norm_without_deltas_is_pytorchs(kind):
    theirs = nn.BatchNorm2d(64, eps=1e-3)
    nn.init.normal_(theirs.weight)
    groups = groups_of(kind, 64)
    assert groups == {"instance": 64, "group": 32, "layer": 1}[kind]
    ours = ModulatedGroupNorm.from_batch_norm(theirs, groups)
    assert ours.weight is theirs.weight
    x, zero = torch.randn(2, 64, 4, 4), torch.zeros(2, 64)
    expected = nn.functional.group_norm(x, groups, theirs.weight, theirs.bias, 1e-3)
    torch.testing.assert_close(ours(x), expected)
    torch.testing.assert_close(ours(x, Modulation(zero, zero)), expected)


@pytest.mark.parametrize("training", [False, True])
def test_running_statistics_are_kept_and_used_as_by_pytorchs(training):
    norm, plain = ConditionalBatchNorm2d(C, 4, 5), nn.BatchNorm2d(C)
    for module in (norm, plain):
        module.train(training).track_running_stats = False
    x = 3 + torch.randn(4, C, 5, 5)

    forward, deltas = ModulatedBatchNorm2d.forward, Modulation(torch.zeros(4, C), None)
    torch.testing.assert_close(forward(norm, x, deltas), plain(x))
    for one, other in zip(norm.buffers(), plain.buffers(), strict=True):
        assert torch.equal(one, other)
    for module in (norm, plain):
        torch.func.replace_all_batch_norm_modules_(module)  # without buffers: always the batch's statistics
    torch.testing.assert_close(forward(norm, x, deltas), plain(x))


def test_statistics_of_one_value_are_refused():
    with pytest.raises(ValueError, match="more than one value"):
        ConditionalInstanceNorm2d(C, 4, 5)(torch.randn(2, C, 1, 1), torch.randn(2, 4))
    with pytest.raises(ValueError, match="more than one value"):
        ConditionalBatchNorm2d(C, 4, 5)(torch.randn(1, C, 1, 1), torch.randn(1, 4))


def test_a_table_of_deltas_begins_with_zeros_and_gives_a_class_its_row():
    predictor = CategoricalPredictor(3, [2, 4], gamma=True, beta=False)
    assert torch.equal(predictor.gamma.weight, torch.zeros(3, 6))
    nn.init.normal_(predictor.gamma.weight)
    deltas = predictor(torch.tensor([2, 0]))
    assert torch.equal(deltas.gamma, predictor.gamma.weight[[2, 0]])
    assert deltas.beta is None
    with pytest.raises(ValueError, match="γ, β or both"):
        CategoricalPredictor(3, [2], gamma=False, beta=False)


def whole_batch():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(6, C, 2, 3, generator=generator, dtype=torch.float64) * 3 + 5
    return x, *(torch.randn(6, C, generator=generator, dtype=torch.float64) for _ in range(2))


def one_rank(rank, folder, sizes):
    """Normalises its part of the batch and writes what came out, and the gradient of a loss over all parts."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=len(sizes))
    parts = [part.split(sizes)[rank].clone().requires_grad_(True) for part in whole_batch()]
    norm = ModulatedBatchNorm2d(C).double().train()
    norm.synchronised = True
    y = norm(parts[0], Modulation(*parts[1:]))
    (y**3).sum().backward()
    plain = norm(parts[0].detach())
    torch.save(
        [y.detach(), plain, *(part.grad for part in parts), norm.running_mean, norm.running_var], folder / str(rank)
    )
    dist.destroy_process_group()


@pytest.mark.parametrize("sizes", [[3, 3], [4, 2], [6, 0]])
def test_synchronised_statistics_are_those_of_the_whole_batch(sizes, tmp_path):
    """What `nn.SyncBatchNorm` does on GPUs: `nn.BatchNorm2d` on all processes' values together."""
    start_two(one_rank, tmp_path, sizes)
    ours = [
        torch.cat(parts) for parts in zip(*(torch.load(tmp_path / str(rank))[:5] for rank in range(2)), strict=True)
    ]
    x, gamma, beta = (part.requires_grad_(True) for part in whole_batch())
    plain = nn.BatchNorm2d(C).double().train()
    normalised = plain(x)
    y = (1 + gamma)[:, :, None, None] * normalised + beta[:, :, None, None]
    (y**3).sum().backward()
    expected = [y, plain(x), x.grad, gamma.grad, beta.grad]
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other.detach())
    for rank in range(2):  # the running statistics are the same everywhere
        for one, other in zip(
            torch.load(tmp_path / str(rank))[5:], (plain.running_mean, plain.running_var), strict=True
        ):
            torch.testing.assert_close(one, other)


def test_synchronised_statistics_are_compiled_in_one_graph(tmp_path):
    pytest.importorskip("torch", minversion="2.15", reason="torch 2.11 breaks the graph where processes exchange sums")
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        norm, x = ModulatedBatchNorm2d(C).train(), torch.randn(2, C, 3, 3)
        expected = norm(x)
        norm.synchronised = True
        torch.testing.assert_close(torch.compile(norm, backend=backend)(x), expected)
    finally:
        dist.destroy_process_group()
    assert len(graphs) == 1
