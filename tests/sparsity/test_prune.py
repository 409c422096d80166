import random
import re
import sys

import pytest
import timm
import torch

import timm_supertickets  # noqa: F401 registers the models
from timm_supertickets.channels import ChannelGroup, Member
from timm_supertickets.models.stock import inverted_residual_groups
from timm_supertickets.sparsity.mask import Mask
from timm_supertickets.sparsity.prune import prune
from timm_supertickets.sparsity.scores import lamp


def lowest(scores, dead, floor=1, within=None):
    """Who dies, by sorting plain numbers: `{name: set of flat positions}`."""
    ranked = []
    for order, (name, score) in enumerate(scores.items()):
        flat = score.flatten().tolist()
        living = [i for i in range(len(flat)) if within is None or within[name].flatten()[i]]
        best = sorted(living, key=lambda i: (flat[i], i))[max(0, len(living) - floor) :]
        for i in range(len(flat)):
            group = 0 if i not in living else 2 if i in best else 1
            ranked.append((group, flat[i], order, i, name))
    died = {name: set() for name in scores}
    for _, _, _, i, name in sorted(ranked)[:dead]:
        died[name].add(i)
    return died


def dead_in(mask):
    return {name: set((~alive).flatten().nonzero().flatten().tolist()) for name, alive in mask.items()}


def count(mask):
    return sum(len(died) for died in dead_in(mask).values())


def random_scores(seed, values=6):
    # few values, hence many ties; sizes down to a single weight
    rng = random.Random(seed)
    shapes = [tuple(rng.randint(1, 5) for _ in range(rng.choice([1, 2, 4]))) for _ in range(rng.randint(1, 6))]
    torch.manual_seed(seed)
    return {f'layer{i}.weight': torch.randint(values, shape) for i, shape in enumerate(shapes)}


@pytest.mark.parametrize('seed', range(40))
def test_global_scope_equals_sorting(seed):
    scores = random_scores(seed)
    total = sum(score.numel() for score in scores.values())
    rng = random.Random(seed)
    for floor in (0, 1, 2):
        room = sum(max(0, score.numel() - floor) for score in scores.values())
        for dead in {0, room, rng.randint(0, room), rng.randint(0, room)} - {total}:
            mask = prune(scores, dead / total, floor=floor)
            assert dead_in(mask) == lowest(scores, dead, floor)
            assert {n: m.shape for n, m in mask.items()} == {n: s.shape for n, s in scores.items()}


@pytest.mark.parametrize('seed', range(30))
@pytest.mark.parametrize('sample', [1, 8, 64])
def test_a_border_found_from_a_sample_equals_sorting(seed, sample, monkeypatch):
    """Few values, of which some are sampled and some not, and tensors of which a sample says little."""
    monkeypatch.setattr(sys.modules[prune.__module__], 'SAMPLE', sample)
    rng = random.Random(seed)
    torch.manual_seed(seed)
    scores = {
        f'layer{i}.weight': rng.choice([1, 1000]) * torch.randint(rng.choice([3, 50, 10**6]), (rng.randint(1, 400),))
        for i in range(4)
    }
    total = sum(score.numel() for score in scores.values())
    for _ in range(3):
        dead = rng.randint(0, total - 4)
        assert dead_in(prune(scores, dead / total)) == lowest(scores, dead)


def test_a_sample_that_is_not_like_the_rest_misleads_nobody(monkeypatch):
    monkeypatch.setattr(sys.modules[prune.__module__], 'SAMPLE', 256)
    score = torch.arange(4096) % 1000
    score[::16] = 10**6  # just those that are looked at
    for dead in (100, 2000, 3840):
        assert dead_in(prune({'weight': score}, dead / 4096)) == lowest({'weight': score}, dead)


@pytest.mark.parametrize('seed', range(40))
def test_tensor_scope_equals_sorting_each_tensor(seed):
    scores = random_scores(seed)
    total = sum(score.numel() for score in scores.values())
    room = sum(score.numel() - 1 for score in scores.values())
    for sparsity in (0.0, 0.25, 0.5, 0.77, room / total):
        dead = round(sparsity * total)
        if dead > room:
            continue
        died = dead_in(prune(scores, sparsity, scope='tensor'))
        assert sum(map(len, died.values())) == dead
        for name, score in scores.items():
            assert died[name] == lowest({name: score}, len(died[name]))[name]


