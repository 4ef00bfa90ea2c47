"""Mixture files, random mixtures and plans, and a store whose tokens are consecutive numbers."""

from pathlib import Path

import numpy as np

from rorchat.mixture.mixture_file import MixtureConfig, Phase, Source
from rorchat.mixture.plan import Plan

MAX_DEVIATION = 1.5  # rows: allowed in plans of five to eight sources

MIXTURE = """
sources:
  c4: c4=data/c4
  tales: {from: cosmopedia=data/tales, max_epochs: 4, optional: true}
  alpaca: alpaca=data/alpaca
phases:
  - {share: 60%, weights: {c4: 1}}
  - {share: 0.2, ramp_to: {tales: 50, alpaca: 6e-1}, replay: 10%}
  - {share: 20%}
  - {tokens: 2_000}
"""


def write_mixture(folder: Path, text: str) -> Path:
    path = folder / "mixture.yaml"
    path.write_text(text, encoding="utf-8")
    return path


class NoRejects:
    """The manifest of a store that has rejected no row."""

    def describe_rejects(self) -> str:
        return ""


class CountingStore:
    """A store with the tokens `first`, `first` + 1, ..., so that a row shows where it was read."""

    def __init__(self, name: str, train: int, validation: int = 0, first: int = 0):
        self.name, self.folder, self.first = name, Path(name), first
        self._tokens = {"train": train, "validation": validation}
        self.manifest = NoRejects()

    def tokens(self, split: str) -> int:
        return self._tokens[split]

    def slice(self, split: str, start: int, stop: int) -> np.ndarray:
        assert 0 <= start < stop <= self._tokens[split]
        return np.arange(self.first + start, self.first + stop)

    def labels(self, split: str, start: int, ids: np.ndarray) -> np.ndarray:
        return ids

    def has_untrained(self, split: str) -> bool:
        return False


def config_of(*phases: Phase, sources: int = 3, **options) -> MixtureConfig:
    """Sources s0, s1, ...; an option `s1={...}` sets fields of s1."""
    names = [f"s{number}" for number in range(sources)]
    return MixtureConfig({name: Source(f"text={name}", **options.get(name, {})) for name in names}, phases)


def random_weights(rng: np.random.Generator, names: list[str]) -> dict[str, float]:
    kind = rng.integers(3)
    if kind == 0:
        return {str(rng.choice(names)): 1.0}  # one source only
    weights = rng.random(len(names)) ** 3 + 1e-4
    if kind == 1:
        weights *= rng.random(len(names)) < 0.5
        weights[rng.integers(len(names))] += 0.1
    return dict(zip(names, weights.tolist(), strict=True))


def random_plan(number: int) -> Plan:
    """A random plan: 2 to 8 sources, 1 to 5 phases, ramps, replay, zero weights, limits of epochs, optional sources."""
    rng = np.random.default_rng(number)
    names = [f"s{n}" for n in range(2 + number % 7)]
    sources = {
        name: Source(name, max_epochs=float(rng.integers(1, 4)) if rng.random() < 0.2 else None) for name in names
    }
    sources["s0"] = Source("s0")  # at least one source is never exhausted
    rows_per_epoch = {name: int(rng.integers(20, 200)) for name in names}
    missing = names[-1] if len(names) > 2 and rng.random() < 0.2 else None
    sources[names[-1]] = Source(names[-1], optional=True)
    phases = []
    for phase, share in enumerate(rng.dirichlet(np.full(rng.integers(1, 6), 3.0)).tolist()):
        weights = random_weights(rng, names) | {"s0": float(rng.random()) + 0.01 if rng.random() < 0.9 else 1e-3}
        ramp = phase > 0 and rng.random() < 0.5
        replay = float(rng.random()) if phase > 0 and rng.random() < 0.3 else 0.0
        phases.append(Phase(share=share, replay=replay, **{"ramp_to" if ramp else "weights": weights}))
    rows_per_epoch.pop(missing, None)
    return Plan(MixtureConfig(sources, tuple(phases)), rows_per_epoch, int(rng.integers(300, 700)), 16)
