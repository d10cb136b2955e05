"""sampling_update: one row against the papers' formulas in float64, and what it promises."""

import pytest
import torch

from kernels import Row, gaussian, sampling_update
from tests.cases.rows import make_rows

ALPHA_BAR = (1 - torch.linspace(1e-3, 0.1, 100, dtype=torch.float64)).cumprod(0)
TS = [99, 60, 59, 20, 7, 0]
PAIRS = list(zip(TS, (*TS[1:], -1), strict=True))
SAMPLERS = {
    "ddpm small": {},
    "ddpm large": {"variance": "large"},
    "ddpm learned": {"variance": "learned"},
    "ddim 0": {"eta": 0.0},
    "ddim 0.6": {"eta": 0.6},
    "dpm-solver++": {"multistep": True},
}


def inputs(shape=(3, 2, 5, 4), learned=False):
    g = torch.Generator().manual_seed(0)
    out_shape = (shape[0], (1 + learned) * shape[1], *shape[2:])
    x, history = torch.randn(2, *shape, generator=g)
    out, out_uncond = torch.randn(2, *out_shape, generator=g)
    return x, out, out_uncond, history, torch.tensor([3, -9, 2**40, 12][: shape[0]])


def formula(name, prediction, step, x, out, out_uncond, w, history, seeds, clip):
    """The papers, line by line, in float64."""
    x, out, out_uncond, history = (t.double() for t in (x, out, out_uncond, history))
    t, t_prev = PAIRS[step]
    at, ap = ALPHA_BAR[t], ALPHA_BAR[t_prev] if t_prev >= 0 else torch.tensor(1.0).double()
    channels = x.shape[1]
    m = (1 + w) * out[:, :channels] - w * out_uncond[:, :channels]
    x0 = {
        "eps": (x - (1 - at).sqrt() * m) / at.sqrt(),
        "v": at.sqrt() * x - (1 - at).sqrt() * m,
        "x0": m,
    }[prediction]
    if clip:
        x0 = x0.clamp(-1, 1)
    if t_prev == -1:
        return x0, x0
    z = gaussian(x.shape, seeds, step, "cpu").double()
    if name.startswith("ddpm"):
        beta = 1 - at / ap
        mean = (ap.sqrt() * beta * x0 + (1 - beta).sqrt() * (1 - ap) * x) / (1 - at)
        low, high = ((1 - ap) / (1 - at) * beta).log(), beta.log()
        if name == "ddpm learned":
            f = (out[:, channels:] + 1) / 2
            log_var = f * high + (1 - f) * low
        else:
            log_var = low if name == "ddpm small" else high
        return mean + (log_var / 2).exp() * z, x0
    if name.startswith("ddim"):
        sigma = float(name[5:]) * ((1 - ap) / (1 - at) * (1 - at / ap)).sqrt()
        eps = (x - at.sqrt() * x0) / (1 - at).sqrt()
        return ap.sqrt() * x0 + (1 - ap - sigma**2).sqrt() * eps + sigma * z, x0
    half_log_snr = [0.5 * (a / (1 - a)).log() for a in (ALPHA_BAR[PAIRS[step - 1][0]], at, ap)]
    h_before, h = half_log_snr[1] - half_log_snr[0], half_log_snr[2] - half_log_snr[1]
    d = x0 if step == 0 else x0 + h / (2 * h_before) * (x0 - history)
    return ((1 - ap) / (1 - at)).sqrt() * x - ap.sqrt() * ((-h).exp() - 1) * d, x0


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize("clip", [True, False])
def test_every_row_equals_the_papers_formula(name, prediction, clip):
    x, out, out_uncond, history, seeds = inputs(learned=name == "ddpm learned")
    rows = make_rows(ALPHA_BAR, PAIRS, prediction=prediction, **SAMPLERS[name])
    for step in range(len(PAIRS)):
        options = {"out_uncond": out_uncond, "guidance": 1.5, "history": history, "seeds": seeds}
        got = sampling_update(x, out, rows[step], step=step, clip=clip, **options)
        expected = formula(name, prediction, step, x, out, out_uncond, 1.5, history, seeds, clip)
        p, q, a, _, h, *_ = map(abs, rows[step])
        size = (4 * p + 11 * q) * (1 + a + h)  # of the terms summed, as |x| < 4 and |m| < 11
        for a, b in zip(got, expected, strict=True):
            assert a.dtype == torch.float32
            assert (a - b).abs().max() < 2**-22 * size


