"""The bytes that attention's kernels move, lane by lane, and the copies that do not happen."""

import pytest
import torch
from attention_math import LAYOUTS, inputs, separate
from recording import Operators

from kernels import attention
from kernels.attention import _backward, _forward
from tests.cases.traffic import count_traffic

# lengths of whole tiles and of partial ones, head dimensions that are powers of two and are not
CASES = pytest.mark.parametrize(
    "n, m, dim, dtype",
    [
        pytest.param(128, 64, 16, torch.float32, id="128-64-16-float32"),
        pytest.param(35, 77, 40, torch.float32, id="35-77-40-float32"),
        pytest.param(128, 256, 64, torch.bfloat16, id="128-256-64-bfloat16"),
        pytest.param(130, 77, 32, torch.bfloat16, id="130-77-32-bfloat16"),
        pytest.param(7, 200, 40, torch.float16, id="7-200-40-float16"),
        pytest.param(200, 2, 24, torch.float16, id="200-2-24-float16"),
        pytest.param(64, 64, 160, torch.bfloat16, id="64-64-160-bfloat16"),
    ],
)


def size(tensor):
    return tensor.numel() * tensor.element_size()


def tiles(launch, batch_heads, length):
    """Tiles of `length` that each head was cut into; they take at least 16 rows, or all."""
    _, grid = launch
    assert grid[0] % batch_heads == 0 and set(grid[1:]) <= {1}
    assert grid[0] // batch_heads <= -(-length // 16)
    return grid[0] // batch_heads


@CASES
def test_forward_reads_keys_once_for_each_tile_of_queries(n, m, dim, dtype):
    q, k, v, _ = inputs(separate, 1, 2, n, m, dim, dtype)
    with count_traffic(q=q, k=k, v=v) as traffic:
        o, lse = _forward(q, k, v, 0.2)
    (launch,) = traffic.launches
    query_tiles = tiles(launch, 2, n)
    assert traffic.of["q"] == (size(q), 0)
    assert traffic.of["k"] == traffic.of["v"] == (query_tiles * size(k), 0)
    assert traffic.loaded == size(q) + 2 * query_tiles * size(k)
    assert traffic.stored == size(o) + size(lse)


@CASES
def test_backward_reads_each_side_once_for_each_tile_of_the_other(n, m, dim, dtype):
    q, k, v, do = inputs(separate, 1, 2, n, m, dim, dtype)
    o, lse = _forward(q, k, v, 0.2)
    with count_traffic(q=q, k=k, v=v, do=do, o=o, lse=lse) as traffic:
        gradients = _backward(do, q, k, v, o, lse, 0.2)
    of_dq, of_dkdv = traffic.launches
    query_tiles, key_tiles = tiles(of_dq, 2, n), tiles(of_dkdv, 2, m)
    assert traffic.of["q"] == traffic.of["do"] == ((1 + key_tiles) * size(q), 0)
    assert traffic.of["k"] == traffic.of["v"] == ((query_tiles + 1) * size(k), 0)
    assert traffic.of["o"] == (size(o), 0)
    assert traffic.of["lse"] == ((1 + key_tiles) * size(lse), 0)
    named = sum(loaded for loaded, _ in traffic.of.values())
    assert traffic.loaded == named + key_tiles * size(lse)  # delta, a number for each query as lse
    assert traffic.stored == sum(map(size, gradients)) + size(lse)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_no_lane_leaves_its_tensor_and_no_two_programs_meet(layout):
    q, k, v, do = inputs(layout, 2, 2, 35, 77, 40, torch.float16)
    with count_traffic() as traffic:
        o, lse = _forward(q, k, v, 0.2)
        _backward(do, q, k, v, o, lse, 0.2)
    assert len(traffic.launches) == 3
    assert traffic.out_of_bounds == traffic.write_write == traffic.read_write == 0


VIEWS = ("view", "_unsafe_view", "permute", "unbind", "transpose", "split", "detach", "alias")


def new_tensors(operators):
    """Names of the operators, in order, that made more than a view."""
    return [name for name in operators.names if name.removeprefix("aten::") not in VIEWS]


def chunked(qkv, h, d):
    return (t.unflatten(-1, (h, d)).transpose(1, 2) for t in qkv.chunk(3, dim=-1))


def unbound(qkv, h, d):
    return qkv.unflatten(-1, (3, h, d)).permute(2, 0, 3, 1, 4).unbind(0)


@pytest.mark.parametrize("cut", [chunked, unbound])
def test_nothing_is_copied_between_two_projections(cut):
    """Heads are cut and merged by strides alone, and cut again in the gradient."""
    b, n, h, d = 2, 33, 3, 16
    qkv, upstream = torch.randn(b, n, 3 * h * d, requires_grad=True), torch.randn(b, n, h * d)
    with Operators() as forward:
        merged = attention(*cut(qkv, h, d)).transpose(1, 2).reshape(b, n, h * d)
    assert new_tensors(forward) == ["diffusion_book::attention"]
    with Operators() as backward:
        merged.backward(upstream)
    made = new_tensors(backward)
    assert made[0] == "diffusion_book::attention_backward"
    # the gradients of q, k and v become one tensor; unbind's backward stacks them in an order of
    # its own, and another copy puts that right
    gathered = ["aten::cat"] if cut is chunked else ["aten::stack", "aten::clone"]
    assert made[1:] == gathered
