"""A stock GPT-2's forward pass in training: attention without masks, a fused GELU, a loss without a batch's logits.

The vocabulary head is a third of the work of a small model, and its float32 logits most of the memory: 16 rows of 1,024
tokens over 50,304 words are 3.3 GB, and Transformers holds them three times. Here the head runs on labelled positions
only, a slice at a time, and the gradients are formed with the loss, so that a slice's logits live once.

Nothing of this is saved: a model called without labels is the stock one, and so is its config.
"""

import contextlib
import functools
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.modeling_outputs import CausalLMOutput

from rorchat.chatml import IGNORE_INDEX
from rorchat.training.kernels.attention import (
    PrefixGroup,
    causal_attention,
    keep_packed,
    needs_no_mask,
    packed_attention,
)
from rorchat.training.kernels.recompute import WORTHWHILE, cheap_outputs_computed_again

LOGITS_AT_ONCE = 2**25  # numbers, 134 MB in float32: slices are as large as that allows


class _HeadLoss(torch.autograd.Function):
    """Summed cross-entropy of `hidden @ weight.T`, with both gradients formed in the forward pass.

    Products are taken in `compute_dtype`, the loss and the sums over slices in float32. With a `TiedGradient` the
    weight's gradient is left there for the lookup to complete.

    Args:
        trains: what `torch.is_grad_enabled()` says outside: in here it is always off.
        rows: (K, D) what stands in for the rows `row_ids` of the weight, of which they alone learn.
    """

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        compute_dtype: torch.dtype,
        trains: bool,
        tied,
        rows: Tensor | None = None,
        row_ids: Tensor | None = None,
    ) -> Tensor:
        for_hidden, for_weight = (trains and needed for needed in ctx.needs_input_grad[:2])
        hidden_gradient = torch.empty_like(hidden) if for_hidden else None
        weight_gradient = torch.zeros_like(weight, dtype=torch.float32) if for_weight else None
        rows_gradient = torch.zeros_like(rows, dtype=torch.float32) if trains and ctx.needs_input_grad[6] else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        head = weight.to(compute_dtype)
        own = None if rows is None else rows.to(compute_dtype)
        at_once = max(1, LOGITS_AT_ONCE // weight.size(0))
        for start in range(0, len(hidden), at_once):
            part = hidden[start : start + at_once].to(compute_dtype)
            loss, gradient = _cross_entropy(logits_of(part, head, own, row_ids), labels[start : start + at_once])
            total += loss
            gradient = gradient.to(compute_dtype)
            if own is not None:
                of_own = gradient[:, row_ids]
                gradient.index_fill_(1, row_ids, 0)
            if for_hidden:
                hidden_gradient[start : start + at_once] = gradient @ head
                if own is not None:
                    hidden_gradient[start : start + at_once] += of_own @ own
            if for_weight and compute_dtype == torch.float32:
                weight_gradient.addmm_(gradient.T, part)
            elif for_weight:
                weight_gradient += gradient.T @ part
            if rows_gradient is not None:
                rows_gradient += of_own.T @ part
            del gradient  # else it lives until the next slice has been made
        ctx.gradients, ctx.tied = (hidden_gradient, weight_gradient, rows_gradient), tied
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, scale: Tensor):
        if ctx.gradients is None:
            raise RuntimeError("The gradients of this loss are scaled in place: it can go backward only once.")
        (hidden_gradient, weight_gradient, rows_gradient), ctx.gradients = ctx.gradients, None
        for gradient in (hidden_gradient, weight_gradient, rows_gradient):
            if gradient is not None:
                gradient.mul_(scale)
        if ctx.tied is not None:
            ctx.tied.gradient, weight_gradient = weight_gradient, None
        return hidden_gradient, weight_gradient, None, None, None, None, rows_gradient, None


def logits_of(hidden: Tensor, head: Tensor, own: Tensor | None, row_ids: Tensor | None) -> Tensor:
    """(N, V) in float32, of (N, D) hidden states and a head (V, D) that has other rows at some ids."""
    logits = hidden @ head.T
    if own is not None:
        logits.index_copy_(1, row_ids, hidden @ own.T)
    return logits.float()


