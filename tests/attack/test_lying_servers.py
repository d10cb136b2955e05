"""Servers that lie, drip or send without end: downloads stop, and what came is kept or removed."""

from runtime import download
from runtime.commandline import BadInput

import contextlib
import http.server
import io
import shutil
import threading
import time
import types
import zipfile

import pytest
from data_files import noise


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers by server.answer(self)."""

    def do_GET(self):
        with contextlib.suppress(ConnectionError):
            self.server.answer(self)

    def say(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as found:
        found.daemon_threads = True
        found.base = f"http://127.0.0.1:{found.server_port}"
        threading.Thread(target=found.serve_forever, args=(0.01,), daemon=True).start()
        yield found
        found.shutdown()


def refused(server, folder, name="x.bin"):
    with pytest.raises(BadInput) as raised:
        download.fetch(name, [server.base], folder)
    assert "\n" not in str(raised.value) and not (folder / name).exists()
    return str(raised.value)


def zipped(seed):
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as archive:
        for i in range(4):
            archive.writestr(f"{i}.png", noise(5000, 10 * seed + i).tobytes())
    return whole.getvalue()


def test_a_spliced_zip_is_noticed_and_fetched_anew(server, tmp_path):
    """Half of one file, half of another as long: the end is a zip's, and so is the beginning."""
    old, new = zipped(1), zipped(2)
    (tmp_path / "x.zip.part").write_bytes(old[: len(old) // 2])
    asked = []

    def answer(request):
        start = request.headers.get("Range")
        asked.append(start)
        begin = int(start[6:-1]) if start else 0
        request.say(206 if begin else 200, new[begin:], Content_Length=len(new) - begin)

    server.answer = answer
    assert download.fetch("x.zip", [server.base], tmp_path).read_bytes() == new
    assert asked == [f"bytes={len(old) // 2}-", None]
    (tmp_path / "x.zip").unlink()
    server.answer = lambda request: request.say(
        200, old[:9000] + new[9000:], Content_Length=len(new)
    )
    assert "in it is damaged" in refused(server, tmp_path, "x.zip")
    assert not (tmp_path / "x.zip.part").exists()


def test_memory_that_ends_while_a_zip_is_looked_at_removes_nothing(server, tmp_path, monkeypatch):
    def fail(archive):
        raise MemoryError

    whole = zipped(1)
    server.answer = lambda request: request.say(200, whole, Content_Length=len(whole))
    monkeypatch.setattr(zipfile.ZipFile, "testzip", fail)
    with pytest.raises(MemoryError):
        download.fetch("x.zip", [server.base], tmp_path)
    assert (tmp_path / "x.zip.part").read_bytes() == whole


def test_another_part_than_the_one_asked_for(server, tmp_path):
    (tmp_path / "x.bin.part").write_bytes(b"0123")
    server.answer = lambda request: request.say(
        206, b"abcd", Content_Length=4, Content_Range="bytes 0-3/8"
    )
    assert "another part than the one from byte 4 on" in refused(server, tmp_path)
    assert (tmp_path / "x.bin.part").read_bytes() == b"0123"


def test_a_file_without_end(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "MOST", 10**6)

    def answer(request):
        request.say(200)
        while True:
            request.wfile.write(bytes(1 << 16))

    server.answer = answer
    assert "more than 0.001 GB" in refused(server, tmp_path)
    server.answer = lambda request: request.say(200, b"x", Content_Length=10**12)
    assert "more than 0.001 GB" in refused(server, tmp_path)


def test_a_server_that_drips(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "PATIENCE", 0.1)

    def answer(request):
        request.say(200, Content_Length=10**6)
        for _ in range(200):
            request.wfile.write(b"x")
            request.wfile.flush()
            time.sleep(0.01)

    server.answer = answer
    begun = time.monotonic()
    assert "slower than 2000 bytes/s" in refused(server, tmp_path)
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize("where", ["status", "headers", "pieces"])
def test_a_server_that_drips_what_comes_before_the_bytes(where, server, tmp_path, monkeypatch):
    """Each byte came in time, and the whole never."""
    monkeypatch.setattr(download, "PATIENCE", 0.2)
    first = {"status": "HTTP/1.", "headers": "HTTP/1.1 200 OK\r\nX-", "pieces": ""}[where]
    first = first or "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1;"

    def answer(request):
        request.wfile.write(first.encode())
        for _ in range(100):
            request.wfile.write(b"1")
            request.wfile.flush()
            time.sleep(0.02)

    server.answer = answer
    begun = time.monotonic()
    assert "nothing came for 0.2 s" in refused(server, tmp_path)
    assert time.monotonic() - begun < 1.5


def test_a_download_takes_no_longer_than_a_limit(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "LONGEST", 0)
    server.answer = lambda request: request.say(200, b"x" * 10**5, Content_Length=10**5)
    assert "not done in 0 hours" in refused(server, tmp_path)
    assert (tmp_path / "x.bin.part").stat().st_size  # to go on from


def test_more_has_come_than_there_is(server, tmp_path):
    """An older and longer file: nothing is left to send, and it is not the file."""
    (tmp_path / "x.bin.part").write_bytes(b"older and longer")

    def answer(request):
        if request.headers.get("Range"):
            request.say(416, Content_Range="bytes */5")
        else:
            request.say(200, b"newer", Content_Length=5)

    server.answer = answer
    assert download.fetch("x.bin", [server.base], tmp_path).read_bytes() == b"newer"


@pytest.mark.parametrize("length", ["-5", "x", "9" * 5000, "1e3", ""])
def test_lengths_that_are_none(length, server, tmp_path):
    server.answer = lambda request: request.say(200, b"newer", Content_Length=length)
    if length:
        assert len(refused(server, tmp_path)) < 1000
    else:
        assert download.fetch("x.bin", [server.base], tmp_path).read_bytes() == b"newer"


def test_a_disk_without_room(server, tmp_path, monkeypatch):
    server.answer = lambda request: request.say(200, b"x", Content_Length=10**9)
    room = types.SimpleNamespace(free=10**8)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: room)
    assert "has no room for 1 GB, and 0.1 GB are free" in refused(server, tmp_path)
