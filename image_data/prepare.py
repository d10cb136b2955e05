"""From raw images to the folder that data.load() maps: images.npy, labels.npy, manifest.json."""

from runtime.commandline import BadInput, parse_classes
from runtime.files import CLOSED, FAILED, flush, read_json
from runtime.parents import end_with_parent
from runtime.processes import progress, say_once
from runtime.sums import add, is_checked, mapped, mark_checked, sum_of

import errno
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import PIL

from image_data import decode, glyphs
from image_data.listing import shortened

PROTOCOL = "shorter side to size with Lanczos, centre crop; 16-bit high byte; alpha on white; v1"
CHUNK = 128  # images a worker prepares at a time, fewer where they would exceed CHUNK_BYTES
CHUNK_BYTES = 8 << 20
KINDS = {"name": str, "source": str, "stamp": list, "count": int, "shape": list}
KINDS |= {"class_names": list, "key": str}  # of what a manifest says
TEXTS = ("note", "told", "range", "pages")  # that it may have
FILES = ("images.npy", "labels.npy", "manifest.json")
DARK = 1 / 4  # of the range of values: a set that stays below is told of


class Damaged(Exception):
    """What lies there is no prepared set, or no longer."""


def read(folder):
    """(images, labels, manifest) of a prepared set; None where there is none. Else Damaged.

    The first time, and after a change, to the last byte.
    """
    if not (folder / "manifest.json").exists():
        return None
    manifest = read_json(folder / "manifest.json")
    if not manifest:
        raise Damaged("manifest.json cannot be read")
    if wrong := _wrong_in(manifest):
        raise Damaged(f"manifest.json {wrong}")
    try:
        images, labels = mapped(folder / "images.npy"), mapped(folder / "labels.npy")
    except ValueError as error:
        raise Damaged(error) from None
    classes, count = len(manifest["class_names"]), manifest["count"]
    if images.dtype != np.uint8 or list(images.shape) != [count, *manifest["shape"]]:
        raise Damaged("images.npy is of another form than manifest.json says")
    if labels.dtype != np.int64 or labels.shape != (count,):
        raise Damaged("labels.npy is of another form than manifest.json says")
    if classes and not 0 <= labels.min() <= labels.max() < classes:
        raise Damaged(f"labels.npy has labels beyond 0 to {classes - 1}")
    labels = np.array(labels)
    if not is_checked(folder, FILES):
        if "sum" in manifest and manifest["sum"] != _sum_of(manifest):
            raise Damaged("manifest.json is not as it was written")
        digest = hashlib.sha256(labels.tobytes())
        add(digest, images)
        if digest.hexdigest()[:12] != manifest["key"]:
            raise Damaged("images or labels are not those that its key names")
        mark_checked(folder, FILES)
    return images, labels, manifest


def _wrong_in(manifest):
    """What a manifest says that none does, '' where there is nothing."""
    for name, kind in KINDS.items():
        if not isinstance(manifest.get(name), kind):
            return f"says no {name}, as another version's may"
    numbers = [manifest["count"], *manifest["shape"]]
    if len(numbers) != 4 or not all(type(n) is int and n > 0 for n in numbers):
        return "says no count above 0, or no three sides"
    if numbers[3] not in (1, 3):
        return f"says {numbers[3]} channels, expected 1 or 3"
    texts = [*manifest["class_names"], *(manifest.get(name, "") for name in TEXTS)]
    if not all(isinstance(text, str) for text in texts):
        return "has other things than texts as class names or notes"
    return "" if re.fullmatch("[0-9a-f]{12}", manifest["key"]) else "says no key of twelve digits"


def _sum_of(manifest):
    """Of all else that a manifest says."""
    return sum_of({name: value for name, value in manifest.items() if name != "sum"})


