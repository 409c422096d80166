from datetime import timedelta

import pytest
import timm
import torch
from torch import distributed as dist
from torch import nn

from timm_supertickets.sparsity.scores import agree, grasp, lamp, magnitude, random, snip, synflow

LOSSES = {'snip': snip, 'grasp': grasp}
BIT_VIEWS = {torch.float32: torch.int32, torch.float64: torch.int64}


def linears(*matrices, bias=False):
    """Linear layers with these weights, in float64."""
    layers = [nn.Linear(len(rows[0]), len(rows), bias=bias, dtype=torch.float64) for rows in matrices]
    with torch.no_grad():
        for layer, rows in zip(layers, matrices, strict=True):
            layer.weight.copy_(torch.tensor(rows))
    return nn.Sequential(*layers)


def bits(tensor):
    """A copy of a tensor that tells 0.0 from -0.0."""
    return tensor.detach().clone().view(BIT_VIEWS.get(tensor.dtype, tensor.dtype))


class Net(nn.Module):
    """Train and eval modes mixed, a frozen weight, a gradient, a -0.0, batch norm with and without scale."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 4, 3, bias=True)
        self.bn = nn.BatchNorm2d(4)
        self.act = nn.ReLU6(inplace=True)
        self.frozen = nn.Conv2d(4, 4, 1)
        self.plain = nn.BatchNorm2d(4, affine=False)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 3)
        self.register_buffer('calls', torch.zeros(()))
        self.fails = False
        self.plain.eval()
        self.frozen.weight.requires_grad_(False)
        self.conv.weight.grad = torch.ones_like(self.conv.weight)
        with torch.no_grad():
            self.head.weight[0, 0] = -0.0
            self.bn.weight.uniform_(-2, 2)
            self.bn.bias.uniform_(-2, 2)
            self.bn.running_mean.uniform_(-2, 2)

    def forward(self, x):
        self.calls = self.calls + 1
        x = self.plain(self.frozen(self.act(self.bn(self.conv(x)))))
        if self.fails:
            raise RuntimeError('in forward')
        return self.head(self.drop(x).mean((2, 3)))

    def loss(self):
        torch.manual_seed(1)
        loss = self(torch.randn(5, 2, 6, 6)).square().sum()
        loss.backward(retain_graph=True)  # a careless one: it leaves gradients and another mode
        self.eval()
        return loss


def state(net):
    found = {name: bits(tensor) for name, tensor in (*net.named_parameters(), *net.named_buffers())}
    found |= {f'{name}.grad': bits(p.grad) for name, p in net.named_parameters() if p.grad is not None}
    flags = [m.training for m in net.modules()] + [p.requires_grad for p in net.parameters()]
    return found, flags, [id(tensor) for tensor in (*net.parameters(), *net.buffers(), net.conv.weight.grad)]


def test_magnitude_by_hand():
    net = nn.Sequential(nn.Conv2d(1, 2, (1, 2)), nn.BatchNorm2d(2), nn.Linear(2, 1))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[[[-3.0, 0.0]]], [[[0.5, -0.25]]]]))
        net[2].weight.copy_(torch.tensor([[1.0, -2.0]]))
    scores = magnitude(net)
    assert list(scores) == ['0.weight', '2.weight']
    assert scores['0.weight'].tolist() == [[[[3.0, 0.0]]], [[[0.5, 0.25]]]]
    assert scores['2.weight'].tolist() == [[1.0, 2.0]]


def test_magnitude_is_a_value_of_the_moment():
    net = nn.Sequential(nn.Linear(2, 2))
    scores = magnitude(net)
    before = scores['0.weight'].clone()
    assert not scores['0.weight'].requires_grad
    with torch.no_grad():
        net[0].weight.add_(1)
    assert torch.equal(scores['0.weight'], before)


def test_stem_and_classifier_have_no_scores():
    scores = magnitude(timm.create_model('supernet_mbv2_tiny'))
    assert 'blocks.0.0.conv_pw.weight' in scores
    assert not {'conv_stem.weight', 'classifier.weight'} & set(scores)


def test_random_by_its_generator():
    net = linears([[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0]])
    scores = random(net, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    assert list(scores) == ['0.weight', '1.weight']
    assert torch.equal(scores['0.weight'], torch.rand(2, 2, generator=generator))
    assert torch.equal(scores['1.weight'], torch.rand(1, 2, generator=generator))
    torch.manual_seed(3)
    assert torch.equal(random(net)['0.weight'], scores['0.weight'])


def test_snip_by_hand():
    net = linears([[1.0, -1.0], [2.0, 0.5]], [[3.0, -2.0]])
    x = torch.tensor([1.0, 2.0], dtype=torch.float64)
    # hidden (1 - 2, 2 + 1) = (-1, 3); y = -3 - 6 = -9; L = y * y / 2, dL/dy = -9
    # dy/dw: second layer (-1, 3); first layer ((3 * 1, 3 * 2), (-2 * 1, -2 * 2))
    scores = snip(net, lambda: net(x).square().sum() / 2)
    assert scores['1.weight'].tolist() == [[9 * 3 * 1, 9 * 2 * 3]]
    assert scores['0.weight'].tolist() == [[9 * 1 * 3, 9 * 1 * 6], [9 * 2 * 2, 9 * 0.5 * 4]]
    assert not any(score.requires_grad for score in scores.values())


@pytest.mark.parametrize(('target', 'first', 'second'), [(1.0, 14.0, 11.0), (3.0, -6.0, -9.0)])
def test_grasp_by_hand(target, first, second):
    # y = b * a with a = 2, b = 1; e = y - target; L = e * e / 2; gradient (e * b, e * a)
    # flow F = e * e * (a * a + b * b) / 2; dF/da = e * b * 5 + e * e * a, dF/db = e * a * 5 + e * e * b
    # target 1, e = 1: (5 + 2, 10 + 1) = (7, 11), times (a, b): (14, 11)
    # target 3, e = -1: (-5 + 2, -10 + 1) = (-3, -9), times (a, b): (-6, -9)
    net = linears([[2.0]], [[1.0]])
    scores = grasp(net, lambda: (net(torch.ones(1, dtype=torch.float64)) - target).square().sum() / 2)
    assert scores['0.weight'].tolist() == [[first]]
    assert scores['1.weight'].tolist() == [[second]]
    assert not any(score.requires_grad for score in scores.values())


def test_grasp_keeps_what_gradient_flow_would_lose():
    # L = (h1 * w1^2 + h2 * w2^2) / 2: without w_i the squared gradient falls by exactly (h_i * w_i)^2
    net = linears([[3.0, -1.0]])
    h = torch.tensor([1.0, 4.0], dtype=torch.float64)

    def loss():
        return (h * net[0].weight.square()).sum() / 2

    def squared_gradient():
        return torch.autograd.grad(loss(), net[0].weight)[0].square().sum().item()

    scores = grasp(net, loss)['0.weight']
    assert scores.tolist() == [[9.0, 16.0]]
    before = squared_gradient()
    for i in range(2):
        kept = net[0].weight[0, i].item()
        net[0].weight.data[0, i] = 0
        assert before - squared_gradient() == scores[0, i]
        net[0].weight.data[0, i] = kept


def test_grasp_of_a_linear_loss_is_zero():
    net = linears([[3.0, -1.0]])
    assert grasp(net, lambda: net(torch.ones(2, dtype=torch.float64)).sum())['0.weight'].tolist() == [[0.0, 0.0]]


def flow_net():
    net = linears([[1.0, -2.0], [-3.0, 4.0]], [[5.0, -6.0]], bias=True)
    bn = nn.BatchNorm1d(2, eps=1e-2).double()
    with torch.no_grad():
        bn.weight.fill_(-7)
        bn.bias.fill_(100)
        bn.running_mean.fill_(3)
        bn.running_var.fill_(9)
    return nn.Sequential(net[0], bn, nn.ReLU6(), net[1])


def test_synflow_by_hand():
    # |w|: hidden (1 + 2, 3 + 4) = (3, 7); R = 5 * 3 + 6 * 7 = 57; ReLU6, biases and batch norm take no part
    scores = synflow(flow_net(), (2,))
    assert list(scores) == ['0.weight', '3.weight']
    expected = {'0.weight': [[5 * 1, 5 * 2], [6 * 3, 6 * 4]], '3.weight': [[5 * 3, 6 * 7]]}
    for name, score in scores.items():
        assert score.dtype == torch.float64
        torch.testing.assert_close(score, torch.tensor(expected[name], dtype=torch.float64), rtol=1e-12, atol=0)
        assert score.sum().item() == pytest.approx(57)


def test_synflow_survives_what_float32_does_not():
    net = linears(*[[[1e8, 1e8], [1e8, 1e8]]] * 8).float()
    scores = synflow(net, (2,))  # R = 2 * (2e8)^8 = 5e66, a quarter of it through each weight
    for score in scores.values():
        torch.testing.assert_close(score, torch.full((2, 2), (2e8) ** 8 / 2, dtype=torch.float64), rtol=1e-6, atol=0)


def test_synflow_of_a_weight_shared_by_two_layers():
    net = linears([[2.0]], [[3.0]])
    net[1].weight = net[0].weight
    # R = w * w = 4, dR/dw = 2 * w
    assert {name: score.item() for name, score in synflow(net, (1,)).items()} == {'0.weight': 8}


def test_synflow_without_a_path_is_refused():
    with pytest.raises(ValueError, match=r'synaptic flow of Sequential is 0\.0'):
        synflow(linears([[0.0]], [[3.0]]), (1,))


@pytest.mark.parametrize('name', ['supernet_mbv2_tiny', 'supernet_hr_tiny'])
def test_synflow_is_conserved_in_every_block(name):
    scores = synflow(timm.create_model(name), (3, 32, 32))
    blocks = [key.removesuffix('.conv_pwl.weight') for key in scores if key.endswith('.conv_pwl.weight')]
    assert len(blocks) > 5
    for block in blocks:
        # what flows through a block flows through each of its three layers
        through = [
            sum(score.sum().item() for key, score in scores.items() if key.startswith(f'{block}.{layer}.'))
            for layer in ('conv_pw', 'conv_dw', 'conv_pwl')
        ]
        assert through[0] > 0
        assert through == pytest.approx([through[0]] * 3)


@pytest.mark.parametrize('fails', [False, True])
@pytest.mark.parametrize('score', ['random', 'snip', 'grasp', 'synflow'])
def test_scoring_leaves_the_net_as_it_was(score, fails):
    net = Net()
    before = state(net)
    calls = {
        'random': lambda: random(net),
        'snip': lambda: snip(net, net.loss),
        'grasp': lambda: grasp(net, net.loss),
        'synflow': lambda: synflow(net, (2, 6, 6)),
    }
    net.fails = fails
    if fails and score != 'random':
        with pytest.raises(RuntimeError, match='in forward'):
            calls[score]()
    else:
        scores = calls[score]()
        assert list(scores) == ['conv.weight', 'frozen.weight', 'head.weight']
        assert all(torch.isfinite(s).all() and s.abs().sum() > 0 and not s.requires_grad for s in scores.values())
    tensors, flags, identities = state(net)
    assert tensors.keys() == before[0].keys()
    assert all(torch.equal(tensors[name], before[0][name]) for name in tensors)
    assert (flags, identities) == before[1:]


@pytest.mark.parametrize('score', LOSSES)
def test_scores_are_the_same_where_gradients_are_off(score):
    net = Net()
    expected = LOSSES[score](net, net.loss)
    with torch.no_grad():
        # the careless backward of the loss still needs gradients, which scoring turns on
        found = LOSSES[score](net, net.loss)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize('score', LOSSES)
def test_losses_that_cannot_be_used_are_refused(score):
    net, other = linears([[1.0, 2.0]]), linears([[1.0, 2.0]])
    x = torch.ones(3, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match=r'scalar tensor, got shape \(3, 1\)'):
        LOSSES[score](net, lambda: net(x))
    with pytest.raises(ValueError, match='scalar tensor, got float'):
        LOSSES[score](net, lambda: net(x).sum().item())
    for loss in (lambda: other(x).sum(), lambda: net(x).sum().detach()):
        with pytest.raises(ValueError, match='depends on none of the 1 prunable'):
            LOSSES[score](net, loss)


def test_agree_alone_changes_nothing():
    scores = {'a': torch.tensor([1.0, -0.1])}
    agreed = agree(scores)
    assert torch.equal(agreed['a'], scores['a'])
    assert agreed['a'] is not scores['a']


def check_agreement(rank, store):
    wait = timedelta(minutes=2)
    dist.init_process_group('gloo', init_method=f'file://{store}', rank=rank, world_size=2, timeout=wait)
    try:
        net = linears([[1.0, -1.0], [2.0, 0.5]], [[3.0, -2.0]])
        batches = [torch.tensor(x, dtype=torch.float64) for x in ([1.0, 2.0], [0.3, -0.7])]
        each = [snip(net, lambda x=x: net(x).square().sum() / 2) for x in batches]
        agreed = agree(each[rank])
        for name, score in agreed.items():
            assert not torch.equal(each[0][name], each[1][name])
            torch.testing.assert_close(score, (each[0][name] + each[1][name]) / 2)
            both = [torch.empty_like(score) for _ in range(2)]
            dist.all_gather(both, score)
            assert torch.equal(*both)
    finally:
        dist.destroy_process_group()


def test_two_processes_agree(tmp_path):
    other = torch.multiprocessing.get_context('spawn').Process(target=check_agreement, args=(1, tmp_path / 'store'))
    other.start()
    check_agreement(0, tmp_path / 'store')
    other.join()
    assert other.exitcode == 0


def test_lamp_by_hand():
    scores = lamp(linears([[3.0, -1.0], [0.0, 2.0]], [[0.01, 0.03]]))
    # squares 9, 4, 1, 0: each by the sum of those that are not smaller
    assert torch.allclose(scores['0.weight'], torch.tensor([[1.0, 1 / 14], [0.0, 4 / 13]]).double())
    assert torch.allclose(scores['1.weight'], torch.tensor([[0.1, 1.0]]).double())


def test_lamp_does_not_see_the_scale_of_a_tensor_and_orders_it_by_magnitude():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 2, 1))
    before = lamp(net)
    with torch.no_grad():
        net[0].weight.mul_(-1e-4)
    after = lamp(net)
    for name in before:
        assert torch.allclose(before[name], after[name], rtol=1e-5)
        order = dict(net.named_parameters())[name].abs().flatten().argsort()
        assert before[name].flatten()[order].diff().min() >= -1e-7
        assert before[name].max() == 1


def test_lamp_of_a_tensor_of_zeros_is_zero():
    assert torch.equal(lamp(linears([[0.0, 0.0], [0.0, -0.0]]))['0.weight'], torch.zeros(2, 2).double())
