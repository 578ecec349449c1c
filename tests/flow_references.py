"""The losses of the flow-matching families, written out from the documentation of their pipelines.

Nothing here calls the families' own code: encoders, autoencoders and transformers are called as the pipelines do it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import torch
from diffusers.training_utils import compute_loss_weighting_for_sd3
from flow_fixtures import seeded
from torch import Tensor

LOGIT_MEAN, LOGIT_STD, MODE_SCALE = 0.4, 0.8, 1.1

# ---- levels of noise


def density(scheme: str, uniform: float) -> float:
    """Where in the table of noise levels a uniform number falls: section 3.1 of Esser et al., as diffusers has it."""
    if scheme == "logit_normal":
        return 1 / (1 + math.exp(-NormalDist(LOGIT_MEAN, LOGIT_STD).inv_cdf(uniform)))
    if scheme == "mode":
        return 1 - uniform - MODE_SCALE * (math.cos(math.pi * uniform / 2) ** 2 - 1 + uniform)
    return uniform


def flux2_shift(num_tokens: int) -> float:
    """The empirical shift of Flux 2 for 50 steps: linear in the tokens at 10 and at 200 steps, and in the steps."""
    at_10, at_200 = 8.73809524e-05 * num_tokens + 1.89833333, 0.00016927 * num_tokens + 0.45666666
    return math.exp(at_10 + (at_200 - at_10) * (50 - 10) / (200 - 10))


# Flux's shift depends on the image, so that training knows none.
SHIFTS: dict[str, Callable[[int], float]] = {
    "sd3": lambda num_tokens: 3.0,
    "flux": lambda num_tokens: 1.0,
    "lumina2": lambda num_tokens: 6.0,
    "flux2": flux2_shift,
    "z_image": lambda num_tokens: 3.0,
    "sana": lambda num_tokens: 3.0,
    "wan": lambda num_tokens: 3.0,
    # from exp(0.5) at 256 tokens to exp(0.9) at 8192, as the test's base has it
    "qwen_image": lambda num_tokens: math.exp(0.5 + 0.4 * (num_tokens - 256) / (8192 - 256)),
}
# Latents per side of a token.
PATCHES = {"flux2": 1}


def noise_levels(kind: str, latents: Tensor) -> Tensor:
    """(1000,) from noise to data, for images of this size."""
    family = kind.partition("-")[0]
    num_tokens = math.prod(side // PATCHES.get(family, 2) for side in latents.shape[-2:])
    shift, table = SHIFTS[family](num_tokens), torch.arange(1000, 0, -1) / 1000
    table = shift * table / (1 + (shift - 1) * table)
    if family == "qwen_image":  # stretched so that the last is 0.02
        table = 1 - (1 - table) * (1 - 0.02) / (1 - table[-1])
    return table


# ---- text and latents


def no_caption(family: Any, stock: Any, kind: str) -> Tensor:
    """(tokens, width): what the stock pipeline takes for no caption."""
    tokens = {"max_sequence_length": family.max_sequence_length, "device": "cpu"}
    if kind.startswith("flux") and not kind.startswith("flux2"):  # no second pass without the caption: the empty one
        return stock.encode_prompt("", "", **tokens)[0][0]
    if kind == "sd3":
        return stock.encode_prompt("a", "a", "a", **tokens)[1][0]
    if kind == "lumina2":
        prompt, mask = stock.encode_prompt("a", **tokens)[2:]
        return prompt[0][mask[0].bool()]
    if kind == "wan":
        return stock.encode_prompt("a", **tokens)[1][0]
    if kind == "sana":
        prompt, mask = stock.encode_prompt("a", **tokens)[2:]
        return prompt[0][mask[0].bool()]
    if kind == "z_image":
        return stock.encode_prompt("a", **tokens)[1][0]
    return stock.encode_prompt("", **tokens)[0][0]


def text_tokens(kind: str, call: dict[str, Any]) -> list[Tensor]:
    """(tokens, width) of each sample that a transformer gets in a call, without padding that it is told of."""
    if kind == "z_image":
        return call["cap_feats"]
    tokens = call["encoder_hidden_states"]
    mask = call.get("encoder_attention_mask", call.get("encoder_hidden_states_mask"))
    return list(tokens) if mask is None else [row[keep.bool()] for row, keep in zip(tokens, mask, strict=True)]


def clean_latents(family: Any, kind: str, batch: dict[str, Tensor], generator: torch.Generator) -> Tensor:
    """A sample of the latents' posterior, as the transformer sees it."""
    if kind == "wan":
        pixels = batch["pixel_values"]
        posterior = family.vae.encode(pixels if pixels.ndim == 5 else pixels[:, :, None]).latent_dist
        sample = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
        config = family.vae.config
        shift, scale = (torch.tensor(row)[:, None, None, None] for row in (config.latents_mean, config.latents_std))
        return (sample - shift) / scale
    if kind == "qwen_image":  # a clip of one frame
        posterior = family.vae.encode(batch["pixel_values"][:, :, None]).latent_dist
        mean, std = posterior.mean[:, :, 0], posterior.std[:, :, 0]
        sample = mean + std * torch.randn(mean.shape, generator=generator)
        config = family.vae.config
        shift, scale = (torch.tensor(values)[:, None, None] for values in (config.latents_mean, config.latents_std))
        return (sample - shift) / scale
    if kind == "sana":
        latents = family.vae.encode(batch["pixel_values"]).latent * family.vae.config.scaling_factor
        torch.randn(latents.shape, generator=generator)  # drawn, though the posterior is a point
        return latents
    posterior = family.vae.encode(batch["pixel_values"]).latent_dist
    if kind.startswith("flux2"):
        mean, std = (flux2_patches(values) for values in (posterior.mean, posterior.std))
        sample = mean + std * torch.randn(mean.shape, generator=generator)
        norm = torch.nn.BatchNorm2d(sample.shape[1], eps=family.vae.config.batch_norm_eps, affine=False).eval()
        norm.load_state_dict(family.vae.bn.state_dict())
        return norm(sample)
    sample = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
    return (sample - family.vae.config.shift_factor) * family.vae.config.scaling_factor


