"""The loss of a language model over a large vocabulary, in full or over a sample of it.

For a hidden state h and the target y, with logits l_w = h . W_w:

    full     loss = log sum_w exp(l_w)  -  l_y
    sampled  loss = log Z'              -  l_y
             Z'   = sum_{w frequent} exp(l_w)  +  R/S sum_{w sampled, w != y} exp(l_w)  +  [y rare] exp(l_y)

The frequent tokens are always there; of the R rare ones S are drawn uniformly without replacement, anew for each
step. Each rare token other than y is in the sample with probability S/R, so Z' is an unbiased estimate of the full sum
(importance sampling; Bengio and Senecal 2008, Jean et al. 2015), and with S = R the two losses are equal.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional


def full_loss(hidden: Tensor, embedding: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy over the whole vocabulary, in nats.

    hidden [N, D], embedding [V, D], targets [N] -> []
    """
    logits = hidden @ embedding.t()  # [N, V]
    return functional.cross_entropy(logits.float(), targets)


class SampledSoftmax:
    """Mean cross-entropy over frequent tokens and a fresh sample of the rare ones.

    Args: `frequencies` [V] orders the vocabulary; `frequent` tokens are always scored, `sampled` rare ones are drawn.
    Raises ValueError where these don't fit the vocabulary.
    """

    def __init__(
        self, frequencies: NDArray[np.float64], frequent: int, sampled: int, seed: int, device: torch.device
    ) -> None:
        vocabulary = len(frequencies)
        if frequent < 1 or sampled < 1 or frequent + sampled > vocabulary:
            raise ValueError(f"{frequent} frequent and {sampled} sampled tokens don't fit a vocabulary of {vocabulary}")
        order = np.argsort(-frequencies, kind="stable")
        self._rare: NDArray[np.int64] = order[frequent:]  # [R]
        self._frequent = torch.from_numpy(order[:frequent].copy()).to(device)  # [K]
        self._sampled = sampled
        self._correction = float(np.log(len(self._rare) / sampled))
        self._random = np.random.default_rng(seed)
        # Column of each frequent token; -1 for rare ones. [V]
        self._column = torch.full((vocabulary,), -1, dtype=torch.long, device=device)
        self._column[self._frequent] = torch.arange(frequent, device=device)

    def __call__(self, hidden: Tensor, embedding: Tensor, targets: Tensor) -> Tensor:
        """hidden [N, D], embedding [V, D], targets [N] -> []"""
        drawn = torch.from_numpy(self._random.choice(self._rare, self._sampled, replace=False))  # [S]
        drawn = drawn.to(targets.device)
        logits = (hidden @ embedding[torch.cat([self._frequent, drawn])].t()).float()  # [N, K + S]
        frequent, sampled = logits.split([len(self._frequent), len(drawn)], dim=1)
        # A rare target counts once, as `own`: if it was drawn too, that column is struck out.
        sampled = (sampled + self._correction).masked_fill(targets[:, None] == drawn, -torch.inf)  # [N, S]
        column = self._column[targets]  # [N]
        own = (hidden.float() * embedding[targets]).sum(-1).masked_fill(column >= 0, -torch.inf)  # [N]
        labels = torch.where(column >= 0, column, logits.shape[1])
        return functional.cross_entropy(torch.cat([frequent, sampled, own[:, None]], dim=1), labels)
