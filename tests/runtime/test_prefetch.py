"""Arrays that come a step ahead are those that would be made now, and nothing else about a run is.

A GPU is played by the CPU: pinned memory is ordinary there, and copies copy nothing.
"""

from runtime.commandline import BadInput
from runtime.files import read_log
from runtime.prefetch import Ahead
from runtime.processes import World

import dataclasses
import gc
import threading
import weakref

import numpy as np
import pytest
import torch
from run_folders import assert_same_run
from toy_run import IMAGES, T, make, train

from image_data.batches import Dataset
from image_data.latents import Latents


@pytest.fixture(autouse=True)
def unpinned(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)


class Counted(World):
    """Counts the arrays that come one by one."""

    def upload(self, array):
        self.__dict__["count"] = self.__dict__.get("count", 0) + 1
        return super().upload(array)


def ahead(folder, **settings):
    """The toy run with its arrays made a step ahead."""
    run = make(folder, world=Counted(), **settings)
    run.bring = Ahead(run.world, run._parts)
    return run


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_run_is_the_same(accumulate, tmp_path):
    settings = {"accumulate": accumulate, "flip": True, "dropout": 0.2}
    train(make(tmp_path / "now", **settings))
    run = train(ahead(tmp_path / "ahead", **settings))
    assert_same_run(tmp_path / "now", tmp_path / "ahead")
    assert run.world.count == 2 * 5 * accumulate  # images, labels, hidden ones, t, noise: two steps


def test_a_run_that_was_stopped_goes_on_as_the_same(tmp_path):
    train(make(tmp_path / "whole"))
    for stop in (5, None):
        train(ahead(tmp_path / "broken"), stop)
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


@dataclasses.dataclass(frozen=True)
class Watched(Dataset):
    """Notes which thread reads which images; broken: the number of one that cannot be read."""

    seen: list = dataclasses.field(default_factory=list)
    broken: int = -1

    def stored(self, rows, flip=None):
        self.seen.append((threading.current_thread().name, rows.tolist()))
        if self.broken in rows:
            raise BadInput("image 7 is damaged")
        return super().stored(rows, flip)


def watched(**more):
    fields = {f.name: getattr(IMAGES, f.name) for f in dataclasses.fields(Dataset)}
    return Watched(**fields, **more)


def test_images_are_read_in_the_background_one_step_ahead(tmp_path):
    run = ahead(tmp_path, ds=watched(), log_every=100, save_every=100)
    wanted = [part.rows.tolist() for step in range(8) for part in run._parts(step)]
    train(run, stop=7)
    run.bring.thread.shutdown()
    here = [rows for name, rows in run.ds.seen if name == "MainThread"]
    there = [rows for name, rows in run.ds.seen if name.startswith("prefetch")]
    assert here == wanted[:2] and there == wanted[2:]


def test_what_a_thread_raises_comes_out_of_the_step_that_wants_it(tmp_path):
    """At the step at which the run would end without a thread; what was logged before is there."""
    wanted = {}
    for name, kind in (("now", make), ("ahead", ahead)):
        run = kind(tmp_path / name, ds=watched(broken=7), batch_size=2, steps=10)
        with pytest.raises(BadInput, match="image 7 is damaged"):
            train(run)
        wanted[name] = [row["step"] for row in read_log(run.log_path)]
        wanted[f"{name} step"] = run.step
    assert wanted["now"] == wanted["ahead"] and wanted["now step"] == wanted["ahead step"] > 2


def test_steps_may_come_in_any_order(tmp_path):
    now, run = make(tmp_path / "now"), ahead(tmp_path / "ahead")
    for step in (3, 4, 5, 9, 10, 4, 4, 5, 0, 1, 2):
        for one, two in zip(now.parts(step), run.parts(step), strict=True):
            assert torch.equal(now.uniform(one, T), run.uniform(two, T))
            assert torch.equal(now.images(one)[0], run.images(two)[0])
            if step % 2:  # not asked for in each step
                assert torch.equal(now.uniform(one, 7, "s"), run.uniform(two, 7, "s"))


def test_another_thing_of_the_same_name_is_another(tmp_path):
    now, run = make(tmp_path / "now"), ahead(tmp_path / "ahead")
    for step in range(5):
        (one,), (two,) = now.parts(step), run.parts(step)
        for T_now in (5, 1000):
            assert torch.equal(now.uniform(one, T_now), run.uniform(two, T_now))


def test_arrays_of_all_types_and_shapes_arrive(tmp_path):
    """Sizes that are no multiples of anything, booleans, no rows, transposed memory, a number."""
    arrays = [
        np.arange(7, dtype=np.uint8),
        np.array([True, False, True]),
        np.arange(3, dtype=np.int64) - 2**62,
        np.float64([[1.5, np.nan]]),
        np.zeros((0, 4), np.float32),
        np.arange(6, dtype=np.float32).reshape(2, 3).T,
        np.array(5, np.int32),
    ]

    def array_of(part, i):
        return arrays[i]

    run = ahead(tmp_path)
    for step in range(4):
        (part,) = run.parts(step)
        for i, array in enumerate(arrays):
            found = run.bring(part, array_of, i).numpy()
            assert found.dtype == array.dtype and found.shape == array.shape
            np.testing.assert_array_equal(found, array)


@pytest.mark.parametrize("resident", [False, True])
def test_latents_come_from_memory_maps_and_from_where_they_are(resident, tmp_path):
    moments = np.random.default_rng(0).random((40, 2, 2, 6)).astype(np.float32)
    about = (np.arange(20) % 3, ("a", "b", "c"), (1, 4, 4), (3, 2, 2), 1.0, "key")
    ds = Latents("latents", torch.from_numpy(moments) if resident else moments, *about)
    run = ahead(tmp_path, ds=ds, flip=True)
    for step in range(4):
        (part,) = run.parts(step)
        x, y = run.images(part)
        assert part.flip.any() and not part.flip.all()
        expected = moments[part.rows + 20 * part.flip].transpose(0, 3, 1, 2)
        np.testing.assert_array_equal(x, expected)
        assert y.tolist() == (part.rows % 3).tolist()


def test_the_thread_ends_after_the_last_step(tmp_path):
    """And no cycle of references is left, in which the memory of a run would outlive it."""
    run = ahead(tmp_path)
    thread_pool = run.bring.thread
    train(run)
    (thread,) = thread_pool._threads
    there = weakref.ref(run)
    gc.collect()  # what else was left over
    gc.disable()
    try:
        del run, thread_pool
        assert there() is None
    finally:
        gc.enable()
    thread.join(10)
    assert not thread.is_alive()


def test_the_thread_is_on_the_device_of_its_process(monkeypatch):
    """Else that of every process would take memory on the first GPU."""
    chosen = []

    def set_device(device):
        chosen.append((threading.current_thread().name, device))

    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    ahead = Ahead(World(device=torch.device("cuda:3")), None)
    ahead.thread.submit(int).result()
    assert chosen == [("prefetch_0", torch.device("cuda:3"))]


def test_a_run_on_a_cpu_has_no_thread(tmp_path):
    assert not isinstance(make(tmp_path).bring, Ahead)
