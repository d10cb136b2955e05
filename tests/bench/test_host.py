"""bench/host.py: every operation and network goes through, and the clock takes turns."""

from runtime.commandline import BadInput

import pytest
import torch

import kernels
from bench import host
from kernels.dispatch import INTERPRET

if INTERPRET:
    pytest.skip("Triton was told to interpret", allow_module_level=True)
pytest.importorskip("triton")


def test_every_row_is_made(capsys):
    threads = torch.get_num_threads()
    rows = list(host.rows(["group_norm", "attention", "sampling"], 1, True, calls=1, passes=1))
    torch.set_num_threads(threads)
    names = [name for name, *_ in rows]
    assert set(host.GOALS) <= set(names) and len(names) == 10
    assert all(ours > 0 and plain > 0 for _, ours, plain, *_ in rows)
    assert not torch.cuda.is_available() and not INTERPRET


def test_networks_take_pytorchs_operations_in_place_of_ours_and_give_them_back(monkeypatch):
    import ddpm_pixel

    assert ddpm_pixel.group_norm_silu is kernels.group_norm_silu
    with host.plain_operations():
        assert ddpm_pixel.group_norm_silu is host.plain_norm
        assert ddpm_pixel.attention is host.plain_attention
        assert kernels.group_norm_silu is not host.plain_norm
    assert ddpm_pixel.group_norm_silu is kernels.group_norm_silu


def test_the_plain_operations_are_the_same_ones():
    x, weight, bias = torch.randn(2, 8, 3, 3), torch.randn(8), torch.randn(8)
    scale, shift = torch.randn(2, 2, 8)
    for how in ({}, {"silu": False}, {"scale": scale, "shift": shift}):
        ours, plain = (
            norm(x, 4, weight, bias, **how) for norm in (kernels.group_norm_silu, host.plain_norm)
        )
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-5)


def test_turns_alternate_and_the_least_counts(monkeypatch):
    order, times = [], iter([0, 5, 10, 12, 20, 22, 30, 39])  # two rounds of two sides
    monkeypatch.setattr(host.time, "process_time", lambda: next(times))
    found = host.in_turns(lambda: order.append("a"), lambda: order.append("b"), 1, 2)
    assert order[6:] == ["a", "b", "a", "b"] and found == (2, 2)


def test_bad_input_is_named():
    with pytest.raises(BadInput, match="--rounds must be at least 1, got 0"):
        host.main(["--rounds", "0"])
