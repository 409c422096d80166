"""Hub: push a ticket in one commit, and pull one with the commit it came from pinned."""

import hashlib
import os
import re
import shutil
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from json import JSONDecodeError
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,  # of httpx or httpx2, whichever the client is built on
    LocalTokenNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import parse_ratelimit_headers

from .card import CARD, write_card
from .ticket import CONFIG, PACKED, Ticket

TRIES = 5
BACKOFF = 1.0  # seconds before the second try, doubled before each further one
PATIENCE = 300  # seconds; the Hub's rate limits are windows of five minutes
PIN = 'hub'
HUB = 'hf-hub:'
PICTURES = {'.gif', '.jpeg', '.jpg', '.png', '.svg', '.webp'}

Reply = TypeVar('Reply')


def find_ticket(name: str) -> Ticket:
    """A ticket by what a user calls it, every byte verified.

    Args:
        name: `hf-hub:OWNER/NAME[@REVISION]`, or what `load_ticket` takes: a folder, a file, a pretrained model's name.

    Raises:
        ValueError: It is not there, or not whole.
    """
    if not name.startswith(HUB):
        return Ticket.load(name)
    repo_id, _, revision = name.removeprefix(HUB).partition('@')
    return pull_ticket(repo_id, revision=revision or None)


def push_ticket(
    ticket: Ticket | str | Path,
    repo_id: str,
    *,
    private: bool = False,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = 'Upload ticket',
) -> str:
    """Push a ticket to the Hugging Face Hub, in one commit: config, packed and dense file, card and its pictures.

    May be run again at any point: what the Hub holds already is left alone, with a warning if that is everything.

    Args:
        ticket: The ticket, or what `Ticket.load` reads; verified before anything is sent. A folder's README.md is
            taken as the card, with the pictures that it names; without one, or with what `supertickets card` wrote
            for the folder, the card is written.
        repo_id: `'owner/name'`; made if it is missing.
        private: Whether a new repository is private; one that exists must not be public then.
        token: As in `huggingface_hub`: None for the one of `hf auth login` or `HF_TOKEN`.
        revision: Branch to push to, made from the main one if it is missing. None is the main one.
        commit_message: First line of the commit.

    Returns:
        The url of the commit that holds these files. If the reply to a commit was lost, the Hub is asked what it holds.

    Raises:
        ValueError: The ticket is not whole, its folder's card is that of another ticket or place, or the Hub refuses:
            token, repository or branch.
        ConnectionError: The Hub did not answer in several tries; it is said what has become of the commit.
    """
    api, place = _address(repo_id, revision, token)
    sent = False

    def head() -> tuple[str | None, bool]:
        sha = api.model_info(repo_id, revision=revision).sha
        return sha, sha is not None and _holds(api, repo_id, sha, files)

    def commit() -> str:
        nonlocal sent
        sha, held = head()
        if held:
            if not sent:
                warnings.warn(f'{place} holds this ticket already, in {sha}: nothing to commit', stacklevel=4)
            return f'{api.endpoint}/{repo_id}/commit/{sha}'
        operations = [CommitOperationAdd(name, path) for name, path in files.items()]
        sent = True
        # with its parent named, a commit whose reply is lost cannot land a second time
        info = api.create_commit(
            repo_id, operations, commit_message=commit_message, revision=revision, parent_commit=sha
        )
        return str(info.commit_url)

    with TemporaryDirectory() as temporary:
        files = _lay_out(ticket, Path(temporary) / 'ticket', repo_id)
        _patiently(lambda: _make_room(api, repo_id, private, revision), place)
        try:
            return _patiently(commit, place)
        except ConnectionError as error:
            try:
                sha, held = _patiently(head, place) if sent else (None, False)
            except ConnectionError:
                raise ConnectionError(f'{error}; whether the commit landed is not known: push again to see') from error
            if held:
                return f'{api.endpoint}/{repo_id}/commit/{sha}'
            raise ConnectionError(f'{error}; nothing was committed: push again later') from error


