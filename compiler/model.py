"""MASt3R as one readable torch model, written to be exported.

    image (B, 3, H, W) --encode--> features (B, H/16, W/16, C_enc)
    two feature maps   --decode--> pts3d, conf, desc, desc_conf for each of the two views

Sources: "Grounding Image Matching in 3D with MASt3R" (Leroy et al., 2024), "DUSt3R" (Wang et al., 2024) for the asymmetric
decoders and the output activations, "CroCo v2" (Weinzaepfel et al., 2023) for the blocks and RoPE2D, and "Vision
Transformers for Dense Prediction" (Ranftl et al., 2021) for the DPT head. Parameters carry the names of the published
checkpoints, so that those load as they are.

Notation in comments: B batch, H W image height and width, h w = H/16 W/16 the token grid, N = h*w tokens, C channels.
Attention is spelled out as products and a softmax: the exported graph is then the plain baseline that the compiler's passes
start from, and the same arithmetic in every runtime.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smc.compiler.config import ModelConfig

LAYER_NORM_EPS = 1e-6

Rotation = tuple[Tensor, Tensor]
"""cos and sin of RoPE2D, each (N, head_dim)."""


def rope_2d(rows: int, cols: int, head_dim: int, base: float) -> Rotation:
    """Rotation tables of RoPE2D for a rows x cols token grid.

    The first half of a head's channels turns with the token's row, the second half with its column; each half is a
    one-dimensional RoPE whose two quarters form the rotated pairs.
    """
    quarter = head_dim // 4
    frequencies = 1.0 / base ** (torch.arange(quarter, dtype=torch.float32) / quarter)
    by_row = torch.arange(rows, dtype=torch.float32)[:, None] * frequencies  # (h, head_dim/4)
    by_col = torch.arange(cols, dtype=torch.float32)[:, None] * frequencies  # (w, head_dim/4)
    by_row = by_row[:, None, :].expand(rows, cols, quarter)
    by_col = by_col[None, :, :].expand(rows, cols, quarter)
    angles = torch.cat([by_row, by_row, by_col, by_col], dim=-1).reshape(rows * cols, head_dim)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Apply RoPE2D to x (B, heads, N, head_dim)."""
    cos, sin = rotation
    a, b, c, d = x.chunk(4, dim=-1)
    return x * cos + torch.cat([-b, a, -d, c], dim=-1) * sin


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v over (B, heads, N, head_dim), returned as (B, N, C)."""
    scores = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
    out = scores.softmax(dim=-1) @ v
    return out.transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, rotation: Rotation) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # (B, N, 3, heads, head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, heads, N, head_dim)
        return self.proj(attention(rotate(q, rotation), rotate(k, rotation), v))


class CrossAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.projq = nn.Linear(dim, dim)
        self.projk = nn.Linear(dim, dim)
        self.projv = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, y: Tensor, x_rotation: Rotation, y_rotation: Rotation) -> Tensor:
        q = self._split_heads(self.projq(x))
        k = self._split_heads(self.projk(y))
        v = self._split_heads(self.projv(y))
        return self.proj(attention(rotate(q, x_rotation), rotate(k, y_rotation), v))

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, N, head_dim)


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int, out: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class EncoderBlock(nn.Module):
    def __init__(self, dim: int, heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = SelfAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(dim, mlp_ratio * dim, dim)

    def forward(self, x: Tensor, rotation: Rotation) -> Tensor:
        x = x + self.attn(self.norm1(x), rotation)
        return x + self.mlp(self.norm2(x))


class DecoderBlock(nn.Module):
    def __init__(self, dim: int, heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = SelfAttention(dim, heads)
        self.cross_attn = CrossAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.norm3 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(dim, mlp_ratio * dim, dim)
        self.norm_y = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)

    def forward(self, x: Tensor, y: Tensor, x_rotation: Rotation, y_rotation: Rotation) -> Tensor:
        """x (B, N, C) attends to itself, then to the other view's tokens y (B, M, C)."""
        x = x + self.attn(self.norm1(x), x_rotation)
        x = x + self.cross_attn(self.norm2(x), self.norm_y(y), x_rotation, y_rotation)
        return x + self.mlp(self.norm3(x))


class PatchEmbed(nn.Module):
    def __init__(self, dim: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, kernel_size=patch, stride=patch)

    def forward(self, image: Tensor) -> Tensor:
        return self.proj(image)  # (B, C, h, w)


def upsample_2x(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)


class ResidualConvUnit(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.conv1(x.relu()).relu())


