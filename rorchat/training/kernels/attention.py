"""Attention without a mask in a stock GPT-2, for unpadded rows and for packed rows.

In a packed row, position ids restart with every sequence. The stock implementation then builds a dense (T, T) mask for
each row. Here the causal kernel is called for each packed sequence separately or, on GPUs that support it, a
variable-length kernel is called once for all sequences.

A packed row consists of *prefix groups*. A prefix group is a prefix and its continuations: every continuation attends
to the prefix and to itself, but not to the other continuations. For example, two replies to the same prompt share the
computation of the prompt. A plain sequence is a prefix group without continuations.

Shapes: batch B, heads H, positions T, head size D; N = B x T tokens in total.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, GPT2LMHeadModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rorchat.adapter import iterate_blocks

#: Names of the kernels that `scaled_dot_product_attention` chooses from, by torch's numbers (SDPBackend).
SDPA_KERNELS = {0: "math", 1: "flash", 2: "memory-efficient", 3: "cuDNN"}
CAUSAL_ATTENTION, PACKED_ATTENTION = "causal_sdpa", "packed_sdpa"  # Transformers builds no mask for these names

PrefixGroup = tuple[int, ...]  # (tokens of the prefix, tokens of each continuation...)


def packed_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    prefix_groups: Sequence[PrefixGroup],
    dropout: float = 0.0,
    scaling: float | None = None,
    **_,
) -> tuple[Tensor, None]:
    """Causal attention within each prefix group.

    Args:
        query, key, value: (B, H, T, D).
        prefix_groups: The prefix groups of all rows, in row-major order; N tokens in total.

    Returns:
        The output (B, T, H, D), and None for the attention weights.
    """
    batch, heads, length, width = query.shape
    # (B, H, T, D) -> (N, H, D), N = B x T
    query, key, value = (x.transpose(1, 2).reshape(batch * length, heads, width) for x in (query, key, value))
    if has_varlen_kernel(query.device, query.dtype) and not dropout:
        output = attend_by_varlen_kernel(query, key, value, prefix_groups, scaling)
    else:
        output = attend_by_sequence(query, key, value, prefix_groups, dropout, scaling)
    return output.view(batch, length, heads, width), None


def has_varlen_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether packed rows are computed by the variable-length kernel."""
    return device.type == "cuda" and dtype != torch.float32 and torch.cuda.get_device_capability(device) >= (8, 0)


def describe_attention(device: torch.device, dtype: torch.dtype, row_layout: str) -> str:
    """The attention kernel of a stage, in words.

    Args:
        row_layout: "full" rows, "packed" rows, or rows that are "padded" on the left and need a mask.
    """
    if row_layout == "packed" and has_varlen_kernel(device, dtype):
        return "flash attention of variable length"
    if device.type not in ("cpu", "cuda"):
        return "SDPA"
    query = torch.zeros(1, 1, 16, 64, device=device, dtype=dtype)  # (B, H, T, D)
    mask = torch.ones(1, 1, 16, 16, device=device, dtype=torch.bool) if row_layout == "padded" else None
    choice = torch._fused_sdp_choice(query, query, query, mask, is_causal=mask is None)
    return f"SDPA ({SDPA_KERNELS.get(choice, 'unknown kernel')}{', by sequence' if row_layout == 'packed' else ''})"


def attend_by_sequence(
    query: Tensor, key: Tensor, value: Tensor, prefix_groups: Sequence[PrefixGroup], dropout: float, scaling
) -> Tensor:
    """Call the causal kernel for each pair of a prefix and a continuation: (N, H, D) each -> (N, H, D)."""
    sizes = [size for group in prefix_groups for size in group]
    # split instead of slicing: the gradient of a slice is as large as the tensor it was taken from
    parts = iter(zip(*(x.split(sizes) for x in (query, key, value)), strict=True))

    def attend(*qkv: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in qkv)  # (L, H, D) -> (1, H, L, D)
        output = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling, is_causal=True)
        return output[0].transpose(0, 1)

    outputs = []
    for prefix_size, *continuations in prefix_groups:
        prefix = next(parts)
        if not continuations:
            outputs.append(attend(*prefix))
        for number, _ in enumerate(continuations):
            output = attend(*(torch.cat(both) for both in zip(prefix, next(parts), strict=True)))
            outputs.append(output[prefix_size if number else 0 :])  # the output of the prefix is kept once
    return torch.cat(outputs)