def prepare(source, folder, split, size, classes, workers, name):
    """Make `folder` from a Source, whole or not at all; only one process may do so at a time.

    Memory stays bounded however large the set is: at most two chunks a worker are on their way.
    Raises BadInput for broken or mixed images, a worker that was killed, and a full disk.
    """
    temporary = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)  # of a preparation that was killed
    try:
        with _unwound_by_sigterm():
            temporary.mkdir()
            manifest = _write_all(source, temporary, split, size, classes, workers, name)
            (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1))
            mark_checked(temporary, FILES)
            for path in [*temporary.iterdir(), temporary]:
                flush(path)
            shutil.rmtree(folder, ignore_errors=True)  # without a manifest, or damaged
            os.replace(temporary, folder)
        _tell_older(folder, manifest)
    except BrokenProcessPool:
        raise BadInput(
            f"a process that prepared {name} was killed, perhaps for lack of memory: "
            "free some and type the same again"
        ) from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise BadInput(
                f"no space left in {folder.parent} for {name}: free some or change --data-root"
            ) from None
        if error.errno not in FAILED or folder.parent not in Path(error.filename or "").parents:
            raise
        mend = "choose another --data-root" if error.errno in CLOSED else f"delete {folder}"
        raise BadInput(f"cannot write {folder} ({error.strerror}): {mend}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def is_manifest(what):
    """Whether that is what the manifest of a prepared set says."""
    return not _wrong_in(what)


def _tell_older(folder, manifest):
    """A line about the sets that were prepared from what the raw files of this one have been."""
    older, size = [], 0
    for path in sorted(folder.parent.glob("*/manifest.json")):
        if not is_manifest(other := read_json(path)):
            continue
        named = path.parent.name.rpartition("-")[0] == folder.name.rpartition("-")[0]
        if named and other["source"] == manifest["source"] and other["stamp"] != manifest["stamp"]:
            older.append(str(path.parent))
            size += sum(file.stat().st_size for file in path.parent.iterdir())
    if older:
        told = "1 copy" if len(older) == 1 else f"{len(older)} copies"
        told = f"note: {told} of earlier states of {manifest['source']} may be deleted"
        say_once(f"{told} ({size / 1e6:,.1f} MB): {shortened(older)}")


def told_of(source, told):
    """The one line that says what was found, and what of it is left out; '' for none."""
    return "; ".join(filter(None, [told, source.told]))


def _write_all(source, folder, split, size, classes, workers, name):
    """images.npy and labels.npy in `folder`; returns the manifest."""
    contents = source.contents()
    if told := told_of(source, contents.told):
        say_once(told)  # before the work: it may not be what was meant
    keep, labels, class_names = _choose(contents, classes)
    if contents.arrays is not None and size is None:
        workers = 1  # there is nothing to compute
    with _pool(min(workers, -(-len(keep) // CHUNK))) as run:
        shape, deep, pages = _shape(run, contents, keep, size)
        rows_a_job = max(1, min(CHUNK, CHUNK_BYTES // int(np.prod(shape[1:]))))
        parts = run(_jobs(contents, keep, rows_a_job, size, shape[3]))
        with progress(len(keep), f"preparing {name} {split}") as bar:
            written = _write_images(folder / "images.npy", parts, shape, labels, bar)
            content, lowest, highest = written
    np.save(folder / "labels.npy", labels)
    manifest = {
        "name": name,
        "split": split,
        "source": source.origin,
        "stamp": source.stamp,
        "count": len(keep),
        "shape": list(shape[1:]),
        "protocol": PROTOCOL,
        "size": size,
        "class_names": list(class_names),
        "key": content[:12],
        "made_with": f"pillow {PIL.__version__}, numpy {np.__version__}",
    }
    said = {"note": contents.note, "told": contents.told}
    said["range"] = _range_told(source.origin, len(keep), deep, lowest, highest)
    if pages:
        files = "1 file has" if len(pages) == 1 else f"{len(pages)} files have"
        told = f"note: {source.origin}: {files} several pages, up to {max(pages)}"
        said["pages"] = f"{told}; the first is taken"
    manifest |= {name: line for name, line in said.items() if line}
    return manifest | {"sum": _sum_of(manifest)}


def _range_told(origin, count, deep, lowest, highest):
    """A line about values that use little of their range, '' where they use it.

    deep: the largest values of the images of 16 bits; lowest, highest: of all, as prepared.
    """
    told = f"note: {origin}: "
    if deep and max(deep) < DARK * 65536:
        bits = max(1, int(max(deep)).bit_length())
        return (
            f"{told}no 16-bit value exceeds {max(deep):,} of 65,535, and the high byte was kept: "
            f"{(max(deep) >> 8) + 1} of 256 levels; multiply the images by {1 << 16 - bits}, if "
            f"they hold {bits} bits"
        )
    if lowest == highest:
        return f"{told}every value of every image is {lowest}"
    if highest < DARK * 256:
        return (
            f"{told}no value exceeds {highest} of 255, the images are nearly black; multiply them, "
            "or are they labels or masks?"
        )
    if deep and len(deep) < count:
        return f"{told}{len(deep)} of {count} images have 16 bits, of which the high byte was kept"
    return ""


def _choose(contents, classes):
    """(rows to keep, their labels, class names) for the asked-for classes, or for all."""
    if not classes:
        return np.arange(len(contents.labels)), contents.labels, contents.class_names
    chosen = parse_classes(classes, contents.class_names, contents.aliases)
    chosen = list(dict.fromkeys(chosen))  # a class named twice is still one class
    new = np.full(len(contents.class_names), -1)
    new[chosen] = np.arange(len(chosen))
    keep = np.flatnonzero(new[contents.labels] >= 0)
    if len(keep) == 0:
        raise BadInput(f"--classes {','.join(classes)}: no image of this split has them")
    return keep, new[contents.labels[keep]], tuple(contents.class_names[c] for c in chosen)


def _shape(run, contents, keep, size):
    """(N,H,W,C) of what will be prepared, largest values of the images of 16 bits, pages of TIFFs.

    Pages are the numbers above 1. C is 1 if all images are gray. BadInput if sizes mix.
    """
    if contents.drawn:
        found = [(glyphs.SIZE, glyphs.SIZE, True, None, 1)]
    elif contents.arrays is not None:
        h, w, c = contents.arrays.shape[1:]
        found = [(w, h, c == 1, None, 1)]
    else:
        items = [contents.items[i] for i in keep]
        starts = range(0, len(items), CHUNK)
        jobs = (
            (decode.inspect, contents.container, items[i : i + CHUNK], size is None) for i in starts
        )
        found = [row for part in run(jobs) for row in part]
    channels = 1 if all(gray for _, _, gray, *_ in found) else 3
    deep = [largest for *_, largest, _ in found if largest is not None]
    pages = [count for *_, count in found if count > 1]
    if size:
        return (len(keep), size, size, channels), deep, pages
    for i, (w, h, *_) in enumerate(found):
        if (w, h) != found[0][:2]:
            first = "x".join(map(str, found[0][:2]))
            raise BadInput(
                f"{contents.container} mixes sizes: {contents.items[keep[0]]} is {first}, "
                f"{contents.items[keep[i]]} is {w}x{h}; type --size to resize, such as --size 64"
            )
    return (len(keep), found[0][1], found[0][0], channels), deep, pages


def _jobs(contents, keep, rows_a_job, size, channels):
    """(function, *arguments) that make some images after the other; no more than these need."""
    for start in range(0, len(keep), rows_a_job):
        rows = keep[start : start + rows_a_job]
        if contents.drawn:
            yield _draw, contents.drawn, rows, size
        elif contents.arrays is not None:
            yield decode.resize_arrays, contents.arrays[rows], size
        else:
            items = [contents.items[i] for i in rows]
            yield decode.decode, contents.container, items, size, channels


def _draw(split, rows, size):
    return decode.resize_arrays(glyphs.draw(split, rows), size)


def _write_images(path, parts, shape, labels, bar):
    """Write uint8 parts (n,H,W,C) as one .npy of `shape`.

    Returns the SHA-256 of labels and pixels, and the lowest and the highest value of all.
    """
    if shutil.disk_usage(path.parent).free < np.prod(shape, dtype=np.int64):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    content = hashlib.sha256(labels.tobytes())
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    lowest, highest = 255, 0
    with open(path, "wb") as f:
        np.lib.format.write_array_header_1_0(f, header)
        for part in parts:
            f.write(part.data)
            content.update(part.data)
            lowest, highest = min(lowest, int(part.min())), max(highest, int(part.max()))
            bar.update(len(part))
    return content.hexdigest(), lowest, highest


# --------------------------------------------------------------------------------- many processes


@contextmanager
def _pool(workers):
    """A function that yields the results of jobs (function, *arguments), in their order.

    They run in worker processes, a bounded number ahead.
    """
    if workers <= 1:
        yield lambda jobs: (fn(*arguments) for fn, *arguments in jobs)
        return
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    shared = context.RLock(), workers
    with ProcessPoolExecutor(workers, context, _start_worker, shared) as pool:

        def run(jobs):
            waiting = deque()
            for job in jobs:
                waiting.append(pool.submit(*job))
                if len(waiting) >= 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

        try:
            yield run
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _start_worker(lock, workers):
    """Leave Ctrl-C to the parent, end with it, and do not keep its handler of SIGTERM."""
    decode.Turns.share(lock, workers)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end_with_parent()


@contextmanager
def _unwound_by_sigterm():
    """Inside, SIGTERM ends the program the way Ctrl-C does, so that nothing half-written stays."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
