"""LoRA: trains small matrices next to those of a frozen model, and the embedding rows of the control tokens.

Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685) with PEFT's layers in a GPT2LMHeadModel: trainers, evaluation
and generation see the same class as without LoRA. Checkpoints are adapters that PEFT can load; the result of a run is
the stock model with the adapter merged into it. QLoRA (Dettmers et al. 2023, arXiv:2305.14314) holds the frozen
matrices in 4 bits.
"""

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from rorchat.adapter import (
    ADAPTER_BASE,
    ADAPTER_WEIGHTS,
    EMBEDDING,
    HEAD,
    block_matrices,
    is_adapter,
    is_tied,
    load_adapter,
    weights_sha256,
)
from rorchat.chatml import CONTROL_TOKENS
from rorchat.errors import UsageError
from rorchat.files import to_json
from rorchat.training.arguments import StageArguments
from rorchat.training.distributed import sharding_strategy

ALPHA_PER_RANK = 2  # alpha / rank, so a layer adds 2 B A x for any rank
#: Names of the trained rows in PEFT's state dict, by module.
ROWS = {
    EMBEDDING: "base_model.model.transformer.wte.token_adapter.trainable_tokens_delta",
    HEAD: "base_model.model.lm_head.token_adapter.trainable_tokens_delta",
}


@dataclass
class LoraArguments(StageArguments):
    """Low-rank adaptation (LoRA)."""

    lora_rank: int = field(
        default=0, metadata={"help": "Rank of the adapter to train in place of the model, such as 16; 0: no LoRA."}
    )
    load_in_4bit: bool = field(
        default=False, metadata={"help": "Keep the frozen model in 4 bits (QLoRA); needs lora_rank."}
    )

    def create_adapter(self, model: GPT2LMHeadModel, tokenizer, base: str) -> "Adapter | None":
        """The adapter to train, added to the model; None to train the whole model."""
        return Adapter(model, tokenizer, self, base) if self.lora_rank else None

    def check_lora(self) -> None:
        """Raises UsageError if the settings contradict each other."""
        if self.lora_rank < 0:
            raise UsageError(f"lora_rank is {self.lora_rank}: give a positive number, or 0 to train the whole model.")
        if self.load_in_4bit and not self.lora_rank:
            raise UsageError("load_in_4bit needs a frozen model: give lora_rank as well, such as 16.")
        if self.lora_rank and self.optimizer == "muon":
            raise UsageError(
                "optimizer muon makes updates orthogonal, which means nothing for the product of LoRA's two matrices: "
                "give adamw or adamw_8bit."
            )
        if self.lora_rank and (how := sharding_strategy()):
            raise UsageError(
                f"lora_rank is {self.lora_rank}, but {how} shards the model, which LoRA does not support. Launch "
                "with --accelerate_config ddp."
            )


