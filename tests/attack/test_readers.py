"""Every reader, of files a little wrong: a value or one line, never a traceback.

Fast: some dozens of each in `make test`; `make test-all` does thousands.
"""

from runtime.checkpoints import load_checkpoint, trained_config
from runtime.commandline import BadInput
from runtime.files import read_log
from runtime.sums import NOTE
from runtime.yaml_settings import yaml_settings

import gzip
import io
import json
import os
import traceback
import warnings
import zipfile

import mutations
import numpy as np
import pytest
import torch
from data_files import noise, python2_pickle, write_cifar, write_images, write_mnist
from PIL import Image
from reference_metrics import import_references
from safetensors.torch import save_file

import ddpm_pixel
import dit
from evaluation.image_sets import read_file
from image_data import arrays, datasets, decode, prepare
from image_data.cifar_pickle import read_batch
from image_data.kaggle import kaggle_zip
from image_data.listing import listing
from image_data.trees import tree_contents
from networks.adm_unet import UNet
from networks.autoencoders import load_autoencoder
from networks.clip_tokens import Tokenizer
from networks.published.files import read_weights
from networks.published.stable_diffusion import read_pipeline, write_tiny, write_vocabulary
from networks.published.unet import load_published, save_diffusers

IMAGES = {"PNG": "png", "JPEG": "jpg", "GIF": "gif", "BMP": "bmp", "TIFF": "tif", "WEBP": "webp"}
IMAGES |= {"PPM": "ppm", "TGA": "tga"}


class Reader:
    """make(folder) writes files; one of them, matching `file`, is changed; read(folder) reads."""

    def __init__(self, make, read, file="*", change=mutations.of_bytes):
        self.make, self.read, self.file, self.change = make, read, file, change


def picture(kind):
    def make(folder):
        Image.fromarray(noise((9, 8, 3))).save(folder / f"a.{IMAGES[kind]}", kind)

    def read(folder):
        names = [path.name for path in folder.iterdir()]
        decode.inspect(folder, names)
        return decode.decode(folder, names, 4, 3)

    return Reader(make, read)


def mnist(zipped):
    return Reader(
        lambda folder: write_mnist(folder, 5, 2, zipped),
        lambda folder: arrays.idx_source([folder], "train").contents(),
        "train-*",
    )


def cifar(kind, packed):
    return Reader(
        lambda folder: write_cifar(folder, kind, packed, each=1),
        lambda folder: arrays.cifar_source(folder, "test").contents(),
        "**/*.tar.gz" if packed else "**/test_batch*",
    )


def zipped(kaggle=False, method=zipfile.ZIP_STORED):
    def make(folder):
        with zipfile.ZipFile(folder / "a.zip", "w", method) as archive:
            for name in (
                ("train.X1/n1/1.png", "val.X/n1/2.png") if kaggle else ("a/1.png", "b/2.png")
            ):
                whole = io.BytesIO()
                Image.fromarray(noise((4, 4))).save(whole, "PNG")
                archive.writestr(name, whole.getvalue())
            if kaggle:
                archive.writestr("Labels.json", json.dumps({"n1": "tench, Tinca", "n2": "crane"}))

    def read(folder):
        path = folder / "a.zip"
        found = listing(path)
        made = kaggle_zip(path, "val", found) if kaggle else tree_contents(path, found, "train")
        return made and decode.decode(path, made.items, 4, 1)

    return Reader(make, read)


def prepared(folder):
    """A prepared set, and the images that it is of."""
    images = write_images(folder.parent / f"images of {folder.name}", 2)
    made = datasets.load(str(images), folder, workers=1).manifest["folder"]
    os.rename(made, folder / "set")
    (folder / "set" / NOTE).unlink()


def read_prepared(folder):
    try:
        return prepare.read(folder / "set")
    except prepare.Damaged as error:
        raise BadInput(str(error)) from None


def labelled(folder):
    for i in range(2):
        (folder / "00000").mkdir(exist_ok=True)
        Image.fromarray(noise((4, 4))).save(folder / "00000" / f"img0000000{i}.png")
    rows = [[f"00000/img0000000{i}.png", i] for i in range(2)]
    (folder / "dataset.json").write_text(json.dumps({"labels": rows}))


