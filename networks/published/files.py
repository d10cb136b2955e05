"""The files of published networks: where they lie, weights, and settings in JSON."""

from runtime.checkpoints import check_expanded, check_sums, load_mapped
from runtime.commandline import BadInput
from runtime.files import atomic_write, check_file
from runtime.processes import say_once

import itertools
import json
import pickle
import re
import zipfile
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from networks.published.contents import BESIDE, holds, listed, network, rank_of

WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
# What a file of weights in a folder of diffusers or transformers is called, and the index of parts:
# NAME[.VARIANT].safetensors, with an index NAME.safetensors.index[.VARIANT].json or older ones.
KINDS = ("safetensors", "bin")
VARIANT = r"(?:\.(?!safetensors|bin|index|json)(\w+(?:-[A-Za-z]\w*)?))?"
WHOLE = rf"{VARIANT}\.(safetensors|bin)"
INDEX = rf"{VARIANT}\.(safetensors|bin){VARIANT}\.index{VARIANT}\.json"
PART_OF = re.compile(r"-\d{5}-of-(?!00001)\d{5}\.")
FILE = r"(?!\.*$)[^/\\\0]{1,200}"  # a name without folders
# The best of several variants, others follow; a running mean is before all, what is none after.
VARIANTS = ("", "fp32", "fp16", "bf16")
U_NET = ("input_blocks.0.0.weight", "time_embedding.linear_1.weight")  # marks of a U-Net's tensors
# In which weights are numbers themselves. Others are codes, of quantised networks, whose scales lie
# elsewhere.
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FLOATS += (torch.float8_e4m3fn, torch.float8_e5m2)
PART = 2**25  # bytes of a file of weights that are mapped together; each map is an open file


def find_files(path):
    """(weights, config.json or None, scheduler_config.json or None) of what the user named.

    The weights are a file, or the index of several.
    """
    if path.is_file():
        config = path.with_name("config.json")
        return path, config if config.exists() else None, None
    net = folder_of(path, "unet_ema", "unet")
    weights = find_weights(net)
    # Pipelines saved before 2023 keep the scheduler's settings beside the network's.
    schedulers = [path / "scheduler" / "scheduler_config.json", path / "scheduler_config.json"]
    scheduler = next((file for file in schedulers if file.is_file()), None)
    return weights, net / "config.json" if (net / "config.json").exists() else None, scheduler


def folder_of(path, *names):
    """The first of the folders `names` in a pipeline's folder, or the folder itself.

    BadInput where there is none, and for the folder that a cache of the Hub keeps its copies in.
    """
    if not path.is_dir():
        raise BadInput(f"{path}: no such file or folder")
    copies = path / "snapshots"
    if copies.is_dir():
        found = " or ".join(str(copy) for copy in sorted(copies.iterdir())[:3])
        raise BadInput(f"{path} is a cache of the Hub: name the copy in it, {found or copies}")
    found = [path / name for name in names if (path / name).is_dir()]
    if len(found) > 1:
        say(f"{path}: takes {found[0].name}/, leaves out {found[1].name}/")
    return found[0] if found else path


def find_weights(folder):
    """The file of weights in a folder of diffusers, or their index; BadInput where there is none.

    As diffusers does, an index is taken before a whole file, and .safetensors before .bin.
    """
    found = weights_in(folder, "diffusion_pytorch_model", index_first=True)
    if found is None:
        raise BadInput(f"{folder} holds no weights: expected {' or '.join(WEIGHTS)} in it")
    return found


def weights_in(folder, names, index_first):
    """The best file of weights in a folder, an index or a whole one; None where there is none.

    names: what it is called before its suffix, a regular expression. A printed line says which one
    was taken where several lie there. BadInput for parts without an index.
    """
    files, found = sorted(file.name for file in folder.iterdir() if file.is_file()), []
    for pattern, is_index in ((WHOLE, False), (INDEX, True)):
        for match in filter(None, (re.fullmatch(f"(?:{names}){pattern}", name) for name in files)):
            variant = next((part for part in match.groups() if part and part not in KINDS), "")
            place = VARIANTS.index(variant) if variant in VARIANTS else len(VARIANTS)
            rank = rank_of(variant)
            kind = KINDS.index(next(part for part in match.groups() if part in KINDS))
            found.append((rank, place, kind, is_index != index_first, match[0]))
    if not found:
        if parts := [name for name in files if PART_OF.search(name)]:
            raise BadInput(f"{folder} holds {parts[0]}, one of several parts, but no index of them")
        return None
    (rank, *_, best), *others = sorted(found)
    said = [f"leaves out {listed([name for *_, name in others])}"] if others else []
    said += ["these are no running means"] if rank == 2 else []
    if said:
        say(f"{folder}: takes {best!r}, {', '.join(said)}")
    return folder / best


