import json
import os
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import safetensors
import timm
import torch
from hub_server import Blob, Hub
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from timm_supertickets import Ticket, load_ticket
from timm_supertickets.cli import main
from timm_supertickets.hub import TRIES, pull_ticket, push_ticket
from timm_supertickets.sparsity.prune import prune
from timm_supertickets.sparsity.scores import magnitude

MICRO = {
    'space': 'mbv2',
    'shape': {'stem': 8, 'stages': [[8, 1, 1], [8, 2, 2]], 'head': 16},
    'blocks': [{'3': 6, '7': 2}, {'3': 4, '5': 4}, {'5': 8}],
}
NAME = 'me/micro'
LOOPBACK = '127.0.0.1,localhost'
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # how the client uploads
FILES = {'config.json', 'ticket.safetensors', 'model.safetensors', 'README.md'}
COMMIT, CREATE, PATHS = f'/api/models/{NAME}/commit/', '/api/repos/create', '/paths-info/'


def draw(name='superticket_mbv2', facts=None, **kwargs):
    torch.manual_seed(0)
    model = timm.create_model(name, **({'arch': MICRO, 'num_classes': 3} | kwargs))
    return Ticket.draw(model, prune(magnitude(model), 0.5), facts={'top1': 0.5, **(facts or {})})


@pytest.fixture(scope='module')
def ticket():
    return draw()


@pytest.fixture
def slept(monkeypatch):
    """Seconds that were asked for, by whomever; nobody really waits."""
    asked, sleep = [], time.sleep

    def nap(seconds):
        asked.append(seconds)
        sleep(min(seconds, 0.001))

    monkeypatch.setattr(time, 'sleep', nap)
    return asked


@pytest.fixture
def hub(monkeypatch, tmp_path, slept):
    """A Hub that the client of this process speaks to as `me`; the cache is empty."""
    with Hub(hf_me='me', hf_you='you') as server:
        monkeypatch.setattr(constants, 'ENDPOINT', server.url)
        template = server.url + '/{repo_id}/resolve/{revision}/{filename}'
        monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', template)
        monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'cache'))
        monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', True)
        monkeypatch.setattr(constants, 'HF_HUB_DISABLE_TELEMETRY', True)
        monkeypatch.setattr(constants, 'HF_HUB_DISABLE_IMPLICIT_TOKEN', False)
        monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
        monkeypatch.setattr(constants, 'HF_TOKEN_PATH', str(tmp_path / 'token'))
        monkeypatch.setenv('HF_TOKEN', 'hf_me')
        monkeypatch.setenv('NO_PROXY', LOOPBACK)
        close_session()
        yield server
        close_session()


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def is_ticket(pulled, ticket):
    facts = {key: value for key, value in pulled.facts.items() if key != 'hub'}
    return same(pulled.weights, ticket.weights) and same(pulled.mask, ticket.mask) and facts == ticket.facts


def push(ticket, name=NAME, **kwargs):
    """Push a ticket's folder with a card in it: to render one takes longer than all the rest."""
    with TemporaryDirectory() as folder:
        ticket.save(folder)
        (Path(folder) / 'README.md').write_text('---\nlibrary_name: timm\n---\n# A ticket\n')
        return push_ticket(folder, name, **kwargs)


def create(name=NAME, **kwargs):
    return timm.create_model(f'hf-hub:{name}', pretrained=True, **kwargs)


def commits(hub, branch='main'):
    """How many commits were pushed to a branch, after the one that comes with a repository."""
    return len(hub.repos[NAME].history(branch)) - 1


def flipped(data):
    return data[:-1] + bytes([data[-1] ^ 1])


