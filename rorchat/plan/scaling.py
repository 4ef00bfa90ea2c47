"""Which model and how many tokens give the lowest loss: Chinchilla's law over a family of GPT-2 shapes."""

from dataclasses import dataclass

from rorchat.model import SIZES, Shape

HEAD_WIDTH = 64  # GPT-2's, at every size
#: (heads, layers) of the named sizes with heads of 64; what lies between is interpolated, below it is as deep as heads
DEPTHS = ((12, 12), (16, 24), (20, 36), (25, 48))
MOST_HEADS = 64  # 4,096 wide, 128 layers: 26 billion parameters


@dataclass(frozen=True)
class Fit:
    """L(N, D) = E + A / N^alpha + B / D^beta, in nats per token of the text it was fitted on (MassiveText)."""

    name: str
    source: str
    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, parameters: float, tokens: float) -> float:
        """Nats per token of a model of `parameters` (`rorchat.model.count_scaling_parameters`) after `tokens`."""
        return self.E + self.A / parameters**self.alpha + self.B / tokens**self.beta


FITS = {
    "chinchilla": Fit(
        "chinchilla", "Hoffmann et al. 2022, arXiv:2203.15556, approach 3", 1.69, 406.4, 410.7, 0.34, 0.28
    ),
    "epoch": Fit(
        "epoch", "the same data, fitted anew: Besiroglu et al. 2024, arXiv:2404.10102",
        1.8172, 482.01, 2085.43, 0.3478, 0.3658,
    ),
}  # fmt: skip


def family() -> list[Shape]:
    """GPT-2-like shapes from 0.4 million to 26 billion parameters in the body, heads 64 wide, rising."""
    shapes = {Shape(_layers(heads), heads, HEAD_WIDTH * heads) for heads in range(2, MOST_HEADS + 1)}
    return sorted(shapes, key=lambda shape: shape.n_layer * shape.n_embd**2)


def _layers(heads: int) -> int:
    if heads <= DEPTHS[0][0]:
        return heads
    for (few, shallow), (many, deep) in zip(DEPTHS, DEPTHS[1:], strict=False):
        if heads <= many:
            return round(shallow + (deep - shallow) * (heads - few) / (many - few))
    return 2 * heads


def size_name(shape: Shape) -> str:
    """What `--size` calls it: the name of a named size, else layers x heads x width."""
    names = [name for name, known in SIZES.items() if known == shape]
    return names[0] if names else f"{shape.n_layer}x{shape.n_head}x{shape.n_embd}"
