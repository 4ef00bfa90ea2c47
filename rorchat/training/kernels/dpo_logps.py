"""Log-probabilities of two replies to one prompt, for preference training, without padding or a repeated prompt.

TRL's batch contains every prompt twice and pads all rows to the longest. Here a pair is a prefix group: the prompt is
the prefix, and the chosen and the rejected reply are its continuations, which attend to the prompt and to themselves
(see `attention`). The model reads the B pairs of a batch as one packed row of N tokens. The head is applied only to
replies, one slice at a time, and its logits are recomputed in the backward pass.

    pair          p0 p1 p2 | c0 c1 | r0 r1 r2           prefix group (3, 2, 3)
    position       0  1  2    3  4    3  4  5           both replies continue the prompt
    predicted by           p2 c0   p2 r0 r1             r0 by the last token of the prompt, not by c1
"""

import functools

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import GPT2LMHeadModel
from trl.trainer.utils import FusedCausalLMOutput

from rorchat.training.kernels.attention import PrefixGroup, patch_packed_attention, skip_padding_warning
from rorchat.training.kernels.lm_head_loss import head_weight, hidden_states
from rorchat.training.kernels.recompute import MIN_RECOMPUTE_ELEMENTS
from rorchat.training.kernels.sliced_head import (
    SlicedHead,
    apply_head,
    as_input_gradients,
    hand_over,
    needed_gradients,
)


class LogProbabilities(torch.autograd.Function):
    """log p(target) in nats, float32, and whether the target is the most likely token, both (M,).

    Saves only the logsumexp of each target's logits and recomputes the logits in the backward pass. The arguments are
    those of `apply_head`: hidden (M, D), weight (V, D), targets (M,).
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, rows, row_ids, dtype, tied, is_training) -> tuple[Tensor, Tensor]:
        head = SlicedHead(weight, rows, row_ids, dtype)
        log_probs, is_top1, sums = [], [], []
        for part, part_targets in head.split(hidden, targets):  # (n, D), (n,)
            logits = head.logits(part)  # (n, D) -> (n, V)
            sums.append(logits.logsumexp(dim=-1))
            log_probs.append(logits.gather(1, part_targets[:, None])[:, 0] - sums[-1])
            is_top1.append(logits.argmax(dim=-1) == part_targets)
        ctx.save_for_backward(hidden, weight, targets, rows, torch.cat(sums))
        ctx.row_ids, ctx.dtype, ctx.tied = row_ids, dtype, tied
        top1 = torch.cat(is_top1)
        ctx.mark_non_differentiable(top1)
        return torch.cat(log_probs), top1

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor, _):
        hidden, weight, targets, rows, sums = ctx.saved_tensors
        head = SlicedHead(weight, rows, ctx.row_ids, ctx.dtype, needed_gradients(ctx))
        parts = [
            head.backward(slice_[0], _logits_gradient(head, *slice_))
            for slice_ in head.split(hidden, targets, sums, gradient)
        ]
        hidden_gradient = torch.cat([part for part in parts if part is not None]) if head.needs_hidden else None
        return as_input_gradients(hidden_gradient, hand_over(ctx.tied, head.weight_gradient), head.rows_gradient)


def _logits_gradient(head: SlicedHead, hidden: Tensor, targets: Tensor, sums: Tensor, gradient: Tensor) -> Tensor:
    """The gradient of a slice's logits, (n, V): one-hot - softmax, times the gradient (n,) of log p(target)."""
    softmax = head.logits(hidden).sub_(sums[:, None]).exp_()
    return softmax.mul_(-gradient[:, None]).scatter_add_(1, targets[:, None], gradient[:, None].float())