def halved(data):
    return data[: len(data) // 2]


def restrided(config):
    """Another function of the same shapes."""
    assert b'[8, 2, 2]' in config
    return config.replace(b'[8, 2, 2]', b'[8, 2, 1]')


def praised(config):
    assert b'"top1": 0.5' in config
    return config.replace(b'"top1": 0.5', b'"top1": 0.9')


# push


def test_a_push_is_one_commit_with_everything_in_it(hub, ticket):
    url = push_ticket(ticket, NAME, commit_message='First')
    repo = hub.repos[NAME]
    assert commits(hub) == 1
    assert url == f'{hub.url}/{NAME}/commit/{repo.branches["main"]}'
    assert repo.history()[0].message == 'First'
    files = repo.files()
    assert files.keys() >= FILES
    pictures = files.keys() - FILES
    assert set(repo.history()[0].changed) == set(files)
    assert all(name in files['README.md'].decode() for name in pictures)
    assert NAME in files['README.md'].decode()
    config = json.loads(files['config.json'])
    assert config == json.loads(json.dumps(ticket.config()))
    assert config['pretrained_cfg']['hf_hub_filename'] == 'ticket.safetensors'


def test_header_metadata_is_kept(hub, ticket, tmp_path):
    push(ticket)
    saved = ticket.save(tmp_path / 'saved', dense=True)
    for name in ('ticket.safetensors', 'model.safetensors'):
        pushed = tmp_path / name
        pushed.write_bytes(hub.repos[NAME].files()[name])
        with safetensors.safe_open(pushed, 'pt') as first, safetensors.safe_open(saved / name, 'pt') as second:
            assert first.metadata() == second.metadata()
            assert float(first.metadata()['sparsity']) == ticket.sparsity
    assert is_ticket(load_ticket(tmp_path / 'model.safetensors'), ticket)


def test_timm_fetches_the_config_and_the_packed_file_only(hub, ticket):
    push(ticket)
    hub.log.clear()
    assert same(create().state_dict(), ticket.weights)
    resolved = {path.rpartition('/')[2] for path in hub.asked('GET|HEAD', '/resolve/')}
    assert resolved == {'config.json', 'ticket.safetensors'}
    assert len(hub.asked('GET', '/storage/')) == 1
    assert create(num_classes=0, in_chans=1).num_classes == 0


def test_a_stock_model_is_loaded_from_its_dense_file(hub):
    stock = draw('test_resnet', arch=None)
    push(stock, 'me/stock')
    hub.log.clear()
    assert same(create('me/stock').state_dict(), stock.weights)
    resolved = {path.rpartition('/')[2] for path in hub.asked('GET|HEAD', '/resolve/')}
    assert resolved == {'config.json', 'model.safetensors'}
    assert is_ticket(pull_ticket('me/stock'), stock)


def test_pushing_again_commits_nothing(hub, ticket, tmp_path):
    url = push_ticket(ticket, NAME)
    hub.log.clear()
    with pytest.warns(
        UserWarning, match=r'me/micro holds this ticket already, in [0-9a-f]{40}: nothing to commit'
    ) as caught:
        assert push_ticket(ticket, NAME) == url
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match='nothing to commit'):
        assert push_ticket(ticket.save(tmp_path / 'folder'), NAME) == url
    assert commits(hub) == 1
    assert not hub.asked('POST', '/preupload/|/commit/')
    assert not hub.asked('PUT', '')


def test_changed_facts_are_a_second_commit(hub, ticket):
    push(ticket)
    first = hub.repos[NAME].branches['main']
    changed = draw(facts={'top1': 0.75})
    push(changed, NAME)
    assert commits(hub) == 2
    assert pull_ticket(NAME).facts['top1'] == 0.75
    assert pull_ticket(NAME, revision=first).facts['top1'] == 0.5


def test_a_folder_s_own_card_is_kept_with_its_pictures(hub, ticket, tmp_path):
    folder = ticket.save(tmp_path / 'folder')
    card = '---\nlicense: apache-2.0\n---\n# Mine\n![](pictures/arch.png) ![](top.svg)\n'
    (folder / 'README.md').write_text(card)
    (folder / 'pictures').mkdir()
    for name in ('pictures/arch.png', 'top.svg', 'unnamed.png', 'notes.txt'):
        (folder / name).write_bytes(name.encode())
    push_ticket(folder, NAME)
    files = hub.repos[NAME].files()
    assert files.keys() == FILES | {'pictures/arch.png', 'top.svg'}
    assert files['README.md'].decode() == card
    assert files['pictures/arch.png'] == b'pictures/arch.png'


