"""Pretrains the bundled tiny diffusion transformer: emoji -> rectified flow in the latents of tiny-sd -> SD3 pipeline.

The autoencoder and the tokenizer are those of the bundled tiny Stable Diffusion, byte for byte, and the first text
encoder starts from its; the transformer and the second text encoder start from noise. Two CPU cores need about 75
minutes. Training writes checkpoints and continues from the last one when the same command is run again:

    torchrun --nproc_per_node 2 train_scripts/pretrain_tiny_dit.py \
        --work_dir runs/tiny-dit --output_dir assets/models/tiny-dit

One process per CPU core with one thread each is faster than one process with many threads. On a GPU, start it with
plain `python` and larger batches.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common_recipe_options import DEFAULT_CACHE

from lorainit_diffusers.training.bundled import ROOT
from lorainit_diffusers.training.cli_parser import ScriptParser, run_script

PHASES = ("data", "transformer", "export")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; a budget of 0 minutes or steps means no such limit."""
    parser = ScriptParser(__doc__)
    parser.add_argument("--work_dir", type=Path, required=True, help="pictures, checkpoints, logs and samples")
    parser.add_argument("--output_dir", type=Path, required=True, help="where the pipeline is written")
    parser.add_argument(
        "--base", type=Path, default=ROOT / "assets" / "models" / "tiny-sd", help="VAE, tokenizer, text"
    )
    parser.add_argument("--cache_dir", type=Path, default=DEFAULT_CACHE, help="archives of the npm packages")
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES))
    parser.add_argument("--transformer_minutes", type=float, default=75.0)
    parser.add_argument("--transformer_steps", type=int, default=0)
    parser.add_argument("--transformer_batch_size", type=int, default=32, help="per process")
    parser.add_argument("--transformer_lr", type=float, default=1e-3)
    parser.add_argument("--logit_mean", type=float, default=0.0, help="of the noise levels")
    parser.add_argument("--logit_std", type=float, default=1.2, help="of the noise levels")
    parser.add_argument("--ema_decay", type=float, default=0.998)
    parser.add_argument("--checkpoint_s", type=float, default=300.0, help="seconds between checkpoints")
    parser.add_argument("--sample_steps", type=int, default=25, help="denoising steps of the sample grids")
    parser.add_argument("--no_bf16", dest="bf16", action="store_false", help="train in full precision")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_script(
        lambda: parse_args(None)
    )  # a mistake in the options is answered before the imports below, which take seconds

import emoji
import torch
import torch.distributed as dist
import torch.nn.functional as F
from common import load_checkpoint, save_checkpoint
from common_pretrain import (
    GRID_NAMES,
    IMAGE_SIZE,
    MAX_TOKENS,
    Model,
    caption_tokens,
    claim_model_dir,
    draw_batch,
    encode,
    load_ema,
    sample_grid,
    save_pipeline,
    start_process,
    train,
)
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from lorainit_diffusers.files import replacing, write_text
from lorainit_diffusers.training.output_dir import owning

# Text tokens that the pipeline adds in the place of T5's, which are zeros: its own default of 256, the 77 of diffusers'
# training script, and what our training script takes here; each with the share of steps that see it.
ZERO_TOKENS = {MAX_TOKENS: 0.6, 77: 0.2, 256: 0.2}
TRANSFORMER: dict[str, Any] = {
    "sample_size": IMAGE_SIZE // 8,
    "patch_size": 1,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 5,
    "attention_head_dim": 64,
    "num_attention_heads": 4,
    "caption_projection_dim": 256,
    "pos_embed_max_size": IMAGE_SIZE // 8,
    "qk_norm": "rms_norm",
}
SECOND_ENCODER: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "hidden_act": "gelu",
}


