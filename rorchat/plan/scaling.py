"""Which model and how many tokens reach the lowest loss: Chinchilla's scaling law over a family of GPT-2 shapes."""

from dataclasses import dataclass

from rorchat.model import SIZES, Shape

HEAD_WIDTH = 64  # of all GPT-2 sizes
#: (heads, layers) of the named sizes with heads of 64. Depths between them are interpolated; smaller models have as
#: many layers as heads
DEPTHS = ((12, 12), (16, 24), (20, 36), (25, 48))
MAX_HEADS = 64  # 4,096 wide, 128 layers: 26 billion parameters


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
        """Nats per token of a model with N `parameters` (`count_scaling_parameters`) after D `tokens`."""
        return self.E + self.A / parameters**self.alpha + self.B / tokens**self.beta


FITS = {
    "chinchilla": Fit(
        "chinchilla", "Hoffmann et al. 2022, arXiv:2203.15556, approach 3", 1.69, 406.4, 410.7, 0.34, 0.28
    ),
    "epoch": Fit(
        "epoch", "the same data refitted by Besiroglu et al. 2024, arXiv:2404.10102",
        1.8172, 482.01, 2085.43, 0.3478, 0.3658,
    ),
}  # fmt: skip


def list_shapes() -> list[Shape]:
    """GPT-2-like shapes with heads of 64, from 0.4 million to 26 billion parameters in the blocks, in rising order."""
    shapes = {Shape(_choose_layers(heads), heads, HEAD_WIDTH * heads) for heads in range(2, MAX_HEADS + 1)}
    return sorted(shapes, key=lambda shape: shape.n_layer * shape.n_embd**2)


def _choose_layers(heads: int) -> int:
    if heads <= DEPTHS[0][0]:
        return heads
    for (few, shallow), (many, deep) in zip(DEPTHS, DEPTHS[1:], strict=False):
        if heads <= many:
            return round(shallow + (deep - shallow) * (heads - few) / (many - few))
    return 2 * heads


def format_size(shape: Shape) -> str:
    """The value of `--size` for a shape: the name of a named size, else layers x heads x width."""
    names = [name for name, known in SIZES.items() if known == shape]
    return names[0] if names else f"{shape.n_layer}x{shape.n_head}x{shape.n_embd}"