def reply_masks(group_sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Masks in TRL's layout, (2 B, T): all chosen sides, then all rejected sides, right-padded to the longest side.

    A side is the prompt followed by one of its replies.

    Args:
        group_sizes: (B, 3), number of tokens in each prompt, chosen reply and rejected reply.

    Returns:
        The attention mask and the completion mask, both bool.
    """
    prompts = group_sizes[:, :1].expand(-1, 2)  # (B, 2)
    ends = prompts + group_sizes[:, 1:]  # (B, 2), tokens of each side
    prompts, ends = (x.T.reshape(-1, 1) for x in (prompts, ends))  # (B, 2) -> (2 B, 1)
    positions = torch.arange(int(ends.max()), device=group_sizes.device)  # (T,)
    return positions < ends, (positions >= prompts) & (positions < ends)


def patch_dpo_logps(model: GPT2LMHeadModel) -> None:
    """Patches the forward method of a stock GPT-2 so that `model(input_ids=..., group_sizes=...)` scores pairs.

    The arguments and the output are those of `score_replies`. Without `group_sizes`, the stock method is called.
    """
    stock_forward = model.forward
    patch_packed_attention(model)
    skip_padding_warning(model)

    @functools.wraps(stock_forward)
    def forward(*args, group_sizes: Tensor | None = None, **kwargs):
        if group_sizes is None:
            return stock_forward(*args, **kwargs)
        return score_replies(model, kwargs["input_ids"], group_sizes)

    vars(model)["forward"] = forward


def score_replies(model: GPT2LMHeadModel, input_ids: Tensor, group_sizes: Tensor) -> FusedCausalLMOutput:
    """The log-probability of every token of both replies of every pair, in TRL's layout.

    Args:
        input_ids: (B, W), prompt, chosen reply and rejected reply of each pair, concatenated and right-padded.
        group_sizes: (B, 3), number of tokens in each of the three parts.

    Returns:
        `log_probs` and `is_top1`, (2 B, T - 1), all chosen sides before all rejected sides, 0 outside of replies. The
        entropy and the mean logits, which TRL only logs, are zeros.
    """
    groups: list[PrefixGroup] = [tuple(sizes) for sizes in group_sizes.tolist()]
    lengths = group_sizes.sum(dim=1, keepdim=True)  # (B, 1)
    prompts, chosen = group_sizes[:, :1], group_sizes[:, 1:2]  # (B, 1)
    columns = torch.arange(input_ids.size(1), device=input_ids.device)  # (W,)
    is_token = columns < lengths  # (B, W)
    is_reply = is_token & (columns >= prompts)  # (B, W)
    position_ids = columns - chosen * (columns >= prompts + chosen)  # (B, W)
    packed = {"input_ids": input_ids[is_token][None], "position_ids": position_ids[is_token][None]}  # (1, N)
    recompute = packed["input_ids"].numel() * model.config.n_embd >= MIN_RECOMPUTE_ELEMENTS
    hidden, tied = hidden_states(model, model.base_model, (), packed, groups, recompute)  # (1, N, D)
    # (B, W): the hidden state that predicts each token, as an index into the N packed tokens
    predictors = torch.where(columns == prompts + chosen, prompts, columns) - 1 + lengths.cumsum(dim=0) - lengths
    weight, trained_rows = head_weight(model)
    scores = apply_head(
        LogProbabilities, hidden[0][predictors[is_reply]], weight, input_ids[is_reply], tied, trained_rows
    )
    _, completion_mask = reply_masks(group_sizes)
    by_pair = completion_mask.unflatten(0, (2, -1)).transpose(0, 1)  # (2 B, T) -> (B, 2, T), the order of the scores
    log_probs, is_top1 = (
        # (M,) -> (B, 2, T) -> (2 B, T - 1)
        x.new_zeros(by_pair.shape).masked_scatter(by_pair, x).transpose(0, 1).flatten(0, 1)[:, 1:]
        for x in scores
    )
    zeros = torch.zeros_like(log_probs)
    return FusedCausalLMOutput(
        log_probs=log_probs, is_top1=is_top1, entropy=zeros, mean_logits=zeros, label_mask=completion_mask[:, 1:]
    )
