"""Folders of diffusers and transformers: weights in parts, variants, and which file is taken."""

from runtime.commandline import BadInput

import json
import shutil
from pathlib import Path

import pytest
import torch
from reference_dit import opened
from reference_metrics import import_references
from safetensors.torch import load_file, save_file
from state_dicts import same
from vae_math import randomise

import dit
from networks.published import files
from networks.published.autoencoder import read_autoencoder
from networks.published.clip_text import read_clip_text
from networks.published.files import is_published, read_weights
from networks.published.sd_unet import load_latent_unet
from networks.published.stable_diffusion import read_pipeline
from networks.published.unet import load_published
from tests.cases.dit_of_diffusers import twin

INDEX = "diffusion_pytorch_model.safetensors.index.json"
MAPS = Path("/proc/self/maps")
WHOLE = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def unet():
    """diffusers' UNet2DModel, tiny."""
    import_references()
    from diffusers import UNet2DModel

    return randomise(
        UNet2DModel(
            sample_size=8,
            block_out_channels=(32, 32),
            layers_per_block=1,
            norm_num_groups=8,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )
    )


@pytest.fixture(scope="module")
def ours(unet, tmp_path_factory):
    """What is read of the network in one file."""
    folder = tmp_path_factory.mktemp("whole")
    unet.save_pretrained(folder)
    return load_published(folder)["state"]


@pytest.fixture
def parts(unet, tmp_path):
    """A folder in which diffusers has saved it in parts."""
    unet.save_pretrained(tmp_path / "net", max_shard_size="200KB")
    assert len(list((tmp_path / "net").glob("*-of-*.safetensors"))) > 2
    return tmp_path / "net"


def change_index(folder, change, name=INDEX):
    index = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(change(index) or index))


# ------------------------------------------------------------------------------------- every reader


def test_a_u_net_in_parts_is_the_one_in_a_file(parts, ours, capsys):
    assert same(load_published(parts)["state"], ours)
    assert same(load_published(parts / INDEX)["state"], ours)
    assert not capsys.readouterr().out
    assert is_published(parts) and is_published(parts / INDEX)
    with torch.device("meta"):
        assert all(value.is_meta for value in load_published(parts)["state"].values())


@pytest.mark.parametrize("variant", ["fp16", "bf16", "fp32", "ema_only"])
@pytest.mark.parametrize("size", ["200KB", "10GB"])
def test_each_variant_is_read_where_it_is_the_only_one(unet, ours, variant, size, tmp_path):
    unet.save_pretrained(tmp_path, variant=variant, max_shard_size=size)
    assert not (tmp_path / WHOLE).exists() and not (tmp_path / INDEX).exists()
    assert same(load_published(tmp_path)["state"], ours)


def test_half_precision_is_read_as_its_numbers(unet, ours, tmp_path):
    half = type(unet).from_config(unet.config)
    half.load_state_dict(unet.state_dict())
    half.half().save_pretrained(tmp_path, variant="fp16", max_shard_size="100KB")
    expected = {name: value.half().float() for name, value in ours.items()}
    assert same(load_published(tmp_path)["state"], expected)


