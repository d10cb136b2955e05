"""Networks recorded as CUDA graphs give the numbers that they give without, on CUDA's stand-in."""

from runtime import graphs, processes
from runtime.commandline import BadInput, RunConfig, check_run
from runtime.graphs import is_wanted
from runtime.processes import World
from runtime.rehearsal import Rehearsal

import contextlib
import importlib
import sys

import fake_graphs
import numpy as np
import pytest
import torch
from fake_graphs import Graph
from launching import start_ranks, succeed
from run_folders import assert_same, rows, saved
from tiny_runs import DRAWING, SAMPLERS, TRAININGS, fields
from toy_run import NULL, SHAPE, Net, make, train

import autoencoder
import ddpm_pixel


class Recording(World):
    """A world on the CPU that samples as one on a GPU."""

    def for_sampling(self, net):
        return graphs.Sampled(net)


@pytest.fixture(autouse=True)
def cuda(monkeypatch):
    fake_graphs.install(monkeypatch)
    monkeypatch.setattr(processes, "SAID", set())
    monkeypatch.setattr(graphs, "for_training", graphs.Graphed)


def inputs(n=3, seed=0, labels=True):
    rng = torch.Generator().manual_seed(seed)
    x, t = torch.randn(n, *SHAPE, generator=rng), torch.randint(100, (n,), generator=rng)
    return x, t, torch.randint(NULL, (n,), generator=rng) if labels else None


# --------------------------------------------------------------------------------------- sampling


@torch.no_grad()
def test_one_graph_is_recorded_for_inputs_of_a_kind_and_gives_the_same_numbers():
    net = Net().eval()
    quick = graphs.Sampled(net)
    assert quick.null == NULL and quick.settings == net.settings
    kept = []
    for seed in range(3):
        for labels in (True, False):
            given = inputs(seed=seed, labels=labels)
            kept.append((quick(*given), net(*given)))
    for found, expected in kept:  # also those that a later call could have written over
        assert torch.equal(found, expected)
    assert [graph.replays for graph in Graph.made] == [3, 3]


@torch.no_grad()
def test_none_stays_where_it_was_among_the_inputs():
    """A context is the fourth input of a network whose third is a label."""

    class Fourth(torch.nn.Module):
        def forward(self, x, t, y=None, context=None):
            return x + t + (0 if y is None else 10 * y) + (0 if context is None else 100 * context)

    net = Fourth()
    quick, (x, t, c) = graphs.Sampled(net), torch.randn(3, 4)
    for given in ((x, t, None, c), (x, t, c, None), (x, t, c), (x, t, None, 2 * c)):
        assert torch.equal(quick(*given), net(*given))
    assert [graph.replays for graph in Graph.made] == [2, 1, 1]


@torch.no_grad()
def test_a_graph_is_for_one_shape_layout_dtype_and_state_of_autocast():
    net, t = Net().eval(), torch.zeros(2, dtype=torch.int64)
    x = torch.randn(2, 1, 4, 4)
    wide = x.expand(2, 2, 4, 4)[:, :1]  # other strides
    quick = graphs.Sampled(net)
    for given in (x, wide, inputs(5)[0], x):
        at = torch.zeros(len(given), dtype=torch.int64)
        assert torch.equal(quick(given, at), net(given, at))
    assert [graph.replays for graph in Graph.made] == [2, 1, 1]
    for dtype in (torch.bfloat16, torch.float16):
        quick = graphs.Sampled(net)
        plain = quick(x, t)
        for _ in range(2):
            with torch.autocast("cpu", dtype):
                found, expected = quick(x, t), net(x, t)
            assert found.dtype is dtype and torch.equal(found, expected)
        assert torch.equal(quick(x, t), plain) and plain.dtype is torch.float32
        assert [graph.replays for graph in Graph.made[-2:]] == [2, 2]