def test_x0_hat_is_left_out_where_it_is_not_wanted():
    x, out, _, _, seeds = inputs()
    rows = make_rows(ALPHA_BAR, PAIRS)
    x_prev, x0_hat = sampling_update(x, out, rows[1], step=1, seeds=seeds, want_x0=False)
    assert x0_hat is None
    assert torch.equal(x_prev, sampling_update(x, out, rows[1], step=1, seeds=seeds)[0])


@pytest.mark.parametrize("name", SAMPLERS)
def test_last_step_returns_x0_hat_and_needs_no_seeds(name):
    x, out, *_ = inputs(learned=name == "ddpm learned")
    rows = make_rows(ALPHA_BAR, PAIRS, **SAMPLERS[name])
    x_prev, x0_hat = sampling_update(x, out, rows[-1], step=len(PAIRS) - 1)
    assert torch.equal(x_prev, x0_hat) and x0_hat.abs().max() == 1


def test_guidance_0_is_conditional_and_minus_1_unconditional():
    x, out, out_uncond, _, seeds = inputs()
    rows = make_rows(ALPHA_BAR, PAIRS)

    def update(out, **options):
        return sampling_update(x, out, rows[1], step=1, seeds=seeds, clip=False, **options)

    conditional, unconditional = update(out), update(out_uncond)
    for got, expected in (
        (update(out, out_uncond=out_uncond), conditional),
        (update(out, out_uncond=out_uncond, guidance=-1.0), unconditional),
        (update(out, out_uncond=out, guidance=0.5), conditional),
    ):
        assert all((a - b).abs().max() < 1e-5 for a, b in zip(got, expected, strict=True))


def test_guidance_leaves_the_learned_variance_conditional():
    x, out, out_uncond, _, seeds = inputs(learned=True)
    rows = make_rows(ALPHA_BAR, PAIRS, variance="learned")
    other = torch.cat([out_uncond[:, :2], 7 * out_uncond[:, 2:]], 1)
    for w in (0.0, 2.0, -1.0):
        options = {"guidance": w, "seeds": seeds}
        first = sampling_update(x, out, rows[1], step=1, out_uncond=out_uncond, **options)
        second = sampling_update(x, out, rows[1], step=1, out_uncond=other, **options)
        assert torch.equal(first[0], second[0])


def test_ddim_reads_only_the_mean_of_a_network_that_learns_its_variance():
    x, out, *_ = inputs(learned=True)
    rows = make_rows(ALPHA_BAR, PAIRS, eta=0.0)
    both, mean = (sampling_update(x, o, rows[1], step=1)[0] for o in (out, out[:, :2]))
    assert torch.equal(both, mean)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("channels", [1, 3])
def test_memory_format_changes_neither_values_nor_is_changed(name, channels):
    x, out, out_uncond, history, seeds = inputs((4, channels, 5, 6), name == "ddpm learned")
    rows = make_rows(ALPHA_BAR, PAIRS, **SAMPLERS[name])
    options = {"guidance": 2.0, "seeds": seeds}
    expected = sampling_update(
        x, out, rows[1], step=1, out_uncond=out_uncond, history=history, **options
    )
    last = {"memory_format": torch.channels_last}
    for x_nhwc in (False, True):
        for out_nhwc in (False, True):
            values = [x.to(**last) if x_nhwc else x]
            values += [t.to(**last) if out_nhwc else t for t in (out, out_uncond, history)]
            got = sampling_update(
                values[0],
                values[1],
                rows[1],
                step=1,
                out_uncond=values[2],
                history=values[3],
                **options,
            )
            for a, b in zip(got, expected, strict=True):
                assert torch.equal(a, b)
                # Of a single channel, too, whose strides decide how a convolution takes it.
                assert a.stride() == values[0].stride()


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sample_does_not_depend_on_its_batch(name):
    x, out, out_uncond, history, seeds = inputs((4, 3, 5, 7), name == "ddpm learned")
    rows = make_rows(ALPHA_BAR, PAIRS, **SAMPLERS[name])

    def update(part):
        return sampling_update(
            x[part],
            out[part],
            rows[1],
            step=1,
            out_uncond=out_uncond[part],
            guidance=1.0,
            history=history[part],
            seeds=seeds[part],
        )

    batch = update(slice(0, 4))
    for i in range(4):
        alone = update(slice(i, i + 1))
        assert all(torch.equal(a[0], b[i]) for a, b in zip(alone, batch, strict=True))


