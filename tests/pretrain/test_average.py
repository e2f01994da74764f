"""The averaged weights: their definition, a resume bit for bit, and a swap that leaves no trace."""

import io

import pytest
import torch
from torch import Tensor

from pretrain.average import Average


def walk(count: int, n: int = 33, seed: int = 0) -> list[list[Tensor]]:
    """The two shards of a rank after each of `count` updates."""
    generator = torch.Generator().manual_seed(seed)
    steps = 0.1 * torch.randn(count, n, generator=generator)
    path = 1 + steps.cumsum(0)
    return [[row[:20].clone(), row[20:].clone()] for row in path]


def follow(average: Average, path: list[list[Tensor]], first: int = 0) -> None:
    for step, shards in enumerate(path, first):
        average.before_step()
        average.update(step, shards)


def bits(tensors: list[Tensor]) -> list[list[int]]:
    return [tensor.detach().cpu().view(torch.int32).tolist() for tensor in tensors]


def through_a_file(state: list[Tensor]) -> list[Tensor]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_the_average_begins_with_the_first_copy_and_takes_every_25th_update() -> None:
    average, path = Average(25, 0.5), walk(75)
    follow(average, path[:24])
    assert average.state() == []
    follow(average, path[24:49], 24)
    assert bits(average.state()) == bits(path[24])
    follow(average, path[49:], 49)
    want = [torch.lerp(torch.lerp(a, b, 0.5), c, 0.5) for a, b, c in zip(path[24], path[49], path[74], strict=True)]
    assert bits(average.state()) == bits(want)


def test_the_average_is_the_exponential_one_of_the_paper() -> None:
    """Against float64. A copy rounds twice to 24 bits, and its errors fade as the weights do."""
    average, path = Average(1, 0.99), walk(200)
    follow(average, path)
    want = [shard.double() for shard in path[0]]
    for shards in path[1:]:
        want = [0.99 * mean + 0.01 * shard.double() for mean, shard in zip(want, shards, strict=True)]
    largest = max(shard.abs().max().item() for shards in path for shard in shards)
    for got, expected in zip(average.state(), want, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=200 * 2 * 2**-24 * largest)


def test_the_average_is_a_copy_that_later_updates_do_not_reach() -> None:
    average, (shards,) = Average(1, 0.99), walk(1)
    average.update(0, shards)
    before = bits(average.state())
    for shard in shards:
        shard.add_(1)
    assert bits(average.state()) == before


@pytest.mark.parametrize("cut", [3, 10, 11, 14, 57])
def test_a_resumed_average_is_the_same_to_the_last_bit(cut: int) -> None:
    """Cut before the first copy, at one, behind one, between two and late."""
    path = walk(80)
    whole, first, second = (Average(5, 0.99) for _ in range(3))
    follow(whole, path)
    follow(first, path[:cut])
    second.restore(through_a_file(first.state()))
    follow(second, path[cut:], cut)
    assert bits(second.state()) == bits(whole.state())
    follow(first, walk(80, seed=1)[cut:], cut)
    assert bits(second.state()) == bits(whole.state())


def test_a_restored_average_is_its_own() -> None:
    first, second = Average(1, 0.99), Average(1, 0.99)
    follow(first, walk(3))
    second.restore(first.state())
    want = bits(first.state())
    follow(second, walk(3, seed=1))
    assert bits(first.state()) == want


def odd_weights() -> list[Tensor]:
    """Two shards that an optimizer holds, with NaNs of both signs, -0.0, infinities and numbers below the normal."""
    patterns = torch.tensor([0x7FC00001, -0x3FFFFF, -0x80000000, 0x7F800000, 1, 0x3F800000], dtype=torch.int32)
    return [patterns.view(torch.float32).clone().requires_grad_(), torch.tensor([3.0, 4.0]).requires_grad_()]


@pytest.mark.parametrize("fails", [False, True])
def test_a_swap_brings_back_every_bit_even_after_an_error(fails: bool) -> None:
    average, shards = Average(1, 0.99), odd_weights()
    means = [torch.arange(6.0), torch.tensor([7.0, 8.0])]
    average.restore(means)
    before, places = bits(shards), [shard.data_ptr() for shard in shards]
    for _ in range(2):  # the second one uses the memory of the first
        try:
            with average.averaged(shards):
                assert bits(shards) == bits(means)
                if fails:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            assert fails
        assert bits(shards) == before
    assert bits(average.state()) == bits(means)
    assert places == [shard.data_ptr() for shard in shards] and all(shard.requires_grad for shard in shards)
    assert not any(tensor.requires_grad for tensor in average.state())


def test_training_goes_on_after_a_swap_as_without_it() -> None:
    path = walk(20)
    swapped, plain = Average(2, 0.9), Average(2, 0.9)
    for step, shards in enumerate(path):
        swapped.update(step, shards)
        plain.update(step, shards)
        with swapped.averaged(shards):
            pass
    assert bits(swapped.state()) == bits(plain.state())


def test_before_the_first_copy_the_weights_stand_in() -> None:
    average, (shards,) = Average(25, 0.99), walk(1)
    before = bits(shards)
    with average.averaged(shards):
        assert bits(shards) == before
    assert bits(shards) == before


def test_shards_of_other_shapes_are_refused() -> None:
    average, (shards,) = Average(1, 0.99), walk(1)
    average.restore([torch.zeros(20), torch.zeros(14)])
    before = bits(shards)
    with pytest.raises(ValueError, match=r"shapes \[\(20,\), \(14,\)\], these have \[\(20,\), \(13,\)\]"):
        average.update(0, shards)
    with pytest.raises(ValueError, match="shards"), average.averaged(shards):
        pass
    assert bits(shards) == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="copies from a GPU")
def test_a_gpus_shards_give_the_average_of_the_same_shards_on_a_cpu() -> None:
    """They are overwritten as soon as the copy lets them; large enough for it to take longer than a launch."""
    path = walk(20, n=2**22)
    here, there = Average(1, 0.99), Average(1, 0.99)
    shards = [shard.cuda() for shard in path[0]]
    for step, values in enumerate(path):
        news = [value.cuda() for value in values]
        there.before_step()
        for shard, new in zip(shards, news, strict=True):
            shard.copy_(new)
        there.update(step, shards)
        here.update(step, values)
    there.before_step()
    for shard in shards:
        shard.zero_()
    assert all(torch.equal(got, want) for got, want in zip(there.state(), here.state(), strict=True))
    with there.averaged(shards):
        assert all(torch.equal(got.cpu(), want) for got, want in zip(shards, here.state(), strict=True))
    assert not any(shard.any() for shard in shards)
