"""Strips and films: every image where it belongs, every word whole, and x_T first."""

from runtime import films, pictures
from runtime.processes import World

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import ddpm_pixel
import edm
import improved_ddpm
from image_data.batches import Dataset
from kernels import gaussian

NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
LONG = ["Rhodesian ridgeback of the neighbours", "incomprehensibilities-of-words", "café ü", ""]


def flat(columns, rows, height=4, width=4):
    """Images (rows,H,W,3) for each column, each of one colour that no other image or text has."""
    made = np.zeros((columns, rows, height, width, 3), np.uint8)
    for i, j in np.ndindex(columns, rows):
        made[i, j] = 250, 10 + i, 10 + j
    return made


def box(sheet, colour):
    """(left, top, right, bottom) of the pixels of this colour, which fill it."""
    y, x = np.nonzero((sheet == colour).all(2))
    left, top, right, bottom = x.min(), y.min(), x.max() + 1, y.max() + 1
    assert len(x) == (right - left) * (bottom - top)
    return int(left), int(top), int(right), int(bottom)


@pytest.fixture
def words(monkeypatch):
    """[(page, box, text)] of all that is written; page: which picture, and its size."""
    found, text = [], ImageDraw.ImageDraw.text

    def written(self, xy, line, fill, font):
        x0, y0, x1, y1 = font.getbbox(line)
        found.append(
            ((id(self), *self.im.size), (x0 + xy[0], y0 + xy[1], x1 + xy[0], y1 + xy[1]), line)
        )
        kept.append(self)
        text(self, xy, line, fill, font)

    kept = []  # so that no two have one id
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", written)
    return found


def apart(a, b):
    return a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def check_words(words, taken=()):
    """All lie within their page, and none on another one or on the boxes of pictures."""
    assert words
    for i, (page, place, _) in enumerate(words):
        assert place[0] >= 0 and place[1] >= 0 and place[2] <= page[1] and place[3] <= page[2]
        beside = [other for p, other, _ in words[:i] if p == page]
        assert all(apart(place, other) for other in [*beside, *taken])


@pytest.mark.parametrize(
    "height, width, factor", [(4, 4, 16), (28, 28, 3), (32, 40, 2), (70, 66, 1)]
)
@pytest.mark.parametrize("rows", [NAMES[:3], LONG[:3], []])
def test_a_strip_has_every_image_in_its_place_and_no_word_on_it(
    tmp_path, words, height, width, factor, rows
):
    made = flat(2, 3, height, width)
    columns = {"t = 999, 0 %": made[0], "an unreasonably-long caption of this": made[1]}
    films.save_strip(tmp_path / "a.png", columns, rows, "said below")
    sheet = np.asarray(Image.open(tmp_path / "a.png"))
    boxes = [[box(sheet, (250, 10 + i, 10 + j)) for j in range(3)] for i in range(2)]
    for left, top, right, bottom in sum(boxes, []):
        assert (right - left, bottom - top) == (factor * width, factor * height)
        assert min(right - left, bottom - top) >= films.SIDE
    for i, j in np.ndindex(2, 3):
        assert boxes[i][j][0] == boxes[i][0][0] and boxes[i][j][1] == boxes[0][j][1]
    assert boxes[0][0][2] < boxes[1][0][0] and boxes[0][0][3] < boxes[0][1][1]
    check_words(words, sum(boxes, []))
    said = " ".join(line for *_, line in words).split()
    assert said == " ".join([*columns, *rows, "said below"]).split()
    for name, (_, top, _, bottom) in zip(rows, boxes[0], strict=False):  # beside its images
        first = [place for _, place, line in words if name.startswith(line)]
        assert top <= first[0][1] and first[-1][3] <= bottom


def test_pixels_of_a_strip_are_those_of_the_images(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 1), dtype=np.uint8)
    films.save_strip(tmp_path / "a.png", {"": image})
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.mode == "L"
        sheet = np.asarray(picture)[films.GAP : films.GAP + 64, films.GAP : films.GAP + 64]
    assert np.array_equal(sheet, np.kron(image[0, :, :, 0], np.ones((2, 2), np.uint8)))


