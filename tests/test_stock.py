"""Tickets of timm's own models: drawn by name, and loaded by timm alone."""

import hashlib
import json
import subprocess
import sys

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

from timm_supertickets import Mask, Ticket, load_ticket, prunable
from timm_supertickets.sparsity.prune import prune
from timm_supertickets.sparsity.scores import magnitude

NAMED = ('resnet18', 'convnext_atto', 'vit_tiny_patch16_224', 'efficientnet_b0')
VARIANTS = {'whole': {}, 'classes': {'num_classes': 5}, 'grey': {'in_chans': 1}, 'features': {'features_only': True}}
# the smallest of a family, or one that is cheap; one for each source file of timm that has a model below 10 million
FAMILIES = (
    'cait_xxs24_224', 'coat_tiny', 'convit_tiny', 'cpubone_nano', 'crossvit_tiny_240', 'cs3darknet_focus_s',
    'cspnext_tiny', 'deit_tiny_distilled_patch16_224', 'densenet121', 'dla46x_c', 'dpn48b', 'edgenext_xx_small',
    'efficientformerv2_s0', 'efficientvim_m1', 'efficientvit_b0', 'efficientvit_m0', 'fasternet_t0', 'fastvit_t8',
    'ghostnet_050', 'gmlp_ti16_224', 'halonet_h1', 'hardcorenas_b', 'hgnetv2_b0', 'iformer_t', 'inception_next_atto',
    'lcnetv2_small', 'levit_128s', 'mixer_s32_224', 'mobilenetv3_small_050', 'mobilevit_xxs', 'pit_ti_224',
    'pvt_v2_b0', 'regnetx_002', 'repghostnet_050', 'repvit_m1', 'rexnet_100', 'shvit_s1', 'starnet_s050',
    'swiftformer_xs', 'tf_efficientnet_cc_b0_4e', 'vit_tiny_patch16_dinov3_qkvb', 'vit_tiny_r_s16_p8_224',
    'ese_vovnet19b_slim_dw', 'xcit_nano_12_p8_224',
)  # fmt: skip

# what runs where the package cannot be imported; prints as json what a model is and does
PLAIN = """
import hashlib, json, sys
sys.modules['timm_supertickets'] = None
import timm, torch

def told(folder, name, kwargs):
    torch.manual_seed(0)
    model = timm.create_model(f'local-dir:{folder}', pretrained=True, **kwargs).eval()
    state = model.state_dict()
    digest = hashlib.sha256(b''.join(key.encode() + state[key].numpy().tobytes() for key in sorted(state)))
    chans, side = kwargs.get('in_chans', 3), 224 if name.startswith('vit') else 64
    with torch.no_grad():
        out = model(torch.linspace(-1, 1, chans * side * side).view(1, chans, side, side))
    outs = [[list(o.shape), hashlib.sha256(o.contiguous().numpy().tobytes()).hexdigest()]
            for o in ([out] if isinstance(out, torch.Tensor) else out)]
    return {'weights': digest.hexdigest(), 'outputs': outs}
"""


def draw(name, sparsity=0.8, **kwargs):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=4, **kwargs)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # as after training
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 1.5)
            for tensor in (module.bias.data, module.running_mean):
                tensor.normal_(0, 0.1)
    return model, Ticket.draw(model, prune(magnitude(model), sparsity))


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def check_round_trip(name, folder, **kwargs):
    """Draw, save, load, build, and load by timm's own reader of the dense file; nothing changes on the way."""
    model, ticket = draw(name, **kwargs)
    total = sum(weight.numel() for weight in prunable(model).values())
    assert (ticket.mask.total, ticket.mask.alive) == (total, total - round(0.8 * total))
    Mask(ticket.mask).zero_weights_(model)
    weights = model.state_dict()
    ticket.save(folder)
    for file in ('ticket.safetensors', 'model.safetensors'):
        loaded = load_ticket(folder / file)
        assert same(loaded.weights, weights)
        assert same(loaded.mask, ticket.mask)
    assert same(loaded.build().state_dict(), weights)
    assert same(timm.create_model(f'local-dir:{folder}', pretrained=True).state_dict(), weights)
    return ticket


@pytest.mark.parametrize('name', timm.list_models('test_*'))
def test_round_trip_of_the_small_models_that_timm_tests_with(name, tmp_path):
    check_round_trip(name, tmp_path / 'ticket')


