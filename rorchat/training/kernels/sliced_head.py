"""The vocabulary head of a stock GPT-2, applied to a slice of the hidden states at a time.

The head is a third of the FLOPs of a small model, and its float32 logits are most of the memory: 3.3 GB for 16 rows of
1,024 tokens and a vocabulary of 50,304, of which Transformers keeps three copies. Here only the logits of one slice
exist at any time. `lm_head_loss` and `dpo_logps` build their autograd functions on `SlicedHead`.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

MAX_LOGITS = 2**25  # maximum number of logits in a slice: 134 MB in float32


class TiedGradient:
    """Passes the head's gradient of a tied weight to the embedding lookup, which adds its gradient in place.

    Without it, PyTorch allocates a gradient of the whole weight for each of the two, 154 MB at 124M, and adds them.
    """

    gradient: Tensor | None = None


class TrainedRows(NamedTuple):
    """Trainable rows of an otherwise frozen embedding or head, as with PEFT's `trainable_token_indices`.

    PEFT copies the weight in every lookup and computes the gradient of the whole weight. Here only the trained rows get
    a gradient.
    """

    rows: Tensor  # (K, D), trained
    ids: Tensor  # (K,), their token ids
    frozen: Tensor  # (V, D), the weight with all other rows

    def look_up(self, ids: Tensor) -> Tensor:
        """Embeddings (B, T, D) of `ids` (B, T)."""
        is_row = ids[..., None] == self.ids  # (B, T, K)
        embedded = is_row.to(self.rows.dtype) @ self.rows  # (B, T, K) -> (B, T, D)
        return torch.where(is_row.any(-1, keepdim=True), embedded, nn.functional.embedding(ids, self.frozen))


def find_trained_rows(module: nn.Module) -> TrainedRows | None:
    """The rows of the embedding or the head that PEFT trains, None if there are none. Tied ones have the same rows."""
    adapter = getattr(module, "token_adapter", None)
    if adapter is None:
        return None
    (name,) = adapter.active_adapters
    rows = adapter.trainable_tokens_delta[name]
    ids = torch.tensor(adapter.token_indices[name], device=rows.device)
    return TrainedRows(rows, ids, adapter.get_base_layer().weight)


class SlicedHead:
    """`hidden @ weight.T` for slices of `hidden`, and the sums of its gradients over the slices.

    Matrix products are computed in `dtype`; logits, losses and sums over slices are float32.

    Args:
        weight: (V, D), float32 or the model's dtype.
        rows: (K, D) or None, used in place of the rows `row_ids` (K,) of the weight.
        needs: Whether gradients of the hidden states, the weight and the rows are needed.
    """

    def __init__(
        self,
        weight: Tensor,
        rows: Tensor | None,
        row_ids: Tensor | None,
        dtype: torch.dtype,
        needs: tuple[bool, bool, bool] = (False, False, False),
    ):
        self.weight, self.row_ids, self.dtype = weight.to(dtype), row_ids, dtype
        self.rows = None if rows is None else rows.to(dtype)
        self.needs_hidden = needs[0]
        self.weight_gradient = torch.zeros_like(weight, dtype=torch.float32) if needs[1] else None  # (V, D)
        self.rows_gradient: Tensor | None = None  # (K, D)
        if rows is not None and needs[2]:
            self.rows_gradient = torch.zeros_like(rows, dtype=torch.float32)

    def split(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Splits tensors (N, ...) along N into slices whose logits are at most MAX_LOGITS numbers."""
        size = max(1, MAX_LOGITS // self.weight.size(0))
        return zip(*(tensor.split(size) for tensor in tensors), strict=True)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits in float32: (n, D) -> (n, V)."""
        hidden = hidden.to(self.dtype)
        logits = hidden @ self.weight.T
        if self.rows is not None and self.row_ids is not None:
            logits.index_copy_(1, self.row_ids, hidden @ self.rows.T)
        return logits.float()

    def backward(self, hidden: Tensor, gradient: Tensor) -> Tensor | None:
        """Adds a slice's part to the gradients of weight and rows, and returns the gradient of its hidden states.

        Args:
            hidden: (n, D), as passed to `logits`.
            gradient: (n, V), the gradient of the slice's logits; overwritten.

        Returns:
            (n, D) in the dtype of `hidden`, None if it is not needed.
        """
        slice_dtype, hidden, gradient = hidden.dtype, hidden.to(self.dtype), gradient.to(self.dtype)
        if self.row_ids is not None:
            rows_logits_gradient = gradient[:, self.row_ids]  # (n, K)
            gradient.index_fill_(1, self.row_ids, 0)  # these rows of the weight were not used
        if self.weight_gradient is not None and self.dtype == torch.float32:
            self.weight_gradient.addmm_(gradient.T, hidden)
        elif self.weight_gradient is not None:
            self.weight_gradient += gradient.T @ hidden
        if self.rows_gradient is not None:
            self.rows_gradient += rows_logits_gradient.T @ hidden
        if not self.needs_hidden:
            return None
        hidden_gradient = (gradient @ self.weight).to(slice_dtype)
        if self.rows is not None:
            hidden_gradient += rows_logits_gradient @ self.rows
        return hidden_gradient


def hand_over(tied: TiedGradient | None, weight_gradient: Tensor | None) -> Tensor | None:
    """Pass the weight's gradient to the embedding lookup if the two are tied, otherwise return it."""
    if tied is None:
        return weight_gradient
    tied.gradient = weight_gradient
    return None


def apply_head(
    function: type[torch.autograd.Function],
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    tied: TiedGradient | None,
    trained_rows: TrainedRows | None,
) -> Any:
    """Applies an autograd function of the head in the dtype of autocast.

    Autocast does not apply inside custom functions, and the last norm returns float32 under autocast.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    rows, row_ids = trained_rows[:2] if trained_rows else (None, None)
    with torch.autocast(device, enabled=False):
        # grad mode is always off inside a custom function, so it is passed as an argument
        return function.apply(hidden, weight, targets, rows, row_ids, dtype, tied, torch.is_grad_enabled())


def needed_gradients(ctx: FunctionCtx) -> tuple[bool, bool, bool]:
    """Whether hidden states, weight and trained rows need gradients; depends on the argument order in `apply_head`."""
    hidden, weight, _, rows, *_ = ctx.needs_input_grad  # type: ignore[attr-defined]  # set by torch in C++
    return hidden, weight, rows


def as_input_gradients(hidden: Tensor | None, weight: Tensor | None, rows: Tensor | None) -> tuple[Tensor | None, ...]:
    """The return value of `backward`: gradients in the argument order of `apply_head`."""
    return hidden, weight, None, rows, None, None, None, None
