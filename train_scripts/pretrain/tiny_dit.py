r"""Pretrains the bundled tiny diffusion transformer: emoji -> rectified flow in the latents of tiny-sd -> SD3 pipeline.

The autoencoder and the tokenizer are those of the bundled tiny Stable Diffusion, byte for byte, and the first text
encoder starts from its; the transformer and the second text encoder start from noise. Two CPU cores need about 75
minutes. Training writes checkpoints and continues from the last one when the same command is run again:

    torchrun --nproc_per_node 2 train_scripts/pretrain/tiny_dit.py \
        --work_dir runs/tiny-dit --output_dir assets/models/tiny-dit

One process per CPU core with one thread each is faster than one process with many threads. On a GPU, start it with
plain `python` and larger batches.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from typing import Any, cast

from recipe_options import TinyDitOptions

from lorainit_diffusers.training.cli import run_script
from lorainit_diffusers.training.options.parser import parse_options


def parse_args(argv: Sequence[str] | None = None) -> TinyDitOptions:
    """The options of the command line."""
    return parse_options(TinyDitOptions, argv, __doc__)


if __name__ == "__main__":
    run_script(parse_args)  # a mistake in the options is answered before the imports below, which take seconds

import emoji_pictures as emoji
import torch
import torch.nn.functional as F
import transformers
from cards import num_parameters, picture_source, write_card
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusion import GRID_NAMES, caption_tokens, draw_batch, encode, sample_grid, save_pipeline
from safetensors.torch import load_file
from shared import (
    IMAGE_SIZE,
    MAX_TOKENS,
    Budget,
    Model,
    Phase,
    claim_model_dir,
    leave_processes,
    load_checkpoint,
    load_ema,
    save_checkpoint,
    start_process,
    train,
    wait_for_all,
)
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
)

from lorainit_diffusers.files import replacing
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
    options: TinyDitOptions,
) -> Callable[[int, torch.Generator], Tensor]:
    """Rectified flow with logit-normal noise levels.

    Args:
        denoiser: Transformer and text encoders.
        latents: Posterior means and standard deviations of all images, normalised.
        tokens: As `caption_tokens` gives them.
        attention: The transformer's attention processor.
        options: Of the recipe.
    """

    def loss_fn(step: int, generator: torch.Generator) -> Tensor:
        batch_size = options.transformer_batch_size
        clean, noise, ids, strata = draw_batch(latents, tokens, step, batch_size, options.seed, generator)
        normal = torch.special.ndtri(strata.double().clamp(1e-6, 1 - 1e-6)).float()
        sigmas = torch.sigmoid(options.logit_mean + options.logit_std * normal)
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
    return t5, cast(Any, transformers).T5TokenizerFast(vocab=words, extra_ids=0, model_max_length=MAX_TOKENS)


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


def write_model_card(pipeline: Model, options: TinyDitOptions, device: torch.device) -> None:
    """Writes `README.md` beside the weights, from the logs and checkpoints of the run."""
    records = json.loads((options.work_dir / "captions.json").read_text(encoding="utf-8"))["records"]
    state = load_checkpoint(options.work_dir / "transformer" / "checkpoint.safetensors")[1]
    minutes, num_processes = state["elapsed_s"] / 60, int(state["num_processes"])
    parts = ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "vae")
    write_card(
        options.output_dir,
        "tiny_dit.md.jinja",
        parameters={name: num_parameters(getattr(pipeline, name)) for name in parts},
        styles=emoji.BASE_STYLES,
        names=[emoji.words(name) for name in GRID_NAMES],
        sample_steps=options.sample_steps,
        num_layers=pipeline.transformer.config.num_layers,
        width=pipeline.transformer.inner_dim,
        num_images=len(records),
        num_concepts=len({record["name"] for record in records}),
        logit_mean=options.logit_mean,
        logit_std=options.logit_std,
        num_steps=int(state["step"]),
        minutes=minutes,
        loss=state["loss"],
        exposures=state["step"] * options.transformer_batch_size * num_processes / len(records),
        hardware=f"{num_processes} processes on {device.type} ({os.cpu_count()} cores), bfloat16 autocast",
        flags=f"--transformer_minutes {minutes:.0f}",
        zero_tokens=ZERO_TOKENS,
        sources=[picture_source(key) for key in (*emoji.BASE_STYLES, "emojibase")],
    )


# ---------------------------------------------------------------------------------------------------------- main


def train_transformer(
    denoiser: Denoiser,
    vae: Model,
    tokenizer: Model,
    first_encoder: Model,
    options: TinyDitOptions,
    device: torch.device,
) -> dict[str, Tensor]:
    """Trains transformer and text encoders; returns the averaged weights by name."""
    images = load_file(options.work_dir / "images.safetensors")["base"]
    records = json.loads((options.work_dir / "captions.json").read_text(encoding="utf-8"))["records"]
    attention = RepeatedTokenAttention()
    for block in denoiser.transformer.transformer_blocks:
        block.attn.set_processor(attention)
    if device.type == "cpu":
        denoiser.text_encoder.set_attn_implementation("eager")
        denoiser.text_encoder_2.set_attn_implementation("eager")
    tokens = caption_tokens(tokenizer, records, device)
    latents = encode(vae, images, device)
    loss_fn = flow_loss_fn(denoiser, latents, tokens, attention, options)

    def save_samples(ema: dict[str, Tensor], step: int) -> None:
        trial = Denoiser(first_encoder).to(device)
        load_ema(trial, ema)
        save_grid(make_pipeline(vae, tokenizer, trial), f"samples-{step:06d}.png", options)

    budget = Budget(options.transformer_minutes, options.transformer_steps)
    phase = Phase("transformer", budget, options.transformer_lr, 0.05 * options.transformer_lr)
    return train(phase, denoiser, loss_fn, options, device, save_samples)


def save_grid(pipeline: Model, name: str, options: TinyDitOptions) -> None:
    """Writes a grid of samples into the work folder."""
    path, steps = options.work_dir / name, options.sample_steps
    sample_grid(pipeline, path, GRID_NAMES, steps, max_sequence_length=MAX_TOKENS)


@owning
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the phases in order."""
    options = parse_args(argv)
    device, rank, _ = start_process(options.seed)
    model_dir = claim_model_dir(options, "tiny_dit")
    options.work_dir.mkdir(parents=True, exist_ok=True)
    if "data" in options.phases and rank == 0 and not (options.work_dir / "images.safetensors").exists():
        emoji.render_training_set(options.work_dir, options.cache_dir, IMAGE_SIZE, num_line_icons=0, seed=options.seed)
    wait_for_all()
    tokenizer = CLIPTokenizer.from_pretrained(options.base / "tokenizer", trust_remote_code=False)
    vae: Model = AutoencoderKL.from_pretrained(options.base / "vae", torch_dtype=torch.float32, trust_remote_code=False)
    vae.to(device)
    vae.register_to_config(shift_factor=0.0)  # SD3's pipeline subtracts it
    first_encoder = CLIPTextModel.from_pretrained(options.base / "text_encoder", trust_remote_code=False).float()
    denoiser = Denoiser(first_encoder).to(device)
    final_path = options.work_dir / "transformer" / "final.safetensors"
    if "transformer" in options.phases:
        ema = train_transformer(denoiser, vae, tokenizer, first_encoder, options, device)
        if rank == 0:
            save_checkpoint(final_path, ema, {})
    if model_dir is not None:
        model_dir.begin(anew=True)
        trained = Denoiser(first_encoder).to(device)
        load_ema(trained, load_checkpoint(final_path)[0])
        pipeline = make_pipeline(vae, tokenizer, trained)
        options.output_dir.parent.mkdir(parents=True, exist_ok=True)
        save_grid(pipeline, "samples.png", options)
        save_pipeline(pipeline, options.output_dir, options.base / "tokenizer")
        with replacing(options.output_dir / "samples.png") as scratch:
            shutil.copyfile(options.work_dir / "samples.png", scratch)
        write_model_card(pipeline, options, device)
        tqdm.write(f"wrote {options.output_dir}")
    leave_processes()


if __name__ == "__main__":
    run_script(main)
