"""A Hub on this machine, for tests: repositories, commits, LFS files, tokens and the checks of a card's header.

It speaks as much of the Hub's HTTP API as `huggingface_hub`, `transformers` and `evaluate` use to push and to load. It
is strict where the Hub is: on tokens, private repositories, names, revisions, sums and headers. What it does not know
is answered with 404 and kept in `unhandled`, so that a test can see that nothing went unanswered.

`huggingface_hub` reads its settings when it is imported, so what talks to this Hub runs in a fresh process:

    with LoopbackHub() as hub:
        done = run_script(hub, "from huggingface_hub import create_repo; create_repo('student')", home=tmp_path)
        assert done.returncode == 0, done.stderr
        assert hub.commits("tester/student") == ["initial commit"]
"""

import base64
import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml  # huggingface_hub needs it, so it is there

LFS_SUFFIXES = tuple(
    ".7z .arrow .bin .bz2 .ckpt .gz .h5 .joblib .model .msgpack .npy .npz .onnx .parquet .pb .pickle .pkl .png .pt"
    " .pth .safetensors .tar .tflite .tgz .xz .zip .zst".split()
)
GIT_ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()
INVALID_TOKEN = "Invalid credentials in Authorization header"  # huggingface_hub compares with this text
NAME = r"[A-Za-z0-9_][\w.-]{0,95}"
HEADER = re.compile(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", re.DOTALL)


class Refusal(Exception):
    """What the server will not do: a status, a message and the code that the client makes its exception of."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


@dataclass
class File:
    """A file at a commit."""

    data: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        """Its sum: sha256 of an LFS file, and what git calls a blob's name of another."""
        if self.lfs:
            return hashlib.sha256(self.data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()


@dataclass
class Commit:
    """The files after a commit, all of them."""

    sha: str
    message: str
    files: dict[str, File]
    parent: str | None
    date: str = field(default_factory=lambda: datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z"))


@dataclass
class Repository:
    """Commits by their sha, and the branches and tags that point at them."""

    kind: str
    name: str
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def add(self, branch: str, message: str, files: dict[str, File]) -> Commit:
        """Commit these files, which are all that the branch has from then on."""
        parent = self.branches.get(branch)
        contents = [(path, file.oid) for path, file in sorted(files.items())]
        identity = repr((self.kind, self.name, len(self.commits), parent, message, contents))
        commit = Commit(hashlib.sha1(identity.encode()).hexdigest(), message, files, parent)
        self.commits[commit.sha] = commit
        self.branches[branch] = commit.sha
        return commit

    def at(self, revision: str) -> Commit:
        """The commit that a branch, a tag or a sha names."""
        sha = self.branches.get(revision) or self.tags.get(revision) or revision
        if sha not in self.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[sha]

    def history(self, revision: str) -> Iterator[Commit]:
        """The commit of a revision, its parent, and so on to the first."""
        commit: Commit | None = self.at(revision)
        while commit is not None:
            yield commit
            commit = self.commits[commit.parent] if commit.parent else None


# The header of a card ------------------------------------------------------------------------------------------------


def read_header(card: str) -> dict[str, Any]:
    """The header of a card, empty if there is none.

    Raises:
        ValueError: If it is no YAML mapping.
    """
    found = HEADER.match(card)
    try:
        header = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError as error:
        raise ValueError("bad YAML: " + " ".join(str(error).split())) from error
    if header is not None and not isinstance(header, dict):
        raise ValueError('"value" must be of type object')
    return header or {}


def header_errors(card: str) -> list[str]:
    """What the Hub would find wrong in the header of a card, in its words."""
    try:
        header = read_header(card)
    except ValueError as error:
        return [str(error)]
    errors = list(_index_errors(header["model-index"])) if "model-index" in header else []
    for key in ("license", "pipeline_tag", "library_name", "license_name"):
        if key in header and not isinstance(header[key], str):
            errors.append(f'"{key}" must be a string')
    if isinstance(header.get("license"), str) and not re.fullmatch(r"[a-z0-9.+-]+", header["license"]):
        errors.append('"license" must be one of the identifiers at https://hf.co/docs/hub/repositories-licenses')
    if not isinstance(header.get("tags", []), list):
        errors.append('"tags" must be an array')
    for key, pattern, advice in (
        ("tags", r".+", ""),
        ("metrics", r".+", ""),
        ("language", r"[a-z]{2,3}|code|multilingual", "It must be an ISO 639-1, 639-2 or 639-3 code"),
        ("datasets", rf"({NAME}/)?{NAME}", "If possible, use a dataset id from https://hf.co/datasets."),
        ("base_model", rf"({NAME}/)?{NAME}", "Use a model id from https://hf.co/models."),
    ):
        values = header.get(key, [])
        for value in values if isinstance(values, list) else [values]:
            if not isinstance(value, str):  # such as the language `no`, which YAML reads as false
                errors.append(f'"{key}" must be a string or an array of strings')
            elif not re.fullmatch(pattern, value):
                errors.append(f'"{key}" with value "{value}" is not valid. {advice}'.rstrip())
    return errors


def _index_errors(index: Any) -> Iterator[str]:
    if not isinstance(index, list):
        yield '"model-index" must be an array'
        return
    for number, entry in enumerate(index):
        at = f"model-index[{number}]"
        yield from _lacks(entry, at, "name", str)
        yield from (missing := list(_lacks(entry, at, "results", list)))
        for count, result in enumerate([] if missing else entry["results"]):
            where = f"{at}.results[{count}]"
            for part, keys in (("task", ["type"]), ("dataset", ["type", "name"])):
                yield from (missing := list(_lacks(result, where, part, dict)))
                for key in [] if missing else keys:
                    yield from _lacks(result[part], f"{where}.{part}", key, str)
            kind = result.get("dataset", {}).get("type") if not missing else None
            if isinstance(kind, str) and not re.fullmatch(r"(?:[\w-]+/)?[\w.-]+", kind):
                yield f'"{where}.dataset.type" with value "{kind}" fails to match the required pattern'
            yield from (missing := list(_lacks(result, where, "metrics", list)))
            for place, metric in enumerate([] if missing else result["metrics"]):
                yield from _lacks(metric, f"{where}.metrics[{place}]", "type", str)
                yield from _lacks(metric, f"{where}.metrics[{place}]", "value", object)


def _lacks(mapping: Any, where: str, key: str, kind: type) -> Iterator[str]:
    name = {str: "a string", list: "an array", dict: "of type object"}
    if not isinstance(mapping, dict):
        yield f'"{where}" must be of type object'
    elif mapping.get(key) is None:
        yield f'"{where}.{key}" is required'
    elif not isinstance(mapping[key], kind):
        yield f'"{where}.{key}" must be {name[kind]}'


# The server ----------------------------------------------------------------------------------------------------------


@dataclass
class Request:
    """What a route needs to know of a request."""

    query: dict[str, list[str]]
    headers: Any
    body: bytes
    signed_in: bool

    @property
    def json(self) -> Any:
        return json.loads(self.body or b"{}")


@dataclass
class Answer:
    """A body, which is sent as JSON unless it is bytes."""

    body: Any = b""
    headers: dict[str, str] = field(default_factory=dict)
    status: int = 200


ROUTES: list[tuple[str, re.Pattern[str], Callable[..., Answer]]] = []


def route(method: str, pattern: str) -> Callable[[Callable[..., Answer]], Callable[..., Answer]]:
    """Say which requests a method of the Hub answers; the groups of the pattern are its arguments."""
    filled = pattern.replace("KIND", "(models|datasets|spaces)").replace("REPO", "([^/]+(?:/[^/]+)?)")

    def enter(function: Callable[..., Answer]) -> Callable[..., Answer]:
        ROUTES.append((method, re.compile(filled), function))
        return function

    return enter


class LoopbackHub:
    """A Hub with one user, as a context manager.

    Attributes:
        url: Its address.
        user: The name of the user, who alone can write, and only below this name.
        token: The user's token; any other is refused.
        repos: The repositories by "user/name"; of a space, by "spaces/user/name".
        requests: What was asked, as (method, path).
        unhandled: What was asked and no route is for, as "METHOD path".
    """

    def __init__(self) -> None:
        self.user = "tester"
        self.token = "hf_loopback_token"
        self.repos: dict[str, Repository] = {}
        self.requests: list[tuple[str, str]] = []
        self.unhandled: list[str] = []
        self._lfs: dict[str, bytes] = {}
        self._expected: set[str] = set()
        self._lock = threading.Lock()
        self._status: int | None = None
        self._server: ThreadingHTTPServer | None = None
        self._port = 0

    def __enter__(self) -> "LoopbackHub":
        self.up()
        return self

    def __exit__(self, *error: object) -> None:
        self.down()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def up(self) -> None:
        """Answer as usual, after `down` or `fail`."""
        self._status = None
        if self._server is None:
            handler = type("BoundHandler", (_Handler,), {"hub": self})
            self._server = ThreadingHTTPServer(("127.0.0.1", self._port), handler)
            self._port = self._server.server_address[1]
            threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def down(self) -> None:
        """Refuse connections, and cut those that are open at their next request."""
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()

    def fail(self, status: int) -> None:
        """Answer every request with this status.

        The client tries again for half a minute after 429 and 5xx, but not to create a repository.
        """
        self._status = status

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """The files at a revision; `.gitattributes` is the server's own and left out."""
        files = self.repos[repo].at(revision).files
        return {path: file.data for path, file in sorted(files.items()) if path != ".gitattributes"}

    def commits(self, repo: str, revision: str = "main") -> list[str]:
        """The messages of the commits up to a revision, oldest first; the first is the server's own."""
        return [commit.message for commit in self.repos[repo].history(revision)][::-1]

    def shas(self, repo: str, revision: str = "main") -> list[str]:
        """The names of the commits up to a revision, in the order of `commits`."""
        return [commit.sha for commit in self.repos[repo].history(revision)][::-1]

    def publish(self, name: str, folder: Path, kind: str = "models") -> None:
        """Have the files of a folder as a public repository of anybody."""
        files = {
            path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
        }
        repo = self.repos[self._key(kind, name)] = Repository(kind, name, private=False)
        inside = {path: File(data, _belongs_in_lfs(path, data[:512])) for path, data in sorted(files.items())}
        repo.add("main", "published", inside)

    def is_private(self, repo: str) -> bool:
        return self.repos[repo].private

    def environment(self, home: Path, token: bool | str = True) -> dict[str, str]:
        """The environment of a process that talks to this Hub and keeps its cache in `home`.

        Args:
            home: A folder for the cache.
            token: Whether it has the token of the user; or another token.
        """
        secret = token if isinstance(token, str) else self.token if token else ""
        # Settings of who runs the tests are none of theirs, and a proxy would not find this machine.
        ours = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING_FACE_"))}
        return ours | {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_TOKEN": secret,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",  # Xet has servers of its own, so files go by LFS
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # evaluate tells another server of each load
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def answer(self, method: str, target: str, headers: Any, body: bytes) -> Answer:
        """The answer to a request."""
        address = urlsplit(target)
        read = "GET" if method == "HEAD" else method
        with self._lock:
            self.requests.append((method, unquote(address.path)))
            try:
                if self._status is not None:
                    raise Refusal(self._status, "The server fails, as it was told to")
                for expected, pattern, function in ROUTES:
                    if expected == read and (match := pattern.fullmatch(address.path)):
                        signed_in = self._signed_in(headers)
                        request = Request(parse_qs(address.query), headers, body, signed_in)
                        return function(self, request, *[unquote(group or "") for group in match.groups()])
                self.unhandled.append(f"{method} {unquote(address.path)}")
                raise Refusal(404, "No such route")
            except Refusal as refusal:
                said = {"X-Error-Message": refusal.message} | ({"X-Error-Code": refusal.code} if refusal.code else {})
                return Answer({"error": refusal.message}, said, refusal.status)
            except Exception as error:  # a request that no client of the Hub sends, or a fault of this server
                self.unhandled.append(f"{method} {unquote(address.path)}: {error!r}")
                return Answer({"error": repr(error)}, status=400)

    def _signed_in(self, headers: Any) -> bool:
        authorization = headers.get("Authorization")
        if authorization not in (None, f"Bearer {self.token}"):
            raise Refusal(401, INVALID_TOKEN)
        return authorization is not None

    def _key(self, kind: str, name: str) -> str:
        return name if kind == "models" else f"{kind}/{name}"

    def _read(self, request: Request, kind: str, name: str) -> Repository:
        repo = self.repos.get(self._key(kind, name))
        if repo is None or (repo.private and not request.signed_in):
            # Of a 401 of the real Hub the client makes RepositoryNotFoundError by the address, which must begin with
            # https there; the code has the same effect.
            if request.signed_in:
                raise Refusal(404, "Repository not found", "RepoNotFound")
            raise Refusal(401, "Invalid username or password.", "RepoNotFound")
        return repo

    def _write(self, request: Request, kind: str, name: str) -> Repository:
        if not request.signed_in:
            raise Refusal(401, "Invalid username or password.", "RepoNotFound")
        return self._read(request, kind, name)

    # Accounts and repositories

    @route("POST", "/api/repos/create")
    def _create(self, request: Request) -> Answer:
        if not request.signed_in:
            raise Refusal(401, "Invalid username or password.")
        asked = request.json
        owner, kind = asked.get("organization") or self.user, (asked.get("type") or "model") + "s"
        if owner != self.user:
            raise Refusal(403, f'You don\'t have the rights to create a {kind[:-1]} under the namespace "{owner}"')
        if not re.fullmatch(NAME, asked["name"]):
            raise Refusal(400, f'Invalid repository name: "{asked["name"]}"')
        key = self._key(kind, f"{owner}/{asked['name']}")
        place = {"url": f"{self.url}/{key}", "name": f"{owner}/{asked['name']}", "id": key}
        if key in self.repos:
            return Answer({"error": f"You already created this {kind[:-1]} repo"} | place, status=409)
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        repo = self.repos[key] = Repository(kind, f"{owner}/{asked['name']}", private)
        repo.add("main", "initial commit", {".gitattributes": File(GIT_ATTRIBUTES, lfs=False)})
        return Answer(place)

    @route("POST", "/api/KIND/REPO/(branch|tag)/([^/]+)")
    def _point(self, request: Request, kind: str, name: str, what: str, word: str) -> Answer:
        repo = self._write(request, kind, name)
        if what == "branch":
            pointers, pointer, start = repo.branches, word, request.json.get("startingPoint", "main")
        else:
            pointers, pointer, start = repo.tags, request.json["tag"], word
        if pointer in pointers:
            raise Refusal(409, f"Reference already exists: {pointer}")
        pointers[pointer] = repo.at(start).sha
        return Answer()

    # Writing

    @route("POST", "/api/validate-yaml")
    def _validate(self, request: Request) -> Answer:
        card = request.json["content"]
        errors = header_errors(card)
        status = 400 if errors else 200
        if request.headers.get("Accept") == "text/plain":  # ModelCard.validate
            return Answer("\n".join(f"- Error: {error}" for error in errors).encode(), status=status)
        empty = [] if errors or read_header(card) else [{"message": "empty or missing yaml metadata in repo card"}]
        return Answer({"errors": [{"message": error} for error in errors], "warnings": empty}, status=status)

    @route("POST", "/api/KIND/REPO/preupload/([^/]+)")
    def _preupload(self, request: Request, kind: str, name: str, revision: str) -> Answer:
        there = self._write(request, kind, name).at(revision).files
        modes = []
        for asked in request.json["files"]:
            path = asked["path"]
            mode = "lfs" if _belongs_in_lfs(path, base64.b64decode(asked["sample"])) else "regular"
            known = {"oid": there[path].oid} if path in there else {}
            modes.append({"path": path, "uploadMode": mode, "shouldIgnore": False} | known)
        return Answer({"files": modes})

    @route("POST", r"/(?:(datasets|spaces)/)?REPO\.git/info/lfs/objects/batch")
    def _batch(self, request: Request, kind: str, name: str) -> Answer:
        self._write(request, kind or "models", name)
        objects = []
        for asked in request.json["objects"]:
            upload = {"href": f"{self.url}/lfs/{asked['oid']}", "header": {}}
            actions = {"upload": upload, "verify": {"href": f"{self.url}/lfs/verify", "header": {}}}
            self._expected.add(asked["oid"])
            missing = {} if asked["oid"] in self._lfs else {"actions": actions}
            objects.append({"oid": asked["oid"], "size": asked["size"]} | missing)
        return Answer({"transfer": "basic", "objects": objects})

    @route("PUT", "/lfs/([0-9a-f]{64})")
    def _store(self, request: Request, oid: str) -> Answer:
        if oid not in self._expected:
            raise Refusal(403, "Nobody who has a token announced this file")
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise Refusal(400, "The content does not match its sha256")
        self._lfs[oid] = request.body
        return Answer()

    @route("POST", "/lfs/verify")
    def _verify(self, request: Request) -> Answer:
        if len(self._lfs.get(request.json["oid"], b"")) != request.json["size"]:
            raise Refusal(404, "This file was not uploaded, or not all of it")
        return Answer()

    @route("POST", "/api/KIND/REPO/commit/([^/]+)")
    def _commit(self, request: Request, kind: str, name: str, branch: str) -> Answer:
        repo = self._write(request, kind, name)
        if branch not in repo.branches:
            raise Refusal(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        if "create_pr" in request.query:
            raise Refusal(501, "No pull requests here")
        lines = [json.loads(line) for line in request.body.splitlines() if line.strip()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        if not repo.branches[branch].startswith(header.get("parentCommit", "")):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repo.at(branch).files)
        for line in lines:
            if line["key"] != "header":
                self._apply(files, line["key"], line["value"])
        if errors := header_errors(_card(files)) if "README.md" in files else []:
            raise Refusal(400, "Invalid metadata in README.md: " + "; ".join(errors))
        commit = repo.add(branch, header["summary"], files)
        page = f"{self.url}/{self._key(kind, name)}/commit/{commit.sha}"
        return Answer({"success": True, "commitOid": commit.sha, "commitUrl": page, "hookOutput": ""})

    def _apply(self, files: dict[str, File], operation: str, value: dict[str, Any]) -> None:
        path = value["path"]
        if operation == "file":
            data = base64.b64decode(value["content"])
            if data and _belongs_in_lfs(path, data[:512]):
                raise Refusal(400, f"Your push was rejected because it contains binary files: {path}")
            files[path] = File(data, lfs=False)
        elif operation == "lfsFile":
            if value["oid"] not in self._lfs:
                raise Refusal(400, f"LFS pointer pointed to a file that does not exist: {path}")
            files[path] = File(self._lfs[value["oid"]], lfs=True)
        elif operation in ("deletedFile", "deletedFolder"):
            gone = [file for file in files if file == path or file.startswith(path.rstrip("/") + "/")]
            if not gone or (operation == "deletedFile" and path not in gone):
                raise Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            for file in gone:
                del files[file]
        else:
            raise Refusal(400, f"Unknown operation: {operation}")

    # Reading

    @route("GET", "/api/KIND/REPO(?:/revision/([^/]+))?")
    def _info(self, request: Request, kind: str, name: str, revision: str) -> Answer:
        repo = self._read(request, kind, name)
        commit = repo.at(revision or "main")
        header = json.loads(json.dumps(read_header(_card(commit.files)), default=str))
        info = {"_id": repo.name, "id": repo.name, "author": self.user, "sha": commit.sha, "private": repo.private}
        info |= {"gated": False, "disabled": False, "downloads": 0, "likes": 0, "lastModified": commit.date}
        info |= {key: header[key] for key in ("library_name", "pipeline_tag") if key in header}
        info |= {"tags": header.get("tags", []), "cardData": header}
        return Answer(info | {"siblings": [{"rfilename": path} for path in sorted(commit.files)]})

    @route("GET", "/api/KIND/REPO/tree/([^/]+)(?:/(.+))?")
    def _tree(self, request: Request, kind: str, name: str, revision: str, folder: str) -> Answer:
        files = self._read(request, kind, name).at(revision).files
        start = folder.rstrip("/") + "/" if folder else ""
        inside = {path: file for path, file in sorted(files.items()) if path.startswith(start)}
        if folder and not inside:
            raise Refusal(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        recursive = request.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        parents = {"/".join(path.split("/")[:depth]) for path in inside for depth in range(1, path.count("/") + 1)}
        folders = [path for path in sorted(parents) if path.startswith(start)]
        entries = [{"type": "directory", "path": path, "size": 0, "oid": _name_of(path)} for path in folders]
        entries += [_entry(path, file) for path, file in inside.items()]
        return Answer([entry for entry in entries if recursive or "/" not in str(entry["path"])[len(start) :]])

    @route("GET", "/(?:(datasets|spaces)/)?REPO/resolve/([^/]+)/(.+)")
    def _resolve(self, request: Request, kind: str, name: str, revision: str, path: str) -> Answer:
        commit = self._read(request, kind or "models", name).at(revision)
        headers = {"X-Repo-Commit": commit.sha}
        if path not in commit.files:
            message = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            return Answer(b"Entry not found", headers | message, 404)
        file = commit.files[path]
        return Answer(file.data, headers | {"ETag": f'"{file.oid}"', "Content-Type": "application/octet-stream"})


def _belongs_in_lfs(path: str, sample: bytes) -> bool:
    return path.endswith(LFS_SUFFIXES) or b"\0" in sample


def _card(files: dict[str, File]) -> str:
    return files["README.md"].data.decode(errors="replace") if "README.md" in files else ""


def _name_of(path: str) -> str:
    return hashlib.sha1(path.encode()).hexdigest()


def _entry(path: str, file: File) -> dict[str, Any]:
    entry = {"type": "file", "path": path, "size": len(file.data), "oid": file.oid}
    if not file.lfs:
        return entry
    pointer = {"oid": file.oid, "size": len(file.data), "pointerSize": 134}
    return entry | {"oid": _name_of(file.oid), "lfs": pointer}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # the client left in the middle
            super().handle()

    def _serve(self) -> None:
        body = self._body()
        if self.hub._server is None:  # it went down while this connection was open
            self.close_connection = True
            return
        answer = self.hub.answer(self.command, self.path, self.headers, body)
        headers = dict(answer.headers)
        content = answer.body
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
            headers["Content-Type"] = "application/json"
        self.send_response(answer.status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value.encode("ascii", "replace").decode().replace("\n", " "))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = _serve

    def log_message(self, *message: Any) -> None:
        """Say nothing."""


# Processes -----------------------------------------------------------------------------------------------------------


def run_script(
    hub: LoopbackHub,
    source: str,
    *args: str | Path,
    home: Path,
    token: bool | str = True,
    env: dict[str, str] | None = None,
    without_hf_rrd: bool = False,
    seconds: float = 120,
) -> "subprocess.CompletedProcess[str]":
    """Run Python code in a fresh process that talks to this Hub.

    Args:
        hub: The Hub.
        source: The code; it may be indented, and can import from `tests`.
        *args: `sys.argv[1:]` there.
        home: A folder for its cache, and the one it runs in.
        token: Whether it has the token of the Hub's user; or another token.
        env: Further environment variables.
        without_hf_rrd: Make `import hf_rrd` fail there as if it were not installed.
        seconds: How long it may take.

    Returns:
        What it wrote, as text, and its exit status.
    """
    code = textwrap.dedent(source)
    options = []
    paths = {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    if without_hf_rrd:
        # An import of a name that stands for None fails, wherever the package is installed.
        code = f"import sys\nsys.modules['hf_rrd'] = None\n{code}"
        options, paths = ["-I"], {}  # nor is it in the folder or on the path
    home.mkdir(parents=True, exist_ok=True)
    return subprocess.run(
        [sys.executable, *options, "-c", code, *map(str, args)],
        cwd=home,
        env=hub.environment(home, token) | paths | (env or {}),
        capture_output=True,
        text=True,
        timeout=seconds,
    )
