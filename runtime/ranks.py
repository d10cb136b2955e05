"""The processes of one command find each other, mean the same, and end together.

torchrun, or whatever starts them, says in the environment who is who: RANK, WORLD_SIZE, LOCAL_RANK,
MASTER_ADDR and MASTER_PORT. `meet` connects each to rank 0, which compares what they were started
with. These connections stay open until the end. The kernel closes them when a process dies, however
that happens, and answers for it as long as it lives; a machine that is gone answers nothing. So no
rank waits for one that will not come, and none is taken for dead because it is busy.
"""

from runtime.commandline import BadInput, flag
from runtime.edges import stop
from runtime.links import arrivals, kept_alive, read_line, send

import contextlib
import datetime
import functools
import hashlib
import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PATIENCE = 300.0  # seconds in which all must have come
NOTE = 10.0  # seconds after which a line says who is waited for
BEAT = 1.0  # seconds between two signs of life
GRACE = 2.0  # seconds in which a rank that has lost another may end by itself
ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("kernels", "runtime", "image_data", "networks", "evaluation")
PLACES = frozenset({"config", "out", "data_root"})  # may differ among machines
PARTY = []  # this process's Party, once it has met the others


class Place(NamedTuple):
    """Where a process stands among others; parent: the one that started them here, if it is ours"""

    rank: int
    size: int
    local: int  # among those of its machine
    host: str
    port: int
    parent: bool = False

    @property
    def serves(self):
        """Whether others find each other through a store in this process."""
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        return self.rank == 0 and not self.parent and not agent


def number(name, low, high, usual=None):
    """The whole number in the environment variable `name`; BadInput unless it is low to high."""
    text = os.environ.get(name, usual)
    if not (text.isascii() and text.isdigit() and len(text) < 10 and low <= int(text) <= high):
        told = f"{name}={text} in the environment: expected a number from {low} to {high}"
        raise BadInput(f"{told}; torchrun sets it, and for one process: unset {name}")
    return int(text)


def place():
    """This process's Place, of the environment; None where it is alone.

    BadInput where the environment says a part of it only, or what cannot be.
    """
    given = [name for name in ("RANK", "WORLD_SIZE") if os.environ.get(name)]
    if not given:
        return None
    if missing := [name for name in NEEDED if not os.environ.get(name)]:
        told = f"{' and '.join(given)} set in the environment without {' and '.join(missing)}"
        told = f"{told}, which torchrun would set, too"
        raise BadInput(f"{told}: for one process type unset {' '.join(given)}, for more torchrun")
    size = number("WORLD_SIZE", 1, 10**6)
    rank = number("RANK", 0, size - 1)
    local = number("LOCAL_RANK", 0, size - 1, usual=str(rank))
    return Place(rank, size, local, os.environ["MASTER_ADDR"], number("MASTER_PORT", 1, 65535))


def together(main):
    """main as one of several processes: how it ends is told to them, and it ends with them."""

    @functools.wraps(main)
    def run(*arguments):
        place()
        try:
            main(*arguments)
        except BaseException as error:
            for party in PARTY:
                party.leave(error)
            raise
        for party in PARTY:
            party.leave()

    return run


def meet(cfg, where=None):
    """The Party of this process; the first time it waits for all others. None where it is alone.

    cfg: what they must agree on. where: a Place, in place of what the environment says. BadInput
    where one does not come, or has other settings, code or torch than the first one.
    """
    if not PARTY and (where := where or place()):
        PARTY.append(Party(where, about(cfg, where)))
    return PARTY[0] if PARTY else None


# ------------------------------------------------------------------------------ what they agree on


def about(cfg, where):
    """What the others compare: the settings, the code and torch, of this process."""
    if where.parent:
        return {"local": where.local}  # it was all handed over by one process
    settings = {flag(name): repr(value) for name, value in vars(cfg).items()}
    settings["script"] = Path(sys.argv[0]).name
    found = {"local": where.local, "machine": socket.gethostname(), "boot": boot()}
    found["LOCAL_RANK"] = os.environ.get("LOCAL_RANK") or "unset"
    return found | {"settings": settings, "code": code(), "torch": torch.__version__}


