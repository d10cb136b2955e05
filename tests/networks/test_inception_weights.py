"""Inception's weights: which files are taken, which are refused, and the download."""

from runtime.commandline import BadInput

import functools
import hashlib
import http.server
import socket
import threading
import time

import pytest
import torch

from evaluation.inception_features import load
from networks import inception
from networks.inception import Inception


def hollow(**changes):
    """A state dict of the right shapes that takes no room; a change to None leaves a key out."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Inception().state_dict().items()}
    shapes = {name: changes.get(name, shape) for name, shape in shapes.items()} | changes
    return {name: torch.zeros(()).expand(s) for name, s in shapes.items() if s is not None}


LAST = "Mixed_7c.branch_pool.conv.weight"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (hollow(**{LAST: None}), [f"no tensor {LAST}", "inception_v3"]),
        (hollow(**{LAST: (192, 2048, 3, 3)}), [LAST, "(192, 2048, 3, 3)", "(192, 2048, 1, 1)"]),
        (hollow(**{"fc.weight": (1001, 2048)}), ["(1001, 2048)", "(1008 or 1000, 2048)"]),
        (hollow(**{"fc.weight": ()}), ["fc.weight is ()"]),
        (hollow(extra=(3,)), ["holds extra, which"]),
        ({"weight": torch.zeros(3)}, ["no tensor fc.weight", "inception_v3"]),
        ([torch.zeros(3)], ["is not a state_dict", "inception_v3"]),
        (
            torch.nn.Linear(2, 2),
            ["no file of plain tensors", "nn.modules.linear.Linear", "inception_v3"],
        ),
        (b"PK\3\4 torn", ["a torn one"]),
        (b"", ["a torn one"]),
    ],
    ids=["lacking", "shape", "outputs", "scalar", "extra", "other", "list", "code", "torn", "none"],
)
def test_a_file_of_other_weights_is_named_and_refused(content, words, tmp_path):
    path = tmp_path / "w.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(BadInput) as caught:
        load(str(path))
    text = str(caught.value)
    assert text.startswith(str(path)) and "\n" not in text
    for word in words:
        assert word in text


def test_no_file_and_no_protocol_are_told(tmp_path):
    with pytest.raises(BadInput, match=r"nowhere\.pth: no such file; .*fid or torchvision"):
        load(str(tmp_path / "nowhere.pth"))
    with pytest.raises(BadInput, match="'bilinear'.*pytorch-fid, tf1, clean"):
        load(resize="bilinear")


@pytest.mark.parametrize("name", ["pt_inception", "weights-inception"])
def test_a_published_name_is_not_believed(name, tmp_path):
    path = tmp_path / f"{name}-2015-12-05-6726825d.pth"
    torch.save(hollow(), path)
    with pytest.raises(BadInput, match="SHA-256 begins with .{8}, not with 6726825d"):
        load(str(path))


@pytest.fixture
def served(tmp_path, monkeypatch):
    """served(right) -> root: the weights `fid` are a hollow file of a server of our own."""
    monkeypatch.delenv("DIFFUSION_MIRROR", raising=False)
    folder, seen = tmp_path / "server", []
    folder.mkdir()
    torch.save(hollow(), folder / "new.pth")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            seen.append(self.path)

    def place(right):
        found = hashlib.sha256((folder / "new.pth").read_bytes()).hexdigest()[:8]
        name = f"weights-{found if right else '6726825d'}.pth"
        (folder / "new.pth").rename(folder / name)
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setitem(inception.PUBLISHED, "fid", (address, name))
        return tmp_path / "data", name, seen

    handler = functools.partial(Handler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield place
        server.shutdown()


def test_weights_are_downloaded_once_and_checked(served):
    root, name, seen = served(True)
    extractors = [load("", root), load("fid", root)]
    assert (root / "inception" / name).is_file() and seen == ["/" + name]
    assert f"weights {name}" in extractors[0].protocol
    assert extractors[0].feature_hash == extractors[1].feature_hash
    features, _ = extractors[0](torch.zeros(1, 9, 9, 1, dtype=torch.uint8))
    assert not features.any()  # hollow weights, hollow features


def test_a_download_of_another_checksum_is_thrown_away(served):
    root, name, _ = served(False)
    with pytest.raises(BadInput) as caught:
        load("", root)
    text = str(caught.value)
    assert "sha256 " in text and "expected 6726825d" in text and "\n" not in text
    assert f"put it at {root / 'inception' / name}" in text
    assert not list((root / "inception").glob("[!.]*"))


def test_with_little_patience_a_download_is_as_without(served):
    root, name, seen = served(True)
    extractor = load("", root, patience=5)
    assert (root / "inception" / name).is_file() and f"weights {name}" in extractor.protocol
    assert seen == ["/" + name] * 2  # the first byte, and all of them
    load("", root, patience=5)
    assert len(seen) == 2  # it is there


@pytest.mark.parametrize("mirror", ["http://127.0.0.1:1", "nonsense", "http://127.0.0.1:1/{}/x"])
def test_with_little_patience_what_cannot_be_had_is_told_at_once(mirror, tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFUSION_MIRROR", mirror)
    start = time.monotonic()
    with pytest.raises(BadInput, match="could not download pt_inception") as caught:
        load("", tmp_path, patience=5)
    assert time.monotonic() - start < 2 and "\n" not in str(caught.value)
    assert mirror.split("{")[0] in str(caught.value) and str(tmp_path) in str(caught.value)


def test_no_more_than_the_patience_is_waited(tmp_path, monkeypatch):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("DIFFUSION_MIRROR", address)
        start = time.monotonic()
        with pytest.raises(BadInput, match="no answer within 0.2 s|timed out"):
            load("", tmp_path, patience=0.2)
        assert time.monotonic() - start < 2
