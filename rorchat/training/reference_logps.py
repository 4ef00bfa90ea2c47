"""What the model that preference training begins with gives to every pair, kept in the run's folder.

It is half of the work of an epoch's forward passes, and a run that goes on would do it again at every start.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rorchat.files import json_sha256, write_atomically

#: Of the pairs to train on and of those to validate on; hidden, for a folder with nothing else is no run yet.
FILE = ".reference_{}.json"
SIDES = ("chosen", "rejected")


def key_of(pairs: Iterable[dict], **settings: object) -> str:
    """The sha256 of what log-probabilities hang on: the ids of all pairs, and settings (weights, precision ...)."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for pair in pairs:
        for ids in (pair["prompt_ids"], *(pair[f"{side}_ids"] for side in SIDES)):
            digest.update(np.array([len(ids), *ids], np.int32).tobytes())
    return digest.hexdigest()


def read(path: Path, key: str) -> Tensor | None:
    """What `keep` wrote under this key, (2, pairs), float32; None where the file is another's, damaged or not there."""
    try:
        said = json.loads(path.read_text())
        if said.pop("sha256") != json_sha256(said) or said["of"] != key:
            return None
        return torch.tensor([said[side] for side in SIDES])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def keep(path: Path, key: str, log_probabilities: Tensor) -> None:
    """Writes the log-probabilities (2, pairs) of chosen and rejected replies, sealed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    said = {"of": key, **dict(zip(SIDES, log_probabilities.tolist(), strict=True))}
    write_atomically(path, json.dumps({**said, "sha256": json_sha256(said)}))