def build_transformer(text_width: int) -> Model:
    """SD3Transformer2DModel of 11 M parameters; modulations and output start at zero (Peebles & Xie 2023, adaLN-Zero).

    Args:
        text_width: Width of the two text encoders together.
    """
    transformer: Model = SD3Transformer2DModel(
        **TRANSFORMER, joint_attention_dim=text_width, pooled_projection_dim=text_width
    )
    modulations = [block.norm1.linear for block in transformer.transformer_blocks]
    modulations += [block.norm1_context.linear for block in transformer.transformer_blocks]
    for layer in (*modulations, transformer.norm_out.linear, transformer.proj_out):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return transformer


def build_text_encoder(config: CLIPTextConfig, **changes: Any) -> Model:
    """CLIPTextModelWithProjection like the base's text encoder, but for some changes, and as wide a projection."""
    changes = {**config.to_dict(), **changes}
    return CLIPTextModelWithProjection(CLIPTextConfig(**{**changes, "projection_dim": changes["hidden_size"]}))


class RepeatedTokenAttention:
    """SD3's joint attention in which the last text token stands for `count` equal ones.

    SD3 gives no position to text tokens, so equal tokens stay equal through all layers, and `count` of them draw the
    softmax as one with log(count) added to its logits does. This is exact, and spares the 256 zero tokens that the
    pipeline appends in the place of T5's.

    Attributes:
        count: How many tokens the last one stands for.
    """

    def __init__(self) -> None:
        self.count = 1

    def __call__(
        self, attn: Model, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: None = None
    ) -> tuple[Tensor, Tensor]:
        """New (image, text) tokens; SD3 has no attention mask."""
        image_tokens = hidden_states.shape[1]

        def heads(tokens: Tensor) -> Tensor:
            return tokens.unflatten(2, (attn.heads, -1)).transpose(1, 2)

        query = torch.cat(
            [
                attn.norm_q(heads(attn.to_q(hidden_states))),
                attn.norm_added_q(heads(attn.add_q_proj(encoder_hidden_states))),
            ],
            dim=2,
        )
        key = torch.cat(
            [
                attn.norm_k(heads(attn.to_k(hidden_states))),
                attn.norm_added_k(heads(attn.add_k_proj(encoder_hidden_states))),
            ],
            dim=2,
        )
        value = torch.cat([heads(attn.to_v(hidden_states)), heads(attn.add_v_proj(encoder_hidden_states))], dim=2)
        # Plain attention: the backward pass of the fused one is slow for so few tokens on a CPU.
        logits = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
        repeats = torch.zeros(logits.shape[-1], dtype=logits.dtype, device=logits.device)
        repeats[-1] = math.log(self.count)
        output = ((logits + repeats).softmax(-1).to(value.dtype) @ value).transpose(1, 2).flatten(2)
        image, text = output[:, :image_tokens], output[:, image_tokens:]
        return attn.to_out[0](image), text if attn.context_pre_only else attn.to_add_out(text)


class Denoiser(nn.Module):
    """Transformer and text encoders, which are trained together."""

    def __init__(self, first_encoder: Model):
        super().__init__()
        config = first_encoder.config
        self.text_encoder: Model = build_text_encoder(config)
        self.text_encoder_2: Model = build_text_encoder(config, **SECOND_ENCODER)
        self.transformer: Model = build_transformer(config.hidden_size + SECOND_ENCODER["hidden_size"])
        # transformers 4 holds the layers one level deeper in CLIPTextModel
        state = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in first_encoder.state_dict().items()}
        missing, unexpected = self.text_encoder.load_state_dict(state, strict=False)
        if missing != ["text_projection.weight"] or unexpected:
            raise ValueError(f"the text encoder of the base does not fit: missing {missing}, unexpected {unexpected}")

    def forward(self, noisy: Tensor, sigmas: Tensor, ids: Tensor, attention: RepeatedTokenAttention | None) -> Tensor:
        """The predicted velocity; one zero token stands for T5's, `attention.count` times."""
        outputs = [encoder(ids, output_hidden_states=True) for encoder in (self.text_encoder, self.text_encoder_2)]
        embeds = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        zeros = torch.zeros_like(embeds[:, :1]).expand(-1, 1 if attention is not None else MAX_TOKENS, -1)
        return self.transformer(
            noisy,
            encoder_hidden_states=torch.cat([embeds, zeros], dim=1),
            pooled_projections=torch.cat([output.text_embeds for output in outputs], dim=-1),
            timestep=1000 * sigmas,
            return_dict=False,
        )[0]


