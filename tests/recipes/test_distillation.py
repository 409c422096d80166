from types import SimpleNamespace

import finetune
import pytest
import timm
import torch
from parts.classification import Classification
from parts.config import Config
from parts.distillation import Distilled, Renormalised, find_teacher
from torch import nn

from timm_supertickets import Ticket, load_ticket
from timm_supertickets.sparsity.prune import prune
from timm_supertickets.sparsity.scores import magnitude

QUICK = ['threads=1', 'rounds=1', 'round_steps=2', 'batch_size=8', 'recalibrate=1', 'img_size=32']


class Fixed(nn.Module):
    """The same scores for every image."""

    def __init__(self, *scores):
        super().__init__()
        self.scores = nn.Parameter(torch.tensor(scores))

    def forward(self, x):
        return self.scores.expand(len(x), -1)


def distilled(teacher, share, temperature):
    return Distilled(Classification(Config()), teacher, share, temperature)


def test_loss_by_hand():
    student, teacher = Fixed(1.0, 0.0), Fixed(0.0, 2.0)
    images, labels = torch.zeros(3, 3, 4, 4), torch.tensor([0, 1, 0])
    own = Classification(Config()).loss(student, images, labels)
    p, q = torch.tensor([0.0, 1.0]).softmax(0), torch.tensor([0.5, 0.0]).softmax(0)  # both at temperature 2
    apart = 4 * (p * (p / q).log()).sum()
    for share in (0.0, 0.25, 1.0):
        found = distilled(teacher, share, 2.0).loss(student, images, labels)
        assert found.item() == pytest.approx(((1 - share) * own + share * apart).item(), rel=1e-5)


def test_the_teacher_learns_nothing_and_an_equal_student_has_nothing_to_learn():
    teacher = Fixed(1.0, 3.0)
    task = distilled(teacher, 1.0, 3.0)
    loss = task.loss(student := Fixed(1.0, 3.0), torch.zeros(2, 3, 4, 4), torch.tensor([0, 1]))
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert student.scores.grad.abs().max() < 1e-6
    assert teacher.scores.grad is None
    assert not teacher.training


def test_a_teacher_sees_images_as_it_knows_them():
    torch.manual_seed(0)
    net = nn.Conv2d(3, 2, 1)
    net.pretrained_cfg = {'mean': (0.1, 0.2, 0.3), 'std': (0.4, 0.5, 0.6)}
    image = torch.rand(1, 3, 4, 4)

    def normalised(mean, std):
        return (image - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)

    ours = (0.5, 0.4, 0.3), (0.2, 0.3, 0.9)
    wanted = net(normalised(*net.pretrained_cfg.values()))
    assert torch.allclose(Renormalised(net, *ours)(normalised(*ours)), wanted, atol=1e-5)


@pytest.fixture(scope='module')
def tickets(tmp_path_factory):
    folder = tmp_path_factory.mktemp('tickets')
    for classes in (10, 3):
        torch.manual_seed(classes)
        net = timm.create_model('supernet_mbv2_tiny', num_classes=classes, width=0.5)
        Ticket.draw(net, prune(magnitude(net), 0.5), data_config={'input_size': (3, 32, 32)}).save(
            folder / f'{classes}'
        )
    return folder


def test_a_run_with_a_teacher_keeps_the_mask(tickets, tmp_path):
    said = [*QUICK, f'ticket={tickets / "3"}', f'teacher={tickets / "10"}', 'distill=0.9']
    finetune.main([*said, f'output={tmp_path / "a"}'])
    finetune.main([*QUICK, f'ticket={tickets / "3"}', f'output={tmp_path / "b"}'])
    taught, alone = (load_ticket(tmp_path / name / 'superticket_mbv2_s50') for name in 'ab')
    assert all(taught.mask[name].equal(alone.mask[name]) for name in alone.mask)
    assert any(not torch.equal(taught.weights[name], alone.weights[name]) for name in alone.mask)


def test_a_teacher_that_cannot_teach_is_refused(tickets):
    data = SimpleNamespace(num_classes=10, input_size=(3, 32, 32), config={})
    with pytest.raises(ValueError, match='knows 3 classes, the images have 10'):
        find_teacher(str(tickets / '3'), data)
    with pytest.raises(ValueError, match='nobody does not exist'):
        find_teacher('nobody', data)
    with pytest.raises(ValueError, match='takes other channels than the 1 of the images'):
        find_teacher(str(tickets / '10'), SimpleNamespace(num_classes=10, input_size=(1, 32, 32), config={}))
    vit = timm.create_model('vit_tiny_patch16_224', num_classes=10, img_size=32, depth=1)
    Ticket.draw(vit, {}).save(tickets / 'vit')
    about = {'mean': (0.5,) * 3, 'std': (0.5,) * 3}
    with pytest.raises(ValueError, match=r'teacher=.*vit does not take images of 48x48: '):
        find_teacher(str(tickets / 'vit'), SimpleNamespace(num_classes=10, input_size=(3, 48, 48), config=about))