def pull_ticket(
    repo_id: str, *, revision: str | None = None, token: str | bool | None = None, cache_dir: str | Path | None = None
) -> Ticket:
    """Download a ticket from the Hugging Face Hub and verify every tensor.

    Args:
        repo_id: `'owner/name'`.
        revision: Branch, tag or commit; None is the main branch. With a whole commit hash, what the cache holds is read
            without asking the Hub.
        token: As in `huggingface_hub`: None for the one of `hf auth login` or `HF_TOKEN`.
        cache_dir: Where downloads are kept; None is the Hub client's own cache, which timm uses as well.

    Returns:
        The ticket; `facts['hub']` names the repository and the commit that it came from.

    Raises:
        ValueError: There is no such ticket, the token may not read it, or it is not what was pushed.
        ConnectionError: The Hub did not answer in several tries.
    """
    api, place = _address(repo_id, revision, token)
    sha = revision
    if revision is None or not re.fullmatch('[0-9a-f]{40}', revision):
        sha = _patiently(lambda: api.model_info(repo_id, revision=revision).sha, place)
    if sha is None:
        raise ValueError(f'{place} has no commit: it is not a ticket')

    def fetch(name: str, again: bool = False) -> Path:
        return Path(
            _patiently(
                lambda: api.hf_hub_download(repo_id, name, revision=sha, cache_dir=cache_dir, force_download=again),
                place,
            )
        )

    files = {name: fetch(name) for name in (CONFIG, PACKED)}
    for name, path in files.items():
        if _is_altered(path):
            with suppress(ConnectionError, ValueError):  # what there is then is judged below
                fetch(name, again=True)
    altered = [path for path in files.values() if _is_altered(path)]
    problem = 'its bytes are not what the Hub vouches for'
    try:
        ticket = Ticket.load(files[CONFIG].parent)
        if not altered:
            ticket.facts = {**ticket.facts, PIN: {'repo_id': repo_id, 'revision': sha}}
            return ticket
    except ValueError as error:
        problem = str(error)
    if altered:
        raise ValueError(f'{repo_id}@{sha} arrived altered: {problem}; delete {altered[0]} and pull again')
    raise ValueError(f'{repo_id}@{sha}: what the Hub holds is not a whole ticket: {problem}')


def _address(repo_id: str, revision: str | None, token: str | bool | None) -> tuple[HfApi, str]:
    if repo_id.count('/') != 1:
        raise ValueError(f"repo_id must be 'owner/name', got {repo_id!r}")
    place = f'{repo_id}@{revision}' if revision else repo_id
    return HfApi(token=token, library_name='timm_supertickets'), place


def _lay_out(ticket: Ticket | str | Path, folder: Path, repo_id: str) -> dict[str, Path]:
    """Write what is to be pushed; files by their path in the repository."""
    source = None
    if not isinstance(ticket, Ticket):
        source = Path(ticket)
        ticket = Ticket.load(source)
    # where a ticket was pulled from is not part of it: pulled and pushed again, it is the same files
    facts = {key: value for key, value in ticket.facts.items() if key != PIN}
    # as it is read there, whatever order its tensors are in here
    ticket = Ticket.load(replace(ticket, facts=facts).save(folder, dense=True))
    text = None if source is None else _own_card(source, ticket, repo_id)
    if source is not None and text is not None:
        shutil.copyfile(source / CARD, folder / CARD)
        for picture in source.rglob('*'):
            name = picture.relative_to(source)
            if picture.suffix.lower() in PICTURES and name.as_posix() in text:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(picture, folder / name)
    else:
        write_card(folder, ticket, repo_id=repo_id)
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob('*')) if path.is_file()}


def _own_card(source: Path, ticket: Ticket, repo_id: str) -> str | None:
    """The text of the card in a ticket's folder; None if there is none, or only what is written for the folder itself.

    Raises:
        ValueError: It is written for a folder, and by other hands or for another ticket.
    """
    if not (source / CARD).is_file():
        return None
    text = (source / CARD).read_text(encoding='utf-8')
    if 'local-dir:' not in text or 'hf-hub:' in text:
        return text
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) / source.resolve().name
        folder.mkdir()
        write_card(folder, ticket)
        if text != (folder / CARD).read_text(encoding='utf-8'):
            raise ValueError(
                f'{source / CARD} says how a folder is loaded (local-dir:) and is not what `supertickets card` writes '
                f'for this ticket; let it say hf-hub:{repo_id}, or delete it'
            )
    return None


def _make_room(api: HfApi, repo_id: str, private: bool, revision: str | None) -> None:
    """Make the repository and the branch, where they are missing."""
    try:
        if api.model_info(repo_id).private is False and private:  # what is published cannot be taken back
            raise ValueError(f'{repo_id} is there already and is public: make it private first, or take another name')
    except RepositoryNotFoundError:
        # None rather than False: an organization may keep what is new private
        api.create_repo(repo_id, private=private or None)
    if revision is not None:
        try:
            api.model_info(repo_id, revision=revision)
        except RevisionNotFoundError:
            api.create_branch(repo_id, branch=revision)