@pytest.mark.parametrize('seed', range(10))
def test_tensor_scope_gives_every_tensor_its_share(seed):
    torch.manual_seed(seed)
    scores = {str(i): torch.randint(9, (10 + 7 * i,)) for i in range(6)}
    total = sum(score.numel() for score in scores.values())
    for sparsity in (0.1, 0.5, 0.83):
        died = dead_in(prune(scores, sparsity, scope='tensor'))
        assert sum(map(len, died.values())) == round(sparsity * total)
        assert all(abs(len(died[name]) - sparsity * scores[name].numel()) < 1 for name in scores)


@pytest.mark.parametrize('seed', range(30))
@pytest.mark.parametrize('scope', ['global', 'tensor'])
def test_within_a_mask_equals_sorting(seed, scope):
    scores = random_scores(seed)
    total = sum(score.numel() for score in scores.values())
    within = prune({name: torch.rand(score.shape) for name, score in scores.items()}, 0.3, floor=0)
    room = sum(max(0, int(alive.sum()) - 1) for alive in within.values())
    gone = count(within)
    for dead in {gone, gone + room // 2, gone + room} - {total}:
        mask = prune(scores, dead / total, scope=scope, within=within)
        died = dead_in(mask)
        assert count(mask) == dead
        assert not any((mask[name] & ~within[name]).any() for name in mask)
        if scope == 'global':
            assert died == lowest(scores, dead, within=within)
        for name in scores:
            assert died[name] == lowest({name: scores[name]}, len(died[name]), within=within)[name]


@pytest.mark.parametrize('scope', ['global', 'tensor'])
@pytest.mark.parametrize('sparsity', [0.0, 0.005, 0.123, 0.5, 0.9, 0.987])
def test_exactly_so_many_die_when_all_scores_are_equal(scope, sparsity):
    scores = {'a': torch.ones(31, 7), 'b': torch.ones(400), 'c': torch.ones(3, 5, 2, 2)}
    assert count(prune(scores, sparsity, scope=scope)) == round(sparsity * 677)


def test_among_ties_the_first_die_first():
    scores = {'a': torch.zeros(4), 'b': torch.zeros(4)}
    mask = prune(scores, 5 / 8)
    # a: three of four, the last is its floor; b: two
    assert mask['a'].tolist() == [False, False, False, True]
    assert mask['b'].tolist() == [False, False, True, True]
    assert prune(scores, 5 / 8, floor=0)['a'].tolist() == [False] * 4


def test_by_hand():
    scores = {'a': torch.tensor([[5.0, 1.0], [2.0, 8.0]]), 'b': torch.tensor([0.1, 0.2, 0.3, 0.4])}
    mask = prune(scores, 0.5)
    assert mask['a'].tolist() == [[True, False], [True, True]]
    assert mask['b'].tolist() == [False, False, False, True]
    mask = prune(scores, 0.5, scope='tensor')
    assert mask['a'].tolist() == [[True, False], [False, True]]
    assert mask['b'].tolist() == [False, False, True, True]


def test_no_tensor_is_emptied():
    scores = {'weak': torch.full((10,), 1e-9), 'strong': torch.arange(90.0) + 1}
    assert prune(scores, 0.5)['weak'].sum() == 1
    assert prune(scores, 0.5, floor=4)['weak'].sum() == 4
    assert prune(scores, 0.5, floor=40)['weak'].sum() == 10
    assert not prune(scores, 0.5, floor=0)['weak'].any()


def test_sparsity_zero_kills_nothing_and_nearly_one_all_but_the_floor():
    scores = {'a': torch.rand(50, 10), 'b': torch.rand(500)}
    assert count(prune(scores, 0)) == 0
    mask = prune(scores, 0.998)
    assert count(mask) == 998
    assert all(mask[name].flatten().nonzero().item() == scores[name].argmax().item() for name in scores)


def test_rounds_as_python_does():
    assert count(prune({'a': torch.rand(10)}, 0.25)) == round(2.5) == 2
    assert count(prune({'a': torch.rand(10)}, 0.35)) == round(3.5) == 4


def test_double_scores_are_compared_as_doubles():
    scores = {'a': torch.tensor([1 + 1e-12, 1.0, 1e300], dtype=torch.float64)}
    assert prune(scores, 1 / 3)['a'].tolist() == [True, False, True]
    assert prune(scores, 2 / 3)['a'].tolist() == [False, False, True]


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.int64])
def test_scores_of_other_dtypes(dtype):
    assert prune({'a': torch.tensor([3, 1, 2, 4]).to(dtype)}, 0.5)['a'].tolist() == [True, False, False, True]


