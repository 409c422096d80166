import json

import numpy as np
import pytest
import segment
import timm
import torch
import train
from accelerate import Accelerator
from parts.backbone import PREFIX, OnBackbone, ticket_part
from parts.config import Config
from parts.pixelnet import PixelNet, upsampled
from parts.pixels import IGNORE
from parts.scenes import write_scenes
from parts.segmentation import Segmentation
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from timm_supertickets import Mask, Ticket, load_ticket, prunable
from timm_supertickets.cost import model_cost
from timm_supertickets.search.shrink import gate_, searchable, shrink
from timm_supertickets.sparsity.prune import prune
from timm_supertickets.sparsity.scores import magnitude

FEW = [
    'task=segment', 'dataset=cityscapes', 'img_size=32', 'batch_size=4', 'rounds=2', 'round_steps=2',
    'cooldown_steps=2', 'recalibrate=2', 'opt=adamw', 'lr=0.002', 'targets=[0.6]', 'search_until=1.0', 'threads=1',
]  # fmt: skip


@pytest.fixture(scope='module')
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture(scope='module')
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp('scenes') / 'cityscapes'
    return write_scenes(folder, 'cityscapes', train=8, val=4, size=(32, 48), most=2)


def task(**kwargs):
    return Segmentation(Config(task='segment', dataset='scenes', img_size=32, batch_size=2), **kwargs)


def pixel_net(**kwargs):
    torch.manual_seed(0)
    return PixelNet(timm.create_model('supernet_mbv2_tiny', num_classes=0, **kwargs), 5, 8)


class Echo(nn.Module):
    """Scores that are the image itself."""

    def forward(self, x):
        return x


def test_loss_is_the_mean_over_the_pixels_that_count():
    scores = torch.tensor([[2.0, 0.0], [0.0, 0.0]]).T.reshape(1, 2, 2, 1)  # two classes at two pixels
    masks = torch.tensor([[[0], [IGNORE]]])
    assert task().loss(Echo(), scores, masks).item() == pytest.approx(np.log(1 + np.exp(-2)))
    masks = torch.tensor([[[0], [1]]])
    both = np.log(1 + np.exp(-2)), np.log(2)
    assert task().loss(Echo(), scores, masks).item() == pytest.approx(sum(both) / 2)
    assert task(ohem=0.7).loss(Echo(), scores, masks).item() == pytest.approx(both[1])  # 0.88 is well known, 0.5 is not
    assert task(ohem=0.3).loss(Echo(), scores, masks).item() == pytest.approx(both[1])  # the hardest counts anyway
    assert task().loss(Echo(), scores, torch.full((1, 2, 1), IGNORE)).item() == 0


def test_score_is_mean_iou_over_all_pixels_together(accelerator, tmp_path):
    rng = np.random.default_rng(0)
    truth, guess = [], []
    for split in ('train', 'val'):
        for i, size in enumerate([(8, 12), (10, 8), (8, 8)]):
            image, mask = rng.integers(0, 256, (*size, 3)), rng.integers(0, 3, size)
            mask[0] = IGNORE
            for kind, content in (('images', image), ('masks', mask)):
                (tmp_path / kind / split).mkdir(parents=True, exist_ok=True)
                Image.fromarray(content.astype(np.uint8)).save(tmp_path / kind / split / f'{i}.png')
            if split == 'val':
                truth.append(mask[1:].ravel())
                guess.append(image[1:].argmax(-1).ravel())
    ours = task()
    ours.config.dataset, ours.config.data_dir = 'masks', str(tmp_path)
    data = ours.create_data(accelerator)
    truth, guess = np.concatenate(truth), np.concatenate(guess)
    ious = [((truth == c) & (guess == c)).sum() / ((truth == c) | (guess == c)).sum() for c in range(3)]
    assert (data.val_count, data.num_classes) == (3, 3)
    assert ours.score(Echo(), data, accelerator) == pytest.approx(np.mean(ious), abs=1e-6)


