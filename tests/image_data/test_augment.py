"""Augmentation: against scipy's filters and closed forms, and what an image may depend on."""

import math

import numpy as np
import pytest
import torch
from data_files import noise
from scipy import ndimage, signal

from image_data.augment import AUGMENT_DIM, SYM6, augment, draw_augmentation, labels_of, shift

H6 = np.array(SYM6)
LEAN = (H6 * np.arange(-5, 7)).sum() / H6.sum()  # its centre, in points of the finer grid
SHAPES = [(3, 12, 12), (1, 8, 13), (3, 5, 1)]
NAMES = ("flip_x", "flip_y", "w", "angle", "v", "axis", "tx", "ty")


def draws_of(**columns):
    """A row of draws, zeros but for these."""
    return torch.tensor([[columns.get(name, 0.0) for name in NAMES]])


def images_of(shape, n=1, dtype=torch.float32):
    return torch.from_numpy(noise((n, *shape))).to(dtype) / 127.5 - 1


def drawn(n, p=1.0, seed=0):
    return torch.from_numpy(draw_augmentation(np.random.default_rng(seed), n, p))


def turned(angle):
    """The matrix that turns (x, y), y downward, counter-clockwise."""
    return np.array(
        [[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]], np.float64
    )


def source(row, height, width, points):
    """Where points (..., 2) of a result come from, (x, y) from the centre: the inverse of the map
    that enlarges, turns, stretches and moves."""
    _, _, w, angle, v, axis, tx, ty = row.double().tolist()
    stretch = turned(axis) @ np.diag([2 ** (0.2 * v), 2 ** (-0.2 * v)]) @ turned(-axis)
    forward = stretch @ turned(angle) * 2 ** (0.2 * w)
    moved = points - np.array([0.125 * width * tx, 0.125 * height * ty])
    return np.linalg.solve(forward, moved[..., None])[..., 0]


# ---------------------------------------------------------------------------------- the resampling


def test_the_filter_is_an_orthonormal_wavelet_of_six_vanishing_moments():
    """The conditions that have sym6 among their few solutions."""
    shifted = [(H6[2 * n :] * H6[: 12 - 2 * n]).sum() for n in range(6)]
    assert np.abs(shifted - np.eye(6)[0]).max() < 1e-11
    wavelet, places = H6[::-1] * (-1) ** np.arange(12), np.arange(12) - 5.5
    assert all(abs((wavelet * places**k).sum()) < 1e-7 for k in range(6))
    assert abs((wavelet * places**6).sum()) > 1
    assert abs(LEAN) < 0.1  # the most symmetric of them


def by_scipy(image, row):
    """augment of one image (H,W) float64: upfirdn and map_coordinates over a wide reflection."""
    height, width = image.shape
    image = image[:, ::-1] if row[0] else image
    image = image[::-1] if row[1] else image
    pad = 8 * max(height, width)
    fine = np.pad(image, pad, "reflect")
    for side in (0, 1):
        fine = signal.upfirdn(H6, fine, up=2, axis=side)  # pixel i is at point 2 i + 5
    y, x = np.mgrid[-5 : 2 * height + 5, -5 : 2 * width + 5] / 2
    centre = np.array([(width - 1) / 2, (height - 1) / 2])
    points = source(row, height, width, np.stack([x, y], axis=-1) - centre) + centre
    where = 2 * (points[..., ::-1] + pad) + 5
    fine = ndimage.map_coordinates(fine, np.moveaxis(where, -1, 0), order=1, mode="grid-constant")
    for side in (0, 1):
        fine = signal.upfirdn(H6[::-1], fine, down=1, axis=side)
    return fine[11 : 11 + 2 * height : 2, 11 : 11 + 2 * width : 2]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_scipy_filters_and_reads(shape):
    images, draws = images_of(shape, 24, torch.float64), drawn(24)
    found, _ = augment(images, draws)
    for image, row, result in zip(images.numpy(), draws, found.numpy(), strict=True):
        expected = np.stack([by_scipy(channel, row) for channel in image])
        assert np.abs(result - expected).max() < 1e-9
    assert (augment(images.float(), draws)[0] - found).abs().max() < 5e-5


@pytest.mark.parametrize("waves", [(1, 0), (0, 1), (1, 1), (2, 1), (2, 2)], ids=str)
@pytest.mark.parametrize("size", [(32, 32), (24, 40)], ids=str)
def test_smooth_waves_are_transformed_as_their_formula_is(size, waves):
    """A cosine with whole half-waves is its own reflection. Reading bilinearly at half a pixel errs
    by omega^2 / 32; sym6 puts pixels LEAN / 2 beside their places, on both ways."""
    omega = np.pi * np.array(waves) / (np.array(size[::-1]) - 1)  # in x and y, per pixel
    centre = (np.array(size[::-1]) - 1) / 2

    def wave(points):
        return np.cos(omega * (points + centre)).prod(-1)

    points = np.moveaxis(np.mgrid[: size[0], : size[1]][::-1], 0, -1) - centre  # (H,W,2): x, y
    draws = drawn(32, seed=1)
    image = torch.from_numpy(wave(points)).expand(32, 1, *size)
    found, _ = augment(image, draws)
    for row, result in zip(draws, found.numpy(), strict=True):
        mirror = np.where(row[:2] == 1, -1, 1)
        at = (source(row, *size, points + LEAN / 2) - LEAN / 2) * mirror
        assert np.abs(result[0] - wave(at)).max() < 0.05 * (omega**2).sum()