def test_of_a_hundred_rows_some_are_shown_and_a_line_says_so(tmp_path, words):
    made = np.stack([np.full((4, 4, 3), (250, 10, 10 + j), np.uint8) for j in range(100)])
    films.save_strip(tmp_path / "a.png", {"one": made}, [f"class {j}" for j in range(100)])
    sheet = np.asarray(Image.open(tmp_path / "a.png"))
    shown = [j for j in range(100) if (sheet == (250, 10, 10 + j)).all(2).any()]
    said = [line for *_, line in words]
    assert len(shown) == films.ROWS and shown[0] == 0 and shown[-1] == 99
    assert said == ["one", *(f"class {j}" for j in shown), f"{films.ROWS} of 100 rows"]


@pytest.mark.parametrize(
    "titles", [["x_t"], ["x_t", "x0_hat"], ["w = 0", "w = 1", "w = 3 guided so"]]
)
def test_films_lie_beside_each_other_with_marks_and_columns_on_the_way(tmp_path, words, titles):
    n, rows = 101, ["automobile", "an-extraordinarily-long-name"]
    marks = films.marks_of([(1000 - i, 999 - i if i < 99 else -1) for i in range(100)])
    made = {
        t: [flat(1, 2)[0] + np.array([0, 0, 2 * k], np.uint8)] * n for k, t in enumerate(titles)
    }
    films.save_beside(tmp_path / "a", made, marks, rows)
    check_words(words)
    said = [line for *_, line in words]
    of = len(titles)
    for percent in (0, 25, 50, 75, 99, 100):
        assert said.count(f"{percent} %") == of
    assert said.count("t = 1000") == said.count("x_0") == of
    with Image.open(tmp_path / "a.gif") as film:
        assert film.n_frames == films.FRAMES and film.info["duration"] == 500
        sizes = set()
        for i in range(film.n_frames):
            film.seek(i)
            sizes.add(film.size)
            assert len(film.convert("RGB").getcolors()) <= films.COLOURS
        assert len(sizes) == 1 and film.info["duration"] == 2000
    for mark in ("t = 1000, 0 %", "x_0, 100 %"):
        assert said.count(mark) == 1
    for name in [*titles, *rows]:
        assert " ".join(said).count(name) >= films.FRAMES  # in each frame, perhaps in two lines


def test_columns_of_a_film_are_its_frames(tmp_path):
    frames = [np.full((1, 4, 4, 3), (250, 10, i), np.uint8) for i in range(101)]
    films.save_beside(tmp_path / "a", {"": frames}, films.marks_of([*range(100, -1, -1)]))
    sheet = np.asarray(Image.open(tmp_path / "a.png"))
    boxes = [box(sheet, (250, 10, i)) for i in (0, 25, 50, 75, 99, 100)]
    assert boxes == sorted(boxes)
    assert sum((sheet == (250, 10, i)).all(2).any() for i in range(101)) == 6


@pytest.mark.parametrize(
    "steps, numbers, percents",
    [
        (1, [0, 1], [0, 100]),
        (7, [0, 2, 4, 5, 6, 7], [0, 29, 57, 71, 86, 100]),
        (18, [0, 4, 9, 14, 17, 18], [0, 22, 50, 78, 94, 100]),
        (100, [0, 25, 50, 75, 99, 100], [0, 25, 50, 75, 99, 100]),
        (1000, [0, 250, 500, 750, 990, 1000], [0, 25, 50, 75, 99, 100]),
    ],
)
def test_columns_of_few_steps_are_the_nearest_and_say_what_they_are(
    tmp_path, words, steps, numbers, percents
):
    marks = films.marks_of([*range(steps, 0, -1), -1])
    assert sum(mark.endswith(", 100 %") for mark in marks) == 1  # an image almost done is not done
    frames = [np.zeros((1, 4, 4, 3), np.uint8)] * (steps + 1)
    films.save_beside(tmp_path / "a", {"": frames}, marks)
    heads = [line for *_, line in words][: 2 * len(numbers)]
    at = [f"t = {steps - i}" for i in numbers[:-1]] + ["x_0"]
    assert heads == [
        line for pair in zip(at, (f"{p} %" for p in percents), strict=True) for line in pair
    ]


@pytest.mark.parametrize("letter", ["a", "ö"])
def test_an_endless_name_is_cut(tmp_path, words, letter):
    films.save_strip(tmp_path / "a.png", {"one": flat(1, 2)[0]}, ["cat", 90 * letter])
    said = [line for *_, line in words]
    assert said[-1].rstrip(".").strip(letter) == "" and said[-1].endswith("...")
    assert 10 < len(said[-1]) < 90 and Image.open(tmp_path / "a.png").width < 320