@pytest.mark.parametrize('batch_size', [1, 3])
def test_a_score_does_not_depend_on_the_batch_size(accelerator, tmp_path, batch_size):
    """Class 1 is what is brighter than the mean of its image, and padding would change the mean."""
    for split in ('train', 'val'):
        for i, size in enumerate([(8, 8), (8, 8), (24, 24)]):
            image = np.full((*size, 3), 200, np.uint8)
            image[:, : size[1] // 2] = 250
            for kind, content in (('images', image), ('masks', (image[..., 0] > 225).astype(np.uint8))):
                (tmp_path / kind / split).mkdir(parents=True, exist_ok=True)
                Image.fromarray(content).save(tmp_path / kind / split / f'{i}.png')

    class Above(nn.Module):
        def forward(self, x):
            over = x[:, :1] - x[:, :1].mean((2, 3), keepdim=True)
            return torch.cat([-over, over], 1)

    ours = task()
    ours.config.dataset, ours.config.data_dir, ours.config.batch_size = 'masks', str(tmp_path), batch_size
    data = ours.create_data(accelerator)
    assert len(next(iter(data.train))[0]) == batch_size
    assert ours.score(Above(), data, accelerator) == 1


def test_a_class_that_is_nowhere_does_not_count(accelerator, scenes):
    ours = task()
    ours.config.dataset, ours.config.data_dir = 'cityscapes', str(scenes)
    data = ours.create_data(accelerator)

    class Road(nn.Module):
        def forward(self, x):
            scores = torch.zeros(len(x), 19, *x.shape[-2:])
            scores[:, 0] = 1
            return scores

    masks = torch.cat([mask.flatten() for _, mask in (data.val.dataset[i] for i in range(4))])
    present = len(masks.unique())
    assert 1 < present < 19
    share = (masks == 0).float().mean().item()
    assert ours.score(Road(), data, accelerator) == pytest.approx(share / present, abs=1e-6)


def test_scales_and_mirror_images_are_averaged():
    torch.manual_seed(0)
    net = nn.Conv2d(3, 4, 3, padding=1)
    x = torch.rand(2, 3, 12, 16)

    def by_hand(factor, flip):
        y = x if factor == 1 else nn.functional.interpolate(x, scale_factor=factor, mode='bilinear')
        y = net(y.flip(-1)).flip(-1) if flip else net(y)
        return nn.functional.interpolate(y, (12, 16), mode='bilinear').softmax(1)

    wanted = sum(by_hand(factor, flip) for factor in (1, 1.5) for flip in (False, True)) / 4
    found = task(scales=[1, 1.5], flip=True).predicted(net, x, (12, 16))
    assert torch.allclose(found, wanted, atol=1e-6)


def test_a_head_over_a_backbone_leaves_its_search_as_it_is():
    net, alone = pixel_net(), timm.create_model('supernet_mbv2_tiny', num_classes=0)
    assert net.arch == alone.arch
    assert [g.gate for g in net.channel_groups()] == [PREFIX + g.gate for g in alone.channel_groups()]
    assert list(prunable(net)) == [PREFIX + name for name in prunable(alone)]
    assert (net.reductions, net.channels) == ([4, 8, 16, 32], [16, 16, 24, 32])


def test_what_no_map_needs_is_frozen_and_the_rest_learns():
    net = pixel_net()
    net(torch.rand(2, 3, 64, 64)).square().mean().backward()
    for name, param in net.named_parameters():
        assert param.requires_grad == (param.grad is not None), name
    frozen = {name for name, param in net.named_parameters() if not param.requires_grad}
    assert frozen == {f'backbone.{name}' for name in ('conv_head.weight', 'bn2.weight', 'bn2.bias')}
    assert all(
        module.running_mean.eq(0).all() for module in pixel_net().modules() if isinstance(module, nn.BatchNorm2d)
    )


def test_shrunk_it_scores_what_it_did_gated():
    net = pixel_net().double().eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    torch.manual_seed(1)
    keep = {group.gate: torch.rand(group.channels) < 0.5 for group in searchable(net).channel_groups()}
    x = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    small = shrink(net, keep)
    gate_(net, keep)
    assert isinstance(small, PixelNet)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in net.parameters())
    assert torch.allclose(small(x), net(x), atol=1e-10)
    assert not small.backbone.conv_head.weight.requires_grad


