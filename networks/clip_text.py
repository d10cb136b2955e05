"""CLIP's text encoder: tokens (B,L) -> one vector for each token (B,L,width).

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021
    (arXiv:2103.00020), section 2.4: CLIP; the text encoder of its ViT-L/14.
Vaswani et al., "Attention Is All You Need", 2017 (arXiv:1706.03762): the transformer.
Radford et al., "Language Models are Unsupervised Multitask Learners", 2019: causal and pre-norm,
    h = x + attention(norm(x)), then h + mlp(norm(h)), with one more norm after the last block.
Hendrycks, Gimpel, "Gaussian Error Linear Units", 2016 (arXiv:1606.08415), section 2: quick-GELU,
    x sigmoid(1.702 x), in the place of gelu.

Stable Diffusion 1 keeps this encoder frozen and gives its U-Net all 77 vectors as the context
(Rombach et al. 2022, section 3.3). Nothing hides the padding after a prompt: its vectors have read
the whole prompt, and the U-Net attends to them as it does to words.

networks/clip_tokens.py makes tokens of text; networks/published/clip_text.py reads the weights that
others published.
"""

from runtime.commandline import BadInput

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn


class Attention(nn.Module):
    """Every token of (B,L,C) looks at itself and those before it; the heads split the channels."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.qkv = heads, nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        # Views of the projection's memory: three times (B,heads,L,C/heads).
        q, k, v = rearrange(self.qkv(x), "b l (k h d) -> k b h l d", k=3, h=self.heads)
        # PyTorch's own attention: kernels.attention knows no mask.
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(rearrange(out, "b h l d -> b l (h d)"))  # (B,L,C)


class MLP(nn.Module):
    """(B,L,C) -> (B,L,C) through `hidden` units with quick-GELU."""

    def __init__(self, width, hidden):
        super().__init__()
        self.widen, self.narrow = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        h = self.widen(x)  # (B,L,hidden)
        return self.narrow(h * torch.sigmoid(1.702 * h))


class Block(nn.Module):
    """Tokens (B,L,C) -> (B,L,C); both parts add to them."""

    def __init__(self, width, heads, hidden, eps):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width, eps), Attention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width, eps), MLP(width, hidden)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class CLIPText(nn.Module):
    """text(tokens) -> (B,L,width): the last hidden state, after the final norm, in the weights'
    precision. tokens (B,L) int64, each below vocab_size, L <= length.

    vocab_size  tokens there are
    width       channels of a token's vector
    layers      transformer blocks
    heads       attention heads of a block; they divide width
    hidden      units of a block's MLP
    length      tokens of a prompt at most: there is a learned vector for each position
    eps         of every norm
    The defaults are CLIP ViT-L/14's, 123,060,480 parameters. text.settings holds all of them.
    Raises BadInput for heads that do not divide width, ValueError for more than `length` tokens.
    """

    def __init__(
        self,
        vocab_size=49408,
        *,
        width=768,
        layers=12,
        heads=12,
        hidden=3072,
        length=77,
        eps=1e-5,
    ):
        super().__init__()
        if width % heads:
            raise BadInput(f"a text encoder's heads must divide its width {width}, got {heads}")
        self.settings = dict(
            vocab_size=vocab_size,
            width=width,
            layers=layers,
            heads=heads,
            hidden=hidden,
            length=length,
            eps=eps,
        )
        self.token, self.position = nn.Embedding(vocab_size, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads, hidden, eps) for _ in range(layers))
        self.norm = nn.LayerNorm(width, eps)

    def forward(self, tokens):
        L, length = tokens.shape[1], self.settings["length"]
        if length < L:
            raise ValueError(f"expected at most {length} tokens, got {L}")
        x = self.token(tokens) + self.position.weight[:L]  # (B,L,width)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)  # (B,L,width)