def test_within_never_revives_a_tensor_that_is_dead_already():
    within = Mask({'a': torch.tensor([False, False]), 'b': torch.ones(8, dtype=torch.bool)})
    mask = prune({'a': torch.tensor([9.0, 9.0]), 'b': torch.arange(8.0)}, 0.5, within=within)
    assert not mask['a'].any()
    assert mask['b'].tolist() == [False] * 3 + [True] * 5


def test_tensor_scope_leaves_a_small_tensor_its_floor():
    # 0.95 * 9 would round to all nine weights of a depthwise channel
    mask = prune({'small': torch.arange(9.0), 'large': torch.arange(100.0)}, 0.95, scope='tensor')
    assert mask['small'].tolist() == [False] * 8 + [True]
    assert count(mask) == round(0.95 * 109)


@pytest.mark.parametrize('scope', ['global', 'tensor'])
def test_step_by_step_within_the_mask_before_never_fails(scope):
    # small steps at the end of a schedule shift the rounding between tensors
    torch.manual_seed(0)
    scores = {str(i): torch.rand(5 + 3 * i) for i in range(8)}
    total = sum(score.numel() for score in scores.values())
    mask = Mask.dense(scores)
    for sparsity in [0.5 + 0.003 * i for i in range(120)]:
        after = prune(scores, sparsity, scope=scope, within=mask)
        assert count(after) == round(sparsity * total)
        assert not any((after[name] & ~mask[name]).any() for name in scores)
        mask = after


def test_scores_and_mask_are_left_alone():
    scores = {'a': torch.tensor([3.0, 1.0, 2.0])}
    within = Mask({'a': torch.tensor([True, True, False])})
    prune(scores, 0.5, within=within)
    assert scores['a'].tolist() == [3, 1, 2]
    assert within['a'].tolist() == [True, True, False]


SCORES = {'a': torch.arange(4.0), 'b': torch.arange(4.0)}


@pytest.mark.parametrize('sparsity', [-0.1, 1.0, 1.5, float('nan')])
def test_sparsity_out_of_range_is_refused(sparsity):
    with pytest.raises(ValueError, match=rf'sparsity must be in \[0, 1\), got {sparsity}'):
        prune(SCORES, sparsity)


def test_unknown_scope_is_refused_with_the_choices():
    for scope in ('layer', '', '2:4:8', ':4', '0:4', '5:4', '2:0', '-2:4', ' 2:4', '2:4\n'):
        with pytest.raises(ValueError, match=re.escape(f'{scope!r} is unknown; choose from global, tensor, N:M')):
            prune(SCORES, 0.5, scope=scope)


@pytest.mark.parametrize('bad', [float('nan'), float('inf'), -float('inf')])
def test_scores_that_are_not_finite_are_refused(bad):
    with pytest.raises(ValueError, match="scores of 'b' are not finite"):
        prune({**SCORES, 'b': torch.tensor([1.0, bad])}, 0.5)


def test_no_scores_are_refused():
    with pytest.raises(ValueError, match='nothing to prune'):
        prune({}, 0.5)


@pytest.mark.parametrize('scope', ['global', 'tensor'])
def test_more_than_may_die_is_refused(scope):
    with pytest.raises(ValueError, match=r'7 weights should die .* only 6'):
        prune(SCORES, 7 / 8, scope=scope)


@pytest.mark.parametrize('scope', ['global', 'tensor'])
def test_a_target_below_what_is_dead_is_refused(scope):
    within = prune(SCORES, 0.75)
    with pytest.raises(ValueError, match=r'6 .*dead already'):
        prune(SCORES, 0.5, scope=scope, within=within)


@pytest.mark.parametrize('within', [{}, {'a': torch.ones(4).bool(), 'b': torch.ones(2, 2).bool()}])
def test_a_mask_for_other_tensors_is_refused(within):
    with pytest.raises(ValueError, match=r"no entry of shape \(4,\) for '[ab]'"):
        prune(SCORES, 0.5, within=Mask(within))


def test_pattern_by_hand():
    scores = {
        'linear': torch.tensor([[5.0, 1.0, 2.0, 8.0, 0.1, 0.4, 0.3, 0.2], [7.0, 7.0, 7.0, 7.0, 1.0, 2.0, 2.0, 1.0]]),
        # inputs in flatten(1) order: channel, then kernel
        'conv': torch.tensor([[[[4.0, 3.0]], [[2.0, 1.0]]]]),
        'depthwise': torch.arange(18.0).view(2, 1, 3, 3),
    }
    mask = prune(scores, 0.5, scope='2:4')
    # ties: the first die first
    assert mask['linear'].int().tolist() == [[1, 0, 0, 1, 0, 1, 1, 0], [0, 0, 1, 1, 0, 1, 1, 0]]
    assert mask['conv'].int().tolist() == [[[[1, 1]], [[0, 0]]]]
    # 4 does not divide its 9 inputs: it lives, and counts
    assert mask['depthwise'].all()
    assert (mask.total, mask.alive) == (38, 28)
    # 3 divides the depthwise inputs alone
    mask = prune(scores, 2 / 3, scope='1:3')
    assert mask['depthwise'].flatten(1).int().tolist() == [[0, 0, 1] * 3] * 2
    assert mask['linear'].all()
    assert mask['conv'].all()


