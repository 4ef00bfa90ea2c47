"""The training forward pass of a stock GPT-2: attention without masks, fused GELU, a loss without full logits.

The vocabulary head is applied to labelled positions only, one slice at a time (`sliced_head`). The gradients are
computed together with the loss, so that the logits of a slice are computed only once. Nothing is saved with the model:
without labels it behaves as the stock model, and its config does not change.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import GPT2LMHeadModel
from transformers.modeling_outputs import CausalLMOutput

from rorchat.adapter import iterate_blocks
from rorchat.chatml import IGNORE_INDEX
from rorchat.training.kernels.attention import (
    PrefixGroup,
    causal_attention,
    packed_attention,
    patch_packed_attention,
    skip_padding_warning,
)
from rorchat.training.kernels.recompute import MIN_RECOMPUTE_ELEMENTS, recompute_cheap_outputs
from rorchat.training.kernels.sliced_head import (
    SlicedHead,
    TiedGradient,
    TrainedRows,
    apply_head,
    as_input_gradients,
    find_trained_rows,
    hand_over,
    needed_gradients,
)


class HeadLoss(torch.autograd.Function):
    """Summed cross-entropy of the head's logits, a scalar in float32, with all gradients computed in the forward pass.

    The backward pass only scales the gradients, so it needs no logits.
    """

    @staticmethod
    def forward(ctx, hidden, weight, labels, rows, row_ids, dtype, tied, is_training) -> Tensor:
        # hidden (N, D), weight (V, D), labels (N,), rows (K, D) or None, row_ids (K,) or None
        needs = needed_gradients(ctx) if is_training else (False, False, False)
        head = SlicedHead(weight, rows, row_ids, dtype, needs)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        hidden_gradient = torch.empty_like(hidden) if head.needs_hidden else None  # (N, D)
        start = 0
        for part, targets in head.split(hidden, labels):  # (n, D), (n,): one slice
            loss, part_gradient = _slice_loss(head, part, targets)
            total += loss
            if hidden_gradient is not None and part_gradient is not None:
                hidden_gradient[start : start + len(part)] = part_gradient
            start += len(part)
        ctx.gradients, ctx.tied = (hidden_gradient, head.weight_gradient, head.rows_gradient), tied
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, scale: Tensor):
        if ctx.gradients is None:
            raise RuntimeError("The gradients of this loss are scaled in place: call backward only once.")
        (hidden_gradient, weight_gradient, rows_gradient), ctx.gradients = ctx.gradients, None
        for gradient in (hidden_gradient, weight_gradient, rows_gradient):
            if gradient is not None:
                gradient.mul_(scale)
        return as_input_gradients(hidden_gradient, hand_over(ctx.tied, weight_gradient), rows_gradient)


def _slice_loss(head: SlicedHead, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
    """The summed loss of a slice and the gradient (n, D) of its hidden states. Its logits are freed on return."""
    loss, gradient = _cross_entropy(head.logits(hidden), labels)
    return loss, head.backward(hidden, gradient)


def _cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The summed loss of logits (n, V) with labels (n,), and the gradient (n, V), which overwrites the logits.

    `logsumexp` followed by `softmax` would copy the logits twice and compute the exponentials twice.
    """
    label_logits = logits.gather(1, labels[:, None])  # (n, 1)
    largest = logits.amax(dim=-1, keepdim=True)
    sums = logits.sub_(largest).exp_().sum(dim=-1, keepdim=True)
    gradient = logits.div_(sums)  # softmax
    gradient.scatter_add_(1, labels[:, None], gradient.new_full((len(labels), 1), -1.0))
    return (sums.log() + largest - label_logits).sum(), gradient


class TiedLookup(torch.autograd.Function):
    """Embedding lookup that adds its gradient in place to the head's gradient of the same, tied weight."""

    @staticmethod
    def forward(ctx, weight: Tensor, ids: Tensor, tied: TiedGradient) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.tied = tied
        return nn.functional.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        (ids,) = ctx.saved_tensors
        # the backward pass of the head has run already, because its hidden states depend on this lookup
        total, ctx.tied.gradient = ctx.tied.gradient, None
        ids, gradient = ids.flatten(), gradient.flatten(0, -2).to(total.dtype)
        # `index_put_` is deterministic on CUDA but not on the CPU, `index_add_` on the CPU but not on CUDA. On Apple's
        # GPUs, PyTorch guarantees it for neither.
        if total.is_cuda:
            return total.index_put_((ids,), gradient, accumulate=True), None, None
        return total.index_add_(0, ids, gradient), None, None


def head_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    whole_rows: bool = False,
    tied: TiedGradient | None = None,
    trained_rows: TrainedRows | None = None,
) -> Tensor:
    """The sum of -log p(label) over labelled positions, in nats, float32.

    Args:
        hidden: (B, T, D), the model's last hidden states.
        weight: (V, D), the vocabulary head.
        labels: (B, T), not shifted; -100 at positions without a target.
        whole_rows: Every position has a target, so no mask is needed. Indexing with a mask would synchronize a GPU.
        tied: Receives the gradient of the weight, which then gets none itself.
        trained_rows: Rows that replace those of the weight with the same ids. Only they get a gradient.

    Returns:
        A scalar.
    """
    labels = labels[:, 1:]
    is_target = slice(None) if whole_rows else labels != IGNORE_INDEX
    hidden = hidden[:, :-1][is_target].reshape(-1, hidden.size(-1))  # (B, T, D) -> (N, D)
    labels = labels[is_target].reshape(-1)  # (N,)
    return apply_head(HeadLoss, hidden, weight, labels, tied, trained_rows)


