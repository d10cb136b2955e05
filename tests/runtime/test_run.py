"""runtime.Run, the loop of every chapter, with a network of some hundred numbers, by formulas."""

from runtime.checkpoints import chosen_ema
from runtime.commandline import BadInput
from runtime.files import read_log
from runtime.processes import World
from runtime.run import EMA, learning_rate

import dataclasses
import functools
import math

import numpy as np
import pytest
import torch
from run_folders import assert_same, assert_same_run, rows, saved
from toy_run import IMAGES, NULL, SHAPE, Alone, Counter, Net, T, losses_of, make, train, weights

# ---------------------------------------------------------------------------------- what is drawn


def test_what_is_drawn_is_a_function_of_seed_step_and_name(tmp_path):
    """The same for one process and for three, whatever was drawn before, and else different."""
    (part,) = make(tmp_path, batch_size=24, steps=1).parts(5)
    run = make(tmp_path, batch_size=24, resume="never")
    drawn = (
        run.noise(part, (24, 1, 8, 8)),
        run.uniform(part, T),
        run.hide(part, torch.zeros(24), 0.5),
    )
    pieces = []
    for rank in range(3):
        mine = make(tmp_path, batch_size=24, resume="never", world=Alone(rank, 3))
        (some,) = mine.parts(5)
        hidden = mine.hide(some, torch.zeros(8), 0.5)
        pieces.append((mine.noise(some, (8, 1, 8, 8)), mine.uniform(some, T), hidden))
    for whole, parts in zip(drawn, zip(*pieces, strict=True), strict=True):
        assert torch.equal(torch.cat(parts), whole)
    again = run.noise(part, (24, 1, 8, 8))
    assert torch.equal(again, drawn[0])
    (later,) = run.parts(6)
    other = make(tmp_path, batch_size=24, seed=1, resume="never")
    for different in (
        run.noise(later, (24, 1, 8, 8)),
        run.noise(part, (24, 1, 8, 8), "posterior"),
        other.noise(part, (24, 1, 8, 8)),
    ):
        assert abs(np.corrcoef(different.flatten(), again.flatten())[0, 1]) < 4 / 1536**0.5
    assert not torch.equal(run.uniform(later, T), drawn[1])
    assert not torch.equal(run.uniform(part, T, "s"), drawn[1])


def test_noise_is_normal_timesteps_are_uniform_and_a_share_of_labels_is_hidden(tmp_path):
    run = make(tmp_path, batch_size=2000, resume="never")
    (part,) = run.parts(0)
    eps, t = run.noise(part, (2000, 1, 4, 4)), run.uniform(part, 10)
    assert abs(eps.mean()) < 4 / 32000**0.5 and abs(eps.var() - 1) < 4 * (2 / 32000) ** 0.5
    assert len(eps.flatten(1).unique(dim=0)) == 2000  # each image has its own
    counts = torch.bincount(t, minlength=10).double()
    assert len(counts) == 10 and ((counts - 200) ** 2 / 200).sum() < 33.7  # p = 1e-4
    y = run.hide(part, torch.arange(2000) % NULL, 0.25)
    hidden = y == NULL
    assert abs(hidden.double().mean() - 0.25) < 4 * (0.1875 / 2000) ** 0.5
    assert torch.equal(y[~hidden], (torch.arange(2000) % NULL)[~hidden])
    assert run.hide(part, None, 0.25) is None


def test_images_are_those_of_the_rows_and_have_labels_where_there_are_classes(tmp_path):
    run = make(tmp_path, flip=True, resume="never")
    (part,) = run.parts(2)
    x, y = run.images(part)
    expected, labels = IMAGES.batch(part.rows, part.flip)
    assert torch.equal(x, expected) and torch.equal(y, labels) and part.flip.any()
    flat = dataclasses.replace(IMAGES, class_names=())
    assert make(tmp_path, ds=flat, resume="never").images(part)[1] is None


# ------------------------------------------------------------------------------------ the descent


def test_the_gradient_is_that_of_the_mean_over_the_batch_in_any_number_of_parts(tmp_path):
    found = []
    for accumulate in (1, 2, 3, 8):
        run = make(tmp_path, accumulate=accumulate, resume="never")
        for part in run.parts(0):
            run.backward(*losses_of(run, part))
        found.append([p.grad.clone() for p in run.net.parameters()])
    run = make(tmp_path, resume="never")
    (part,) = run.parts(0)
    mean = losses_of(run, part)[0].mean()
    for expected, *others in zip(
        torch.autograd.grad(mean, list(run.net.parameters())), *found, strict=True
    ):
        for other in others:
            torch.testing.assert_close(other, expected, rtol=1e-4, atol=1e-6)


