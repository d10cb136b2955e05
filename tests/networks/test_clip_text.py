"""CLIP's text encoder: transformers' CLIPTextModel computes the same."""

from runtime.commandline import BadInput

import pytest
import torch
from reference_metrics import import_references
from vae_math import randomise

from networks.clip_text import MLP, CLIPText
from networks.published.clip_text import rows

# CLIPTextConfig's settings; the others are CLIP's.
THEIRS = {
    "four heads": dict(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=9,
    ),
    "one head, coarse eps": dict(
        vocab_size=20,
        hidden_size=24,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=77,
        layer_norm_eps=1e-3,
    ),
}
VIT_L_14 = dict(
    vocab_size=49408,
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    max_position_embeddings=77,
)


@pytest.fixture(scope="module")
def published():
    """transformers' model of given settings, in evaluation mode."""
    import_references()
    transformers = pytest.importorskip("transformers")

    def make(settings):
        tokens = dict(bos_token_id=settings["vocab_size"] - 2, eos_token_id=0, pad_token_id=1)
        return transformers.CLIPTextModel(transformers.CLIPTextConfig(**tokens, **settings)).eval()

    return make


def ours_of(config):
    return CLIPText(
        config["vocab_size"],
        width=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        hidden=config["intermediate_size"],
        length=config["max_position_embeddings"],
        eps=config.get("layer_norm_eps", 1e-5),
    ).eval()


def random_tokens(settings, batch, length):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(settings["vocab_size"], (batch, length), generator=generator)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("batch, length", [(3, 9), (1, 4), (2, 1)])
@pytest.mark.parametrize("name", THEIRS)
def test_the_encoder_of_transformers_computes_the_same(
    name, batch, length, dtype, tolerance, published
):
    theirs = randomise(published(THEIRS[name]))
    ours, state = ours_of(THEIRS[name]), theirs.state_dict()
    ours.load_state_dict({n: torch.cat([state[k] for k in ks]) for n, ks, _ in rows(ours.settings)})
    tokens = random_tokens(ours.settings, batch, length)
    with torch.no_grad():
        expected = theirs.to(dtype)(tokens).last_hidden_state
        got = ours.to(dtype)(tokens)
    assert got.shape == expected.shape and got.dtype == dtype and expected.std() > 0.1
    assert (got - expected).abs().max() < tolerance


def test_quick_gelu_has_its_slope():
    """transformers' own, where it bends: randomised weights alone would hide 1.7 for 1.702."""
    import_references()
    activation = pytest.importorskip("transformers").activations.ACT2FN["quick_gelu"]
    mlp, h = MLP(1, 1).double(), torch.linspace(-8, 8, 101, dtype=torch.float64)[:, None]
    for layer in (mlp.widen, mlp.narrow):
        torch.nn.init.ones_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    with torch.no_grad():
        assert (mlp(h) - activation(h)).abs().max() < 1e-12
        assert (mlp(h) - h / (1 + torch.exp(-1.702 * h))).abs().max() < 1e-12


def test_the_published_encoder_has_our_shapes_and_parameters(published):
    with torch.device("meta"):
        theirs, ours = published(VIT_L_14), CLIPText()
    assert theirs.num_parameters() == sum(p.numel() for p in ours.parameters()) == 123_060_480
    assert ours.settings == ours_of(VIT_L_14 | dict(num_hidden_layers=0)).settings | dict(layers=12)
    table = list(rows(ours.settings))
    assert sorted(key for _, keys, _ in table for key in keys) == sorted(theirs.state_dict())
    assert {name: shape for name, _, shape in table} == (
        {name: tuple(value.shape) for name, value in ours.state_dict().items()}
    )


def test_a_token_is_seen_by_those_after_it_alone():
    text = randomise(ours_of(THEIRS["four heads"]))
    tokens = random_tokens(text.settings, 2, 9)
    with torch.no_grad():
        before = text(tokens)
        for i in range(9):
            changed = tokens.clone()
            changed[:, i] = (changed[:, i] + 1) % 50
            after = text(changed)
            assert torch.equal(after[:, :i], before[:, :i])
            assert ((after[:, i:] - before[:, i:]).abs().amax(-1) > 1e-4).all()


def test_a_sample_does_not_depend_on_its_batch():
    text = randomise(ours_of(THEIRS["four heads"]))
    tokens = random_tokens(text.settings, 3, 9)
    with torch.no_grad():
        torch.testing.assert_close(text(tokens[1:2]), text(tokens)[1:2], rtol=0, atol=1e-6)


def test_the_output_has_the_precision_of_the_weights():
    text = randomise(ours_of(THEIRS["four heads"]))
    tokens = random_tokens(text.settings, 3, 9)
    with torch.no_grad():
        expected = text(tokens)
        got = text.to(torch.bfloat16)(tokens)
    assert got.dtype == torch.bfloat16
    assert (got.float() - expected).abs().mean() < 0.02 * expected.std()


def test_what_makes_no_encoder_and_no_prompt_is_refused():
    with pytest.raises(BadInput, match="heads must divide its width 32, got 3"):
        CLIPText(10, width=32, layers=1, heads=3)
    text = CLIPText(10, width=8, layers=1, heads=2, hidden=8, length=5)
    with pytest.raises(ValueError, match="at most 5 tokens, got 6"):
        text(torch.zeros(1, 6, dtype=torch.int64))
