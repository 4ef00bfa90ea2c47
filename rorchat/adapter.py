"""Reads, loads and merges LoRA adapters, and checks that an adapter belongs to its base model.

An adapter folder contains PEFT's files, `adapter_config.json` and `adapter_model.safetensors`, and rorchat's
`base.json`, which has the sha256 of the base model and whether it was loaded in 4 bits. Adapters made by PEFT alone
have no `base.json`; the weights of their base model are not checked.
"""

import hashlib
import json
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from rorchat.errors import DataError, MismatchError, shorten_error
from rorchat.files import file_sha256

if TYPE_CHECKING:
    from peft import LoraConfig, PeftConfig, PeftModel
    from torch import Tensor, nn
    from transformers import GPT2LMHeadModel
    from transformers.models.gpt2.modeling_gpt2 import GPT2Block
    from transformers.pytorch_utils import Conv1D

ADAPTER_CONFIG, ADAPTER_WEIGHTS, ADAPTER_BASE = "adapter_config.json", "adapter_model.safetensors", "base.json"
EMBEDDING, HEAD = "wte", "lm_head"  # names of the modules with a row for each token
PROBE_TOKENS = 32  # of the forward passes that compare a merged model with PEFT's
MERGE_TOLERANCE = 1e-4  # of logits, relative to the largest; rounding in float32 is below 1e-5


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter on disk, after `read_adapter` has checked its base model."""

    folder: Path
    config: "LoraConfig"
    base: str  # folder or Hub id of the base model
    load_in_4bit: bool  # whether the base was loaded in 4 bits during training


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder contains an adapter instead of a complete model."""
    return (Path(folder) / ADAPTER_CONFIG).is_file()


def read_adapter(folder: Path) -> AdapterFolder:
    """Reads the configuration of an adapter and checks its base model.

    Raises:
        DataError: the folder has no LoRA adapter, or the base model is not named or does not exist.
        MismatchError: the weights of the base model differ from those that the adapter was trained with.
    """
    from peft import LoraConfig, PeftConfig

    record_file = folder / ADAPTER_BASE
    try:
        config = PeftConfig.from_pretrained(str(folder))
        record = {**json.loads(record_file.read_text(encoding="utf-8"))} if record_file.is_file() else {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"The adapter {folder} cannot be read: {shorten_error(error)}") from None
    if not isinstance(config, LoraConfig):
        raise DataError(f"{folder} is an adapter of type {config.peft_type.value}: only LORA is supported.")
    base = config.base_model_name_or_path
    correction = f"correct base_model_name_or_path in {folder / ADAPTER_CONFIG}"
    if not base:
        raise DataError(f"The adapter {folder} does not name its base model: {correction}.")
    if Path(base).is_absolute() and not Path(base).is_dir():
        raise DataError(f"The base model of the adapter {folder}, {base}, does not exist: restore it, or {correction}.")
    if is_adapter(base):
        raise DataError(f"The base model of the adapter {folder}, {base}, is an adapter itself: merge that one first.")
    if record.get("sha256") and weights_sha256(base) not in (record["sha256"], None):
        raise MismatchError(
            f"The adapter {folder} was trained with another model than {base}: the sha256 differs. Restore that "
            f"model, or {correction}."
        )
    return AdapterFolder(folder, config, base, bool(record.get("load_in_4bit")))