@pytest.mark.parametrize('name', ['resnet18', 'mobilenetv2_035', 'test_vit'])
def test_any_model_with_maps_scores_pixels(name):
    net = PixelNet(timm.create_model(name, num_classes=0), 5, 8)
    size = net.backbone.pretrained_cfg['input_size']
    scores = net(torch.rand(2, *size))
    assert scores.shape[:2] == (2, 5)
    assert upsampled(scores, size[1:]).shape == (2, 5, *size[1:])


def test_a_model_without_such_maps_is_refused():
    with pytest.raises(ValueError, match='Linear gives no maps'):
        OnBackbone(nn.Linear(1, 1), 4, ())
    with pytest.raises(ValueError, match=r'has maps at 1/2, 1/4, .* and the head wants 1/64 or coarser'):
        OnBackbone(timm.create_model('supernet_mbv2_tiny'), 64, ())


def test_a_dense_head_on_a_classifier_of_the_hr_space():
    torch.manual_seed(0)
    net = timm.create_model('supernet_hr_tiny').eval()
    dense = net.with_dense_head(7).eval()
    x = torch.rand(1, 3, 64, 64)
    assert all(torch.equal(a, b) for a, b in zip(net.forward_branches(x), dense.forward_branches(x), strict=True))
    assert dense(x).shape == (1, 7, 16, 16)
    with torch.device('meta'):
        large, known = timm.create_model('supernet_hr'), timm.create_model('supernet_hr', head='dense', num_classes=19)
        assert large.with_dense_head(19).arch == known.arch
    tokens = timm.create_model('supernet_hr_tiny', tokens=2).with_dense_head(3)
    assert len(tokens.arch.tokens) == len(tokens.arch.blocks)


@pytest.mark.parametrize(('model', 'dense'), [('supernet_hr_tiny', True), ('supernet_mbv2_tiny', False)])
def test_a_run_draws_a_ticket(scenes, tmp_path, model, dense):
    back = ['prune_from=0.0', 'reactivate_until=1.0']  # by gradient, which a convolution that no head reads has not
    train.main([*FEW, *back, f'model={model}', f'data_dir={scenes}', f'output={tmp_path / "run"}'])
    rows = (tmp_path / 'run/summary.csv').read_text().splitlines()
    assert rows[0].startswith('name,round,step,loss,miou,n,')
    (folder,) = (path.parent for path in (tmp_path / 'run').glob('*/ticket.safetensors'))
    ticket = load_ticket(folder)
    whole = timm.create_model(model, **({'head': 'dense'} if dense else {})).arch
    assert sum(c for b in ticket.arch.blocks for _, c in b) < sum(c for b in whole.blocks for _, c in b)
    assert ticket.sparsity == pytest.approx(0.6, abs=1e-4)
    assert 0 <= ticket.facts['miou'] <= 1
    assert json.loads((folder / 'config.json').read_text())['pretrained_cfg']['label_names'][0] == 'road'
    assert ticket.build()(torch.rand(1, 3, 64, 64)).shape == ((1, 19, 16, 16) if dense else (1, 128))


