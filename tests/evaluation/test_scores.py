"""scores.py, sides.py: any callable as extractor, any number of processes, nothing in memory."""

from runtime.commandline import BadInput
from runtime.processes import World

import numpy as np
import pytest
import torch
from launching import succeed
from recording import Watched

from eval_fid import FIGURES, evaluate, frechet_distance, statistics
from evaluation import features
from evaluation.image_sets import Images, Statistics
from evaluation.kid import kernel_distance
from evaluation.manifold import manifold
from evaluation.sides import look, scratch
from image_data import datasets


def means(images):
    """Features (B, 8): the means of an image's quarters, and of their squares."""
    x = images.float().reshape(len(images), 2, 4, 2, 4, -1).mean(-1) / 255
    return torch.cat([x.mean((2, 4)).flatten(1), x.square().mean((2, 4)).flatten(1)], 1)


def means_and_logits(images):
    return means(images), 5 * means(images)[:, :3]


def drawn(n, seed, brightness=128.0):
    rng = np.random.default_rng(seed)
    return np.clip(rng.normal(brightness, 40, (n, 8, 8, 1)), 0, 255).astype(np.uint8)


def test_a_plain_function_will_do():
    a, b = drawn(300, 0), drawn(250, 1, 140)
    found = evaluate(a, b, means, metrics=("frechet", "kid", "prdc"))
    feats = [means(torch.from_numpy(side)).numpy() for side in (a, b)]
    moments = [statistics(rows) for rows in feats]
    expected = frechet_distance(*moments[0], *moments[1])
    assert found["frechet"] == pytest.approx(expected, rel=1e-9) and expected > 0.01
    assert found["kid"] == pytest.approx(kernel_distance(*feats)[0], rel=1e-9)
    assert found["precision"] == manifold(feats[1], feats[0])["precision"]
    assert (found["n_generated"], found["n_reference"]) == (300, 250)
    low, high = found["frechet_interval"]
    assert low < found["frechet"] < high and found["frechet_infinity"] < found["frechet"]
    assert "inception_score" not in found


def test_what_the_sides_do_not_allow_is_left_out_with_a_word(capsys):
    found = evaluate(drawn(30, 0), drawn(30, 1), means, metrics=tuple(FIGURES))
    assert {"frechet", "kid", "recall"} <= found.keys()
    assert not {"inception_score", "class_frechet", "frechet_interval"} & found.keys()
    err = capsys.readouterr().err
    assert "is is left out: there are no logits" in err
    assert "classes is left out: there are no labels" in err
    assert "memorisation is left out: there are no training images" in err
    small = evaluate(drawn(3, 0), drawn(30, 1), means, metrics=("frechet", "prdc"))
    assert "frechet" in small and "precision" not in small
    assert "prdc is left out" in capsys.readouterr().err


def test_classes_logits_and_training_images_bring_their_figures(tmp_path):
    bright = np.concatenate([drawn(100, 0, 60), drawn(100, 1, 190)])
    labels = np.arange(200) // 100
    a = Images("a", bright, labels)
    b = Images("b", np.concatenate([drawn(100, 2, 60), drawn(100, 3, 190)]), labels)
    swapped = Images("a", bright, 1 - labels)
    train = np.concatenate([bright[:50], drawn(300, 4)])
    asked = dict(metrics=tuple(FIGURES), class_names=("dark", "bright"), train=train)
    asked |= {"figure": str(tmp_path / "pairs.png")}
    found = evaluate(a, b, means_and_logits, **asked)
    assert found["class_frechet_each"].keys() == {"dark", "bright"}
    wrong = evaluate(swapped, b, means_and_logits, **asked)
    assert wrong["frechet"] == pytest.approx(found["frechet"]) and found["class_frechet"] < 0.1
    assert wrong["class_frechet"] > 10 * found["class_frechet"]
    assert 1 < found["inception_score"] <= 3
    assert found["memorisation_copies"] == 50 and (tmp_path / "pairs.png").stat().st_size > 5000