def old_style(folder, kind, variant):
    """Parts as diffusers named them in 2024: the variant behind their number, or in the index."""
    state = load_file(folder / WHOLE)
    names, form = list(state), "diffusion_pytorch_model-{:05d}-of-00002." + f"{variant}.{kind}"
    halves = {form.format(1): names[::2], form.format(2): names[1::2]}
    for file, keys in halves.items():
        part = {key: state[key] for key in keys}
        save_file(part, folder / file) if kind != "bin" else torch.save(part, folder / file)
    places = {key: file for file, keys in halves.items() for key in keys}
    index = folder / f"diffusion_pytorch_model.{kind}.{variant}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / WHOLE).unlink()


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_older_names_of_parts_are_read(unet, ours, kind, tmp_path):
    unet.save_pretrained(tmp_path)
    old_style(tmp_path, kind, "fp16")
    assert same(load_published(tmp_path)["state"], ours)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_pipeline_in_parts_is_the_one_in_files(folder, variant, tmp_path, capsys):
    """U-Net, autoencoder and text encoder, as diffusers and transformers save them."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    copy = shutil.copytree(folder, tmp_path / "sd")
    kinds = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
    for name, kind in kinds.items():
        shutil.rmtree(copy / name)
        net = kind.from_pretrained(folder / name)
        net.save_pretrained(copy / name, max_shard_size="60KB", variant=variant)
        assert len(list((copy / name).glob("*-of-*"))) > 1
    capsys.readouterr()
    found, expected = read_pipeline(copy), read_pipeline(folder)
    assert same(found.unet["state"], expected.unet["state"])
    assert same(found.text[1], expected.text[1])
    assert same(found.autoencoder[1], expected.autoencoder[1])
    assert capsys.readouterr().out.count("\n") == 1  # the schedule
    for name, read in (
        ("unet", load_latent_unet),
        ("vae", read_autoencoder),
        ("text_encoder", read_clip_text),
    ):
        (index,) = (copy / name).glob("*.index*.json")
        read(copy / name), read(index)


def test_a_diffusion_transformer_in_parts_is_read(tmp_path):
    net = opened((4, 8, 8), patch_size=4, learn_sigma=True)
    twin(net).save_pretrained(tmp_path / "transformer", max_shard_size="20KB")
    assert len(list((tmp_path / "transformer").glob("*-of-*"))) > 1
    for path in (tmp_path, tmp_path / "transformer", tmp_path / "transformer" / INDEX):
        assert same(dit.load_published(path).state_dict(), net.state_dict())


def test_a_part_of_another_shape_is_refused_before_it_is_joined(tmp_path):
    net = twin(opened())
    state = net.state_dict()
    net.save_pretrained(tmp_path)
    key = "transformer_blocks.0.attn1.to_k.weight"
    save_file(state | {key: torch.ones(32, 16)}, tmp_path / WHOLE)
    with pytest.raises(BadInput, match=rf"{key} is \(32, 16\), expected \(32, 32\)"):
        dit.load_published(tmp_path)


# ------------------------------------------------------------------------------- what is refused


def missing(folder):
    sorted(folder.glob("*-of-*"))[1].unlink()


def pointer(folder):
    file = sorted(folder.glob("*-of-*"))[1]
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 42\n")


def torn(folder):
    file = sorted(folder.glob("*-of-*"))[1]
    file.write_bytes(file.read_bytes()[:-10])


def placed(name):
    def change(folder):
        change_index(folder, lambda i: i["weight_map"].update({"conv_in.weight": name}))

    return change


REFUSED = {
    "missing": (missing, r"index\.json: '.*-00002-of-0000\d\.safetensors' .* is not beside it"),
    "pointer": (pointer, r"-00002-of-0000\d\.safetensors is only a pointer of Git LFS"),
    "torn": (torn, r"-00002-of-0000\d\.safetensors is no safetensors file, or a torn one"),
    "above": (placed("../x.safetensors"), r"names the file '\.\./x\.safetensors'.*same folder"),
    "absolute": (placed("/etc/passwd"), r"names the file '/etc/passwd'.*same folder"),
    "of Windows": (placed("..\\x.safetensors"), r"names the file .*same folder"),
    "dots": (placed(".."), r"names the file '\.\.'.*same folder"),
    "long": (placed("x" * 999), r"names the file 'x{57}\.\.\.'"),
    "null": (placed("a\0b"), r"names the file 'a.x00b'"),
    "empty": (placed(""), r"names the file ''"),
    "a number": (placed(3), r"names the file '3': expected one in the same folder"),
    "a list": (placed(["a"]), r"names the file .*a.*: expected"),
    "in no part": (
        lambda f: change_index(
            f, lambda i: i["weight_map"].update(extra=sorted(set(i["weight_map"].values()))[0])
        ),
        r"index\.json places 'extra' in .*00001-of-0000\d\.safetensors, which does not hold it",
    ),
    "no map": (lambda f: change_index(f, lambda i: {"metadata": {}}), "has no weight_map"),
    "empty map": (lambda f: change_index(f, lambda i: {"weight_map": {}}), "has no weight_map"),
    "a list as map": (lambda f: change_index(f, lambda i: {"weight_map": []}), "no weight_map"),
    "torn index": (lambda f: (f / INDEX).write_text('{"weight_map": {'), "cannot be read"),
    "no index": (lambda f: (f / INDEX).unlink(), r"holds .*-00001-of-.*, one of several parts"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_parts_that_are_not_whole_are_refused_in_one_line(name, parts):
    change, message = REFUSED[name]
    change(parts)
    with pytest.raises(BadInput, match=message) as refused:
        load_published(parts)
    assert "\n" not in str(refused.value) and str(parts) in str(refused.value)


def test_one_part_of_several_is_no_network(parts):
    part = sorted(parts.glob("*-of-*"))[0]
    with pytest.raises(
        BadInput, match="-00001-of-0000.*safetensors is one part of several: .*index"
    ):
        load_published(part)
    only = parts / "model-00001-of-00001.safetensors"
    save_file({"a": torch.ones(2)}, only)
    assert read_weights(only).keys() == {"a"}


def test_a_tensor_in_two_parts_is_that_of_the_index(parts, ours):
    """And one that the index does not name is read, as diffusers reads it."""
    first, second = sorted(parts.glob("*-of-*"))[:2]
    key = next(iter(load_file(first)))
    save_file(load_file(second) | {key: torch.full_like(load_file(first)[key], 7)}, second)
    assert same(load_published(parts)["state"], ours)
    save_file(load_file(second) | {"extra": torch.ones(1)}, second)
    with pytest.raises(BadInput, match="no place for: extra"):
        load_published(parts)


@pytest.mark.skipif(not MAPS.exists(), reason="needs /proc")
def test_parts_are_mapped_not_read(parts, monkeypatch):
    monkeypatch.setattr(files, "PART", 1)
    state = read_weights(parts / INDEX)
    assert all(str(file) in MAPS.read_text() for file in parts.glob("*-of-*"))
    state.clear()
    assert str(parts) not in MAPS.read_text()


# ------------------------------------------------------------------------------ several lie there


def write(path, content):
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".json":
        part = path.with_name("one-00001-of-00001.safetensors")
        save_file(content, part)
        places = dict.fromkeys(content, part.name)
        path.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    elif path.suffix == ".bin":
        torch.save(content, path)
    else:
        save_file(content, path)


STEM = "diffusion_pytorch_model"
BEST_FIRST = [  # without a variant as diffusers: an index, then a whole file
    f"{STEM}.safetensors.index.json",
    f"{STEM}.safetensors",
    f"{STEM}.bin.index.json",
    f"{STEM}.bin",
    f"{STEM}.fp32.safetensors",
    f"{STEM}.fp16.safetensors",
    f"{STEM}.fp16.bin",
    f"{STEM}.bf16.safetensors",
    f"{STEM}.other.safetensors",
    f"{STEM}.non_ema.safetensors",
    f"{STEM}.non_ema.bin",
]


def test_of_several_the_best_is_taken_and_all_are_named(tmp_path, capsys):
    for name in BEST_FIRST[::-1]:
        write(tmp_path / name, {"a": torch.ones(1)})
    for i, name in enumerate(BEST_FIRST):
        assert files.find_weights(tmp_path) == tmp_path / name
        said = capsys.readouterr().out
        if i == len(BEST_FIRST) - 1:
            assert said == f"{tmp_path}: takes '{name}', these are no running means\n"
        else:
            assert said.startswith(f"{tmp_path}: takes '{name}', leaves out '{BEST_FIRST[i + 1]}'")
        (tmp_path / name).unlink()


def test_an_index_beside_a_whole_file_is_taken_as_diffusers_does(unet, parts, ours, capsys):
    """Its own class reads the parts; so the whole file, of other numbers, must not be read here."""
    save_file({k: v + 1 for k, v in unet.state_dict().items()}, parts / WHOLE)
    theirs = type(unet).from_pretrained(parts).state_dict()
    assert same(theirs, unet.state_dict())
    capsys.readouterr()
    assert same(load_published(parts)["state"], ours)
    assert capsys.readouterr().out == f"{parts}: takes '{INDEX}', leaves out '{WHOLE}'\n"


def test_a_whole_file_beside_an_index_is_taken_as_transformers_does(folder, tmp_path, capsys):
    from transformers import CLIPTextModel

    net = CLIPTextModel.from_pretrained(folder / "text_encoder")
    net.save_pretrained(tmp_path, max_shard_size="60KB")
    shutil.copy(folder / "text_encoder" / "model.safetensors", tmp_path)
    for file in tmp_path.glob("*-of-*"):
        save_file({k: v + 1 for k, v in load_file(file).items()}, file, {"format": "pt"})
    assert same(CLIPTextModel.from_pretrained(tmp_path).state_dict(), net.state_dict())
    capsys.readouterr()
    assert same(read_clip_text(tmp_path)[1], read_clip_text(folder)[1])
    told = "takes 'model.safetensors', leaves out 'model.safetensors.index.json'"
    assert capsys.readouterr().out == f"{tmp_path}: {told}\n"


def test_the_running_mean_of_a_training_folder_is_taken(unet, ours, tmp_path, capsys):
    """accelerate's checkpoints of diffusers' examples have both."""
    other = type(unet).from_config(unet.config)
    other.save_pretrained(tmp_path / "unet")
    unet.save_pretrained(tmp_path / "unet_ema")
    assert same(load_published(tmp_path)["state"], ours)
    assert capsys.readouterr().out == f"{tmp_path}: takes unet_ema/, leaves out unet/\n"


# ----------------------------------------------------------------------------- how a path is typed


def test_a_cache_of_the_hub_is_read_through_its_links(parts, ours, tmp_path):
    cache = tmp_path / "models--somebody--net"
    copy, blobs = cache / "snapshots" / "0a1b2c", cache / "blobs"
    copy.mkdir(parents=True)
    blobs.mkdir()
    for i, file in enumerate(sorted(parts.iterdir())):
        shutil.copy(file, blobs / f"{i:040x}")
        (copy / file.name).symlink_to(f"../../blobs/{i:040x}")
    assert same(load_published(copy)["state"], ours)
    for read in (
        load_published,
        read_autoencoder,
        read_clip_text,
        dit.load_published,
        read_pipeline,
    ):
        with pytest.raises(BadInput, match=rf"is a cache of the Hub: name the copy .*{copy}"):
            read(cache)


def test_slashes_and_renamed_and_zipped_files(unet, parts, ours, tmp_path):
    assert same(load_published(f"{parts}/")["state"], ours)
    save_file(unet.state_dict(), tmp_path / "net.pt", {"format": "pt", "step": "5"})
    assert same(load_published(tmp_path / "net.pt", size=8)["state"], ours)
    torch.save(unet.state_dict(), tmp_path / "net.bin")
    assert same(load_published(tmp_path / "net.bin", size=8)["state"], ours)
    shutil.make_archive(str(tmp_path / "folder"), "zip", parts)
    for name in ("folder.zip", "folder.pt", "folder.ckpt"):
        path = shutil.copy(tmp_path / "folder.zip", tmp_path / f"x{name}")
        with pytest.raises(BadInput, match=f"x{name} is a zip of other files.*unpack it"):
            load_published(path)
        assert is_published(path)
