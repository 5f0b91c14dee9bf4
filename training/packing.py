"""Batches without padding: the rows' tokens one after the other, those of one voice together.

Running example: voice 0 has the row [5 6 7 E], voice 1 the rows [8 9 E] and [4 E]; E is EOS.

    ids        5 6 7   8 9   4       what goes in: all but the last token of each row
    positions  0 1 2   0 1   0
    targets    6 7 E   9 E   E       what is to come out
    kept       0 1 1   1 1   1       where the loss counts: from `learn_from` on (1, 0 and 0 here)
    places     0 1 2   3 4   6       in a [rows, longest] grid, which attention alone uses
    sizes      3       3             tokens of each voice

EOS is learned like any token: nothing is masked by id, and there is no padding to mask.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from training.data import Example


@dataclass(frozen=True)
class Packed:
    """A batch of some voices' rows. N tokens, V voices, R rows of at most T tokens."""

    ids: torch.Tensor  # [N] int64
    positions: torch.Tensor  # [N] int64
    targets: torch.Tensor  # [N] int64
    kept: torch.Tensor  # [N] bool
    places: torch.Tensor  # [N] int64, into R * T
    rows: int
    longest: int
    sizes: list[int]  # V tokens counts, in order
    shares: list["Share"]  # V

    @property
    def padding(self) -> float:
        """The share of attention's grid that no token fills."""
        return 1.0 - len(self.ids) / (self.rows * self.longest)

    def to(self, device: torch.device) -> "Packed":
        """The same on `device`."""
        names = ("ids", "positions", "targets", "kept", "places")
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in names}
        return replace(self, **moved, shares=[share.to(device) for share in self.shares])


@dataclass(frozen=True)
class Share:
    """Which of a voice's tokens in a batch are here, where several processes share it: the dropout is the whole's."""

    whole: int  # tokens of the voice in all processes
    mine: torch.Tensor | None  # [n] int64, into them; None: all of them

    def to(self, device: torch.device) -> "Share":
        return self if self.mine is None else Share(self.whole, self.mine.to(device))


def pack(voices: Sequence[Sequence[Example]], rank: int = 0, world: int = 1) -> Packed:
    """The rows of each voice that process `rank` of `world` computes: every world-th.

    Learning begins at a row's `bare_length`: a prompt's names are not learned, so that the template goes on after any.
    """
    ids: list[int] = []
    positions: list[int] = []
    targets: list[int] = []
    kept: list[bool] = []
    sizes, shares, lengths = [], [], []
    for rows in voices:
        before, mine, start = len(ids), [], 0
        for i, row in enumerate(rows):
            length = len(row.token_ids) - 1
            if i % world == rank:
                ids += row.token_ids[:-1]
                targets += row.token_ids[1:]
                positions += range(length)
                kept += [place + 1 >= row.bare_length for place in range(length)]
                lengths.append(length)
                mine += range(start, start + length)
            start += length
        sizes.append(len(ids) - before)
        shares.append(Share(start, None if world == 1 else torch.tensor(mine, dtype=torch.long)))
    longest = max(lengths, default=0)
    places = [row * longest + place for row, length in enumerate(lengths) for place in range(length)]
    return Packed(
        ids=torch.tensor(ids, dtype=torch.long), positions=torch.tensor(positions, dtype=torch.long),
        targets=torch.tensor(targets, dtype=torch.long), kept=torch.tensor(kept, dtype=torch.bool),
        places=torch.tensor(places, dtype=torch.long), rows=len(lengths), longest=longest, sizes=sizes, shares=shares,
    )  # fmt: skip