def test_a_card_that_was_written_for_the_folder_says_where_it_is_pushed_to(hub, ticket, tmp_path):
    folder = ticket.save(tmp_path / 'folder')
    assert main(['card', str(folder)]) == 0
    assert 'local-dir:folder' in (folder / 'README.md').read_text()
    push_ticket(folder, NAME)
    card = hub.repos[NAME].files()['README.md'].decode()
    assert f'hf-hub:{NAME}' in card
    assert 'local-dir:' not in card


@pytest.mark.parametrize('change', ['text', 'ticket'])
def test_a_folder_s_card_of_something_else_is_not_pushed(hub, ticket, tmp_path, change):
    folder = ticket.save(tmp_path / 'folder')
    assert main(['card', str(folder)]) == 0
    if change == 'text':
        (folder / 'README.md').write_text((folder / 'README.md').read_text() + 'Mine.\n')
    else:
        draw(facts={'top1': 0.75}).save(folder)
    with pytest.raises(ValueError, match=rf'README.md says how a folder is loaded .* hf-hub:{NAME}, or delete it'):
        push_ticket(folder, NAME)
    assert hub.log == []


def test_a_ticket_that_is_not_whole_is_not_pushed(hub, ticket, tmp_path):
    folder = ticket.save(tmp_path / 'folder')
    file = folder / 'ticket.safetensors'
    file.write_bytes(flipped(file.read_bytes()))
    with pytest.raises(ValueError, match='is not what was saved'):
        push_ticket(folder, NAME)
    with pytest.raises(ValueError, match=r"repo_id must be 'owner/name', got 'micro'"):
        push_ticket(ticket, 'micro')
    assert hub.log == []


def test_a_card_that_the_hub_does_not_take_stops_the_push(hub, ticket):
    said = b'{"errors": [{"message": "license must be one of many"}], "warnings": []}'
    hub.fail('POST', '/api/validate-yaml', 'status', status=400, body=said)
    with pytest.raises(ValueError, match=r'me/micro: the Hub refuses .400 license must be one of many.'):
        push(ticket)
    assert commits(hub) == 0
    assert not hub.asked('PUT', '')


def test_files_of_others_in_the_repository_stay(hub, ticket):
    push(ticket)
    repo = hub.repos[NAME]
    repo.add('main', 'notes', {**repo.history()[0].files, 'notes.txt': Blob(b'mine', False)})
    push(draw(facts={'top1': 0.75}), NAME)
    assert repo.files()['notes.txt'] == b'mine'


# who may


def test_a_private_repository_wants_a_token(hub, ticket, monkeypatch):
    push(ticket, private=True)
    assert hub.repos[NAME].private
    assert is_ticket(pull_ticket(NAME), ticket)
    shutil.rmtree(constants.HF_HUB_CACHE)
    for token in (False, 'hf_you'):
        with pytest.raises(ValueError, match='me/micro is not there, or is private') as caught:
            pull_ticket(NAME, token=token)
        assert '\n' not in str(caught.value)
    assert is_ticket(pull_ticket(NAME, token='hf_me'), ticket)
    assert same(create().state_dict(), ticket.weights)
    shutil.rmtree(constants.HF_HUB_CACHE)
    monkeypatch.delenv('HF_TOKEN')
    with pytest.raises(Exception, match=r'Repository Not Found|401'):
        create()


def test_nothing_private_goes_into_a_public_repository(hub, ticket):
    push(ticket)
    commits = len(hub.repos[NAME].commits)
    with pytest.raises(ValueError, match='me/micro is there already and is public: make it private first'):
        push(draw(facts={'top1': 0.75}), private=True)
    assert len(hub.repos[NAME].commits) == commits


@pytest.mark.parametrize('private', [False, True])
def test_a_private_repository_stays_private(hub, ticket, private):
    push(ticket, private=True)
    push(draw(facts={'top1': 0.75}), private=private)
    assert hub.repos[NAME].private