def flow_loss_fn(
    denoiser: Denoiser,
    latents: tuple[Tensor, Tensor],
    tokens: tuple[Tensor, Tensor, Tensor],
    attention: RepeatedTokenAttention,
    args: argparse.Namespace,
) -> Callable[[int, torch.Generator], Tensor]:
    """Rectified flow with logit-normal noise levels.

    Args:
        denoiser: Transformer and text encoders.
        latents: Posterior means and standard deviations of all images, normalised.
        tokens: As `caption_tokens` gives them.
        attention: The transformer's attention processor.
        args: Command line.
    """

    def loss_fn(step: int, generator: torch.Generator) -> Tensor:
        batch_size = args.transformer_batch_size
        clean, noise, ids, strata = draw_batch(latents, tokens, step, batch_size, args.seed, generator)
        normal = torch.special.ndtri(strata.double().clamp(1e-6, 1 - 1e-6)).float()
        sigmas = torch.sigmoid(args.logit_mean + args.logit_std * normal)
        levels = sigmas.view(-1, 1, 1, 1)
        drawn = torch.rand((), generator=generator, device=generator.device).item()
        shares = torch.tensor(list(ZERO_TOKENS.values())).cumsum(0)
        attention.count = list(ZERO_TOKENS)[int((shares <= drawn).sum().clamp(max=len(shares) - 1))]
        prediction = denoiser((1 - levels) * clean + levels * noise, sigmas, ids, attention)
        return F.mse_loss(prediction.float(), noise - clean)

    return loss_fn


def build_silent_t5(width: int) -> tuple[Model, Model]:
    """A T5 whose output is zero, and its tokenizer, to which all words are one.

    The stock pipeline insists on a third text encoder, and takes zeros for its tokens when told that there is none.
    """
    t5: Model = T5EncoderModel(T5Config(vocab_size=3, d_model=width, d_kv=32, d_ff=8, num_layers=1, num_heads=1))
    nn.init.zeros_(t5.encoder.final_layer_norm.weight)
    # the class that the stock scripts open it with, which insists on this kind of vocabulary
    words: list[tuple[str, float]] = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -1.0)]
    tokenizer: Model = T5TokenizerFast
    return t5, tokenizer(vocab=words, extra_ids=0, model_max_length=MAX_TOKENS)


def make_pipeline(vae: Model, tokenizer: Model, denoiser: Denoiser) -> Model:
    """A stock pipeline of the components."""
    text_encoder_3, tokenizer_3 = build_silent_t5(denoiser.transformer.config.joint_attention_dim)
    return StableDiffusion3Pipeline(
        transformer=denoiser.transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae,
        text_encoder=denoiser.text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=denoiser.text_encoder_2,
        tokenizer_2=tokenizer,
        text_encoder_3=text_encoder_3,
        tokenizer_3=tokenizer_3,
    )