def patch_lm_head_loss(model: GPT2LMHeadModel, compiled: bool = False, whole_rows: bool = False) -> None:
    """Replaces the forward pass of a stock GPT-2 by one with `head_loss` and attention without a mask.

    `model(labels=...)` then returns the loss without logits; without labels the model behaves as before. With
    `sequence_lengths`, rows are packed as by `rorchat.mixture.collators.collate_packed`.

    Args:
        compiled: Compile everything but the head with `torch.compile`. All batches must have the same shape.
        whole_rows: No batch contains the label -100.
    """
    stock_forward = model.forward
    # not assigned to the model, which stays uncompiled for saving, evaluation and generation
    base = torch.compile(model.base_model, dynamic=False) if compiled else model.base_model
    if not compiled:
        patch_packed_attention(model)
    skip_padding_warning(model)

    @functools.wraps(stock_forward)
    def forward(
        *args,
        labels: Tensor | None = None,
        sequence_lengths: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs,
    ):
        if labels is None:
            return stock_forward(*args, **kwargs)
        groups = None if sequence_lengths is None else _sequences_as_groups(sequence_lengths, labels.size(1))
        recompute = not compiled and labels.numel() * model.config.n_embd >= MIN_RECOMPUTE_ELEMENTS
        hidden, tied = hidden_states(model, base, args, kwargs, groups, recompute)
        weight, trained_rows = head_weight(model)
        loss = head_loss(hidden, weight, labels, whole_rows, tied, trained_rows)
        items = (labels[:, 1:] != IGNORE_INDEX).sum() if num_items_in_batch is None else num_items_in_batch
        return CausalLMOutput(loss=loss / items)

    vars(model)["forward"] = forward


def head_weight(model: GPT2LMHeadModel) -> tuple[Tensor, TrainedRows | None]:
    """The head's weight (V, D), and the rows that are trained in place of it if it is frozen.

    Call this after the model's body, because FSDP gathers a sharded weight during the forward pass of the body.
    """
    trained_rows = find_trained_rows(model.lm_head)
    weight = model.lm_head.weight if trained_rows is None else trained_rows.frozen
    return weight, trained_rows


def hidden_states(
    model: GPT2LMHeadModel,
    base: Callable[..., Any],
    args: tuple,
    kwargs: dict,
    prefix_groups: list[PrefixGroup] | None,
    recompute: bool,
) -> tuple[Tensor, TiedGradient | None]:
    """Runs the model's body.

    Args:
        base: The model's body, possibly compiled; called with `args` and `kwargs`.
        prefix_groups: For packed rows, the sequences of all rows, see `PrefixGroup`. None for other rows.
        recompute: Recompute the outputs of cheap layers in the backward pass.

    Returns:
        The output of the last norm, (B, T, D), and the `TiedGradient` to pass to `head_loss`; None if the head does not
        share the weight of the lookup.
    """
    has_only_ids = not args and kwargs.keys() == {"input_ids"}  # otherwise there may be a mask
    tied = TiedGradient() if (has_only_ids or prefix_groups) and is_lookup_plain(model) else None
    trained_rows, embedded = find_trained_rows(model.transformer.wte), None
    if tied is not None:
        embedded = TiedLookup.apply(model.transformer.wte.weight, kwargs["input_ids"], tied)
    elif trained_rows is not None and "input_ids" in kwargs:
        embedded = trained_rows.look_up(kwargs["input_ids"])
    if embedded is not None:
        kwargs = {name: value for name, value in kwargs.items() if name != "input_ids"} | {"inputs_embeds": embedded}
    with contextlib.ExitStack() as contexts:
        if prefix_groups:
            kwargs = kwargs | {"prefix_groups": prefix_groups}
            contexts.enter_context(packed_attention(model.config))
        elif has_only_ids:
            contexts.enter_context(causal_attention(model.config))
        if recompute:
            contexts.enter_context(recompute_cheap_outputs(model))
        return base(*args, **kwargs, use_cache=False).last_hidden_state, tied


def _sequences_as_groups(sequence_lengths: Tensor, width: int) -> list[PrefixGroup]:
    """The sequences of packed rows as prefix groups without continuations. The padding of a row is one more group.

    Args:
        sequence_lengths: (B, S), 0 where a row has fewer than S sequences.
        width: Tokens per row.
    """
    groups: list[PrefixGroup] = []
    for lengths in sequence_lengths.tolist():
        groups += [(length,) for length in (*lengths, width - sum(lengths)) if length]
    return groups


def is_lookup_plain(model: GPT2LMHeadModel) -> bool:
    """Whether `TiedLookup` can replace the token embedding: tied to the head, trainable, unsharded, without hooks."""
    embedding, head = model.transformer.wte, model.lm_head
    if type(embedding) is not nn.Embedding or "forward" in vars(embedding):  # accelerate replaces `forward`
        return False
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(embedding, name) for name in hooks):
        return False
    if embedding.padding_idx is not None or embedding.max_norm is not None or embedding.scale_grad_by_freq:
        return False
    is_tied = embedding.weight is head.weight and type(head.weight) is nn.Parameter  # shards are DTensors
    return torch.is_grad_enabled() and is_tied and head.weight.requires_grad


def patch_gelu(model: GPT2LMHeadModel) -> None:
    """Computes `gelu_new` with one fused kernel, which takes 20 % off a training step of a small model on a CPU."""
    if model.config.activation_function == "gelu_new":
        for block in iterate_blocks(model):
            block.mlp.act = nn.GELU(approximate="tanh")
