"""DDPM++ by itself: its tensors, what it computes and its gradients, and what it costs."""

from runtime.commandline import BadInput

import math

import pytest
import torch
from recording import Copies
from reference_edm import forward, published, spread
from torch.func import functional_call
from training_step import compiled, training_step

from networks.edm_unet import DDPMpp

SMALL = dict(model_channels=16, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(4,))


def tensors_of(shape, classes, augment_dim=0, **settings):
    """Names and shapes of the published tensors for settings of DDPMpp."""
    names = dict(num_res_blocks="num_blocks", attention_resolutions="attention")
    theirs = {names.get(key, key): value for key, value in settings.items()}
    return published(shape[1:], classes, augment_dim, **theirs)


def build(shape=(3, 8, 8), classes=3, augment_dim=2, dtype=torch.float32, **settings):
    """A network with weights that leave no branch near zero, in channels_last memory."""
    settings = {**SMALL, **settings}
    net = DDPMpp(shape, classes, augment_dim=augment_dim, **settings).to(dtype)
    plain = {key: value for key, value in settings.items() if key in SMALL}
    net.load_state_dict(spread(tensors_of(shape, classes, augment_dim, **plain), dtype))
    return net.to(memory_format=torch.channels_last)


def batch(shape=(3, 8, 8), dtype=torch.float32):
    """x, c_noise, labels (the second is "no label" of three), augmentations."""
    x = torch.sin(torch.arange(2 * math.prod(shape), dtype=torch.float64)).view(2, *shape)
    x = x.to(dtype).contiguous(memory_format=torch.channels_last)
    augment = torch.tensor([[1, -0.5], [0, 0.25]], dtype=dtype)
    return x, torch.tensor([-1.5, 0.75], dtype=dtype), torch.tensor([2, 3]), augment


ONE_HOT = torch.tensor([[0, 0, 1], [0, 0, 0]]).double()


@pytest.mark.parametrize(
    "shape, classes, augment_dim, settings, count",
    [
        ((3, 32, 32), 10, 9, {}, 55_735_299),
        ((3, 32, 32), 0, 9, {}, 55_733_891),
        ((3, 64, 64), 0, 9, dict(channel_mult=(1, 2, 2, 2)), 61_805_571),
        ((3, 16, 24), 0, 0, dict(SMALL, attention_resolutions=(16, 8)), None),
    ],
    ids=["cifar10-cond", "cifar10-uncond", "ffhq", "small"],
)
def test_the_tensors_are_the_published_ones_in_their_order(
    shape, classes, augment_dim, settings, count
):
    """The counts are those of NVIDIA's code."""
    with torch.device("meta"):
        net = DDPMpp(shape, classes, augment_dim=augment_dim, **settings)
    expected = tensors_of(shape, classes, augment_dim, **settings)
    found = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    assert list(found.items()) == list(expected.items())
    assert count is None or sum(p.numel() for p in net.parameters()) == count


def test_the_output_is_that_of_nvidias_code():
    """Computed once with their SongUNet in float64, its attention as well, on these weights."""
    out = build(dtype=torch.float64)(*batch(dtype=torch.float64))
    every = [-0.570633458, -0.183107708, 1.574976059, 1.454734968, 0.946579835, -0.232023012]
    every += [-1.424717959, -0.434668826, -0.947684116, -0.035881684, 0.915500889]
    expected = torch.tensor(every).double()
    torch.testing.assert_close(out.flatten()[::37], expected, rtol=0, atol=2e-7)
    assert out.square().mean().item() == pytest.approx(1.553720746, rel=1e-7)


CASES = {
    "labels and augmentation": {},
    "no labels": dict(classes=0),
    "augmentation not given": dict(given=False),
    "neither": dict(classes=0, augment_dim=0, given=False),
    "wide images": dict(shape=(3, 8, 12)),
    "three levels": dict(
        shape=(3, 16, 8), channel_mult=(2, 1, 2), num_res_blocks=2, attention_resolutions=(16, 4)
    ),
    "one level": dict(channel_mult=(2,), attention_resolutions=()),
}