@pytest.mark.parametrize("dx, dy", [(3, 0), (0, -2), (-5, 4), (40, -31)])
def test_a_move_by_whole_pixels_is_exact(dx, dy):
    """However far: the reflection goes on."""
    height, width = 8, 13
    images = images_of((3, height, width), 2)
    row = draws_of(tx=dx / (0.125 * width), ty=dy / (0.125 * height)).repeat(2, 1)
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (50, 50), (50, 50)), "reflect")
    expected = padded[:, :, 50 - dy : 50 - dy + height, 50 - dx : 50 - dx + width]
    assert np.abs(augment(images, row)[0].numpy() - expected).max() < 2e-5


def wave_packet(size):
    """Smooth and without symmetry: (1,1,size,size)."""
    y, x = np.mgrid[:size, :size] * np.pi / (size - 1)
    image = np.cos(x) + 0.5 * np.cos(2 * y) + 0.25 * np.cos(x) * np.cos(3 * y)
    return torch.from_numpy(image)[None, None]


@pytest.mark.parametrize("quarters", [1, 2, 3, -1])
def test_quarter_turns(quarters):
    """No point lies between others, but sym6 leans: a half turn is off by LEAN of a pixel."""
    errors = []
    for size in (16, 32, 64):
        image = wave_packet(size)
        found, _ = augment(image, draws_of(angle=quarters * math.pi / 2))
        errors.append(float((found - image.rot90(quarters, (2, 3))).abs().max()))
        slope = np.pi / (size - 1) * (1 + 1 + 1)  # along x and y, at most
        assert errors[-1] < 1.1 * LEAN * slope
    assert errors[2] < 0.55 * errors[1] < 0.55 * 0.55 * errors[0]


def test_every_column_goes_where_it_says():
    """A white spot right of and above the centre; its reflections are further out."""
    image = torch.zeros(1, 1, 33, 33)
    image[0, 0, 14, 22] = 1  # 6 right, 2 up

    def spot(**columns):
        found, _ = augment(image, draws_of(**columns))
        place = int(found[:, :, 4:29, 4:29].argmax())
        return place % 25 - 12, 12 - place // 25

    assert spot() == (6, 2)
    assert spot(w=5.0) == (12, 4)
    assert spot(angle=math.pi / 2) == (-2, 6)
    assert spot(v=5.0) == (12, 1)
    assert spot(v=5.0, axis=math.pi / 2) == (3, 4)
    assert spot(v=5.0, axis=math.pi / 4) == spot(v=5.0, axis=-3 * math.pi / 4) == (9, 7)
    assert spot(tx=8 / 33, ty=8 / 33 * 3) == (7, -1)
    assert spot(flip_x=1.0, flip_y=1.0, tx=8 / 33, angle=math.pi / 2) == (3, -6)


def test_details_that_shrink_below_a_pixel_fade():
    """Every second column white, at half the size: gray, where no filter would leave stripes."""
    image = torch.ones(1, 1, 32, 32)
    image[:, :, :, ::2] = -1
    found, _ = augment(image, draws_of(w=-5.0, tx=2 / 32))
    assert found.abs().max() < 0.06


# ------------------------------------------------------------------- what it may and may not change


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_zeros_leave_an_image_bit_for_bit(shape):
    """And mirroring moves its pixels; whatever happens to the others of the batch."""
    images, draws = images_of(shape, 8), drawn(8)
    draws[[1, 4, 5, 6]] = 0
    draws[5, 0] = draws[6, 1] = 1
    found, labels = augment(images, draws)
    expected = [images[1], images[4], images[5].flip(2), images[6].flip(1)]
    assert torch.equal(found[[1, 4, 5, 6]], torch.stack(expected))
    assert not labels[[1, 4]].any() and labels[[5, 6]].sum() == 2
    changed = (found != images).flatten(1).any(1)
    assert changed[[0, 2, 3, 7]].all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_an_image_does_not_depend_on_its_neighbours(shape):
    images, draws = images_of(shape, 16), drawn(16)
    together, labels = augment(images, draws)
    for i in (0, 7, 15):
        alone, label = augment(images[i : i + 1], draws[i : i + 1])
        assert (alone[0] - together[i]).abs().max() < 2e-6 and torch.equal(label[0], labels[i])
    others = torch.randn_like(images)
    others[3] = images[3]
    wild = drawn(16, seed=9) * 3
    wild[3] = draws[3]
    assert (augment(others, wild)[0][3] - together[3]).abs().max() < 2e-6


