"""sampling_update's kernel against the formula of its file, in float64 with its own noise."""

import itertools

import numpy as np
import pytest
import torch
from noise_math import gaussian_float64
from triton.runtime import interpreter

from kernels import Row, sampling_update
from kernels.sampling_update import _reference, _update_kernel
from tests.cases.rows import make_rows, rounded
from tests.cases.traffic import count_traffic

ALPHA_BAR = (1 - torch.linspace(1e-3, 0.1, 100, dtype=torch.float64)).cumprod(0)
PAIRS = [(99, 60), (60, 20), (20, 7), (7, -1)]
SAMPLERS = {
    "ddpm-small": {},
    "ddpm-large": {"variance": "large"},
    "ddpm-learned": {"variance": "learned"},
    "ddim-0": {"eta": 0.0},
    "ddim-0.5": {"eta": 0.5},
    "ddim-1": {"eta": 1.0},
    "dpm-solver++": {"multistep": True},
}
# One tile with a tail; one whole tile; several tiles with a tail; more channels than a tile is
# wide; one position; 4·7 positions in rows of 7; no multiple of 4 anywhere; no space; no channels.
SHAPES = [
    (2, 3, 6, 6),
    (2, 4, 8, 16),
    (2, 3, 12, 13),
    (2, 70, 2, 2),
    (3, 5, 1, 1),
    (2, 3, 4, 7),
    (3, 3, 7, 5),
    (2, 5, 9),
    (3, 7),
    (2, 1, 28, 28),
]
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
ROUNDING = {F32: 2**-24, F16: 2**-11, BF16: 2**-8}
SEEDS = torch.tensor([17, -9, 2**40 + 3, 5, 12])


def channels_last(t):
    """The same values with a sample's channels side by side in memory, for any number of axes."""
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


def inputs(shape, learned=False, x_dtype=F32, out_dtype=F32, last=False):
    """x, out, out_uncond, history."""
    g = torch.Generator().manual_seed(0)
    wide = (shape[0], (1 + learned) * shape[1], *shape[2:])
    x, history = (torch.randn(shape, generator=g).to(x_dtype) for _ in range(2))
    out, uncond = (torch.randn(wide, generator=g).to(out_dtype) for _ in range(2))
    tensors = (x, out, uncond, history)
    return [channels_last(t) for t in tensors] if last else list(tensors)


def formula(x, out, row, step, out_uncond, w, history, seeds, clip):
    """The lines at the top of kernels/sampling_update.py; with each result, the size of its terms.

    Rounding errors are in proportion to that size: the sum of the terms' absolute values.
    """
    p, q, A, B, H, S, low, high = torch.tensor(rounded(row), dtype=torch.float64)
    channels = x.shape[1]
    x, out, history = x.double(), out.double(), history.double()
    m, m_size = out[:, :channels], out[:, :channels].abs()
    if out_uncond is not None:
        u = out_uncond[:, :channels].double()
        m, m_size = (1 + w) * m - w * u, abs(1 + w) * m_size + abs(w) * u.abs()
    x0, x0_size = p * x - q * m, p.abs() * x.abs() + q.abs() * m_size
    if clip:
        x0 = x0.clamp(-1, 1)
    y = A * x0 + B * x
    y_size = A.abs() * x0_size + B.abs() * x.abs()
    if H != 0:
        y, y_size = y + H * history, y_size + H.abs() * history.abs()
    if S != 0:
        f = (out[:, channels:] + 1) / 2 if low != high else 0.0
        std = S * (0.5 * (f * high + (1 - f) * low)).exp()
        noise = std * gaussian_float64(x.shape, seeds, step)
        y, y_size = y + noise, y_size + noise.abs()
    return (y, y_size), (x0, x0_size)


def check(got, expected, dtype):
    """One rounding to dtype at the end, and fp32 arithmetic before it."""
    for tensor, (value, size) in zip(got, expected, strict=True):
        assert tensor.dtype == dtype and tensor.shape == value.shape
        error = (tensor.double() - value).abs() - ROUNDING[dtype] * value.abs()
        assert (error <= 2**-22 * size.clamp(min=1)).all()


def cover_pairs(*choices):
    """Cases such that any two choices meet, chosen greedily from random ones."""
    rng = np.random.default_rng(0)
    index = [range(len(values)) for values in choices]
    missing = {
        (a, i, b, j)
        for a, b in itertools.combinations(range(len(choices)), 2)
        for i, j in itertools.product(index[a], index[b])
    }
    cases = []
    while missing:
        tries = [[int(rng.integers(len(values))) for values in choices] for _ in range(40)]
        pairs = [
            {(a, t[a], b, t[b]) for a, b in itertools.combinations(range(len(t)), 2)} for t in tries
        ]
        best = max(range(len(tries)), key=lambda k: len(pairs[k] & missing))
        missing -= pairs[best]
        cases.append(tuple(v[i] for v, i in zip(choices, tries[best], strict=True)))
    return cases


