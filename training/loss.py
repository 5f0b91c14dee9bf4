"""Cross-entropy through a frozen output head, without keeping [tokens, vocabulary] logits for the backward pass.

    loss_i = logsumexp(h_i W^T) - (h_i W^T)[y_i],      dloss_i/dh_i = (softmax(h_i W^T) - onehot(y_i)) W

W gets no gradient (the base is frozen), so the gradient for h is computed beside the loss, some tokens at a time.
On the demo base, whose vocabulary is most of the model, this takes about two thirds of the plain loss's time.
"""

from typing import Any

import torch

TOKENS_PER_CHUNK = 512  # 512 x 50,257 fp32 logits are 103 MB


class _FrozenHeadLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if wanted else None  # [N, C]
        losses = hidden.new_empty(len(hidden), dtype=torch.float32)
        for start in range(0, len(hidden), TOKENS_PER_CHUNK):
            part = slice(start, start + TOKENS_PER_CHUNK)
            target = targets[part, None]  # [n, 1]
            logits = (hidden[part] @ weight.T).float()  # [n, V]
            picked, (top, where) = logits.gather(1, target), logits.max(1, keepdim=True)
            probabilities = logits.softmax(1)  # [n, V]
            # logsumexp from the largest probability, which never underflows.
            losses[part] = (top - probabilities.gather(1, where).log() - picked)[:, 0]
            if gradient is not None:
                probabilities.scatter_add_(1, target, torch.full_like(picked, -1.0))
                gradient[part] = probabilities.to(weight.dtype) @ weight
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        gradient = ctx.saved_tensors[0]
        return gradient * grad_outputs[0][:, None].to(gradient.dtype), None, None


def frozen_head_losses(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in nats: hidden [N, C], weight [V, C] (no gradient), targets [N] of ids below V -> [N] fp32."""
    losses: Any = _FrozenHeadLosses.apply(hidden, weight.detach(), targets)
    return losses