class FeatureFusion(nn.Module):
    """One RefineNet step of DPT: add the finer level when there is one, refine, double the resolution."""

    def __init__(self, dim: int, takes_skip: bool) -> None:
        super().__init__()
        if takes_skip:
            self.resConfUnit1 = ResidualConvUnit(dim)
        self.resConfUnit2 = ResidualConvUnit(dim)
        self.out_conv = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if skip is not None:
            x = x + self.resConfUnit1(skip)
        return self.out_conv(upsample_2x(self.resConfUnit2(x)))


class FusionPath(nn.Module):
    """The DPT's second half: bring four maps to one width, fuse them from coarse to fine; ends at half the image's resolution."""

    def __init__(self, level_dims: tuple[int, int, int, int], width: int) -> None:
        super().__init__()
        self.layer_rn = nn.ModuleList(nn.Conv2d(dim, width, 3, padding=1, bias=False) for dim in level_dims)
        self.refinenet1 = FeatureFusion(width, takes_skip=True)
        self.refinenet2 = FeatureFusion(width, takes_skip=True)
        self.refinenet3 = FeatureFusion(width, takes_skip=True)
        self.refinenet4 = FeatureFusion(width, takes_skip=False)

    def forward(self, maps: list[Tensor], rows: int, cols: int) -> Tensor:
        """maps: (B, C_i, ., .) at 1/4, 1/8, 1/16 and 1/32 of the image; rows, cols: the grid at 1/16."""
        maps = [conv(m) for conv, m in zip(self.layer_rn, maps, strict=True)]
        # Halving rounds an odd grid up, so doubling may give one row or column too many.
        path = self.refinenet4(maps[3])[:, :, :rows, :cols]
        path = self.refinenet3(path, maps[2])
        path = self.refinenet2(path, maps[1])
        return self.refinenet1(path, maps[0])


class DPTHead(nn.Module):
    """Dense prediction from four token levels: (B, 4, H, W), of which 3 are the point and 1 its confidence."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        levels, width = config.dpt_level_dims, config.dpt_dim
        token_dims = (config.enc_embed_dim,) + 3 * (config.dec_embed_dim,)
        # Each level is projected, then brought to 1/4, 1/8, 1/16 and 1/32 of the image's resolution.
        resample = (
            nn.ConvTranspose2d(levels[0], levels[0], 4, stride=4),
            nn.ConvTranspose2d(levels[1], levels[1], 2, stride=2),
            None,
            nn.Conv2d(levels[3], levels[3], 3, stride=2, padding=1),
        )
        self.act_postprocess = nn.ModuleList(
            nn.Sequential(nn.Conv2d(token_dim, level, 1), *([] if step is None else [step]))
            for token_dim, level, step in zip(token_dims, levels, resample, strict=True)
        )
        self.scratch = FusionPath(levels, width)
        self.head = nn.Sequential(
            nn.Conv2d(width, width // 2, 3, padding=1),
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
            nn.Conv2d(width // 2, width // 2, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width // 2, 4, 1),
        )

    def forward(self, levels: list[Tensor], rows: int, cols: int) -> Tensor:
        """levels: four token tensors (B, N, C_i), shallow to deep, over a rows x cols grid."""
        maps = [tokens.transpose(1, 2).reshape(tokens.shape[0], -1, rows, cols) for tokens in levels]
        maps = [post(m) for post, m in zip(self.act_postprocess, maps, strict=True)]
        return self.head(self.scratch(maps, rows, cols))


def activate_points(xyz: Tensor, kind: str) -> Tensor:
    """Raw (B, H, W, 3) -> 3D points: the direction is kept, the length is mapped."""
    if kind == "linear":
        return xyz
    length = xyz.norm(dim=-1, keepdim=True)
    direction = xyz / length.clamp(min=1e-8)
    return direction * (length.square() if kind == "square" else torch.expm1(length))


def activate_confidence(x: Tensor, mode: tuple[str, float, float]) -> Tensor:
    """Raw (B, H, W) -> confidence in [low, high]."""
    kind, low, high = mode
    if kind == "sigmoid":
        return (high - low) * torch.sigmoid(x) + low
    above = x.exp()
    return low + (above if high == float("inf") else above.clamp(max=high - low))


class PredictionHead(nn.Module):
    """CatMLP+DPT: the DPT regresses points and their confidence, an MLP on [encoder, decoder] tokens the descriptors."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.dpt = DPTHead(config)
        token_dim = config.enc_embed_dim + config.dec_embed_dim
        channels = config.desc_dim + int(config.two_confs)
        self.head_local_features = Mlp(token_dim, config.desc_mlp_hidden, channels * config.patch_size**2)

    def forward(self, levels: list[Tensor], rows: int, cols: int) -> dict[str, Tensor]:
        config = self.config
        points = self.dpt(levels, rows, cols).permute(0, 2, 3, 1)  # (B, H, W, 4)

        local = self.head_local_features(torch.cat([levels[0], levels[-1]], dim=-1))
        local = local.transpose(1, 2).reshape(local.shape[0], -1, rows, cols)
        local = F.pixel_shuffle(local, config.patch_size).permute(0, 2, 3, 1)  # (B, H, W, 24 or 25)

        desc = local[..., : config.desc_dim]
        conf = activate_confidence(points[..., 3], config.conf_mode)
        return {
            "pts3d": activate_points(points[..., :3], config.depth_mode[0]),
            "conf": conf,
            "desc": desc / desc.norm(dim=-1, keepdim=True),
            "desc_conf": activate_confidence(local[..., config.desc_dim], config.desc_conf_mode) if config.two_confs else conf,
        }