@pytest.mark.parametrize('seed', range(20))
@pytest.mark.parametrize(('n', 'm'), [(2, 4), (1, 4), (3, 4), (1, 2), (4, 4), (1, 1), (2, 6)])
def test_pattern_equals_sorting_each_group(seed, n, m):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    shapes = [(rng.randint(1, 4), rng.randint(1, 9), *rng.choice([(), (1, 1), (2, 2), (3, 3)])) for _ in range(4)]
    scores = {str(i): torch.randint(5, shape) for i, shape in enumerate([*shapes, (2, 3 * m)])}
    within = {name: torch.rand(score.shape) > 0.1 for name, score in scores.items()}
    expected, fits = {}, True
    for name, score in scores.items():
        rows, living = score.flatten(1).tolist(), within[name].flatten(1).tolist()
        for row, alive in zip(rows, living, strict=True):
            if len(row) % m:
                expected.setdefault(name, []).append(alive)
                continue
            kept = [False] * len(row)
            for start in range(0, len(row), m):
                group = [i for i in range(start, start + m) if alive[i]]
                fits &= len(group) >= n
                for i in sorted(group, key=lambda i: (row[i], i))[-n:]:
                    kept[i] = True
            expected.setdefault(name, []).append(kept)
    if not fits:
        with pytest.raises(ValueError, match=rf"{n} of every {m} weights of '\d' should live"):
            prune(scores, 1 - n / m, scope=f'{n}:{m}', within=Mask(within))
        return
    mask = prune(scores, 1 - n / m, scope=f'{n}:{m}', within=Mask(within))
    assert {name: alive.flatten(1).tolist() for name, alive in mask.items()} == expected
    assert {name: alive.shape for name, alive in mask.items()} == {name: s.shape for name, s in scores.items()}


def test_pattern_of_a_channels_last_tensor_is_that_of_its_shape():
    score = torch.rand(3, 8, 2, 2)
    mask = prune({'a': score.contiguous(memory_format=torch.channels_last)}, 0.5, scope='2:4')
    assert torch.equal(mask['a'], prune({'a': score}, 0.5, scope='2:4')['a'])


def test_pattern_within_a_mask():
    score = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    mask = prune({'a': score}, 0.5, scope='2:4', within=Mask({'a': torch.tensor([[True, True, True, False]])}))
    assert mask['a'].tolist() == [[False, True, True, False]]
    with pytest.raises(ValueError, match=r"2 of every 4 weights of 'a' should live"):
        prune({'a': score}, 0.5, scope='2:4', within=Mask({'a': torch.tensor([[True, False, False, False]])}))
    with pytest.raises(ValueError, match=r"no entry of shape \(1, 4\) for 'a'"):
        prune({'a': score}, 0.5, scope='2:4', within=Mask())


@pytest.mark.parametrize('sparsity', [0.0, 0.4, 0.51])
def test_a_sparsity_that_is_not_the_patterns_is_refused(sparsity):
    with pytest.raises(ValueError, match=rf'scope 2:4 means sparsity 0\.5, got {sparsity}'):
        prune({'a': torch.rand(2, 8)}, sparsity, scope='2:4')


def test_a_pattern_that_fits_nothing_is_refused():
    with pytest.raises(ValueError, match='scope 2:4 fits no tensor: 4 divides the inputs of none'):
        prune({'a': torch.rand(8, 6), 'b': torch.rand(4)}, 0.5, scope='2:4')


def test_a_floor_above_the_pattern_is_refused():
    scores = {'a': torch.rand(2, 4)}
    assert count(prune(scores, 0.5, scope='2:4', floor=4)) == 4
    with pytest.raises(ValueError, match="2:4 leaves 'a' 4 living weights, fewer than floor=5"):
        prune(scores, 0.5, scope='2:4', floor=5)


def test_pattern_scores_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="scores of 'a' are not finite"):
        prune({'a': torch.full((2, 4), -torch.inf)}, 0.5, scope='2:4')


