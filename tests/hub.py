"""A stand-in of the Hugging Face Hub on loopback: as much of its HTTP interface as huggingface_hub needs to fetch."""

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass
class Repository:
    """Commits in their order, each with its files by name; the last is ``main``."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    token: str | None = None
    gated: bool = False

    @property
    def newest(self) -> str:
        return list(self.commits)[-1]


@dataclass
class Hub:
    """What is served, and what was asked for.

    Attributes:
        url: For HF_ENDPOINT.
        repositories: By kind and name, as ``datasets/owner/name`` and ``models/owner/name``.
        requests: Methods and paths, in their order.
    """

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)

    def commit(self, name: str, files: Mapping[str, bytes | str | Path]) -> str:
        """Adds a commit to a repository, which is made where it is not there; returns its id."""
        contents = {
            path: file.read_bytes() if isinstance(file, Path) else file.encode() if isinstance(file, str) else file
            for path, file in files.items()
        }
        digest = hashlib.sha1(name.encode())
        for path in sorted(contents):
            digest.update(path.encode() + contents[path])
        self.repositories.setdefault(name, Repository()).commits[digest.hexdigest()] = contents
        return digest.hexdigest()

    def commit_directory(self, name: str, directory: Path) -> str:
        """A commit of all files of a directory."""
        return self.commit(
            name, {str(file.relative_to(directory)): file for file in directory.rglob("*") if file.is_file()}
        )

    def environment(self, home: Path) -> dict[str, str]:
        """What makes a process take this for the Hub, with its cache in ``home``."""
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
                "HF_HUB_DISABLE_TELEMETRY": "1"}  # fmt: skip


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def log_message(self, *_: object) -> None: ...

        def _answer(self, *, with_body: bool) -> None:
            path = unquote(urlsplit(self.path).path).strip("/")
            hub.requests.append(f"{self.command} {path}")
            status, headers, body = self._find(path)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def _find(self, path: str) -> tuple[int, dict[str, str], bytes]:
            api = path.startswith("api/")
            words = path.removeprefix("api/").split("/")
            if words[0] not in ("models", "datasets"):
                words = ["models", *words]
            name, rest = "/".join(words[:3]), words[3:]
            repository = hub.repositories.get(name)
            if repository is None:
                return 401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository Not Found"}, b""
            if repository.gated:
                return 403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"}, b""
            if repository.token and self.headers.get("Authorization") != f"Bearer {repository.token}":
                return 401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository Not Found"}, b""
            revision = rest[1] if len(rest) > 1 else "main"
            commit = repository.newest if revision == "main" else revision
            files = repository.commits.get(commit)
            if files is None:
                return 404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"}, b""
            if api and rest[:1] == ["tree"]:
                tree = [{"type": "file", "path": p, "size": len(b), "oid": _etag(b)} for p, b in files.items()]
                return 200, {"Content-Type": "application/json"}, json.dumps(tree).encode()
            if api:
                about = {"id": "/".join(words[1:3]), "sha": commit, "siblings": [{"rfilename": p} for p in files]}
                return 200, {"Content-Type": "application/json"}, json.dumps(about).encode()
            body = files.get("/".join(rest[2:]))
            if rest[:1] != ["resolve"] or body is None:
                return 404, {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}, b""
            return 200, {"ETag": f'"{_etag(body)}"', "X-Repo-Commit": commit}, body

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _etag(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
