"""The training forward pass of a stock GPT-2: attention without masks, fused GELU, a loss without a batch of logits.

The head runs on labelled positions only, a slice at a time (`sliced_head`), and the gradients are computed together
with the loss, so that the logits of a slice are formed once. Nothing is saved with the model: called without labels it
is the stock model, and its config does not change.
"""

import contextlib
import functools

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.modeling_outputs import CausalLMOutput

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

    The backward pass only scales them, so it needs no logits.
    """

    @staticmethod
    def forward(ctx, hidden, weight, labels, rows, row_ids, dtype, tied, is_training) -> Tensor:
        needs = needed_gradients(ctx) if is_training else (False, False, False)
        head = SlicedHead(weight, rows, row_ids, dtype, needs)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        hidden_gradient = torch.empty_like(hidden) if head.needs_hidden else None  # (N, D)
        start = 0
        for part, targets in head.split(hidden, labels):  # (n, D), (n,)
            loss, part_gradient = _slice_loss(head, part, targets)
            total += loss
            if part_gradient is not None:
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
    """A slice's summed loss and the gradient of its hidden states (n, D); its logits are freed on return."""
    loss, gradient = _cross_entropy(head.logits(hidden), labels)
    return loss, head.backward(hidden, gradient)


def _cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Summed loss of (n, V) logits and its gradient, written over the logits.

    `logsumexp` and `softmax` would each copy the logits and compute the exponentials twice.
    """
    label_logits = logits.gather(1, labels[:, None])
    largest = logits.amax(dim=-1, keepdim=True)
    sums = logits.sub_(largest).exp_().sum(dim=-1, keepdim=True)
    gradient = logits.div_(sums)  # softmax
    gradient.scatter_add_(1, labels[:, None], gradient.new_full((len(labels), 1), -1.0))
    return (sums.log() + largest - label_logits).sum(), gradient


class TiedLookup(torch.autograd.Function):
    """Embedding lookup whose gradient is added to the head's gradient of the same weight, in place."""

    @staticmethod
    def forward(ctx, weight: Tensor, ids: Tensor, tied: TiedGradient) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.tied = tied
        return nn.functional.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        (ids,) = ctx.saved_tensors
        # the head's backward ran before: its hidden states were computed from this lookup
        total, ctx.tied.gradient = ctx.tied.gradient, None
        ids, gradient = ids.flatten(), gradient.flatten(0, -2).to(total.dtype)
        # Each of the two adds in a fixed order on one kind of device and in a random order on the other. For Apple's
        # GPUs torch promises a fixed order of neither.
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
        weight: (V, D), the vocabulary head, tied to the embedding.
        labels: (B, T), not shifted; -100 at positions without a target.
        whole_rows: Every position has a target. Saves the search for them, for which a GPU has to be synchronized.
        tied: Receives the weight's gradient in place of the weight.
        trained_rows: Rows used in place of the weight's, the only ones that get a gradient.
    """
    labels = labels[:, 1:]
    is_target = slice(None) if whole_rows else labels != IGNORE_INDEX
    hidden = hidden[:, :-1][is_target].reshape(-1, hidden.size(-1))  # (B, T, D) -> (N, D)
    labels = labels[is_target].reshape(-1)  # (N,)
    return apply_head(HeadLoss, hidden, weight, labels, tied, trained_rows)


def patch_lm_head_loss(model: nn.Module, compiled: bool = False, whole_rows: bool = False) -> None:
    """Give a stock GPT-2 the loss above and attention without a mask.

    `model(labels=...)` then returns the loss without logits; without labels the model behaves as before. With
    `sequence_lengths`, rows are packed as by `rorchat.mixture.collators.collate_packed`.

    Args:
        compiled: Run everything but the head through torch.compile, for batches of one shape.
        whole_rows: No batch has a label of -100.
    """
    stock_forward = model.forward
    # separate from the model: the model that is saved, evaluated and generates text is not compiled
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

    model.forward = forward


def head_weight(model: nn.Module) -> tuple[Tensor, TrainedRows | None]:
    """The head's weight (V, D) and the rows of it that are trained on their own.

    To be called after the model's body: FSDP gathers a sharded weight during its forward pass.
    """
    trained_rows = find_trained_rows(model)
    weight = model.get_output_embeddings().weight if trained_rows is None else trained_rows.frozen
    return weight, trained_rows


def hidden_states(
    model: nn.Module,
    base: nn.Module,
    args: tuple,
    kwargs: dict,
    prefix_groups: list[PrefixGroup] | None,
    recompute: bool,
) -> tuple[Tensor, TiedGradient | None]:
    """The output of the last norm, (B, T, D), and for the head the gradient it shares with the lookup, if it does.

    Args:
        base: The model's body, possibly compiled; called with `args` and `kwargs`.
        prefix_groups: The groups of packed rows.
        recompute: Compute cheap outputs again in the backward pass.
    """
    has_only_ids = not args and kwargs.keys() == {"input_ids"}  # otherwise there may be a mask
    tied = TiedGradient() if (has_only_ids or prefix_groups) and is_lookup_plain(model) else None
    trained_rows, embedded = find_trained_rows(model), None
    if tied is not None:
        embedded = TiedLookup.apply(model.get_input_embeddings().weight, kwargs["input_ids"], tied)
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
    """The sequences of packed rows of `width` tokens, lengths (B, S); the padding of a row is one more group."""
    groups = []
    for lengths in sequence_lengths.tolist():
        groups += [(length,) for length in (*lengths, width - sum(lengths)) if length]
    return groups


def is_lookup_plain(model: nn.Module) -> bool:
    """Whether the token embedding is the head's weight, trained, not sharded, and its module only looks up rows."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if type(embedding) is not nn.Embedding or "forward" in vars(embedding):  # accelerate replaces `forward`
        return False
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(embedding, name) for name in hooks):
        return False
    if embedding.padding_idx is not None or embedding.max_norm is not None or embedding.scale_grad_by_freq:
        return False
    is_tied = embedding.weight is head.weight and type(head.weight) is nn.Parameter  # shards are DTensors
    return torch.is_grad_enabled() and is_tied and head.weight.requires_grad


def patch_gelu(model: nn.Module) -> None:
    """Compute `gelu_new` by one kernel: the same function, a fifth off a step of a small model on a CPU."""
    if model.config.activation_function == "gelu_new":
        for block in model.transformer.h:
            block.mlp.act = nn.GELU(approximate="tanh")
