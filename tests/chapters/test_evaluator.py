"""eval_fid.Evaluator gives in a process what the program prints, and knows some of the classes."""

from runtime.commandline import BadInput, ScoredConfig
from runtime.processes import World

import json

import numpy as np
import pytest
import torch
from launching import succeed

from eval_fid import Evaluator
from image_data import datasets

NETWORK = {"shape": (1, 16, 16), "class_names": ["bars", "dots"]}  # that makes the samples


@pytest.fixture(scope="module")
def judged(toy, tmp_path_factory):
    """The toy data set's images and labels, its path, and a root for classifiers."""
    ds = datasets.load(toy[1], toy[3], split="train")
    return np.array(ds.images), np.array(ds.labels), toy[1], tmp_path_factory.mktemp("evaluator")


def test_an_evaluator_says_what_the_program_says(judged, tmp_path):
    images, labels, folder, root = judged
    samples = np.clip(images.astype(int) + 40, 0, 255).astype(np.uint8)
    evaluator = Evaluator(folder, root, steps=40, **NETWORK)
    found = evaluator(samples, labels)
    np.savez(tmp_path / "samples.npz", samples, labels)
    command = [tmp_path / "samples.npz", folder, "--data-root", root, "--classifier-steps", 40]
    printed = json.loads(succeed("eval_fid", *command).out.splitlines()[-1])
    assert (
        printed["features"] == evaluator.protocol
        and printed["n_reference"] == evaluator.n_reference
    )
    assert found["frechet"] == pytest.approx(printed["frechet"], rel=1e-6) and found["frechet"] > 0
    assert found["class_accuracy"] == printed["class_accuracy"] > 0.9
    assert evaluator(samples)["class_accuracy"] is None


def test_of_a_run_it_scores_what_is_drawn_for_the_seeds_and_labels(judged):
    images, labels, folder, root = judged
    asked = []

    def draw(seeds, y, desc):
        asked.append((seeds.tolist(), y.tolist(), desc))
        return torch.from_numpy(images[seeds])

    cfg = ScoredConfig(data=folder, data_root=str(root))
    evaluator = Evaluator.of_run(cfg, datasets.load(folder, root), World(), steps=40)
    found = evaluator.score(draw, 20, 2)
    assert asked == [(list(range(20)), [0, 1] * 10, "scoring")]
    about = {"metric_n": 20, "metric_features": "toy classifier", "n_reference": 64}
    about |= {"metric_reference": f"{folder}:test"}
    assert found == evaluator(images[:20], np.arange(20) % 2) | about
    assert found["class_accuracy"] == (labels[:20] == np.arange(20) % 2).mean()


def test_samples_of_one_class_are_compared_with_that_class(judged):
    images, labels, folder, root = judged
    network = NETWORK | {"class_names": ["dots"]}
    evaluator = Evaluator(folder, root, classes="dots", steps=40, **network)
    dots = images[labels == 1]  # label 0 of a network that was trained on dots alone
    assert evaluator.n_reference == len(dots)
    found = evaluator(dots, np.zeros(len(dots), dtype=np.int64))
    assert found["frechet"] == pytest.approx(0, abs=1e-6) and found["class_accuracy"] > 0.9
    assert evaluator(images[labels == 0])["frechet"] > 1


def test_a_network_of_other_classes_gets_no_accuracy_and_of_other_images_no_evaluator(judged):
    images, labels, folder, root = judged
    other = Evaluator(folder, root, shape=(1, 16, 16), class_names=["0", "1"], steps=40)
    assert other(images, labels)["class_accuracy"] is None
    with pytest.raises(BadInput, match=r"images \(1, 16, 16\).*takes \(3, 16, 16\)"):
        Evaluator(folder, root, shape=(3, 16, 16), steps=40)
    with pytest.raises(BadInput, match="type --data NAME"):
        Evaluator("", root, shape=(1, 16, 16), steps=40)