@torch.no_grad()
def test_only_so_many_graphs_are_kept():
    net = Net().eval()
    quick = graphs.Sampled(net)
    for n in (*range(1, graphs.MOST + 3), 1, graphs.MOST + 2):
        given = inputs(n)
        assert torch.equal(quick(*given), net(*given))
    assert [graph.replays for graph in Graph.made] == [2] + [1] * (graphs.MOST - 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_change_in_place_count(dtype):
    """As a running mean's do, also where autocast rounds them."""
    net, other = Net().eval(), Net().eval()
    quick, given = graphs.Sampled(net), inputs()
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
        before = quick(*given)
        torch._foreach_lerp_([*net.parameters()], [*other.parameters()], 0.5)
        now, expected = quick(*given), net(*given)
        net.load_state_dict(other.state_dict())
        last = quick(*given)
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
        assert torch.equal(last, other(*given))  # casts of net's weights are no longer cached
    assert not torch.equal(now, before) and not torch.equal(last, now)
    if dtype is torch.float32:
        assert torch.equal(now, expected)


def test_with_gradients_the_network_itself_runs():
    net = Net()
    graphs.Sampled(net)(*inputs()).sum().backward()
    assert not Graph.made and all(p.grad is not None for p in net.parameters())


def fails(reason):
    @contextlib.contextmanager
    def graph(*_, **__):
        raise RuntimeError(reason)
        yield

    return graph


def test_where_recording_fails_one_line_says_so_and_the_numbers_are_the_same(
    monkeypatch, capsys, tmp_path
):
    fake_graphs.install(monkeypatch, fails("operation not permitted\nwhen stream is capturing"))
    net = Net().eval()
    with torch.no_grad():
        for quick in (graphs.Sampled(net), graphs.Sampled(net)):
            for n in (3, 3, 2):
                assert torch.equal(quick(*inputs(n)), net(*inputs(n)))
    run = train(make(tmp_path / "failing", graph=True))
    assert run.wrapped.ready.graph is None
    train(make(tmp_path / "plain"))
    assert_same(saved(tmp_path / "failing")["model"], saved(tmp_path / "plain")["model"])
    said = capsys.readouterr().out.splitlines()
    assert said == ["note: no CUDA graph of the network (operation not permitted); it runs without"]


def test_a_recording_that_fails_leaves_the_stream_as_it_was(monkeypatch, tmp_path):
    """torch.cuda.graph does not, where the end of a recording is an error, too."""
    here = fake_graphs.Stream()
    now = [here]

    @contextlib.contextmanager
    def stream(wanted):
        before, now[0] = now[0], wanted
        try:
            yield
        finally:
            now[0] = before

    @contextlib.contextmanager
    def stuck(*_, **__):
        now[0] = fake_graphs.Stream()
        raise RuntimeError("operation failed due to a previous error during capture")
        yield

    fake_graphs.install(monkeypatch, stuck)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: now[0])
    with torch.no_grad():
        graphs.Sampled(Net().eval())(*inputs())
    assert now == [here]
    run = make(tmp_path, graph=True)
    run.model(*inputs())
    assert now == [here] and run.wrapped.ready.graph is None


def test_what_is_wrong_with_the_inputs_is_said_as_ever():
    x, t, _ = inputs()
    with torch.no_grad(), pytest.raises(IndexError):
        graphs.Sampled(Net())(x, t, torch.full_like(t, NULL + 5))


def test_a_world_on_the_cpu_and_a_split_network_are_left_alone():
    net = Net()
    assert World().for_sampling(net) is net
    net.unshard = lambda: None
    assert World(device=torch.device("cuda"), compile=True).for_sampling(net) is net
    del net.unshard
    assert World(device=torch.device("cuda")).for_sampling(net).net is net


def test_compile_reaches_the_network_that_is_sampled(monkeypatch):
    net, compiled = Net(), []
    monkeypatch.setattr(torch, "compile", lambda net: compiled.append(net) or net)
    World(compile=True).for_sampling(net)
    assert compiled == [net]
    World(device=torch.device("cuda"), compile=True).for_sampling(net)
    assert compiled == [net, net]


