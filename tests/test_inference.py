import logging
import shutil
from itertools import product

import pytest
import timm
import torch
from torch import nn

from timm_supertickets import bake, inference, sparse_inference
from timm_supertickets.compiled import load_kernels
from timm_supertickets.inference import (
    KERNELS,
    CsrPointwise,
    SparseDepthwise,
    SparsePointwise,
    take_turns,
)  # fmt: skip
from timm_supertickets.sparsity.mask import Mask, prunable
from timm_supertickets.sparsity.prune import prune
from timm_supertickets.sparsity.scores import magnitude

OURS = (CsrPointwise, SparsePointwise, SparseDepthwise)
compiled = pytest.mark.skipif(not shutil.which('c++'), reason='this machine has no C++ compiler')


def conv(*args, dead=0.0, **kwargs):
    torch.manual_seed(0)
    made = nn.Conv2d(*args, **kwargs)
    made.weight.data[torch.rand(made.weight.shape) < dead] = 0
    return made


def close(ours, layer, images):
    """To the rounding of float32, of sums made in float64."""
    with torch.inference_mode():
        expected = layer.double()(images.double())
        found = ours(images)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def prefer(monkeypatch, *best):
    """Let what is named first be fastest, whatever it takes."""
    monkeypatch.setattr(
        inference, 'take_turns', lambda runs, _: {k: [best.index(k) if k in best else len(best)] for k in runs}
    )


def pruned(sparsity=0.9, **kwargs):
    torch.manual_seed(0)
    model = timm.create_model('supernet_mbv2_tiny', num_classes=5, **kwargs).train()
    prune(magnitude(model), sparsity, groups=model.channel_groups()).zero_weights_(model)
    model(torch.randn(4, 3, 64, 64))  # statistics that are not one and zero
    return model.eval()


def test_functions_take_turns_after_a_warm_up(monkeypatch):
    calls = []
    clock = iter([0.0, 1.0, 1.0, 3.0, 10.0, 11.5, 11.5, 14.5])
    monkeypatch.setattr(inference.time, 'perf_counter', lambda: next(clock))
    times = take_turns({'a': lambda: calls.append('a'), 'b': lambda: calls.append('b')}, 2)
    assert times == {'a': [1.0, 1.5], 'b': [2.0, 3.0]}
    assert calls == ['a'] * inference.WARMUP + ['b'] * inference.WARMUP + ['a', 'b', 'a', 'b']


@compiled
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('side', [1, 4, 7, 13])
def test_the_pointwise_kernel_is_a_convolution(side, bias):
    assert load_kernels(KERNELS)
    layer = conv(12, 9, 1, bias=bias, dead=0.8)
    layer.weight.data[3] = 0  # an output that nothing reaches
    for images in (torch.randn(1, 12, side, side), torch.randn(3, 12, side, side + 2)):
        close(SparsePointwise(layer.float()), layer, images)
        close(SparsePointwise(layer.float()), layer, images.to(memory_format=torch.channels_last))
        close(CsrPointwise(layer.float()), layer, images)


