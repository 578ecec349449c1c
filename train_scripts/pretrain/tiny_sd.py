r"""Pretrains the bundled tiny Stable Diffusion: emoji -> tokenizer -> VAE -> U-Net and text encoder -> pipeline.

Two CPU cores need about two hours. Every phase ends after its wall-time or step budget, writes checkpoints, and
continues from the last one when the same command is run again:

    torchrun --nproc_per_node 2 train_scripts/pretrain/tiny_sd.py \
        --work_dir runs/tiny-sd --output_dir assets/models/tiny-sd

One process per CPU core with one thread each is faster than one process with many threads: the pictures are small. On a
GPU, start it with plain `python` and larger batches.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from recipe_options import TinySdOptions

from lorainit_diffusers.training.cli import run_script
from lorainit_diffusers.training.options.parser import parse_options


def parse_args(argv: Sequence[str] | None = None) -> TinySdOptions:
    """The options of the command line."""
    return parse_options(TinySdOptions, argv, __doc__)


if __name__ == "__main__":
    run_script(parse_args)  # a mistake in the options is answered before the imports below, which take seconds

import emoji_pictures as emoji
import torch
import torch.nn.functional as F
from cards import num_parameters, picture_source, write_card
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from diffusion import GRID_NAMES, caption_tokens, draw_batch, encode, sample_grid, save_pipeline
from safetensors.torch import load_file
from shared import (
    IMAGE_SIZE,
    MAX_TOKENS,
    Budget,
    Model,
    Phase,
    batch_indices,
    claim_model_dir,
    leave_processes,
    load_checkpoint,
    load_ema,
    rank_and_count,
    save_checkpoint,
    start_process,
    train,
    wait_for_all,
)
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from lorainit_diffusers.files import replacing
from lorainit_diffusers.training.output_dir import owning

LATENT_CHANNELS = 16
TEXT_WIDTH = 128


# ----------------------------------------------------------------------------------------------------- tokenizer


def build_tokenizer(corpus: Iterable[str], directory: Path, vocab_size: int = 3000) -> Model:
    """Trains CLIP's byte-level BPE on the corpus and writes it in the formats of old and new transformers."""
    directory.mkdir(parents=True, exist_ok=True)
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(False)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        min_frequency=2,
        show_progress=False,
    )
    bpe.train_from_iterator([text.lower() for text in corpus], trainer)
    learned = json.loads(bpe.to_str())["model"]
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in learned["merges"]]
    # CLIP's order: bytes, bytes that end a word, merges, special tokens. A byte must exist in both forms, or an unknown
    # word would lose letters.
    tokens = sorted(alphabet) + [f"{byte}</w>" for byte in sorted(alphabet)]
    tokens += [a + b for a, b in merges] + ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    (directory / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    merges_text = "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges)
    (directory / "merges.txt").write_text(merges_text, encoding="utf-8")
    tokenizer = CLIPTokenizer.from_pretrained(directory, model_max_length=MAX_TOKENS, trust_remote_code=False)
    tokenizer.save_pretrained(directory)
    return tokenizer


# -------------------------------------------------------------------------------------------------------- models


def build_vae() -> Model:
    """AutoencoderKL of 5.9 M parameters; 64x64 pixels become 8x8 latents of 16 channels: the U-Net stays cheap."""
    config: dict[str, Any] = {
        "block_out_channels": (16, 48, 96, 192),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 1,
        "latent_channels": LATENT_CHANNELS,
        "mid_block_add_attention": False,
        "norm_num_groups": 8,
        "sample_size": IMAGE_SIZE,
        "scaling_factor": 1.0,
    }
    return AutoencoderKL(**config)


def build_unet() -> Model:
    """UNet2DConditionModel of 16.1 M parameters; `conv_out` is zero, so that training starts from the mean."""
    config: dict[str, Any] = {
        "sample_size": IMAGE_SIZE // 8,
        "in_channels": LATENT_CHANNELS,
        "out_channels": LATENT_CHANNELS,
        "block_out_channels": (128, 256),
        "down_block_types": ("CrossAttnDownBlock2D",) * 2,
        "up_block_types": ("CrossAttnUpBlock2D",) * 2,
        "layers_per_block": 1,
        "cross_attention_dim": TEXT_WIDTH,
        "attention_head_dim": (4, 8),  # diffusers reads this as the number of heads
        "time_embedding_dim": 256,  # half the usual width: keeps the pipeline below 45 MiB
        "norm_num_groups": 16,
    }
    unet: Model = UNet2DConditionModel(**config)
    nn.init.zeros_(unet.conv_out.weight)
    nn.init.zeros_(unet.conv_out.bias)
    return unet


def build_text_encoder(tokenizer: Model) -> Model:
    """CLIPTextModel of 1 M parameters."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=32,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


class Denoiser(nn.Module):
    """U-Net and text encoder, which are trained together."""

    def __init__(self, tokenizer: Model):
        super().__init__()
        self.unet: Model = build_unet()
        self.text_encoder: Model = build_text_encoder(tokenizer)


def build_scheduler() -> Model:
    """Stable Diffusion's noise schedule with velocity prediction."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


# ----------------------------------------------------------------------------------------------------------- VAE


def augment(images: Tensor, is_line: Tensor, generator: torch.Generator) -> Tensor:
    """Random flips, shifts, channel permutations, inversion, grey and, for line icons, two random colours.

    Args:
        images: `(batch, 3, height, width)` in [0, 1].
        is_line: `(batch,)` bool.
        generator: Of the images' device.
    """
    device = images.device

    def chance(probability: float) -> Tensor:
        return torch.rand(len(images), 1, 1, 1, generator=generator, device=device) < probability

    images = torch.where(chance(0.5), images.flip(3), images)
    ink, paper = torch.rand(2, len(images), 3, 1, 1, generator=generator, device=device)
    images = torch.where(chance(0.6) & is_line.view(-1, 1, 1, 1), ink + (paper - ink) * images, images)
    order = torch.randperm(3, generator=generator, device=device)
    images = torch.where(chance(0.3), images[:, order], images)
    images = torch.where(chance(0.1), images.mean(1, keepdim=True).expand_as(images), images)
    images = torch.where(chance(0.1), 1 - images, images)
    shift = torch.randint(-4, 5, (2,), generator=generator, device=device).tolist()
    return torch.roll(images, shift, dims=(2, 3))


def reconstruction_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """L1 + MSE + half the L1 of the differences between neighbouring pixels, which keeps lines and edges."""
    prediction = prediction.float()
    edges = sum(F.l1_loss(prediction.diff(dim=dim), target.diff(dim=dim)) for dim in (2, 3))
    return F.l1_loss(prediction, target) + F.mse_loss(prediction, target) + 0.5 * edges


def vae_loss_fn(
    vae: Model, images: Mapping[str, Tensor], options: TinySdOptions, device: torch.device, decoder_only: bool
) -> Callable[[int, torch.Generator], Tensor]:
    """Loss of a VAE step; with `decoder_only` the encoder is frozen and its latents get noise, as sampled ones have."""
    pixels = torch.cat([images["base"], images["vae"], images["lines"]])
    is_line = torch.arange(len(pixels)) >= len(pixels) - len(images["lines"])
    rank, world_size = rank_and_count()

    def loss_fn(step: int, generator: torch.Generator) -> Tensor:
        indices = batch_indices(step, options.vae_batch_size * world_size, len(pixels), options.seed)[rank::world_size]
        target = augment(pixels[indices].to(device).float() / 255, is_line[indices].to(device), generator) * 2 - 1
        if decoder_only:
            with torch.no_grad():
                latents = vae.encode(target).latent_dist.sample(generator).float()
            noise = torch.randn(latents.shape, generator=generator, device=device)
            return reconstruction_loss(vae.decode(latents + 0.1 * noise).sample, target)
        posterior = vae.encode(target).latent_dist
        loss = reconstruction_loss(vae.decode(posterior.sample(generator)).sample, target)
        return loss + options.kl_weight * posterior.kl().float().mean() / posterior.mean[0].numel()

    return loss_fn


@torch.no_grad()
def psnr(vae: Model, pixels: Tensor, device: torch.device) -> float:
    """Mean peak signal-to-noise ratio of reconstructions, in dB."""
    values = []
    for chunk in pixels.split(128):
        target = chunk.to(device).float() / 127.5 - 1
        output = vae.decode(vae.encode(target).latent_dist.mean).sample.clamp(-1, 1)
        values.append(-10 * torch.log10(((output - target) / 2).square().mean((1, 2, 3))))
    return torch.cat(values).mean().item()


@torch.no_grad()
def fold_normalisation(vae: Model, means: Tensor) -> None:
    """Makes every latent channel zero-mean and of unit variance by rescaling the two 1x1 convolutions around it.

    Stock pipelines know one number, `scaling_factor`; per-channel statistics must therefore live in the weights.
    """
    mean, std = means.mean((0, 2, 3)), means.std((0, 2, 3))
    channels = len(mean)
    quant, post = vae.quant_conv, vae.post_quant_conv
    post.bias += post.weight[:, :, 0, 0] @ mean
    post.weight *= std.view(1, -1, 1, 1)
    quant.weight[:channels] /= std.view(-1, 1, 1, 1)
    quant.bias[:channels] = (quant.bias[:channels] - mean) / std
    quant.bias[channels:] -= 2 * std.log()
    vae.register_to_config(scaling_factor=1.0)


# ------------------------------------------------------------------------------------------- U-Net and pipeline


def diffusion_loss_fn(
    denoiser: Denoiser,
    latents: tuple[Tensor, Tensor],
    tokens: tuple[Tensor, Tensor, Tensor],
    scheduler: Model,
    options: TinySdOptions,
) -> Callable[[int, torch.Generator], Tensor]:
    """Velocity prediction with plain MSE.

    Args:
        denoiser: U-Net and text encoder.
        latents: Posterior means and standard deviations of all images, normalised.
        tokens: As `caption_tokens` gives them.
        scheduler: Gives noise schedule and target.
        options: Of the recipe.
    """

    def loss_fn(step: int, generator: torch.Generator) -> Tensor:
        clean, noise, ids, strata = draw_batch(latents, tokens, step, options.unet_batch_size, options.seed, generator)
        timesteps = (strata * scheduler.config.num_train_timesteps).long()
        noisy = scheduler.add_noise(clean, noise, timesteps)
        target = scheduler.get_velocity(clean, noise, timesteps)
        prompt_embeds = denoiser.text_encoder(ids)[0]
        return F.mse_loss(denoiser.unet(noisy, timesteps, prompt_embeds).sample.float(), target)

    return loss_fn


def make_pipeline(vae: Model, text_encoder: Model, tokenizer: Model, unet: Model) -> Model:
    """A stock pipeline of the components."""
    absent: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return StableDiffusionPipeline(vae, text_encoder, tokenizer, unet, build_scheduler(), **absent)


def write_model_card(pipeline: Model, options: TinySdOptions, device: torch.device) -> None:
    """Writes `README.md` beside the weights, from the logs and checkpoints of the run."""
    records = json.loads((options.work_dir / "captions.json").read_text(encoding="utf-8"))["records"]
    images = load_file(options.work_dir / "images.safetensors")
    pipeline.vae.to(device).float()  # as saved: the weights went through half precision
    scores = {key: psnr(pipeline.vae, images[key], device) for key in ("base", "valid")}
    results: list[str] = []
    flags: list[str] = []
    num_processes = 1
    for phase in ("vae", "unet", "decoder"):
        path = options.work_dir / phase / "checkpoint.safetensors"
        if path.exists():
            state = load_checkpoint(path)[1]
            minutes = state["elapsed_s"] / 60
            results.append(f"{phase} {int(state['step'])} steps in {minutes:.0f} minutes, loss {state['loss']:.3f}")
            flags.append(f"--{phase}_minutes {minutes:.0f}")
            if phase == "unet":
                num_processes = int(state["num_processes"])
                exposures = state["step"] * options.unet_batch_size * num_processes / len(records)
                results[-1] += f" (velocity MSE), {exposures:.0f} exposures per picture"
    results.append(
        f"autoencoder PSNR {scores['base']:.1f} dB on the training pictures, {scores['valid']:.1f} dB held out"
    )
    uses = dict.fromkeys(emoji.BASE_STYLES, "all") | dict.fromkeys(emoji.LINE_ICONS, "autoencoder")
    uses |= {"emojibase": "names and groups, tokenizer"}
    write_card(
        options.output_dir,
        "tiny_sd.md.jinja",
        parameters={name: num_parameters(getattr(pipeline, name)) for name in ("unet", "text_encoder", "vae")},
        styles=emoji.BASE_STYLES,
        names=[emoji.words(name) for name in GRID_NAMES],
        sample_steps=options.sample_steps,
        vocab_size=len(pipeline.tokenizer),
        num_images=len(records),
        num_concepts=len({record["name"] for record in records}),
        results=results,
        hardware=f"{num_processes} processes on {device.type} ({os.cpu_count()} cores), bfloat16 autocast",
        flags=" ".join(flags),
        sources=[picture_source(key, use=use) for key, use in uses.items()],
    )


# ---------------------------------------------------------------------------------------------------------- main


def make_data(options: TinySdOptions, tokenizer_dir: Path) -> None:
    """Renders the pictures and trains the tokenizer, where they are missing."""
    if not (options.work_dir / "images.safetensors").exists():
        emoji.render_training_set(options.work_dir, options.cache_dir, IMAGE_SIZE, options.num_line_icons, options.seed)
    if not (tokenizer_dir / "merges.txt").exists():
        captions = json.loads((options.work_dir / "captions.json").read_text(encoding="utf-8"))
        texts = [emoji.caption(record["style"], record["name"]) for record in captions["records"]]
        build_tokenizer(texts + captions["corpus"], tokenizer_dir)


def train_vae(vae: Model, images: Mapping[str, Tensor], options: TinySdOptions, device: torch.device) -> None:
    """Trains the autoencoder and normalises its latents; leaves the averaged weights in it."""
    loss_fn = vae_loss_fn(vae, images, options, device, decoder_only=False)

    def report(ema: dict[str, Tensor], step: int) -> None:
        trial = build_vae().to(device)
        load_ema(trial, ema)
        scores = {key: round(psnr(trial, images[key][:200], device), 2) for key in ("base", "lines", "valid")}
        tqdm.write(f"vae step {step}: PSNR {scores}")

    phase = Phase("vae", Budget(options.vae_minutes, options.vae_steps), options.vae_lr, 0.01 * options.vae_lr)
    load_ema(vae, train(phase, vae, loss_fn, options, device, report))
    means, _ = encode(vae, images["base"], device)
    fold_normalisation(vae, means)


def train_denoiser(
    denoiser: Denoiser,
    vae: Model,
    tokenizer: Model,
    pixels: Tensor,
    options: TinySdOptions,
    device: torch.device,
) -> dict[str, Tensor]:
    """Trains U-Net and text encoder on the captioned pictures; returns the averaged weights by name."""
    records = json.loads((options.work_dir / "captions.json").read_text(encoding="utf-8"))["records"]
    tokens = caption_tokens(tokenizer, records, device)
    if device.type == "cpu":
        # The fused attention's backward pass is slow for 64 tokens on a CPU: plain attention trains 1.45x as fast.
        denoiser.unet.set_attn_processor(AttnProcessor())
        denoiser.text_encoder.set_attn_implementation("eager")
    latents = encode(vae, pixels, device)
    loss_fn = diffusion_loss_fn(denoiser, latents, tokens, build_scheduler(), options)

    def save_samples(ema: dict[str, Tensor], step: int) -> None:
        trial = Denoiser(tokenizer).to(device)
        load_ema(trial, ema)
        trial_vae = build_vae().to(device)
        trial_vae.load_state_dict(vae.state_dict())
        pipeline = make_pipeline(trial_vae, trial.text_encoder, tokenizer, trial.unet)
        sample_grid(pipeline, options.work_dir / f"samples-{step:06d}.png", GRID_NAMES, options.sample_steps)
        save_pipeline(pipeline, options.work_dir / "latest", options.work_dir / "tokenizer")

    phase = Phase("unet", Budget(options.unet_minutes, options.unet_steps), options.unet_lr, 0.05 * options.unet_lr)
    return train(phase, denoiser, loss_fn, options, device, save_samples)


def train_decoder(vae: Model, images: Mapping[str, Tensor], options: TinySdOptions, device: torch.device) -> None:
    """Trains the decoder on latents with noise; leaves the averaged weights in the autoencoder."""
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    loss_fn = vae_loss_fn(vae, images, options, device, decoder_only=True)
    budget = Budget(options.decoder_minutes, options.decoder_steps)
    phase = Phase("decoder", budget, options.decoder_lr, 0.01 * options.decoder_lr)
    load_ema(vae, train(phase, vae, loss_fn, options, device))


def export(pipeline: Model, options: TinySdOptions, device: torch.device) -> None:
    """Writes the pipeline, a grid of samples and the model card."""
    options.output_dir.parent.mkdir(parents=True, exist_ok=True)
    sample_grid(pipeline, options.work_dir / "samples.png", GRID_NAMES, options.sample_steps)
    save_pipeline(pipeline, options.output_dir, options.work_dir / "tokenizer")
    with replacing(options.output_dir / "samples.png") as scratch:
        shutil.copyfile(options.work_dir / "samples.png", scratch)
    write_model_card(pipeline, options, device)


@owning
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the phases in order; each one that has used its budget is skipped."""
    options = parse_args(argv)
    device, rank, _ = start_process(options.seed)
    model_dir = claim_model_dir(options, "tiny_sd")
    options.work_dir.mkdir(parents=True, exist_ok=True)
    tokenizer_dir = options.work_dir / "tokenizer"
    if "data" in options.phases and rank == 0:
        make_data(options, tokenizer_dir)
    wait_for_all()
    images = load_file(options.work_dir / "images.safetensors")
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_dir, trust_remote_code=False)
    finals = {name: options.work_dir / name / "final.safetensors" for name in ("vae", "unet", "decoder")}

    vae = build_vae().to(device)
    if "vae" in options.phases and not finals["vae"].exists():
        train_vae(vae, images, options, device)
        if rank == 0:
            save_checkpoint(finals["vae"], vae.state_dict(), {"psnr_valid": psnr(vae, images["valid"], device)})
    wait_for_all()
    if finals["vae"].exists():
        vae.load_state_dict(load_checkpoint(finals["vae"])[0])

    denoiser = Denoiser(tokenizer).to(device)
    if "unet" in options.phases:
        ema = train_denoiser(denoiser, vae, tokenizer, images["base"], options, device)
        if rank == 0:
            save_checkpoint(finals["unet"], ema, {})
    wait_for_all()

    if "decoder" in options.phases and not finals["decoder"].exists():
        train_decoder(vae, images, options, device)
        if rank == 0:
            save_checkpoint(finals["decoder"], vae.state_dict(), {"psnr_valid": psnr(vae, images["valid"], device)})

    if model_dir is not None:
        model_dir.begin(anew=True)
        if finals["decoder"].exists():
            vae.load_state_dict(load_checkpoint(finals["decoder"])[0])
        load_ema(denoiser, load_checkpoint(finals["unet"])[0])
        export(make_pipeline(vae, denoiser.text_encoder, tokenizer, denoiser.unet), options, device)
    leave_processes()


if __name__ == "__main__":
    run_script(main)
