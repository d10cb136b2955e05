"""What a file of weights holds: a network's tensors among what others keep beside and around them.

    {"model": ..., "ema": ..., "optimizer": ...}     entries; the running mean is taken
    module.conv_in.weight, _orig_mod.conv_in.weight  prefixes of all names, which are dropped
    {"ema": {"shadow_params": [...]}, "model": ...}  means without names: the model has their order

network() finds the tensors and says in a few words what it took and left. A reader tells it by
`marks` what it looks for: full names of tensors of which each network that it reads has one. Names
that lead to a mark are never taken for a prefix.
"""

from runtime.checkpoints import held
from runtime.commandline import BadInput

import re
from collections import OrderedDict
from typing import NamedTuple

import torch

# Parts of names that say: a running mean, and what runs beside one.
MEAN = re.compile(r"(?<![A-Za-z])(?:ema|swa|averaged?|shadow)(?![a-z])|(?<!SCH)E(?:MA|ma)(?![a-z])")
LEARNS = re.compile(r"online|student")
# That it is none, whatever else the name says: non_ema, no-EMA, WithoutEma, raw.
NO_MEAN = re.compile(
    r"(?<![a-z])(?:non?|not|without|pre)[-_ ]?ema(?![a-z])|(?<![a-z])raw(?![a-z])", re.IGNORECASE
)
# What wrappers around a part of a network add in the middle of its names.
AROUND = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# Numbers that lie among the tensors of a running mean.
COUNTS = "initted step steps global_step epoch decay n_averaged num_updates optimization_step"
COUNTS = frozenset(COUNTS.split())
DEEPEST = 5  # entries within entries


class Inert:
    """What stands for an object of another package in a file: it keeps nothing and does nothing."""

    def __new__(cls, *args):
        return super().__new__(cls)

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        pass


class Entries:
    """The same for a dictionary of another package: what it holds is kept, without its class."""

    def __new__(cls, *args):
        return OrderedDict()


# What training scripts keep beside the weights, by module: their flags, numpy's numbers, and
# PyTorch Lightning's callback, the key of its own state. None of these names is ever looked up.
OBJECTS = {
    "argparse": "Namespace",
    "builtins": "bool dict float int list str tuple",
    "datetime": "datetime timedelta",
    "ml_collections.config_dict.config_dict": "ConfigDict",
    "numpy": "dtype ndarray",
    "numpy.core.multiarray": "scalar _reconstruct",
    "numpy._core.multiarray": "scalar _reconstruct",  # as numpy 2 writes them
    "omegaconf.base": "ContainerMetadata Metadata",
    "omegaconf.dictconfig": "DictConfig",
    "omegaconf.listconfig": "ListConfig",
    "omegaconf.nodes": "AnyNode BooleanNode FloatNode IntegerNode StringNode",
    "pathlib": "Path PosixPath PurePosixPath WindowsPath",
    "pathlib._local": "PosixPath",  # as Python 3.13 writes it
    "pytorch_lightning.callbacks.model_checkpoint": "ModelCheckpoint",
    "torch.torch_version": "TorchVersion",
    "types": "SimpleNamespace",
    "typing": "Any",
}
DICTIONARIES = {
    "collections": "defaultdict",
    "dnnlib.util": "EasyDict",
    "easydict": "EasyDict",
    "lightning.fabric.utilities.data": "AttributeDict",
    "lightning_fabric.utilities.data": "AttributeDict",
    "pytorch_lightning.utilities.parsing": "AttributeDict",
}
BESIDE = [
    (kind, f"{module}.{name}")
    for kind, table in ((Inert, OBJECTS), (Entries, DICTIONARIES))
    for module, names in table.items()
    for name in names.split()
]


class Place(int):
    """A place in a list, as it is shown."""

    def __str__(self):
        return f"[{int(self)}]"


class Found(NamedTuple):
    """Tensors that may be the network's."""

    entry: tuple  # keys that lead to the dictionary which they lie in
    prefix: str  # of all their names there
    tensors: dict
    named_by: str = ""  # the entry that their names are of, if they have none
    place: int = 0  # in a list

    @property
    def label(self):
        return ".".join(map(str, self.entry))

    @property
    def rank(self):
        return rank_of(f"{self.label}.{self.prefix}")