@pytest.mark.parametrize("blocks, most", [(2, 2), (3, 3), (4, 2), (5, 3), (6, 3)])
def test_many_films_make_no_tower(tmp_path, blocks, most):
    frames = [np.zeros((10, 28, 28, 1), np.uint8)] * 21
    films.save_beside(
        tmp_path / "a",
        {f"w = {w}": frames for w in range(blocks)},
        films.marks_of([*range(20, -1, -1)]),
    )
    one = {"w = 0": frames}
    films.save_beside(tmp_path / "b", one, films.marks_of([*range(20, -1, -1)]))
    with Image.open(tmp_path / "a.png") as many, Image.open(tmp_path / "b.png") as single:
        assert round(many.width / single.width) == most
        assert round(many.height / single.height) == -(-blocks // most)


def test_a_film_shows_large_images_smaller_and_a_strip_as_they_are(tmp_path):
    frames = [np.full((2, 300, 300, 1), 10 * i, np.uint8) for i in range(3)]
    films.save_beside(tmp_path / "a", {"": frames}, films.marks_of([2, 1, -1]))
    with Image.open(tmp_path / "a.gif") as film, Image.open(tmp_path / "a.png") as strip:
        assert 200 < film.width < 3 * films.LARGEST and strip.width > 900 and strip.height > 600


def test_noise_in_a_film_takes_few_bytes(tmp_path):
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 256, (10, 32, 32, 3), dtype=np.uint8)] * 40
    films.save_beside(
        tmp_path / "a", {"x_t": frames, "x0_hat": frames}, films.marks_of([*range(40)])
    )
    assert (tmp_path / "a.gif").stat().st_size < 2.5e6


def test_one_image_of_each_class_stands_for_all():
    numbers, rows, note = films.one_each(torch.tensor([2, 2, 0, 9, 0]), 5, NAMES)
    assert (numbers.tolist(), rows, note) == ([2, 0, 3], ["airplane", "bird", "truck"], "")
    numbers, rows, note = films.one_each(torch.arange(300) % 100, 300)
    assert len(numbers) == films.ROWS and note == f"{films.ROWS} of 100 classes"
    assert rows == [f"class {i}" for i in numbers] and rows[-1] == "class 99"
    numbers, rows, _ = films.one_each(np.full(20, 3), 20, NAMES)
    assert numbers.tolist() == list(range(8)) and rows == ["cat"] * 8
    numbers, rows, _ = films.one_each(None, 5)
    assert numbers.tolist() == list(range(5)) and len(rows) == 0


def test_marks_are_of_x_before_the_first_step_and_after_each():
    assert films.marks_of([(9, 4), (4, -1)]) == ["t = 9, 0 %", "t = 4, 50 %", "x_0, 100 %"]
    found = films.marks_of([80.0, 1.2345, 0.0])
    assert found == ["sigma = 80, 0 %", "sigma = 1.23, 50 %", "sigma = 0, 100 %"]


# ------------------------------------------------------------------------- what chapters give them


class Seen(torch.nn.Module):
    """A network that keeps what it was given first, and answers with a tenth of it."""

    null, null_label = 10, True

    def __init__(self, channels=1):
        super().__init__()
        self.channels, self.first = channels, None

    def forward(self, x, t, y=None):
        self.first = x.clone() if self.first is None else self.first
        return 0.1 * x.repeat(1, self.channels, 1, 1)


def walks(chapter, net, shape):
    """(its save_images, its trajectory, x_T of seeds, what the network sees of x_T)."""
    if chapter == "edm":
        cfg, column = edm.Config(sample_steps=6, gpus=0), edm.Edm(0.5)
        first = partial_of(edm.save_images, net, column, cfg)
        walk = edm.trajectory(net, column, cfg, shape, *SEEDS_AND_LABELS)
        return first, walk, 80.0, column(80.0).c_in
    module = {"ddpm": ddpm_pixel, "improved": improved_ddpm}[chapter]
    cfg = module.Config(sample_steps=6, timesteps=50, gpus=0)
    walk = module.trajectory(net, cfg, shape, *SEEDS_AND_LABELS)
    return partial_of(module.save_images, net, cfg), walk, 1.0, 1.0


SEEDS_AND_LABELS = torch.arange(5, 17), torch.arange(5, 17) % 10


def partial_of(save, *args):
    return lambda *more: save(*args, World(), *more)


