"""The files of a folder or a zip, under names that mean the same wherever they were made.

A name has '/' between its folders, whatever the system that packed it (a zip made on Windows may
have '\\', and so do the files that a careless program unpacks from it on Linux); './' and 'a/../'
are resolved; letters with accents are composed (Unicode's NFC: macOS stores them apart). UTF-8 in
a zip that does not say so is read as UTF-8.

Not listed: names that begin with a dot; what systems and tools leave behind (LEFT_BEHIND); folders
that this program writes (OURS), so that no run, and no set it has prepared, becomes a class. What
is left out so is told, but for the dots and what is in every second folder (QUIET).
"""

from runtime.commandline import BadInput

import os
import re
import unicodedata
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from image_data.decode import EXTENSIONS

LEFT_BEHIND = frozenset(
    [
        "__macosx",
        "thumbs.db",
        "desktop.ini",
        "@eadir",
        "#recycle",
        "$recycle.bin",
        "system volume information",
        "lost+found",
        "__pycache__",
    ]
)
OURS = (  # what a folder is that this program writes, and files that all are in it
    ("a run", {"config.yaml", "log.jsonl"}),
    ("a run", {"config.yaml", "ckpt.pt"}),
    ("a prepared set", {"manifest.json", "images.npy"}),
    ("latents", {"manifest.json", "moments.npy"}),
    ("samples", {"samples.npz", "samples.png"}),
    ("reconstructions", {"reconstructions.npz", "reconstructions.png"}),
    ("reconstructions", {"reconstruction.png", "reconstruction-error.png"}),
    ("a comparison", {"compare.jsonl", "compare-cells"}),
    ("a comparison", {"classifier-guidance.jsonl", "classifier-guidance-cells"}),
)
MARKS = frozenset().union(*(files for _, files in OURS))
QUIET = frozenset(["__macosx", "thumbs.db", "desktop.ini"])  # in every second folder: not told
SHOWN = 5  # names of a list that is printed
LONG = re.compile(r"(.{140}).{20,}(.{50})", re.DOTALL)  # a name that no disk takes; a zip may
ODD = re.compile(r"\\|//|\./|:/|^[./]|[./]$|^$")  # in names that are yet to be resolved
ENCRYPTED, UTF8 = 0x1, 0x800  # bits of a zip entry's flags


@dataclass(frozen=True)
class Listing:
    """images: {name: the name to open it by}, in the order of their folders' and their own names.

    others: the same of other files. folders: every folder, with '/' at its end, but those of which
    nothing is listed because it is left out. left_out: what is said of that.
    """

    images: dict[str, str]
    others: dict[str, str]
    folders: frozenset[str]
    left_out: str = ""


def is_image(name):
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def _is_left_behind(name):
    return name.lower() in LEFT_BEHIND


def ours(names):
    """What of OURS a folder is that holds this set of names, or ''."""
    return next((kind for kind, files in OURS if files <= names), "")


def shortened(words):
    """The first names of a list, those that are endless without their middle."""
    shown = [LONG.sub(r"\1...\2", word) for word in words[:SHOWN]]
    return ", ".join(shown) + ", ..." * (len(words) > SHOWN)


def told_of(left_out):
    """What is said of names [(path, what of OURS it is, or '')] that are not listed."""
    mine = [f"{path}/ ({kind})" for path, kind in left_out if kind]
    counts = Counter(path.rpartition("/")[2] for path, kind in left_out if not kind)
    counts = {name: count for name, count in counts.items() if name.lower() not in QUIET}
    said = []
    if mine:
        folders = "1 folder" if len(mine) == 1 else f"{len(mine)} folders"
        said.append(f"{folders} of this program: {shortened(mine)}")
    said += [f"{count} named {name}" for name, count in sorted(counts.items())]
    return "left out: " + ", ".join(said) if said else ""


def walk(folder, prefix="", every=False, links=(), left_out=None):
    """(path below folder, size, mtime) of every image file, sorted, without what is not listed.

    every: of all other files and of folders, with '/' at their end, too, but without their sizes.
    left_out: a list that gets (path, what of OURS it is) of what is passed over.
    This runs at every load(): system calls are one scandir a folder and one stat an image.
    """
    with os.scandir(folder) as entries:
        entries = sorted(entries, key=lambda entry: entry.name)
    left_out = [] if left_out is None else left_out
    if prefix and (kind := ours({entry.name for entry in entries})):
        left_out.append((prefix[:-1], kind))
        return
    if prefix and every:
        yield prefix, 0, 0
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if _is_left_behind(entry.name):
            left_out.append((f"{prefix}{entry.name}", ""))
        elif entry.is_dir():
            below = links
            if entry.is_symlink():
                target = Path(entry.path).resolve()
                around = Path(folder).resolve()
                if target in (around, *around.parents, *links):
                    continue  # an endless walk
                below = (*links, around, target)
            yield from walk(entry.path, f"{prefix}{entry.name}/", every, below, left_out)
        elif is_image(entry.name):
            stat = entry.stat()
            yield f"{prefix}{entry.name}", stat.st_size, stat.st_mtime_ns
        elif every:
            yield f"{prefix}{entry.name}", 0, 0