def test_weights_multiply_gradients_and_not_what_is_logged(tmp_path):
    plain, weighted = (make(tmp_path / name) for name in ("plain", "weighted"))
    (part,) = plain.parts(0)
    plain.bar = weighted.bar = World().progress(1)
    losses, level = losses_of(plain, part)
    plain.backward(losses, level, kl=2 * losses)
    losses, level = losses_of(weighted, part)
    weighted.backward(losses, level, torch.full((8,), 0.5), kl=2 * losses)
    for a, b in zip(plain.net.parameters(), weighted.net.parameters(), strict=True):
        torch.testing.assert_close(0.5 * a.grad, b.grad)
    for run in (plain, weighted):
        run.descend(also=lambda: {"more": 7.0})
    row, other = (read_log(run.log_path)[0] for run in (plain, weighted))
    assert all(row[name] == other[name] for name in ("loss", "kl", "more"))
    assert row["loss"] == pytest.approx(losses.mean().item())
    assert row["kl"] == pytest.approx(2 * losses.mean().item())
    assert row["more"] == 7.0
    quarter = (level * 4).long()
    for i in range(4):
        there = losses[quarter == i]
        assert (f"loss_q{i + 1}" in row) == (len(there) > 0)
        if len(there):
            assert row[f"loss_q{i + 1}"] == pytest.approx(there.mean().item())
            assert row[f"kl_q{i + 1}"] == pytest.approx(2 * there.mean().item())


def test_weight_decay_makes_it_adamw_and_0_leaves_adam():
    """Decoupled from the gradient: without any, a step takes lr x decay of each weight away."""
    for decay, kept in ((0.1, 1 - 0.5 * 0.1), (0.0, 1.0)):
        weight = torch.nn.Parameter(torch.tensor([2.0, -3.0]))
        optimizer = World().adam(0.5, weight_decay=decay)([weight])
        weight.grad = torch.zeros(2)
        optimizer.step()
        torch.testing.assert_close(weight.data, kept * torch.tensor([2.0, -3.0]))