@pytest.mark.slow
@pytest.mark.parametrize('name', FAMILIES)
def test_round_trip_of_a_model_of_every_family(name, tmp_path):
    check_round_trip(name, tmp_path / 'ticket')


@pytest.fixture(scope='module')
def named(tmp_path_factory):
    """The four, their folders, and what plain timm makes of those where this package cannot be imported."""
    root = tmp_path_factory.mktemp('named')
    tickets = {}
    for name in NAMED:
        model, tickets[name] = draw(name)
        tickets[name].save(root / name)
        tickets[name].mask.zero_weights_(model)
        assert same(tickets[name].weights, model.state_dict())
    jobs = [(str(root / name), name, kwargs) for name in NAMED for kwargs in VARIANTS.values()]
    # other numbers of threads add up in another order
    code = f'{PLAIN}\ntorch.set_num_threads({torch.get_num_threads()})\n'
    code += f'print(json.dumps([told(*job) for job in {jobs!r}]))'
    ran = subprocess.run([sys.executable, '-W', 'error', '-c', code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    told = iter(json.loads(ran.stdout))
    return {name: (tickets[name], root / name, {variant: next(told) for variant in VARIANTS}) for name in NAMED}


@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('name', NAMED)
def test_timm_alone_loads_what_the_package_builds(named, name, variant):
    ticket, _, told = named[name]
    torch.manual_seed(0)  # a new classifier is made of the same numbers then
    model = ticket.build(**VARIANTS[variant])
    state = model.state_dict()
    digest = hashlib.sha256(b''.join(key.encode() + state[key].numpy().tobytes() for key in sorted(state)))
    assert told[variant]['weights'] == digest.hexdigest()
    chans, side = VARIANTS[variant].get('in_chans', 3), 224 if name.startswith('vit') else 64
    with torch.no_grad():
        out = model(torch.linspace(-1, 1, chans * side * side).view(1, chans, side, side))
    outputs = [out] if isinstance(out, torch.Tensor) else out
    digests = [hashlib.sha256(o.contiguous().numpy().tobytes()).hexdigest() for o in outputs]
    assert told[variant]['outputs'] == [[list(o.shape), d] for o, d in zip(outputs, digests, strict=True)]
    if variant != 'features':
        assert [list(o.shape) for o in outputs] == [[1, 5 if variant == 'classes' else 4]]


@pytest.mark.parametrize('name', NAMED)
def test_the_dense_file_holds_the_zeros(named, name):
    ticket, folder, _ = named[name]
    dense = load_file(folder / 'model.safetensors')
    assert dense.keys() == ticket.weights.keys()
    total = ticket.mask.total
    assert sum(int((dense[key] == 0).sum()) for key in ticket.mask) == round(0.8 * total)
    assert same(load_ticket(folder).mask, ticket.mask)


def test_a_ticket_does_not_claim_to_be_the_weights_that_timm_publishes(named):
    registered = timm.get_pretrained_cfg('resnet18')
    config = json.loads((named['resnet18'][1] / 'config.json').read_text())
    assert registered.tag
    assert config['architecture'] == 'resnet18'
    assert 'tag' not in config['pretrained_cfg']
    _, ticket = draw('test_resnet')
    tagged = Ticket.draw(ticket.build(), ticket.mask, data_config={'tag': 'mine', 'description': 'of digits'})
    assert (tagged.pretrained_cfg['tag'], tagged.pretrained_cfg['description']) == ('mine', 'of digits')


def test_a_weight_that_layers_share_is_dead_under_all_its_names(tmp_path):
    small = {'embed_dims': (16, 16, 16, 16), 'serial_depths': (1, 1, 1, 1), 'parallel_depth': 1, 'num_heads': 2}
    ticket = check_round_trip('coat_tiny', tmp_path / 'ticket', **small)
    model = ticket.build()
    names = {param: name for name, param in model.named_parameters()}
    shared = {name: names[param] for name, param in model.named_parameters(remove_duplicate=False)}
    aliases = {name: first for name, first in shared.items() if name != first and first in ticket.mask}
    assert aliases
    for name, first in aliases.items():
        assert not ticket.weights[name][~ticket.mask[first]].any()
        assert torch.equal(ticket.weights[name], ticket.weights[first])
