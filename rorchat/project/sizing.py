"""Which model reaches the lowest loss on a text of limited size in a given time: a scaling law for small models.

    bits per byte = E + A / N^alpha + B / D^beta + C / V^gamma

N is the number of parameters (`count_scaling_parameters`), D the number of bytes that the model reads, and V the size
of the vocabulary: a small model predicts a text better if its tokens are longer. Bytes that are read repeatedly count
less: after r repetitions, U unique bytes are worth U (1 + R (1 - exp(-r / R))) new ones, with R = 15.4 (Muennighoff et
al. 2023, arXiv:2305.16264). The constants were fitted to runs of this package: `scripts/bench/small_models.py`,
docs/planning.md. They hold for English prose; on other texts, differences between sizes are similar, levels are not.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rorchat.model import Shape, count_scaling_parameters
from rorchat.project.vocabulary import Vocabulary

#: Larger models learn a text by heart within the passes that pretraining makes over it.
MAX_PARAMETERS_PER_TOKEN = 20
REPETITIONS = 15.4  # after this many repetitions, a repeated byte is worth a third of a new one


@dataclass(frozen=True)
class Law:
    """The constants of the law, in bits per byte, parameters, bytes and tokens."""

    E: float
    A: float
    alpha: float
    B: float
    beta: float
    C: float
    gamma: float

    def bits_per_byte(self, parameters: float, bytes_read: float, unique_bytes: float, vocabulary: int) -> float:
        data = effective_bytes(bytes_read, unique_bytes)
        size, text, tokens = parameters**self.alpha, data**self.beta, vocabulary**self.gamma
        return self.E + self.A / size + self.B / text + self.C / tokens


LAW = Law(E=1.538, A=6.547, alpha=0.35, B=1177, beta=0.6, C=90.88, gamma=0.8)

#: Shapes that are considered, in rising order. Few layers: on a CPU, a wide layer is faster than two narrow ones.
SHAPES = (
    Shape(2, 2, 64), Shape(3, 3, 96), Shape(4, 4, 128), Shape(4, 4, 192), Shape(4, 4, 256), Shape(5, 5, 320),
    Shape(6, 6, 384), Shape(8, 8, 512), Shape(10, 10, 640), Shape(12, 12, 768), Shape(16, 14, 896), Shape(24, 16, 1024),
)  # fmt: skip


def effective_bytes(bytes_read: float, unique_bytes: float) -> float:
    """The number of new bytes that reading `unique_bytes` repeatedly is worth."""
    if bytes_read <= unique_bytes:
        return bytes_read
    repetitions = bytes_read / unique_bytes - 1
    return unique_bytes * (1 + REPETITIONS * (1 - math.exp(-repetitions / REPETITIONS)))


@dataclass(frozen=True)
class Size:
    """A model and how long it is pretrained.

    Attributes:
        tokens: tokens of pretraining.
        bits_per_byte: predicted, on held-out text.
    """

    shape: Shape
    vocabulary: Vocabulary
    tokens: int
    unique_bytes: int
    bits_per_byte: float

    @property
    def parameters(self) -> int:
        return count_scaling_parameters(self.shape, self.vocabulary.size)

    @property
    def epochs(self) -> float:
        return self.tokens * self.vocabulary.bytes_per_token / self.unique_bytes


def predict(shape: Shape, vocabulary: Vocabulary, tokens: int, unique_bytes: int, law: Law = LAW) -> Size:
    """The predicted result of pretraining a shape on `tokens` tokens of a text of `unique_bytes` bytes."""
    bits = law.bits_per_byte(
        count_scaling_parameters(shape, vocabulary.size),
        tokens * vocabulary.bytes_per_token,
        unique_bytes,
        vocabulary.size,
    )
    return Size(shape, vocabulary, tokens, unique_bytes, bits)


def choose_size(
    vocabularies: Sequence[Vocabulary],
    unique_bytes: int,
    tokens_in_time: Callable[[Shape, Vocabulary], int],
    shapes: Sequence[Shape] = SHAPES,
) -> Size:
    """The size with the lowest predicted bits per byte.

    Args:
        tokens_in_time: the tokens of pretraining that fit into the time for a shape and a vocabulary; 0 for none.
    """
    sizes = [
        predict(shape, vocabulary, tokens, unique_bytes)
        for shape in shapes
        for vocabulary in vocabularies
        if (tokens := tokens_in_time(shape, vocabulary)) > 0
        and count_scaling_parameters(shape, vocabulary.size) * vocabulary.bytes_per_token
        <= MAX_PARAMETERS_PER_TOKEN * unique_bytes
    ]
    if not sizes:
        return predict(shapes[0], vocabularies[0], 1, unique_bytes)
    return min(sizes, key=lambda size: size.bits_per_byte)