CASES = cover_pairs(
    list(SAMPLERS),
    ["eps", "v", "x0"],
    SHAPES,
    [False, True],  # channels_last
    [None, 0.0, 1.5, -1.0],  # guidance
    [True, False],  # clip
    [(F32, F32), (F32, BF16), (F32, F16), (BF16, BF16), (F16, F16), (BF16, F32)],  # x, out
)


def test_cases_cover_every_pair_of_choices():
    columns = list(zip(*CASES, strict=True))
    for first, second in itertools.combinations(columns, 2):
        assert set(zip(first, second, strict=True)) == set(itertools.product(first, second))


def case_id(value):
    return "-".join(map(str, value)).replace("torch.", "") if isinstance(value, tuple) else None


@pytest.mark.parametrize("name, prediction, shape, last, w, clip, dtypes", CASES, ids=case_id)
def test_equals_float64(name, prediction, shape, last, w, clip, dtypes):
    x, out, uncond, history = inputs(shape, name == "ddpm-learned", *dtypes, last)
    uncond = None if w is None else uncond
    w, seeds = w or 0.0, SEEDS[: shape[0]]
    rows = make_rows(ALPHA_BAR, PAIRS, prediction=prediction, **SAMPLERS[name])
    for step in (0, 1, 3):  # first order and second of dpm-solver++, and the last row
        options = {"out_uncond": uncond, "guidance": w, "history": history, "seeds": seeds}
        got = sampling_update(x, out, rows[step], step=step, clip=clip, **options)
        assert all(t.stride() == x.stride() for t in got)
        check(got, formula(x, out, rows[step], step, uncond, w, history, seeds, clip), dtypes[0])
        only, nothing = sampling_update(
            x, out, rows[step], step=step, clip=clip, want_x0=False, **options
        )
        assert nothing is None and torch.equal(only, got[0])