def rank_of(name):
    """Of several weights the least is taken: 0 of a running mean, 2 of what is said to be none."""
    if NO_MEAN.search(name):
        return 2
    return 0 if MEAN.search(name) and not LEARNS.search(name) else 1


def network(content, marks, path):
    """({name: tensor}, words): the network that lies in what a file at `path` holds.

    marks   names of tensors, each network that is looked for has one of them; where there are none,
            or no tensor has such a name, the largest dictionary of tensors is taken as it is
    words   what was taken and left, "" where the file holds nothing else

    Of several, a running mean is taken, and only after all others what is said to be none; of these
    the last of a list, then the largest. BadInput, naming the path, for a checkpoint of this
    project, for running means whose names are not known, for a network that lies among other
    tensors, and where there are none.
    """
    if script := own_script(content):
        raise BadInput(
            f"{path} is a checkpoint of {script}.py, trained here: expected published weights"
        )
    if isinstance(content, dict) and content.keys() >= {"state", "param_groups"}:
        raise BadInput(f"{path} holds {held(content)}")
    dictionaries, lists = list(walk(content)), list(nameless(content))
    found = [part for entry, inner in dictionaries for part in parts(entry, inner, marks)]
    found += [named for entry, means in lists for named in named_like(entry, means, found)]
    if not found and marks:
        check_alone(dictionaries, marks, path)
        plain = [part for entry, inner in dictionaries for part in parts(entry, inner, ())]
        if plain:  # the reader will say what it misses
            return max(plain, key=lambda part: len(part.tensors)).tensors, ""
    if not found:
        if isinstance(content, dict) and not content:
            return {}, ""
        if lists:
            entry, means = lists[0]
            raise BadInput(
                f"{path} holds {len(means)} tensors without names"
                f"{' in ' + '.'.join(map(str, entry)) if entry else ''}, running means such as "
                "torch_ema keeps: copy them into the network, and type "
                "torch.save(net.state_dict(), 'mean.pt')"
            )
        raise BadInput(f"{path} is not a state_dict: expected names and tensors")
    best = min(found, key=lambda part: (part.rank, -part.place, -len(part.tensors)))
    return best.tensors, words_of(best, content, found)


def own_script(content):
    """Stem of the script of this project that wrote a file's content, or None."""
    own = isinstance(content, dict) and isinstance(content.get("config", {}), dict)
    script = content.get("script") if own else None
    return script if isinstance(script, str) and re.fullmatch(r"[a-z_]\w*", script) else None


def holds(content, marks):
    """Whether a network with one of these marks lies in the content of a file of others.

    Or a running mean without names, which may be one.
    """
    if own_script(content):
        return False
    if any(nameless(content)):
        return True
    names = [AROUND.sub("", name) for _, inner in walk(content) for name in tensors_of(inner)]
    return any(name == mark or name.endswith(f".{mark}") for name in names for mark in marks)


# ------------------------------------------------------------------------------------- candidates


def walk(content, entry=(), seen=None):
    """(keys that lead to it, dictionary) of every dictionary with string keys, each once."""
    seen = set() if seen is None else seen
    if id(content) in seen or len(entry) > DEEPEST:
        return
    if isinstance(content, dict):
        seen.add(id(content))
        yield entry, content
        for key, value in content.items():
            if isinstance(value, dict | list | tuple) and isinstance(key, str | int | float):
                yield from walk(value, (*entry, key), seen)
    elif isinstance(content, list | tuple) and not any(map(torch.is_tensor, content)):
        seen.add(id(content))
        for i, value in enumerate(content):
            yield from walk(value, (*entry, Place(i)), seen)


def nameless(content):
    """(keys, list) of every list of tensors that may be running means: alone, or by its key."""
    if is_list_of_tensors(content):
        yield (), content
    for entry, inner in walk(content):
        for key, value in inner.items():
            whole = (*entry, key)
            if is_list_of_tensors(value) and rank_of(".".join(map(str, whole))) == 0:
                yield whole, value


def is_list_of_tensors(value):
    return isinstance(value, list | tuple) and len(value) > 1 and all(map(torch.is_tensor, value))


def tensors_of(inner):
    return {k: v for k, v in inner.items() if isinstance(k, str) and isinstance(v, torch.Tensor)}