class Adapter:
    """The trainable part of a model: PEFT's layers and the control tokens' rows of the embedding and the head.

    Embedding and head share these rows if they are tied, as in GPT-2. The model is changed in place: it contains PEFT's
    layers afterwards.

    Args:
        base: Folder or Hub id from which the model was loaded.

    Raises:
        UsageError: the rank or the base is unusable, or the device cannot compute in 4 bits.
    """

    def __init__(self, model: GPT2LMHeadModel, tokenizer, arguments: LoraArguments, base: str):
        rank = arguments.lora_rank
        if is_adapter(base):
            raise UsageError(
                f"lora_rank is {rank}, but {base} is an adapter itself: give a whole model, such as the run's model/."
            )
        if rank > model.config.n_embd:
            raise UsageError(
                f"lora_rank is {rank}, but the width of the model is only {model.config.n_embd}: give a smaller rank."
            )
        self.base = str(Path(base).resolve()) if Path(base).is_dir() else base
        self.base_record = {"sha256": weights_sha256(base), "load_in_4bit": arguments.load_in_4bit}
        control = tokenizer.convert_tokens_to_ids(list(CONTROL_TOKENS))
        grown = range(GPT2Config.from_pretrained(base).vocab_size, len(tokenizer))  # rows that the base lacks
        self.rows = sorted({*control, *grown})
        self._modules = (EMBEDDING,) if is_tied(model) else (EMBEDDING, HEAD)
        # the exact biases, because bitsandbytes rounds those of 4-bit layers to bf16 in place
        self._biases = [matrix.bias for _, _, matrix in block_matrices(model)]
        if arguments.load_in_4bit:
            _quantize_to_4_bits(model, arguments)
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=rank,
            lora_alpha=ALPHA_PER_RANK * rank,
            target_modules=["c_attn", "c_proj", "c_fc"],
            fan_in_fan_out=not arguments.load_in_4bit,  # Conv1D weights are (in, out), Linear4bit's (out, in)
            trainable_token_indices=self._rows_by_module(sorted(control)),
        )
        self.peft = get_peft_model(model, config)
        vars(model).pop("is_loaded_in_4bit", None)  # trainers would assume that Transformers quantized it
        # PEFT 0.21 wraps the head and exposes only its weight; TRL 1.16 also reads the bias, which is None
        model.lm_head.register_parameter("bias", None)

    @property
    def model(self) -> GPT2LMHeadModel:
        return cast(GPT2LMHeadModel, self.peft.get_base_model())

    def _rows_by_module(self, rows: list[int]) -> list[int] | dict[str, list[int]]:
        """The rows in the form of PEFT's settings: a list is for the embedding and a head that is tied to it."""
        return rows if self._modules == (EMBEDDING,) else dict.fromkeys(self._modules, rows)

    def save(self, folder: str | Path, tokenizer) -> None:
        """Writes an adapter that plain PEFT can load, with the tokenizer.

        It contains the trained rows and those that the base lacks. So it fits a base whose embedding is resized to the
        tokenizer's size, however the new rows are initialized.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = get_peft_model_state_dict(self.peft, save_embedding_layers=False)
        matrices = {EMBEDDING: self.model.transformer.wte, HEAD: self.model.lm_head}
        for module in self._modules:
            weights[ROWS[module]] = matrices[module].weight.detach()[self.rows]
        weights = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
        save_file(weights, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        config = cast(LoraConfig, copy.copy(self.peft.peft_config["default"]))
        config.base_model_name_or_path = self.base
        config.trainable_token_indices, config.inference_mode = self._rows_by_module(self.rows), True
        config.target_modules = sorted(config.target_modules or ())  # a set: its order differs between processes
        config.save_pretrained(str(folder))
        (folder / ADAPTER_BASE).write_text(to_json(self.base_record, indent=2) + "\n", encoding="utf-8")
        tokenizer.save_pretrained(folder)

    def load(self, folder: str | Path) -> None:
        """Loads weights written by `save`; raises MismatchError if they belong to another adapter."""
        load_adapter(self.peft, Path(folder))

    def merged(self) -> GPT2LMHeadModel:
        """The stock model with the adapter merged into it, in place: the adapter cannot be trained afterwards."""
        if self.base_record["load_in_4bit"]:  # PEFT would round the sum to 4 bits again
            for (part, name, layer), bias in zip(list(block_matrices(self.model)), self._biases, strict=True):
                setattr(part, name, _as_merged_conv1d(layer, bias))
        return cast(GPT2LMHeadModel, self.peft.merge_and_unload())


def _quantize_to_4_bits(model: GPT2LMHeadModel, arguments: LoraArguments) -> None:
    """Replaces the matrices of the blocks by 4-bit ones: NF4 with double quantization, a quarter of bf16's memory.

    Transformers quantizes while loading, but our embeddings are resized after loading, and its dequantized layers are
    not Conv1D.
    """
    from bitsandbytes.nn import Linear4bit, Params4bit

    dtype = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else torch.float32
    kind: dict[str, Any] = {"quant_type": "nf4", "compress_statistics": True}
    for part, name, matrix in list(block_matrices(model)):
        inputs, outputs = matrix.weight.shape
        layer = Linear4bit(inputs, outputs, compute_dtype=dtype, device="meta", **kind)
        layer.weight = Params4bit(matrix.weight.detach().T.contiguous(), requires_grad=False, module=layer, **kind)
        layer.bias = torch.nn.Parameter(matrix.bias.detach().clone(), requires_grad=False)
        # bitsandbytes 0.50 repacks the weights in the first evaluation on a CPU with AVX512-BF16, and after that no
        # gradient passes through them
        layer.support_avx512bf16_for_cpu = False
        try:
            setattr(part, name, layer.to(arguments.device))
        except (RuntimeError, NotImplementedError, AttributeError) as error:
            raise UsageError(
                f"load_in_4bit: bitsandbytes cannot compute in 4 bits on {arguments.device} "
                f"({' '.join(str(error).split())[:100]}): leave it out, or train on a CUDA GPU."
            ) from None
    vars(model)["is_loaded_in_4bit"] = True  # PEFT checks this


def _as_merged_conv1d(layer: Any, bias: torch.Tensor) -> Conv1D:
    """A PEFT layer over a 4-bit matrix as one float32 matrix (in, out): the dequantized matrix plus the adapter's."""
    from bitsandbytes.functional import dequantize_4bit

    quantized = layer.get_base_layer().weight
    weight = dequantize_4bit(quantized.data, quantized.quant_state).float() + layer.get_delta_weight("default")
    merged = Conv1D(*weight.shape)
    merged.weight.data, merged.bias.data = weight.T.contiguous(), bias.detach().to(weight.device)
    return merged