def boot():
    """What names a machine where several have one name: Linux draws it when it starts; else ""."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text()
    return ""


def code():
    """{path: hash} of the files that this program is made of."""
    paths = [path for room in ROOMS for path in ROOT.glob(f"{room}/**/*.py")]
    chapters = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
    paths += [Path(path) for path in set(filter(None, chapters)) if Path(path).parent == ROOT]
    hashes = {str(path.relative_to(ROOT)): path.read_bytes() for path in paths}
    return {path: hashlib.sha256(text).hexdigest()[:12] for path, text in hashes.items()}


def misplaced(told, size, members):
    """A line that says why who tells this is no rank of `size` beside the `members`, or ""."""
    rank, other = told.get("rank"), told.get("size")
    if other != size or rank not in range(1, size):
        told = f"rank {rank} has WORLD_SIZE={other}, rank 0 WORLD_SIZE={size}"
        return f"{told}: start all with the same, or another run with another MASTER_PORT"
    if rank in members:
        return f"RANK={rank} is given to two processes: start each of 0 to {size - 1} once"
    return ""


def differing(members):
    """A line that names what differs among what `about` said of each rank, or ""."""
    first, several = members[0], sum(member["local"] == 0 for member in members) > 1
    if wrong := misnumbered(members):
        return wrong
    for rank, other in enumerate(members):
        who = f"rank {rank} of {len(members)}"
        if several and "machine" in other:
            who += f" (on {other['machine']})"
        if other.get("torch") != first.get("torch"):
            return f"{who} has torch {other['torch']}, rank 0 torch {first['torch']}: install one"
        given, wanted = other.get("settings", {}), first.get("settings", {})
        skip = {flag(name) for name in PLACES} if several else {flag("config")}
        if names := differing_keys(given, wanted, skip):
            told = [f"{name} {given.get(name)} (rank 0: {wanted.get(name)})" for name in names[:3]]
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            return f"{who} has {', '.join(told)}{more}: start all with the same settings"
        if names := differing_keys(other.get("code", {}), first.get("code", {})):
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            told = f"{who} runs other code than rank 0: {', '.join(names[:3])}{more}"
            return f"{told}: copy the same to every machine"
    return ""


def misnumbered(members):
    """A line that names a rank with a wrong number on its machine, of several machines; or ""."""
    machines = [(member.get("machine"), member.get("boot")) for member in members]
    if len(set(machines)) == 1:
        return ""
    for rank, (other, machine) in enumerate(zip(members, machines, strict=True)):
        host = rank - other["local"]  # that would be the first one of its machine
        if host < 0 or machines[host] != machine or members[host]["local"] != 0:
            told = f"rank {rank} of {len(members)} (on {machine[0]}) has LOCAL_RANK "
            return (
                f"{told}{other['LOCAL_RANK']}, and there are several machines: it counts the ranks "
                "of each from 0, which follow one another; set it, or start all with torchrun"
            )
    return ""


def differing_keys(a, b, skip=()):
    """Keys of two dictionaries under which these hold different values, or one holds none."""
    return [k for k in sorted(a.keys() | b.keys()) if k not in skip and a.get(k) != b.get(k)]


# -------------------------------------------------------------------------------------- the meeting


class Party:
    """This process among the others that it has met.

    store    through which torch.distributed's groups find each other
    nodes    on how many machines they are
    links    {rank: socket}: rank 0's to all others, and theirs to rank 0
    """

    def __init__(self, where, mine):
        self.place, self.links, self.ended = where, {}, {}
        self.lock, self.leaving, self.said = threading.Lock(), False, False
        self.lost = threading.Event()
        with self._patience() as until:
            store = opened(where, until)
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            self.store = dist.PrefixStore(f"attempt {attempt}", store)
            found = self._gather(mine, until) if where.rank == 0 else self._join(mine, until)
        if found["differing"]:
            raise BadInput(found["differing"])
        self.nodes, self.machines = found["nodes"], found["machines"]
        if self.links:
            threading.Thread(target=self._watch, daemon=True).start()

    @contextlib.contextmanager
    def _patience(self):
        """A Wait; who has not come in time is named by BadInput."""
        at, rank = f"{self.place.host}:{self.place.port}", self.place.rank
        until = Wait(f"rank {rank} of {self.place.size} waits for the others at {at}")
        try:
            yield until
        except (TimeoutError, dist.DistError, EOFError) as error:
            here = {rank, *self.links} if rank == 0 else {rank}
            others = sorted(set(range(self.place.size)) - here)
            who = f"ranks {', '.join(map(str, others[:5]))}" if rank == 0 else "rank 0"
            told = f"rank {rank} of {self.place.size}: {who} did not come to {at}"
            told = f"{told} within {PATIENCE:g} s" if isinstance(error, TimeoutError) else told
            raise BadInput(
                f"{told}; start all of them, or for one process type unset RANK WORLD_SIZE"
            ) from None

    def _gather(self, mine, until):
        """Rank 0's part: what is told to all."""
        dual = socket.has_dualstack_ipv6()
        how = {"family": socket.AF_INET6, "dualstack_ipv6": True} if dual else {}
        members, token, wrong = {0: mine}, secrets.token_hex(8), ""
        with socket.create_server(("", 0), backlog=self.place.size, **how) as server:
            self.store.set("meeting", json.dumps([server.getsockname()[1], token]))
            came = arrivals(server, token, until)
            while len(members) < self.place.size and not wrong:
                link, told = next(came)
                if told is None:
                    (gone,) = [rank for rank, known in self.links.items() if known is link]
                    del members[gone], self.links[gone]
                elif wrong := misplaced(told, self.place.size, members):
                    self._tell({"differing": wrong})
                    send(link, {"differing": wrong})
                else:
                    members[told["rank"]] = told["about"]
                    self.links[told["rank"]] = kept_alive(link)
            came.close()
            if wrong:
                raise BadInput(wrong)
            self.store.set("meeting", json.dumps(None))  # who comes later shall not wait
        members = [members[rank] for rank in range(self.place.size)]
        machines = [member.get("machine") for member in members]
        nodes = sum(member["local"] == 0 for member in members)
        found = {"nodes": nodes, "machines": machines, "differing": differing(members)}
        self._tell(found)
        return found

    def _join(self, mine, until):
        """The part of all others: the same."""
        by_hand, at = "TORCHELASTIC_RUN_ID" not in os.environ, self.place
        while True:
            met = self.store.check(["meeting"]) and json.loads(self.store.get("meeting"))
            if met is None and by_hand:  # torchrun's store may tell of a meeting before a restart
                told = f"rank {at.rank} of {at.size}: all ranks have come to {at.host}:{at.port}"
                raise BadInput(
                    f"{told} already; is RANK={at.rank} given twice? For another run name another "
                    "MASTER_PORT"
                )
            if met and (told := self._introduced(*met, mine, until)):
                return told
            until.left()
            time.sleep(0.02)

    def _introduced(self, port, token, mine, until):
        """What rank 0 says to this one at its meeting; None where that is over."""
        hello = {"token": token, "rank": self.place.rank, "size": self.place.size, "about": mine}
        seconds = until.left()
        try:
            link = kept_alive(socket.create_connection((self.place.host, port), seconds))
            send(link, hello)
        except OSError:
            return None
        self.links[0] = link
        while True:
            link.settimeout(until.left())
            with contextlib.suppress(TimeoutError):
                return read_line(link)

    # ---- until the end

    def _watch(self):
        """Until all links are gone: what others say when they end, and that they are gone."""
        with selectors.DefaultSelector() as ready:
            for rank, link in self.links.items():
                link.settimeout(GRACE)
                ready.register(link, selectors.EVENT_READ, rank)
            while ready.get_map():
                found = ready.select(BEAT)
                for key in list(ready.get_map().values()) if not found else ():
                    with contextlib.suppress(OSError):
                        send(key.fileobj)
                for key, _ in found:
                    told, rank = read_line(key.fileobj), key.data
                    if told == {}:
                        continue
                    if not told or told["rank"] == rank:  # it says no more
                        ready.unregister(key.fileobj)
                    told = told or {"rank": rank, "how": "died"}
                    if told["how"] != "done" and told["rank"] not in self.ended:
                        self._lost(told)
                    self.ended[told["rank"]] = told["how"]

    def _lost(self, told):
        """End this process, since another one has: it may do so by itself first."""
        if self.leaving:
            return
        if self.place.rank == 0:
            self._tell(told)
        size, rank, line = self.place.size, told["rank"], told.get("line", "")
        who = f"rank {rank} of {size}"
        if self.nodes > 1:
            who += f" (on {self.machines[rank]})"
        orderly, died = told["how"] == "stopped", told["how"] == "died"
        how = f"stopped: {line}" if orderly else "failed, as is said there"
        if died:
            how = "died or is out of reach; type the same again to go on from the last checkpoint"
        self.line, self.code = f"error: {who} {how}", 2 if orderly else 1
        self.lost.set()
        if not died:  # perhaps this rank has met the same, and says so
            time.sleep(GRACE)
        if not self.leaving:
            self._say()
            self._linger()
            os._exit(self.code)

    def _say(self):
        with self.lock:
            if not self.said and not self.place.parent:
                with contextlib.suppress(SystemExit):
                    stop(self.line, self.code)
                for stream in (sys.stdout, sys.stderr):
                    stream.flush()
            self.said = True

    def _linger(self):
        """Time to end otherwise: a parent shall see first who has begun, and end the rest."""
        time.sleep(PATIENCE if self.place.parent else GRACE)

    def _tell(self, told):
        for rank, link in self.links.items():
            if rank != told.get("rank"):
                with contextlib.suppress(OSError):
                    send(link, told)

    def leave(self, error=None):
        """Tell the others how this process ends; one that ends since another did says nothing else.

        error: what ends it. Whoever finds it first calls this; only the first time counts.
        """
        if self.leaving:
            return
        if isinstance(error, SystemExit):
            how, line = ("stopped" if error.code else "done"), f"exit code {error.code}"
        elif isinstance(error, BadInput | KeyboardInterrupt):
            how, line = "stopped", str(error) or "interrupted"
        else:
            how, line = ("failed" if error else "done"), ""
            # torch.distributed raises RuntimeErrors, before it is known here who is gone.
            if isinstance(error, RuntimeError) and self.lost.wait(GRACE) or self.lost.is_set():
                self._say()
                if self.place.parent:
                    self._linger()
                raise SystemExit(self.code) from None
        self.leaving = True
        self._tell({"rank": self.place.rank, "how": how, "line": line})


