"""Packed attention: one call per sequence and the variable-length kernel agree, and continuations share a prefix."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from rorchat.training.kernels import attention
from rorchat.training.kernels.attention import packed_attention_forward

GROUPS = [(7,), (12, 5, 9), (1,), (20, 3, 30)]


def varlen_reference(query, key, value, query_bounds, key_bounds, *_, scale, window_size):
    """What the variable-length kernel is documented to compute, with an explicit mask."""
    parts, bounds = [], zip(query_bounds.tolist(), key_bounds.tolist(), strict=True)
    for (start, key_start), (end, key_end) in itertools.pairwise(bounds):
        rows, columns = end - start, key_end - key_start
        mask = torch.ones(rows, columns, dtype=torch.bool).tril(columns - rows)
        qkv = (query[start:end], key[key_start:key_end], value[key_start:key_end])
        part = F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in qkv), attn_mask=mask, scale=scale)
        parts.append(part.transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize("groups", [[(7,), (1,), (20,)], GROUPS])
def test_varlen_kernel_gets_the_keys_of_each_query(groups, monkeypatch):
    monkeypatch.setattr(attention, "varlen_attn", varlen_reference)
    qkv = torch.randn(3, sum(map(sum, groups)), 2, 8, generator=torch.Generator().manual_seed(0))
    expected = attention.attend_by_sequence(*qkv, groups, 0.0, None)
    assert torch.allclose(attention.attend_by_varlen_kernel(*qkv, groups, None), expected, atol=1e-6)


@pytest.mark.parametrize("continuation", [0, 1])
def test_continuation_attends_to_its_prefix_and_itself(continuation):
    """Equal to the causal attention of prefix and continuation as one sequence."""
    prefix, *sizes = (12, 5, 9)
    qkv = torch.randn(3, 26, 2, 8, generator=torch.Generator().manual_seed(0))
    packed = attention.attend_by_sequence(*qkv, [(prefix, *sizes)], 0.0, None)
    start = prefix + sum(sizes[:continuation])
    rows = slice(start, start + sizes[continuation])
    sequence = torch.cat([qkv[:, :prefix], qkv[:, rows]], dim=1)
    expected = attention.attend_by_sequence(*sequence, [(sequence.size(1),)], 0.0, None)
    assert torch.allclose(packed[rows], expected[prefix:], atol=1e-6)
    assert torch.allclose(packed[:prefix], expected[:prefix], atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the variable-length kernel needs a GPU")
def test_varlen_kernel_on_a_gpu_equals_one_call_per_sequence():
    torch.manual_seed(0)
    count = sum(map(sum, GROUPS))
    qkv = [torch.randn(1, count, 2, 64, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(3)]
    by_kernel, _ = packed_attention_forward(None, *qkv, None, prefix_groups=GROUPS)
    flat = [x.float()[0].transpose(0, 1) for x in qkv]
    by_sequence = attention.attend_by_sequence(*flat, GROUPS, 0.0, None)
    assert torch.allclose(by_kernel[0].float(), by_sequence, atol=2e-2)