@pytest.mark.parametrize('model', ['supernet_hr_tiny', 'supernet_mbv2_tiny'])
def test_a_classifiers_ticket_scores_pixels_and_keeps_its_mask(scenes, tmp_path, model):
    torch.manual_seed(0)
    net = timm.create_model(model)
    drawn = Ticket.draw(net, prune(magnitude(net), 0.7), data_config={'input_size': (3, 32, 32)})
    drawn.save(tmp_path / 'drawn')
    few = [arg for arg in FEW if arg.split('=')[0] not in ('cooldown_steps', 'targets', 'search_until')]
    segment.main([*few, f'ticket={tmp_path / "drawn"}', f'data_dir={scenes}', f'output={tmp_path / "run"}'])
    assert (tmp_path / 'run/predictions.png').read_bytes()[:4] == b'\x89PNG'
    (folder,) = (path.parent for path in (tmp_path / 'run').glob('*/ticket.safetensors'))
    ticket = load_ticket(folder)
    shared = [name for name in drawn.mask if not name.startswith('head.')]
    assert set(ticket.mask) == set(shared)
    for name in shared:
        assert ticket.mask[name].equal(drawn.mask[name])
        assert not torch.equal(ticket.weights[name], drawn.weights[name]) or name == 'conv_head.weight'


@pytest.mark.parametrize('model', ['supernet_hr_tiny', 'supernet_mbv2_tiny'])
def test_a_ticket_of_pixels_goes_to_other_pixels_and_other_classes(scenes, tmp_path, model):
    others = write_scenes(tmp_path / 'ade20k', 'ade20k', train=8, val=4, size=(32, 48), most=2)
    train.main([*FEW, f'model={model}', f'data_dir={scenes}', f'output={tmp_path / "drawn"}'])
    (folder,) = (path.parent for path in (tmp_path / 'drawn').glob('*/ticket.safetensors'))
    few = [arg for arg in FEW if arg.split('=')[0] not in ('dataset', 'cooldown_steps', 'targets', 'search_until')]
    output = tmp_path / 'run'
    segment.main([*few, 'dataset=ade20k', f'ticket={folder}', f'data_dir={others}', f'output={output}'])
    (moved,) = (path.parent for path in output.glob('*/ticket.safetensors'))
    before, after = load_ticket(folder), load_ticket(moved)
    assert set(after.mask) == set(before.mask)
    assert all(after.mask[name].equal(before.mask[name]) for name in before.mask)
    names = json.loads((moved / 'config.json').read_text())['pretrained_cfg']['label_names']
    assert (len(names), names[-1]) == (11, 'background')


@pytest.mark.parametrize('model', ['supernet_hr_tiny', 'supernet_mbv2_tiny'])
def test_a_new_head_alone_is_trained(scenes, tmp_path, model):
    torch.manual_seed(0)
    net = timm.create_model(model)
    for name, buffer in net.named_buffers():
        if name.endswith('running_mean'):
            buffer.uniform_(-0.1, 0.1)
    drawn = Ticket.draw(net, prune(magnitude(net), 0.7), data_config={'input_size': (3, 32, 32)})
    drawn.save(tmp_path / 'drawn')
    few = [arg for arg in FEW if arg.split('=')[0] not in ('cooldown_steps', 'targets', 'search_until')]
    output = tmp_path / 'run'
    segment.main([*few, 'tune=head', f'ticket={tmp_path / "drawn"}', f'data_dir={scenes}', f'output={output}'])
    (folder,) = (path.parent for path in output.glob('*/ticket.safetensors'))
    ticket = load_ticket(folder)
    shared = [name for name in drawn.weights if not name.startswith(('head.', 'classifier.'))]
    assert all(ticket.weights[name].equal(drawn.weights[name]) for name in shared)
    trained = load_file(max(output.glob('**/model.safetensors')))
    scales = [tensor for name, tensor in trained.items() if name.startswith(('head.', 'pyramid.')) and tensor.ndim == 1]
    assert scales
    assert all(((tensor != 0) & (tensor != 1)).any() for tensor in scales)  # what batch norm begins with


