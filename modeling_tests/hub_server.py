"""A Hugging Face Hub in memory, for tests: the real `huggingface_hub` client talks to it over HTTP through `HF_ENDPOINT`.

It speaks the part of the Hub's protocol that models need: repositories, private ones too, branches, tags and pull
requests, commits, small files in the commit itself, large ones by LFS (in one piece or in parts, checked against their
hash), file listings, and downloads with ETags, redirects to a file server on another host, and byte ranges. It does
not announce Xet, so the client needs `HF_HUB_DISABLE_XET=1` for uploads.

Faults are part of it: see `HubServer.break_next`.
"""

import base64
import hashlib
import json
import re
import threading
import time
import urllib.parse
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


# Who a token belongs to, and whether it may write
TOKENS = {
    "hf_alice": ("alice", True),
    "hf_bob": ("bob", True),
    "hf_alice_read": ("alice", False),
    "hf_reader": ("your-name", True),  # of docs/sharing.md
}
_LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".model", ".wav", ".flac", ".gz", ".zip")
_PAGE = 50


@dataclass
class Entry:
    """A file at one commit."""

    content: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def blob_id(self) -> str:
        """git's hash of the file, or of the pointer to it."""
        data = self.content
        if self.lfs:
            data = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize %d\n" % (
                self.sha256.encode(),
                len(data),
            )
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.blob_id


@dataclass
class Commit:
    oid: str
    title: str
    author: str
    files: dict[str, Entry]
    parents: list[str]


@dataclass
class Repo:
    id: str
    private: bool
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)  # "main", "refs/pr/1" and tags to commits
    tags: set[str] = field(default_factory=set)

    def add_commit(self, ref: str, title: str, author: str, files: dict[str, Entry]) -> Commit:
        parents = [self.refs[ref]] if ref in self.refs else []
        seed = json.dumps([title, author, parents, sorted((path, e.blob_id) for path, e in files.items())])
        oid = hashlib.sha1(f"{len(self.commits)} {seed}".encode()).hexdigest()
        commit = self.commits[oid] = Commit(oid, title, author, files, parents)
        self.refs[ref] = oid
        return commit

    def find(self, revision: str) -> Commit | None:
        return self.commits.get(self.refs.get(revision, revision))

    def history(self, revision: str) -> list[Commit]:
        commit, found = self.find(revision), []
        while commit is not None:
            found.append(commit)
            commit = self.commits[commit.parents[0]] if commit.parents else None
        return found


@dataclass
class Fault:
    """What happens to the next requests of one kind instead of, or to, the right answer."""

    method: str
    path: str  # a regular expression
    times: int
    status: int | None = None
    message: str = "the test wants this to fail"
    cut_after: int | None = None  # bytes of the answer before the connection is closed
    corrupt: bool = False  # the content's last byte is another one, coming (downloads) or arriving (uploads)