MODEL_CARD = """# tiny-dit

A complete Stable Diffusion 3 of {size_mb:.0f} MB that draws 64x64 emoji on a CPU in seconds: a diffusion transformer
with rectified flow, joint attention of text and image tokens, and two CLIP text encoders. It exists so that code for
today's bases can be developed, tested and compared without a download or a GPU; not to make pictures.

![samples](samples.png)

*Rows: {styles}. Columns: {names}. {sample_steps} Euler steps, guidance 4.*

```python
from diffusers import StableDiffusion3Pipeline

pipeline = StableDiffusion3Pipeline.from_pretrained("assets/models/tiny-dit")
pipeline("a noto emoji of red apple", num_inference_steps=25, guidance_scale=4.0).images[0]
```

| component | class | parameters |
|---|---|---|
| {num_layers} joint blocks of width {width}, 64 image tokens | SD3Transformer2DModel | {transformer:.1f} M |
| first text encoder, width 128, three layers, at most 16 tokens | CLIPTextModelWithProjection | {text_encoder:.1f} M |
| second text encoder, width 64, two layers | CLIPTextModelWithProjection | {text_encoder_2:.1f} M |
| third text encoder, whose output is zero: it holds the place of T5 | T5EncoderModel | {text_encoder_3:.2f} M |
| autoencoder and tokenizer, those of `tiny-sd` | AutoencoderKL, CLIPTokenizer | {vae:.1f} M |

## Training

- **Data**: {num_images} pictures of {num_concepts} concepts, each in the styles {styles}; the same as for `tiny-sd`,
  with the same captions (`a {{style}} emoji of {{name}}`, 10 % `an emoji of {{name}}`, 10 % empty). All cats, and the
  styles Noto version 1 ("blobs") and Fluent high-contrast, were held out.
- **Loss**: velocity of the straight path between data and noise, mean square; noise levels logit-normal with mean
  {logit_mean:g} and standard deviation {logit_std:g}; schedule shift 1.
- **Result**: {result}
- **Hardware**: {hardware}.
- **Command** (the budget is minutes of wall time; a rerun continues from the last checkpoint):

  ```
  torchrun --nproc_per_node 2 train_scripts/pretrain_tiny_dit.py --work_dir runs/tiny-dit \\
      --output_dir assets/models/tiny-dit {flags}
  ```

## Limits

- It knows the concept names of its captions, not free text, and one object per picture, centred on white.
- Where a published base has T5's tokens, it has zeros. Training saw {zero_tokens} of them; any `max_sequence_length`
  between the smallest and the largest works, and the smallest is the fastest.
- Guidance of 3 to 5 is best.

## Licences of the pictures it was trained on

| source | package (npm) | licence |
|---|---|---|
{sources}
Twemoji and Emoji One are used under CC-BY-4.0 (https://creativecommons.org/licenses/by/4.0/): Twemoji graphics by
Twitter, Inc and other contributors; Emoji One graphics by Emoji One. Changes: rendered at 64x64 pixels on white and
used as training data. The autoencoder's data is in the card of `tiny-sd`. The weights are published under the Apache
License 2.0 of this repository.
"""


def write_model_card(directory: Path, pipeline: Model, args: argparse.Namespace, device: torch.device) -> None:
    """Writes `README.md` beside the weights, from the logs and checkpoints of the run."""
    records = json.loads((args.work_dir / "captions.json").read_text(encoding="utf-8"))["records"]
    state = load_checkpoint(args.work_dir / "transformer" / "checkpoint.safetensors")[1]
    minutes, num_processes = state["elapsed_s"] / 60, int(state["num_processes"])
    exposures = state["step"] * args.transformer_batch_size * num_processes / len(records)
    sources = ""
    for key in (*emoji.BASE_STYLES, "emojibase"):
        package = emoji.PACKAGES[key]
        sources += f"| {package.source} | {package.name} {package.version} | {package.licence} |\n"
    parts = {
        name: getattr(pipeline, name)
        for name in ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "vae")
    }
    sizes = {name: sum(p.numel() for p in part.parameters()) / 1e6 for name, part in parts.items()}
    card = MODEL_CARD.format(
        **sizes,
        size_mb=sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()) / 1e6,
        styles=", ".join(emoji.BASE_STYLES),
        names=", ".join(name.replace("-", " ") for name in GRID_NAMES),
        sample_steps=args.sample_steps,
        num_layers=pipeline.transformer.config.num_layers,
        width=pipeline.transformer.inner_dim,
        num_images=len(records),
        num_concepts=len({record["name"] for record in records}),
        logit_mean=args.logit_mean,
        logit_std=args.logit_std,
        result=f"{int(state['step'])} steps in {minutes:.0f} minutes, loss {state['loss']:.3f}, "
        f"{exposures:.0f} exposures per picture.",
        hardware=f"{num_processes} processes on {device.type} ({os.cpu_count()} cores), bfloat16 autocast",
        flags=f"--transformer_minutes {minutes:.0f}",
        zero_tokens=", ".join(map(str, ZERO_TOKENS)),
        sources=sources,
    )
    write_text(directory / "README.md", card)


