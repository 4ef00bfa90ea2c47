"""Optimizers for a stock GPT-2: AdamW, AdamW with 8-bit states, and Muon for the matrices of the blocks.

Muon replaces the momentum of a matrix by the nearest semi-orthogonal matrix (Jordan et al. 2024,
kellerjordan.github.io/posts/muon) and needs far fewer tokens. Everything else is updated by AdamW.
`torch.optim.Muon` is not used: it treats GPT-2's fused (q, k, v) matrix as one, runs Newton-Schulz one matrix at a
time, and always in bfloat16, which a CPU without bf16 matrix units only emulates. Here q, k and v are separate
matrices, and matrices of equal shape go through one batched product.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

ADAMW_BETAS = (0.9, 0.95)  # GPT-3, and every reproduction of GPT-2 since
OPTIMIZERS = ("adamw", "adamw_8bit", "muon")
# (a, b, c) of a x + b x^3 + c x^5 for each step: by Remez' exchange, the polynomials nearest to 1 on the interval that
# the previous steps make of [0.001, 1] (Amsel et al. 2025, arXiv:2505.16932). They are scaled to values smaller by a
# hundredth, so that rounding to bf16 stays within the interval. Three of them train as well as five steps with one
# polynomial (docs/LOG.md).
SAFETY = 1.01
NEWTON_SCHULZ = tuple(
    (a / SAFETY, b / SAFETY**3, c / SAFETY**5)
    for a, b, c in ((8.4703, -25.1081, 18.6293), (4.1828, -3.1087, 0.5806), (3.9619, -2.9541, 0.5630))
)
EMBEDDING_RATE = 10.0  # times learning_rate, with Muon; norms, biases and positions would not bear it
# Elements of the matrices that go through Newton-Schulz together, which holds about five copies: 340 MB in float32 on a
# GPU, where large products are fast, and 85 MB on a CPU, where small ones took three quarters of the time (docs/LOG.md)
MAX_ELEMENTS = {"cpu": 2**22, "gpu": 2**24}
RMS_OF_ADAMW = 0.2  # scales an orthogonal update to the size of AdamW's (Liu et al. 2025, arXiv:2502.16982)


def orthogonalize(matrices: Tensor) -> Tensor:
    """The semi-orthogonal matrix nearest to each matrix, approximately.

    Singular values above a thousandth of the Frobenius norm end between 0.14 and 1.86; training only needs that none of
    them dominates. A Newton-Schulz step maps x to p(x x^T) x with p(g) = a + b g + c g^2. If one side is at least twice
    as long as the other, the steps run on the small Gram matrix and x is multiplied once, at the end: half of the
    products for the same result, except in bf16, whose rounding is too coarse for the Gram matrix.

    Args:
        matrices: (N, A, B), of any scale.
    """
    tall = matrices.size(-2) > matrices.size(-1)
    x = matrices.mT if tall else matrices
    x = x / (SAFETY * x.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # (N, A, B) with A <= B: the smaller Gram matrix
    on_gram = 2 * x.size(-2) <= x.size(-1) and x.dtype == torch.float32
    x = _newton_schulz_on_gram(x) if on_gram else _newton_schulz(x)
    return x.mT if tall else x


def _newton_schulz(x: Tensor) -> Tensor:
    for a, b, c in NEWTON_SCHULZ:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _newton_schulz_on_gram(x: Tensor) -> Tensor:
    gram, factor, product = x @ x.mT, None, None
    for a, b, c in NEWTON_SCHULZ:
        if factor is not None:
            gram = factor @ gram @ factor  # they commute: all are polynomials of one symmetric matrix
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        product = factor if product is None else factor @ product
    return product @ x


class Muon(torch.optim.Optimizer):
    """Muon for groups with `use_muon` and fused AdamW for the others: one optimizer with one state dict.

    Args:
        groups: Parameter groups with `use_muon`, `lr`, `weight_decay` and `splits`, the number of equal parts of a
            matrix's columns (3 for GPT-2's `c_attn`, which holds q, k and v side by side).
        momentum: Nesterov momentum of Muon.
    """

    def __init__(self, groups: Iterable[dict], momentum: float = 0.95):
        super().__init__(groups, {"momentum": momentum, "use_muon": False, "splits": 1})
        self._adamw = torch.optim.AdamW(
            [group for group in self.param_groups if not group["use_muon"]], betas=ADAMW_BETAS, fused=True
        )
        # Both share their group dictionaries, so that schedulers, checkpoints and logs see one optimizer
        adamw_groups = iter(self._adamw.param_groups)
        self.param_groups = [group if group["use_muon"] else next(adamw_groups) for group in self.param_groups]
        self._adamw.state = self.state

    @torch.no_grad()
    def step(self, closure=None):
        self._adamw.state = self.state  # `load_state_dict` replaces it
        self._adamw.param_groups = [group for group in self.param_groups if not group["use_muon"]]
        self._adamw.step()
        by_shape = defaultdict(list)  # over all groups: larger batched products are faster
        for group in self.param_groups:
            if group["use_muon"]:
                for piece in self._pieces(group):
                    by_shape[piece[1].shape].append(piece)
        for shape, pieces in by_shape.items():
            max_elements = MAX_ELEMENTS["cpu" if pieces[0][1].device.type == "cpu" else "gpu"]
            batch_size = max(1, max_elements // shape.numel())
            for start in range(0, len(pieces), batch_size):
                _step_pieces(pieces[start : start + batch_size])

    def _pieces(self, group: dict) -> Iterable[tuple[dict, Tensor, Tensor, Tensor]]:
        """(group, matrix, gradient, momentum) of each matrix as views; q, k and v are three matrices."""
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            parts = (parameter, parameter.grad, state["momentum_buffer"])
            for views in zip(*(part.chunk(group["splits"], dim=1) for part in parts), strict=True):
                yield group, *views


def _step_pieces(pieces: list[tuple[dict, Tensor, Tensor, Tensor]]) -> None:
    """Update the momentum of matrices of one shape, apply weight decay and step."""
    updates = []
    for group, _, gradient, momentum in pieces:
        momentum.lerp_(gradient, 1 - group["momentum"])
        updates.append(gradient.lerp(momentum, group["momentum"]))  # Nesterov
    stacked = torch.stack(updates)  # (N, A, B)
    del updates
    if stacked.is_cuda and torch.cuda.get_device_capability(stacked.device)[0] >= 8:
        stacked = stacked.bfloat16()  # older GPUs only emulate bf16
    scale = RMS_OF_ADAMW * max(stacked.shape[1:]) ** 0.5
    for (group, matrix, _, _), update in zip(pieces, orthogonalize(stacked), strict=True):
        matrix.mul_(1 - group["lr"] * group["weight_decay"])
        matrix.add_(update.to(matrix.dtype), alpha=-group["lr"] * scale)


def build_optimizer(
    model: nn.Module,
    name: str,
    *,
    learning_rate: float,
    matrix_learning_rate: float,
    weight_decay: float,
    scaled: bool = False,
) -> torch.optim.Optimizer:
    """The optimizer of a stock GPT-2.

    Biases, norms and position embeddings have no weight decay. With Muon, AdamW also updates the token embedding, tied
    to the head, without weight decay.

    Args:
        name: "adamw", "adamw_8bit" (states of matrices in 8 bits, of embeddings in 32 bits) or "muon".
        learning_rate: Of AdamW; with Muon, the token embedding's is `EMBEDDING_RATE` times that.
        matrix_learning_rate: Of Muon; other optimizers ignore it.
        scaled: Gradients have a loss scale (fp16). Fused AdamW would skip steps with infinite gradients on its own,
            unnoticed by the learning rate schedule and the step count.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    matrices = {n for n, p in trained.items() if p.ndim == 2 and ".h." in n and n.endswith(".weight")}
    embeddings = {n for n in trained if n.endswith("wte.weight")}

    def select(names: set[str]) -> list[nn.Parameter]:
        return [p for n, p in trained.items() if n in names]

    rest = {"params": select(trained.keys() - matrices - embeddings), "lr": learning_rate, "weight_decay": 0.0}
    if name == "muon":
        fused = {n for n in matrices if n.endswith("attn.c_attn.weight")}
        muon = {"use_muon": True, "lr": matrix_learning_rate, "weight_decay": weight_decay}
        adamw = {"weight_decay": 0.0, "betas": ADAMW_BETAS, "eps": 1e-8}
        return Muon(
            [
                {"params": select(fused), "splits": 3, **muon},
                {"params": select(matrices - fused), **muon},
                {"params": select(embeddings), "lr": EMBEDDING_RATE * learning_rate, **adamw},
                {**rest, **adamw},
            ]
        )
    decayed = {"lr": learning_rate, "weight_decay": weight_decay}
    if name == "adamw":
        return torch.optim.AdamW(
            [{"params": select(matrices | embeddings), **decayed}, rest], betas=ADAMW_BETAS, fused=not scaled
        )
    return adamw_8bit(
        [{"params": select(matrices), **decayed}, {"params": select(embeddings), "optim_bits": 32, **decayed}, rest]
    )


def adamw_8bit(groups: list[dict]) -> torch.optim.Optimizer:
    """AdamW of bitsandbytes with states in 8 bits, in blocks of 256 (Dettmers et al. 2022, arXiv:2110.02861).

    A group may set `optim_bits`: embeddings, whose gradients are sparse and very unequal in size, are unstable in 8
    bits (section 2.3 of the paper). bitsandbytes' own way to set it is a global register of object ids, which outlives
    the objects.
    """
    from bitsandbytes.optim import AdamW8bit

    class GroupedAdamW8bit(AdamW8bit):
        def get_config(self, gindex, pindex, group):
            config = super().get_config(gindex, pindex, group)
            return config | {"optim_bits": group.get("optim_bits", config["optim_bits"])}

    return GroupedAdamW8bit(groups, betas=ADAMW_BETAS)
