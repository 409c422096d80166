"""A Hugging Face Hub on loopback, for the real client: repositories, LFS storage, tokens, and faults on demand."""

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

LFS_SIZE = 10_000_000  # bytes; what is larger, and every safetensors file, goes to LFS storage
ATTRIBUTES = b'*.safetensors filter=lfs diff=lfs merge=lfs -text\n'
REPO = r'(?P<repo>[^/]+/[^/]+?)'


class Refused(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, code: str = ''):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


@dataclass(frozen=True)
class Blob:
    data: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def pointer(self) -> bytes:
        return f'version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n'.encode()

    @property
    def oid(self) -> str:
        content = self.pointer if self.lfs else self.data
        return hashlib.sha1(f'blob {len(content)}\0'.encode() + content).hexdigest()

    def info(self, path: str) -> dict:
        info = {'type': 'file', 'path': path, 'size': len(self.data), 'oid': self.oid}
        if self.lfs:
            info['lfs'] = {'oid': self.sha256, 'size': len(self.data), 'pointerSize': len(self.pointer)}
        return info


@dataclass(frozen=True)
class Commit:
    message: str
    parent: str | None
    files: dict[str, Blob]
    changed: tuple[str, ...]


@dataclass
class Repo:
    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    lfs: dict[str, bytes] = field(default_factory=dict)

    def add(self, branch: str, message: str, files: dict[str, Blob], changed: tuple[str, ...] = ()) -> str:
        parent = self.branches.get(branch)
        sha = hashlib.sha1(f'{len(self.commits)} {branch} {parent} {message}'.encode()).hexdigest()
        self.commits[sha] = Commit(message, parent, files, changed)
        self.branches[branch] = sha
        return sha

    def history(self, branch: str = 'main') -> list[Commit]:
        """Newest first; the last one is what the Hub makes with the repository."""
        found, sha = [], self.branches[branch]
        while sha is not None:
            found.append(self.commits[sha])
            sha = self.commits[sha].parent
        return found

    def files(self, branch: str = 'main') -> dict[str, bytes]:
        return {path: blob.data for path, blob in self.history(branch)[0].files.items() if path != '.gitattributes'}


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    user: str | None


@dataclass
class Fault:
    """What happens to the next `times` requests whose method and path match.

    Args:
        act: `drop` (the connection, before anything is done), `lose` (it is done, the reply is lost), `status` (and
            nothing is done), `cut` (the body breaks off half-way), or a function from the body to another one.
    """

    method: str
    path: str
    act: str | Callable[[bytes], bytes]
    times: int
    status: int
    headers: dict[str, str]
    body: bytes


