"""Experiment trackers: Transformers writes to them what `metrics.jsonl` has."""

import importlib.util

from transformers.integrations import INTEGRATION_TO_CALLBACK

from rorchat.errors import UsageError, did_you_mean

#: The tested trackers, each with its packages, one of which must be installed.
TRACKERS = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "trackio": ("trackio",)}


def parse_trackers(report_to: str | list[str] | None) -> list[str]:
    """The experiment trackers, given as one name, names separated by commas, or a list; "none" for none.

    Raises:
        UsageError: Transformers does not know a tracker, or its package is not installed.
    """
    names = report_to.split(",") if isinstance(report_to, str) else report_to or []
    names = [name.strip() for name in names if name.strip() != "none"]
    for name in names:
        if name not in (*INTEGRATION_TO_CALLBACK, "all"):
            known = (*TRACKERS, *(known for known in INTEGRATION_TO_CALLBACK if known not in TRACKERS))
            raise UsageError(
                f"report_to: no tracker {name!r}.{did_you_mean(name, known)} Available: {', '.join(known)}."
            )
        packages = TRACKERS.get(name, ())
        if packages and not any(importlib.util.find_spec(package) for package in packages):
            raise UsageError(f"report_to {name} needs a package that is not installed: pip install {packages[0]}")
    return names
