"""The connections between the processes of one command: lines of JSON, each a dictionary."""

import contextlib
import json
import selectors
import socket
import time

HELLO = 2.0  # seconds in which one that connects must have said who it is
LONGEST = 1 << 20  # bytes of that


def kept_alive(link):
    """A socket whose other machine must answer within six seconds, whether it is written to or not.

    The kernels do this; how busy the processes are does not matter.
    """
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    how = {"TCP_KEEPIDLE": 2, "TCP_KEEPALIVE": 2, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 2}
    for name, value in (how | {"TCP_USER_TIMEOUT": 5000}).items():
        if hasattr(socket, name):  # systems have some of them
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return link


def send(link, told=None):
    """A dictionary, or a sign of life: what the other kernel must answer."""
    link.sendall((json.dumps(told).encode() if told else b"") + b"\n")


def read_line(link):
    """What `send` has sent, {} for a sign of life; None where the link has ended.

    TimeoutError only before it begins.
    """
    parts = []
    while True:
        try:
            part = link.recv(1)
        except OSError as error:
            if error.errno is not None:  # ETIMEDOUT is one: the other machine does not answer
                return None
            if not parts:
                raise
            continue
        if not part:
            return None
        if part == b"\n":
            break
        parts.append(part)
    if not parts:
        return {}
    return dictionary(b"".join(parts))


def dictionary(line):
    """What a line holds; None for what `send` does not send."""
    try:
        told = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return told if isinstance(told, dict) else None


def arrivals(server, token, until):
    """(link, what it says) of each that connects to `server` and says `token`, without end.

    (link, None) follows where one of them has gone again. Anybody may connect: who says nothing,
    not this, or too much, holds up nobody. until: a Wait.
    """
    parts, late = {}, {}  # of those that have not said all
    server.setblocking(False)
    with contextlib.ExitStack() as close, selectors.DefaultSelector() as ready:
        close.callback(lambda: [link.close() for link in parts])
        ready.register(server, selectors.EVENT_READ)
        while True:
            for key, _ in ready.select(min(until.left(), HELLO)):
                link = key.fileobj
                if link is server:
                    with contextlib.suppress(OSError):  # it has gone before it was let in
                        link, _ = server.accept()
                        link.settimeout(HELLO)
                        parts[link], late[link] = b"", time.monotonic() + HELLO
                        ready.register(link, selectors.EVENT_READ)
                    continue
                known, part = link not in parts, b""
                with contextlib.suppress(OSError):
                    part = link.recv(1 << 16)
                whole = parts.get(link, b"") + part
                if not known and part and b"\n" not in part and len(whole) < LONGEST:
                    parts[link] = whole
                    continue
                told = None if known else dictionary(whole)
                if told and told.get("token") == token:
                    del parts[link], late[link]
                    yield link, told
                    continue
                late[link] = 0.0
                if known:
                    yield link, None
            for link in [link for link, end in late.items() if end < time.monotonic()]:
                ready.unregister(link)
                link.close()
                parts.pop(link, None)
                del late[link]