def attend_by_varlen_kernel(
    query: Tensor, key: Tensor, value: Tensor, prefix_groups: Sequence[PrefixGroup], scaling
) -> Tensor:
    """Call the variable-length kernel once for all sequences: (N, H, D) each -> (N, H, D)."""
    index, (query_bounds, key_bounds), (most_queries, most_keys) = _varlen_layout(tuple(prefix_groups), query.device)
    if index is not None:
        key, value = key[index], value[index]  # (K, H, D), K >= N
    # the causal window is aligned to the last key, so a continuation attends to its whole prefix
    return varlen_attn(  # type: ignore[return-value]  # a tuple only with `return_aux`
        query, key, value, query_bounds, key_bounds, most_queries, most_keys, scale=scaling, window_size=(-1, 0)
    )


@functools.lru_cache(maxsize=1)  # all blocks use the same layout for a micro-batch
def _varlen_layout(
    prefix_groups: tuple[PrefixGroup, ...], device: torch.device
) -> tuple[Tensor | None, list[Tensor], list[int]]:
    """Computes the arguments of the variable-length kernel.

    The kernel expects concatenated sequences of queries and of keys. The first continuation forms one sequence with its
    prefix. Each further continuation is a separate sequence of queries; its keys are those of the prefix, which are
    gathered again, and those of the continuation.

    Returns:
        - the positions of the keys to gather, (K,), or None if all keys are already in place
        - the cumulative lengths of the query sequences and of the key sequences, (sequences + 1,) each
        - the lengths of the longest query sequence and of the longest key sequence
    """
    key_positions: list[Sequence[int]] = []
    query_lengths = []
    start = 0
    for prefix, *continuations in prefix_groups:
        length = prefix + sum(continuations[:1])
        key_positions.append(range(start, start + length))
        query_lengths.append(length)
        end = start + length
        for continuation in continuations[1:]:
            key_positions.append((*range(start, start + prefix), *range(end, end + continuation)))
            query_lengths.append(continuation)
            end += continuation
        start = end
    key_lengths = [len(positions) for positions in key_positions]
    bounds = [
        torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32).to(device) for lengths in (query_lengths, key_lengths)
    ]
    index = None
    if key_lengths != query_lengths:
        index = torch.tensor([position for positions in key_positions for position in positions]).to(device)
    return index, bounds, [max(query_lengths), max(key_lengths)]


AttentionInterface.register(CAUSAL_ATTENTION, sdpa_attention_forward)
AttentionInterface.register(PACKED_ATTENTION, packed_attention_forward)


@contextlib.contextmanager
def _attention_implementation(config, name: str) -> Iterator[None]:
    stock, config._attn_implementation = config._attn_implementation, name
    try:
        yield
    finally:
        config._attn_implementation = stock


def causal_attention(config) -> contextlib.AbstractContextManager:
    """A context manager for causal attention without a mask, for rows that are neither left-padded nor packed."""
    return _attention_implementation(config, CAUSAL_ATTENTION)


def packed_attention(config) -> contextlib.AbstractContextManager:
    """A context manager for packed rows. Within it, call the model with the `prefix_groups` of the rows."""
    return _attention_implementation(config, PACKED_ATTENTION)


def patch_packed_attention(model: GPT2LMHeadModel) -> None:
    """Makes every block of a stock GPT-2 use packed attention when it is called with `prefix_groups`.

    The context manager alone is not enough: gradient checkpointing calls blocks again in the backward pass, after the
    context has ended.
    """
    for block in iterate_blocks(model):
        attention = block.attn
        if "forward" not in vars(attention):  # set on the instance, where it overrides the method of the class
            vars(attention)["forward"] = functools.partial(_forward_with_groups, attention, attention.forward)


def _forward_with_groups(attention: nn.Module, stock_forward, *args, **kwargs):
    if "prefix_groups" not in kwargs:
        return stock_forward(*args, **kwargs)
    with packed_attention(attention.config):
        return stock_forward(*args, **kwargs)


def skip_padding_warning(model: GPT2LMHeadModel) -> None:
    """Disable a check of Transformers that searches every batch for padding and then recommends an attention mask.

    The mask is not needed: batches are padded on the right (rorchat/mixture/collators.py), and in a causal model no
    token attends to the padding after it.
    """
    vars(model.transformer)["warn_if_padding_and_no_attention_mask"] = lambda *_: None