def checkpoint(change):
    """A checkpoint of chapter 1, and what --sample makes of it before it draws."""

    def make(folder):
        cfg = ddpm_pixel.Config(model_channels=8, channel_mult=(1, 2), num_heads=1, norm_groups=4)
        net = ddpm_pixel.UNet((1, 8, 8), 2, cfg)
        config = json.loads(json.dumps(vars(cfg))) | {"data_key": "x", "ema": [0.9]}
        state = {"script": "ddpm_pixel", "config": config, "step": 1, "shape": [1, 8, 8]}
        state |= {"class_names": ["a", "b"], "ema": net.state_dict(), "more_emas": []}
        torch.save(state, folder / "ckpt.pt")

    def read(folder):
        path = str(folder / "ckpt.pt")
        trained_config(ddpm_pixel.Config, load_checkpoint(path, "ddpm_pixel"))
        return ddpm_pixel.load_net(path, "cpu")

    return Reader(make, read, change=change)


def of_saved(raw, rng):
    state = torch.load(io.BytesIO(raw), weights_only=True)
    whole = io.BytesIO()
    torch.save(mutations.of_value(state, rng), whole)
    return whole.getvalue()


def unet(file, change=mutations.of_json):
    def make(folder):
        settings = dict(model_channels=8, channel_mult=(1, 2), num_res_blocks=1, norm_groups=4)
        net = UNet((1, 8, 8), 0, attention_resolutions=(4,), **settings)
        alpha_bar = torch.linspace(0.98, 0.05, 10, dtype=torch.float64)
        facts = {"alpha_bar": alpha_bar}
        save_diffusers(folder, net.settings, net.state_dict(), (1, 8, 8), 0, facts)

    return Reader(make, load_published, file, change)


READERS = {
    **{f"picture {kind}": picture(kind) for kind in IMAGES},
    "mnist": mnist(False),
    "mnist.gz": mnist(True),
    "cifar pickle": Reader(
        lambda folder: (folder / "a").write_bytes(python2_pickle(noise((1, 3072)), [3])),
        lambda folder: read_batch((folder / "a").read_bytes()),
    ),
    "cifar tar": cifar("python", True),
    "cifar binary": cifar("binary", False),
    "zip": zipped(),
    "zip, deflate": zipped(method=zipfile.ZIP_DEFLATED),
    "zip, bzip2": zipped(method=zipfile.ZIP_BZIP2),
    "zip, lzma": zipped(method=zipfile.ZIP_LZMA),
    "kaggle": zipped(kaggle=True),
    "manifest": Reader(prepared, read_prepared, "set/manifest.json", mutations.of_json),
    "prepared labels": Reader(prepared, read_prepared, "set/labels.npy"),
    "table of labels": Reader(
        labelled,
        lambda folder: tree_contents(folder, listing(folder), "train"),
        "dataset.json",
        mutations.of_json,
    ),
    "npz": Reader(
        lambda folder: np.savez(folder / "a.npz", arr_0=noise((2, 4, 4, 3)), arr_1=np.arange(2)),
        lambda folder: np.asarray(read_file(str(folder / "a.npz")).images).sum(),
    ),
    "npz, deflate": Reader(
        lambda folder: np.savez_compressed(folder / "a.npz", noise((2, 4, 4, 3)), np.arange(2)),
        lambda folder: np.asarray(read_file(str(folder / "a.npz")).images).sum(),
    ),
    "statistics": Reader(
        lambda folder: np.savez(folder / "a.npz", mu=np.ones(3), sigma=np.eye(3), n=9),
        lambda folder: read_file(str(folder / "a.npz")),
    ),
    "npy": Reader(
        lambda folder: np.save(folder / "a.npy", noise((2, 4, 4, 3))),
        lambda folder: np.asarray(read_file(str(folder / "a.npy")).images).sum(),
    ),
    "log": Reader(  # any line that is no JSON is left out
        lambda folder: (folder / "log.jsonl").write_text('{"step": 1, "loss": 0.5}\n' * 3),
        lambda folder: read_log(folder / "log.jsonl"),
    ),
    "yaml": Reader(
        lambda folder: (folder / "a.yaml").write_text(
            "data: mnist\nsteps: 10\nlr: 1e-3\nchannel_mult: [1, 2]\nflip: false\nema: [0.9]\n"
        ),
        lambda folder: yaml_settings(str(folder / "a.yaml"), ddpm_pixel.Config),
    ),
    "safetensors": Reader(
        lambda folder: save_file({"a.weight": torch.ones(3, 4)}, folder / "a.safetensors"),
        lambda folder: read_weights(folder / "a.safetensors"),
    ),
    "torch.save": Reader(
        lambda folder: torch.save({"a.weight": torch.ones(3, 4)}, folder / "a.bin"),
        lambda folder: read_weights(folder / "a.bin"),
    ),
    "torch.save, old": Reader(
        lambda folder: torch.save(
            {"a.weight": torch.ones(3, 4)}, folder / "a.bin", _use_new_zipfile_serialization=False
        ),
        lambda folder: read_weights(folder / "a.bin"),
    ),
    "vocabulary": Reader(
        lambda folder: write_vocabulary(folder / "bpe.txt.gz", ["cat", "dog"]),
        lambda folder: Tokenizer.of_file(folder / "bpe.txt.gz"),
        change=lambda raw, rng: gzip.compress(mutations.of_bytes(gzip.decompress(raw), rng)),
    ),
    "checkpoint": checkpoint(mutations.of_bytes),
    "checkpoint's values": checkpoint(of_saved),
    "unet": unet("**/*.safetensors", mutations.of_bytes),
    "unet's config": unet("**/config.json"),
    "scheduler": unet("**/scheduler_config.json"),
}