@pytest.mark.parametrize(
    ('token', 'name', 'message'),
    [
        ('hf_wrong', NAME, 'me/micro: the Hub wants a valid token: log in with `hf auth login`, or pass token='),
        ('hf_wrong', 'me/new', 'me/new: the Hub wants a valid token'),
        (False, NAME, 'me/micro: the Hub wants a valid token'),
        (False, 'me/new', 'me/new: the Hub wants a valid token'),
        ('hf_you', NAME, 'me/micro: this token may not write there'),
        ('hf_you', 'me/new', 'me/new: this token may not write there'),
        ('hf_me', 'me/n--w', 'Cannot have -- or ..'),
    ],
)
def test_who_may_not_push_is_told_once(hub, ticket, slept, token, name, message):
    push(ticket)
    slept.clear()
    with pytest.raises(ValueError, match=message) as caught:
        push(draw(facts={'top1': 1.0}), name, token=token)
    assert '\n' not in str(caught.value)
    assert slept == []
    assert hub.repos.keys() == {NAME}
    assert commits(hub) == 1


def test_token_true_wants_one_that_is_saved(hub, ticket, monkeypatch):
    monkeypatch.delenv('HF_TOKEN')
    with pytest.raises(ValueError, match=r'me/micro: .*no token found.* `hf auth login`'):
        push(ticket, token=True)


# what goes wrong on the way up


def test_large_files_go_to_lfs_storage(hub, tmp_path):
    arch = {**MICRO, 'shape': {**MICRO['shape'], 'head': 32}}
    large = draw(arch=arch, num_classes=80_000)  # 32 features each: 10 MB of classifier
    push(large)
    saved = large.save(tmp_path / 'large', dense=True)
    files = hub.repos[NAME].history()[0].files
    assert len(files['model.safetensors'].data) > 10_000_000
    assert files['model.safetensors'].lfs
    assert not files['config.json'].lfs
    assert files['model.safetensors'].data == (saved / 'model.safetensors').read_bytes()
    assert is_ticket(pull_ticket(NAME), large)


@pytest.mark.parametrize('act', ['drop', 'lose', 'status'])
def test_a_failed_upload_is_tried_again(hub, ticket, act):
    hub.fail('PUT', '/storage/', act, status=500)
    push(ticket)
    assert commits(hub) == 1
    assert is_ticket(pull_ticket(NAME), ticket)


def test_uploads_that_keep_failing_commit_nothing_and_a_rerun_completes(hub, ticket):
    hub.fail('PUT', '/storage/', lambda body: body)  # one of the two goes through
    hub.fail('PUT', '/storage/', 'status', status=500, times=10**6)
    with pytest.raises(ConnectionError, match=r'no answer from the Hub .*500.*nothing was committed') as caught:
        push(ticket)
    assert '\n' not in str(caught.value)
    assert commits(hub) == 0
    stored = set(hub.repos[NAME].lfs)
    assert len(stored) == 1
    hub.faults.clear()
    hub.log.clear()
    push(ticket)
    assert len(hub.asked('PUT', '/storage/')) == 1
    assert is_ticket(pull_ticket(NAME), ticket)


@pytest.mark.parametrize('act', ['drop', 'lose', 'status'])
@pytest.mark.parametrize('path', [CREATE, COMMIT, PATHS, '/api/validate-yaml', '/branch/', '/preupload/', '/batch'])
def test_a_call_that_fails_twice_is_made_again(hub, ticket, act, path):
    hub.fail('POST', path, act, status=502, body=b'<html>not JSON</html>', times=2)
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)  # nothing may say that there was nothing to do
        url = push(ticket, revision='side')
    assert all(fault.times < 2 for fault in hub.faults)
    assert commits(hub, 'side') == 1
    assert url.endswith(hub.repos[NAME].branches['side'])
    assert commits(hub) == 0


@pytest.mark.parametrize('path', [CREATE, COMMIT])
def test_the_hub_says_how_long_to_wait(hub, ticket, slept, path):
    hub.fail('POST', path, 'status', status=429, headers={'Retry-After': '77'})
    hub.fail('POST', path, 'status', status=429, headers={'RateLimit': '"api";r=0;t=55'})
    push(ticket)
    assert [seconds for seconds in slept if seconds > 5] == [77, 55]
    assert commits(hub) == 1