class Hub:
    """The server; a context. `users` maps tokens to names, `log` holds every request, `repos` what was pushed."""

    def __init__(self, **users: str):
        self.users = users
        self.repos: dict[str, Repo] = {}
        self.log: list[Request] = []
        self.faults: list[Fault] = []
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(('127.0.0.1', 0), type('Bound', (Handler,), {'hub': self}))
        self.server.daemon_threads = True
        self.url = f'http://127.0.0.1:{self.server.server_port}'
        # another origin as far as clients can tell, as the Hub's storage is: no token may arrive there
        self.storage = f'http://localhost:{self.server.server_port}'
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={'poll_interval': 0.01})

    def __enter__(self) -> 'Hub':
        self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def fail(self, method: str, path: str, act, *, times=1, status=503, headers=None, body=b'{"error": "broken"}'):
        """Arrange a fault for the paths in which the pattern `path` is found."""
        self.faults.append(Fault(method, path, act, times, status, headers or {}, body))

    def asked(self, method: str, path: str) -> list[str]:
        """The paths of the requests so far that match."""
        return [
            request.path
            for request in self.log
            if re.fullmatch(method, request.method) and re.search(path, request.path)
        ]

    def fault(self, request: Request) -> Fault | None:
        for fault in self.faults:
            if fault.times and re.fullmatch(fault.method, request.method) and re.search(fault.path, request.path):
                fault.times -= 1
                return fault
        return None

    def repo(self, name: str, user: str | None, write: bool = False) -> Repo:
        repo = self.repos.get(name)
        owner = name.split('/')[0]
        if repo is None or (repo.private and user != owner):
            raise Refused(404 if user else 401, 'Repository not found', 'RepoNotFound')
        if write and user != owner:
            raise Refused(403 if user else 401, "You don't have the required permissions to perform this action")
        return repo

    @staticmethod
    def commit(repo: Repo, revision: str) -> tuple[str, Commit]:
        sha = repo.branches.get(revision, revision)
        if sha not in repo.commits:
            raise Refused(404, f'Invalid rev id: {revision}', 'RevisionNotFound')
        return sha, repo.commits[sha]


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = 'HTTP/1.1'
    disable_nagle_algorithm = True

    def log_message(self, *_) -> None:
        pass

    def handle(self) -> None:
        with suppress(ConnectionError, TimeoutError):
            super().handle()

    def finish(self) -> None:
        with suppress(ConnectionError, ValueError):
            super().finish()

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        path = unquote(url.path)
        request = Request(self.command, path, self.user())
        with self.hub.lock:
            self.hub.log.append(request)
            fault = self.hub.fault(request)
        act = fault.act if fault else ''
        if act == 'drop':
            return self.hang_up()
        self.body = self.read_body()
        if act == 'status':
            return self.reply(fault.status, fault.body, fault.headers)
        try:
            if 'Authorization' in self.headers and request.user is None:
                raise Refused(401, 'Invalid credentials in Authorization header')
            with self.hub.lock:
                status, headers, body = self.route(path, request.user)
        except Refused as error:
            headers = {'X-Error-Message': error.message} | ({'X-Error-Code': error.code} if error.code else {})
            status, body = error.status, json.dumps({'error': error.message}).encode()
        if act == 'lose':
            return self.hang_up()
        if callable(act):
            body = act(body)
        return self.reply(status, body, headers, cut=act == 'cut')

    do_HEAD = do_POST = do_PUT = do_GET

    def user(self) -> str | None:
        return self.hub.users.get(self.headers.get('Authorization', '').removeprefix('Bearer '))

    def read_body(self) -> bytes:
        if self.headers.get('Transfer-Encoding') != 'chunked':
            return self.rfile.read(int(self.headers.get('Content-Length', 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b''.join(parts)

    def hang_up(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def reply(self, status: int, body: bytes, headers: dict[str, str], cut: bool = False) -> None:
        self.send_response(status)
        for key, value in {'Content-Type': 'application/json', 'Content-Length': str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self.hang_up()

    def route(self, path: str, user: str | None) -> tuple[int, dict[str, str], bytes]:
        for method, pattern, action in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                return action(self, user, **match.groupdict())
        raise Refused(404, f'no such page: {self.command} {path}')

    def json(self) -> dict:
        return json.loads(self.body)

    # what follows is the API, a method per call of the client

    def create(self, user: str | None):
        if user is None:
            raise Refused(401, 'Invalid username or password.')
        asked = self.json()
        name = f'{asked["organization"] or user}/{asked["name"]}'
        if not name.startswith(f'{user}/'):
            raise Refused(403, f"You don't have the rights to create a model under {asked['organization']}")
        reply = {'url': f'{self.hub.url}/{name}', 'name': name}
        if name in self.hub.repos:
            return 409, {}, json.dumps({**reply, 'error': 'You already created this model repo'}).encode()
        private = asked.get('private') or asked.get('visibility') == 'private'
        self.hub.repos[name] = Repo(private)
        self.hub.repos[name].add('main', 'initial commit', {'.gitattributes': Blob(ATTRIBUTES, False)})
        return 200, {}, json.dumps(reply).encode()

    def info(self, user, repo: str, revision: str = 'main'):
        found = self.hub.repo(repo, user)
        sha, commit = self.hub.commit(found, revision)
        siblings = [{'rfilename': path} for path in sorted(commit.files)]
        info = {'id': repo, 'sha': sha, 'private': found.private, 'tags': [], 'siblings': siblings}
        return 200, {}, json.dumps(info).encode()

    def paths_info(self, user, repo: str, revision: str):
        _, commit = self.hub.commit(self.hub.repo(repo, user), revision)
        paths = parse_qs(self.body.decode())['paths']
        return 200, {}, json.dumps([commit.files[path].info(path) for path in paths if path in commit.files]).encode()

    def branch(self, user, repo: str, branch: str):
        found = self.hub.repo(repo, user, write=True)
        if branch in found.branches:
            raise Refused(409, f'Reference already exists: {branch}')
        found.branches[branch] = self.hub.commit(found, self.json().get('startingPoint', 'main'))[0]
        return 200, {}, b''

    def validate(self, user):
        front = re.match(r'---\n.+?\n---\n', self.json()['content'], re.DOTALL)
        warned = [] if front else [{'message': 'empty or missing yaml metadata in repo card'}]
        return 200, {}, json.dumps({'errors': [], 'warnings': warned}).encode()

    def preupload(self, user, repo: str, revision: str):
        _, commit = self.hub.commit(self.hub.repo(repo, user, write=True), revision)
        files = []
        for file in self.json()['files']:
            path, lfs = file['path'], file['size'] > LFS_SIZE or file['path'].endswith('.safetensors')
            held = commit.files.get(path)
            oid = held and (held.sha256 if held.lfs else held.oid)
            mode = 'lfs' if lfs else 'regular'
            files.append({'path': path, 'uploadMode': mode, 'shouldIgnore': False, 'oid': oid})
        return 200, {}, json.dumps({'files': files}).encode()

    def batch(self, user, repo: str):
        found = self.hub.repo(repo, user, write=True)
        objects = []
        for wanted in self.json()['objects']:
            href = f'{self.hub.storage}/storage/{repo}/{wanted["oid"]}'
            actions = {} if wanted['oid'] in found.lfs else {'actions': {'upload': {'href': href}}}
            objects.append({'oid': wanted['oid'], 'size': wanted['size'], **actions})
        return 200, {}, json.dumps({'transfer': 'basic', 'objects': objects}).encode()

    def check_storage_access(self) -> None:
        if 'Authorization' in self.headers:
            raise Refused(400, 'the token was sent to the storage')

    def store(self, user, repo: str, oid: str):
        self.check_storage_access()
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(400, 'the content is not what its name says')
        self.hub.repos[repo].lfs[oid] = self.body
        return 200, {}, b''

    def change(self, user, repo: str, revision: str):
        found = self.hub.repo(repo, user, write=True)
        if revision not in found.branches:
            raise Refused(404, f'Invalid rev id: {revision}', 'RevisionNotFound')
        sha, commit = self.hub.commit(found, revision)
        header, *entries = [json.loads(line) for line in self.body.splitlines()]
        parent = header['value'].get('parentCommit')
        if parent is not None and parent != sha:
            raise Refused(412, 'A commit has happened since. Please refresh and try again.')
        files, changed = dict(commit.files), []
        for entry in entries:
            value = entry['value']
            changed.append(value['path'])
            if entry['key'] == 'file':
                files[value['path']] = Blob(base64.b64decode(value['content']), False)
            elif entry['key'] == 'lfsFile' and value['oid'] in found.lfs:
                files[value['path']] = Blob(found.lfs[value['oid']], True)
            else:
                raise Refused(400, f'cannot do {entry["key"]} of {value["path"]}')
        new = found.add(revision, header['value']['summary'], files, tuple(changed))
        reply = {'success': True, 'commitOid': new, 'commitUrl': f'{self.hub.url}/{repo}/commit/{new}'}
        return 200, {}, json.dumps(reply).encode()

    def resolve(self, user, repo: str, revision: str, path: str):
        sha, commit = self.hub.commit(self.hub.repo(repo, user), revision)
        if path not in commit.files:
            raise Refused(404, 'Entry not found', 'EntryNotFound')
        blob = commit.files[path]
        if not blob.lfs:
            return self.serve(blob.data, {'X-Repo-Commit': sha, 'ETag': f'"{blob.oid}"'})
        headers = {
            'X-Repo-Commit': sha,
            'X-Linked-ETag': f'"{blob.sha256}"',
            'X-Linked-Size': str(len(blob.data)),
            'Location': f'{self.hub.storage}/storage/{repo}/{blob.sha256}',
        }
        return 302, headers, b''

    def fetch(self, user, repo: str, oid: str):
        self.check_storage_access()
        return self.serve(self.hub.repos[repo].lfs[oid], {'ETag': f'"{oid}"'})

    def serve(self, data: bytes, headers: dict[str, str]):
        asked = re.fullmatch(r'bytes=(\d+)-', self.headers.get('Range', ''))
        if not asked:
            return 200, headers, data
        start = int(asked[1])
        return 206, {**headers, 'Content-Range': f'bytes {start}-{len(data) - 1}/{len(data)}'}, data[start:]


ROUTES = [
    (('POST',), '/api/repos/create', Handler.create),
    (('POST',), '/api/validate-yaml', Handler.validate),
    (('GET',), f'/api/models/{REPO}', Handler.info),
    (('GET',), f'/api/models/{REPO}/revision/(?P<revision>.+)', Handler.info),
    (('POST',), f'/api/models/{REPO}/paths-info/(?P<revision>.+)', Handler.paths_info),
    (('POST',), f'/api/models/{REPO}/branch/(?P<branch>.+)', Handler.branch),
    (('POST',), f'/api/models/{REPO}/preupload/(?P<revision>.+)', Handler.preupload),
    (('POST',), f'/api/models/{REPO}/commit/(?P<revision>.+)', Handler.change),
    (('POST',), f'/{REPO}\\.git/info/lfs/objects/batch', Handler.batch),
    (('PUT',), f'/storage/{REPO}/(?P<oid>[0-9a-f]{{64}})', Handler.store),
    (('GET',), f'/storage/{REPO}/(?P<oid>[0-9a-f]{{64}})', Handler.fetch),
    (('GET', 'HEAD'), f'/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)', Handler.resolve),
]