def diffusers_folder(kind, **settings):
    """make(folder): a network of diffusers with random weights, written by itself."""

    def make(folder):
        import_references()
        import diffusers

        torch.manual_seed(0)
        getattr(diffusers, kind)(**settings).save_pretrained(folder)

    return make


LEVELS = dict(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4)
BLOCKS = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
KL = diffusers_folder(
    "AutoencoderKL", down_block_types=BLOCKS[0], up_block_types=BLOCKS[1], **LEVELS
)
DIT = diffusers_folder(
    "DiTTransformer2DModel",
    num_attention_heads=2,
    attention_head_dim=8,
    num_layers=1,
    sample_size=8,
)


def head_of(raw, rng):
    """Changes where names, types, shapes and places of tensors are written."""
    size = 8 + int.from_bytes(raw[:8], "little")
    return mutations.of_bytes(raw[:size], rng) + raw[size:]


# What takes seconds to be made or read: in `make test-all` only.
OTHERS = {
    "autoencoder": Reader(KL, load_autoencoder, "*.safetensors", head_of),
    "autoencoder's config": Reader(KL, load_autoencoder, "config.json", mutations.of_json),
    "tiny autoencoder's config": Reader(
        diffusers_folder("AutoencoderTiny", latent_channels=4),
        load_autoencoder,
        "config.json",
        mutations.of_json,
    ),
    "dit's config": Reader(DIT, dit.load_published, "config.json", mutations.of_json),
    "dit": Reader(DIT, dit.load_published, "*.safetensors", head_of),
    "stable diffusion": Reader(
        write_tiny,
        lambda folder: read_pipeline(
            folder / "tiny.safetensors", folder / "tiny-vocabulary.txt.gz"
        ),
        "*.safetensors",
        head_of,
    ),
}


def faults(reader, name, folder, count):
    """What readings of `count` changed files raised besides BadInput: (number, traceback)."""
    found = []
    folder.mkdir()
    reader.make(folder)
    path = next(iter(sorted(p for p in folder.glob(reader.file) if p.is_file())))
    whole = path.read_bytes()
    reader.read(folder)  # as it was written
    refusals = 0
    for number in range(count):
        path.write_bytes(reader.change(whole, mutations.generator(name, number)))
        try:
            reader.read(folder)
        except BadInput as error:
            refusals += 1
            if "\n" in str(error) or not str(error):
                found.append((number, f"not one line: {error}"))
        except Exception:
            found.append((number, traceback.format_exc()))
    assert refusals or count < 20 or name == "log"
    return found


def check(reader, name, folder, count):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = faults(reader, name, folder, count)
    assert not found, f"{len(found)} of {count}; number {found[0][0]}: {found[0][1]}"


@pytest.mark.parametrize("name", READERS)
def test_some_changed_files(tmp_path, name):
    check(READERS[name], name, tmp_path / "a", 30)


SLOW = ("checkpoint", "checkpoint's values", "unet", "unet's config", "scheduler", *OTHERS)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*READERS, *OTHERS])
def test_many_changed_files(tmp_path, name):
    check((READERS | OTHERS)[name], name, tmp_path / "a", 800 if name in SLOW else 4000)
