"""The model as it is trained: fused attention, mixed precision, blocks compiled one by one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smc.compiler import model
from smc.compiler.model import Mast3r, PredictionHead


def initialise(network: Mast3r) -> None:
    """As vision transformers are: uniform weights of Glorot's scale, biases 0. Convolutions keep torch's own.

    But for the descriptors' last layer: it starts with the same weights for all pixels of a patch. With weights of their own, a pixel's
    descriptor tells at first where in its patch the pixel is, whatever the patch shows, and InfoNCE stays at the logarithm of the number
    of negatives for as long as anybody has waited (600 steps of pairs that are easy); from equal ones it falls in the first hundred.
    """
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    embed = network.patch_embed.proj
    assert isinstance(embed, nn.Conv2d)
    nn.init.xavier_uniform_(embed.weight.flatten(1))
    for head in (network.downstream_head1, network.downstream_head2):
        last = head.dpt.head[-1]
        assert isinstance(last, nn.Conv2d)
        assert last.bias is not None
        with torch.no_grad():
            last.bias.copy_(torch.tensor([0.0, 0.0, 1.0, 0.0]))  # points start in front of the camera
            by_pixel = head.head_local_features.fc2.weight.unflatten(0, (-1, network.config.patch_size**2))
            by_pixel.copy_(by_pixel[:, :1].clone().expand_as(by_pixel))


def compile_parts(network: Mast3r) -> None:
    """Compile one block of each kind and the heads, when they first run; a part that cannot be compiled runs as it is.

    Part by part, as all blocks of a kind share one program: tens of seconds instead of minutes for the whole network.
    """
    import torch._dynamo

    torch._dynamo.config.suppress_errors = True
    torch._dynamo.config.recompile_limit = 64
    for block in (*network.enc_blocks, *network.dec_blocks, *network.dec_blocks2):
        block.compile(dynamic=False)
    for head in (network.downstream_head1, network.downstream_head2):
        head.compile(dynamic=False)


def _fused_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As `model.attention`; the rotation has made q and k float32."""
    out = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)
    return out.transpose(1, 2).flatten(2)


@contextlib.contextmanager
def trainable_functions(device: torch.device) -> Iterator[None]:
    """Within, the model's attention is torch's fused one, its rotation tables, written to be made anew for export, are kept, and the
    activations of its outputs are float32 whatever comes in.

    It exchanges functions of the module `model`, so nothing else may use that module meanwhile.
    """
    make, attend, to_points, to_confidence = model.rope_2d, model.attention, model.activate_points, model.activate_confidence
    tables: dict[Any, model.Rotation] = {}

    def kept(*key: Any) -> model.Rotation:
        if key not in tables:
            cos, sin = make(*key)
            tables[key] = cos.to(device), sin.to(device)
        return tables[key]

    model.rope_2d, model.attention = kept, _fused_attention  # type: ignore[assignment]  # it forgets the arguments' names
    model.activate_points = lambda xyz, kind: to_points(xyz.float(), kind)
    model.activate_confidence = lambda x, mode: to_confidence(x.float(), mode)
    try:
        yield
    finally:
        model.rope_2d, model.attention, model.activate_points, model.activate_confidence = make, attend, to_points, to_confidence


def forward(network: Mast3r, images: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """uint8 images (B, 3, H, W) of one size -> the maps of `Mast3r.decode`, float32.

    On a GPU it runs in bfloat16, which needs no loss scaling, but for the outputs' activations.
    """
    device = images[0].device
    pairs = len(images[0])
    stacked = torch.cat(images).float() / 127.5 - 1
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
        features = network.encode(stacked)
        tokens = network.decode_tokens(features[:pairs], features[pairs:])
        maps: dict[str, Tensor] = {}
        heads: tuple[PredictionHead, PredictionHead] = (network.downstream_head1, network.downstream_head2)
        for view, head, levels in zip((1, 2), heads, tokens, strict=True):
            found = head([levels[i] for i in network.config.dpt_hooks], features.shape[1], features.shape[2])
            maps |= {f"{name}{view}": value.float() for name, value in found.items()}
    return maps