def test_adam_steps_along_the_clipped_gradient_with_the_rate_of_the_step(tmp_path):
    """Weights after three steps of plain gradient descent, by hand."""
    sgd = functools.partial(torch.optim.SGD, lr=0.1)
    run = make(tmp_path / "run", optimizer=sgd, steps=3, clip_grad=0.05, lr=0.1)
    hand = make(tmp_path / "hand", optimizer=sgd)
    train(run)
    for step in range(3):
        (part,) = hand.parts(step)
        gradient = torch.autograd.grad(losses_of(hand, part)[0].mean(), [*hand.net.parameters()])
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradient))
        assert norm > 0.05
        rate = learning_rate(step, 3, 0.1, 3)
        for p, g in zip(hand.net.parameters(), gradient, strict=True):
            p.data -= rate * 0.05 / norm * g
    for a, b in zip(run.net.parameters(), hand.net.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("decays", [(0.5,), (0.2, 0.9, 0.999)])
def test_running_means_follow_their_decays(decays, tmp_path):
    """w_ema <- d w_ema + (1 - d) w with d = min(decay, (1 + n) / (10 + n)); update 0 copies."""
    seen = []
    run = train(make(tmp_path, ema=decays), each=lambda run: seen.append(weights(run.net)))
    assert run.ema is run.emas[0] and len(run.emas) == len(decays) and not run.ema.training
    for ema, decay in zip(run.emas, decays, strict=True):
        mean = seen[0]
        for n, now in enumerate(seen[1:], start=1):
            d = min(decay, (1 + n) / (10 + n))
            mean = [d * m + (1 - d) * w for m, w in zip(mean, now, strict=True)]
        for found, expected in zip(weights(ema), mean, strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    state = saved(tmp_path)
    for i, decay in enumerate(decays):
        kept = chosen_ema(state, "ckpt.pt", decay)
        assert_same(dict(kept), dict(run.emas[i].state_dict()))
    assert_same(dict(chosen_ema(state, "ckpt.pt", 0)), dict(run.net.state_dict()))
    with pytest.raises(BadInput, match="--ema 0.7: ckpt.pt has"):
        chosen_ema(state, "ckpt.pt", 0.7)


def test_buffers_are_copied_into_a_running_mean_not_averaged():
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    average = EMA(net, 0.9)
    for n in range(3):
        net(torch.randn(4, 2))
        average.update(net, n)
        for mine, other in zip(average.net.buffers(), net.buffers(), strict=True):
            assert mine is not other and torch.equal(mine, other)
    assert average.net[1].num_batches_tracked == 3 and not average.net.training


def test_a_run_without_a_running_mean_samples_the_network_itself(tmp_path):
    """The first stage of latent diffusion: its checkpoint holds the weights under both names."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run = train(make(whole, ema=()))
    assert run.ema is run.net and run.emas == []
    for stop in (5, None):
        train(make(broken, ema=()), stop)
    assert_same_run(whole, broken)
    state = saved(whole)
    assert_same(dict(state["ema"]), dict(state["model"]))
    assert state["more_emas"] == [] and chosen_ema(state, whole) is state["ema"]
    with pytest.raises(BadInput, match="--ema 0.9: .* has none"):
        chosen_ema(state, whole, 0.9)


def test_the_model_gives_fp32_whatever_the_network_gives(tmp_path):
    class Two(Net):
        def forward(self, x, t, y=None):
            out = super().forward(x, t, y).bfloat16()
            return out, out.double(), t

    run = make(tmp_path, more={"net": Two()})
    x, t = torch.zeros(2, *SHAPE), torch.tensor([3, 4])
    out, again, codes = run.model(x, t)
    assert out.dtype == again.dtype == torch.float32 and torch.equal(codes, t)
    assert make(tmp_path, resume="never").model(x, t).dtype == torch.float32


def test_a_compiled_network_leaves_the_same_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    run = train(make(tmp_path / "compiled", compile=True))
    assert run.wrapped is not run.net
    train(make(tmp_path / "plain"))
    compiled, plain = saved(tmp_path / "compiled"), saved(tmp_path / "plain")
    assert list(compiled["model"]) == list(plain["model"]) == list(plain["ema"])
    for name in plain["model"]:
        torch.testing.assert_close(compiled["model"][name], plain["model"][name])


# -------------------------------------------------------------------------------- what is written


def test_the_log_has_the_mean_losses_between_two_lines(tmp_path):
    seen = []

    def note(run):
        seen.append(run.losses[0])

    run = train(make(tmp_path, log_every=4, save_every=8, steps=10), each=note)
    found = read_log(tmp_path / "log.jsonl")
    assert [row["step"] for row in found] == [4, 8, 10]
    for row, steps in zip(found, (range(0, 4), range(4, 8), range(8, 10)), strict=True):
        mean = torch.cat([seen[step] for step in steps]).double().mean().item()
        assert row["loss"] == pytest.approx(mean, rel=1e-6)
        assert row["lr"] == learning_rate(steps[-1], 10, run.cfg.lr, 3)
        assert row["images_per_s"] > 0 and row["peak_memory_mb"] > 50


def test_what_is_due_is_never_due_after_the_last_step(tmp_path):
    due = {2: [], 5: [], 0: []}

    def note(run):
        for every, steps in due.items():
            steps += [run.step] if run.due(every) else []
        assert run.done == (run.step == 10)

    train(make(tmp_path), each=note)
    assert due == {2: [2, 4, 6, 8], 5: [5], 0: []}


def test_checkpoints_are_kept_and_each_is_of_its_step(tmp_path):
    seen = {}
    run = make(tmp_path, keep_every=6, save_every=3, steps=13, more={"facts": {"scale": 0.5}})
    train(run, each=lambda run: seen.update({run.step: weights(run.net)}))
    kept = {path.name: saved(tmp_path, path.name) for path in tmp_path.glob("ckpt*.pt")}
    steps = {name: state["step"] for name, state in kept.items()}
    assert steps == {
        "ckpt.pt": 13,
        "ckpt-previous.pt": 12,
        "ckpt-000006.pt": 6,
        "ckpt-000012.pt": 12,
    }
    for state in kept.values():
        for value, expected in zip(state["model"].values(), seen[state["step"]], strict=True):
            assert torch.equal(value.double(), expected)
        assert state["script"] == "toy" and state["settings"] == {"width": 4}
        assert state["shape"] == [1, 4, 4] and state["class_names"] == ["a", "b", "c"]
        assert state["scale"] == 0.5 and state["config"]["data_key"] == "of these"
        assert state["config"]["ema"] == [0.998] and state["config"]["out"] == str(tmp_path)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(bad, tmp_path):
    run = make(tmp_path, log_every=1, save_every=1)
    said = f"not finite at step 5; the last good checkpoint is {tmp_path / 'ckpt.pt'}"
    with pytest.raises(BadInput, match=said):
        for step in run.steps():
            for part in run.parts(step):
                losses, level = losses_of(run, part)
                run.backward(losses * (bad if step == 5 else 1), level)
            run.descend()
    state = saved(tmp_path)
    *logged, last = rows(tmp_path)
    assert state["step"] == 5 and [row["step"] for row in logged] == [1, 2, 3, 4, 5]
    assert last["step"] == 6 and said in last["stopped"] and last.keys() == {"step", "stopped"}
    for part in ("model", "ema"):
        assert all(value.isfinite().all() for value in state[part].values())


def test_a_run_writes_for_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(make(tmp_path, tensorboard=True))
    events = EventAccumulator(str(tmp_path)).Reload()
    found = [(event.step, event.value) for event in events.Scalars("loss")]
    expected = [(row["step"], pytest.approx(row["loss"])) for row in rows(tmp_path)]
    assert found == expected and len(found) == 10


def test_what_is_saved_belongs_to_all_that_the_chapter_did_in_the_step(tmp_path):
    """Also to what it did after descend()."""
    counter = Counter()

    def count(run):
        counter.seen += 1000

    train(make(tmp_path, more={"keep": {"counter": counter}}), each=count)
    assert saved(tmp_path)["counter"]["seen"] == 10080
    assert saved(tmp_path, "ckpt-previous.pt")["counter"]["seen"] == 9 * 1008