@pytest.fixture(scope="module")
def trained(toy, tiny, tmp_path_factory):
    """{script: checkpoint} of every chapter that draws samples, of few steps but large ones."""
    base, found = tmp_path_factory.mktemp("trained"), {}
    for script in DRAWING:
        more = ["--steps", 4, "--lr", 0.01, "--warmup", 0, "--sample-every", 0]
        succeed(script, *tiny[script], *toy, *more, "--ema", 0.5, "--out", base / script)
        found[script] = base / script / "ckpt.pt"
    return found


def settings_of(module, **settings):
    """The Config of a chapter, of these settings those that it has."""
    known = {name: value for name, value in settings.items() if name in fields(module.__name__)}
    return module.Config(gpus=0, **known)


@pytest.mark.parametrize("guidance", [0.0, 1.5])
@pytest.mark.parametrize("script", [*DRAWING, *SAMPLERS])
def test_every_chapter_draws_the_same_samples(script, guidance, trained, tmp_path, monkeypatch):
    """Five images, two at a time, so that the last batch is another one; in bf16."""
    module, drawn = importlib.import_module(script), []
    monkeypatch.setattr(sys, "argv", [script])
    for world in (World(precision="bf16"), Recording(precision="bf16")):
        cfg = settings_of(
            module,
            sample=str(trained.get(script, trained["ddpm_pixel"])),
            out=str(tmp_path / type(world).__name__),
            n=5,
            batch_size=2,
            sample_steps=6,
            guidance=guidance,
        )
        module.sample_checkpoint(cfg, world)
        drawn.append(np.load(f"{cfg.out}/samples.npz")["arr_0"])
    assert np.array_equal(*drawn) and len(np.unique(drawn[0].reshape(5, -1), axis=0)) == 5
    assert sum(graph.replays for graph in Graph.made) >= 3 * 6 and len(Graph.made) == 2


# --------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_run_in_a_graph_leaves_the_same_checkpoint_and_goes_on(precision, tmp_path):
    """With dropout, whose numbers recording must not move, and clipped and scaled gradients."""
    world, how = World(precision=precision), {"dropout": 0.5, "ema": (0.5, 0.9), "clip_grad": 0.05}
    train(make(tmp_path / "plain", world=world, **how))
    for stop in (4, 8, None):
        train(make(tmp_path / "graph", world=world, graph=True, **how), stop)
    assert [graph.replays for graph in Graph.made] == [4, 4, 5, 5, 4, 4]
    states = [saved(tmp_path / name) for name in ("plain", "graph")]
    for state in states:
        state.pop("config")
    assert_same(*states)
    assert rows(tmp_path / "plain") == rows(tmp_path / "graph")


def test_without_labels_none_is_put_in_and_other_inputs_run_without_the_graph(tmp_path):
    run = make(tmp_path, graph=True)
    for labels, n, replays in ((False, 8, 1), (False, 8, 2), (True, 8, 2), (False, 3, 2)):
        x, t, y = inputs(n, labels=labels)
        found = run.model(x, t, y)
        assert torch.equal(found, run.net(x, t, y))
        assert Graph.made[0].replays == replays
        found.sum().backward()
        gradients = [p.grad for p in run.net.parameters()]
        run.optimizer.zero_grad(set_to_none=True)
        run.net(x, t, y).sum().backward()
        assert_same(gradients, [p.grad for p in run.net.parameters()])
        run.optimizer.zero_grad(set_to_none=True)


def test_a_compiled_network_is_recorded(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda net: compiled.append(net) or net)
    run = train(make(tmp_path, graph=True, compile=True))
    assert compiled == [run.net] and run.wrapped.ready.net is run.net and len(Graph.made) == 2


def test_processes_share_the_gradients_of_what_was_recorded(tmp_path):
    """DistributedDataParallel is put around the graph, once the inputs are known."""
    done = [rank.wait() for rank in start_ranks("rank_graphs", tmp_path / "two")]
    assert [d.code for d in done] == [0, 0], done[0].err + done[1].err
    train(make(tmp_path / "one"))
    for one, two in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-6)
    states = [dict(saved(tmp_path / name)["model"]) for name in ("one", "two")]
    torch.testing.assert_close(*states, rtol=0, atol=1e-5)


