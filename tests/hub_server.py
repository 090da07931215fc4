"""A model hub on this machine: the few requests that huggingface_hub sends to push and pull."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_tests"


class Hub(ThreadingHTTPServer):
    """Repositories by name: their files and whether they are private.

    Attributes:
        repos: files of each repository, by name.
        private: names of private repositories.
        commits: messages.
        blobs: large files, by SHA-256.
        refusal: status that every commit is answered with instead, or 0.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.commits: list[str] = []
        self.blobs: dict[str, bytes] = {}
        self.refusal = 0

    @property
    def commit(self) -> str:
        """The newest commit's name."""
        return hashlib.sha1(str(len(self.commits)).encode()).hexdigest()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub that answers while the block runs."""
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def answer(self, status: int, content: object = None, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"]))

    def do_POST(self) -> None:
        body = self.body()
        path = self.path.partition("?")[0]
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid username or password."})
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            return self.answer(200, {"warnings": [], "errors": []})
        if path.endswith("/objects/batch"):
            return self.batch(json.loads(body))
        if self.server.refusal:
            return self.answer(self.server.refusal, {"error": "no rights"})
        if path.endswith("/preupload/main"):
            return self.preupload(json.loads(body))
        return self.commit(path.removeprefix("/api/models/").removesuffix("/commit/main"), body)

    def create(self, wanted: dict) -> None:
        name = f"{wanted['organization']}/{wanted['name']}"
        url = {"url": f"{self.server.url}/{name}"}
        if name in self.server.repos:
            return self.answer(409, {"error": "You already created this model repo"} | url)
        self.server.repos[name] = {}
        if wanted.get("visibility") == "private" or wanted.get("private"):
            self.server.private.add(name)
        return self.answer(200, url | {"name": name, "id": "1"})

    def preupload(self, wanted: dict) -> None:
        files = [
            {"path": file["path"], "shouldIgnore": False,
             "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular"}
            for file in wanted["files"]
        ]  # fmt: skip
        self.answer(200, {"files": files})

    def batch(self, wanted: dict) -> None:
        objects = [
            entry | {"actions": {"upload": {"href": f"{self.server.url}/lfs/{entry['oid']}"}}}
            for entry in wanted["objects"]
        ]
        self.answer(200, {"transfer": "basic", "objects": objects})

    def do_PUT(self) -> None:
        content = self.body()
        oid = self.path.removeprefix("/lfs/")
        good = hashlib.sha256(content).hexdigest() == oid
        if good:
            self.server.blobs[oid] = content
        self.answer(200 if good else 400)

    def commit(self, name: str, body: bytes) -> None:
        for entry in map(json.loads, body.splitlines()):
            value = entry["value"]
            if entry["key"] == "header":
                self.server.commits.append(value["summary"])
            elif entry["key"] == "lfsFile":
                self.server.repos[name][value["path"]] = self.server.blobs[value["oid"]]
            else:
                self.server.repos[name][value["path"]] = base64.b64decode(value["content"])
        url = f"{self.server.url}/{name}/commit/{self.server.commit}"
        self.answer(200, {"success": True, "commitUrl": url, "commitOid": self.server.commit})

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        name, _, filename = path[1:].partition("/resolve/main/")
        if path.startswith("/api/models/"):
            name = path.removeprefix("/api/models/")
            private = name in self.server.private
            return self.answer(200, {"id": name, "private": private, "sha": self.server.commit})
        if name not in self.server.repos:
            return self.answer(401, X_Error_Code="RepoNotFound")
        if filename not in self.server.repos[name]:
            return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=self.server.commit)
        content = self.server.repos[name][filename]
        tag = hashlib.sha256(content).hexdigest()
        return self.answer(200, content, ETag=f'"{tag}"', X_Repo_Commit=self.server.commit)

    do_HEAD = do_GET