def _cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The summed loss of (N, V) logits and its gradient, which takes their place.

    `logsumexp` and `softmax` would each hold a copy of the logits, and take the exponential twice.
    """
    asked = logits.gather(1, labels[:, None])
    largest = logits.amax(dim=-1, keepdim=True)
    sums = logits.sub_(largest).exp_().sum(dim=-1, keepdim=True)
    gradient = logits.div_(sums)  # the softmax
    gradient.scatter_add_(1, labels[:, None], gradient.new_full((len(labels), 1), -1.0))
    return (sums.log() + largest - asked).sum(), gradient


class TiedGradient:
    """The head's part of the gradient of a weight that the token embedding shares, until the embedding adds its own."""

    gradient: Tensor | None = None


class _Lookup(torch.autograd.Function):
    """The embedding of tokens whose gradient is added to the head's in place.

    torch gives each of the two a gradient of the whole vocabulary, 154 MB at 124M, and adds them up.
    """

    @staticmethod
    def forward(ctx, weight: Tensor, ids: Tensor, tied: TiedGradient) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.tied = tied
        return nn.functional.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        (ids,) = ctx.saved_tensors
        # the hidden states come from this lookup, so that the head has gone backward before
        total, ctx.tied.gradient = ctx.tied.gradient, None
        ids, gradient = ids.flatten(), gradient.flatten(0, -2).to(total.dtype)
        # In a fixed order, so that a run can be repeated: on CPU and CUDA each of these adds at random on the other.
        # For Apple's GPUs torch promises it of neither.
        if total.is_cuda:
            return total.index_put_((ids,), gradient, accumulate=True), None, None
        return total.index_add_(0, ids, gradient), None, None


class LearnedRows(NamedTuple):
    """The rows (K, D) of the tied embedding that learn, their ids (K,), and the frozen weight (V, D) of the others.

    PEFT copies the weight to look up in it, and forms a gradient of all of it to take these rows' from.
    """

    rows: Tensor
    ids: Tensor
    frozen: Tensor

    def look_up(self, ids: Tensor) -> Tensor:
        """The embedding (B, T, D) of ids (B, T)."""
        is_row = ids[..., None] == self.ids  # (B, T, K)
        own = is_row.to(self.rows.dtype) @ self.rows
        return torch.where(is_row.any(-1, keepdim=True), own, nn.functional.embedding(ids, self.frozen))


def learned_rows(model: nn.Module) -> LearnedRows | None:
    """Of a model in which PEFT trains rows of the tied embedding; None of any other."""
    adapter = getattr(model.get_input_embeddings(), "token_adapter", None)
    if adapter is None:
        return None
    (name,) = adapter.active_adapters
    rows = adapter.trainable_tokens_delta[name]
    ids = torch.tensor(adapter.token_indices[name], device=rows.device)
    return LearnedRows(rows, ids, adapter.get_base_layer().weight)


def head_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    whole_rows: bool = False,
    tied: TiedGradient | None = None,
    learned: LearnedRows | None = None,
) -> Tensor:
    """The sum of -log p(label) over labelled positions, in nats, float32.

    Args:
        hidden: (B, T, D), the model's last hidden states.
        weight: (V, D), the vocabulary head, tied to the embedding.
        labels: (B, T), not yet shifted; -100 where nothing is asked.
        whole_rows: every position has a label, which saves looking for them: a GPU waits for that.
        tied: takes the weight's gradient, in place of the weight.
        learned: rows that stand in for the weight's, and get a gradient where no other does.
    """
    labels = labels[:, 1:]
    asked = slice(None) if whole_rows else labels != IGNORE_INDEX
    hidden = hidden[:, :-1][asked].reshape(-1, hidden.size(-1))  # (B, T, D) -> (N, D)
    labels = labels[asked].reshape(-1)
    device = hidden.device.type
    # Autocast does not reach into a custom function, and the last norm leaves float32
    mixed = torch.is_autocast_enabled(device)
    compute_dtype = torch.get_autocast_dtype(device) if mixed else hidden.dtype
    with torch.autocast(device, enabled=False):
        return _HeadLoss.apply(
            hidden,
            weight,
            labels,
            compute_dtype,
            torch.is_grad_enabled(),
            tied,
            *(learned[:2] if learned else (None, None)),
        )