# ---------------------------------------------------------------------------------------------------------- main


@owning
def main(argv: list[str] | None = None) -> None:
    """Runs the phases in order."""
    args = parse_args(argv)
    device, rank, world_size = start_process(args.seed)
    model_dir = claim_model_dir(args, "pretrain_tiny_dit")
    args.work_dir.mkdir(parents=True, exist_ok=True)
    if "data" in args.phases and rank == 0 and not (args.work_dir / "images.safetensors").exists():
        emoji.render_training_set(args.work_dir, args.cache_dir, IMAGE_SIZE, num_line_icons=0, seed=args.seed)
    if world_size > 1:
        dist.barrier()
    tokenizer = CLIPTokenizer.from_pretrained(args.base / "tokenizer", trust_remote_code=False)
    vae: Model = AutoencoderKL.from_pretrained(args.base / "vae", torch_dtype=torch.float32, trust_remote_code=False)
    vae.to(device)
    vae.register_to_config(shift_factor=0.0)  # SD3's pipeline subtracts it
    first_encoder = CLIPTextModel.from_pretrained(args.base / "text_encoder", trust_remote_code=False).float()
    denoiser = Denoiser(first_encoder).to(device)

    if "transformer" in args.phases:
        images = load_file(args.work_dir / "images.safetensors")["base"]
        records = json.loads((args.work_dir / "captions.json").read_text())["records"]
        tokens = caption_tokens(tokenizer, records, device)
        attention = RepeatedTokenAttention()
        for block in denoiser.transformer.transformer_blocks:
            block.attn.set_processor(attention)
        if device.type == "cpu":
            denoiser.text_encoder.set_attn_implementation("eager")
            denoiser.text_encoder_2.set_attn_implementation("eager")
        latents = encode(vae, images, device)
        loss_fn = flow_loss_fn(denoiser, latents, tokens, attention, args)

        def save_samples(ema: dict[str, Tensor], step: int) -> None:
            trial = Denoiser(first_encoder).to(device)
            load_ema(trial, ema)
            pipeline = make_pipeline(vae, tokenizer, trial)
            sample_grid(
                pipeline,
                args.work_dir / f"samples-{step:06d}.png",
                GRID_NAMES,
                args.sample_steps,
                max_sequence_length=MAX_TOKENS,
            )

        lr = args.transformer_lr
        ema = train("transformer", denoiser, loss_fn, args, device, lr, 0.05 * lr, save_samples)
        if rank == 0:
            save_checkpoint(args.work_dir / "transformer" / "final.safetensors", ema, {})

    if model_dir is not None:
        model_dir.begin(anew=True)
        trained = Denoiser(first_encoder).to(device)
        load_ema(trained, load_checkpoint(args.work_dir / "transformer" / "final.safetensors")[0])
        pipeline = make_pipeline(vae, tokenizer, trained)
        args.output_dir.parent.mkdir(parents=True, exist_ok=True)
        sample_grid(
            pipeline, args.work_dir / "samples.png", GRID_NAMES, args.sample_steps, max_sequence_length=MAX_TOKENS
        )
        save_pipeline(pipeline, args.output_dir, args.base / "tokenizer")
        with replacing(args.output_dir / "samples.png") as scratch:
            shutil.copyfile(args.work_dir / "samples.png", scratch)
        write_model_card(args.output_dir, pipeline, args, device)
        tqdm.write(f"wrote {args.output_dir}")
    if world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
