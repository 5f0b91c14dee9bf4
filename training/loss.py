"""Cross-entropy through a frozen output head, without keeping [tokens, vocabulary] logits for the backward pass.

    loss = mean_i( logsumexp(h_i W^T) - (h_i W^T)[y_i] ),      dloss/dh = (softmax(h W^T) - onehot(y)) W / N

W gets no gradient (the base is frozen), so the gradient for h is computed beside the loss, some tokens at a time.
On the demo base, whose vocabulary is most of the model, this takes about two thirds of the plain loss's time.
"""

from typing import Any

import torch

TOKENS_PER_CHUNK = 512  # 512 x 50,257 fp32 logits are 103 MB


class _FrozenHeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        gradient = torch.empty_like(hidden)  # [N, C]
        total = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, len(hidden), TOKENS_PER_CHUNK):
            part = slice(start, start + TOKENS_PER_CHUNK)
            target = targets[part, None]  # [n, 1]
            logits = (hidden[part] @ weight.T).float()  # [n, V]
            picked, (top, where) = logits.gather(1, target), logits.max(1, keepdim=True)
            probabilities = logits.softmax(1)  # [n, V]
            # logsumexp from the largest probability, which never underflows.
            total += (top - probabilities.gather(1, where).log() - picked).sum()
            probabilities.scatter_add_(1, target, torch.full_like(picked, -1.0))
            gradient[part] = probabilities.to(weight.dtype) @ weight
        ctx.save_for_backward(gradient / len(hidden))
        return total / len(hidden)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.saved_tensors[0] * grad_outputs[0], None, None


def frozen_head_loss(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats: hidden [N, C], weight [V, C] (no gradient), targets [N] of ids below V -> scalar."""
    loss: Any = _FrozenHeadLoss.apply(hidden, weight.detach(), targets)
    return loss
