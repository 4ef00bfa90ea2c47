"""The commits of the Hub's datasets that a run reads, which stay the same when it resumes."""

import sys
from collections.abc import Collection, Iterable

from rorchat.errors import RorchatError
from rorchat.sources.hub_dataset import find_commit
from rorchat.sources.registry import locate, pin_spec
from rorchat.tokens.store import store_folder

PINS = "hub"  # the key of run.json and of checkpoints


def find_pins(specs: Iterable[str], record: dict, optional: Collection[str] = ()) -> dict[str, str]:
    """{spec: the spec of the same rows at a commit}, for every source on the Hub.

    Args:
        record: run.json or the metadata of a checkpoint of the same run, whose commits are used again; {} for a new
            run. If the Hub has a newer commit, this is printed.
        optional: specs that may fail; these are left out.

    Raises:
        RorchatError: a dataset of a new run cannot be found.
    """
    known, recorded = record.get(PINS, {}), record.get("inputs", {}).get("sources", {})
    pins = {}
    for spec in specs:
        if store_folder(spec) or (spec in recorded and spec not in known):  # an earlier version recorded no commits
            continue
        if spec in known:
            pins[spec] = known[spec]
            _tell_change(spec, known[spec])
            continue
        try:
            pinned = pin_spec(spec)
        except RorchatError:
            if spec not in optional:
                raise
            continue
        if pinned != spec:
            pins[spec] = pinned
    return pins


def _tell_change(spec: str, pinned: str) -> None:
    asked, commit = locate(spec).dataset, locate(pinned).dataset
    assert asked is not None and commit is not None, "only rows on the Hub are pinned"
    try:
        newest = find_commit(asked)
    except RorchatError:  # training does not depend on the Hub
        return
    if newest != commit.revision:
        print(  # noqa: T201
            f"{spec}: the Hub now has revision {newest[:12]}; this run continues with {(commit.revision or '')[:12]}",
            file=sys.stderr,
        )