@pytest.mark.parametrize("step", [0, 1, 3])
@pytest.mark.parametrize("name", ["ddpm-learned", "dpm-solver++"])
def test_other_inputs_may_lie_otherwise(name, step):
    """Formats that differ from x's, gaps between rows and samples, broadcast samples."""
    shape, row = (3, 3, 6, 6), make_rows(ALPHA_BAR, PAIRS, **SAMPLERS[name])[step]
    plain = inputs(shape, name == "ddpm-learned")

    def gaps(t):
        wide = torch.full((t.shape[0], 2 * t.shape[1] + 1, *t.shape[2:]), torch.nan)
        wide[:, 1 : t.shape[1] + 1] = t
        return wide[:, 1 : t.shape[1] + 1]

    ways = {
        "channels_last": channels_last,
        "gaps": gaps,
        "gaps in channels_last": lambda t: gaps(channels_last(t)),
        "rows with gaps": lambda t: channels_last(t.repeat(1, 2, 1, 1))[:, : t.shape[1]],
        "every second": lambda t: t.repeat_interleave(2, -1)[..., ::2],
        "transposed": lambda t: t.mT.contiguous().mT,
    }

    def update(x, out, uncond, history):
        options = {"out_uncond": uncond, "guidance": 2.0, "history": history, "seeds": SEEDS[:3]}
        return sampling_update(x, out, row, step=step, **options)

    expected = update(*plain)
    for way, other in itertools.product(ways, range(4)):
        changed = [ways[way](t) if i == other else t for i, t in enumerate(plain)]
        assert torch.equal(changed[other], plain[other])
        got = update(*changed)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)), (way, other)
    same = [t[:1].expand(3, *t.shape[1:]) for t in plain]
    expected = update(*(t.contiguous() for t in same))
    assert all(torch.equal(a, b) for a, b in zip(update(*same), expected, strict=True))


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("where", range(4), ids=["x", "out", "uncond", "history"])
@pytest.mark.parametrize("name", ["ddpm-learned", "dpm-solver++"])
def test_nan_and_inf_propagate_as_in_pytorch(name, where, clip):
    tensors = inputs((2, 3, 4, 7), name == "ddpm-learned")
    channels = tensors[where].shape[1]
    for channel in {0, channels - 1}:  # with a learned variance, the last one is of v
        tensors[where][0, channel, 1, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    x, out, uncond, history = tensors
    rows = make_rows(ALPHA_BAR, PAIRS, **SAMPLERS[name])
    for step in (1, 3):
        seeds = SEEDS[:2]
        options = {"out_uncond": uncond, "guidance": 1.5, "history": history, "seeds": seeds}
        got = sampling_update(x, out, rows[step], step=step, clip=clip, **options)
        reference = _reference(x, out, rows[step], step, uncond, 1.5, history, seeds, clip)
        for a, b in zip(got, reference, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, equal_nan=True)
        if where < 2 and channel < x.shape[1]:  # not v; a clamp hides nothing
            assert not any(t[0, channel, 1, :3].isfinite().any() for t in got)
        assert all(t[1].isfinite().all() for t in got)


def test_the_clamp_leaves_the_bits_of_finite_numbers():
    """Of zeros their sign, too: what numpy's clip gives. Infinity and NaN become NaN."""
    ends = [0.0, 1e-45, 1e-38, 0.25, 1 - 2**-24, 1.0, 1 + 2**-23, 2.0, 1e19, 3.4e38]
    numbers = torch.tensor([*ends, torch.inf, torch.nan])
    x = torch.cat([numbers, -numbers]).view(1, 1, 4, 6)
    row = Row(p=1.0, q=0.0, A=1.0, B=0.0)
    kernel = sampling_update(x, torch.zeros_like(x), row, step=0)[1]
    reference = _reference(x, torch.zeros_like(x), row, 0, None, 0.0, None, None, True)[1]
    right = np.clip(x.numpy(), -1, 1)
    right[~x.isfinite().numpy()] = np.nan
    for found in (kernel.numpy(), reference.numpy()):
        known = ~np.isnan(right)
        assert (np.isnan(found) == ~known).all() and known.sum() == 2 * len(ends)
        assert (found.view(np.int32) == right.view(np.int32))[known].all()


@pytest.mark.parametrize("name", ["ddpm-small", "ddpm-learned", "ddim-0.5"])
@pytest.mark.parametrize("size", [(6, 6), (7, 5)], ids=["fours", "ones"])
def test_a_sample_is_the_same_in_any_batch_and_layout(name, size):
    """Seed 17 alone, and at position 3 of 5, in both layouts: bit for bit."""
    tensors = inputs((5, 3, *size), name == "ddpm-learned")
    seeds = torch.tensor([3, 3, -1, 17, 2**50])
    rows = make_rows(ALPHA_BAR, PAIRS, **SAMPLERS[name])

    def update(part, layout):
        x, out, uncond, _ = (layout(t[part]) for t in tensors)
        options = {"out_uncond": uncond, "guidance": 1.5, "seeds": seeds[part]}
        return sampling_update(x, out, rows[1], step=1, **options)

    batch = update(slice(0, 5), torch.Tensor.contiguous)
    for part, layout in itertools.product(
        (slice(3, 4), slice(2, 5), slice(0, 5)), (torch.Tensor.contiguous, channels_last)
    ):
        for a, b in zip(update(part, layout), batch, strict=True):
            assert torch.equal(a, b[part])


@pytest.mark.parametrize("last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize(
    "shape",
    [(2, 3, 16, 16), (2, 4, 16, 16), (1, 1, 28, 28), (2, 3, 12, 13), (3, 3, 7, 5), (1, 70, 4, 4)],
)
@pytest.mark.parametrize("name", ["ddpm-learned", "dpm-solver++"])
def test_each_byte_moves_once(name, shape, last):
    learned = name == "ddpm-learned"
    x, out, uncond, history = inputs(shape, learned, last=last)
    rows = make_rows(ALPHA_BAR, PAIRS, **SAMPLERS[name])
    for want_x0 in (True, False):
        with count_traffic(x=x, out=out, uncond=uncond, history=history) as traffic:
            options = {"out_uncond": uncond, "guidance": 2.0, "history": history}
            seeds = SEEDS[: shape[0]]
            sampling_update(x, out, rows[1], step=1, seeds=seeds, want_x0=want_x0, **options)
        size = 4 * x.numel()
        assert traffic.of["x"] == (size, 0) and traffic.of["out"] == ((1 + learned) * size, 0)
        assert traffic.of["uncond"] == (size, 0)
        assert traffic.of["history"] == (0 if learned else size, 0)
        assert traffic.stored == size * (1 + want_x0)
        assert traffic.ratio <= 1.01
        assert traffic.out_of_bounds == traffic.write_write == traffic.read_write == 0
        assert [name for name, _ in traffic.launches] == ["_update_kernel"]
        # Whole sectors, where samples and tiles begin at their edges; v lies between the values of
        # the mean in channels_last, so that both loads touch the same sectors.
        if x[0].numel() % 8 == 0 and shape[1] < 64 and not (learned and last):
            assert traffic.sector_ratio <= 1.02


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4)], ids=["batch", "height"])
def test_nothing_in_nothing_out(shape):
    x, out, uncond, _ = inputs(shape, learned=True)
    rows = make_rows(ALPHA_BAR, PAIRS, variance="learned")
    with count_traffic() as traffic:
        got = sampling_update(x, out, rows[0], step=0, out_uncond=uncond, seeds=SEEDS[: shape[0]])
    assert all(t.shape == shape and t.dtype == x.dtype for t in got)
    assert not traffic.launches