def test_the_ticket_of_a_head_over_a_backbone_is_the_backbones():
    net = pixel_net()
    mask = Mask.dense(prunable(net))
    model, inside = ticket_part(net, mask)
    assert model is net.backbone
    inside.check(model)
    assert inside.total == mask.total
    assert model_cost(net, (3, 64, 64), mask).prunable == mask.total


@pytest.mark.parametrize(
    ('changes', 'says'),
    [
        ({'ohem': 1.0}, r'ohem must be in \[0, 1\), got 1.0'),
        ({'scales': []}, 'scales must be factors above 0'),
        ({'scale': [2, 1]}, 'scale must be a smallest and a largest factor'),
        ({'crop': [3]}, 'crop must be a height and a width'),
    ],
)
def test_bad_settings_are_one_clear_line(changes, says):
    with pytest.raises(ValueError, match=says):
        task(**changes)


@pytest.mark.parametrize(
    ('args', 'says'),
    [
        (['dataset=digits'], "'digits' has no place in task 'segment'; choose from scenes, fashion_scenes, cityscapes"),
        (['dataset=ade20k'], "dataset 'ade20k' needs data_dir=FOLDER"),
        (['dataset=scenes', 'in_chans=1'], "in_chans must be 3 for task 'segment', got 1"),
        (['num_classes=3'], "num_classes=3 is for task classify; task 'segment' has no use for it"),
        (['train_split=train[:9]'], r'train_split=train\[:9\] is for task classify'),
        (['task=paint'], "task 'paint' is unknown; choose from classify, segment"),
        (['task_args={ohm: 0.7}'], r"task_args=\{'ohm': 0.7\} do not fit task 'segment': .*'ohm'"),
    ],
)
def test_bad_input_is_one_clear_line(tmp_path, args, says):
    with pytest.raises(ValueError, match=says):
        train.main([*FEW, f'output={tmp_path / "run"}', *args])


@pytest.mark.parametrize('model', ['mobilenetv2_035', 'test_resnet'])
def test_any_model_of_timm_is_pruned_without_search(scenes, tmp_path, model):
    train.main([*FEW, f'model={model}', f'data_dir={scenes}', f'output={tmp_path / "run"}'])
    ticket = load_ticket(tmp_path / f'run/{model}_s60')
    assert ticket.architecture == model
    assert ticket.sparsity == pytest.approx(0.6, abs=1e-4)
    assert 'search: none' in (tmp_path / 'run/config.yaml').read_text()
    with pytest.raises(ValueError, match=f'search=budget: model={model} has no channels to search'):
        train.main([*FEW, 'search=budget', f'model={model}', f'data_dir={scenes}', f'output={tmp_path / "again"}'])


def test_a_ticket_is_pruned_at_once_if_asked(scenes, tmp_path):
    few = [arg for arg in FEW if arg.split('=')[0] not in ('cooldown_steps', 'targets', 'search_until')]
    more = ['ticket=superticket_mbv2_s80', 'sparsity=0.95', f'data_dir={scenes}', f'output={tmp_path / "run"}']
    segment.main([*few, *more])
    ticket = load_ticket(tmp_path / 'run/superticket_mbv2_s95')
    assert ticket.sparsity == pytest.approx(0.95, abs=1e-4)
    before = load_ticket('superticket_mbv2_s80').mask
    assert all(bool((before[name] | ~alive).all()) for name, alive in ticket.mask.items())


def test_a_head_that_cannot_be_made_is_one_line(scenes, tmp_path):
    few = [arg for arg in FEW if arg.split('=')[0] not in ('cooldown_steps', 'targets', 'search_until')]
    more = ['ticket=superticket_mbv2_s80', 'task_args={width: 0}', f'data_dir={scenes}', f'output={tmp_path / "run"}']
    with pytest.raises(ValueError, match='ticket=superticket_mbv2_s80 cannot be made: '):
        segment.main([*few, *more])
