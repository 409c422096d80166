"""Faults: what is wrong with annotations, all of it said in one line before training starts."""

from collections.abc import Mapping, Sequence
from pathlib import Path

SHOWN = 3


def refuse(where: str | Path, faults: Mapping[str, Sequence[str]]) -> None:
    """Raise if there are faults.

    Args:
        where: The folder or file that was checked.
        faults: By kind, what has the fault; kinds without any are not spoken of.

    Raises:
        ValueError: There are; every kind is given with its count and its first few.
    """
    said = []
    for kind, found in faults.items():
        if found:
            more = ', ...' if len(found) > SHOWN else ''
            said.append(f'{len(found)} {kind} ({", ".join(found[:SHOWN])}{more})')
    if said:
        raise ValueError(f'{where} has {"; ".join(said)}')