def test_kernel_and_reference_refuse_the_same_calls():
    x, out, _, _ = inputs((2, 3, 4, 4))
    rows = {name: make_rows(ALPHA_BAR, PAIRS, **kind)[1] for name, kind in SAMPLERS.items()}
    for match, row, seeds in (
        ("seeds are needed: step 1", rows["ddpm-small"], None),
        ("seeds must be int64", rows["ddpm-small"], SEEDS[:1]),
        ("seeds must be int64", rows["ddpm-small"], SEEDS[:2].int()),
        ("history is needed: step 1", rows["dpm-solver++"], None),
        ("out must have 6 channels: step 1", rows["ddpm-learned"], SEEDS[:2]),
    ):
        for tensor in (x, x.double()):  # float64 takes the reference
            with pytest.raises(ValueError, match=match):
                sampling_update(tensor, out, row, step=1, seeds=seeds)
    sampling_update(x, out, rows["ddim-0"], step=1)


def test_where_a_gradient_is_asked_for_the_reference_runs():
    x, out, _, _ = inputs((2, 3, 4, 4))
    rows = make_rows(ALPHA_BAR, PAIRS, eta=0.0)
    with count_traffic() as traffic:
        x_prev, _ = sampling_update(x, out.requires_grad_(), rows[1], step=1, clip=False)
        x_prev.sum().backward()
    assert not traffic.launches and out.grad.abs().min() > 0
    with count_traffic() as traffic, torch.no_grad():
        assert not sampling_update(x, out, rows[1], step=1)[0].requires_grad
    assert len(traffic.launches) == 1


def test_log_variances_that_fp32_cannot_tell_apart_leave_later_steps_theirs():
    """The first step of many has such ones; its launch is remembered for all."""
    x, out, _, _ = inputs((2, 3, 4, 4), learned=True)
    wide = make_rows(ALPHA_BAR, PAIRS, variance="learned")[1]
    close = wide._replace(log_var_min=wide.log_var_max - 1e-12)
    for step, row in enumerate((close, wide)):
        found, _ = sampling_update(x, out, row, step=step, seeds=SEEDS[:2])
        right, _ = _reference(x, out, row, step, None, 0.0, None, SEEDS[:2], True)
        torch.testing.assert_close(found, right, rtol=0, atol=1e-5)


def test_samples_may_lie_further_apart_than_32_bits_reach(monkeypatch):
    """Addresses alone: every load is noted and masked off, nothing of that size is allocated."""
    far, seen = 2**30 + 16, []  # fits 32 bits; twice as far does not
    original = interpreter.InterpreterBuilder.create_masked_load

    def noted_load(self, pointers, mask, *rest):
        seen.append(np.asarray(pointers.data)[mask.data])
        nothing = interpreter.TensorHandle(np.zeros_like(mask.data), mask.dtype)
        return original(self, pointers, nothing, *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", noted_load)
    x, out = torch.zeros(3, 4, 1), torch.zeros(3, 4, 1)
    _update_kernel[(3,)](
        x,
        out,
        None,
        None,
        None,
        torch.empty_like(x),
        None,
        0,
        *[1.0] * 7,
        *[1.0, 0.0],
        4,
        far,
        CHANNELS=1,
        OUT_ROW=1,
        CHANNELS_LAST=False,
        LEARNED=False,
        CLIP=True,
        ROWS=4,
        COLUMNS=1,
        FOURS=True,
    )
    assert len(seen) == 6
    for sample, (x_at, out_at) in enumerate(zip(seen[::2], seen[1::2], strict=True)):
        lanes = 4 * np.arange(4, dtype=np.uint64)
        assert (x_at.ravel() == x.data_ptr() + 16 * sample + lanes).all()
        assert (out_at.ravel() == out.data_ptr() + 4 * far * sample + lanes).all()