def say(line):
    """Print a line once, but not where only a plan is made."""
    if not is_planned():
        say_once(line)


def is_planned():
    """Whether nothing is computed now, only a plan made: tensors have no memory."""
    return torch.get_default_device().type == "meta"


def read_weights(path, marks=()):
    """The state_dict in a file, or in the parts of an index: {name: tensor}, on the CPU.

    path    .safetensors, also in another name; what torch.save wrote, in any name but this; or an
            index of such parts, ... .index.json, which lie beside it
    marks   what the reader looks for: names of tensors, each of its networks has one of them

    Where the network's tensors lie within others or all their names have one beginning that it does
    not have, as contents.network finds it, a printed line says what was taken and left.

    Tensors are mapped: of a checkpoint of gigabytes only what is used is read, and of none but
    names and shapes within `torch.device("meta")`, where a plan is made. Nothing in a file is
    ever executed: what BESIDE names becomes Inert. BadInput, naming the file, where it is missing,
    torn, or holds anything else.
    """
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"{path}: no such file or folder")
    if path.name.endswith(".json"):
        content = read_parts(path)
    elif PART_OF.search(path.name):
        raise BadInput(f"{path} is one part of several: name their folder, or their .index.json")
    else:
        content = read_content(path)
    state, words = network(content, marks, path)
    for name, value in state.items():
        if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
            kind = f"{value.dtype}, {value.layout}, {value.device}"
            raise BadInput(f"{path}: {name} is no plain tensor of numbers: it is {kind}")
    if words:
        say(f"{path}: {words}")
    where = torch.get_default_device()
    return {name: value.detach().to(where) for name, value in state.items()}


def read_parts(index):
    """The tensors of all files that an index names, by name.

    BadInput for an index that is none, and for parts that are missing, lie in other folders, or do
    not hold what the index places in them.
    """
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise BadInput(f"{index} has no weight_map: expected the file of each tensor by its name")
    for file in places.values():
        if not isinstance(file, str) or not re.fullmatch(FILE, file):
            named = listed([str(file)])
            raise BadInput(f"{index} names the file {named}: expected one in the same folder")
    state, files = {}, sorted(set(places.values()))
    missing = [file for file in files if not index.with_name(file).is_file()]
    if missing:
        raise BadInput(f"{index}: {listed(missing)} of its {len(files)} files is not beside it")
    for file in files:
        part = read_content(index.with_name(file))
        if not isinstance(part, dict):
            raise BadInput(f"{index.with_name(file)} is not a state_dict")
        if lost := [name for name, place in places.items() if place == file and name not in part]:
            raise BadInput(f"{index} places {listed(lost)} in {file}, which does not hold it")
        state.update({k: v for k, v in part.items() if places.get(k, file) == file})
    return state


def read_content(path):
    """What a file holds: tensors by name of .safetensors, anything of torch.save."""
    head = _head(path)
    if told := failed_download(head):
        raise BadInput(f"{path} {told}")
    named, tensors_only = path.suffix == ".safetensors", _is_safetensors(head)
    if named and not tensors_only and head.startswith((b"PK\x03\x04", b"\x80\x02")):
        # torch.load goes by the name, too.
        raise BadInput(f"{path} is no safetensors file but one of torch.save: rename it to .ckpt")
    if told := _kind_of_zip(path):
        raise BadInput(f"{path} {told}")
    try:
        with torch.device("cpu"):
            if tensors_only or named:
                return load_parts(path)
            found = load_mapped(path, BESIDE)
        check_expanded(found, path)
        check_sums(path, tensors=not is_planned())
        return found
    except BadInput:
        raise
    except SafetensorError as error:
        raise BadInput(f"{path} is no safetensors file, or a torn one: {error}") from None
    except Exception as error:  # a torn pickle makes torch.load raise nearly anything
        raise BadInput(
            f"{path} is no file of plain tensors, or a torn one: {_reason(error)}; expected "
            ".safetensors, or a file saved without Python objects, as by "
            "torch.save(net.state_dict(), 'weights.pt')"
        ) from None


