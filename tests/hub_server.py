"""A stand-in for the hub: repositories are made, commits received, and files of models and datasets sent."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote

COMMIT = "c" * 40


class HubServer(ThreadingHTTPServer):
    """``files`` are those of each repository (a dataset's name begins with ``datasets/``), ``sent`` those that somebody
    fetched; ``refuse`` answers everything with that status."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.made, self.files, self.refuse, self.sent = [], {}, None, []
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def add(self, repository, folder):
        """Hold the files of a folder."""
        paths = [path for path in folder.rglob("*") if path.is_file()]
        self.files[repository] = {str(path.relative_to(folder)): path.read_bytes() for path in paths}

    def reply(self, path, body):
        if path == "/api/repos/create":
            self.made.append(json.loads(body))
            return {"url": f"{self.url}/{self.made[-1].get('organization', 'me')}/{self.made[-1]['name']}"}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if path.endswith("/preupload/main"):
            files = [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]
            return {"files": files}
        if "/paths-info/" in path:
            repository, _, _ = path.removeprefix("/api/").removeprefix("models/").partition("/paths-info/")
            asked = parse_qs(body.decode())["paths"]
            return [entry for entry in self.entries(repository) if entry["path"] in asked]
        assert path.endswith("/commit/main"), path
        repository = path.removeprefix("/api/models/").removesuffix("/commit/main")
        for line in map(json.loads, body.decode().splitlines()):
            if line["key"] == "file":
                content = base64.b64decode(line["value"]["content"])
                self.files.setdefault(repository, {})[line["value"]["path"]] = content
        return {"commitUrl": f"{self.url}/{repository}/commit/1", "commitOid": "1", "success": True}

    def entries(self, repository):
        """What the hub says of each file."""
        files = self.files[repository].items()
        return [{"type": "file", "path": path, "size": len(data), "oid": _etag(data)} for path, data in files]

    def information(self, path):
        """What the hub says of a repository, or of its tree; None if it has no such thing."""
        name, _, tree = path.removeprefix("/api/").removeprefix("models/").partition("/tree/")
        name = name.partition("/revision/")[0]
        if name not in self.files:
            return None
        if tree:
            return self.entries(name)
        siblings = [{"rfilename": file} for file in self.files[name]]
        return {"id": name.removeprefix("datasets/"), "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}

    def file(self, path):
        """A file of a repository; None if there is none."""
        repository, _, rest = path.strip("/").partition("/resolve/")
        return self.files.get(repository, {}).get(unquote(rest.partition("/")[2]))


def _etag(data):
    return hashlib.sha1(data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else self._chunks()
        answer = json.dumps({} if self.server.refuse else self.server.reply(self.path.partition("?")[0], body)).encode()
        self._send(self.server.refuse or 200, answer, {"Content-Type": "application/json"})

    def _chunks(self):
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def do_GET(self):
        path = self.path.partition("?")[0]
        if path.startswith("/api/"):
            found = self.server.information(path)
            status = self.server.refuse or (404 if found is None else 200)
            self._send(
                status, json.dumps({} if found is None else found).encode(), {"Content-Type": "application/json"}
            )
            return
        data = self.server.file(path)
        if data is None:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        if self.command == "GET":
            self.server.sent.append(path)
        self._send(200, data, {"ETag": f'"{_etag(data)}"', "X-Repo-Commit": COMMIT})

    do_HEAD = do_GET

    def _send(self, status, body, headers):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args):
        pass
