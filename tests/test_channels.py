import re

import pytest
import torch

from timm_supertickets.channels import ChannelGroup, Member, check_keep, take


def bools(text: str) -> torch.Tensor:
    return torch.tensor([digit == '1' for digit in text])


def group(name: str = 'a', droppable: bool = True) -> ChannelGroup:
    """Five channels: two of kernel 3, three of kernel 5."""
    return ChannelGroup(
        block=0,
        gate=f'{name}.gate',
        shift=f'{name}.shift',
        kernels=((3, 2), (5, 3)),
        members=(
            Member(f'{name}.gate', 0, 0, 5),
            Member(f'{name}.shift', 0, 0, 5),
            Member(f'{name}.k3', 0, 0, 2),
            Member(f'{name}.k5', 0, 2, 5),
            Member(f'{name}.out', 1, 0, 5),
        ),
        inside=f'{name}.',
        output=(f'{name}.bn.weight', f'{name}.bn.bias') if droppable else (),
    )


def tensors() -> dict[str, torch.Tensor]:
    return {
        'a.gate': torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]),
        'a.k3': torch.tensor([[1.0], [2.0]]),
        'a.k5': torch.tensor([[3.0, 30.0], [4.0, 40.0], [5.0, 50.0]]),
        'a.out': torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0], [10.0, 20.0, 30.0, 40.0, 50.0]]),
        'a.bn.num_batches_tracked': torch.tensor(7),
        'ab.gate': torch.tensor([9.0]),
    }


def test_group_knows_its_length_and_kernels():
    assert group().channels == 5
    assert group().droppable
    assert not group(droppable=False).droppable
    assert group().kept_kernels(bools('01101')) == ((3, 1), (5, 2))
    assert group().kept_kernels(bools('00010')) == ((5, 1),)
    assert group().kept_kernels(bools('00000')) == ()


def test_take_by_hand():
    before = tensors()
    taken = take(before, [group()], {'a.gate': bools('01101')})
    assert {name: tensor.tolist() for name, tensor in taken.items()} == {
        'a.gate': [2.0, 3.0, 5.0],
        'a.k3': [[2.0]],
        'a.k5': [[3.0, 30.0], [5.0, 50.0]],
        'a.out': [[2.0, 3.0, 5.0], [20.0, 30.0, 50.0]],
        'a.bn.num_batches_tracked': 7,
        'ab.gate': [9.0],
    }
    assert before['a.gate'].tolist() == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert taken['ab.gate'] is before['ab.gate']


def test_take_serves_bools():
    taken = take({'a.out': bools('10010')[None]}, [group()], {'a.gate': bools('10011')})
    assert taken['a.out'].tolist() == [[True, True, False]]
    assert taken['a.out'].dtype == torch.bool


def test_dropped_kernel_loses_its_tensor():
    taken = take(tensors(), [group()], {'a.gate': bools('00101')})
    assert set(taken) == set(tensors()) - {'a.k3'}
    assert taken['a.out'].tolist() == [[3.0, 5.0], [30.0, 50.0]]


def test_dropped_block_loses_all_its_tensors_and_no_other():
    taken = take(tensors(), [group()], {'a.gate': bools('00000')})
    assert set(taken) == {'ab.gate'}


def test_scalars_and_dimensions_of_size_one_are_left_alone():
    step, row, col = torch.tensor(3.0), torch.tensor([[6.0], [7.0]]), torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]])
    keep = {'a.gate': bools('01101')}
    assert take({'a.gate': step}, [group()], keep)['a.gate'] is step
    assert take({'a.out': row}, [group()], keep)['a.out'] is row
    assert take({'a.out': col}, [group()], keep)['a.out'].tolist() == [[2.0, 3.0, 5.0]]


def test_a_kernel_of_one_channel_lives_or_dies_whole():
    single = ChannelGroup(0, 'g', 's', ((3, 1), (5, 1)), (Member('k3', 0, 0, 1), Member('k5', 0, 1, 2)), 'x.', ())
    values = {'k3': torch.tensor([1.0]), 'k5': torch.tensor([2.0])}
    assert take(values, [single], {'g': bools('01')}) == {'k5': values['k5']}


def test_groups_without_a_plan_stay_whole():
    before = tensors()
    taken = take(before, [group(), group('b')], {})
    assert all(taken[name] is tensor for name, tensor in before.items())
    whole = take(before, [group()], {'a.gate': bools('11111')})
    assert all(whole[name] is tensor for name, tensor in before.items())


def test_groups_are_thinned_each_by_its_own_plan():
    values = {'a.gate': torch.arange(5.0), 'b.gate': torch.arange(5.0)}
    taken = take(values, [group('a'), group('b')], {'a.gate': bools('10000'), 'b.gate': bools('00011')})
    assert taken['a.gate'].tolist() == [0.0]
    assert taken['b.gate'].tolist() == [3.0, 4.0]


@pytest.mark.parametrize(
    ('keep', 'message'),
    [
        ({'c.gate': bools('11111')}, "keep plan names 'c.gate', which is no gate; gates are a.gate, b.gate"),
        ({'a.gate': bools('1111')}, "keep plan of 'a.gate' must be 5 bools, got torch.bool (4,)"),
        ({'a.gate': torch.ones(5)}, "keep plan of 'a.gate' must be 5 bools, got torch.float32 (5,)"),
        ({'a.gate': bools('11111')[None]}, "keep plan of 'a.gate' must be 5 bools, got torch.bool (1, 5)"),
        ({'b.gate': bools('00000')}, "keep plan of 'b.gate' leaves no channel, and the block is not residual"),
    ],
)
def test_check_keep_refuses(keep, message):
    with pytest.raises(ValueError, match=f'^{re.escape(message)}$') as caught:
        check_keep([group('a'), group('b', droppable=False)], keep)
    assert '\n' not in str(caught.value)


def test_check_keep_lets_a_residual_block_go():
    check_keep([group('a'), group('b', droppable=False)], {'a.gate': bools('00000'), 'b.gate': bools('00001')})