def _kind_of_zip(path):
    """What a zip is that torch.save did not write, with what to do, or None."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.rpartition("/")[2] for name in archive.namelist()]
    except Exception:  # no zip, or a torn one, which raises nearly anything: torch.load says so
        return None
    if "constants.pkl" in names:
        return (
            "is a TorchScript archive, which is a program: expected its weights alone; where it "
            "can be opened, type torch.save(torch.jit.load(FILE).state_dict(), 'weights.pt')"
        )
    if "data.pkl" not in names:
        return "is a zip of other files, not one of torch.save: unpack it, and name what is in it"
    return None


def load_parts(path):
    """The tensors of a .safetensors file, mapped in parts of about PART bytes.

    What was read of a map is memory of the process until the map ends, which a part does with the
    last of its tensors: a network is copied out of its file in little more than its own size.
    """
    whole = load_file(path)  # which checks the file, and reads only names, shapes and places
    state = {name: value.clone() for name, value in whole.items() if value.numel() == 0}
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(start - 8))
    places = {name: header[name]["data_offsets"] for name in whole.keys() - state.keys()}
    order = sorted(places, key=places.get)
    for _, names in itertools.groupby(order, key=lambda name: places[name][0] // PART):
        names = list(names)
        first, last = places[names[0]][0], places[names[-1]][1]
        part = np.memmap(path, np.uint8, "c", start + first, last - first)  # "c": never written
        for name in names:
            begin, end = places[name]
            numbers, dtype = torch.from_numpy(part[begin - first : end - first]), whole[name].dtype
            if (begin - first) % dtype.itemsize:  # others may write tensors where none can begin
                numbers = numbers.clone()
            state[name] = numbers.view(dtype).view(whole[name].shape)
    return {name: state[name] for name in whole}


def check_floats(state, path):
    """BadInput for a state_dict of quantised weights: as numbers they would draw something else."""
    for name, value in state.items():
        if value.dtype not in FLOATS:
            what = "complex" if value.is_complex() else "quantised"
            raise BadInput(
                f"{path} is {what}, {name} is {str(value.dtype).removeprefix('torch.')}: "
                "expected the weights in float16, bfloat16 or float32"
            )


def failed_download(head):
    """What a file with these first bytes is instead of weights, or None: text is no weights."""
    if head.startswith(b"version https://git-lfs"):
        return "is only a pointer of Git LFS: a failed download, fetch it again"
    if head and not re.search(rb"[^\t\n\r -~]", head[:64]):
        told = head[:20].decode()
        return f"is no file of plain tensors but text, {told!r}: a failed download, fetch it again"
    return None


def _head(path):
    try:
        with open(path, "rb") as file:
            return file.read(64)
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from None


def _is_safetensors(head):
    """Whether a file begins so: the length of a header, 8 bytes, and the header, which is JSON."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32


def _reason(error):
    """What torch.load found, as one line; the first line of its own says how to run the file."""
    told = str(error).partition("WeightsUnpickler error: ")[2].strip() or str(error).strip()
    return told.splitlines()[0].partition(". ")[0] if told else type(error).__name__


def read_json(path):
    check_file(path)
    try:
        value = json.loads(path.read_text())
    except (ValueError, OSError, RecursionError) as error:
        raise BadInput(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise BadInput(f"{path} must hold settings by name, got a {type(value).__name__}")
    return value


def whole_number(config, name, path, otherwise=None):
    """The setting `name` of a config.json at `path`, from 1 to 65536; `otherwise` without one."""
    value = config.get(name)
    if value is None:
        return otherwise
    if type(value) is not int or not 0 < value <= 2**16:
        raise BadInput(f"{path}: {name} {value!r} must be a whole number from 1 to {2**16}")
    return value


def texts(value, name, path):
    """The setting `name` of a config.json at `path`, a list of texts; an empty one for None."""
    if not isinstance(value or [], list | tuple) or not all(type(v) is str for v in value or ()):
        raise BadInput(f"{path}: {name} must be a list of texts, got {str(value)[:60]}")
    return [*(value or ())]


def write_json(path, value):
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


def is_published(path):
    """Whether `path` is for load_published, which reads it or says what it is instead.

    A folder, .safetensors, .bin, an index, and what torch.save wrote of a U-Net in the names of
    OpenAI's or of diffusers, alone or in a checkpoint of others. Also programs, whole objects and
    running means without names. Checkpoints of this project, other files, and damaged ones are not.
    """
    path = Path(path)
    if path.is_dir() or path.name.endswith((".safetensors", ".bin", ".index.json")):
        return True
    try:
        head = _head(path)
        if _is_safetensors(head) or failed_download(head) or _kind_of_zip(path):
            return True
        return holds(load_mapped(path, BESIDE), U_NET)
    except pickle.UnpicklingError as error:
        return "was not an allowed global" in str(error)  # objects, which ours do not hold
    except Exception:  # missing or damaged: what reads our own checkpoints says so
        return False