@pytest.mark.parametrize("size", [1, 2, 3])
def test_features_of_several_processes_are_those_of_one(size):
    """Each rank's collect() is answered with all rows, as the sum over the ranks would be."""
    images = drawn(101, 5)
    whole = means(torch.from_numpy(images))

    class Rank(World):
        def collect(self, part, n):
            rows = whole[self.seen[0] : self.seen[0] + n]
            share = self.share(n)
            torch.testing.assert_close(part, rows[share], rtol=0, atol=0)
            self.seen[0] += n
            return rows

    for rank in range(size):
        world = Rank(rank, size)
        object.__setattr__(world, "seen", [0])
        feats, logits = features.extract(means, images, 8, world)
        np.testing.assert_array_equal(feats, whole.numpy())
        assert logits is None and world.seen == [101]


def test_memory_does_not_grow_with_the_number_of_images():
    """No more than a round of images is read at a time, and the rows go where they are told."""
    images, shapes = Watched(drawn(500, 6), np.arange(500)), []

    def store(shape, dtype):
        shapes.append((shape, dtype))
        return np.empty(shape, dtype)

    features.extract(means_and_logits, images, 16, store=store)
    assert images.most == 16 and shapes == [((500, 8), np.float32), ((500, 3), np.float32)]


def test_scratch_arrays_leave_no_file(tmp_path):
    rows = scratch(tmp_path / "new", (10, 3), np.float32)
    rows[:] = 1
    assert rows.sum() == 30 and list((tmp_path / "new").iterdir()) == []


def test_features_that_are_not_finite_are_refused():
    def broken(images):
        feats = means(images)
        feats[images[:, 0, 0, 0] == 7] = torch.nan
        return feats

    images = drawn(40, 7)
    images[21, 0, 0, 0] = 7
    with pytest.raises(BadInput, match="generated: features of images 20 to 29 are not finite"):
        evaluate(images, drawn(40, 8), broken, batch_size=10)


@pytest.mark.parametrize(
    ("a", "words"),
    [
        (drawn(30, 0)[:, :7], "generated has 7x8x1, reference has 8x8x1"),
        (drawn(30, 0).repeat(2, 3), "generated has 2 channels|reference has 1 channels"),
        (drawn(1, 0), "at least 2 images, got 1"),
        (drawn(0, 0), "generated holds no images"),
        (drawn(9, 0) / 255, "generated holds float64"),
        (Statistics("s", np.zeros(8), np.eye(8), feature_hash="other"), "different features"),
        (Statistics("s", np.zeros(3), np.eye(3)), r"\(d,\)"),
    ],
    ids=["height", "two-channels", "one", "none", "float", "other-features", "other-dim"],
)
def test_bad_input_is_refused(a, words):
    def known(images):
        return means(images)

    known.feature_hash = "ours"
    with pytest.raises(BadInput, match=words):
        evaluate(a, drawn(30, 1), known)


def test_features_of_a_data_set_are_kept_and_a_broken_file_is_not_believed(tmp_path, capsys):
    class Counted:
        dim, feature_hash, calls = 8, "0123abcd", 0

        def __call__(self, images):
            self.calls += 1
            return means(images)

    extractor, source = Counted(), Images("set", drawn(30, 9), key="key")
    first = look(source, extractor, keep=str(tmp_path))
    (path,) = tmp_path.iterdir()
    assert path.name == "features-key-0123abcd.npy" and extractor.calls == 1
    again = look(source, extractor, keep=str(tmp_path))
    assert extractor.calls == 1
    np.testing.assert_array_equal(first.feats, again.feats)
    for damage in (b"", path.read_bytes()[:200], path.read_bytes()[:-4]):
        path.write_bytes(damage)
        mended = look(source, extractor, keep=str(tmp_path))
        np.testing.assert_array_equal(first.feats, mended.feats)
        assert path.name in capsys.readouterr().err
    assert extractor.calls == 4
    other = look(Images("set", drawn(30, 9)), extractor, keep=str(tmp_path))
    assert len(list(tmp_path.iterdir())) == 1 and other.n == 30  # without a key nothing is kept


def test_splits_of_a_folder_without_held_out_images_tell_no_copies(toy, tmp_path):
    ds = datasets.load(toy[1], toy[3], split="test")
    np.savez(tmp_path / "a.npz", np.array(ds.images))
    flags = ["--data-root", toy[3], "--classifier-steps", "5", "--metrics", "memorisation"]
    done = succeed("eval_fid", tmp_path / "a.npz", toy[1], "--gpus", "0", *flags)
    assert "no held-out images" in done.err and "memorisation_p" not in done.out