class HubServer:
    """The server's state; `with HubServer() as hub:` runs it on `hub.endpoint`.

    Attributes:
        repos: By name, `"alice/model"`.
        storage: Content of large files by SHA-256, uploaded and maybe not in any commit.
        requests: `(method, path, headers)` of what was asked.
        part_size: Files larger than this are uploaded in parts of so many bytes.
    """

    def __init__(self, part_size: int = 1 << 30):
        self.repos: dict[str, Repo] = {}
        self.storage: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.requests: list[tuple[str, str, dict]] = []
        self.part_size = part_size
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self._httpd = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._httpd.daemon_threads = True
        self._httpd.hub = self

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._httpd.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exc) -> None:
        self._httpd.shutdown()
        self._httpd.server_close()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._httpd.server_address[1]}"

    @property
    def file_endpoint(self) -> str:
        """Where large files lie: another host name, to which a client must not send its token."""
        return f"http://localhost:{self._httpd.server_address[1]}"

    def break_next(self, method: str, path: str, times: int = 1, **how) -> Fault:
        """Lets the next `times` requests whose path has a match of the regular expression `path` go wrong: `status`,
        `cut_after` or `corrupt` of [`Fault`]."""
        fault = Fault(method, path, times, **how)
        with self.lock:
            self.faults.append(fault)
        return fault

    def take_fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """The files of a repository, by path; none if there was no commit yet."""
        commit = self.repos[repo].find(revision)
        return {} if commit is None else {path: entry.content for path, entry in commit.files.items()}

    def put(self, repo: str, files: dict[str, bytes], revision: str = "main", private: bool = False) -> str:
        """Commits files without a client, over what is there; returns the commit."""
        with self.lock:
            found = self.repos.setdefault(repo, Repo(repo, private))
            before = found.find(revision)
            entries = {} if before is None else dict(before.files)
            for path, content in files.items():
                entries[path] = Entry(content, path.endswith(_LFS_SUFFIXES))
                if entries[path].lfs:
                    self.storage[entries[path].sha256] = content
            return found.add_commit(revision, "put", "test", entries).oid