@pytest.mark.parametrize("chapter", ["ddpm", "improved", "edm"])
def test_a_reverse_film_has_x_T_first_then_each_step_and_every_class(
    chapter, tmp_path, monkeypatch
):
    shape, (seeds, labels), given = (1, 8, 8), SEEDS_AND_LABELS, []
    net = Seen(2 if chapter == "improved" else 1)
    save, walk, scale, c_in = walks(chapter, net, shape)
    monkeypatch.setattr(films, "save_beside", lambda *args: given.append(args))
    save(shape, seeds, labels, tmp_path, NAMES)
    ((path, found, marks, rows, _),) = given
    assert path == tmp_path / "reverse" and rows == NAMES and len(found) == 2
    by_class = torch.tensor([5, 6, 7, 8, 9, 0, 1, 2, 3, 4])  # of seeds 5..14, the class of each
    order = by_class.argsort()
    x, guess = found.values()
    x_T = scale * gaussian((12, *shape), seeds, -1, "cpu")
    assert torch.equal(x[0], pictures.to_uint8(x_T[order]))
    torch.testing.assert_close(net.first, c_in * x_T)
    steps = [(a.clone(), b.clone()) for a, b in walk]
    assert len(x) == len(guess) == len(marks) == len(steps) + 1
    for i, (after, x0_hat) in enumerate(steps):
        for ours, theirs in ((x[i + 1], after), (guess[i], x0_hat)):
            assert (ours.int() - pictures.to_uint8(theirs[order]).int()).abs().max() <= 1
    images = torch.from_numpy(np.load(tmp_path / "samples.npz")["arr_0"])
    for last in (x, guess):
        assert (last[len(steps)].int() - images[order].int()).abs().max() <= 1
    assert marks[0] == ("sigma = 80, 0 %" if chapter == "edm" else "t = 49, 0 %")


def test_only_frames_that_are_shown_are_kept():
    def walk(seeds, y):
        for i in range(1000):
            yield torch.full((2, 1, 2, 2), i / 1000), torch.zeros(2, 1, 2, 2)

    kept = films.shown(1001)
    x, guess = World().frames(walk, torch.arange(2), None, torch.zeros(2, 1, 2, 2), kept)
    assert list(x) == list(guess) == kept and {0, 250, 500, 750, 990, 1000} <= x.keys()
    assert len(kept) <= films.FRAMES + 4
    assert (
        x[990].unique().tolist()
        == pictures.to_uint8(torch.full((1, 1, 1, 1), 0.989)).flatten().tolist()
    )


def test_a_forward_film_has_an_image_of_each_class(tmp_path, monkeypatch):
    labels = np.array([1, 1, 0, 2, 0])
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 1), dtype=np.uint8)
    ds, given = Dataset("few", images, labels, ("a", "b", "c"), {}), []
    monkeypatch.setattr(films, "save_beside", lambda *args: given.append(args))
    alpha_bar = ddpm_pixel.make_alpha_bar("linear", 1000)
    for part in (ds, replace(ds, labels=np.zeros(5, np.int64), class_names=())):
        ddpm_pixel.save_forward(part, alpha_bar, tmp_path / "forward")
    (path, found, marks, rows, _), (_, unnamed, _, no_rows, _) = given
    (film,) = found.values()
    x0 = ds.batch(np.array([2, 0, 3]))[0]
    assert rows == ["a", "b", "c"] and torch.equal(film[0], torch.from_numpy(images[[2, 0, 3]]))
    eps = gaussian((3, 1, 4, 4), torch.arange(3), 0, "cpu")
    for i, t in ((25, 249), (50, 499), (75, 749), (99, 989), (100, 999)):
        noisy = ddpm_pixel.q_sample(x0, torch.full((3,), t), eps, alpha_bar)
        assert torch.equal(film[i], pictures.to_uint8(noisy)) and marks[i] == f"t = {t}, {i} %"
    assert marks[0] == "x_0, 0 %" and len(no_rows) == 0 and unnamed[""][0].shape[0] == 5


def test_a_class_whose_letters_no_font_has_is_named_by_its_number(monkeypatch):
    names, said = ["cat", "\U0010fffd", "кот", "über"], []
    monkeypatch.setattr(films, "say_once", said.append)
    _, rows, _ = films.one_each(np.arange(5), 5, names)
    assert rows == ["cat", "class 1", "кот", "über", "class 4"]
    assert len(said) == 1 and "no font here has the letters" in said[0]
