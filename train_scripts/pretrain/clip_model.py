"""The tiny CLIP: its embeddings, its loss, and the retrieval figures of its model card."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import emoji_pictures as emoji
import torch
import torch.nn.functional as F
from shared import IMAGE_SIZE, MAX_TOKENS, Model, tokenize, waves
from torch import Tensor
from transformers import CLIPConfig, CLIPModel


def build_model(tokenizer: Model) -> Model:
    """CLIPModel of 1.9 M parameters: patches of 8, so that an image is 64 tokens.

    Small on purpose: within minutes of one CPU core, more steps are worth more than more layers.
    """
    text: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_TOKENS,
        "hidden_act": "gelu",
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision: dict[str, Any] = {
        "image_size": IMAGE_SIZE,
        "patch_size": 8,
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "hidden_act": "gelu",
    }
    model: Model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))
    side = IMAGE_SIZE // vision["patch_size"]
    with torch.no_grad():  # neighbours start out similar: a transformer takes long to find that out by itself
        positions = model.vision_model.embeddings.position_embedding.weight
        positions[1:] = 0.3 * waves(side, vision["hidden_size"])
    return model


def embed_images(model: Model, images: Tensor, kept: Tensor | None = None) -> Tensor:
    """Unit image embeddings `(batch, projection_dim)`; the same as `get_image_features`, except for `kept`.

    Args:
        model: A CLIPModel.
        images: `(batch, 3, height, width)` in [0, 1].
        kept: `(batch, num_kept)` indices of the patches that the transformer sees; all if None. Leaving half of them
            out halves the cost of a step and regularises ("Scaling Language-Image Pre-training via Masking",
            arXiv 2212.00794).
    """
    vision = model.vision_model
    hidden = vision.embeddings(images * 2 - 1)
    if kept is not None:
        patches = hidden[:, 1:].gather(1, kept.unsqueeze(2).expand(-1, -1, hidden.shape[2]))
        hidden = torch.cat([hidden[:, :1], patches], 1)
    hidden = vision.encoder(inputs_embeds=vision.pre_layrnorm(hidden)).last_hidden_state
    return F.normalize(model.visual_projection(vision.post_layernorm(hidden[:, 0])).float(), dim=-1)


def embed_texts(model: Model, ids: Tensor) -> Tensor:
    """Unit text embeddings `(batch, projection_dim)`."""
    pooled = model.text_model(input_ids=ids).pooler_output
    return F.normalize(model.text_projection(pooled).float(), dim=-1)


def contrastive_loss(first: Tensor, second: Tensor, scale: Tensor) -> Tensor:
    """CLIP's symmetric cross entropy: row i of both belongs together (arXiv 2103.00020, figure 3)."""
    logits = scale * first @ second.T
    target = torch.arange(len(first), device=first.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def recall(similarity: Tensor, target: Tensor) -> dict[str, float]:
    """R@1 and R@5: how often the right candidate is the first, or among the first five.

    Args:
        similarity: `(num_queries, num_candidates)`.
        target: `(num_queries,)` index of the right candidate.
    """
    right = similarity.gather(1, target.view(-1, 1))
    rank = (similarity > right).sum(1)
    return {"R@1": (rank < 1).float().mean().item(), "R@5": (rank < 5).float().mean().item()}


@torch.no_grad()
def evaluate(
    model: Model, tokenizer: Model, images: Tensor, records: Sequence[Mapping[str, str]]
) -> dict[str, dict[str, dict[str, float]]]:
    """Zero-shot retrieval among the held-out concepts, for each held-out style.

    Candidates are the captions, or the pictures in one of the other styles (mean over these styles), of all held-out
    concepts; `pixels` is the latter with centred raw pixels instead of embeddings.

    Args:
        model: A CLIPModel on the CPU.
        tokenizer: Its tokenizer.
        images: `(num_images, 3, height, width)` uint8.
        records: Style and name of each image.
    """
    device = model.logit_scale.device
    pixels = images.float() / 255
    embeds = torch.cat([embed_images(model, chunk.to(device)).cpu() for chunk in pixels.split(128)])
    raw = pixels.flatten(1)
    raw = F.normalize(raw - raw.mean(1, keepdim=True), dim=1)
    by_style: dict[str, dict[str, int]] = defaultdict(dict)
    for index, record in enumerate(records):
        by_style[record["style"]][record["name"]] = index
    names = sorted({record["name"] for record in records})
    text_embeds = embed_texts(model, tokenize(tokenizer, [emoji.caption(None, name) for name in names]).to(device))

    results: dict[str, dict[str, dict[str, float]]] = {}
    for style in emoji.HELD_OUT_STYLES:
        own = by_style.get(style, {})
        queries = torch.tensor(list(own.values()), dtype=torch.long)
        target = torch.tensor([names.index(name) for name in own])
        results[style] = {"text": recall(embeds[queries] @ text_embeds.cpu().T, target)}
        scores: dict[str, list[dict[str, float]]] = {"image": [], "pixels": []}
        for other in emoji.BASE_STYLES:
            gallery = by_style.get(other, {})
            both = [name for name in own if name in gallery]
            if not both:
                continue
            ours = torch.tensor([own[name] for name in both])
            theirs = torch.tensor(list(gallery.values()))
            target = torch.tensor([list(gallery).index(name) for name in both])
            scores["image"].append(recall(embeds[ours] @ embeds[theirs].T, target))
            scores["pixels"].append(recall(raw[ours] @ raw[theirs].T, target))
        for kind, rows in scores.items():
            results[style][kind] = {key: sum(row[key] for row in rows) / len(rows) for key in ("R@1", "R@5")}
    return results
