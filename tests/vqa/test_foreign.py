"""The norms of any network, conditioned inside a `with` block: by which condition, and where it is refused."""

import asyncio
import copy
import threading

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from tests.processes import start_two
from vqa.cbn import ConditionalBatchNorm2d
from vqa.foreign import condition_norms, conditioned

DRAWN = torch.Generator().manual_seed(0)
X, A, B = (torch.randn(shape, generator=DRAWN, dtype=torch.float64) for shape in ((4, 3, 6, 6), (4, 5), (4, 5)))
CHOSEN = ["1", "4"]
REFUSED = "give the condition to the function that is recomputed, exported or traced as an argument"


def plain_network():
    """In double precision: sums in the gradients cancel."""
    layers = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4)
    return nn.Sequential(*layers).double().eval()


def random_network():
    """A conditioned network whose deltas are far from zero."""
    torch.manual_seed(0)
    net = plain_network()
    assert condition_norms(net, 5, hidden_size=7) == CHOSEN
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.5)
    return net


def by_hand(net, x, condition):
    """The same without a block: every layer gets its condition as an argument."""
    for layer in net:
        x = ConditionalBatchNorm2d.forward(layer, x, condition) if hasattr(layer, "delta_gamma") else layer(x)
    return x


class ByHand(nn.Module):
    """A network whose forward pass takes the condition and passes it to its layers as an argument."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, condition):
        return by_hand(self.net, x, condition)


class WithArgument(ByHand):
    """A network whose forward pass takes the condition, and enters a block."""

    def forward(self, x, condition):
        with conditioned(condition):
            return self.net(x)


def gradients(net, loss):
    condition = A.clone().requires_grad_()
    net.zero_grad()
    loss(condition).square().sum().backward()
    return [condition.grad, *(parameter.grad.clone() for parameter in net.parameters())]


def test_the_norms_get_the_condition_of_the_block_only():
    net = random_network()
    with conditioned(A):
        first = net(X)
        with conditioned(B):
            torch.testing.assert_close(net(X), by_hand(net, X, B))
        torch.testing.assert_close(net(X), first)
    torch.testing.assert_close(first, by_hand(net, X, A))
    assert not torch.allclose(first, by_hand(net, X, B))
    with pytest.raises(KeyError), conditioned(A):
        raise KeyError
    with pytest.raises(RuntimeError, match="call the network in `with conditioned"):
        net(X)


def test_chosen_norms_keep_their_parameters_and_begin_near_the_network():
    plain = plain_network()
    net, options = copy.deepcopy(plain), {"hidden_size": 7, "beta": False}
    kept = net[4].weight
    assert condition_norms(net, 5, where=lambda name: name == "4", **options) == ["4"]
    assert net[4].weight is kept
    assert type(net[1]) is nn.BatchNorm2d
    assert net[4].delta_beta is None
    with conditioned(A):
        difference = (net(X) - plain(X)).abs().mean() / plain(X).abs().mean()
    assert 0 < difference < 0.1
    assert condition_norms(net, 5, where=lambda name: name == "1") == ["1"]


def test_a_norm_under_two_names_stays_one():
    shared = nn.BatchNorm2d(3)
    net = nn.Sequential(shared, nn.ReLU(), shared)
    assert condition_norms(net, 5) == ["0", "2"]
    assert net[0] is net[2]


def test_what_cannot_be_replaced_is_refused_and_nothing_is_replaced():
    class Activated(nn.BatchNorm2d):
        """A norm that computes something else too."""

    net = nn.Sequential(nn.BatchNorm2d(3), Activated(3))
    with pytest.raises(ValueError, match="1 is a Activated, not nn.BatchNorm2d; let `where` skip it"):
        condition_norms(net, 5)
    for option in ({"affine": False}, {"track_running_stats": False}):
        with pytest.raises(ValueError, match="1 has no γ and β, or no running statistics; let `where` skip it"):
            condition_norms(mixed := nn.Sequential(net[0], nn.BatchNorm2d(3, **option)), 5)
        assert mixed[0] is net[0]
    assert type(net[0]) is nn.BatchNorm2d
    for model, where in ((net, lambda name: name == "7"), (nn.Linear(2, 2), bool), (nn.BatchNorm2d(3), bool)):
        with pytest.raises(ValueError, match="has no nn.BatchNorm2d inside that `where` chooses"):
            condition_norms(model, 5, where)


def test_two_threads_have_two_conditions():
    net, meet, found = random_network(), threading.Barrier(2), {}

    def one(name, condition):
        with conditioned(condition):
            for turn in range(5):
                meet.wait(timeout=30)
                found[name, turn] = net(X)

    threads = [threading.Thread(target=one, args=item) for item in (("a", A), ("b", B))]
    with conditioned(B[:1]):  # not visible to other threads
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 10
    for (name, _), y in found.items():
        torch.testing.assert_close(y, by_hand(net, X, {"a": A, "b": B}[name]))


def test_two_tasks_have_two_conditions():
    net = random_network()

    async def one(condition):
        with conditioned(condition):
            await asyncio.sleep(0)
            return net(X)

    async def both():
        return await asyncio.gather(one(A), one(B))

    for y, condition in zip(asyncio.run(both()), (A, B), strict=True):
        torch.testing.assert_close(y, by_hand(net, X, condition))


@pytest.mark.parametrize("kind", [ByHand, WithArgument])
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_has_the_condition_that_is_an_argument(reentrant, kind):
    net = random_network()
    x, whole = X.clone().requires_grad_(), kind(net)
    expected = gradients(net, lambda condition: by_hand(net, x, condition))

    def recomputed(condition):
        y = checkpoint(whole, x, condition, use_reentrant=reentrant)
        with conditioned(B):  # of another step
            return y + 0

    torch.testing.assert_close(gradients(net, recomputed), expected)


@pytest.mark.parametrize("present", [None, "same", "other"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_under_a_block_around_is_refused(reentrant, present):
    net, x = random_network(), X.clone().requires_grad_()
    with conditioned(A):
        loss = checkpoint(net, x, use_reentrant=reentrant).sum()
    with pytest.raises(RuntimeError, match=REFUSED):
        if present is None:
            loss.backward()
        else:
            with conditioned({"same": A, "other": B}[present]):
                loss.backward()


@pytest.mark.parametrize("where", ["around", "within"])
def test_a_compiled_network_gets_each_condition(where):
    torch._dynamo.reset()
    net = random_network()
    compiled = torch.compile(WithArgument(net) if where == "within" else net, backend="aot_eager")

    def run(condition):
        if where == "within":
            return compiled(X, condition)
        with conditioned(condition):
            return compiled(X)

    for condition in (A, B, A):
        torch.testing.assert_close(run(condition), by_hand(net, X, condition))
    expected = gradients(net, lambda condition: by_hand(net, X, condition))
    torch.testing.assert_close(gradients(net, run), expected)
    with pytest.raises(RuntimeError, match="needs its condition|required positional"):
        compiled(X) if where == "around" else torch.compile(net, backend="aot_eager")(X)


def test_one_compiled_graph_is_refused():
    torch._dynamo.reset()
    compiled = torch.compile(random_network(), backend="aot_eager", fullgraph=True)
    with conditioned(A), pytest.raises(torch._dynamo.exc.Unsupported, match="is read outside of compiled graphs"):
        compiled(X)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit")  # shapes are checked, jit is old
def test_an_exported_or_traced_network_takes_the_condition_as_an_argument():
    net, batch = random_network(), torch.export.Dim("batch")
    shapes = {"x": {0: batch}, "condition": {0: batch}}
    exported = torch.export.export(WithArgument(net).eval(), (X, A), dynamic_shapes=shapes).module()
    traced = torch.jit.trace(WithArgument(net).eval(), (X, A))
    for size in (2, 3):
        for made in (exported, traced):
            torch.testing.assert_close(made(X[:size], B[:size]), by_hand(net, X[:size], B[:size]))
    with conditioned(A), pytest.raises(RuntimeError, match=REFUSED):
        torch.export.export(net, (X,))
    with conditioned(A), pytest.raises(RuntimeError, match=REFUSED):
        torch.jit.trace(net, (X,))


def one_rank(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    x, condition = torch.load(folder / "batch")
    x, condition = x.chunk(2)[rank], condition.chunk(2)[rank]
    net, layers = random_network(), ByHand(random_network())
    parallel, by_argument = DistributedDataParallel(net), DistributedDataParallel(layers)
    with conditioned(condition):
        parallel(x).square().sum().backward()
    by_argument(x, condition).square().sum().backward()
    torch.save([[parameter.grad for parameter in some.parameters()] for some in (net, layers)], folder / str(rank))
    dist.destroy_process_group()


def test_data_parallel_gradients_are_the_means_of_the_processes(tmp_path):
    torch.save((X, A), tmp_path / "batch")
    start_two(one_rank, tmp_path)
    net = random_network()
    expected = gradients(net, lambda condition: by_hand(net, X, condition))[1:]
    for rank in range(2):
        for found in torch.load(tmp_path / str(rank)):
            torch.testing.assert_close([2 * gradient for gradient in found], expected)