def find_base(folder: str | Path) -> str | None:
    """The folder or Hub id of the base model that an adapter names; None for a complete model."""
    try:
        config = json.loads((Path(folder) / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        return config.get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        return None


def merge_adapter(model: "GPT2LMHeadModel", adapter: AdapterFolder) -> "GPT2LMHeadModel":
    """Merges an adapter into its base model. The result predicts what PEFT's layers predict.

    Embedding and head are separate matrices afterwards if the adapter changes only one of them, or each in its own way.

    Raises:
        DataError: the weights of the adapter cannot be read.
        MismatchError: the adapter belongs to another base model, or cannot be merged into a stock GPT-2.
    """
    rows = model.transformer.wte.num_embeddings
    largest = max((row for rows in trained_rows(adapter.config).values() for row in rows), default=0)
    if largest >= rows:
        raise MismatchError(
            f"The adapter {adapter.folder} has an embedding row for token {largest:,}, but {adapter.base!r} has only "
            f"{rows:,} rows: the adapter belongs to another base model."
        )
    if adapter.load_in_4bit:
        for _, _, matrix in block_matrices(model):
            matrix.weight.data = round_to_4_bits(matrix.weight.data).contiguous()
    adapter.config.fan_in_fan_out = True  # stock weights are (in, out); the 4-bit weights of training are (out, in)
    try:
        with warnings.catch_warnings():  # about tied weights, which `_merge_with_peft` unties
            warnings.simplefilter("ignore")
            merged, expected = _merge_with_peft(model, adapter)
    except (ValueError, TypeError, NotImplementedError, AttributeError, KeyError, RuntimeError) as error:
        raise MismatchError(
            f"PEFT cannot merge the adapter {adapter.folder} into {adapter.base!r}: {shorten_error(error)}. Merge it "
            "with the program that trained it, and give the merged model."
        ) from None
    _require_equal_predictions(merged, expected, adapter)
    return merged.requires_grad_(True)  # PEFT has frozen the base


def _merge_with_peft(model: "GPT2LMHeadModel", adapter: AdapterFolder) -> "tuple[GPT2LMHeadModel, Tensor]":
    """The merged model, and the logits of `_probe` before the adapter was merged."""
    import torch
    from peft import get_peft_model

    head, was_tied = model.lm_head, is_tied(model)
    adapted = get_peft_model(model, adapter.config)
    # one matrix for both would get what the adapter adds to either of them
    head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    load_adapter(adapted, adapter.folder)
    expected = _probe(adapted.eval())
    merged = cast("GPT2LMHeadModel", adapted.merge_and_unload())
    if was_tied and torch.equal(merged.lm_head.weight, merged.transformer.wte.weight):
        merged.lm_head.weight = merged.transformer.wte.weight
    merged.config.tie_word_embeddings = is_tied(merged)
    return merged, expected


def _probe(model: "nn.Module") -> "Tensor":
    """The logits of a fixed row of tokens."""
    import torch

    config = cast("GPT2LMHeadModel", model).config
    ids = torch.linspace(0, config.vocab_size - 1, min(PROBE_TOKENS, config.n_positions)).long()[None]
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def _require_equal_predictions(merged: "GPT2LMHeadModel", expected: "Tensor", adapter: AdapterFolder) -> None:
    """Raises MismatchError if merging has changed the model, as for adapters that are active only in some positions."""
    difference = (_probe(merged) - expected).abs().max()
    if difference > MERGE_TOLERANCE * expected.abs().max():  # NaN is reported when the merged model is checked
        raise MismatchError(
            f"The adapter {adapter.folder} cannot be merged into a stock GPT-2: its predictions would change by up to "
            f"{difference:.2g}. Give a merged model."
        )


def load_adapter(adapted: "PeftModel", folder: Path) -> None:
    """Loads the weights of an adapter into a PEFT model. PEFT alone would ignore missing and unexpected weights.

    If the model trains fewer embedding rows than the folder contains, the other rows are dropped.

    Raises:
        DataError: the weights are missing or cannot be read.
        MismatchError: names or shapes of the weights differ from the model's.
    """
    from peft import PeftConfig, get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        weights = load_file(folder / ADAPTER_WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise DataError(f"Cannot load the adapter in {folder}: {shorten_error(error)}") from None
    required = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    # PEFT also saves the embedding and the head if the vocabulary was resized, or if an adapter is on one of them
    allowed = get_peft_model_state_dict(adapted, save_embedding_layers=True)
    config = adapted.peft_config["default"]
    saved_rows = trained_rows(PeftConfig.from_pretrained(str(folder)))
    for module, rows in trained_rows(config).items():
        saved = saved_rows.get(module, [])
        if rows != saved and set(rows) <= set(saved):
            for name in [name for name in weights if name.endswith(f"{module}.token_adapter.trainable_tokens_delta")]:
                weights[name] = weights[name][[saved.index(row) for row in rows]]
    different = sorted(
        name
        for name in weights.keys() | required.keys()
        if name not in weights or name not in allowed or weights[name].shape != allowed[name].shape
    )
    if different:
        raise MismatchError(
            f"The adapter {folder} does not fit {config.base_model_name_or_path!r}: {', '.join(different[:2])} is "
            "missing in one of them or has another shape. It belongs to another base model."
        )
    set_peft_model_state_dict(adapted, weights)


def trained_rows(config: "PeftConfig") -> dict[str, list[int]]:
    """The rows that an adapter trains, by the name of the module. PEFT accepts a list for the embedding."""
    rows = getattr(config, "trainable_token_indices", None) or {}
    return rows if isinstance(rows, dict) else {EMBEDDING: list(rows)}


def is_tied(model: "GPT2LMHeadModel") -> bool:
    """Whether the head is the embedding, as in GPT-2."""
    return model.lm_head.weight is model.transformer.wte.weight


def weights_sha256(name_or_path: str) -> str | None:
    """The sha256 of a model's weights in a folder or on the Hub; for sharded weights, the sha256 of their hashes.

    Returns None if there are no weights. Loading them will raise the error.
    """
    from transformers import utils
    from transformers.utils.hub import get_checkpoint_shard_files

    indices = (utils.SAFE_WEIGHTS_INDEX_NAME, utils.WEIGHTS_INDEX_NAME)
    for name in (utils.SAFE_WEIGHTS_NAME, utils.SAFE_WEIGHTS_INDEX_NAME, utils.WEIGHTS_NAME, utils.WEIGHTS_INDEX_NAME):
        try:
            file = utils.cached_file(name_or_path, name)
            assert file is not None, "a missing file is an OSError"
            files = get_checkpoint_shard_files(name_or_path, file)[0] if name in indices else [file]
        except (OSError, ValueError):
            continue
        digests = [file_sha256(Path(path)) for path in files]
        return digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()
    return None


def iterate_blocks(model: "GPT2LMHeadModel") -> "Iterator[GPT2Block]":
    """The blocks of a stock GPT-2, with their type, which `nn.ModuleList` does not have."""
    return iter(cast("Iterable[GPT2Block]", model.transformer.h))


def block_matrices(model: "GPT2LMHeadModel") -> "Iterator[tuple[nn.Module, str, Conv1D]]":
    """(parent module, attribute name, module) for the four `Conv1D` layers of every block, with weights (in, out)."""
    for block in iterate_blocks(model):
        for part, name in ((block.attn, "c_attn"), (block.attn, "c_proj"), (block.mlp, "c_fc"), (block.mlp, "c_proj")):
            yield part, name, getattr(part, name)


def round_to_4_bits(weight: "Tensor") -> "Tensor":
    """Rounds a matrix (in, out) as QLoRA does: NF4 with quantized scales (Dettmers et al. 2023, arXiv:2305.14314)."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    return dequantize_4bit(*quantize_4bit(weight.T.contiguous(), quant_type="nf4", compress_statistics=True)).T
