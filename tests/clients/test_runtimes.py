import copy
import io

import pytest
import timm
import torch
from client_checks import SPACES


@pytest.fixture(scope='module', params=['supernet', 'ticket'])
def kind(request):
    return request.param


@pytest.fixture(scope='module', params=SPACES)
def space(request):
    return request.param


@pytest.fixture(scope='module')
def model(kind, space, tickets):
    torch.manual_seed(0)
    return tickets[space].build() if kind == 'ticket' else timm.create_model(f'supernet_{space}_tiny').eval()


@pytest.fixture
def x():
    return torch.randn(2, 3, 64, 64)


@pytest.fixture
def fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@torch.no_grad()
def test_compiles_without_a_graph_break(model, x, fresh):
    compiled = torch.compile(model, fullgraph=True, backend='eager')
    assert torch.equal(compiled(x), model(x))


def test_trains_compiled_as_it_does_plain(tickets, x, fresh):
    model = tickets['mbv2'].build().train()
    twin = copy.deepcopy(model)
    torch.compile(twin, fullgraph=True, backend='aot_eager')(x).square().mean().backward()
    model(x).square().mean().backward()
    for (name, param), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(other.grad, param.grad, msg=name)
    for (name, buffer), other in zip(model.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(other, buffer, msg=name)


@torch.no_grad()
def test_exports(model, x):
    assert torch.equal(torch.export.export(model, (x,)).module()(x), model(x))


@pytest.mark.parametrize('space', SPACES)
def test_onnx_gives_the_same(space, tickets, x):
    pytest.importorskip('onnx')
    pytest.importorskip('onnxscript')
    runtime = pytest.importorskip('onnxruntime')
    model = tickets[space].build()
    batch = torch.export.Dim('batch')
    program = torch.onnx.export(model, (x,), dynamo=True, dynamic_shapes={'x': {0: batch}}, verbose=False)
    session = runtime.InferenceSession(program.model_proto.SerializeToString(), providers=['CPUExecutionProvider'])
    for n in (1, 5):
        images = torch.randn(n, 3, 64, 64)
        (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(found), model(images), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_deepcopy_is_equal_and_apart(model, x):
    expected = model(x)
    twin = copy.deepcopy(model)
    assert twin.arch == model.arch
    assert torch.equal(twin(x), expected)
    for param in twin.parameters():
        param.zero_()
    assert torch.equal(model(x), expected)


@torch.no_grad()
def test_state_dict_loads_with_weights_only(model, x):
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    twin = copy.deepcopy(model)
    for param in twin.parameters():
        param.zero_()
    twin.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(twin(x), model(x))


@torch.no_grad()
def test_channels_last(model, x):
    twin = copy.deepcopy(model).to(memory_format=torch.channels_last)
    torch.testing.assert_close(twin(x.contiguous(memory_format=torch.channels_last)), model(x), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_autocast_is_close(model, x):
    with torch.autocast('cpu', torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    expected = model(x)
    assert (y.float() - expected).norm() < 0.05 * expected.norm()
