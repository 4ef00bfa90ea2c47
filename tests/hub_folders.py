"""Model folders as on the Hub."""

import torch
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel


def hub_gpt2(folder, **config) -> GPT2LMHeadModel:
    """A folder like the Hub's `gpt2`: no `transformer.` prefix, stored causal masks, 50,257 rows, no chat template."""
    torch.manual_seed(1)
    model = GPT2LMHeadModel(GPT2Config(**config))
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name.removeprefix("transformer."): tensor.clone()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    positions = model.config.n_positions
    for layer in range(model.config.n_layer):
        mask = torch.tril(torch.ones(positions, positions)).view(1, 1, positions, positions)
        weights[f"h.{layer}.attn.bias"] = mask
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.architectures = ["GPT2LMHeadModel"]
    model.config.save_pretrained(folder)
    return model
