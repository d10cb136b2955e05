"""Settings in a YAML file, as the fields of a dataclass; a text stays as it is written."""

from runtime.commandline import BadInput, flag
from runtime.files import read_text
from runtime.typed_flags import MOST, beyond, closest, placed

import dataclasses
import os
import re
from collections import Counter
from pathlib import Path
from typing import get_args, get_origin

import yaml

KINDS = {str: "text", bool: "true or false", int: "a whole number", float: "a number", ...: "..."}
LISTS = frozenset(
    {"classes", "seeds", "interpolate", "timestep_respacing"}
)  # texts that commas part
MOST_LINES = 10_000  # of settings, << included
MERGE = "tag:yaml.org,2002:merge"  # of the key <<


def yaml_settings(path, config_class):
    """{name: value} of this file, if any; texts are as they are written there."""
    if not path:
        return {}
    path = Path(os.path.expanduser(path))
    text = _text(path)
    loader, pairs = _pairs(path, text)
    others = {"config", *placed(config_class)}
    kinds = {f.name: f.type for f in dataclasses.fields(config_class) if f.name not in others}
    defaults = {f.name: f.default for f in dataclasses.fields(config_class)}
    settings = {}
    for key, node in pairs:
        if key not in kinds:
            raise BadInput(f"--config {path}: unknown key {key!r}{closest(key, kinds)}")
        nodes = node.value if isinstance(node, yaml.SequenceNode) else [node]
        if any(part.tag == "tag:yaml.org,2002:null" for part in nodes):
            raise BadInput(f"--config {path}: {key} has no value; type '' for an empty one")
        written = " ".join(text[node.start_mark.index : node.end_mark.index].split())
        try:
            settings[key] = _of_nodes(kinds[key], nodes, loader)
            more = _unfit(settings[key], node, defaults[key], key)
        except (ValueError, yaml.YAMLError):
            more = ", without a zero in front" * bool(re.match("[+-]?0[0-9_]", written))
        if more is not None:
            wrong = f"{key} is {written[:60]}; {flag(key)} takes {_takes(kinds[key])}{more}"
            raise BadInput(f"--config {path}: {wrong}")
    return settings


def _unfit(value, node, default, key):
    """What a setting takes besides its type, where this value of a node is another; else None."""
    if value != default and beyond(value):
        return f", finite and below {MOST:.1g}"
    if not (isinstance(value, str) and isinstance(node, yaml.SequenceNode)):
        return None
    if key in LISTS or "," in str(default):
        parted = any("," in part.value for part in node.value)
        return ", parted at every comma: type numbers for names that hold one" if parted else None
    return ", not a list" if len(node.value) != 1 else None


def _text(path):
    """What the file says, decoded; BadInput where it cannot be read."""
    if not path.is_file():
        wrong = "is a folder" if path.is_dir() else "no such file"
        raise BadInput(f"--config {path}: {wrong}; configs/ holds examples")
    return read_text(path, "--config")


def _pairs(path, text):
    """(loader, [(key, node)]) of YAML; what << takes in stands first. BadInput for a key twice."""
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node() or yaml.MappingNode("", [])
        if not isinstance(root, yaml.MappingNode):
            raise BadInput(f"--config {path}: expected lines of 'key: value'")
        own = sum(key.tag != MERGE for key, _ in root.value)
        if _merged(root, {}) > MOST_LINES:
            raise BadInput(f"--config {path}: << takes in too much; write the lines themselves")
        loader.flatten_mapping(root)
    except yaml.YAMLError as error:
        raise BadInput(f"--config {path} is not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise BadInput(f"--config {path} holds too many lists in each other") from None
    if not all(isinstance(key, yaml.ScalarNode) for key, _ in root.value):
        raise BadInput(f"--config {path}: expected lines of 'key: value'")
    pairs = [(key.value, node) for key, node in root.value]
    taken_in = len(pairs) - own  # the file's own lines may set anew what they set
    for part in (pairs[:taken_in], pairs[taken_in:]):
        if twice := [key for key, times in Counter(key for key, _ in part).items() if times > 1]:
            raise BadInput(f"--config {path}: {twice[0]} is set twice; keep one of the lines")
    return loader, pairs


def _merged(node, known):
    """How many pairs a node has once << is done, which doubles them with every alias of aliases."""
    if id(node) not in known:
        known[id(node)] = 0  # of one that takes in itself
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        parts = [value for key, value in pairs if key.tag == MERGE]
        parts = node.value if isinstance(node, yaml.SequenceNode) else parts
        known[id(node)] = len(pairs) + sum(_merged(part, known) for part in parts)
    return known[id(node)]


def _takes(kind):
    """What a setting of this type takes, in words; several in YAML's brackets."""
    words = ", ".join(KINDS.get(part, part) for part in get_args(kind) or (kind,))
    return f"[{words}]" if get_origin(kind) is tuple else words


def _of_nodes(kind, nodes, loader):
    """The value of this type that YAML's scalars say; ValueError or YAMLError if they say none."""
    parts = get_args(kind)
    if get_origin(kind) is tuple:
        kinds = parts[:1] * len(nodes) if parts[-1] is ... else parts
        return tuple(_of_nodes(k, [n], loader) for k, n in zip(kinds, nodes, strict=True))
    for node in nodes:  # a tag that is spelled out might change what is written
        if not isinstance(node, yaml.ScalarNode):
            raise ValueError
        tag = loader.resolve(yaml.ScalarNode, node.value, (True, False))
        if node.tag not in (tag, loader.DEFAULT_SCALAR_TAG):
            raise ValueError
    written = ",".join(node.value for node in nodes)
    if kind is str or written in parts:  # parts: of a choice
        return written
    [node] = nodes
    if re.match("[+-]?0[0-9_]", written) or ":" in written:
        raise ValueError  # 010 is 8 to YAML 1.1 and 10 to 1.2; 1:30 is 90 to 1.1, to 1.2 a text
    value = loader.construct_object(node)  # by the rules of YAML 1.1: 1_000, .inf, yes
    if parts or isinstance(value, bool) is not (kind is bool):
        raise ValueError
    return value if kind is bool else kind(str(value))  # YAML takes 1e-3 for a text
