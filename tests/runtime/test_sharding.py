"""Weights split over two processes: the same training, checkpoints and samples as whole ones.

In float64, where the two differ by nothing but the order of sums over the batch, about 1e-16 of
them. Where a gradient should be 0, since a norm takes out again what that weight does, it is such
an error of 1e-17, and Adam divides it by eps = 1e-8 and steps 1e-2 times that: 1e-11 at a step.
"""

from runtime.processes import World
from runtime.sharding import load_optimizer, shard, unsharded, whole

import copy

import pytest
import torch
from launching import start_ranks
from rank_sharded import CLIP, KINDS, Training, batch, make, under_autocast

SUMS, WEIGHTS = dict(rtol=1e-10, atol=1e-14), dict(rtol=0, atol=1e-10)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{kind: what one process and each of two ranks saw}; the ranks also resume from the one."""
    folder, seen = tmp_path_factory.mktemp("sharded"), {}
    alone = {kind: Training(kind) for kind in KINDS}
    for kind, training in alone.items():
        seen[kind] = {"first": training.run(range(3)), "held": training.held()}
        torch.save(training.state(3), folder / f"{kind}.pt")
        seen[kind]["state 3"] = torch.load(folder / f"{kind}.pt", weights_only=True)
    ranks = start_ranks("rank_sharded", folder)
    for kind, training in alone.items():
        seen[kind] |= {"then": training.run(range(3, 6)), "state 6": training.state(6)}
    done = [rank.wait() for rank in ranks]
    assert [d.code for d in done] == [0, 0], done[0].err + done[1].err
    saw = [torch.load(folder / f"rank{r}.pt", weights_only=True) for r in range(2)]
    both = {kind: (seen[kind], saw[0][kind], saw[1][kind]) for kind in KINDS}
    return both | {"autocast": [rank["autocast"] for rank in saw]}


def same_state(found, expected):
    for part in ("model", "ema"):
        assert list(found[part]) == list(expected[part])
        torch.testing.assert_close(dict(found[part]), dict(expected[part]), **WEIGHTS)
    found, expected = found["optimizer"], expected["optimizer"]
    assert found["param_groups"] == expected["param_groups"]
    torch.testing.assert_close(found["state"], expected["state"], **SUMS)


# ------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_train_as_one_process_with_the_whole_batch(runs, kind):
    """Losses, norms of gradients that are clipped, weights, Adam's moments and running means."""
    alone, *ranks = runs[kind]
    assert all(norm > 2 * CLIP for _, norm in alone["first"] + alone["then"])
    for rank in ranks:
        for part in ("first", "then"):
            torch.testing.assert_close(rank[part], alone[part], **SUMS)
    same_state(ranks[0]["state 3"], alone["state 3"])
    same_state(ranks[0]["state 6"], alone["state 6"])


@pytest.mark.parametrize("kind", KINDS)
def test_each_rank_holds_half(runs, kind):
    """What has an odd first dimension is padded, a bias of 3 by one number: below 1 % here."""
    alone, *ranks = runs[kind]
    for part in ("held", "held after", "resumed held"):
        for rank in ranks:
            for held, in_all in zip(rank[part], alone["held"], strict=True):
                assert 0.49 * in_all < held < 0.51 * in_all


