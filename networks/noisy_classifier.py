"""A classifier of noisy images: p(y | x_t), whose gradient guides sampling towards a class.

Dhariwal, Nichol, "Diffusion Models Beat GANs", 2021 (arXiv:2105.05233), section 4.3 and appendix I:
the down half and the middle of the ADM U-Net, and then attention pooling as in CLIP (Radford et
al., arXiv:2103.00020, section 2.4).

classifier_guidance.py trains it. networks/published/classifier.py reads the weights that OpenAI
publishes.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from kernels import attention
from networks.adm_unet import EPS, Norm, checked, down_half, run, time_layers, timestep_embedding


class AttentionPool(nn.Module):
    """(B,C,H,W) -> (B,outputs): the mean of all positions attends to itself and to each of them."""

    def __init__(self, channels, height, width, heads, outputs):
        super().__init__()
        self.heads = heads
        self.position = nn.Parameter(torch.randn(channels, 1 + height * width) / channels**0.5)
        self.qkv, self.proj = nn.Linear(channels, 3 * channels), nn.Linear(channels, outputs)

    def forward(self, x):
        x = rearrange(x, "b c h w -> b (h w) c")
        x = torch.cat([x.mean(1, keepdim=True), x], dim=1) + self.position.T  # (B,1+HW,C)
        q, k, v = rearrange(self.qkv(x), "b m (k n d) -> k b n m d", k=3, n=self.heads)
        out = attention(q[:, :, :1], k, v)  # (B,heads,1,C/heads): nothing else is asked of it
        return self.proj(rearrange(out, "b n 1 d -> b (n d)"))


class NoisyClassifier(nn.Module):
    """net(x, t) -> logits (B,num_classes) in x's dtype.

    x (B,C,H,W) in [-1,1] plus noise, of the shape (C,H,W) that it was built for, because attention
    pooling knows each position; t (B,) int timesteps from 0. H and W must halve
    len(channel_mult) - 1 times.

    The settings are those of adm_unet.UNet, of style "adm", but for
    num_heads, num_head_channels   are the pool's heads, too
    use_checkpoint   keep only the layers' inputs and compute the rest again, wherever there are
                     gradients: guided sampling asks for that of x without training
    BadInput for settings that do not fit each other. net.settings holds all but the last.
    """

    def __init__(
        self,
        shape,
        num_classes,
        *,
        model_channels,
        channel_mult,
        num_res_blocks,
        attention_resolutions,
        num_heads=1,
        num_head_channels=0,
        dropout=0.0,
        use_scale_shift_norm=True,
        resblock_updown=True,
        norm_groups=0,
        use_checkpoint=False,
    ):
        super().__init__()
        settings = dict(
            model_channels=model_channels,
            channel_mult=tuple(channel_mult),
            num_res_blocks=num_res_blocks,
            attention_resolutions=tuple(attention_resolutions),
            num_heads=num_heads,
            num_head_channels=num_head_channels,
            dropout=dropout,
            use_scale_shift_norm=use_scale_shift_norm,
            resblock_updown=resblock_updown,
            norm_groups=norm_groups,
        )
        self.settings = checked(shape, settings)
        self.model_channels, self.null = model_channels, num_classes
        self.use_checkpoint = use_checkpoint
        self.time = time_layers(model_channels)
        self.conv_in, self.down, self.middle, kept = down_half(
            shape, dict(self.settings, style="adm")
        )
        c, times = kept[-1], len(channel_mult) - 1
        self.norm_out = Norm(self.settings["norm_groups"], c, EPS["adm"])
        heads = c // num_head_channels if num_head_channels else num_heads
        self.pool = AttentionPool(c, shape[1] >> times, shape[2] >> times, heads, num_classes)

    def forward(self, x, t):
        angles = timestep_embedding(t, self.model_channels, "adm")
        emb = F.silu(self.time(angles.to(x.dtype)))  # (B,4*model_channels)
        again = self.use_checkpoint and torch.is_grad_enabled()
        h = self.conv_in(x)  # (B,C0,H,W)
        for layer in self.down:
            h = run(layer, h, emb, again=again)
        h = run(self.middle, h, emb, again=again)  # (B,C_last,H/2^k,W/2^k)
        return self.pool(self.norm_out(h)).to(x.dtype)  # (B,num_classes)
