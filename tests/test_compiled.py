"""Kernels of our own in training. Loading them changes a whole process, so all of it happens in one of its own."""

import multiprocessing
import shutil
from itertools import product

import pytest
import torch
from torch.nn.functional import conv2d, unfold

from timm_supertickets.compiled import load_kernels

SERVED = [
    *({'k': k, 'stride': s, 'padding': p} for k, s, p in product((5, 7), (1, 2), (0, 2, 3))),
    {'channels': 1, 'batch': 1},
    {'channels': 8},
    {'channels': 33, 'size': (4, 5)},
    {'size': (2, 2)},  # smaller than the kernel
    {'size': (1, 1)},  # strides of sides of one say nothing
    {'size': (2, 2), 'stride': 2},
    {'size': (1, 6), 'sliced': True},
    {'size': (6, 1), 'channels_last': False},
    {'padding': (1, 3), 'k': 7},
    {'sliced': True},
    {'channels_last': False},
    {'batch': 0},
    *(
        {'k': 3, 'stride': s, 'padding': 1, 'size': size}
        for s, size in product((1, 2), ((1, 1), (2, 2), (4, 4), (2, 8)))
    ),
    {'k': 3, 'size': (1, 3), 'sliced': True},
]
LEFT = [
    {'k': 3}, {'k': 3, 'size': (3, 6), 'padding': 1},
    {'k': 9}, {'dilation': 2}, {'dtype': torch.float64}, {'groups': 4}, {'stride': (1, 2)}, {'k': (5, 7)},
]  # fmt: skip


def gradients(
    k=5, stride=1, padding=2, dilation=1, channels=20, batch=3, size=(9, 12), groups=None, dtype=torch.float32,
    sliced=False, channels_last=True,
):  # fmt: skip
    """What autograd makes of a convolution: gradients of its weight, its bias and its images; and a reference."""
    torch.manual_seed(0)
    tall, wide = (k, k) if isinstance(k, int) else k
    groups = groups or channels
    images = torch.randn(batch, 2 * channels if sliced else channels, *size, dtype=dtype)
    images = images.to(memory_format=torch.channels_last) if channels_last else images
    images.requires_grad_()
    weight = torch.randn(channels, channels // groups, tall, wide, dtype=dtype, requires_grad=True)
    bias = torch.randn(channels, dtype=dtype, requires_grad=True)
    x = images[:, channels // 2 : channels // 2 + channels] if sliced else images
    y = conv2d(x, weight, bias, stride, padding, dilation, groups)
    towards = torch.randn(y.shape, dtype=dtype)
    y.backward(towards)
    found = [weight.grad, bias.grad, images.grad]
    if groups < channels or not batch:
        return found, None
    patches = unfold(x.detach().double(), (tall, wide), dilation, padding, stride)
    patches = patches.view(batch, channels, tall * wide, -1)
    pixels = towards.double().flatten(2)
    sums = [
        torch.einsum('nckp,ncp->ck', *pair).view_as(weight)
        for pair in ((patches, pixels), (patches.abs(), pixels.abs()))
    ]
    return found, sums


def work(path):
    torch.set_num_threads(2)
    before = [gradients(**case)[0] for case in (*SERVED, *LEFT)]
    ours = torch._C._dispatch_has_kernel_for_dispatch_key
    found = [ours('aten::convolution_backward', 'CPU'), load_kernels('gradients.cpp')]
    found.append(ours('aten::convolution_backward', 'CPU'))
    torch.save((found, before, [gradients(**case) for case in (*SERVED, *LEFT)]), path)


@pytest.fixture(scope='module')
def seen(tmp_path_factory):
    if not shutil.which('c++'):
        pytest.skip('this machine has no C++ compiler')
    path = tmp_path_factory.mktemp('seen') / 'gradients.pt'
    process = multiprocessing.get_context('spawn').Process(target=work, args=(path,))
    process.start()
    process.join()
    assert process.exitcode == 0
    return torch.load(path)


def test_they_take_the_place_of_torch_s(seen):
    assert seen[0] == [False, True, True]


@pytest.mark.parametrize('number', range(len(SERVED)))
def test_gradients_of_depthwise_kernels_are_those_of_the_definition(seen, number):
    (weight, bias, images), expected = seen[2][number]
    before = seen[1][number]
    if expected is None:
        assert not weight.any()
    else:
        exact, sizes = expected  # float32 rounds at 6e-8 of what is added up
        assert ((weight.double() - exact).abs() <= 1e-6 * sizes).all()
    assert weight.shape == before[0].shape
    assert torch.equal(bias, before[1])
    assert torch.equal(images, before[2])


@pytest.mark.parametrize('number', range(len(LEFT)))
def test_what_they_are_not_for_is_torch_s_to_the_bit(seen, number):
    for after, before in zip(seen[2][len(SERVED) + number][0], seen[1][len(SERVED) + number], strict=True):
        assert torch.equal(after, before)
