"""The datasets of the fake Hub: revisions, cards, private and gated ones, and ranges of files for streaming."""

import hashlib
import json
from dataclasses import dataclass, field

import yaml

GATED_MESSAGE = "Access to dataset {name} is restricted. You must be authenticated to access it."


class Refused(Exception):
    """An error response, with the code and message that the client reads from its headers."""

    def __init__(self, status: int, message: str, code: str = "", **more: str):
        self.status, self.message, self.code, self.more = status, message, code, more


@dataclass
class FakeDataset:
    """A dataset repository.

    Attributes:
        commits: {path: content} of every commit, the newest last.
        names: names of revisions other than main -> index of their commit.
    """

    name: str
    commits: list[dict[str, bytes]] = field(default_factory=list)
    names: dict[str, int] = field(default_factory=dict)
    private: bool = False
    gated: bool = False

    def commit_id(self, index: int = -1) -> str:
        content = {path: hashlib.sha1(data).hexdigest() for path, data in sorted(self.commits[index].items())}
        return hashlib.sha1(json.dumps([self.name, content]).encode()).hexdigest()

    def files_at(self, revision: str) -> tuple[str, dict[str, bytes]]:
        """(commit, files) of a branch, tag or commit."""
        indices = {"main": len(self.commits) - 1} | self.names
        indices |= {self.commit_id(index): index for index in range(len(self.commits))}
        if revision not in indices:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commit_id(indices[revision]), self.commits[indices[revision]]


class DatasetRoutes:
    """What the handler of the fake Hub answers about datasets. `logged_in` says whether a request has the token."""

    # (method, path, handler, whether it needs the token)
    DATASET_ROUTES = (
        ("GET", r"/api/datasets/(?P<name>[^/]+/[^/]+)(/revision/(?P<revision>.+))?", "dataset_info", False),
        (
            "GET",
            r"/api/datasets/(?P<name>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?",
            "dataset_tree",
            False,
        ),
        ("POST", r"/api/datasets/(?P<name>[^/]+/[^/]+)/paths-info/(?P<revision>[^/]+)", "dataset_paths", False),
        ("GET", r"/datasets/(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "dataset_file", False),
    )

    def dataset(self, name: str) -> FakeDataset:
        """A dataset that the client may know about; a private one exists only for its owner, as on the real Hub."""
        dataset = self.hub.datasets.get(name)
        if dataset is None or (dataset.private and not self.logged_in):
            if self.logged_in:
                raise Refused(404, "Repository not found", "RepoNotFound")
            raise Refused(401, "Invalid username or password.")
        return dataset

    def dataset_info(self, body, name, revision="main"):
        dataset = self.dataset(name)
        commit, files = dataset.files_at(revision)
        return {
            "id": name,
            "sha": commit,
            "private": dataset.private,
            "gated": "auto" if dataset.gated else False,
            "tags": [],
            "cardData": _card_metadata(files),
            "siblings": [{"rfilename": path, "size": len(content)} for path, content in sorted(files.items())],
        }

    def dataset_tree(self, body, name, revision, folder=""):
        _, files = self.dataset(name).files_at(revision)
        below = {path: data for path, data in files.items() if not folder or path.startswith(folder + "/")}
        if folder and not below:
            raise Refused(404, f"{folder} does not exist", "EntryNotFound")
        start = len(folder) + 1 if folder else 0
        if "recursive=true" not in self.path.lower():
            folders = {path[: path.index("/", start)] for path in below if "/" in path[start:]}
            below = {path: data for path, data in below.items() if "/" not in path[start:]}
        else:
            folders = {path[:end] for path in below for end in range(start, len(path)) if path[end] == "/"}
        entries = [{"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in sorted(folders)]
        return entries + [_describe(path, data) for path, data in sorted(below.items())]

    def dataset_paths(self, body, name, revision):
        _, files = self.dataset(name).files_at(revision)
        paths = json.loads(body)["paths"]
        folders = {path for path in paths if any(file.startswith(f"{path}/") for file in files)}
        entries = [{"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in sorted(folders)]
        return entries + [_describe(path, files[path]) for path in paths if path in files]

    def dataset_file(self, body, name, revision, path):
        dataset = self.dataset(name)
        if dataset.gated and not self.logged_in:
            raise Refused(401, GATED_MESSAGE.format(name=name), "GatedRepo")
        commit, files = dataset.files_at(revision)
        if path not in files:
            raise Refused(404, f"{path} does not exist", "EntryNotFound")
        content = files[path]
        headers = {
            "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
            "X-Repo-Commit": commit,
            "Content-Type": "application/octet-stream",
            "Accept-Ranges": "bytes",
        }
        self.hub.sent[path] = self.hub.sent.get(path, 0)
        wanted = self.headers.get("Range", "").removeprefix("bytes=")
        if not wanted:
            if self.command == "GET":
                self.hub.sent[path] += len(content)
            return 200, headers, content
        first, _, last = wanted.partition("-")
        start, stop = int(first), min(int(last or len(content)) + 1, len(content))
        self.hub.sent[path] += stop - start
        return 206, headers | {"Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"}, content[start:stop]


def _describe(path: str, content: bytes) -> dict:
    return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


def _card_metadata(files: dict[str, bytes]) -> dict:
    parts = files.get("README.md", b"").decode().split("---\n")
    return yaml.safe_load(parts[1]) if len(parts) > 2 else {}