def chain(channels):
    """A group of two tensors: `up` has its channels as outputs, `down` as inputs."""
    members = (Member('up', 0, 0, channels), Member('down', 1, 0, channels))
    return ChannelGroup(0, 'gate', 'shift', ((3, channels),), members, 'block', ())


def test_a_channel_without_inputs_loses_its_outputs_and_better_weights_live():
    scores = {
        'up': torch.tensor([[9.0, 3.0], [1.0, 2.0], [8.0, 4.0]]),
        'down': torch.tensor([[7.0, 6.0, 5.0]]),
    }
    alone = prune(scores, 4 / 9)
    assert alone['up'].tolist() == [[True, False], [False, False], [True, False]]  # 1, 2, 3 and 4 are the lowest
    assert alone['down'].tolist() == [[True, True, True]]
    mask = prune(scores, 4 / 9, groups=[chain(3)])  # nothing reaches the 6 any more, and the 4 lives instead
    assert mask['up'].tolist() == [[True, False], [False, False], [True, True]]
    assert mask['down'].tolist() == [[True, False, True]]


def test_one_cut_leads_to_another():
    first = ChannelGroup(0, 'a', 'a', ((3, 2),), (Member('one', 0, 0, 2), Member('two', 1, 0, 2)), 'a', ())
    second = ChannelGroup(1, 'b', 'b', ((3, 2),), (Member('two', 0, 0, 2), Member('three', 1, 0, 2)), 'b', ())
    scores = {
        'one': torch.tensor([[0.5], [9.0]]),
        'two': torch.tensor([[8.0, 1.0], [2.0, 9.2]]),
        'three': torch.tensor([[9.7, 3.0], [9.8, 9.5]]),
        'other': torch.tensor([4.0, 5.0, 6.0, 7.0]),
    }
    # the lowest seven are 0.5 to 6; behind the 0.5 the 8 and the 2 go, so the 6 stays; now the 1 goes with the 8, and
    # behind these two the 9.7 and the 9.8, so that all others stay but the 3
    mask = prune(scores, 7 / 14, groups=[first, second])
    assert mask['one'].flatten().tolist() == [False, True]
    assert mask['two'].tolist() == [[False, False], [False, True]]
    assert mask['three'].tolist() == [[False, False], [False, True]]
    assert mask['other'].all()


def cut_weights(mask, groups):
    """Living weights of channels that have none left in one of their tensors, counted channel by channel."""
    found = 0
    for group in groups:
        for channel in range(group.channels):
            parts = [
                mask[name].select(dim, channel - start)
                for name, dim, start, stop in group.members
                if name in mask and start <= channel < stop
            ]
            if not all(part.any() for part in parts):
                found += sum(int(part.sum()) for part in parts)
    return found


@pytest.mark.parametrize(
    ('name', 'scope'),
    [
        ('supernet_mbv2_tiny', 'global'),
        ('supernet_mbv2_tiny', 'tensor'),
        ('supernet_hr_tiny', 'global'),
        ('mobilenetv2_035', 'global'),
        ('mobilenetv3_small_050', 'global'),
        ('tf_mobilenetv3_small_075', 'global'),
    ],
)
def test_no_living_weight_is_left_in_a_channel_that_is_cut(name, scope):
    torch.manual_seed(0)
    net = timm.create_model(name)
    stock = {'mobilenetv2_035': 16, 'mobilenetv3_small_050': 10, 'tf_mobilenetv3_small_075': 10}
    scores, groups = lamp(net), inverted_residual_groups(net) if name in stock else net.channel_groups()
    assert len(groups) == stock.get(name, len(groups))
    alone = prune(scores, 0.95, scope=scope)
    assert cut_weights(alone, groups) > 100
    mask = prune(scores, 0.95, scope=scope, groups=groups)
    assert cut_weights(mask, groups) == 0
    assert (mask.alive, mask.total) == (alone.alive, alone.total)
    later = prune(scores, 0.97, scope=scope, within=mask, groups=groups)
    assert cut_weights(later, groups) == 0
    assert all(bool((mask[key] | ~alive).all()) for key, alive in later.items())


def test_where_only_cut_channels_are_left_they_live():
    scores = {'up': torch.tensor([[3.0], [2.0]]), 'down': torch.tensor([[1.0, 4.0]])}
    within = Mask({'up': torch.tensor([[True], [False]]), 'down': torch.tensor([[True, True]])})
    mask = prune(scores, 0.25, within=within, groups=[chain(2)])  # three may live and three must
    assert (mask['up'].flatten().tolist(), mask['down'].flatten().tolist()) == ([True, False], [True, True])
