"""Downloads against a server of our own: resume, checksums, mirrors, the last word."""

from runtime import download
from runtime.commandline import BadInput

import contextlib
import hashlib
import http.server
import multiprocessing
import re
import threading

import numpy as np
import pytest
from data_files import noise, write_cifar, write_mnist

from image_data import datasets, sources

BODY = noise(300_000).tobytes()
MD5 = hashlib.md5(BODY).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves server.files; keeps a list of (path, Range); cuts the first `cuts` answers short."""

    def do_GET(self):
        server, wanted = self.server, self.headers.get("Range")
        server.seen.append((self.path, wanted))
        body = server.files.get(self.path)
        if body is None:
            self.send_error(404)
            return
        start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted and server.resumes else 0
        if start and start >= len(body):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        part = body[start:]
        if server.cuts > 0:
            server.cuts -= 1
            part = part[: len(part) // 2]
        with contextlib.suppress(ConnectionError):
            self.wfile.write(part)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as found:
        found.files, found.seen, found.cuts, found.resumes = {"/a/x.gz": BODY}, [], 0, True
        found.base = f"http://127.0.0.1:{found.server_port}"
        threading.Thread(target=found.serve_forever, args=(0.01,), daemon=True).start()
        yield found
        found.shutdown()


def test_a_file_arrives_whole_and_once(server, tmp_path):
    path = download.fetch("x.gz", [server.base + "/a/"], tmp_path / "new", MD5)
    assert path == tmp_path / "new" / "x.gz" and path.read_bytes() == BODY
    download.fetch("x.gz", [server.base + "/a"], tmp_path / "new", MD5)
    assert len(server.seen) == 1 and not list(path.parent.glob("*.part"))


def test_a_cut_download_is_continued_where_it_ended(server, tmp_path):
    server.cuts = 1
    with pytest.raises(BadInput, match="connection ended after 150000 of 300000 bytes"):
        download.fetch("x.gz", [server.base + "/a"], tmp_path, MD5)
    assert (tmp_path / "x.gz.part").read_bytes() == BODY[:150_000]
    assert not (tmp_path / "x.gz").exists()
    assert download.fetch("x.gz", [server.base + "/a"], tmp_path, MD5).read_bytes() == BODY
    assert server.seen[1] == ("/a/x.gz", "bytes=150000-")


def test_the_next_mirror_continues_what_the_first_began(server, tmp_path):
    server.cuts, server.files["/b/x.gz"] = 1, BODY
    mirrors = [server.base + "/a", server.base + "/b"]
    assert download.fetch("x.gz", mirrors, tmp_path, MD5).read_bytes() == BODY
    assert server.seen == [("/a/x.gz", None), ("/b/x.gz", "bytes=150000-")]


def test_a_server_that_cannot_resume_sends_everything(server, tmp_path):
    (tmp_path / "x.gz.part").write_bytes(BODY[:1000])
    server.resumes = False
    assert download.fetch("x.gz", [server.base + "/a"], tmp_path, MD5).read_bytes() == BODY


@pytest.mark.parametrize("length", [1000, len(BODY), len(BODY) + 5])
def test_the_part_of_another_file_is_thrown_away(server, tmp_path, length):
    (tmp_path / "x.gz.part").write_bytes(b"?" * length)
    assert download.fetch("x.gz", [server.base + "/a"], tmp_path, MD5).read_bytes() == BODY


def test_a_part_that_was_already_whole_is_taken(server, tmp_path):
    (tmp_path / "x.gz.part").write_bytes(BODY)
    assert download.fetch("x.gz", [server.base + "/a"], tmp_path, MD5).read_bytes() == BODY
    assert server.seen == [("/a/x.gz", f"bytes={len(BODY)}-")]


def test_a_wrong_checksum_moves_on_to_the_next_mirror(server, tmp_path):
    server.files["/bad/x.gz"] = BODY[:-1] + b"?"
    mirrors = [server.base + "/bad", server.base + "/missing", server.base + "/a"]
    assert download.fetch("x.gz", mirrors, tmp_path, MD5).read_bytes() == BODY


def test_when_all_fail_it_says_why_and_what_to_do(server, tmp_path):
    server.files["/bad/x.gz"] = b"an error page"
    mirrors = [server.base + "/bad", server.base + "/missing", "http://127.0.0.1:9", "no address"]
    with pytest.raises(BadInput) as caught:
        download.fetch("x.gz", mirrors, tmp_path, MD5)
    text = str(caught.value)
    assert f"put it at {tmp_path / 'x.gz'}" in text and "\n" not in text
    for reason in (f"expected {MD5}", "/missing/x.gz: Not Found", "refused", "no address/x.gz"):
        assert reason in text
    assert not list(tmp_path.glob("[!.]*"))


def test_an_error_page_is_not_taken_for_a_zip(server, tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFUSION_MIRROR", server.base)
    server.files["/afhq.zip"] = b"<html>too many requests</html>"
    with pytest.raises(BadInput, match="what arrived is not a zip"):
        datasets.load("afhq", tmp_path)
    assert not list((tmp_path / "afhq").glob("[!.]*"))


def serve_folder(server, folder):
    for path in folder.iterdir():
        server.files[f"/{path.name}"] = path.read_bytes()
    return {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_idx_sets_are_downloaded_and_prepared(server, tmp_path, monkeypatch, name):
    made = write_mnist(tmp_path / "raw")
    sums = serve_folder(server, tmp_path / "raw")
    monkeypatch.setenv("DIFFUSION_MIRROR", server.base)
    monkeypatch.setitem(sources.IDX_MD5, name, tuple(sums[f] for f in sources.IDX_FILES))
    for split, (images, labels) in made.items():
        ds = datasets.load(name, tmp_path / "d", split=split)
        assert (np.asarray(ds.images)[..., 0] == images).all() and (ds.labels == labels).all()
    assert sorted(path for path, _ in server.seen) == sorted("/" + f for f in sources.IDX_FILES)


def test_published_checksums_are_checked(server, tmp_path, monkeypatch):
    write_mnist(tmp_path / "raw")
    serve_folder(server, tmp_path / "raw")
    monkeypatch.setenv("DIFFUSION_MIRROR", server.base)
    with pytest.raises(BadInput, match="md5 .*expected f68b3c2dcbeaaa9fbdd348bbdeb94873"):
        datasets.load("mnist", tmp_path / "d")


def test_cifar10_is_downloaded_and_prepared(server, tmp_path, monkeypatch):
    planes, _ = write_cifar(tmp_path / "raw", "python", packed=True)["test"]
    sums = serve_folder(server, tmp_path / "raw")
    monkeypatch.setenv("DIFFUSION_MIRROR", server.base)
    monkeypatch.setattr(sources, "CIFAR_MD5", sums["cifar-10-python.tar.gz"])
    ds = datasets.load("cifar10", tmp_path / "d", split="test")
    assert (ds.images == planes.transpose(0, 2, 3, 1)).all()


def test_several_processes_download_once(server, tmp_path):
    context = multiprocessing.get_context("fork")
    arguments = ("x.gz", [server.base + "/a"], tmp_path, MD5)
    started = [context.Process(target=download.fetch, args=arguments) for _ in range(4)]
    for process in started:
        process.start()
    for process in started:
        process.join()
        assert process.exitcode == 0
    assert (tmp_path / "x.gz").read_bytes() == BODY and len(server.seen) == 1
