"""The few endpoints of the Hugging Face Hub that sharing uses, on loopback: repositories in memory, one token that may
write, private and gated repositories, branches. Files go inside the commit (the hub's way for small ones)."""

import base64
import contextlib
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_the_owner"


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, bytes], message: str = "") -> str:
        sha = hashlib.sha1(f"{len(self.commits)} {message}".encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        self.messages.append(message)
        return sha

    def at(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.branches.get(revision)


class _RefusedError(Exception):
    def __init__(self, status: int, code: str = "", message: str = "", **more: str):
        self.status, self.code, self.message, self.more = status, code, message, more


class FakeHub:
    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.asked: list[str] = []
        self.fail_with = 0
        """Answer everything with this status."""

    def new(self, name: str, **facts: bool) -> Repo:
        self.repos[name] = Repo(**facts)
        self.repos[name].commit("main", {".gitattributes": b""})
        return self.repos[name]

    def handle(self, method: str, path: str, token: str | None, body: bytes) -> tuple[dict[str, str], bytes]:
        if self.fail_with:
            raise _RefusedError(self.fail_with, message="the fake hub rests")
        if path == "/api/validate-yaml":
            return _json({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self._create(token, json.loads(body))
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit|branch)/(.+)", path):
            return self._write(found[1], found[2], unquote(found[3]), token, body)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/(.+))?", path):
            sha = self._visible(found[1], unquote(found[3] or "main"), token)[1]
            return _json({"id": found[1], "sha": sha, "siblings": []})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/(.+)", path):
            repo, sha = self._visible(found[1], unquote(found[2]), token)
            return _json([{"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                          for name, data in repo.commits[sha].items()])
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            repo, sha = self._visible(found[1], unquote(found[2]), token)
            if repo.gated:
                raise _RefusedError(403, "GatedRepo")
            data = repo.commits[sha].get(found[3])
            if data is None:
                raise _RefusedError(404, "EntryNotFound")
            return {"X-Repo-Commit": sha, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}, data
        raise _RefusedError(404, message=f"the fake hub has no {method} {path}")

    def _create(self, token, asked):
        if token != TOKEN:
            raise _RefusedError(403, message="You don't have the rights to create a model under this namespace")
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.repos:
            raise _RefusedError(409, message="You already created this model repo", url=f"https://huggingface.co/{name}")
        self.new(name, private=asked.get("visibility") == "private")
        return _json({"url": f"https://huggingface.co/{name}"})

    def _visible(self, name, revision, token):
        repo = self.repos.get(name)
        if repo is None or (repo.private and token != TOKEN):
            raise _RefusedError(404 if token else 401, "RepoNotFound")
        if repo.gated and token != TOKEN:
            raise _RefusedError(401, "GatedRepo")
        sha = repo.at(revision)
        if sha is None:
            raise _RefusedError(404, "RevisionNotFound")
        return repo, sha

    def _write(self, name, kind, revision, token, body):
        repo = self.repos.get(name)
        if repo is None:
            raise _RefusedError(404, "RepoNotFound")
        if token != TOKEN:
            raise _RefusedError(403, message="Forbidden: pass a token with write access")
        if kind == "branch":
            if revision in repo.branches:
                raise _RefusedError(409, message="Reference already exists")
            repo.branches[revision] = repo.branches["main"]
            return _json({})
        if repo.at(revision) is None:
            raise _RefusedError(404, "RevisionNotFound")
        if kind == "preupload":
            return _json({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                                    for f in json.loads(body)["files"]]})
        files, message = dict(repo.commits[repo.at(revision)]), ""
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise _RefusedError(400, message=line["key"])
        sha = repo.commit(revision, files, message)
        return _json({"commitUrl": f"https://huggingface.co/{name}/commit/{sha}", "commitOid": sha, "success": True})


def _json(value):
    return {"Content-Type": "application/json"}, json.dumps(value).encode()


@contextlib.contextmanager
def running():
    """(the hub, its address); ended at the block's end."""
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
            path = urlsplit(self.path).path
            hub.asked.append(f"{self.command} {path}")
            try:
                status, (headers, data) = 200, hub.handle(self.command, path, token, body)
            except _RefusedError as no:
                status, data = no.status, json.dumps({"error": no.message, **no.more}).encode()
                headers = {"X-Error-Code": no.code, "X-Error-Message": no.message}
                headers = {k: v for k, v in headers.items() if v}
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_GET = do_HEAD = do_POST = answer  # noqa: N815 (the library's names)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


@contextlib.contextmanager
def used(monkeypatch, cache):
    """The hub that huggingface_hub finds in this process, with an empty cache beside it. It reads the environment at
    import, so its constants are set."""
    from huggingface_hub import constants

    with running() as (server, url):
        point_to(monkeypatch, url)
        monkeypatch.setattr(constants, "HF_URL_HOSTS", constants.HF_URL_HOSTS | {"127.0.0.1"})
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        server.url = url
        yield server


def point_to(monkeypatch, url):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


def environment(url, home):
    """The same for a process of its own, as its owner has it."""
    return {"HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home), "HF_TOKEN": TOKEN}
