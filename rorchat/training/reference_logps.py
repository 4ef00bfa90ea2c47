"""The reference's log-probabilities of all pairs, kept in the folder of a preference run.

Computing them is half of the forward passes of an epoch, and a resumed run would repeat it.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rorchat.files import json_sha256, to_json, write_atomically

#: By split (train, eval). Hidden: a folder that contains nothing else is not yet a run.
FILE_NAME = ".reference_{}.json"
SIDES = ("chosen", "rejected")


def build_fingerprint(pairs: Iterable[dict], **settings: object) -> str:
    """SHA-256 of everything that determines the log-probabilities: the ids of all pairs, weights, precision ..."""
    digest = hashlib.sha256(to_json(settings, sort_keys=True).encode())
    for pair in pairs:
        for ids in (pair["prompt_ids"], *(pair[f"{side}_ids"] for side in SIDES)):
            digest.update(np.array([len(ids), *ids], np.int32).tobytes())
    return digest.hexdigest()


def read(path: Path, fingerprint: str) -> Tensor | None:
    """Log-probabilities (2, pairs), float32; None if the file is missing, damaged or has another fingerprint."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record.pop("sha256") != json_sha256(record) or record["of"] != fingerprint:
            return None
        return torch.tensor([record[side] for side in SIDES])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def write(path: Path, fingerprint: str, log_probs: Tensor) -> None:
    """Writes the log-probabilities (2, pairs) of chosen and rejected replies, with their checksum."""
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"of": fingerprint, **dict(zip(SIDES, log_probs.tolist(), strict=True))}
    write_atomically(path, to_json({**record, "sha256": json_sha256(record)}))
