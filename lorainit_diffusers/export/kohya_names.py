"""Layer names in the kohya file format, which sd-scripts, ComfyUI and A1111 read; string functions only.

A key is `{prefix}_{layer name with _ for .}.{lora_down.weight | lora_up.weight | alpha | dora_scale}`. For SD 1.x and
2.x the UNet's layer names are those of diffusers. For SDXL they are those of the original UNet (Stability's
generative-models, "SGM", which has latent-diffusion's layout), because sd-scripts trains that one:

============================================  ====================================================
diffusers                                     original, for L = `layers_per_block`
============================================  ====================================================
`down_blocks.b.{resnets,attentions}.j`      `input_blocks.{1 + b (L + 1) + j}.{0,1}`
`mid_block.resnets.0`, `.attentions.0`,   `middle_block.0`, `.1`,
`.resnets.1`                                `.2`
`up_blocks.b.{resnets,attentions}.j`        `output_blocks.{b (L + 1) + j}.{0,1}`
`(a resnet).time_emb_proj`                  `(a resnet).emb_layers.1`
`time_embedding.linear_{1,2}`               `time_embed.{0,2}`
`add_embedding.linear_{1,2}`                `label_emb.0.{0,2}`
============================================  ====================================================

`input_blocks.0` is the first convolution, and every down block ends in one more input block, its downsampler. Names
inside an attention block (`transformer_blocks.0.attn1.to_q`, `proj_in`, ...) are the same in both.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

# Component -> key prefix. SDXL's files number the text encoders.
PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te"}
SDXL_PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}

_EMBEDDINGS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_BLOCK = re.compile(r"(down_blocks|up_blocks)\.(\d+)\.(resnets|attentions)\.(\d+)\.(.+)")
_MID_BLOCK = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")


def sgm_layer_name(name: str, layers_per_block: Sequence[int]) -> str:
    """The original SDXL UNet's name of a linear layer of diffusers' `UNet2DConditionModel`.

    Args:
        name: diffusers' name, such as `down_blocks.1.attentions.0.proj_in`.
        layers_per_block: Number of resnets of each down block, from the UNet's configuration; up blocks have one more,
            in reversed order.

    Raises:
        ValueError: The original UNet has no such layer.
    """
    if name in _EMBEDDINGS:
        return _EMBEDDINGS[name]
    if match := _BLOCK.fullmatch(name):
        side, block, kind, index, inner = match.groups()
        down = side == "down_blocks"
        layers = layers_per_block if down else layers_per_block[::-1]
        start = int(down) + sum(count + 1 for count in layers[: int(block)])
        outer = f"{'input' if down else 'output'}_blocks.{start + int(index)}.{int(kind == 'attentions')}"
    elif match := _MID_BLOCK.fullmatch(name):
        kind, index, inner = match.groups()
        outer = f"middle_block.{2 * int(index) + int(kind == 'attentions')}"
    else:
        kind, inner, outer = "", "", ""
    if kind == "attentions":
        return f"{outer}.{inner}"
    if kind == "resnets" and inner == "time_emb_proj":
        return f"{outer}.emb_layers.1"
    raise ValueError(
        f"layer {name!r} has no counterpart in the original SDXL UNet; save it in the diffusers format, "
        "or pass sdxl=False to keep diffusers' layer names"
    )