@pytest.mark.parametrize("dtype, eps", [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_half_precision_computes_in_fp32(dtype, eps):
    x, out, out_uncond, history, seeds = inputs(learned=True)
    x, out, out_uncond = x.to(dtype), out.to(dtype), out_uncond.to(dtype)
    rows = make_rows(ALPHA_BAR, PAIRS, variance="learned")
    got = sampling_update(x, out, rows[1], step=1, out_uncond=out_uncond, guidance=4.0, seeds=seeds)
    expected = formula("ddpm learned", "eps", 1, x, out, out_uncond, 4.0, history, seeds, clip=True)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == dtype
        assert ((a - b).abs() <= eps * b.abs() + 1e-5).all()  # one rounding, at the end


def test_float64_stays_and_gradients_flow():
    x, out, out_uncond, history, seeds = (t.double() for t in inputs((2, 1, 2, 2), learned=True))
    rows = make_rows(ALPHA_BAR, PAIRS, variance="learned")

    def function(x, out, out_uncond):
        options = {"out_uncond": out_uncond, "guidance": 0.7, "seeds": seeds.long()}
        return sampling_update(x, out, rows[1], step=1, clip=False, **options)

    values = [t.requires_grad_() for t in (x, out, out_uncond)]
    assert torch.autograd.gradcheck(function, values)


def test_float64_keeps_the_digits_of_the_noise():
    """S z is a product of float64, though z is drawn in float32."""
    x, out, _, _, seeds = (t.double() for t in inputs())
    row = Row(1.1, 0.2, 0.3, 0.4, S=0.7)
    found, _ = sampling_update(x, out, row, step=3, seeds=seeds.long(), clip=False)
    z = gaussian(x.shape, seeds.long(), 3, "cpu").double()
    expected = 0.3 * (1.1 * x - 0.2 * out) + 0.4 * x + 0.7 * z
    torch.testing.assert_close(found, expected, atol=1e-14, rtol=0)


def test_what_is_missing_or_does_not_fit_is_named():
    x, out, _, _, seeds = inputs()
    row, last = make_rows(ALPHA_BAR, PAIRS)[0], make_rows(ALPHA_BAR, PAIRS)[-1]
    first, multistep, *_ = make_rows(ALPHA_BAR, PAIRS, multistep=True)
    learned = make_rows(ALPHA_BAR, PAIRS, variance="learned")[0]
    for match, call in {
        "seeds are needed": lambda: sampling_update(x, out, row, step=0),
        "seeds must": lambda: sampling_update(x, out, row, step=0, seeds=seeds[:1]),
        "history is needed": lambda: sampling_update(x, out, multistep, step=1),
        "history must": lambda: sampling_update(x, out, multistep, step=1, history=x[:1]),
        "out must have 4": lambda: sampling_update(x, out, learned, step=0, seeds=seeds),
        "out must be": lambda: sampling_update(x, out[:, :1], row, step=0, seeds=seeds),
        "out_uncond is needed": lambda: sampling_update(x, out, last, step=5, guidance=1.0),
        "out_uncond must": lambda: sampling_update(x, out, last, step=5, out_uncond=out[:1]),
        "0 .. 2\\*\\*31 - 1": lambda: sampling_update(x, out, last, step=2**31),
        "got -1": lambda: sampling_update(x, out, last, step=-1),
        "row must be a Row": lambda: sampling_update(x, out, tuple(row), step=0, seeds=seeds),
        "x must": lambda: sampling_update(x[0, 0, 0], out, row, step=0),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()
    sampling_update(x, out, first, step=0)  # first order: no history yet