def patch_lm_head_loss(model: nn.Module, compiled: bool = False, whole_rows: bool = False) -> None:
    """Gives a stock GPT-2 the loss above and attention without a mask, for training only.

    `model(labels=...)` then returns the loss without logits; without labels the model is as before. With
    `sequence_lengths` as well, rows are packed, as `rorchat.mixture.collators.collate_packed` has them.

    Args:
        compiled: run all but the head through torch.compile, for batches of one shape.
        whole_rows: no label of any batch is -100.
    """
    stock_forward = model.forward
    # kept apart from the model: what is saved, generates and evaluates is not compiled
    base = torch.compile(model.base_model, dynamic=False) if compiled else model.base_model

    if not compiled:
        keep_packed(model)

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
        trees = None if sequence_lengths is None else _trees(sequence_lengths, labels.size(1))
        recompute = not compiled and labels.numel() * model.config.n_embd >= WORTHWHILE
        hidden, tied = hidden_states(model, base, args, kwargs, trees, recompute)
        learned = learned_rows(model)
        # asked for behind the model: where its weights are in shards, they are whole from now on
        weight = model.get_output_embeddings().weight if learned is None else learned.frozen
        loss = head_loss(hidden, weight, labels, whole_rows, tied, learned)
        items = (labels[:, 1:] != IGNORE_INDEX).sum() if num_items_in_batch is None else num_items_in_batch
        return CausalLMOutput(loss=loss / items)

    model.forward = forward
    needs_no_mask(model)


def hidden_states(
    model: nn.Module, base: nn.Module, args: tuple, kwargs: dict, trees: list[PrefixGroup] | None, recompute: bool
) -> tuple[Tensor, TiedGradient | None]:
    """What stands behind the last norm, (B, T, D), and for the head where its gradient is shared with the lookup's.

    Args:
        base: the model's body, perhaps compiled; called with `args` and `kwargs`.
        trees: of packed rows.
        recompute: cheap outputs are computed again in the backward pass.
    """
    rows_are_whole = not args and kwargs.keys() == {"input_ids"}  # else there may be a mask
    tied = TiedGradient() if (rows_are_whole or trees) and _lookup_is_plain(model) else None
    learned, embedded = learned_rows(model), None
    if tied is not None:
        embedded = _Lookup.apply(model.get_input_embeddings().weight, kwargs["input_ids"], tied)
    elif learned is not None and "input_ids" in kwargs:
        embedded = learned.look_up(kwargs["input_ids"])
    if embedded is not None:
        kwargs = {name: value for name, value in kwargs.items() if name != "input_ids"} | {"inputs_embeds": embedded}
    with contextlib.ExitStack() as contexts:
        if trees:
            kwargs = kwargs | {"trees": trees}
            contexts.enter_context(packed_attention(model.config))
        elif rows_are_whole:
            contexts.enter_context(causal_attention(model.config))
        if recompute:
            contexts.enter_context(cheap_outputs_computed_again(model))
        return base(*args, **kwargs, use_cache=False).last_hidden_state, tied


def _trees(sequence_lengths: Tensor, width: int) -> list[PrefixGroup]:
    """The sequences of (B, S) lengths in rows of so many tokens; what is left of a row is one more."""
    trees = []
    for row in sequence_lengths.tolist():
        empty = width - sum(row)
        trees += [(length,) for length in (*row, empty) if length]
    return trees


def _lookup_is_plain(model: nn.Module) -> bool:
    """Whether the token embedding is the head's weight, trained, whole, and its module does nothing but look up."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if type(embedding) is not nn.Embedding or "forward" in vars(embedding):  # accelerate puts its own there
        return False
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(embedding, name) for name in hooks):
        return False
    if embedding.padding_idx is not None or embedding.max_norm is not None or embedding.scale_grad_by_freq:
        return False
    is_one = embedding.weight is head.weight and type(head.weight) is nn.Parameter  # shards are DTensors
    return torch.is_grad_enabled() and is_one and head.weight.requires_grad


def patch_gelu(model: nn.Module) -> None:
    """One kernel for `gelu_new`, the same function: a fifth off a step of a small model on a CPU. Nothing is saved."""
    if model.config.activation_function == "gelu_new":
        for block in model.transformer.h:
            block.mlp.act = nn.GELU(approximate="tanh")
