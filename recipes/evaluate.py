"""Evaluate a ticket as it is saved: top-1 on the test images, and what it costs.

accelerate launch recipes/evaluate.py ticket=superticket_mbv2_s50 dataset=fashion_mnist
"""

import sys
from dataclasses import dataclass, replace

from accelerate import Accelerator
from parts.classification import create_data, top1
from parts.config import Setup, parse
from rich.console import Console
from train import create_accelerator

from timm_supertickets import Ticket
from timm_supertickets.cost import model_cost
from timm_supertickets.hub import find_ticket


@dataclass
class Config(Setup):
    """What is evaluated, and on which images; how they would be trained on does not matter.

    Args:
        ticket: A ticket's folder or .safetensors file, a pretrained model's name, or `hf-hub:OWNER/NAME`.
    """

    ticket: str = ''

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.ticket:
            raise ValueError('ticket is missing; give ticket=FOLDER, or the name of a pretrained model')


def main(argv: list[str]) -> None:
    """Score it, and print a line."""
    config = parse(argv, Config, '', 'evaluate.py')
    accelerator = create_accelerator(config)
    ticket = find_ticket(config.ticket)
    share, n = score(ticket, config, accelerator)
    cost = model_cost(ticket.build(), tuple(ticket.pretrained_cfg['input_size']), ticket.mask)
    if accelerator.is_main_process:
        Console(soft_wrap=True).print(
            f'{config.ticket} on {config.dataset}: top-1 {share:.4f}, n = {n:,}; {100 * cost.sparsity:.2f} % sparse, '
            f'{cost.params:,} parameters, {cost.macs / 1e6:.2f} M MACs, {cost.sparse_macs / 1e6:.2f} M of them living',
            highlight=False,
        )


def score(ticket: Ticket, config: Setup, accelerator: Accelerator) -> tuple[float, int]:
    """Top-1 of a ticket on the test images, at its own input size, and how many they are.

    Raises:
        ValueError: The images have other classes than the ticket.
    """
    in_chans, img_size, _ = ticket.pretrained_cfg['input_size']
    data = create_data(replace(config, in_chans=in_chans, img_size=img_size), accelerator, ticket.pretrained_cfg)
    if ticket.pretrained_cfg['num_classes'] != data.num_classes:
        known = ticket.pretrained_cfg['num_classes']
        raise ValueError(f'dataset {config.dataset!r} has {data.num_classes} classes, the ticket knows {known}')
    labels = ticket.pretrained_cfg.get('label_names')
    if labels and data.labels and list(labels) != data.labels:
        raise ValueError(f'dataset {config.dataset!r} has the classes {data.labels}, the ticket knows {list(labels)}')
    return top1(ticket.build().to(accelerator.device), data, accelerator), data.val_count


if __name__ == '__main__':
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f'error: {error}')
