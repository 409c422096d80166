"""Training loops that are not ours: a ticket goes in, and comes out with no dead weight alive."""

import pytest
import torch
from sklearn.datasets import load_digits
from test_torchvision import faster_rcnn, pyramid
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader

from timm_supertickets import keep_sparse, load_ticket

NAME = 'superticket_mbv2_s80'


def digits(count):
    """Real scans as the ticket wants them, `(count, 3, 32, 32)`, and their labels."""
    scans = load_digits()
    images = torch.tensor(scans.images[:count], dtype=torch.float32)[:, None] / 8 - 1
    return interpolate(images, 32, mode='bilinear').expand(-1, 3, -1, -1), torch.tensor(scans.target[:count])


def revived(model, mask):
    params = dict(model.named_parameters())
    return sum(int(params[name][~alive].count_nonzero()) for name, alive in mask.items())


def test_transformers_trainer(tmp_path):
    transformers = pytest.importorskip('transformers')
    images, labels = digits(64)
    ticket = load_ticket(NAME)
    folder = ticket.save(tmp_path / 'ticket', dense=True)  # transformers reads the dense file
    # it is kept in half precision, which transformers would train in, and AdamW's eps is nothing there
    model = transformers.TimmWrapperForImageClassification.from_pretrained(folder, dtype=torch.float32)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    kept = keep_sparse(model, optimizer)
    args = transformers.TrainingArguments(
        str(tmp_path / 'out'),
        per_device_train_batch_size=16,
        gradient_accumulation_steps=2,
        num_train_epochs=3,
        max_grad_norm=0.5,
        warmup_steps=2,
        report_to='none',
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    rows = [{'pixel_values': image, 'labels': label} for image, label in zip(images, labels, strict=True)]
    transformers.Trainer(model, args, train_dataset=rows, optimizers=(optimizer, None)).train()
    assert sum(int((~alive).sum()) for alive in kept.mask.values()) == ticket.mask.total - ticket.mask.alive
    assert revived(model, kept.mask) == 0
    assert all(not torch.equal(param, before[name]) for name, param in model.named_parameters() if param.ndim > 1)

    kept.remove()  # it was this that held them
    transformers.Trainer(model, args, train_dataset=rows, optimizers=(optimizer, None)).train()
    assert revived(model, kept.mask) > 0


def train_one_epoch(model, optimizer, loader, scaler, averaged):
    """A detector's epoch as torchvision's reference scripts have it: warm-up, mixed precision, a scaler, an average."""
    model.train()
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / 1000, total_iters=len(loader) - 1)
    for images, targets in loader:
        with torch.amp.autocast('cpu', enabled=True):
            losses = model(list(images), list(targets))
            loss = sum(losses.values())
        assert loss.isfinite()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        warmup.step()
        averaged.update_parameters(model)


def test_torchvision_reference_loop():
    images, labels = digits(24)
    boxes = torch.tensor([[8.0, 8.0, 56.0, 56.0]])
    large = interpolate(images, 64, mode='bilinear')
    scenes = [
        (image, {'boxes': boxes, 'labels': 1 + label[None] % 2}) for image, label in zip(large, labels, strict=True)
    ]
    loader = DataLoader(scenes, batch_size=4, collate_fn=lambda batch: tuple(zip(*batch, strict=True)))
    model = faster_rcnn(pyramid('mbv2', NAME, pretrained=True))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-4, nesterov=True)
    averaged = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=False
    )
    scaler = torch.amp.GradScaler('cpu')
    kept = keep_sparse(model, optimizer)  # the mask is found in the zeros
    before = {name: param.detach().clone() for name, param in model.named_parameters() if name in kept.mask}
    dead = sum(int((~alive).sum()) for name, alive in kept.mask.items() if name.startswith('backbone.body.'))
    whole = load_ticket(NAME).mask
    held = [alive for name, alive in whole.items() if not name.startswith('conv_head')]
    assert dead == sum(int((~alive).sum()) for alive in held)
    for _ in range(2):
        train_one_epoch(model, optimizer, loader, scaler, averaged)
    assert revived(model, kept.mask) == 0
    assert revived(averaged.module, kept.mask) == 0
    assert all(not torch.equal(model.get_parameter(name), weight) for name, weight in before.items())
