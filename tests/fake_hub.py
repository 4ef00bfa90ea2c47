"""A fake Hugging Face Hub for tests: on loopback, in memory, without git.

It implements the requests with which `huggingface_hub` creates a repository, uploads a folder and downloads it, and
those with which `datasets` reads a dataset (tests/fake_hub_datasets.py). Weights
are uploaded by LFS (batch, PUT, verify, pointer in the commit), all other files base64-encoded in the commit, as on the
real Hub. Xet is not implemented, so clients need HF_HUB_DISABLE_XET=1 (see `FakeHub.environment`).

    with FakeHub() as hub:
        subprocess.run([...], env=hub.environment(home))
        assert hub.files["owner/name"]["config.json"] == ...
"""

import base64
import hashlib
import json
import os
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from fake_hub_datasets import DatasetRoutes, FakeDataset, Refused

TOKEN = "hf_fakeTokenThatNobodyMaySee0123456789"
# Variables that would lead a client past the fake Hub, or to a real account
_NOT_INHERITED = re.compile(r"(HF|HUGGING|TRANSFORMERS|XDG_CACHE)|.*_proxy$", re.IGNORECASE)


class FakeHub:
    """A Hub with one account, whose token is `TOKEN`; reading needs no token.

    Attributes:
        files: {repository: {path: content}} of the newest revisions.
        commits: (repository, summary, paths) in order.
        private: the repositories created as private.
        lfs: {sha256: content} of LFS uploads.
        requests: (method, path) of all requests.
        received: the bodies of all requests.
        failing: {pattern of "METHOD /path": status}, as in `{"POST .*/commit/": 500}`.
        changed: {path: content} served instead of the uploaded content.
        datasets: the dataset repositories, by name.
        sent: {path: bytes} of the files of datasets that were sent.
    """

    def __init__(self):
        self.files: dict[str, dict[str, bytes]] = {}
        self.commits: list[tuple[str, str, list[str]]] = []
        self.private: set[str] = set()
        self.lfs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.received: list[bytes] = []
        self.failing: dict[str, int] = {}
        self.changed: dict[str, bytes] = {}
        self.datasets: dict[str, FakeDataset] = {}
        self.sent: dict[str, int] = {}
        self.lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "FakeHub":
        self._thread.start()
        return self

    def __exit__(self, *failure) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def environment(self, home: Path, token: str | None = TOKEN) -> dict[str, str]:
        """The environment of a process that uses this Hub; `home` holds its cache and its login."""
        inherited = {name: value for name, value in os.environ.items() if not _NOT_INHERITED.match(name)}
        settings = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        return inherited | settings | ({"HF_TOKEN": token} if token else {})

    def add_dataset(self, name: str, *commits: dict[str, bytes], **settings) -> FakeDataset:
        """Adds a dataset with these commits, each {path: content} of all its files."""
        self.datasets[name] = FakeDataset(name, list(commits), **settings)
        return self.datasets[name]

    def revision(self, repository: str) -> str:
        """The id of the newest commit: 40 hexadecimal digits, as git's."""
        number = sum(commit[0] == repository for commit in self.commits)
        return hashlib.sha1(f"{repository} {number}".encode()).hexdigest()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address) -> None:
        """Reports errors, except of clients that closed the connection."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


def is_lfs(path: str) -> bool:
    return path.endswith((".safetensors", ".pt", ".pth"))


def _oid(path: str, content: bytes) -> str:
    """The id by which the client recognizes unchanged files: the sha256 of LFS files, git's blob id of others."""
    if is_lfs(path):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(DatasetRoutes, BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    # (method, path, handler, whether it needs the token)
    ROUTES = (
        ("POST", r"/api/repos/create", "create", True),
        ("POST", r"/api/validate-yaml", "validate_card", False),
        ("GET", r"/api/whoami-v2", "whoami", True),
        ("GET", r"/api/models/(?P<repository>[^/]+/[^/]+)/auth-check/write", "may_write", True),
        ("POST", r"/api/models/(?P<repository>[^/]+/[^/]+)/preupload/main", "preupload", True),
        ("POST", r"/api/models/(?P<repository>[^/]+/[^/]+)/commit/main", "commit", True),
        ("POST", r"/(?P<repository>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch", True),
        ("PUT", r"/lfs/upload/(?P<oid>[0-9a-f]{64})", "lfs_upload", False),  # the URL is the permission, as on S3
        ("POST", r"/lfs/verify", "lfs_verify", True),
        ("GET", r"/api/models/(?P<repository>[^/]+/[^/]+)(/revision/(?P<revision>[^/]+))?", "info", False),
        ("GET", r"/api/models/(?P<repository>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", "tree", False),
        ("GET", r"/(?P<repository>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve", False),
    )

    @property
    def hub(self) -> FakeHub:
        return self.server.hub

    @property
    def logged_in(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def log_message(self, *arguments) -> None:
        pass  # no log in the output of tests

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.body()
        with self.hub.lock:
            self.hub.requests.append((self.command, path))
            self.hub.received.append(body)
            try:
                for pattern, status in self.hub.failing.items():
                    if re.match(pattern, f"{self.command} {path}"):
                        raise Refused(status, f"fake failure {status}")
                status, headers, content = self.dispatch(path, body)
            except Refused as refused:
                headers = {"X-Error-Message": refused.message, "X-Error-Code": refused.code}
                status, content = refused.status, json.dumps(refused.more | {"error": refused.message}).encode()
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json"} | headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def dispatch(self, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        method = "GET" if self.command == "HEAD" else self.command
        for expected_method, pattern, name, needs_token in (*self.DATASET_ROUTES, *self.ROUTES):
            match = re.fullmatch(pattern, path)
            if expected_method != method or not match:
                continue
            if needs_token and not self.logged_in:
                raise Refused(401, "Invalid username or password.")
            given = {key: value for key, value in match.groupdict().items() if value is not None}
            reply = getattr(self, name)(body, **given)
            return reply if isinstance(reply, tuple) else (200, {}, json.dumps(reply).encode())
        raise Refused(404, f"the fake Hub has no {method} {path}")

    def repository_files(self, repository: str) -> dict[str, bytes]:
        if repository not in self.hub.files:
            raise Refused(404, "Repository not found", "RepoNotFound")
        return self.hub.files[repository]

    def files_at(self, repository: str, revision: str) -> dict[str, bytes]:
        files = self.repository_files(repository)
        if revision not in ("main", self.hub.revision(repository)):
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return files

    # The account and its repositories

    def whoami(self, body):
        return {"type": "user", "name": "owner", "orgs": [], "auth": {"accessToken": {"role": "write"}}}

    def may_write(self, body, repository):
        self.repository_files(repository)
        return {}

    def create(self, body):
        requested = json.loads(body)
        repository = f"{requested['organization']}/{requested['name']}"
        if repository in self.hub.files:
            raise Refused(409, "You already created this model repo", url=f"{self.hub.url}/{repository}")
        self.hub.files[repository] = {}
        if requested.get("private") or requested.get("visibility") == "private":
            self.hub.private.add(repository)
        return {"url": f"{self.hub.url}/{repository}", "name": repository, "id": repository}

    def info(self, body, repository, revision="main"):
        files = self.files_at(repository, revision)
        return {
            "id": repository,
            "sha": self.hub.revision(repository),
            "private": repository in self.hub.private,
            "tags": [],
            "siblings": [{"rfilename": path} for path in sorted(files)],
        }

    def tree(self, body, repository, revision, folder=""):
        files = self.files_at(repository, revision)
        below = {path: content for path, content in files.items() if not folder or path.startswith(folder + "/")}
        if folder and not below:
            raise Refused(404, f"{folder} does not exist", "EntryNotFound")
        entries = []
        for path, content in sorted(below.items()):
            entry = {"type": "file", "path": path, "size": len(content), "oid": _oid("", content)}
            if is_lfs(path):
                entry["lfs"] = {"oid": _oid(path, content), "size": len(content), "pointerSize": 134}
            entries.append(entry)
        return entries

    def resolve(self, body, repository, revision, path):
        files = self.files_at(repository, revision)
        if path not in files:
            raise Refused(404, f"{path} does not exist", "EntryNotFound")
        oid = _oid(path, files[path])
        headers = {
            "ETag": f'"{oid}"',
            "X-Repo-Commit": self.hub.revision(repository),
            "Content-Type": "application/octet-stream",
        }
        if is_lfs(path):
            headers |= {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(files[path]))}
        return 200, headers, self.hub.changed.get(path, files[path])

    # Uploads

    def validate_card(self, body):
        lines = json.loads(body)["content"].splitlines()
        if lines and lines[0] == "---" and "---" not in lines[1:]:
            raise Refused(400, "the card's metadata do not end")
        return {"errors": [], "warnings": []}

    def preupload(self, body, repository):
        files, answer = self.repository_files(repository), []
        for file in json.loads(body)["files"]:
            path = file["path"]
            mode = {"path": path, "uploadMode": "lfs" if is_lfs(path) else "regular", "shouldIgnore": False}
            answer.append(mode | ({"oid": _oid(path, files[path])} if path in files else {}))
        return {"files": answer}

    def commit(self, body, repository):
        files, summary, paths = self.repository_files(repository), "", []
        for line in body.splitlines():
            entry = json.loads(line)
            kind, value = entry["key"], entry["value"]
            if kind == "header":
                summary = value["summary"]
                continue
            paths.append(value["path"])
            if kind == "lfsFile":
                if value["oid"] not in self.hub.lfs:
                    raise Refused(400, f"the content of {value['path']} was never uploaded")
                files[value["path"]] = self.hub.lfs[value["oid"]]
            elif kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "deletedFile":
                del files[value["path"]]
            elif kind == "deletedFolder":
                for path in [path for path in files if path.startswith(value["path"])]:
                    del files[path]
            else:
                raise Refused(400, f"the fake Hub does not know {kind}")
        self.hub.commits.append((repository, summary, paths))
        oid = self.hub.revision(repository)
        return {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repository}/commit/{oid}"}

    def lfs_batch(self, body, repository):
        self.repository_files(repository)
        objects = []
        for requested in json.loads(body)["objects"]:
            actions = {
                "upload": {"href": f"{self.hub.url}/lfs/upload/{requested['oid']}"},
                "verify": {"href": f"{self.hub.url}/lfs/verify"},
            }
            objects.append(requested | ({} if requested["oid"] in self.hub.lfs else {"actions": actions}))
        return {"transfer": "basic", "objects": objects}

    def lfs_upload(self, body, oid):
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refused(400, "the content is not what its name says")
        self.hub.lfs[oid] = body
        return {}

    def lfs_verify(self, body):
        requested = json.loads(body)
        if len(self.hub.lfs.get(requested["oid"], b"")) != requested["size"]:
            raise Refused(404, "the content did not arrive")
        return {}