class Wait:
    """PATIENCE that runs out; after NOTE seconds `line` says what is waited for."""

    def __init__(self, line):
        self.line, self.start, self.noted = line, time.monotonic(), False

    def left(self):
        """Seconds until there is something to do at the latest; TimeoutError when none are left."""
        gone = time.monotonic() - self.start
        if gone > NOTE and not self.noted:
            self.noted = True
            by = "" if "TORCHELASTIC_RUN_ID" in os.environ else "; RANK and WORLD_SIZE are set here"
            print(f"note: {self.line}{by}", file=sys.stderr, flush=True)
        if gone > PATIENCE:
            raise TimeoutError
        return max(0.01, (PATIENCE if self.noted else NOTE) - gone + 0.01)


def opened(where, until):
    """The store at a Place, which is in this process or in another one; BadInput for a bad one."""
    seconds = functools.partial(datetime.timedelta, seconds=PATIENCE)
    if not where.serves:
        while True:  # torch would say on the way that nobody is there yet
            try:
                socket.create_connection((where.host, where.port), until.left()).close()
                break
            except socket.gaierror as error:
                wrong = f"MASTER_ADDR={where.host}: no such machine ({error.strerror})"
                raise BadInput(f"{wrong}; torchrun's --rdzv-endpoint names it") from None
            except OSError:
                until.left()
                time.sleep(0.05)
    try:
        how = {"wait_for_workers": False, "timeout": seconds()}
        return dist.TCPStore(where.host, where.port, where.size, where.serves, **how)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error) and "in use" not in str(error):
            raise
        told = f"MASTER_PORT={where.port} is in use on this machine"
        raise BadInput(f"{told}: name another one, to all processes") from None
