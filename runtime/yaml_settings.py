"""Settings in a YAML file, as the fields of a dataclass; a text stays as it is written."""

from runtime.commandline import BadInput, closest, flag

import dataclasses
import os
from pathlib import Path
from typing import Annotated, get_args, get_origin

import yaml

KINDS = {str: "text", bool: "true or false", int: "a whole number", float: "a number", ...: "..."}


def yaml_settings(path, config_class):
    """{name: value} of this file, if any; texts are as they are written there."""
    if not path:
        return {}
    path = Path(os.path.expanduser(path))
    if not path.is_file():
        raise BadInput(f"--config {path}: no such file; configs/ holds examples")
    try:
        loader = yaml.SafeLoader(text := path.read_text("utf-8-sig"))
        root = loader.get_single_node() or yaml.MappingNode("", [])
        if not isinstance(root, yaml.MappingNode):
            raise BadInput(f"--config {path}: expected lines of 'key: value'")
        loader.flatten_mapping(root)  # << takes in another mapping
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadInput(f"--config {path} is not YAML: {' '.join(str(error).split())}") from None
    kinds = {f.name: f.type for f in dataclasses.fields(config_class) if f.name != "config"}
    settings = {}
    for key, node in [(str(key.value), node) for key, node in root.value]:
        if key not in kinds or get_origin(kinds[key]) is Annotated:  # that one has no flag
            raise BadInput(f"--config {path}: unknown key {key!r}{closest(key, kinds)}")
        nodes = node.value if isinstance(node, yaml.SequenceNode) else [node]
        if any(part.tag == "tag:yaml.org,2002:null" for part in nodes):
            raise BadInput(f"--config {path}: {key} has no value; type '' for an empty one")
        try:
            settings[key] = _of_nodes(kinds[key], nodes, loader)
        except (ValueError, yaml.YAMLError):
            written = " ".join(text[node.start_mark.index : node.end_mark.index].split())
            parts = [KINDS.get(part, part) for part in get_args(kinds[key]) or (kinds[key],)]
            wrong = f"{key} is {written[:60]}; {flag(key)} takes {', '.join(parts)}"
            raise BadInput(f"--config {path}: {wrong}") from None
    return settings


def _of_nodes(kind, nodes, loader):
    """The value of this type that YAML's scalars say; ValueError or YAMLError if they say none."""
    parts = get_args(kind)
    if get_origin(kind) is tuple:
        kinds = parts[:1] * len(nodes) if parts[-1] is ... else parts
        return tuple(_of_nodes(k, [n], loader) for k, n in zip(kinds, nodes, strict=True))
    for node in nodes:  # a tag that is spelled out might change what is written
        tag = loader.resolve(yaml.ScalarNode, str(node.value), (True, False))
        same = node.tag in (tag, loader.DEFAULT_SCALAR_TAG)
        if not (same and isinstance(node, yaml.ScalarNode)):
            raise ValueError
    written = ",".join(node.value for node in nodes)
    if kind is str or written in parts:  # parts: of a choice
        return written
    [node] = nodes
    value = loader.construct_object(node)  # by the rules of YAML 1.1: 1_000, .inf, yes
    if parts or isinstance(value, bool) is not (kind is bool):
        raise ValueError
    return value if kind is bool else kind(str(value))  # YAML takes 1e-3 for a text