def files(folder, every=False, left_out=None):
    """walk() as a list; BadInput for what cannot be read, such as a link that leads nowhere."""
    try:
        return list(walk(folder, every=every, left_out=left_out))
    except OSError as error:
        raise BadInput(
            f"{error.filename} cannot be read ({error.strerror}); repair or remove it"
        ) from None


def listing(path):
    """The Listing of a folder or a zip. Nothing is unpacked.

    BadInput for what cannot be read, a zip that is encrypted or packed in a way that Python cannot
    undo, names that lead out of the zip, and two images of one name.
    """
    left_out = []
    if Path(path).is_dir():
        names = [(name, name) for name, _, _ in files(path, every=True, left_out=left_out)]
    else:
        names = _zip_names(path)
    named = [(_plain(path, text), text[-1:] in ("/", "\\"), stored) for text, stored in names]
    kinds = _kinds(name for name, *_ in named)
    images, others, folders = {}, {}, set()
    fates, entered = {}, set()  # of folders, each looked at once
    for name, is_folder, stored in named:
        parent, _, last = name.rpartition("/")
        if parent not in fates:
            parts = parent.split("/")
            is_hidden = any(part.startswith(".") for part in parts)
            fates[parent] = is_hidden, _left_out(parts, kinds)
        is_hidden, skipped = fates[parent]
        if not name or is_hidden or last.startswith("."):
            continue
        if not skipped and (_is_left_behind(last) or name in kinds):
            skipped = name, kinds.get(name, "")
        if skipped:
            left_out.append(skipped)
            continue
        for folder in (parent, name) if is_folder else (parent,):
            if folder and folder not in entered:
                entered.add(folder)
                parts = folder.split("/")
                folders.update("/".join(parts[:i]) + "/" for i in range(1, len(parts) + 1))
        if is_folder:
            continue
        if not is_image(name):
            others[name] = stored
        elif name in images:
            raise BadInput(f"{path} holds {name} twice; remove one of them")
        else:
            images[name] = stored
    ordered = sorted(images, key=lambda name: name.split("/"))  # as walk() goes
    left_out = sorted(set(left_out))
    # A folder runs/ that holds runs/a/ alone is no class without images.
    folders -= _around(name for name, _ in left_out) - _around((*images, *others))
    images = {name: images[name] for name in ordered}
    return Listing(images, others, frozenset(folders), told_of(left_out))


def _around(names):
    """The folders that these names are in, each with '/' at its end."""
    parents = {name.rpartition("/")[0] for name in names} - {""}
    return {f"{name}/" for name in parents} | (_around(parents) if parents else set())


def _kinds(names):
    """{folder: what of OURS it is} of the folders of a zip; walk() has none left."""
    inside, folders = {}, set()
    for name in names:
        parent, _, last = name.rpartition("/")
        folders.add(parent)
        if parent and last in MARKS:
            inside.setdefault(parent, set()).add(last)
    for folder in folders:
        parts = folder.split("/")
        for i in range(1, len(parts)):
            if parts[i] in MARKS:
                inside.setdefault("/".join(parts[:i]), set()).add(parts[i])
    return {folder: kind for folder, held in inside.items() if (kind := ours(held))}


def _left_out(parts, kinds):
    """(path, what of OURS it is) of the first of a name's parts that is not listed, or None."""
    for i, part in enumerate(parts):
        path = "/".join(parts[: i + 1])
        if _is_left_behind(part) or path in kinds:
            return path, kinds.get(path, "")
    return None


def _plain(path, text):
    """A name with '/' between its folders, and none at its end; BadInput if it leads out."""
    if text.isascii() and not ODD.search(text):
        return text
    text = text.replace("\\", "/")
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
        text = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    parts = []
    for part in text.split("/"):
        if part == ".." and parts:
            parts.pop()
        elif part not in ("", "."):
            parts.append(part)
    if ".." in parts or text.startswith("/") or re.match("[A-Za-z]:/", text):
        raise BadInput(f"{path} holds the name {text}, which leads out of it; pack it anew")
    return "/".join(parts)


def _zip_names(path):
    """[(name, the name to open it by)] of a zip's entries."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            for entry in entries:
                if entry.flag_bits & ENCRYPTED:
                    raise BadInput(f"{path} is encrypted; unpack it and name the folder")
            for one_of_its_kind in {entry.compress_type: entry for entry in entries}.values():
                archive.open(one_of_its_kind).close()
    except (OSError, zipfile.BadZipFile, UnicodeDecodeError) as error:
        raise BadInput(f"{path} is not a readable zip ({error})") from None
    except RuntimeError as error:  # also for a way of packing that zipfile has not
        raise BadInput(f"{path}: {error}; unpack it and name the folder") from None
    return [(_as_utf8(entry), entry.filename) for entry in entries]


def _as_utf8(entry):
    """The name of a zip's entry; macOS writes UTF-8 without the bit that says so."""
    if entry.flag_bits & UTF8 or entry.filename.isascii():
        return entry.filename
    try:
        return entry.filename.encode("cp437").decode()
    except UnicodeError:
        return entry.filename
