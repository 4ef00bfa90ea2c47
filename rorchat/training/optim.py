"""Optimizers for stock GPT-2: AdamW, AdamW with 8-bit states, and Muon on the hidden matrices with AdamW for all else.

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
OPTIMIZERS = ("adamw", "adamw_8bit", "muon")
# (a, b, c) of a x + b x^3 + c x^5 for each step: the polynomials nearest to 1 on what the steps before leave of
# [0.001, 1], by Remez' exchange (Amsel et al. 2025, arXiv:2505.16932), for values a hundredth smaller, so that rounding
# to bf16 does not leave the interval. Three of them do for training what five of one for all did (docs/LOG.md).
SAFETY = 1.01
NEWTON_SCHULZ = tuple(
    (a / SAFETY, b / SAFETY**3, c / SAFETY**5)
    for a, b, c in ((8.4703, -25.1081, 18.6293), (4.1828, -3.1087, 0.5806), (3.9619, -2.9541, 0.5630))
)
EMBEDDING_RATE = 10.0  # times learning_rate, beside Muon: what suits embeddings ruins norms, biases and positions
# Of the matrices that go through Newton-Schulz together, which holds some five copies: 340 MB in float32 on a GPU,
# which wants large products, and 85 MB on a CPU, where small ones took three quarters of the time at 124M (docs/LOG.md)
NUMBERS_AT_ONCE = {"cpu": 2**22, "gpu": 2**24}
RMS_OF_ADAMW = 0.2  # scales an orthogonal update to the size of AdamW's (Liu et al. 2025, arXiv:2502.16982)


def orthogonalized(matrices: Tensor) -> Tensor:
    """The semi-orthogonal matrix nearest to each matrix, roughly.

    Singular values above a thousandth of the Frobenius norm end within 0.14 and 1.86; what training needs is that none
    of them rules the others. A step of Newton-Schulz takes x to p(x x^T) x with p(g) = a + b g + c g^2. Where one side
    is much longer than the other, the steps are taken on the small Gram matrix alone and x is multiplied once, in the
    end: the same result for half of the products, but for bf16, whose rounding the Gram matrix does not bear.

    Args:
        matrices: (N, A, B), any scale.
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
            gram = factor @ gram @ factor  # all three are polynomials of one symmetric matrix
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        product = factor if product is None else factor @ product
    return product @ x


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
        by_shape = defaultdict(list)  # over all groups: the more matrices a product takes, the better
        for group in self.param_groups:
            if group["use_muon"]:
                for piece in self._pieces(group):
                    by_shape[piece[1].shape].append(piece)
        for shape, pieces in by_shape.items():
            most = NUMBERS_AT_ONCE["cpu" if pieces[0][1].device.type == "cpu" else "gpu"]
            at_once = max(1, most // shape.numel())
            for start in range(0, len(pieces), at_once):
                _step_pieces(pieces[start : start + at_once])

    def _pieces(self, group: dict) -> Iterable[tuple[dict, Tensor, Tensor, Tensor]]:
        """(group, matrix, gradient, momentum), with q, k and v as matrices of their own: views, nothing is copied."""
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
    """Moves the momentum of matrices of one shape on, decays them and steps."""
    updates = []
    for group, _, gradient, momentum in pieces:
        momentum.lerp_(gradient, 1 - group["momentum"])
        updates.append(gradient.lerp(momentum, group["momentum"]))  # Nesterov
    stacked = torch.stack(updates)  # (N, A, B)
    del updates
    if stacked.is_cuda and torch.cuda.get_device_capability(stacked.device)[0] >= 8:
        stacked = stacked.bfloat16()  # below, a GPU only emulates it
    scale = RMS_OF_ADAMW * max(stacked.shape[1:]) ** 0.5
    for (group, matrix, _, _), update in zip(pieces, orthogonalized(stacked), strict=True):
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

    Biases, norms and positions are not decayed. Under Muon the token embedding, tied to the head, belongs to AdamW too
    and is not decayed either.

    Args:
        name: "adamw", "adamw_8bit" (states of matrices in 8 bits, of embeddings in 32) or "muon".
        learning_rate: of AdamW; beside Muon, the token embedding's is `EMBEDDING_RATE` times that.
        matrix_learning_rate: of Muon; unused by the others.
        scaled: gradients come with a loss scale (fp16). A fused AdamW would leave steps with infinite gradients out by
            itself, where nobody learns of it: schedules and counts would go on.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    matrices = {n for n, p in trained.items() if p.ndim == 2 and ".h." in n and n.endswith(".weight")}
    embeddings = {n for n in trained if n.endswith("wte.weight")}

    def of(names: set[str]) -> list[nn.Parameter]:
        return [p for n, p in trained.items() if n in names]

    rest = {"params": of(trained.keys() - matrices - embeddings), "lr": learning_rate, "weight_decay": 0.0}
    if name == "muon":
        fused = {n for n in matrices if n.endswith("attn.c_attn.weight")}
        muon = {"use_muon": True, "lr": matrix_learning_rate, "weight_decay": weight_decay}
        adamw = {"weight_decay": 0.0, "betas": ADAMW_BETAS, "eps": 1e-8}
        return Muon(
            [
                {"params": of(fused), "splits": 3, **muon},
                {"params": of(matrices - fused), **muon},
                {"params": of(embeddings), "lr": EMBEDDING_RATE * learning_rate, **adamw},
                {**rest, **adamw},
            ]
        )
    decayed = {"lr": learning_rate, "weight_decay": weight_decay}
    if name == "adamw":
        return torch.optim.AdamW(
            [{"params": of(matrices | embeddings), **decayed}, rest], betas=ADAMW_BETAS, fused=not scaled
        )
    return adamw_8bit(
        [{"params": of(matrices), **decayed}, {"params": of(embeddings), "optim_bits": 32, **decayed}, rest]
    )


def adamw_8bit(groups: list[dict]) -> torch.optim.Optimizer:
    """AdamW of bitsandbytes with states in 8 bits, blocks of 256 (Dettmers et al. 2022, arXiv:2110.02861).

    A group with `optim_bits` has its own: embeddings, whose gradients are sparse and of very unequal size, are unstable
    in 8 bits (section 2.3 of the paper). bitsandbytes offers that through a register of ids that outlives the objects.
    """
    from bitsandbytes.optim import AdamW8bit

    class GroupedAdamW8bit(AdamW8bit):
        def get_config(self, gindex, pindex, group):
            config = super().get_config(gindex, pindex, group)
            return config | {"optim_bits": group.get("optim_bits", config["optim_bits"])}

    return GroupedAdamW8bit(groups, betas=ADAMW_BETAS)