def flux2_patches(latents: Tensor) -> Tensor:
    """Patches of 2x2 as channels: the latents' channels outermost, then rows, then columns."""
    return latents.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 1, 4, 5, 2, 3).flatten(1, 3)


# ---- the transformers


def sd3_prediction(family: Any, noisy: Tensor, sigmas: Tensor, batch: dict[str, Tensor]) -> Tensor:
    clip = [
        encoder(batch[column], output_hidden_states=True)
        for encoder, column in ((family.text_encoder, "input_ids"), (family.text_encoder_2, "input_ids_2"))
    ]
    hidden = torch.cat([output.hidden_states[-2] for output in clip], dim=-1)
    t5 = family.text_encoder_3(batch["input_ids_3"])[0]
    padded = torch.zeros(*hidden.shape[:2], t5.shape[-1])
    padded[..., : hidden.shape[-1]] = hidden
    return family.transformer(
        hidden_states=noisy,
        timestep=1000 * sigmas,
        encoder_hidden_states=torch.cat([padded, t5], dim=1),
        pooled_projections=torch.cat([output[0] for output in clip], dim=-1),
        return_dict=False,
    )[0]


def flux_prediction(family: Any, noisy: Tensor, sigmas: Tensor, batch: dict[str, Tensor]) -> Tensor:
    count, channels, height, width = noisy.shape
    # a token holds the channels of a 2x2 patch, channels outermost; rows, then columns, are numbered
    tokens = noisy.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).reshape(count, -1, 4 * channels)
    rows, columns = height // 2, width // 2
    ids = torch.tensor([[0.0, row, column] for row in range(rows) for column in range(columns)])
    num_tokens = tokens.shape[1]
    if "conditioning_latents" in batch:  # Kontext: tokens of another image, which are behind
        seen = batch["conditioning_latents"].unfold(2, 2, 2).unfold(3, 2, 2)
        places = [[1.0, row, column] for row in range(seen.shape[2]) for column in range(seen.shape[3])]
        tokens = torch.cat([tokens, seen.permute(0, 2, 3, 1, 4, 5).reshape(count, -1, 4 * channels)], dim=1)
        ids = torch.cat([ids, torch.tensor(places)])
    t5 = family.text_encoder_2(batch["input_ids_2"])[0]
    prediction = family.transformer(
        hidden_states=tokens,
        timestep=sigmas,
        guidance=torch.tensor([3.5]).expand(count),
        pooled_projections=family.text_encoder(batch["input_ids"]).pooler_output,
        encoder_hidden_states=t5,
        txt_ids=torch.zeros(t5.shape[1], 3),
        img_ids=ids,
        return_dict=False,
    )[0]
    patches = prediction[:, :num_tokens].reshape(count, rows, columns, channels, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(noisy.shape)


def lumina2_prediction(family: Any, noisy: Tensor, sigmas: Tensor, batch: dict[str, Tensor]) -> Tensor:
    hidden = family.text_encoder(
        batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True
    ).hidden_states[-2]
    return -family.transformer(
        hidden_states=noisy,
        timestep=1 - sigmas,  # from noise to data
        encoder_hidden_states=hidden,
        encoder_attention_mask=batch["attention_mask"],
        return_dict=False,
    )[0]


def flux2_prediction(family: Any, noisy: Tensor, sigmas: Tensor, batch: dict[str, Tensor]) -> Tensor:
    klein = type(family.text_encoder).__name__ == "Qwen3ForCausalLM"
    hidden = family.text_encoder(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True
    ).hidden_states
    layers = torch.stack([hidden[index] for index in ((9, 18, 27) if klein else (10, 20, 30))])
    count, channels, height, width = noisy.shape
    tokens = noisy.permute(0, 2, 3, 1).reshape(count, -1, channels)
    places = [[0, row, column, 0] for row in range(height) for column in range(width)]
    if "conditioning_latents" in batch:  # an image seen beside is at time 10
        seen = batch["conditioning_latents"].permute(0, 2, 3, 1)
        tokens = torch.cat([tokens, seen.reshape(count, -1, channels)], dim=1)
        places += [[10, row, column, 0] for row in range(seen.shape[1]) for column in range(seen.shape[2])]
    prediction = family.transformer(
        hidden_states=tokens,
        timestep=sigmas,
        guidance=None if klein else torch.full((count,), 4.0),
        encoder_hidden_states=layers.permute(1, 2, 0, 3).flatten(2),
        # time, row, column, place in the text
        txt_ids=torch.tensor([[0, 0, 0, place] for place in range(layers.shape[2])]),
        img_ids=torch.tensor(places),
        return_dict=False,
    )[0]
    return prediction[:, : height * width].reshape(count, height, width, channels).permute(0, 3, 1, 2)


def qwen_image_prediction(family: Any, noisy: Tensor, sigmas: Tensor, batch: dict[str, Tensor]) -> Tensor:
    hidden = family.text_encoder(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True
    ).hidden_states[-1]
    texts = [row[keep.bool()][34:] for row, keep in zip(hidden, batch["attention_mask"], strict=True)]
    text = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(row)) for row in texts], batch_first=True)
    count, channels, height, width = noisy.shape
    rows, columns = height // 2, width // 2
    prediction = family.transformer(
        hidden_states=noisy.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).reshape(count, -1, 4 * channels),
        timestep=sigmas,
        encoder_hidden_states=text,
        encoder_hidden_states_mask=mask.bool(),
        img_shapes=[[(1, rows, columns)]] * count,
        return_dict=False,
    )[0]
    return prediction.reshape(count, rows, columns, channels, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(noisy.shape)


def z_image_prediction(family: Any, noisy: Tensor, sigmas: Tensor, batch: dict[str, Tensor]) -> Tensor:
    mask = batch["attention_mask"].bool()
    hidden = family.text_encoder(batch["input_ids"], attention_mask=mask, output_hidden_states=True).hidden_states[-2]
    predictions: list[Tensor] = []
    for image, text, keep, sigma in zip(noisy, hidden, mask, sigmas, strict=True):  # each alone: no padding
        predictions += family.transformer([image[:, None]], 1 - sigma[None], [text[keep]], return_dict=False)[0]
    return -torch.stack(predictions)[:, :, 0]


def sana_prediction(family: Any, noisy: Tensor, sigmas: Tensor, batch: dict[str, Tensor]) -> Tensor:
    length = family.max_sequence_length
    kept = [0, *range(-length + 1, 0)]  # section 3.1 of the paper, as the pipeline has it
    hidden = family.text_encoder(batch["input_ids"], attention_mask=batch["attention_mask"])[0]
    return family.transformer(
        noisy,
        encoder_hidden_states=hidden[:, kept],
        encoder_attention_mask=batch["attention_mask"][:, kept],
        timestep=1000 * sigmas,
        return_dict=False,
    )[0]


def wan_prediction(family: Any, noisy: Tensor, sigmas: Tensor, batch: dict[str, Tensor]) -> Tensor:
    hidden = family.text_encoder(batch["input_ids"], batch["attention_mask"]).last_hidden_state
    hidden[batch["attention_mask"] == 0] = 0
    return family.transformer(noisy, 1000 * sigmas, encoder_hidden_states=hidden, return_dict=False)[0]


PREDICTIONS: dict[str, Callable[..., Tensor]] = {
    "sd3": sd3_prediction,
    "flux": flux_prediction,
    "lumina2": lumina2_prediction,
    "flux2": flux2_prediction,
    "qwen_image": qwen_image_prediction,
    "z_image": z_image_prediction,
    "sana": sana_prediction,
    "wan": wan_prediction,
}


def reference_loss(family: Any, kind: str, batch: dict[str, Tensor], seed: int) -> Tensor:
    """(batch,) losses with the family's order of draws: posterior, noise, levels of noise."""
    return reference_errors(family, kind, batch, seed).flatten(1).mean(dim=1)


def reference_errors(family: Any, kind: str, batch: dict[str, Tensor], seed: int) -> Tensor:
    """The squared errors that the losses are the means of, in the latents' shape."""
    generator = seeded(seed)
    latents = clean_latents(family, kind, batch, generator)
    noise = torch.randn(latents.shape, generator=generator)
    uniform = torch.rand(len(latents), generator=generator, dtype=torch.float64)
    indices = [int(1000 * density(family.weighting_scheme, u)) for u in uniform.tolist()]
    sigmas = noise_levels(kind, latents)[torch.tensor(indices)]
    broad = sigmas.view(-1, *(1,) * (latents.ndim - 1))
    noisy = (1.0 - broad) * latents + broad * noise
    prediction = PREDICTIONS[kind.partition("-")[0]](family, noisy, sigmas, batch)
    weighting = compute_loss_weighting_for_sd3(weighting_scheme=family.weighting_scheme, sigmas=broad)
    return weighting * (prediction - (noise - latents)) ** 2
