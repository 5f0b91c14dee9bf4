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
    logits = hidden @ embedding.to(hidden.dtype).t()  # [N, V]
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
        if not (0 < frequent < vocabulary and 0 < sampled <= vocabulary - frequent):
            raise ValueError(
                f"{frequent} frequent and {sampled} sampled tokens don't fit a vocabulary of {vocabulary}: "
                "both must be above 0, together at most the vocabulary"
            )
        order = np.argsort(-frequencies, kind="stable")
        self.rare: NDArray[np.int64] = order[frequent:]
        self.sampled = sampled
        self.frequent = torch.from_numpy(order[:frequent].copy()).to(device)  # [K]
        self.covered = float(frequencies[order[:frequent]].sum())  # share of the text that is frequent tokens
        self._correction = float(np.log(len(self.rare) / sampled))
        self._random = np.random.default_rng(seed)
        self._device = device
        # Column of each frequent token; -1 for rare ones. [V]
        self._column = torch.full((vocabulary,), -1, dtype=torch.long, device=device)
        self._column[self.frequent] = torch.arange(frequent, device=device)

    def __call__(self, hidden: Tensor, embedding: Tensor, targets: Tensor) -> Tensor:
        """hidden [N, D], embedding [V, D], targets [N] -> []"""
        drawn = torch.from_numpy(self._random.choice(self.rare, self.sampled, replace=False)).to(
            self._device
        )  # [S]
        weights = embedding.to(hidden.dtype)
        frequent_logits = (hidden @ weights[self.frequent].t()).float()  # [N, K]
        sampled_logits = (hidden @ weights[drawn].t()).float() + self._correction  # [N, S]
        column = self._column[targets]  # [N]
        rows = (column < 0).nonzero().squeeze(1)  # [n], where the target is rare
        own = hidden.new_full((len(hidden),), -torch.inf, dtype=torch.float32)
        own[rows] = (hidden[rows] * weights[targets[rows]]).sum(-1).float()
        # The target itself counts once, as `own`: if it was drawn too, that column is struck out.
        struck = targets[rows, None] == drawn[None, :]  # [n, S]
        sampled_logits = sampled_logits.index_put(
            (rows,), sampled_logits[rows].masked_fill(struck, -torch.inf), accumulate=False
        )
        logits = torch.cat([frequent_logits, sampled_logits, own[:, None]], dim=1)  # [N, K + S + 1]
        labels = torch.where(column < 0, logits.shape[1] - 1, column)
        return functional.cross_entropy(logits, labels)
