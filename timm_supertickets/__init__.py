"""SuperTickets for timm: search and prune a supernet in one run, and use the sparse tickets that are left.

Importing this package registers its models with timm.
"""

from . import models as models
from .arch import Arch
from .bake import bake
from .hub import pull_ticket, push_ticket
from .inference import sparse_inference
from .sparsity.keep import keep_sparse
from .sparsity.mask import Mask, prunable
from .ticket import Ticket, load_ticket, verify_ticket

__all__ = [
    'Arch',
    'Mask',
    'Ticket',
    'bake',
    'keep_sparse',
    'load_ticket',
    'prunable',
    'pull_ticket',
    'push_ticket',
    'sparse_inference',
    'verify_ticket',
]
__version__ = '0.1.0'