@pytest.mark.parametrize("script", TRAININGS)
def test_every_chapter_trains_in_graphs_as_without(script, toy, tiny, tmp_path, monkeypatch):
    for name, more in (("plain", []), ("graph", ["--graph"])):
        given = [*tiny[script], *toy, "--steps", 5, "--sample-every", 0, *more]
        monkeypatch.setattr(sys, "argv", [script, *map(str, given), "--out", str(tmp_path / name)])
        importlib.import_module(script).main()
    assert Graph.made and all(graph.replays >= 4 for graph in Graph.made)
    runs = sorted(
        path.parent.relative_to(tmp_path / "plain") for path in tmp_path.glob("plain/**/ckpt.pt")
    )
    assert runs
    for run in runs:
        plain, graph = (saved(tmp_path / name / run) for name in ("plain", "graph"))
        for part in ("model", "ema", "optimizer"):
            assert_same(plain[part], graph[part])
        assert rows(tmp_path / "plain" / run) == rows(tmp_path / "graph" / run)


def test_on_a_cpu_one_line_says_that_graph_is_for_a_gpu(toy, tiny, tmp_path):
    """Also where two processes share gradients."""
    given = [*tiny["ddpm_pixel"], *toy, "--steps", 3, "--sample-every", 0, "--n", 2, "--graph"]
    said = "note: --graph is for a GPU; on the CPU the network runs without"
    done = succeed("ddpm_pixel", *given, "--out", tmp_path / "one")
    assert done.out.splitlines().count(said) == 1
    ranks = start_ranks("ddpm_pixel", *given, "--out", tmp_path / "two")
    both = [rank.wait() for rank in ranks]
    assert [d.code for d in both] == [0, 0], both[0].err
    assert [d.out.splitlines().count(said) for d in both] == [1, 0]
    for one, two in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-5)


def test_graphs_are_refused_where_the_network_is_called_more_than_once_in_a_step():
    with pytest.raises(BadInput, match="--graph and --accumulate"):
        check_run(RunConfig(gpus=0, graph=True, accumulate=2))
    dit, autoencoder = (importlib.import_module(name) for name in ("dit", "autoencoder"))
    with pytest.raises(BadInput, match="--graph and --shard"):
        dit.check(dit.Config(gpus=0, graph=True, shard=True))
    with pytest.raises(BadInput, match="--graph and --discriminator"):
        autoencoder.check(autoencoder.Config(gpus=0, graph=True, discriminator=0.5, disc_start=1))
    check_run(RunConfig(gpus=0, graph=True))


ON_GPU = {"device": torch.device("cuda")}
WANTED = [  # what is typed, of the World, of the settings: whether training takes graphs
    ("", ON_GPU, {}, True),
    ("--no-graph", ON_GPU, {}, False),
    ("", {}, {}, False),
    ("", ON_GPU | {"size": 2}, {}, False),
    ("", ON_GPU, {"accumulate": 2}, False),
    ("", ON_GPU, {"compile": True}, False),
    ("", ON_GPU, {"use_checkpoint": True}, False),
    ("--graph", ON_GPU | {"size": 2}, {"graph": True}, True),
    ("--graph", {}, {"graph": True}, True),
]


@pytest.mark.parametrize("typed, place, settings, wanted", WANTED)
def test_one_gpu_takes_graphs_by_itself(typed, place, settings, wanted, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ddpm_pixel.py", *typed.split()])
    assert is_wanted(ddpm_pixel.Config(**settings), World(**place)) is wanted


def test_the_stages_of_a_latent_run_do_not_ask_each_others_settings(monkeypatch):
    """The autoencoder's stage reads a command line whose --config is of the whole run."""
    monkeypatch.setattr(sys, "argv", ["ldm_cfg.py", "--config", "configs/imagenet100.yaml"])
    assert is_wanted(autoencoder.Config(), World(**ON_GPU))
    assert not is_wanted(autoencoder.Config(discriminator=0.5), World(**ON_GPU))


def test_a_rehearsal_of_several_gpus_takes_none():
    world = Rehearsal(**ON_GPU, cfg=None, processes=8, timed=True)
    assert not is_wanted(ddpm_pixel.Config(), world)
