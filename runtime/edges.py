"""Where a command meets the machine: what goes wrong there is one line, and a bug has a traceback.

A disk that is full, memory that ends, a pipe that somebody closed are no faults of the program. And
what files say of themselves, such as names of classes, reaches the terminal as text: characters by
which a terminal is steered are printed as their numbers.
"""

from runtime.commandline import BadInput

import contextlib
import errno
import os
import re
import select
import sys
import tempfile

import torch
from tqdm import tqdm

# What the machine says, and what to do. All other OSErrors are bugs of ours.
OUTSIDE = {
    errno.ENOSPC: "make room, and type the same again",
    errno.EDQUOT: "make room, and type the same again",
    errno.EFBIG: "it is too large for this file system: name another folder",
    errno.EACCES: "name a file or folder that may be read and written",
    errno.EPERM: "name a file or folder that may be read and written",
    errno.EROFS: "name a folder that can be written to",
    errno.EIO: "the disk fails: copy what is there to another one",
    errno.ESTALE: "the disk is gone: type the same again when it is there",
    errno.ENAMETOOLONG: "type a shorter name",
    errno.ENOTDIR: "name a folder",
    errno.EISDIR: "name a file",
    errno.ELOOP: "a link leads to itself: name the file it should lead to",
    errno.EMFILE: "raise the limit by ulimit -n 4096",
    errno.ENOMEM: "type a smaller --batch-size, or use a machine with more memory",
}
LESS = "type a smaller --batch-size, or use a machine with more memory"
# Control characters and those that turn the direction of writing. Where progress bars are drawn,
# what tqdm steers a terminal by is let through.
STEERS = r"\x00-\x08\x0b\x0c\x0e-\x1a\x1c-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069"
IN_TEXT = re.compile(rf"[\r\x1b{STEERS}]")
IN_BARS = re.compile(rf"[{STEERS}]|\x1b(?!\[A)")
LONG = re.compile(r"(.{1000}).{100,}(.{400})")  # what is shown of a long message
LISTENER = "DIFFUSION_LAST_LINE"  # names the file for the last line of a command that we start
IN_MESSAGE = re.compile(rf"[\r\n\t\x1b{STEERS}]")


class Shown:
    """A stream of text that prints what `steers` finds as its numbers; `bare` does not."""

    def __init__(self, bare, steers):
        self.bare, self._steers = bare, steers

    def write(self, text):
        return self.bare.write(escaped(text, self._steers))

    def __getattr__(self, name):
        return getattr(self.bare, name)


def escaped(text, steers=IN_MESSAGE):
    """The text, with numbers such as x1b in place of characters that steer a terminal."""
    return steers.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def run(main):
    """main(), for commandline.entry.

    A character that the terminal's encoding lacks is printed as its number: that ends no work.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, as by 2>&-
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's is another
            stream.reconfigure(errors="backslashreplace")
    with (
        contextlib.redirect_stdout(Shown(sys.stdout, IN_TEXT)),
        contextlib.redirect_stderr(Shown(sys.stderr, IN_BARS)),
    ):
        try:
            if os.environ.get("RANK") or os.environ.get("WORLD_SIZE"):
                from runtime.ranks import together

                main = together(main)
            main()
            sys.stdout.flush()
        except BadInput as error:
            stop(f"error: {error}", 2)
        except KeyboardInterrupt:
            stop("interrupted", 130)
        except BrokenPipeError:  # as | head -1 closes it; that of a connection is something else
            if not reader_is_gone():
                raise
            quiet()
            sys.exit(128 + 13)
        except MemoryError as error:
            stop(f"error: memory has ended ({str(error) or 'a large object'}); {LESS}", 2)
        except OSError as error:
            if error.errno not in OUTSIDE:
                raise
            name = f"{error.filename}: " if error.filename else ""
            stop(f"error: {name}{os.strerror(error.errno)}; {OUTSIDE[error.errno]}", 2)
        except RuntimeError as error:
            if not is_of_memory(error):
                raise
            stop(f"error: memory has ended ({str(error).splitlines()[0][:120]}); {LESS}", 2)


def is_of_memory(error):
    """Whether torch found no memory, on a GPU or on the CPU."""
    told = ("can't allocate memory", "Storage size calculation overflowed")
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in told)


def stop(message, code):
    """Print a message in one line, below all progress bars, and end."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()  # else the message would stand at the end of its line
    message = LONG.sub(r"\1...\2", escaped(message))
    try:
        with open(os.environ[LISTENER], "a") as file:
            print(message, file=file)
    except (KeyError, OSError):  # nobody listens there
        with contextlib.suppress(OSError, ValueError):
            print(message, file=sys.stderr)
            sys.stderr.flush()
    sys.exit(code)


@contextlib.contextmanager
def heard():
    """Yield (environment, what_was_said): a command that is run in it says its last line to us.

    So its refusal is a part of ours and is not printed twice.
    """
    with tempfile.NamedTemporaryFile("r", prefix="refusal-") as file:
        yield os.environ | {LISTENER: file.name}, lambda: " ".join(file.read().split())


def reader_is_gone():
    """Whether nobody reads any more what is printed."""
    if not hasattr(select, "poll"):
        return True
    poll = select.poll()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a test's stream is no file
            poll.register(stream.fileno(), 0)
    return any(what & (select.POLLERR | select.POLLHUP) for _, what in poll.poll(0))


def quiet():
    """Have nothing more be written where nobody reads: Python would complain at its end."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
