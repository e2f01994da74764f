"""Memory goes round, and never while somebody looks at it."""

import torch

from data_pipeline.buffers import Buffers


def test_memory_is_taken_again_when_its_tensor_is_gone() -> None:
    buffers = Buffers(2)
    one = buffers.empty((3, 4))
    address = one.data_ptr()
    del one
    assert buffers.empty((3, 4)).data_ptr() == address


def test_a_view_keeps_memory_from_being_taken_again() -> None:
    buffers = Buffers(4)
    whole = buffers.empty((3, 4))
    whole.fill_(1.0)
    row = whole[1].detach().view(2, 2)
    as_numpy = buffers.empty((3, 4)).fill_(2.0).numpy()
    del whole
    for n in range(6):
        buffers.empty((3, 4)).fill_(float(n + 3))
    assert (row == 1.0).all() and (as_numpy == 2.0).all()


def test_tensors_in_use_share_nothing_even_past_the_limit() -> None:
    buffers = Buffers(2)
    held = [buffers.empty((5,)).fill_(float(n)) for n in range(6)]
    assert [t.unique().tolist() for t in held] == [[float(n)] for n in range(6)]
    assert all(t.dtype == torch.float32 for t in held)


def test_another_shape_is_other_memory() -> None:
    buffers = Buffers(3)
    assert buffers.empty((2, 3)).shape == (2, 3)
    assert buffers.empty((7,)).shape == (7,)