def test_labels():
    rows = torch.cat(
        [
            draws_of(flip_x=1.0, w=-0.5),
            draws_of(flip_y=1.0, angle=math.pi / 2),
            draws_of(v=2.0, axis=math.pi / 6),
            draws_of(v=-1.0, tx=0.25, ty=-3.0),
        ]
    )
    half = math.sqrt(0.75)
    expected = [
        [1, 0, -0.5, 0, 0, 0, 0, 0, 0],
        [0, 1, 0, -1, 1, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 2 * half, 1, 0, 0],
        [0, 0, 0, 0, 0, -1, 0, 0.25, -3],
    ]
    assert (labels_of(rows) - torch.tensor(expected)).abs().max() < 1e-6
    labels = augment(images_of((1, 4, 4), 4), rows)[1]
    assert labels.dtype == torch.float32 and labels.shape == (4, AUGMENT_DIM)
    assert torch.equal(labels, labels_of(rows))


def test_an_image_stays_in_channels_last():
    images = images_of((3, 8, 8), 4).contiguous(memory_format=torch.channels_last)
    assert augment(images, drawn(4))[0].is_contiguous(memory_format=torch.channels_last)


def test_rows_that_do_not_belong_to_the_images():
    with pytest.raises(ValueError, match=r"draws must be \(2, 8\) for these images, got \(3, 8\)"):
        augment(images_of((1, 4, 4), 2), drawn(3))


# ------------------------------------------------------------------------------------- the draws


def test_each_kind_happens_as_often_as_p_says_and_by_the_published_amount():
    n, p = 40_000, 0.12
    draws = draw_augmentation(np.random.default_rng(2), n, p)
    assert draws.dtype == np.float32 and draws.shape == (n, 8)
    happens = {name: column != 0 for name, column in zip(NAMES, draws.T, strict=True)}
    shares = {"flip_x": 0.5, "flip_y": p / 2, "axis": p / 2}
    for name, found in happens.items():
        share = shares.get(name, p)
        assert abs(found.mean() - share) < 5 * math.sqrt(share / n), name
    assert (happens["tx"] == happens["ty"]).all() and not (happens["axis"] & ~happens["v"]).any()
    assert abs((happens["w"] & happens["angle"]).mean() - p * p) < 5 * p / math.sqrt(n)
    assert set(draws[:, :2].flatten()) == {0, 1}
    for name, column in zip(NAMES[2:], draws.T[2:], strict=True):
        column = column[column != 0]
        std = np.pi / math.sqrt(3) if name in ("angle", "axis") else 1
        error = 5 / math.sqrt(len(column))
        assert abs(column.mean()) < std * error and abs(column.std() / std - 1) < error, name
    assert np.abs(draws[:, [3, 5]]).max() <= np.float32(np.pi)


def test_what_is_drawn_does_not_depend_on_p():
    """So a run's other numbers of the same generator, and an image's own, stay the same."""
    none, some, all_ = (np.random.default_rng(3) for _ in range(3))
    draws = [draw_augmentation(r, 500, p) for r, p in ((none, 0), (some, 0.3), (all_, 1))]
    assert none.random() == some.random() == all_.random()
    assert not draws[0][:, 1:].any() and (draws[0][:, 0] == draws[2][:, 0]).all()
    chosen = draws[1] != 0
    assert (draws[1][chosen] == draws[2][chosen]).all() and 0 < chosen.mean() < 1
    assert (draws[2][:, [2, 3, 4, 6, 7]] != 0).all()


@pytest.mark.parametrize("p", [-0.1, 1.5, math.nan])
def test_a_probability_is_from_0_to_1(p):
    with pytest.raises(ValueError, match="p must be in 0 .. 1"):
        draw_augmentation(np.random.default_rng(0), 4, p)


def test_shifted_images_are_those_of_scipy_with_their_edges_repeated():
    images = images_of((3, 6, 9), 25)
    by = torch.cartesian_prod(torch.arange(-2, 3), torch.arange(-2, 3))
    for image, found, (up, left) in zip(images, shift(images, by), by.tolist(), strict=True):
        wanted = ndimage.shift(image.numpy(), (0, -up, -left), order=0, mode="nearest")
        assert np.array_equal(found, wanted)
    assert torch.equal(shift(images, torch.zeros_like(by)), images)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_gives_the_same_and_nothing_waits_for_it():
    images, draws = images_of((3, 32, 32), 64), drawn(64)
    expected, labels = augment(images, draws)
    on_gpu = images.cuda(), draws.cuda()
    augment(*on_gpu)  # brings the filters there
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")  # as training has it
        torch.cuda.set_sync_debug_mode("error")
        found, told = augment(*on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.set_float32_matmul_precision(before)
    assert (found.cpu() - expected).abs().max() < 1e-4
    assert (told.cpu() - labels).abs().max() < 1e-6