def parts(entry, inner, marks):
    """Each Found in a dictionary: the tensors with a mark, by their prefixes."""
    tensors = {AROUND.sub("", name): value for name, value in tensors_of(inner).items()}
    kept = {name: value for name, value in tensors.items() if not is_count(name, value)}
    place = next((key for key in entry if isinstance(key, Place)), 0)
    if not marks or any(mark in kept for mark in marks):
        return [Found(entry, "", kept, place=place)] if kept else []
    starts = prefixes(kept, marks)
    if any(not name.startswith(starts) for name in kept):
        return []
    found = [{k.removeprefix(p): v for k, v in kept.items() if k.startswith(p)} for p in starts]
    if any(part.keys() != found[0].keys() for part in found):
        return []
    return [Found(entry, *pair, place=place) for pair in zip(starts, found, strict=True)]


def prefixes(names, marks):
    """What stands before a mark in any of these names, a tuple; none begins with another."""
    found = []
    for name in names:
        ends = [mark for mark in marks if name.endswith(f".{mark}")]
        if ends:
            found.append(name[: -len(max(ends, key=len))])
    shortest = sorted(set(found), key=len)
    return tuple(p for i, p in enumerate(shortest) if not p.startswith(tuple(shortest[:i])))


def is_count(name, value):
    return value.numel() == 1 and name.rpartition(".")[2] in COUNTS


def named_like(entry, means, found):
    """The list `means` of tensors, if one of the Found has as many of the same shapes, in order."""
    shapes = [value.shape for value in means]
    for part in found:
        if shapes == [value.shape for value in part.tensors.values()]:
            tensors = dict(zip(part.tensors, means, strict=True))
            return [Found(entry, "", tensors, named_by=f"{part.label}.{part.prefix}".strip("."))]
    return []


def check_alone(dictionaries, marks, path):
    """BadInput where names lead to a mark, but other tensors lie beside the network's."""
    for _, inner in dictionaries:
        tensors = {AROUND.sub("", name): value for name, value in tensors_of(inner).items()}
        starts = prefixes(tensors, marks)
        others = [k for k, v in tensors.items() if not k.startswith(starts) and not is_count(k, v)]
        if starts and others:
            raise BadInput(
                f"{path}: the network's names begin with {starts[0]!r}, but beside it lie "
                f"{listed(others)}: it is part of something else; expected its tensors alone"
            )
        if len(starts) > 1:
            raise BadInput(
                f"{path} holds several networks of this kind with different tensors, "
                f"{listed(starts)}: save the tensors of one"
            )


# ------------------------------------------------------------------------------------------ words


def words_of(best, content, found):
    """What was taken and what was left, in a few words; "" where nothing was left."""
    said, left, inner = [], [], content
    if best.entry:
        said.append(f"takes {best.label!r}")
    if best.named_by:
        said.append(f"named in the order of {best.named_by!r}")
    for depth, key in enumerate(best.entry):
        keys = inner if isinstance(inner, dict) else map(Place, range(len(inner)))
        left += [".".join(map(str, (*best.entry[:depth], k))) for k in keys if k != key]
        inner = inner[key]
    if isinstance(inner, dict):
        kept = tensors_of(inner)
        left += [str(k) for k in inner if k not in kept or is_count(k, kept[k])]
        if start := before(kept, best):
            said.append(f"drops {start!r} from the names")
    left += [part.prefix for part in found if part.entry == best.entry and part is not best]
    if left:
        said.append(f"leaves out {listed(left)}")
    if best.rank == 2:
        said.append("these are no running means")
    several = sum(part.rank == 0 for part in found) > 1
    hint = "; of several running means save the one you want in a file of its own"
    return ", ".join(said) + hint * several


def before(names, found):
    """What stands before the first name of a file that Found has without it, "" where none is."""
    for name in names:
        inner = AROUND.sub("", name).removeprefix(found.prefix)
        if name != inner and inner in found.tensors:
            whole = name.endswith(inner)
            return name.removesuffix(inner) if whole else found.prefix + AROUND.search(name)[0]
    return ""


def listed(names, n=4):
    """The first n names, each on one line and short, and how many more there are."""
    shown = [repr(name if len(name) <= 60 else f"{name[:57]}...") for name in names[:n]]
    more = f" and {len(names) - n} more" if len(names) > n else ""
    return ", ".join(shown) + more