def _holds(api: HfApi, repo_id: str, sha: str, files: Mapping[str, Path]) -> bool:
    """Whether a commit has these files with these bytes, by the hashes that the Hub keeps."""
    infos = api.get_paths_info(repo_id, list(files), revision=sha)
    held = {
        info.path: info.lfs.sha256 if info.lfs is not None else info.blob_id
        for info in infos
        if isinstance(info, RepoFile)
    }
    return all(held.get(name) in _hashes(path.read_bytes()) for name, path in files.items())


def _hashes(data: bytes) -> tuple[str, str]:
    """What the Hub calls a file by: the sha256 in LFS storage, git's own hash elsewhere."""
    return hashlib.sha256(data).hexdigest(), hashlib.sha1(b'blob %d\0' % len(data) + data).hexdigest()


def _is_altered(path: Path) -> bool:
    """Whether a file in the client's cache is not what its name there says: any bytes of the right size get in.

    False as well where the system has no symbolic links, and so the cache no such names.
    """
    name = Path(os.readlink(path)).name if path.is_symlink() else ''
    return re.fullmatch('[0-9a-f]{40}|[0-9a-f]{64}', name) is not None and name not in _hashes(path.read_bytes())


def _patiently(call: Callable[[], Reply], place: str) -> Reply:
    """Call, again where that may help: the client repeats neither what creates nor what asks.

    Raises:
        ValueError: The Hub refuses.
        ConnectionError: The Hub did not answer.
    """
    for attempt in range(TRIES):
        try:
            return call()
        except LocalTokenNotFoundError as error:
            raise ValueError(f'{place}: {_line(error)}') from None
        except Exception as error:
            reason = _on_the_way(error)
            if reason is None:
                raise
            wait = _wait(reason, attempt)
            if wait is None:
                raise ValueError(_refusal(reason, place)) from error
            if attempt == TRIES - 1 or wait > PATIENCE:
                asked = f', which asks to wait {wait:.0f} s' if wait > PATIENCE else ''
                raise ConnectionError(f'{place}: no answer from the Hub{asked} ({_line(reason)})') from error
        time.sleep(wait)
    raise AssertionError('the last try returns or raises')


def _on_the_way(error: BaseException | None) -> BaseException | None:
    """What went wrong between here and the Hub, from under what the client made of it; None if it is something else."""
    while error is not None:
        unreadable = isinstance(error, JSONDecodeError)
        cut_short = type(error) is OSError and error.errno is None  # the client's check of a download's size
        if isinstance(error, HTTPError) or unreadable or cut_short:
            return error
        error = error.__cause__
    return None


def _wait(reason: BaseException, attempt: int) -> float | None:
    """Seconds before the next try; None if another one would end as this did."""
    wait: float = BACKOFF * 2**attempt
    if not isinstance(reason, HfHubHTTPError):
        return wait
    status, headers = reason.response.status_code, reason.response.headers
    # 409 and 412: somebody else came first
    if status not in (408, 409, 412, 429) and status < 500:
        return None
    asked = str(headers.get('Retry-After', ''))
    limit = parse_ratelimit_headers(headers) if status == 429 else None
    return max(wait, float(asked) if asked.isdigit() else 0, limit.reset_in_seconds if limit else 0)


def _refusal(reason: BaseException, place: str) -> str:
    assert isinstance(reason, HfHubHTTPError)
    status = reason.response.status_code
    if isinstance(reason, RevisionNotFoundError):
        return f'{place}: there is no such branch, tag or commit'
    if isinstance(reason, RemoteEntryNotFoundError):
        return f'{place} is not a ticket: it lacks {str(reason.response.url).rpartition("/")[2]}'
    if isinstance(reason, RepositoryNotFoundError):
        return f'{place} is not there, or is private and this token may not see it: check the name and the token'
    if status == 401:
        return f'{place}: the Hub wants a valid token: log in with `hf auth login`, or pass token='
    if status == 403:
        return f'{place}: this token may not write there: use a repository of your own, or a token that may write'
    return f'{place}: the Hub refuses ({_line(reason)})'


def _line(reason: BaseException) -> str:
    """An error's text on one line."""
    said = reason.server_message if isinstance(reason, HfHubHTTPError) else None
    status = f'{reason.response.status_code} ' if isinstance(reason, HfHubHTTPError) else ''
    return status + ' '.join((said or str(reason) or type(reason).__name__).split())