def test_a_wait_that_is_too_long_is_left_to_the_user(hub, ticket, slept):
    hub.fail('POST', COMMIT, 'status', status=429, headers={'Retry-After': '4000'})
    with pytest.raises(ConnectionError, match=r'asks to wait 4000 s .*429.*nothing was committed'):
        push(ticket)
    assert max(slept, default=0) <= 5
    assert len(hub.asked('POST', COMMIT)) == 1


def test_tries_are_bounded_and_ever_farther_apart(hub, ticket, slept):
    hub.fail('POST', COMMIT, 'status', times=10**6)
    with pytest.raises(ConnectionError, match=r'no answer from the Hub .503 broken.; nothing was committed'):
        push(ticket)
    assert len(hub.asked('POST', COMMIT)) == TRIES
    assert [seconds for seconds in slept if seconds >= 1] == [1, 2, 4, 8]
    assert commits(hub) == 0


def test_a_commit_that_landed_counts_though_its_reply_was_lost(hub, ticket, slept):
    hub.fail('POST', COMMIT, 'lose')
    url = push(ticket)
    assert commits(hub) == 1
    assert url.endswith(hub.repos[NAME].branches['main'])
    assert len(hub.asked('POST', COMMIT)) == 1


def test_a_commit_that_landed_in_the_last_try_counts(hub, ticket):
    hub.fail('POST', COMMIT, 'status', times=TRIES - 1)
    hub.fail('POST', COMMIT, 'lose')
    url = push(ticket)
    assert commits(hub) == 1
    assert url.endswith(hub.repos[NAME].branches['main'])


def test_what_is_not_known_is_not_claimed(hub, ticket):
    def silence(body):
        hub.fail('GET', '', 'drop', times=10**6)
        return body

    hub.fail('POST', '/preupload/', silence)
    hub.fail('POST', COMMIT, 'lose')
    with pytest.raises(ConnectionError, match='whether the commit landed is not known: push again to see'):
        push(ticket)
    hub.faults.clear()
    with pytest.warns(UserWarning, match='nothing to commit'):
        push(ticket)
    assert commits(hub) == 1


def test_a_commit_that_lands_late_lands_once(hub, ticket):
    late = []

    def not_yet(body):
        repo = hub.repos[NAME]
        late.append(repo.branches['main'])
        repo.branches['main'] = repo.commits[late[0]].parent
        raise ConnectionResetError

    def now(body):
        hub.repos[NAME].branches['main'] = late[0]
        return body

    hub.fail('POST', COMMIT, not_yet)
    hub.fail('POST', '/preupload/', lambda body: body)
    hub.fail('POST', '/preupload/', now)  # after the second look, right before the second commit
    push(ticket)
    assert len(hub.asked('POST', COMMIT)) == 2
    assert hub.repos[NAME].branches['main'] == late[0]
    assert len(hub.repos[NAME].commits) == 2


def test_a_commit_that_came_first_is_built_upon(hub, ticket):
    push(draw(facts={'top1': 0.25}), NAME)
    repo = hub.repos[NAME]

    def somebody_else(body):
        repo.add('main', 'notes', {**repo.history()[0].files, 'notes.txt': Blob(b'notes', False)})
        return body

    hub.fail('POST', PATHS, somebody_else)
    push(ticket)
    assert repo.files()['notes.txt'] == b'notes'
    assert [commit.message for commit in repo.history()][:2] == ['Upload ticket', 'notes']
    assert is_ticket(pull_ticket(NAME), ticket)


# branches


def test_a_branch_is_made_and_pushed_to(hub, ticket):
    push(ticket)
    main = hub.repos[NAME].branches['main']
    other = draw(facts={'top1': 0.75})
    push(other, NAME, revision='next')
    push(draw(facts={'top1': 0.8}), NAME, revision='next')
    assert hub.repos[NAME].branches['main'] == main
    assert commits(hub, 'next') == 3
    assert is_ticket(pull_ticket(NAME), ticket)
    assert pull_ticket(NAME, revision='next').facts['top1'] == 0.8
    assert same(create(f'{NAME}@next').state_dict(), ticket.weights)
    with pytest.warns(UserWarning, match='me/micro@next holds this ticket already'):
        push(draw(facts={'top1': 0.8}), NAME, revision='next')


