"""Optimizers for a stock GPT-2: AdamW, AdamW with 8-bit states, and Muon for the weight matrices of the blocks.

Muon replaces the momentum of a matrix with the nearest semi-orthogonal matrix (Jordan et al. 2024,
kellerjordan.github.io/posts/muon) and needs far fewer tokens to reach the same loss. All other parameters are updated
by AdamW. `torch.optim.Muon` is not used for three reasons: it treats GPT-2's fused (q, k, v) matrix as one matrix, it
runs Newton-Schulz on one matrix at a time, and it always uses bfloat16, which CPUs without bf16 matrix units only
emulate. Here q, k and v are separate matrices, and matrices of equal shape are processed in one batched product.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

ADAMW_BETAS = (0.9, 0.95)  # GPT-3, and every reproduction of GPT-2 since
OPTIMIZERS = ("adamw", "adamw_8bit", "muon")
# Coefficients (a, b, c) of the polynomial a x + b x^3 + c x^5 of each Newton-Schulz step (Amsel et al. 2025,
# arXiv:2505.16932). Each polynomial is the best uniform approximation of 1, found with the Remez algorithm, on the
# interval to which the previous steps map [0.001, 1]. Three such steps train as well as five steps with one fixed
# polynomial (docs/LOG.md).
SAFETY = 1.01  # inputs are divided by this factor, so that they stay in the interval when rounded to bf16
NEWTON_SCHULZ = tuple(
    (a / SAFETY, b / SAFETY**3, c / SAFETY**5)
    for a, b, c in ((8.4703, -25.1081, 18.6293), (4.1828, -3.1087, 0.5806), (3.9619, -2.9541, 0.5630))
)
EMBEDDING_RATE = 10.0  # with Muon, multiple of learning_rate for the token embedding; too high for norms and biases
# Maximum number of elements in a batch of Newton-Schulz, which needs about five copies of them in float32: 340 MB on a
# GPU, where large products are fast, and 85 MB on a CPU, where small batches took 25 % less time (docs/LOG.md)
MAX_ELEMENTS = {"cpu": 2**22, "gpu": 2**24}
RMS_OF_ADAMW = 0.2  # scales an orthogonal update to the size of AdamW's (Liu et al. 2025, arXiv:2502.16982)


def orthogonalize(matrices: Tensor) -> Tensor:
    """Approximates the semi-orthogonal matrix nearest to each matrix.

    Singular values above a thousandth of the Frobenius norm are mapped to values between 0.14 and 1.86. This is
    sufficient for training, which only requires that none of them dominates. A Newton-Schulz step maps x to p(x x^T) x
    with p(g) = a + b g + c g^2. If one side is at least twice as long as the other, the steps are computed on the small
    Gram matrix, and x is multiplied once at the end. This halves the number of products. It is not used in bf16, whose
    rounding is too coarse for the Gram matrix.

    Args:
        matrices: (N, A, B), of any scale.

    Returns:
        (N, A, B) in the same dtype.
    """
    tall = matrices.size(-2) > matrices.size(-1)
    x = matrices.mT if tall else matrices
    x = x / (
        SAFETY * x.norm(dim=(-2, -1), keepdim=True) + 1e-7
    )  # (N, A, B) with A <= B, so that the Gram matrix is small
    on_gram = 2 * x.size(-2) <= x.size(-1) and x.dtype == torch.float32
    x = _newton_schulz_on_gram(x) if on_gram else _newton_schulz(x)
    return x.mT if tall else x


def _newton_schulz(x: Tensor) -> Tensor:
    """(N, A, B) -> (N, A, B)."""
    for a, b, c in NEWTON_SCHULZ:
        gram = x @ x.mT  # (N, A, A)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _newton_schulz_on_gram(x: Tensor) -> Tensor:
    """The same as `_newton_schulz`, with one product of the size of x at the end: (N, A, B) -> (N, A, B)."""

    def factor_of(gram: Tensor, a: float, b: float, c: float) -> Tensor:
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        return factor

    gram = x @ x.mT  # (N, A, A), like the factors and their product
    product = factor = factor_of(gram, *NEWTON_SCHULZ[0])
    for coefficients in NEWTON_SCHULZ[1:]:
        gram = factor @ gram @ factor  # the order is irrelevant: polynomials of the same matrix commute
        factor = factor_of(gram, *coefficients)
        product = factor @ product
    return product @ x


class Muon(torch.optim.Optimizer):
    """Muon for groups with `use_muon` and fused AdamW for the others: one optimizer with one state dict.

    Args:
        groups: Parameter groups with `use_muon`, `lr`, `weight_decay` and `splits`, the number of equal parts of a
            matrix's columns (3 for GPT-2's `c_attn`, which holds q, k and v side by side).
        lr: default of the groups, see `build_optimizer`.
        momentum: Coefficient of Muon's Nesterov momentum.
    """

    def __init__(self, groups: Iterable[dict], lr: float, momentum: float = 0.95):
        super().__init__(groups, {"lr": lr, "momentum": momentum, "use_muon": False, "splits": 1})
        self._adamw = torch.optim.AdamW(
            [group for group in self.param_groups if not group["use_muon"]], betas=ADAMW_BETAS, fused=True
        )
        # Both optimizers share the group dictionaries, so that schedulers, checkpoints and logs see one optimizer
        adamw_groups = iter(self._adamw.param_groups)
        self.param_groups = [group if group["use_muon"] else next(adamw_groups) for group in self.param_groups]
        self._adamw.state = self.state

    @torch.no_grad()
    def step(self, closure=None):
        self._adamw.state = self.state  # `load_state_dict` replaces `self.state`
        self._adamw.param_groups = [group for group in self.param_groups if not group["use_muon"]]
        self._adamw.step()
        by_shape = defaultdict(list)  # across groups, because larger batches are faster
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
        """Yields (group, matrix, gradient, momentum) for each matrix, the last three as views (A, B).

        A parameter with `splits` consists of several matrices: q, k and v.
        """
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
    """Update the momentum of matrices of the same shape, apply weight decay, and update the matrices."""
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
    """Build the optimizer of a stock GPT-2.

    Weight decay is not applied to biases, norms and position embeddings. With Muon, the token embedding (tied to the
    head) is updated by AdamW without weight decay.

    Args:
        name: "adamw", "adamw_8bit" (states of matrices in 8 bits, of embeddings in 32 bits) or "muon".
        learning_rate: Learning rate of AdamW. With Muon, that of the token embedding is `EMBEDDING_RATE` times as high.
            It is also in the defaults of the optimizer, from which some schedules compute the share of `min_lr`.
        matrix_learning_rate: Learning rate of Muon; ignored by the other optimizers.
        scaled: Whether gradients have a loss scale (fp16). Fused AdamW is then not used: it would skip steps with
            infinite gradients without the learning rate schedule and the step count noticing.
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
            ],
            lr=learning_rate,
        )
    decayed = {"lr": learning_rate, "weight_decay": weight_decay}
    if name == "adamw":
        return torch.optim.AdamW(
            [{"params": select(matrices | embeddings), **decayed}, rest],
            lr=learning_rate,
            betas=ADAMW_BETAS,
            fused=not scaled,
        )
    return adamw_8bit(
        [{"params": select(matrices), **decayed}, {"params": select(embeddings), "optim_bits": 32, **decayed}, rest],
        learning_rate,
    )


def adamw_8bit(groups: list[dict], learning_rate: float) -> torch.optim.Optimizer:
    """Build bitsandbytes' AdamW with 8-bit states in blocks of 256 (Dettmers et al. 2022, arXiv:2110.02861).

    A group may set `optim_bits` to 32: training is unstable with 8-bit states of embeddings, whose gradients are sparse
    and vary widely in size (section 2.3 of the paper). The override mechanism of bitsandbytes is not used, because it
    is a global table of object ids, which may outlive the objects.
    """
    from bitsandbytes.optim import AdamW8bit

    class GroupedAdamW8bit(AdamW8bit):
        def get_config(self, gindex, pindex, group):
            config = super().get_config(gindex, pindex, group)
            return config | {"optim_bits": group.get("optim_bits", config["optim_bits"])}

    return GroupedAdamW8bit(groups, lr=learning_rate, betas=ADAMW_BETAS)