class Mast3r(nn.Module):
    """The whole network. `encode` runs once an image, `decode` once a pair."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config.enc_embed_dim, config.patch_size)
        self.enc_blocks = nn.ModuleList(
            EncoderBlock(config.enc_embed_dim, config.enc_num_heads, config.mlp_ratio) for _ in range(config.enc_depth)
        )
        self.enc_norm = nn.LayerNorm(config.enc_embed_dim, eps=LAYER_NORM_EPS)

        def decoder() -> nn.ModuleList:
            return nn.ModuleList(
                DecoderBlock(config.dec_embed_dim, config.dec_num_heads, config.mlp_ratio) for _ in range(config.dec_depth)
            )

        self.decoder_embed = nn.Linear(config.enc_embed_dim, config.dec_embed_dim)
        self.dec_blocks = decoder()
        self.dec_blocks2 = decoder()
        self.dec_norm = nn.LayerNorm(config.dec_embed_dim, eps=LAYER_NORM_EPS)
        self.downstream_head1 = PredictionHead(config)
        self.downstream_head2 = PredictionHead(config)

    def encode(self, image: Tensor) -> Tensor:
        """image (B, 3, H, W) float32 in [-1, 1], H and W multiples of 16 -> features (B, h, w, C_enc)."""
        config = self.config
        x = self.patch_embed(image)
        rows, cols = x.shape[2:]
        rotation = rope_2d(rows, cols, config.enc_embed_dim // config.enc_num_heads, config.rope_base)
        x = x.flatten(2).transpose(1, 2)  # (B, N, C_enc)
        for block in self.enc_blocks:
            x = block(x, rotation)
        return self.enc_norm(x).unflatten(1, (rows, cols))

    def decode_tokens(self, features1: Tensor, features2: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Tokens of both views after the embedding's input and after every decoder block: depth + 1 tensors (B, N, C) each.

        The first entry is the encoder's output, the last has passed the final norm.
        """
        config = self.config
        head_dim = config.dec_embed_dim // config.dec_num_heads
        rotation1 = rope_2d(features1.shape[1], features1.shape[2], head_dim, config.rope_base)
        rotation2 = rope_2d(features2.shape[1], features2.shape[2], head_dim, config.rope_base)
        tokens1, tokens2 = [features1.flatten(1, 2)], [features2.flatten(1, 2)]
        x1, x2 = self.decoder_embed(tokens1[0]), self.decoder_embed(tokens2[0])
        for block1, block2 in zip(self.dec_blocks, self.dec_blocks2, strict=True):
            # Both views read the other's tokens from before this layer.
            x1, x2 = block1(x1, x2, rotation1, rotation2), block2(x2, x1, rotation2, rotation1)
            tokens1.append(x1)
            tokens2.append(x2)
        tokens1[-1], tokens2[-1] = self.dec_norm(x1), self.dec_norm(x2)
        return tokens1, tokens2

    def decode(self, features1: Tensor, features2: Tensor) -> dict[str, Tensor]:
        """Two feature maps (B, h, w, C_enc), each of its own size -> maps of both views in view 1's frame.

        Returns pts3d{1,2} (B, H, W, 3), conf{1,2} (B, H, W), desc{1,2} (B, H, W, D) of unit norm, desc_conf{1,2} (B, H, W).
        """
        tokens1, tokens2 = self.decode_tokens(features1, features2)
        levels = self.config.dpt_hooks
        outputs: dict[str, Tensor] = {}
        for view, head, tokens, features in (
            (1, self.downstream_head1, tokens1, features1),
            (2, self.downstream_head2, tokens2, features2),
        ):
            maps = head([tokens[i] for i in levels], features.shape[1], features.shape[2])
            outputs |= {f"{name}{view}": value for name, value in maps.items()}
        return outputs

    def forward(self, image1: Tensor, image2: Tensor) -> dict[str, Tensor]:
        return self.decode(self.encode(image1), self.encode(image2))