def results(function, tensors, towards):
    """{name: gradient} and the output of a function of named tensors, all in float64."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}
    out = function(leaves)
    (out * towards.to(out.dtype)).sum().backward()
    grads = {name: t.grad for name, t in leaves.items() if t.grad is not None}
    return {name: t.double() for name, t in (grads | {"output": out.detach()}).items()}


def gap(found, expected):
    """Largest relative difference of any of the tensors of two dictionaries."""
    assert found.keys() == expected.keys()
    return max(((found[n] - e).norm() / e.norm()).item() for n, e in expected.items())


def joined(found):
    """The output, and all gradients as one vector: some are 1e-4 of others, and their rounding."""
    gradient = torch.cat([t.flatten() for name, t in sorted(found.items()) if name != "output"])
    return {"output": found["output"], "gradient": gradient}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_output_and_every_gradient_are_those_of_an_independent_forward(case):
    case, shape = {**case}, case.get("shape", (3, 8, 8))
    given = case.pop("given", True)
    net, (x, c_noise, y, augment) = build(**case), batch(shape)
    towards = torch.cos(torch.arange(x.numel())).view(x.shape)

    def ours(t):
        weights = {name: value for name, value in t.items() if name != "x"}
        augmented = augment.to(t["x"].dtype) if given else None
        return functional_call(net, weights, (t["x"], c_noise, y, augmented))

    def theirs(t):
        augmented = augment.to(t["x"].dtype) if given else None
        return forward(t, t["x"], c_noise, ONE_HOT.to(t["x"].dtype), augmented)

    single = {"x": x, **dict(net.named_parameters())}
    double = {name: t.double() for name, t in single.items()}
    exact = results(theirs, double, towards)
    unseen = set() if given or "augment_dim" in case else {"map_augment.weight"}
    assert exact.keys() == single.keys() - unseen | {"output"}
    assert gap(results(ours, double, towards), exact) < 1e-11
    # In float32 as near to it as the independent one is in float32.
    rounding = gap(joined(results(theirs, single, towards)), joined(exact))
    assert gap(joined(results(ours, single, towards)), joined(exact)) < 2 * rounding < 1e-4


def test_no_label_is_the_label_num_classes():
    net, (x, c_noise, _, augment) = build(), batch()
    none = net(x, c_noise, None, augment)
    assert net.null == 3 and torch.equal(none, net(x, c_noise, torch.tensor([3, 3]), augment))
    for label in range(3):
        y = torch.tensor([label, 3])
        one = net(x, c_noise, y, augment)
        assert not torch.allclose(one[0], none[0], atol=1e-2)
        torch.testing.assert_close(one[1], none[1])
    with pytest.raises(RuntimeError):
        net(x, c_noise, torch.tensor([4, 0]), augment)


def test_initial_weights_are_the_published_ones():
    """Xavier-uniform, 1e-5 of it where a branch ends, sqrt(0.2) of it for q, k and v; no biases."""
    torch.manual_seed(0)
    net = DDPMpp((3, 8, 8), 3, augment_dim=2, **{**SMALL, "model_channels": 64})
    for name, value in net.named_parameters():
        norm = "norm" in name
        if name.endswith("bias"):
            assert not value.any()
        elif norm:
            assert (value == 1).all()
        else:
            gain = 1e-5 if name.split(".")[-2] in ("conv1", "proj", "8x8_aux_conv") else 1.0
            gain = math.sqrt(0.2) if ".qkv." in name else gain
            fans = (value.shape[0] + value.shape[1]) * math.prod(value.shape[2:])
            bound = gain * math.sqrt(6 / fans)
            assert 0.9 * bound < value.abs().max() <= bound * (1 + 1e-6), name
            assert value.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.15), name
            assert value.mean().abs() < 0.25 * bound, name


def test_channels_last_goes_through_the_whole_network_and_nothing_is_copied():
    net, inputs, seen = build(), batch(), []

    def note(module, given, out):
        seen.extend(t.is_contiguous(memory_format=torch.channels_last) for t in (given[0], out))

    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(note)
    with torch.no_grad(), Copies(size=2 * 32 * 4 * 4) as copies:  # the smallest activation
        net(*inputs)
    assert len(seen) > 20 and all(seen)
    # Three blocks attend, and put the weights of q, k and v in order.
    assert [shape for _, shape in copies.found] == 3 * [(3, 32, 32, 1, 1)]


def gradients(net, use_checkpoint):
    """(output, gradients, bytes kept for backward) of a training step with dropout."""
    net.use_checkpoint = use_checkpoint
    return training_step(net, batch())


def test_checkpointing_keeps_less_and_gives_the_same_gradients():
    net = build(dropout=0.2, num_res_blocks=2)
    out, grads, size = gradients(net, use_checkpoint=False)
    again, grads_again, smaller = gradients(net, use_checkpoint=True)
    assert torch.equal(out, again) and not torch.equal(out, net.eval()(*batch()))
    for name in grads:
        torch.testing.assert_close(grads_again[name], grads[name], rtol=1e-6, atol=1e-6, msg=name)
    assert smaller < 0.5 * size


def test_the_network_compiles_as_one_graph():
    net = build()
    whole, graphs = compiled(net)
    torch.testing.assert_close(whole(*batch()), net(*batch()), rtol=1e-6, atol=1e-6)
    assert len(graphs) == 1


def test_settings_make_the_same_network_again():
    net = DDPMpp((3, 8, 8), 0, **SMALL, dropout=0.1, augment_dim=9, use_checkpoint=True)
    assert net.settings == dict(SMALL, dropout=0.1, augment_dim=9)
    again = DDPMpp((3, 8, 8), 0, **net.settings)
    assert {n: p.shape for n, p in again.named_parameters()} == {
        n: p.shape for n, p in net.named_parameters()
    }


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(shape=(3, 9, 8)), "images of 9x8 cannot be halved 1 times.*type --size 8"),
        (dict(model_channels=15), "--model-channels 15 must be even"),
        (dict(model_channels=48), "144 channels do not make 32 norm groups .*--model-channels 32"),
        (dict(model_channels=2), "2 channels do not make 1 norm groups"),
    ],
)
def test_settings_that_fit_no_network_are_refused(changes, message):
    changes = {"shape": (3, 8, 8), **changes}
    with pytest.raises(BadInput, match=message), torch.device("meta"):
        DDPMpp(changes.pop("shape"), 0, **{**SMALL, **changes})
