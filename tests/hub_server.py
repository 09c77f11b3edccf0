"""A stand-in for the Hugging Face Hub: what its client asks over HTTP to make a repository, upload
a folder and download a snapshot (with HF_HUB_DISABLE_XET=1: large files go by git LFS)."""

import base64
import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote


class Repositories:
    """Content by repository, revision and path; objects of git LFS by sha256."""

    def __init__(self):
        self.files = {}  # repository: {revision: {path: bytes}}
        self.objects = {}
        self.requests = []

    def commit_id(self, repository, revision):
        files = self.files[repository][revision]
        text = "".join(f"{p}{hashlib.sha256(c).hexdigest()}" for p, c in sorted(files.items()))
        return hashlib.sha1(text.encode()).hexdigest()

    def resolve(self, repository, revision):
        """(commit, files) of a branch or a commit; None for neither."""
        for branch, files in self.files.get(repository, {}).items():
            commit = self.commit_id(repository, branch)
            if revision in (branch, commit):
                return commit, files
        return None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self):
        return self.server.hub

    def answer(self, content=b"", status=200, **headers):
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
            headers.setdefault("Content-Type", "application/json")
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def handle_one(self):
        path = unquote(self.path.partition("?")[0])
        length = int(self.headers.get("Content-Length") or 0)
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(length)
        self.hub.requests.append((self.command, path))
        for method, pattern, function in ROUTES:
            found = re.fullmatch(pattern, path)
            if self.command in method and found:
                return function(self, body, *found.groups())
        return self.answer({"error": f"{self.command} {path}"}, 404)

    do_GET = do_HEAD = do_POST = do_PUT = handle_one

    def log_message(self, *args):
        pass

    def url(self, path):
        return "http://{}:{}{}".format(*self.server.server_address, path)

    def create(self, body):
        facts = json.loads(body)
        name = "/".join(filter(None, (facts.get("organization"), facts["name"])))
        if name in self.hub.files:
            return self.answer({"error": "exists", "url": self.url("/" + name)}, 409)
        self.hub.files[name] = {"main": {}}
        return self.answer({"url": self.url("/" + name), "name": name})

    def branch(self, body, repository, branch):
        branches = self.hub.files[repository]
        if branch in branches:
            return self.answer({"error": "exists"}, 409)
        branches[branch] = dict(branches["main"])
        return self.answer()

    def preupload(self, body, repository, revision):
        def mode(path):
            return "lfs" if path.endswith(".safetensors") else "regular"

        paths = [file["path"] for file in json.loads(body)["files"]]
        files = [{"path": p, "uploadMode": mode(p), "shouldIgnore": False} for p in paths]
        return self.answer({"files": files})

    def lfs_batch(self, body, repository):
        objects = []
        for item in json.loads(body)["objects"]:
            upload = {"href": self.url("/lfs/" + item["oid"])}
            objects.append({**item, "actions": {"upload": upload}})
        return self.answer({"transfer": "basic", "objects": objects})

    def lfs_put(self, body, oid):
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.objects[oid] = body
        return self.answer()

    def commit(self, body, repository, revision):
        files = self.hub.files[repository][revision]
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
        commit = self.hub.commit_id(repository, revision)
        url = self.url(f"/{repository}/commit/{commit}")
        return self.answer({"commitUrl": url, "commitOid": commit, "success": True})

    def info(self, body, repository, revision="main"):
        found = self.hub.resolve(repository, revision)
        if found is None:
            return self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        siblings = [{"rfilename": path, "size": len(c)} for path, c in found[1].items()]
        return self.answer({"id": repository, "sha": found[0], "siblings": siblings})

    def tree(self, body, repository, revision):
        def entry(path, content):
            oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            return {"type": "file", "path": path, "size": len(content), "oid": oid}

        files = self.hub.resolve(repository, revision)[1]
        return self.answer([entry(*item) for item in files.items()])

    def resolve(self, body, repository, revision, path):
        commit, files = self.hub.resolve(repository, revision)
        if path not in files:
            return self.answer({"error": "no entry"}, 404, X_Error_Code="EntryNotFound")
        etag = f'"{hashlib.sha256(files[path]).hexdigest()}"'
        return self.answer(files[path], ETag=etag, X_Repo_Commit=commit)


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES = (
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", lambda self, body: self.answer({"errors": [], "warnings": []})),
    ("POST", f"/api/models/{NAME}/branch/(.+)", Handler.branch),
    ("POST", f"/api/models/{NAME}/preupload/(.+)", Handler.preupload),
    ("POST", f"/api/models/{NAME}/commit/(.+)", Handler.commit),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", "/lfs/([0-9a-f]+)", Handler.lfs_put),
    ("GET", f"/api/models/{NAME}(?:/revision/(.+))?", lambda s, b, r, v: s.info(b, r, v or "main")),
    ("GET", f"/api/models/{NAME}/tree/(.+)", Handler.tree),
    ("HEAD GET", f"/{NAME}/resolve/([^/]+)/(.+)", Handler.resolve),
)


def serve(port=0):
    """A server of an empty Hub on 127.0.0.1; its `hub` is what it holds."""
    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.hub = Repositories()
    return server
