"""The instruments themselves: bfloat16 arithmetic, poisoned memory, counted bytes, found races."""

import pytest
import torch

from kernels.dispatch import INTERPRET, tl, triton, use_kernels
from tests.cases.traffic import count_traffic


def test_kernels_are_interpreted():
    assert INTERPRET and use_kernels(torch.ones(1))
    assert not use_kernels(torch.ones(1, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_fresh_memory_is_poisoned(dtype):
    like = torch.zeros(5, 7, dtype=dtype)
    assert torch.empty(3, dtype=dtype).isnan().all() and torch.empty_like(like).isnan().all()
    assert torch.empty_strided((2, 3), (1, 2), dtype=dtype).isnan().all()
    assert like.new_empty(4).isnan().all()


@triton.jit
def arithmetic(x, y, out, N: tl.constexpr):
    i = tl.arange(0, N)
    a, b = tl.load(x + i), tl.load(y + i)
    tl.store(out + i, a + b)
    tl.store(out + N + i, a * b)
    tl.store(out + 2 * N + i, tl.where(a < b, a, b))
    tl.store(out + 3 * N + i, (a.to(tl.float32) / b.to(tl.float32)).to(tl.bfloat16))
    tl.store(out + 4 * N + i, -a)
    tl.store(out + 5 * N + i, tl.maximum(a, b))


def test_bf16_arithmetic_is_that_of_pytorch():
    torch.manual_seed(0)
    x, y = (torch.randn(64).mul(100).bfloat16() for _ in range(2))
    out = torch.empty(6, 64, dtype=torch.bfloat16)
    arithmetic[(1,)](x, y, out, N=64)
    expected = torch.stack([x + y, x * y, x.minimum(y), x / y, -x, x.maximum(y)])
    assert torch.equal(out, expected)


@triton.jit
def product(x, y, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tile = i[:, None] * N + i[None, :]
    tl.store(out + tile, tl.dot(tl.load(x + tile), tl.load(y + tile)))


def test_bf16_matrix_product():
    torch.manual_seed(0)
    x, y = (torch.randn(16, 16).bfloat16() for _ in range(2))
    out = torch.empty(16, 16)
    product[(1,)](x, y, out, N=16)
    assert (out - x.double() @ y.double()).abs().max() < 1e-5


@triton.jit
def copy(x, y, n, shift, BLOCK: tl.constexpr, MASK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < n, other=0.0)
    tl.store(y + i - shift * tl.program_id(0), value, mask=(i < n) | (not MASK))


def counted(n=100, shift=0, mask=True, room=0):
    x, y = torch.randn(n), torch.empty(n + room)[:n]
    with count_traffic(x=x, y=y) as traffic:
        copy[(triton.cdiv(n, 32),)](x, y, n, shift, BLOCK=32, MASK=mask)
    return traffic


def test_a_copy_moves_every_byte_once():
    traffic = counted()
    assert (traffic.loaded, traffic.stored, traffic.floor) == (400, 400, 800)
    assert traffic.ratio == 1 and 1 <= traffic.sector_ratio < 1.1
    assert traffic.of == {"x": (400, 0), "y": (0, 400)}
    assert traffic.launches == [("copy", (4,))]
    assert traffic.out_of_bounds == traffic.write_write == traffic.read_write == 0


def test_lanes_past_the_end_are_found():
    assert counted(mask=False, room=28).out_of_bounds == 28


def test_two_programs_storing_to_one_place_are_found():
    assert counted(shift=8).write_write == 8 + 8 + 4


def test_one_program_reading_what_another_stores_is_found():
    x = torch.randn(96)
    with count_traffic() as traffic:
        copy[(3,)](x, x, 96, 16, BLOCK=32, MASK=True)
    # the 2nd program stores to 16 places that the 1st reads, the 3rd to 32 that the 2nd reads
    assert traffic.read_write == 16 + 32