@compiled
@pytest.mark.parametrize(('kernel', 'stride', 'dilation'), [*product((3, 5, 7), (1, 2), (1, 2)), (3, 3, 1), (1, 2, 1)])
def test_the_depthwise_kernel_is_a_convolution(kernel, stride, dilation):
    assert load_kernels(KERNELS)
    for padding, (height, width) in product((0, dilation * (kernel // 2)), ((13, 16), (20, 17), (33, 40))):
        layer = conv(6, 6, kernel, stride, padding, dilation, groups=6, dead=0.5)
        layer.weight.data[2] = 0
        close(SparseDepthwise(layer.float()), layer, torch.randn(2, 6, height, width))


@compiled
def test_kernels_bound_what_they_write():
    assert load_kernels(KERNELS)
    images = 20 * torch.randn(1, 8, 9, 9)
    for layer, ours in ((conv(8, 8, 1), SparsePointwise), (conv(8, 8, 3, 1, 1, groups=8), SparseDepthwise)):
        bounded = ours(layer)
        bounded.range = (0.0, 6.0)
        close(bounded, nn.Sequential(layer, nn.ReLU6()), images)


@compiled
def test_kernels_refuse_images_that_do_not_fit():
    assert load_kernels(KERNELS)
    with pytest.raises(RuntimeError, match=r'expected images of 8 channels, got .1, 9, 5, 5'):
        SparsePointwise(conv(8, 4, 1))(torch.zeros(1, 9, 5, 5))
    depthwise = SparseDepthwise(conv(8, 8, 7, groups=8))
    with pytest.raises(RuntimeError, match=r'expected images of 8 channels, got .1, 7, 9, 9'):
        depthwise(torch.zeros(1, 7, 9, 9))
    with pytest.raises(RuntimeError, match='images of 6x9 are smaller than the kernel'):
        depthwise(torch.zeros(1, 8, 6, 9))


@compiled
@pytest.mark.parametrize('best', ['compiled', 'csr'])
@pytest.mark.parametrize('baked', [True, False], ids=['baked', 'as it is'])
def test_a_ticket_scores_the_same(monkeypatch, best, baked):
    model = bake(pruned()) if baked else pruned()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images = torch.randn(2, 3, 64, 64)
    prefer(monkeypatch, 'sparse', best)
    fast = sparse_inference(model, images, repeats=2)
    assert any(isinstance(module, OURS) for module in fast.modules())
    with torch.inference_mode():
        expected = model(images)
        torch.testing.assert_close(fast(images), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
        assert fast(images[:1, :, :32]).shape == (1, 5)  # other shapes run as well
    assert not fast(images).requires_grad  # in any mode: its tensors are plain ones
    assert not any(tensor.is_inference() for tensor in fast.state_dict().values())
    assert not any(isinstance(module, OURS) for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@compiled
def test_activations_go_into_kernels(monkeypatch):
    model = bake(pruned())
    prefer(monkeypatch, 'sparse', 'compiled')
    fast = sparse_inference(model, torch.randn(1, 3, 64, 64))
    bounded = [module.range for module in fast.modules() if isinstance(module, SparseDepthwise)]
    assert bounded
    assert set(bounded) == {(0.0, 6.0)}


@pytest.mark.parametrize(
    ('first', 'layers', 'channels_last'),
    [('contiguous', False, False), ('channels_last', False, True), ('sparse', False, False), ('dense', False, False)],
)
def test_what_is_fastest_is_kept(monkeypatch, first, layers, channels_last):
    prefer(monkeypatch, first, 'dense', 'contiguous')
    fast = sparse_inference(pruned(), torch.randn(1, 3, 32, 32))
    assert any(isinstance(module, OURS) for module in fast.modules()) == layers
    assert fast.conv_stem.weight.is_contiguous(memory_format=torch.channels_last) == channels_last
    assert not fast.training


def test_what_is_not_clearly_faster_is_left(monkeypatch):
    times = {'channels_last': 1.0, 'contiguous': 2.0, 'sparse': 0.96, 'dense': 1.0, 'csr': 0.96, 'compiled': 0.96}
    monkeypatch.setattr(inference, 'take_turns', lambda runs, _: {name: [times[name]] for name in runs})
    images = torch.randn(1, 3, 32, 32)
    fast = sparse_inference(pruned(), images)
    assert fast.conv_stem.weight.is_contiguous(memory_format=torch.channels_last)
    times.update(sparse=0.9)
    assert not any(isinstance(module, OURS) for module in sparse_inference(pruned(), images).modules())
    times.update(csr=0.9)
    assert any(isinstance(module, CsrPointwise) for module in sparse_inference(pruned(), images).modules())


def test_without_a_compiler_it_says_so_and_goes_on(monkeypatch, caplog, tmp_path):
    def fail(*_, **__):
        raise RuntimeError('Ninja is required to load C++ extensions\nand so on')

    monkeypatch.setenv('TORCH_EXTENSIONS_DIR', str(tmp_path))
    monkeypatch.setattr('torch.utils.cpp_extension.load', fail)
    load_kernels.cache_clear()
    prefer(monkeypatch, 'sparse', 'compiled', 'csr')
    with caplog.at_level(logging.WARNING):
        fast = sparse_inference(pruned(), torch.randn(1, 3, 32, 32))
    load_kernels.cache_clear()
    said = [record.message for record in caplog.records if 'kernels' in record.message]
    assert said == ['kernels.cpp cannot be compiled here and is left out: Ninja is required to load C++ extensions']
    assert {type(module) for module in fast.modules()} & set(OURS) == {CsrPointwise}
    assert list(tmp_path.iterdir()) == []


def test_any_model_will_do(monkeypatch):
    model = timm.create_model('mobilenetv2_035', num_classes=3).eval()
    Mask.dense(prunable(model))
    prefer(monkeypatch, 'sparse', 'csr')
    images = torch.randn(1, 3, 64, 64)
    fast = sparse_inference(model, images)
    with torch.inference_mode():
        torch.testing.assert_close(fast(images), model(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('which', ['weights', 'images'])
def test_bad_input_is_one_clear_line(which):
    model, images = nn.Conv2d(3, 3, 1), torch.randn(1, 3, 8, 8)
    if which == 'weights':
        model = model.half()
    else:
        images = images.double()
    with pytest.raises(ValueError, match=f'^{which} must be float32 on the CPU, got torch.float..') as caught:
        sparse_inference(model, images)
    assert '\n' not in str(caught.value)
