"""A Hugging Face hub on the loopback: what huggingface_hub asks of the real one to send and to fetch a model."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_the_test"
Files = dict[str, bytes]


class FakeHub(ThreadingHTTPServer):
    """repositories: by USER/NAME whether each is private. commits: by repository, oldest first, a hash and the files.
    fetched: what was downloaded. broken: the paths whose requests fail, by a pattern.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.private: dict[str, bool] = {}
        self.commits: dict[str, list[tuple[str, Files]]] = {}
        self.objects: dict[str, bytes] = {}
        self.fetched: list[str] = []
        self.broken = "a path of none"

    def commit(self, name: str, files: Files) -> str:
        commits = self.commits[name]
        sha = hashlib.sha1(f"{name} {len(commits)}".encode()).hexdigest()
        commits.append((sha, (commits[-1][1] if commits else {}) | files))
        return sha

    def at(self, name: str, revision: str) -> tuple[str, Files] | None:
        commits = self.commits.get(name, [])
        if revision == "main":
            return commits[-1] if commits else None
        return next((each for each in commits if each[0] == revision), None)


class Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, status: int, content: Any, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def handle_all(self) -> None:
        hub, path = self.server, unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if re.search(hub.broken, path):
            return self.answer(403, {"error": "Forbidden by the test"})
        for pattern, action, public in ROUTES:
            found = re.fullmatch(f"{self.command} {pattern}", f"{self.command} {path}")
            if found is None:
                continue
            if not known and (not public or hub.private.get(found[1], False)):
                return self.answer(401, {"error": "Invalid credentials"}, X_Error_Message="Invalid credentials")
            return action(self, body, *found.groups())
        return self.answer(404, {"error": f"no such address: {path}"})

    do_GET = do_HEAD = do_POST = do_PUT = handle_all

    def whoami(self, body: bytes) -> None:
        self.answer(200, {"name": "tester", "type": "user", "orgs": []})

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked['organization'] or 'tester'}/{asked['name']}"
        new = name not in self.server.private
        if new:
            self.server.private[name] = asked.get("visibility") == "private"
            self.server.commits[name] = []
            self.server.commit(name, {})
        self.answer(200 if new else 409, {"url": f"{self.server.endpoint}/{name}"})

    def validate(self, body: bytes) -> None:
        import yaml

        _, front, _ = json.loads(body)["content"].split("---\n", 2)
        self.answer(200 if isinstance(yaml.safe_load(front), dict) else 400, {"errors": []})

    def preupload(self, body: bytes, name: str, revision: str) -> None:
        if name not in self.server.commits:
            return self.answer(404, {}, X_Error_Code="RepoNotFound")
        paths = [file["path"] for file in json.loads(body)["files"]]
        modes = {path: "lfs" if path.endswith(".safetensors") else "regular" for path in paths}
        files = [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]
        return self.answer(200, {"files": files})

    def batch(self, body: bytes, name: str) -> None:
        objects = [
            each | {"actions": {"upload": {"href": f"{self.server.endpoint}/lfs/{each['oid']}"}}}
            for each in json.loads(body)["objects"]
        ]
        self.answer(200, {"transfer": "basic", "objects": objects})

    def store(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.objects[oid] = body
        self.answer(200, {})

    def commit(self, body: bytes, name: str, revision: str) -> None:
        files: Files = {}
        for line in body.splitlines():
            item = json.loads(line)
            if item["key"] == "file":
                files[item["value"]["path"]] = base64.b64decode(item["value"]["content"])
            elif item["key"] == "lfsFile":
                files[item["value"]["path"]] = self.server.objects[item["value"]["oid"]]
        sha = self.server.commit(name, files)
        self.answer(200, {"commitUrl": f"{self.server.endpoint}/{name}/commit/{sha}", "commitOid": sha})

    def info(self, body: bytes, name: str, revision: str | None = None) -> None:
        found = self.server.at(name, revision or "main")
        if found is None:
            missing = "RevisionNotFound" if name in self.server.commits else "RepoNotFound"
            return self.answer(404, {}, X_Error_Code=missing)
        siblings = [{"rfilename": path} for path in found[1]]
        return self.answer(200, {"id": name, "sha": found[0], "siblings": siblings, "tags": [], "downloads": 0})

    def tree(self, body: bytes, name: str, revision: str) -> None:
        found = self.server.at(name, revision)
        assert found is not None
        self.answer(
            200,
            [
                {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for path, data in found[1].items()
            ],
        )

    def resolve(self, body: bytes, name: str, revision: str, path: str) -> None:
        found = self.server.at(name, revision)
        if found is None or path not in found[1]:
            return self.answer(404, {}, X_Error_Code="EntryNotFound")
        if self.command == "GET":
            self.server.fetched.append(path)
        etag = hashlib.sha1(found[1][path]).hexdigest()
        return self.answer(200, found[1][path], ETag=f'"{etag}"', X_Repo_Commit=found[0])


REPOSITORY = r"([\w.-]+/[\w.-]+)"
# Method and path, what answers, and whether a public repository is read without a token.
ROUTES: list[tuple[str, Any, bool]] = [
    ("/api/whoami-v2", Handler.whoami, False),
    ("/api/repos/create", Handler.create, False),
    ("/api/validate-yaml", Handler.validate, True),
    (f"/api/models/{REPOSITORY}/preupload/(.+)", Handler.preupload, False),
    (f"/{REPOSITORY}.git/info/lfs/objects/batch", Handler.batch, False),
    ("/lfs/([0-9a-f]+)", Handler.store, True),  # the real one signs such an address
    (f"/api/models/{REPOSITORY}/commit/(.+)", Handler.commit, False),
    (f"/api/models/{REPOSITORY}/tree/([^/]+)", Handler.tree, True),
    (f"/api/models/{REPOSITORY}/revision/(.+)", Handler.info, True),
    (f"/api/models/{REPOSITORY}", Handler.info, True),
    (f"/{REPOSITORY}/resolve/([^/]+)/(.+)", Handler.resolve, True),
]


@contextmanager
def serving() -> Iterator[FakeHub]:
    """A hub that runs as long as the context."""
    with FakeHub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        yield hub
        hub.shutdown()
        thread.join()