# pull


def test_a_pull_pins_the_commit_and_a_push_drops_the_pin(hub, ticket):
    push(ticket)
    pulled = pull_ticket(NAME)
    assert is_ticket(pulled, ticket)
    assert pulled.facts['hub'] == {'repo_id': NAME, 'revision': hub.repos[NAME].branches['main']}
    with pytest.warns(UserWarning, match='nothing to commit'):
        push(pulled, NAME)
    assert 'hub' in pulled.facts
    push(pulled, 'me/copy')
    assert hub.repos['me/copy'].files()['config.json'] == hub.repos[NAME].files()['config.json']


def test_both_files_are_of_one_commit_though_the_branch_moves_on(hub, ticket):
    push(ticket)
    repo = hub.repos[NAME]
    first = repo.branches['main']
    push(draw(num_classes=5), NAME)
    second = repo.branches['main']
    repo.branches['main'] = first

    def move_on(body):
        repo.branches['main'] = second
        return body

    hub.fail('GET', '/resolve/.*/config.json', move_on)
    pulled = pull_ticket(NAME)
    assert repo.branches['main'] == second
    assert is_ticket(pulled, ticket)
    assert pulled.facts['hub']['revision'] == first
    assert len(pull_ticket(NAME).weights['classifier.bias']) == 5


def test_a_pinned_commit_is_read_from_the_cache_without_the_hub(hub, ticket):
    push(ticket)
    pin = pull_ticket(NAME).facts['hub']
    hub.log.clear()
    assert is_ticket(pull_ticket(**pin), ticket)
    assert hub.log == []


def test_what_is_not_there_is_said(hub, ticket, slept):
    with pytest.raises(ValueError, match='me/gone is not there, or is private and this token may not see it'):
        pull_ticket('me/gone')
    push(ticket)
    with pytest.raises(ValueError, match='me/micro@v9: there is no such branch, tag or commit'):
        pull_ticket(NAME, revision='v9')
    repo = hub.repos[NAME]
    repo.add('main', 'x', {path: blob for path, blob in repo.history()[0].files.items() if path[:7] != 'ticket.'})
    with pytest.raises(ValueError, match=r'me/micro is not a ticket: it lacks ticket.safetensors'):
        pull_ticket(NAME)
    assert slept == []


@pytest.mark.parametrize('path', ['/resolve/.*/config.json', '/storage/'])
@pytest.mark.parametrize('act', ['cut', 'drop', 'status', halved])
def test_a_download_that_breaks_off_is_completed(hub, ticket, path, act):
    push(ticket)
    hub.fail('GET', path, act, times=2)
    assert is_ticket(pull_ticket(NAME), ticket)
    assert hub.faults[0].times < 2


def test_downloads_that_keep_breaking_off_leave_nothing_behind(hub, ticket):
    push(ticket)
    hub.fail('GET', '/storage/', halved, times=10**6)
    with pytest.raises(ConnectionError, match=r'no answer from the Hub .*size') as caught:
        pull_ticket(NAME)
    assert '\n' not in str(caught.value)
    with pytest.raises(OSError, match='size'):
        create()
    hub.faults.clear()
    assert is_ticket(pull_ticket(NAME), ticket)
    assert same(create().state_dict(), ticket.weights)


@pytest.mark.parametrize(
    ('path', 'alter'),
    [
        ('/storage/', flipped),
        ('/resolve/.*/config.json', flipped),
        (
            '/resolve/.*/config.json',
            restrided,
        ),
        ('/resolve/.*/config.json', lambda body: body.replace(b'"top1": 0.5', b'"top1": 0.9')),
    ],
)
def test_an_altered_download_is_fetched_once_more(hub, ticket, path, alter):
    push(ticket)
    hub.fail('GET', path, alter)
    assert is_ticket(pull_ticket(NAME), ticket)
    assert hub.faults[0].times == 0
    assert len(hub.asked('GET', path)) == 2