# ---------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("kind", KINDS)
def test_a_split_run_goes_on_in_one_process(runs, kind):
    """Where convolutions' moments again lie as their weights do: a fused Adam needs them so."""
    alone, split, _ = runs[kind]
    resumed = Training(kind, state=split["state 3"])
    for p, moments in resumed.optimizer.state.items():
        assert moments["exp_avg"].stride() == moments["exp_avg_sq"].stride() == p.stride()
    torch.testing.assert_close(resumed.run(range(3, 6)), split["then"], **SUMS)
    same_state(resumed.state(6), split["state 6"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_of_one_process_goes_on_split_and_with_checkpointing(runs, kind):
    alone, *ranks = runs[kind]
    for rank in ranks:
        torch.testing.assert_close(rank["resumed"], alone["then"], **SUMS)
    same_state(ranks[0]["resumed state 6"], alone["state 6"])


def test_only_the_first_rank_gets_what_is_gathered(runs):
    for kind in KINDS:
        _, first, second = runs[kind]
        assert all(torch.is_tensor(value) for value in first["state 3"]["model"].values())
        buffers = {name for name, value in second["state 3"]["model"].items() if value is not None}
        assert buffers == ({"pos_embed"} if kind == "dit" else set())


def test_a_state_without_split_tensors_is_itself():
    training = Training("dit")
    training.run(range(1))
    for state in (training.net.state_dict(), training.optimizer.state_dict(), [{"a": 1}, None]):
        assert whole(state) is state


def test_loading_a_plain_optimizer_is_what_it_always_was():
    """Bit for bit, and in the same layout."""
    training = Training("unet")
    training.run(range(2))
    state, found, expected = training.state(2), *(Training("unet").optimizer for _ in range(2))
    load_optimizer(found, state["optimizer"])
    expected.load_state_dict(state["optimizer"])
    pairs = list(zip(found.state.values(), expected.state.values(), strict=True))
    assert len(pairs) == len(list(training.net.parameters()))
    for moments, others in pairs:
        assert moments.keys() == others.keys()
        for name, value in moments.items():
            assert torch.equal(value, others[name]) and value.dtype == others[name].dtype
            assert value.stride() == others[name].stride()


# ------------------------------------------------------------------------- forwards and precision


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_may_sample_differently_often(runs, kind):
    """One rank calls the running mean 3 times, the other never; and the weights the other way."""
    _, *ranks = runs[kind]
    assert [len(rank["ema samples"]) for rank in ranks] == [3, 0]
    assert [len(rank["samples"]) for rank in ranks] == [0, 3]
    assert [len(rank["resumed samples"]) for rank in ranks] == [0, 1]
    net, same = make(kind).double(), dict(rtol=0, atol=1e-13)
    for part, rank, name in (("ema", 0, "ema samples"), ("model", 1, "samples")):
        net.load_state_dict(ranks[0]["state 3"][part])
        with torch.no_grad():
            for step, found in enumerate(ranks[rank][name]):
                torch.testing.assert_close(found, net(*batch(step)[0]), **same)


@pytest.mark.parametrize("kind", KINDS)
def test_a_forward_without_a_backward_leaves_the_weights_split(runs, kind):
    """What each rank then holds, test_each_rank_holds_half tells."""
    alone, *ranks = runs[kind]
    net, same = make(kind).double(), dict(rtol=0, atol=1e-13)
    for i, weights in enumerate((ranks[0]["state 6"]["model"], alone["state 3"]["ema"])):
        net.load_state_dict(weights)
        with torch.no_grad():
            for rank in ranks:
                torch.testing.assert_close(rank["answers"][i], net(*batch(0)[0]), **same)


def test_autocast_rounds_split_weights_as_it_rounds_whole_ones(runs):
    """The same batch on both ranks: the mean of their gradients is either, to the last bit."""
    expected, gradients = under_autocast(World())
    first, second = runs["autocast"]
    assert expected.dtype == torch.bfloat16
    assert torch.equal(first[0], expected) and torch.equal(second[0], expected)
    for found, gradient in zip(first[1], gradients, strict=True):
        assert found.dtype == torch.float32 and torch.equal(found, gradient)


def test_one_process_has_nothing_to_split():
    net = make("dit")
    before = list(net.parameters())
    shard(net, World())
    with unsharded(net):
        assert type(net).__name__ == "DiT"
        assert all(p is q for p, q in zip(net.parameters(), before, strict=True))


@pytest.mark.parametrize("there, here", [({}, {"fused": True}), ({"fused": True}, {})])
def test_an_optimizer_goes_on_in_its_own_way(there, here):
    """Of a run on a CPU on a GPU, or back: the settings and moments of the one, fused or not."""

    def parameters():
        return [torch.nn.Parameter(torch.arange(6.0).reshape(2, 3).t())]

    def step(optimizer):
        (p,) = optimizer.param_groups[0]["params"]
        p.grad = torch.cos(3 * p.detach())
        optimizer.step()

    whole = torch.optim.Adam(parameters(), lr=0.1, betas=(0.5, 0.7), **there)
    other = torch.optim.Adam(parameters(), lr=7.0, **here)
    for _ in range(3):
        step(whole)
    load_optimizer(other, copy.deepcopy(whole.state_dict()))
    with torch.no_grad():
        other.param_groups[0]["params"][0].copy_(whole.param_groups[0]["params"][0])
    assert other.param_groups[0]["fused"] == here.get("fused")
    assert other.param_groups[0]["lr"] == 0.1 and other.param_groups[0]["betas"] == (0.5, 0.7)
    for _ in range(3):
        step(whole)
        step(other)
    for one, two in zip(*(o.param_groups[0]["params"] for o in (whole, other)), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)
