"""Log-probabilities of two replies to one prompt, for preference training: each prompt is read once, padding never.

TRL's batch holds each prompt twice and pads all rows to the longest. Here what a batch holds becomes one row of trees,
a prompt and its two replies, and the vocabulary head runs on replies only, a slice at a time, whose logits are formed
again in the backward pass in place of being kept.
"""

import functools

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from trl.trainer.utils import FusedCausalLMOutput

from rorchat.chatml import IGNORE_INDEX
from rorchat.training.kernels.attention import PrefixGroup, keep_packed, needs_no_mask
from rorchat.training.kernels.lm_head_loss import (
    LOGITS_AT_ONCE,
    LearnedRows,
    TiedGradient,
    hidden_states,
    learned_rows,
    logits_of,
)
from rorchat.training.kernels.recompute import WORTHWHILE


class _LogProbabilities(torch.autograd.Function):
    """log softmax(`hidden @ weight.T`) at `targets`, (N,), and whether the target is the likeliest token.

    Args:
        rows: (K, D) what stands in for the rows `row_ids` of the weight, of which they alone learn.
    """

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        compute_dtype: torch.dtype,
        tied,
        rows: Tensor | None = None,
        row_ids: Tensor | None = None,
    ):
        head, found, likeliest, sums = weight.to(compute_dtype), [], [], []
        own = None if rows is None else rows.to(compute_dtype)
        for part, wanted in _slices(weight.size(0), hidden, targets):
            logits = logits_of(part.to(compute_dtype), head, own, row_ids)
            sums.append(logits.logsumexp(dim=-1))
            found.append(logits.gather(1, wanted[:, None])[:, 0] - sums[-1])
            likeliest.append(logits.argmax(dim=-1) == wanted)
        ctx.save_for_backward(hidden, weight, targets, torch.cat(sums), rows)
        ctx.compute_dtype, ctx.tied, ctx.row_ids = compute_dtype, tied, row_ids
        likeliest = torch.cat(likeliest)
        ctx.mark_non_differentiable(likeliest)
        return torch.cat(found), likeliest

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor, _):
        hidden, weight, targets, sums, rows = ctx.saved_tensors
        head = weight.to(ctx.compute_dtype)
        own = None if rows is None else rows.to(ctx.compute_dtype)
        for_hidden, for_weight = ctx.needs_input_grad[:2]
        hidden_gradient = [hidden.new_zeros(0, hidden.size(1))]
        weight_gradient = torch.zeros_like(weight, dtype=torch.float32) if for_weight else None
        rows_gradient = torch.zeros_like(rows, dtype=torch.float32) if ctx.needs_input_grad[5] else None
        for part, wanted, total, outer in _slices(weight.size(0), hidden, targets, sums, gradient):
            part = part.to(ctx.compute_dtype)
            inner = logits_of(part, head, own, ctx.row_ids).sub_(total[:, None]).exp_()  # the softmax
            inner.mul_(-outer[:, None]).scatter_add_(1, wanted[:, None], outer[:, None].float())
            inner = inner.to(ctx.compute_dtype)
            if own is not None:
                of_own = inner[:, ctx.row_ids]
                inner.index_fill_(1, ctx.row_ids, 0)
            if for_hidden:
                hidden_gradient.append((inner @ head).to(hidden.dtype))
                if own is not None:
                    hidden_gradient[-1] += of_own @ own
            if for_weight and ctx.compute_dtype == torch.float32:
                weight_gradient.addmm_(inner.T, part)
            elif for_weight:
                weight_gradient += inner.T @ part
            if rows_gradient is not None:
                rows_gradient += of_own.T @ part
        if ctx.tied is not None:
            ctx.tied.gradient, weight_gradient = weight_gradient, None
        hidden_gradient = torch.cat(hidden_gradient) if for_hidden else None
        return hidden_gradient, weight_gradient, None, None, None, rows_gradient, None


def _slices(vocabulary: int, *tensors: Tensor):
    """Parts of the tensors along their first dimension, of as many rows as logits may be held of."""
    rows = max(1, LOGITS_AT_ONCE // vocabulary)
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)