def test_an_altered_download_is_never_a_ticket(hub, ticket):
    push(ticket)
    hub.fail('GET', '/storage/', flipped, times=2)
    with pytest.raises(ValueError, match=r'me/micro@.* arrived altered: .*tensor .* is not what was saved .*; delete'):
        pull_ticket(NAME)
    # the client keeps what it got: timm meets it next, and then a pull that finds the Hub in order
    with pytest.raises(ValueError, match=r'tensor .* is not what was saved'):
        create()
    assert is_ticket(pull_ticket(NAME), ticket)
    assert same(create().state_dict(), ticket.weights)


def test_the_way_out_that_an_error_names_is_one(hub, ticket):
    push(ticket)
    hub.fail('GET', '/storage/', flipped, times=2)
    with pytest.raises(ValueError, match=r'; delete .* and pull again') as caught:
        pull_ticket(NAME)
    kept = str(caught.value).partition('; delete ')[2].partition(' and pull again')[0]
    os.unlink(os.path.realpath(kept))
    os.unlink(kept)
    assert same(create().state_dict(), ticket.weights)


@pytest.mark.parametrize(('path', 'alter'), [('/storage/', flipped), ('/resolve/.*/config.json', praised)])
def test_an_altered_file_in_the_cache_is_found_while_the_hub_is_silent(hub, ticket, path, alter):
    push(ticket)
    hub.fail('GET', path, alter)
    pin = {'repo_id': NAME, 'revision': hub.repos[NAME].branches['main']}
    hub.fail('GET', path, 'status', times=10**6)
    for _ in range(2):
        with pytest.raises(ValueError, match=r'arrived altered: .*; delete .* and pull again'):
            pull_ticket(**pin)
    hub.faults.clear()
    assert is_ticket(pull_ticket(**pin), ticket)


@pytest.mark.parametrize(
    ('path', 'alter', 'error', 'message'),
    [
        ('/storage/', flipped, ValueError, 'tensor .* is not what was saved'),
        ('/storage/', halved, OSError, 'size'),
        ('config.json', restrided, ValueError, 'arch'),
        ('config.json', halved, OSError, 'size'),
    ],
)
def test_timm_takes_no_damaged_file(hub, ticket, path, alter, error, message):
    push(ticket)
    hub.fail('GET', path, alter)
    with pytest.raises(error, match=message):
        create()


def test_a_damaged_repository_is_not_downloaded_again(hub, ticket):
    push(ticket)
    repo = hub.repos[NAME]
    files = repo.history()[0].files
    broken = Blob(flipped(files['ticket.safetensors'].data), True)
    repo.lfs[broken.sha256] = broken.data
    repo.add('main', 'oops', {**files, 'ticket.safetensors': broken})
    with pytest.raises(ValueError, match=r'what the Hub holds is not a whole ticket: .* is not what was saved'):
        pull_ticket(NAME)
    assert len(hub.asked('GET', '/storage/')) == 1


# a process of its own, told by its environment alone

SCRIPT = """
import sys, timm, timm_supertickets
from timm_supertickets.hub import pull_ticket, push_ticket

print(push_ticket(sys.argv[1], 'me/micro'))
model = timm.create_model('hf-hub:me/micro', pretrained=True)
ticket = pull_ticket('me/micro')
assert all(ticket.weights[name].equal(tensor) for name, tensor in model.state_dict().items())
"""


def test_a_fresh_process_pushes_and_loads(ticket, tmp_path):
    with Hub(hf_me='me') as hub:
        env = {key: value for key, value in os.environ.items() if not key.startswith(('HF_', 'HUGGING'))}
        env |= {
            'HF_ENDPOINT': hub.url,
            'HF_HUB_DISABLE_XET': '1',
            'HF_HOME': str(tmp_path / 'home'),
            'HF_TOKEN': 'hf_me',
        }
        env['NO_PROXY'] = LOOPBACK
        folder = ticket.save(tmp_path / 'folder')
        command = [sys.executable, '-W', 'error::UserWarning', '-c', SCRIPT, str(folder)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == f'{hub.url}/me/micro/commit/{hub.repos["me/micro"].branches["main"]}'
        assert len(hub.asked('GET', '/storage/')) == 1
