"""Optimizers for stock GPT-2: AdamW, and Muon on the hidden matrices with AdamW for all else.

Muon replaces each matrix's momentum by the nearest semi-orthogonal matrix (Jordan et al. 2024,
kellerjordan.github.io/posts/muon), which learns from far fewer tokens. `torch.optim.Muon` is not used: it takes GPT-2's
fused (q, k, v) matrix as one, runs Newton-Schulz one matrix at a time, and always in bfloat16, which a CPU without
bf16 matrix units only emulates. Here q, k and v go apart and equal shapes go through one batched product.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

ADAMW_BETAS = (0.9, 0.95)  # GPT-3, and every reproduction of GPT-2 since
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic with the steepest slope at 0 (Jordan et al. 2024)
NEWTON_SCHULZ_STEPS = 5
OPTIMIZERS = ("adamw", "muon")
RMS_OF_ADAMW = 0.2  # scales an orthogonal update to the size of AdamW's (Liu et al. 2025, arXiv:2502.16982)


def orthogonalized(matrices: Tensor) -> Tensor:
    """The semi-orthogonal matrix nearest to each matrix, roughly: singular values end within 0.7 to 1.2.

    Args:
        matrices: (N, A, B), any scale.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x  # (N, A, B) with A <= B: the smaller Gram matrix
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon for groups with `use_muon`, AdamW (fused) for the others, as one optimizer with one state dict.

    Args:
        groups: parameter groups; each has `use_muon`, `lr`, `weight_decay`, and `splits`: how many equal parts a
            matrix's columns fall into (3 for GPT-2's `c_attn`, which holds q, k and v side by side).
        momentum: of the Nesterov momentum under Muon.
    """

    def __init__(self, groups: Iterable[dict], momentum: float = 0.95):
        super().__init__(groups, {"momentum": momentum, "use_muon": False, "splits": 1})
        self._adamw = torch.optim.AdamW(
            [group for group in self.param_groups if not group["use_muon"]], betas=ADAMW_BETAS, fused=True
        )
        # The same dictionaries serve both, so that schedulers, checkpoints and logs see one optimizer.
        rest = iter(self._adamw.param_groups)
        self.param_groups = [group if group["use_muon"] else next(rest) for group in self.param_groups]
        self._adamw.state = self.state

    @torch.no_grad()
    def step(self, closure=None):
        self._adamw.state = self.state  # `load_state_dict` replaces it
        self._adamw.param_groups = [group for group in self.param_groups if not group["use_muon"]]
        self._adamw.step()
        for group in self.param_groups:
            if group["use_muon"]:
                self._step_muon(group)

    def _step_muon(self, group: dict) -> None:
        by_shape = defaultdict(list)
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            buffer = state["momentum_buffer"].lerp_(parameter.grad, 1 - group["momentum"])
            update = parameter.grad.lerp(buffer, group["momentum"])  # Nesterov
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            for weight, part in zip(
                parameter.chunk(group["splits"], dim=1), update.chunk(group["splits"], dim=1), strict=True
            ):
                by_shape[part.shape].append((weight, part))
        for shape, pairs in by_shape.items():
            stacked = torch.stack([part for _, part in pairs])  # (N, A, B)
            if stacked.is_cuda and torch.cuda.get_device_capability(stacked.device)[0] >= 8:
                stacked = stacked.bfloat16()  # below, a GPU only emulates it
            scale = -group["lr"] * RMS_OF_ADAMW * max(shape) ** 0.5
            for (weight, _), update in zip(pairs, orthogonalized(stacked), strict=True):
                weight.add_(update.to(weight.dtype), alpha=scale)


def build_optimizer(
    model: nn.Module, name: str, *, learning_rate: float, matrix_learning_rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    """The optimizer of a stock GPT-2.

    Biases, norms and positions are not decayed. Under Muon the token embedding, tied to the head, belongs to AdamW too.

    Args:
        name: "adamw" or "muon".
        learning_rate: of AdamW.
        matrix_learning_rate: of Muon; unused by "adamw".
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    matrices = {n for n, p in trained.items() if p.ndim == 2 and ".h." in n and n.endswith(".weight")}
    embeddings = {n for n in trained if n.endswith("wte.weight")}
    rest = [p for n, p in trained.items() if n not in matrices | embeddings]

    def of(names: set[str]) -> list[nn.Parameter]:
        return [p for n, p in trained.items() if n in names]

    plain = {"lr": learning_rate, "weight_decay": 0.0}
    if name == "adamw":
        decayed = {"params": of(matrices | embeddings), "lr": learning_rate, "weight_decay": weight_decay}
        return torch.optim.AdamW([decayed, {"params": rest, **plain}], betas=ADAMW_BETAS, fused=True)
    fused = {n for n in matrices if n.endswith("attn.c_attn.weight")}
    muon = {"use_muon": True, "lr": matrix_learning_rate, "weight_decay": weight_decay}
    return Muon(
        [
            {"params": of(fused), "splits": 3, **muon},
            {"params": of(matrices - fused), **muon},
            {"params": of(embeddings) + rest, "betas": ADAMW_BETAS, "eps": 1e-8, **plain},
        ]
    )
