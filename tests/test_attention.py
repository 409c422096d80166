import pytest
import torch
from torch import nn
from torch.nn import functional as F

from timm_supertickets.attention import AttendedBlock, AttentionLayer, CrossAttention, TokenPath, token_group

PARTS = {'q': slice(0, 64), 'k': slice(64, 128), 'v': slice(128, 192)}


def path(tokens=5, in_chs=6, out_chs=7, encoded=3):
    torch.manual_seed(0)
    net = TokenPath(in_chs, out_chs, encoded, tokens).double()
    for name, buffer in net.named_buffers():
        if name.endswith(('mean', 'var')):
            buffer.uniform_(0.5, 1.5)
    return net


def same_weights(attn: CrossAttention) -> nn.MultiheadAttention:
    """torch's own attention with these weights."""
    other = nn.MultiheadAttention(64, attn.num_heads, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        for name, rows in PARTS.items():
            other.in_proj_weight[rows] = getattr(attn, name).weight
            other.in_proj_bias[rows] = getattr(attn, name).bias
    other.out_proj.load_state_dict(attn.proj.state_dict())
    return other


def reference_layer(layer: AttentionLayer, x, memory):
    x = F.layer_norm(x + same_weights(layer.attn)(x, memory, memory)[0], (64,), layer.norm1.weight, layer.norm1.bias)
    y = F.gelu(x @ layer.mlp.fc1.weight.T + layer.mlp.fc1.bias) @ layer.mlp.fc2.weight.T + layer.mlp.fc2.bias
    return F.layer_norm(x + y, (64,), layer.norm2.weight, layer.norm2.bias)


def test_path_equals_torchs_own_attention():
    net = path().eval()
    x = torch.randn(2, 6, 16, 24, dtype=torch.float64)
    pooled = x.view(2, 6, 8, 2, 8, 3).mean((3, 5))
    maps = net.bn1(torch.einsum('oi,nihw->nohw', net.conv_in.weight[..., 0, 0], pooled)).flatten(2)
    memory = reference_layer(net.encoder, maps, maps)
    seen = reference_layer(net.decoder, net.tokens.expand(2, -1, -1), memory)
    gated = net.bn2(seen.view(2, 5, 8, 8))
    expected = torch.einsum('oi,nihw->nohw', net.conv_out.weight[..., 0, 0], gated)
    torch.testing.assert_close(net(x), expected, rtol=1e-10, atol=1e-12)


def test_a_token_changes_nothing_for_the_others():
    net = path().eval()
    x = torch.randn(2, 6, 16, 16, dtype=torch.float64)
    seen = []
    net.bn2.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    net(x)
    with torch.no_grad():
        net.tokens[2].normal_()
    net(x)
    changed = (seen[0] - seen[1]).abs().amax((0, 2, 3)) > 0
    assert changed.tolist() == [False, False, True, False, False]


def test_attended_block_adds_the_view_at_the_blocks_resolution():
    net, conv = path().eval(), nn.Conv2d(6, 7, 3, stride=2, padding=1).double()
    x = torch.randn(1, 6, 32, 32, dtype=torch.float64)
    view = F.interpolate(net(x), size=(16, 16), mode='bilinear')
    torch.testing.assert_close(AttendedBlock(conv, net)(x), conv(x) + view)
    assert torch.equal(AttendedBlock(conv, None)(x), conv(x))


@pytest.mark.parametrize('size', [1, 3, 7, 40])
def test_maps_of_any_size_are_pooled(size):
    assert path()(torch.randn(2, 6, size, size, dtype=torch.float64)).shape == (2, 7, 8, 8)


def test_group_names_every_tensor_that_has_the_tokens_axis():
    net = path(tokens=5)
    group = token_group('a.tokens', 4, 5)
    state = {f'a.tokens.{name}': tensor for name, tensor in net.state_dict().items()}
    with_axis = {(name, dim) for name, tensor in state.items() for dim, size in enumerate(tensor.shape) if size == 5}
    assert {(name, dim) for name, dim, _, _ in group.members} == with_axis
    assert (group.block, group.channels, group.droppable) == (4, 5, True)
    assert {group.gate, group.shift, *group.output, *group.shared} <= set(state)