class _Refused(Exception):
    def __init__(self, status: int, message: str, code: str | None = None, headers: dict | None = None):
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, headers or {}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "TestHub"

    def log_message(self, *args) -> None:
        pass

    @property
    def hub(self) -> HubServer:
        return self.server.hub

    # --- the frame of a request -------------------------------------------------------------------------------------

    def _handle(self) -> None:
        split = urllib.parse.urlsplit(self.path)
        self.query = dict(urllib.parse.parse_qsl(split.query))
        self.route = split.path
        self.body = self._read_body()
        self.fault = self.hub.take_fault(self.command, self.route)
        with self.hub.lock:
            self.hub.requests.append(
                (self.command, self.route, {name.lower(): value for name, value in self.headers.items()})
            )
        try:
            if self.fault and self.fault.status:
                raise _Refused(self.fault.status, self.fault.message)
            if self.fault and self.fault.cut_after == 0:
                self._hang_up()
                return
            self._dispatch()
        except _Refused as refused:
            headers = {"X-Error-Message": refused.message, **refused.headers}
            if refused.code:
                headers["X-Error-Code"] = refused.code
            self._send(refused.status, {"error": refused.message}, headers)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle

    def _read_body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            pieces = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.close()

    def _send(self, status: int, body=b"", headers: dict | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Length": str(len(data)), **(headers or {})}
        if not isinstance(body, bytes):
            headers.setdefault("Content-Type", "application/json")
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value.replace("\n", " "))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault and self.fault.corrupt and data:
            data = data[:-1] + bytes([data[-1] ^ 1])
        if self.fault and self.fault.cut_after is not None and self.fault.cut_after < len(data):
            self.wfile.write(data[: self.fault.cut_after])
            self.wfile.flush()
            time.sleep(0.05)  # what was sent arrives
            self._hang_up()
        else:
            self.wfile.write(data)

    def _dispatch(self) -> None:
        for method, pattern, action in _ROUTES:
            if method == self.command and (match := pattern.fullmatch(self.route)):
                action(self, *(urllib.parse.unquote(group or "") for group in match.groups()))
                return
        raise _Refused(404, f"the test's hub has no {self.command} {self.route}")

    # --- who may do what --------------------------------------------------------------------------------------------

    def _user(self) -> tuple[str | None, bool]:
        header = self.headers.get("Authorization")
        if header is None:
            return None, False
        token = header.removeprefix("Bearer ")
        if token not in TOKENS:
            raise _Refused(401, "Invalid credentials in Authorization header")
        return TOKENS[token]

    def _repo(self, name: str, write: bool = False) -> Repo:
        user, may_write = self._user()
        repo = self.hub.repos.get(name)
        owner = name.split("/")[0]
        if repo is None or (repo.private and user != owner):
            # Nobody is told that a private repository exists
            status = 401 if user is None else 404
            raise _Refused(status, "Repository not found", "RepoNotFound")
        if write and user is None:
            raise _Refused(401, "Invalid username or password.")
        if write and (user != owner or not may_write):
            raise _Refused(
                403,
                f"You don't have the rights to update {name}. Make sure your token has the correct permissions.",
            )
        return repo

    def _commit(self, repo: Repo, revision: str) -> Commit:
        commit = repo.find(revision or "main")
        if commit is None:
            raise _Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    # --- accounts and repositories ----------------------------------------------------------------------------------

    def whoami(self) -> None:
        user, may_write = self._user()
        if user is None:
            raise _Refused(401, "Invalid credentials in Authorization header")
        role = "write" if may_write else "read"
        self._send(
            200,
            {
                "type": "user",
                "name": user,
                "orgs": [],
                "auth": {"type": "access_token", "accessToken": {"displayName": "test", "role": role}},
            },
        )

    def create_repo(self) -> None:
        user, may_write = self._user()
        if user is None:
            raise _Refused(401, "Invalid username or password.")
        fields = json.loads(self.body)
        owner = fields.get("organization") or user
        name = f"{owner}/{fields['name']}"
        if owner != user or not may_write:
            raise _Refused(403, f'You don\'t have the rights to create a model under the namespace "{owner}".')
        private = fields.get("visibility") == "private" or bool(fields.get("private"))
        with self.hub.lock:
            exists = name in self.hub.repos
            if not exists:
                repo = self.hub.repos[name] = Repo(name, private)
                repo.add_commit("main", "initial commit", user, {".gitattributes": Entry(b"", False)})
        answer = {"url": f"{self.hub.endpoint}/{name}", "name": name, "id": name}
        if exists:
            answer["error"] = "You already created this model repo"
        self._send(409 if exists else 200, answer)

    def delete_repo(self) -> None:
        fields = json.loads(self.body)
        name = f"{fields.get('organization') or self._user()[0]}/{fields['name']}"
        self._repo(name, write=True)
        del self.hub.repos[name]
        self._send(200, {})

    def validate_yaml(self) -> None:
        self._send(200, {"errors": [], "warnings": []})

    def refs(self, name: str) -> None:
        repo = self._repo(name)
        answer: dict = {"branches": [], "converts": [], "tags": [], "pullRequests": []}
        for ref, oid in repo.refs.items():
            kind = "pullRequests" if ref.startswith("refs/pr/") else "tags" if ref in repo.tags else "branches"
            prefix = {"pullRequests": "", "tags": "refs/tags/", "branches": "refs/heads/"}[kind]
            answer[kind].append({"name": ref, "ref": prefix + ref, "targetCommit": oid})
        self._send(200, answer)

    def create_branch(self, name: str, branch: str) -> None:
        repo = self._repo(name, write=True)
        if branch in repo.refs:
            raise _Refused(409, f"Reference already exists: {branch}")
        start = json.loads(self.body or b"{}").get("startingPoint", "main")
        repo.refs[branch] = self._commit(repo, start).oid
        self._send(200, {})

    def create_tag(self, name: str, revision: str) -> None:
        repo, tag = self._repo(name, write=True), json.loads(self.body)["tag"]
        if tag in repo.refs:
            raise _Refused(409, f"Tag reference exists already: {tag}")
        repo.refs[tag] = self._commit(repo, revision).oid
        repo.tags.add(tag)
        self._send(200, {})

    def delete_ref(self, name: str, ref: str) -> None:
        repo = self._repo(name, write=True)
        if repo.refs.pop(ref, None) is None:
            raise _Refused(404, f"no such reference: {ref}", "RevisionNotFound")
        repo.tags.discard(ref)
        self._send(200, {})

    def commits(self, name: str, revision: str) -> None:
        history = self._repo(name).history(revision)
        self._send(
            200,
            [
                {
                    "id": commit.oid,
                    "title": commit.title,
                    "message": "",
                    "date": "2026-01-01T00:00:00.000Z",
                    "authors": [{"user": commit.author}],
                }
                for commit in history
            ],
        )

    # --- listings ---------------------------------------------------------------------------------------------------

    def info(self, name: str, revision: str = "") -> None:
        repo = self._repo(name)
        commit = self._commit(repo, revision)
        self._send(
            200,
            {
                "_id": "0",
                "id": name,
                "modelId": name,
                "sha": commit.oid,
                "private": repo.private,
                "gated": repo.gated,
                "disabled": False,
                "tags": [],
                "siblings": [{"rfilename": path} for path in commit.files],
            },
        )

    @staticmethod
    def _describe(path: str, entry: Entry) -> dict:
        described = {"type": "file", "path": path, "size": len(entry.content), "oid": entry.blob_id}
        if entry.lfs:
            described["lfs"] = {"oid": entry.sha256, "size": len(entry.content), "pointerSize": 134}
        return described

    def tree(self, name: str, revision: str, folder: str = "") -> None:
        commit = self._commit(self._repo(name), revision)
        prefix = f"{folder}/" if folder else ""
        rows, folders = [], set()
        for path, entry in sorted(commit.files.items()):
            if not path.startswith(prefix):
                continue
            parents = path[len(prefix) :].split("/")[:-1]
            for depth in range(1, len(parents) + 1):
                folders.add(prefix + "/".join(parents[:depth]))
            if not parents or self.query.get("recursive", "").lower() == "true":
                rows.append(self._describe(path, entry))
        if self.query.get("recursive", "").lower() != "true":
            folders = {path for path in folders if "/" not in path[len(prefix) :]}
        rows += [
            {"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0}
            for path in sorted(folders)
        ]
        if folder and not rows:
            raise _Refused(404, f"{folder} does not exist on {revision!r}", "EntryNotFound")
        start = int(self.query.get("cursor", 0))
        headers = {}
        if start + _PAGE < len(rows):
            query = urllib.parse.urlencode({**self.query, "cursor": start + _PAGE})
            headers["Link"] = f'<{self.hub.endpoint}{self.route}?{query}>; rel="next"'
        self._send(200, rows[start : start + _PAGE], headers)

    def paths_info(self, name: str, revision: str) -> None:
        commit = self._commit(self._repo(name), revision)
        if "json" in self.headers.get("Content-Type", ""):
            paths = json.loads(self.body)["paths"]
        else:
            paths = urllib.parse.parse_qs(self.body.decode()).get("paths", [])
        self._send(200, [self._describe(path, commit.files[path]) for path in paths if path in commit.files])

    # --- uploads ----------------------------------------------------------------------------------------------------

    def preupload(self, name: str, revision: str) -> None:
        repo = self._repo(name, write="create_pr" not in self.query)
        commit = self._commit(repo, revision)
        answer = []
        for file in json.loads(self.body)["files"]:
            path, known = file["path"], commit.files.get(file["path"])
            lfs = path.endswith(_LFS_SUFFIXES) or file["size"] > 1 << 20
            row = {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            if known is not None:
                row["oid"] = known.etag
            answer.append(row)
        self._send(200, {"files": answer, "commitOid": commit.oid})

    def _uploader(self, name: str) -> None:
        """Content may come from everybody who has an account: it may be for a pull request."""
        self._repo(name)
        if not self._user()[1]:
            raise _Refused(403, "This token may not write.")

    def lfs_batch(self, name: str) -> None:
        self._uploader(name)
        request = json.loads(self.body)
        objects = []
        for item in request["objects"]:
            oid, size = item["oid"], item["size"]
            answer: dict = {"oid": oid, "size": size}
            if oid not in self.hub.storage:
                verify = {"href": f"{self.hub.endpoint}/api/lfs-verify/{name}"}
                if size > self.hub.part_size:
                    number = -(-size // self.hub.part_size)
                    header = {
                        f"{part:05d}": f"{self.hub.file_endpoint}/lfs-part/{oid}/{part}"
                        for part in range(1, number + 1)
                    }
                    header["chunk_size"] = str(self.hub.part_size)
                    upload = {"href": f"{self.hub.endpoint}/api/lfs-complete/{oid}", "header": header}
                else:
                    upload = {"href": f"{self.hub.file_endpoint}/lfs-object/{oid}"}
                answer["actions"] = {"upload": upload, "verify": verify}
            objects.append(answer)
        multipart = any(item["size"] > self.hub.part_size for item in request["objects"])
        self._send(200, {"transfer": "multipart" if multipart else "basic", "objects": objects})

    def _received(self) -> bytes:
        data = self.body
        if self.fault and self.fault.corrupt and data:
            self.fault = None  # it went wrong on the way in, not on the way out
            data = data[:-1] + bytes([data[-1] ^ 1])
        return data

    def lfs_put(self, oid: str) -> None:
        self.hub.storage[oid] = self._received()
        self._send(200)

    def lfs_put_part(self, oid: str, part: str) -> None:
        data = self._received()
        self.hub.parts[oid, int(part)] = data
        self._send(200, b"", {"ETag": f'"{hashlib.md5(data).hexdigest()}"'})

    def lfs_complete(self, oid: str) -> None:
        parts = json.loads(self.body)["parts"]
        pieces = []
        for row in parts:
            data = self.hub.parts.get((oid, row["partNumber"]))
            if data is None or hashlib.md5(data).hexdigest() != row["etag"].strip('"'):
                raise _Refused(400, f"part {row['partNumber']} is missing or another one")
            pieces.append(data)
        self.hub.storage[oid] = b"".join(pieces)
        self._send(200, {})

    def lfs_verify(self, name: str) -> None:
        self._uploader(name)
        item = json.loads(self.body)
        content = self.hub.storage.get(item["oid"])
        if content is None or hashlib.sha256(content).hexdigest() != item["oid"] or len(content) != item["size"]:
            self.hub.storage.pop(item["oid"], None)
            raise _Refused(400, f"Integrity check failed: the object received is not {item['oid']}")
        self._send(200, {})

    def commit(self, name: str, revision: str) -> None:
        as_request = "create_pr" in self.query
        repo = self._repo(name, write=not as_request)
        with self.hub.lock:
            base = self._commit(repo, revision)
            files = dict(base.files)
            title = ""
            for line in self.body.splitlines():
                row = json.loads(line)
                key, value = row["key"], row["value"]
                if key == "header":
                    title = value["summary"]
                    parent = value.get("parentCommit")
                    if parent and not base.oid.startswith(parent):
                        raise _Refused(412, "A commit has happened since. Please refresh and try again.")
                elif key == "file":
                    files[value["path"]] = Entry(base64.b64decode(value["content"]), False)
                elif key == "lfsFile":
                    content = self.hub.storage.get(value["oid"])
                    if content is None:
                        raise _Refused(400, f"LFS pointer pointed to a file that does not exist: {value['oid']}")
                    files[value["path"]] = Entry(content, True)
                elif key == "deletedFile":
                    if files.pop(value["path"], None) is None:
                        raise _Refused(404, "A file with this name doesn't exist", "EntryNotFound")
                elif key == "deletedFolder":
                    files = {path: e for path, e in files.items() if not path.startswith(value["path"])}
            ref = revision
            if as_request:
                ref = f"refs/pr/{1 + sum(ref.startswith('refs/pr/') for ref in repo.refs)}"
                repo.refs[ref] = base.oid
            done = repo.add_commit(ref, title, self._user()[0] or "", files)
        answer = {
            "success": True,
            "commitOid": done.oid,
            "commitUrl": f"{self.hub.endpoint}/{name}/commit/{done.oid}",
            "hookOutput": "",
        }
        if as_request:
            answer["pullRequestUrl"] = f"{self.hub.endpoint}/{name}/discussions/{ref.rsplit('/')[-1]}"
        self._send(200, answer)

    # --- downloads --------------------------------------------------------------------------------------------------

    def resolve(self, name: str, revision: str, path: str) -> None:
        repo = self._repo(name)
        user, _ = self._user()
        if repo.gated and user != name.split("/")[0]:
            raise _Refused(401 if user is None else 403, f"Access to model {name} is restricted.", "GatedRepo")
        commit = self._commit(repo, revision)
        headers = {"X-Repo-Commit": commit.oid}
        entry = commit.files.get(path)
        if entry is None:
            raise _Refused(404, "Entry not found", "EntryNotFound", headers)
        if not entry.lfs:
            self._send_content(entry.content, {**headers, "ETag": f'"{entry.etag}"'})
            return
        headers["X-Linked-Etag"] = f'"{entry.etag}"'
        headers["X-Linked-Size"] = str(len(entry.content))
        headers["Location"] = f"{self.hub.file_endpoint}/lfs-object/{entry.sha256}"
        self._send(302, b"", headers)

    def lfs_get(self, oid: str) -> None:
        content = self.hub.storage.get(oid)
        if content is None:
            raise _Refused(404, "no such object")
        self._send_content(content, {"ETag": f'"{oid}"'})

    def _send_content(self, content: bytes, headers: dict) -> None:
        headers["Accept-Ranges"] = "bytes"
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if match is None:
            self._send(200, content, headers)
            return
        start, end = int(match[1]), int(match[2] or len(content) - 1)
        if start >= len(content):
            raise _Refused(416, "Range not satisfiable", headers={"Content-Range": f"bytes */{len(content)}"})
        headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
        self._send(206, content[start : end + 1], headers)


_NAME = "([^/]+/[^/]+)"
_API = f"/api/models/{_NAME}"
_ROUTES = [
    (method, re.compile(pattern), action)
    for methods, pattern, action in [
        ("GET", "/api/whoami-v2", _Handler.whoami),
        ("POST", "/api/repos/create", _Handler.create_repo),
        ("DELETE", "/api/repos/delete", _Handler.delete_repo),
        ("POST", "/api/validate-yaml", _Handler.validate_yaml),
        ("GET", f"{_API}/refs", _Handler.refs),
        ("POST", f"{_API}/branch/([^/]+)", _Handler.create_branch),
        ("DELETE", f"{_API}/(?:branch|tag)/([^/]+)", _Handler.delete_ref),
        ("POST", f"{_API}/tag/([^/]+)", _Handler.create_tag),
        ("GET", f"{_API}/commits/([^/]+)", _Handler.commits),
        ("GET HEAD", f"{_API}(?:/revision/([^/]+))?", _Handler.info),
        ("GET", f"{_API}/tree/([^/]+)(?:/(.+))?", _Handler.tree),
        ("POST", f"{_API}/paths-info/([^/]+)", _Handler.paths_info),
        ("POST", f"{_API}/preupload/([^/]+)", _Handler.preupload),
        ("POST", f"{_API}/commit/([^/]+)", _Handler.commit),
        ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
        ("PUT", "/lfs-object/([0-9a-f]{64})", _Handler.lfs_put),
        ("PUT", r"/lfs-part/([0-9a-f]{64})/(\d+)", _Handler.lfs_put_part),
        ("POST", "/api/lfs-complete/([0-9a-f]{64})", _Handler.lfs_complete),
        ("POST", f"/api/lfs-verify/{_NAME}", _Handler.lfs_verify),
        ("GET HEAD", "/lfs-object/([0-9a-f]{64})", _Handler.lfs_get),
        ("GET HEAD", f"/{_NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
    ]
    for method in methods.split()
]