def log_probabilities(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    tied: TiedGradient | None = None,
    learned: LearnedRows | None = None,
) -> tuple[Tensor, Tensor]:
    """The log-probability of each target in nats, float32, and whether it is the likeliest token, both (N,).

    Args:
        hidden: (N, D), the states that each target is predicted from.
        weight: (V, D), the vocabulary head.
        targets: (N,) ids.
        tied: takes the weight's gradient, in place of the weight.
        learned: rows that stand in for the weight's, and get a gradient where no other does.
    """
    device = hidden.device.type
    mixed = torch.is_autocast_enabled(device)  # which does not reach into a custom function
    compute_dtype = torch.get_autocast_dtype(device) if mixed else hidden.dtype
    with torch.autocast(device, enabled=False):
        return _LogProbabilities.apply(
            hidden, weight, targets, compute_dtype, tied, *(learned[:2] if learned else (None, None))
        )


def patch_dpo_logps(model: nn.Module) -> None:
    """Gives a stock GPT-2 the answer that TRL's DPOTrainer asks of `model(..., labels=..., fused_lm_head=True)`.

    Rows are those of its collator: all chosen sides, then all rejected ones, padded on the right. Entropies and mean
    logits, which only its logs would show, are zeros. Without `fused_lm_head` the model is as before.
    """
    stock_forward = type(model).forward.__get__(model)
    keep_packed(model)
    needs_no_mask(model)

    @functools.wraps(stock_forward)
    def forward(*args, fused_lm_head: bool = False, labels: Tensor | None = None, **kwargs):
        if not fused_lm_head:
            return stock_forward(*args, labels=labels, **kwargs)
        found, likeliest = _of_pairs(model, kwargs["input_ids"], kwargs["attention_mask"], labels)
        nothing = torch.zeros_like(found)
        asked = labels[:, 1:] != IGNORE_INDEX
        return FusedCausalLMOutput(
            log_probs=found, is_top1=likeliest, entropy=nothing, mean_logits=nothing, label_mask=asked
        )

    model.forward = forward


def _of_pairs(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities and whether the likeliest, (2 B, T - 1), 0 where a label is not asked; of (2 B, T) each."""
    rows, length = input_ids.shape
    ids, real, asked = (_by_pair(x) for x in (input_ids, attention_mask.bool(), labels != IGNORE_INDEX))  # (B, 2, T)
    prompts = asked[:, 0].int().argmax(dim=1)  # (B,), tokens before the first one asked, the same on both sides
    positions = torch.arange(length, device=ids.device).expand_as(ids)
    kept = real.clone()
    kept[:, 1] &= positions[:, 1] >= prompts[:, None]
    sizes = torch.stack([prompts, *(kept.sum(dim=2) - torch.stack([prompts, prompts * 0], dim=1)).T], dim=1)
    trees: list[PrefixGroup] = [tuple(sizes) for sizes in sizes.tolist()]
    recompute = int(kept.sum()) * model.config.n_embd >= WORTHWHILE
    read = {"input_ids": ids[kept][None], "position_ids": positions[kept][None]}
    hidden, tied = hidden_states(model, model.base_model, (), read, trees, recompute)
    # where each token stands in the row of trees; that which predicts it stands before it, or ends the prompt
    place = kept.flatten().cumsum(0).view_as(kept) - 1
    source = place - 1
    first = positions[:, 1] == prompts[:, None]
    last_of_prompt = place[:, 0].gather(1, prompts[:, None] - 1)  # (B, 1)
    source[:, 1] = torch.where(first, last_of_prompt, source[:, 1])
    learned = learned_rows(model)
    weight = model.get_output_embeddings().weight if learned is None else learned.frozen
    found, likeliest = log_probabilities(hidden[0][source[asked]], weight, ids[asked], tied, learned)
    spread = [x.new_zeros(asked.shape).masked_scatter(asked, x) for x in (found, likeliest)]
    return tuple(x.transpose(0, 1).reshape(rows, length)[:, 1:] for x in spread)


def _by_pair(rows: Tensor) -> Tensor:
    """(2 B, T), all chosen before all rejected -> (B, 2, T)."""
    return rows.unflatten(0, (2, -1)).transpose(0, 1)
