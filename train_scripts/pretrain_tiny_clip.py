"""Pretrains the bundled tiny CLIP, which scores generated emoji: emoji and line icons -> CLIPModel and its processor.

Its scores are computed on held-out concepts in held-out styles, so it is shown neither: no picture of these concepts in
any style, no picture in these styles, and no cat. Black-line drawings are imitated from the other pictures.

One otherwise idle CPU core needs about half an hour. Training ends after its wall-time or step budget, writes
checkpoints, and continues from the last one when the same command is run again:

    python train_scripts/pretrain_tiny_clip.py --work_dir runs/tiny-clip --output_dir assets/models/tiny-clip
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import re
import shutil
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from common_recipe_options import DEFAULT_CACHE

from lorainit_diffusers.training.bundled import ROOT
from lorainit_diffusers.training.cli_parser import ScriptParser, run_script

PHASES = ("data", "train", "export")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; a budget of 0 minutes or steps means no such limit."""
    parser = ScriptParser(__doc__)
    parser.add_argument("--work_dir", type=Path, required=True, help="pictures, checkpoint and figures")
    parser.add_argument("--output_dir", type=Path, required=True, help="where the model is written")
    parser.add_argument("--cache_dir", type=Path, default=DEFAULT_CACHE, help="archives of the npm packages")
    parser.add_argument("--data_dir", type=Path, default=ROOT / "assets" / "data", help="names the held-out concepts")
    parser.add_argument(
        "--tokenizer_dir", type=Path, default=ROOT / "assets" / "models" / "tiny-sd" / "tokenizer", help="copied"
    )
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES))
    parser.add_argument("--minutes", type=float, default=27.0)
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--batch_size", type=int, default=64, help="concepts; there are two pictures of each")
    parser.add_argument("--lr", type=float, default=1.5e-3, help="of embeddings, projections, norms and biases")
    parser.add_argument("--matrix_lr", type=float, default=3e-3, help="of the matrices inside the transformers")
    parser.add_argument("--weight_decay", type=float, default=0.1)
    parser.add_argument("--pair_weight", type=float, default=1.0, help="of the image-image loss")
    parser.add_argument("--text_weight", type=float, default=0.25, help="of the name-description loss")
    parser.add_argument("--patch_dropout", type=float, default=0.5, help="share of patches left out, but for the end")
    parser.add_argument("--ema_decay", type=float, default=0.99)
    parser.add_argument("--checkpoint_s", type=float, default=120.0, help="seconds between checkpoints")
    parser.add_argument("--no_bf16", dest="bf16", action="store_false", help="train in full precision")
    parser.add_argument("--hardware", help="for the model card (default: what this machine has)")
    parser.add_argument("--date", default=time.strftime("%Y-%m-%d"), help="for the model card")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    args.hardware = args.hardware or hardware()
    return args


def hardware() -> str:
    """What this machine has, for the model card."""
    import torch

    threads = f"{torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}"
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{threads} of {platform.machine()} CPU"


if __name__ == "__main__":
    run_script(
        lambda: parse_args(None)
    )  # a mistake in the options is answered before the imports below, which take seconds

import emoji
import numpy as np
import torch
import torch.nn.functional as F
from common import load_checkpoint, save_checkpoint
from common_pretrain import claim_model_dir, waves
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from lorainit_diffusers.files import filling, write_text
from lorainit_diffusers.training.output_dir import owning

Model = Any  # transformers annotates its models and tokenizers too narrowly to check calls
IMAGE_SIZE = 64
MAX_TOKENS = 16
NUM_DESCRIPTIONS = 4
DRAWING = "black line"  # the style word of `build_sample_data.py` for black-line drawings
_WEIGHT = re.compile(r"-(bold|duotone|fill|filled|light|thin)$")


# ---------------------------------------------------------------------------------------------------------- data


def held_out_concepts(data_dir: Path) -> set[str]:
    """Concepts that scores are computed on: those in `heldout` of the bundled sets of the held-out styles.

    Raises:
        FileNotFoundError: A set is missing.
    """
    names: set[str] = set()
    for style in emoji.HELD_OUT_STYLES:
        path = data_dir / style / "heldout" / "metadata.jsonl"
        if not path.exists():
            raise FileNotFoundError(f"{path} lists held-out concepts and is missing; run build_sample_data.py first")
        names |= {Path(json.loads(line)["file_name"]).stem for line in path.read_text(encoding="utf-8").splitlines()}
    return names


def related_words(entries: Iterable[Mapping[str, Any]], held_out: set[str]) -> set[str]:
    """All words of the names and tags of the held-out concepts and of the cats, in emojibase's entries."""
    cats = set(emoji.CAT_FACES)
    return {
        word
        for entry in entries
        if emoji.slug(entry["label"]) in held_out | cats
        for text in [entry["label"], *entry.get("tags", [])]
        for word in emoji.slug(text).split("-")
    }


def select(
    icons: Mapping[str, Sequence[str]], kinds: Mapping[str, emoji.Kind], held_out: set[str], banned: set[str]
) -> list[dict[str, str]]:
    """What to train on: a record of package, icon, concept, and group for every picture.

    Emoji sets share their names, so a name identifies a held-out concept. Line icons are named by other people: one
    whose name has any word in common with the names or tags of a held-out concept is left out. Of line icons, only
    those of one word are used, since most of the others are variants of these ("user-plus").

    Args:
        icons: Icon names by key of the package.
        kinds: Kind of emoji by icon name.
        held_out: Concepts that must not be seen.
        banned: Words that no line icon may have in its name.
    """
    records: list[dict[str, str]] = []
    for key in emoji.BASE_STYLES:
        for name in icons.get(key, ()):
            kind = kinds.get(name)
            if kind is None or kind.group not in emoji.GROUPS or name in held_out or "cat" in name.split("-"):
                continue
            records.append({"style": key, "icon": name, "name": name, "group": kind.group, "subgroup": kind.subgroup})
    for key in emoji.LINE_ICONS:
        for icon in icons.get(key, ()):
            name = _WEIGHT.sub("", icon)
            if re.fullmatch(r"[a-z]{3,}", name) and name not in banned:
                records.append({"style": key, "icon": icon, "name": name, "group": "lines", "subgroup": "lines"})
    return records


def describe(entry: Mapping[str, Any], subgroup: str, rng: np.random.Generator) -> str:
    """A caption without the name: up to four of emojibase's tags and the subgroup, in random order."""
    tags = list(entry.get("tags", []))
    chosen = [str(tag) for tag in rng.permutation(tags)[: rng.integers(1, 5)]] if tags else []
    parts = [*chosen, *subgroup.split("-")[:2]]
    return emoji.caption(None, " ".join(parts[i] for i in rng.permutation(len(parts))))


def render_data(work_dir: Path, cache_dir: Path, data_dir: Path, seed: int) -> None:
    """Renders all pictures once: `images.safetensors` (uint8) and `records.json`.

    `train` is what the model sees; `heldout` are the held-out concepts in all styles, for the retrieval figures. The
    descriptions cover the held-out concepts too: they are text only.
    """
    try:
        import_module("resvg_py")  # an optional dependency: say so before anything is fetched
    except ImportError as error:
        raise ImportError('resvg-py renders the icons and is missing; pip install "resvg-py>=0.5"') from error
    held_out = held_out_concepts(data_dir)
    entries = emoji.read_json("emojibase", "en/data.json", cache_dir)
    kinds = emoji.emoji_kinds(cache_dir)
    keys = (*emoji.BASE_STYLES, *emoji.LINE_ICONS, *emoji.HELD_OUT_STYLES)
    sets = {key: emoji.IconSet(key, cache_dir) for key in keys}
    names = {key: icons.names() for key, icons in sets.items() if key not in emoji.HELD_OUT_STYLES}
    records = select(names, kinds, held_out, related_words(entries, held_out))
    tested = [
        {"style": style, "icon": name, "name": name}
        for style in (*emoji.BASE_STYLES, *emoji.HELD_OUT_STYLES)
        for name in sorted(held_out)
        if name in sets[style].data["icons"]
    ]

    def render(rows: list[dict[str, str]], title: str) -> Tensor:
        stack = [sets[row["style"]].render(row["icon"], IMAGE_SIZE) for row in tqdm(rows, desc=title, mininterval=5)]
        return torch.from_numpy(np.stack(stack)).permute(0, 3, 1, 2).contiguous()

    tensors = {"train": render(records, "render"), "heldout": render(tested, "render held-out")}
    rng = np.random.default_rng(seed)
    texts = {
        name: [describe(entry, kinds[name].subgroup, rng) for _ in range(NUM_DESCRIPTIONS)]
        for entry in entries
        if (name := emoji.slug(entry["label"])) in kinds and kinds[name].group in emoji.GROUPS
        if "cat" not in name.split("-")
    }
    data = {"train": records, "heldout": tested, "descriptions": texts}
    (work_dir / "records.json").write_text(json.dumps(data), encoding="utf-8")
    save_file(tensors, work_dir / "images.safetensors")  # last: its presence says that the data is complete


def check_disjoint(records: Iterable[Mapping[str, str]], held_out: set[str]) -> None:
    """Refuses training pictures of a held-out concept, of a cat, or in a held-out style.

    Raises:
        ValueError: There is one.
    """
    for record in records:
        names = {record["name"], record["icon"]}
        if names & held_out or record["style"] in emoji.HELD_OUT_STYLES or any("cat" in n.split("-") for n in names):
            raise ValueError(f"training picture {record} is held out; delete the work folder's images and render again")


class Batches:
    """Draws batches of distinct concepts with two pictures each; token ids of every caption.

    Half of a batch is of one group of emoji, so that there are similar concepts to tell apart.
    """

    def __init__(self, data: Mapping[str, Any], tokenizer: Model):
        self.records: list[dict[str, str]] = data["train"]
        self.by_name: dict[str, list[int]] = defaultdict(list)
        for index, record in enumerate(self.records):
            self.by_name[record["name"]].append(index)
        groups: dict[str, list[str]] = defaultdict(list)
        for name, indices in self.by_name.items():
            groups[self.records[indices[0]]["group"]].append(name)
        self.lines = groups.pop("lines", [])
        self.groups = list(groups.values())
        self.emoji_names = [name for names in self.groups for name in names]
        self.is_line = torch.tensor([record["style"] in emoji.LINE_ICONS for record in self.records])

        names = [record["name"] for record in self.records]
        descriptions: dict[str, list[str]] = data["descriptions"]
        self.styled = tokenize(tokenizer, [emoji.caption(r["style"], r["name"]) for r in self.records])
        self.drawing = tokenize(tokenizer, [emoji.caption(DRAWING, name) for name in names])
        self.plain = tokenize(tokenizer, [emoji.caption(None, name) for name in names])
        fallback = [[emoji.caption(None, name)] * NUM_DESCRIPTIONS for name in names]
        flat = [text for name, own in zip(names, fallback, strict=True) for text in descriptions.get(name, own)]
        self.described = tokenize(tokenizer, flat).view(len(names), NUM_DESCRIPTIONS, -1)
        self.text_names = tokenize(tokenizer, [emoji.caption(None, name) for name in descriptions])
        flat = [text for texts in descriptions.values() for text in texts]
        self.text_descriptions = tokenize(tokenizer, flat).view(len(descriptions), NUM_DESCRIPTIONS, -1)

    def draw(self, step: int, num_concepts: int, seed: int) -> tuple[Tensor, Tensor]:
        """Indices of two pictures of each of `num_concepts` concepts; a function of (seed, step) only.

        The two pictures are different ones if the concept has more than one.
        """
        rng = np.random.default_rng((seed, step))
        sizes = np.array([len(group) for group in self.groups], dtype=float)
        group = self.groups[rng.choice(len(self.groups), p=sizes / sizes.sum())]
        wanted = [(group, num_concepts // 2), (self.lines, num_concepts // 8), (self.emoji_names, num_concepts)]
        chosen: dict[str, None] = {}
        for names, count in wanted:
            for position in rng.permutation(len(names))[:count]:
                if len(chosen) < num_concepts:
                    chosen.setdefault(names[position])
        pairs = []
        for name in chosen:
            indices = self.by_name[name]
            pairs.append(rng.choice(indices, 2, replace=len(indices) < 2))
        first, second = np.stack(pairs).T
        return torch.from_numpy(first.copy()), torch.from_numpy(second.copy())

    def captions(self, indices: Tensor, drawn: Tensor, odd: Tensor, generator: torch.Generator) -> Tensor:
        """Token ids of a caption for each picture: 40 % with the style, 35 % without, 25 % a description.

        Args:
            indices: `(batch,)` of the pictures.
            drawn: `(batch,)` bool, pictures turned into black-line drawings: the style word is that of drawings.
            odd: `(batch,)` bool, pictures whose style is no longer what it was: no style word.
            generator: Of the CPU.
        """
        choice = torch.rand(len(indices), 1, generator=generator)
        variant = torch.randint(NUM_DESCRIPTIONS, (len(indices),), generator=generator)
        drawn = (drawn | self.is_line[indices]).view(-1, 1)
        styled = torch.where(drawn, self.drawing[indices], self.styled[indices])
        styled = torch.where(odd.view(-1, 1), self.plain[indices], styled)
        other = torch.where(choice < 0.75, self.plain[indices], self.described[indices, variant])
        return torch.where(choice < 0.4, styled, other)


def tokenize(tokenizer: Model, texts: list[str]) -> Tensor:
    """Token ids `(len(texts), MAX_TOKENS)`."""
    batch = tokenizer(texts, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
    return batch["input_ids"]


# -------------------------------------------------------------------------------------------------- augmentation


def as_drawing(images: Tensor, strength: Tensor, dark: Tensor, wide: Tensor) -> Tensor:
    """Black outlines, and black where the picture is dark, on white: like the black-line styles it never sees.

    The outline is the morphological gradient: the largest minus the smallest value in a small window.

    Args:
        images: `(batch, 3, height, width)` in [0, 1].
        strength: `(batch, 1, 1, 1)`, the larger, the weaker the edges that become lines.
        dark: `(batch, 1, 1, 1)`, luminance below which a pixel is black.
        wide: `(batch, 1, 1, 1)` bool, thicker lines.
    """

    def gradient(size: int) -> Tensor:
        padded = F.pad(images, (size // 2, (size - 1) // 2) * 2, mode="replicate")
        spread = F.max_pool2d(padded, size, 1) + F.max_pool2d(-padded, size, 1)
        return spread.amax(1, keepdim=True)

    lines = torch.where(wide, gradient(3), gradient(2))
    fill = ((dark - images.mean(1, keepdim=True)) * 10).clamp(0, 1)
    return (1 - torch.maximum((lines * strength - 0.3).clamp(0, 1), fill)).expand_as(images)


def augment(images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Random flip, shift, scale, rotation, colour, grey, drawing, inversion, blur and noise.

    Args:
        images: `(batch, 3, height, width)` in [0, 1], on white.
        generator: Of the CPU.

    Returns:
        The images; `(batch,)` bool, those turned into drawings; `(batch,)` bool, those inverted or without colour.
    """
    count = len(images)

    def uniform(low: float, high: float, channels: int = 1) -> Tensor:
        return low + (high - low) * torch.rand(count, channels, 1, 1, generator=generator)

    def chance(probability: float) -> Tensor:
        return torch.rand(count, 1, 1, 1, generator=generator) < probability

    angle, scale, stretch = (uniform(*limits).flatten() for limits in ((-0.12, 0.12), (0.9, 1.25), (0.93, 1.07)))
    flip = 1 - 2 * chance(0.1).flatten().float()
    shift_x, shift_y = uniform(-0.1, 0.1, 2).view(count, 2).unbind(1)
    rows = [
        torch.stack([angle.cos() * scale * stretch * flip, -angle.sin() * scale, shift_x], 1),
        torch.stack([angle.sin() * scale * stretch * flip, angle.cos() * scale, shift_y], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    # Outside of the picture is white: what is sampled is the ink.
    images = 1 - F.grid_sample(1 - images, grid, align_corners=False)

    drawn = chance(0.35).flatten()
    strength, dark, wide = uniform(1.5, 6), uniform(-0.1, 0.5), chance(0.6)
    drawing = as_drawing(images[drawn], strength[drawn], dark[drawn], wide[drawn])
    order = torch.randperm(3, generator=generator)
    images = torch.where(chance(0.2), images[:, order], images)
    images = 1 - (1 - images) * torch.where(chance(0.7), uniform(0.6, 1.3, 3), torch.ones(1))
    grey = chance(0.2)
    images = torch.where(grey, images.mean(1, keepdim=True), images)
    images[drawn] = drawing
    inverted = chance(0.04)
    images = torch.where(inverted, 1 - images, images)
    images = torch.where(chance(0.2), F.avg_pool2d(images, 3, 1, 1, count_include_pad=False), images)
    noisy = chance(0.15).flatten()
    noise = torch.randn(images[noisy].shape, generator=generator)
    images[noisy] += noise * uniform(0, 0.1)[noisy]
    return images.clamp(0, 1), drawn, inverted.flatten() | (grey.flatten() & ~drawn)


# --------------------------------------------------------------------------------------------------------- model


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


def batch_loss(
    model: Model, images: Tensor, batches: Batches, step: int, dropped: float, args: argparse.Namespace
) -> Tensor:
    """Mean of image-caption losses, plus image-image (one concept, two pictures), plus name-description (text only)."""
    generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
    device = model.logit_scale.device
    first, second = batches.draw(step, args.batch_size, args.seed)
    indices = torch.cat([first, second])
    pixels, drawn, odd = augment(images[indices].float() / 255, generator)
    ids = batches.captions(indices, drawn, odd, generator)
    num_texts = args.batch_size // 2
    chosen = torch.randint(len(batches.text_names), (num_texts,), generator=generator)
    variant = torch.randint(NUM_DESCRIPTIONS, (num_texts,), generator=generator)
    ids = torch.cat([ids, batches.text_names[chosen], batches.text_descriptions[chosen, variant]])
    kept = None
    if dropped:
        num_patches = (IMAGE_SIZE // model.config.vision_config.patch_size) ** 2
        order = torch.rand(len(pixels), num_patches, generator=generator).argsort(1)
        kept = order[:, : num_patches - int(dropped * num_patches)].to(device)

    with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
        image_embeds = embed_images(model, pixels.to(device), kept)
        text_embeds = embed_texts(model, ids.to(device))
    images_1, images_2 = image_embeds.chunk(2)
    texts_1, texts_2, names, descriptions = text_embeds.split([len(first), len(second), len(chosen), len(chosen)])
    scale = model.logit_scale.exp()
    captioned = (contrastive_loss(images_1, texts_1, scale) + contrastive_loss(images_2, texts_2, scale)) / 2
    paired = contrastive_loss(images_1, images_2, scale)
    described = contrastive_loss(names, descriptions, scale)
    return captioned + args.pair_weight * paired + args.text_weight * described


# ------------------------------------------------------------------------------------------------------ training


def build_optimizers(named: Mapping[str, nn.Parameter], args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the transformers, AdamW for everything else.

    Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) needs fewer steps, and steps are what one CPU
    core has few of.

    Raises:
        ImportError: torch is too old.
    """
    if not hasattr(torch.optim, "Muon"):
        raise ImportError(f"torch {torch.__version__} has no optimizer Muon; pip install 'torch>=2.9' for this recipe")
    inner = {name for name, p in named.items() if p.ndim == 2 and ".layers." in name}
    matrices = [p for name, p in named.items() if name in inner]
    others = [p for name, p in named.items() if name not in inner]
    return [
        torch.optim.Muon(
            matrices, lr=args.matrix_lr, weight_decay=args.weight_decay, momentum=0.95, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, lr=args.lr, weight_decay=0.02, betas=(0.9, 0.98), fused=True),
    ]


def train(model: Model, images: Tensor, batches: Batches, args: argparse.Namespace) -> None:
    """Trains until the budget is used up, and leaves the averaged (EMA) parameters in the model; resumes by itself.

    Batches and augmentation are functions of (seed, step), so a resumed run repeats what an uninterrupted one does
    (exactly so with a step budget; with a time budget the learning rate follows the clock).

    Raises:
        ValueError: There is neither a step nor a time budget.
        FloatingPointError: The loss is not finite.
    """
    if not (args.steps or args.minutes):
        raise ValueError("--minutes and --steps are both 0, training would never end; set one")
    named = dict(model.named_parameters())
    optimizers = build_optimizers(named, args)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    full_rates = [group["lr"] for group in groups]
    ema = {name: p.detach().clone() for name, p in named.items()}
    path = args.work_dir / "checkpoint.safetensors"
    step, elapsed_s, running = 0, 0.0, float("nan")
    if path.exists():
        tensors, state = load_checkpoint(path)
        step, elapsed_s, running = int(state["step"]), state["elapsed_s"], state["loss"]
        for name, p in named.items():
            p.data.copy_(tensors[f"model.{name}"])
            ema[name].copy_(tensors[f"ema.{name}"])
        names = {p: name for name, p in named.items()}
        for optimizer in optimizers:
            for p in (p for group in optimizer.param_groups for p in group["params"]):
                prefix = f"optimizer.{names[p]}."
                moments = {k.removeprefix(prefix): v.to(p.device) for k, v in tensors.items() if k.startswith(prefix)}
                optimizer.state[p] = moments

    def checkpoint() -> None:
        tensors = {f"model.{name}": p for name, p in named.items()} | {f"ema.{name}": p for name, p in ema.items()}
        for name, p in named.items():
            moments = next(optimizer.state[p] for optimizer in optimizers if p in optimizer.state)
            tensors |= {f"optimizer.{name}.{key}": value for key, value in moments.items()}
        save_checkpoint(path, tensors, {"step": step, "elapsed_s": elapsed_s, "loss": running})

    bar = tqdm(desc="train", initial=step, total=args.steps or None, mininterval=10)
    last = last_checkpoint = time.monotonic()
    while True:
        elapsed_s, last = elapsed_s + time.monotonic() - last, time.monotonic()
        max_s = 60 * args.minutes
        progress = max(step / args.steps if args.steps else 0.0, elapsed_s / max_s if max_s else 0.0)
        if step and (progress >= 1 or last - last_checkpoint > args.checkpoint_s):
            checkpoint()
            last_checkpoint = time.monotonic()
        if progress >= 1:
            break
        factor = min(1.0, (step + 1) / 50) * (0.01 + 0.99 * (0.5 + 0.5 * math.cos(math.pi * progress)))
        for group, rate in zip(groups, full_rates, strict=True):
            group["lr"] = factor * rate
        # Whole images at the end: that is what the model is used on.
        dropped = args.patch_dropout if progress < 0.85 else 0.0
        loss = batch_loss(model, images, batches, step, dropped, args)
        loss.backward()
        nn.utils.clip_grad_norm_(named.values(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        model.logit_scale.data.clamp_(max=math.log(100))
        step += 1
        decay = min(args.ema_decay, step / (step + 10))
        with torch.no_grad():
            for name, p in named.items():
                ema[name].lerp_(p, 1 - decay)
        if step % 10 == 0:
            value = loss.item()
            if not math.isfinite(value):
                raise FloatingPointError(f"loss is {value} at step {step}; lower --lr")
            running = value if math.isnan(running) else 0.95 * running + 0.05 * value
            bar.set_postfix(loss=f"{running:.3f}")
        bar.update()
    bar.close()
    for name, p in named.items():
        p.data.copy_(ema[name])


# ---------------------------------------------------------------------------------------------------- evaluation


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


# -------------------------------------------------------------------------------------------------------- export


MODEL_CARD = """# tiny-clip

A CLIP of {size_mib:.1f} MiB for 64x64 emoji: it scores what the bundled bases generate, on a CPU and offline. It embeds
images and captions in {dim} dimensions. **Its scores are not comparable with published CLIP or DINO scores**, which are
of other models, trained on photographs; they only rank pictures of the kind it was trained on.

```python
from transformers import CLIPModel, CLIPProcessor

model = CLIPModel.from_pretrained("assets/models/tiny-clip")
processor = CLIPProcessor.from_pretrained("assets/models/tiny-clip")
inputs = processor(text=["an emoji of crab"], images=[image], return_tensors="pt", padding=True, truncation=True)
outputs = model(**inputs)  # image_embeds and text_embeds (batch, {dim}), unit length; logits_per_image
```

| component | parameters |
|---|---|
| vision: ViT, patches of 8, width {vision_width}, {vision_layers} layers | {vision:.1f} M |
| text: width {text_width}, {text_layers} layers, at most {max_tokens} tokens | {text:.1f} M |
| byte-level BPE of `tiny-sd`, {vocab_size} tokens | |

## Figures

Zero-shot retrieval among the {num_concepts} held-out concepts (`heldout` of `assets/data/high-contrast` and
`assets/data/blobs`), none of which it was trained on in any style; neither style was seen at all. The query is a
picture in the held-out style. The candidates are the captions `an emoji of {{name}}` of all held-out concepts, or their
pictures in one of the styles {styles} (mean over these). Chance is {chance_1:.3f} for R@1 and
{chance_5:.3f} for R@5. The recipe's settings were changed with such figures in view (two earlier settings were stopped
early), so they are slightly optimistic; one seed.

| query | candidates | R@1 | R@5 |
|---|---|---|---|
{figures}
## Training

- **Data**: {num_images} pictures of {num_emoji} emoji concepts in the styles {styles} and {num_lines} one-word line
  icons. Left out: the held-out concepts above in every style, the styles Noto version 1 ("blobs") and Fluent
  high-contrast, all cats, flags, people and symbols, and every line icon whose name has a word in common with the
  name or a tag of a held-out concept. Similar concepts remain (other smiling faces, clinking beer mugs).
- **Text**: captions with the style (40 %), without it (35 %), or tags and subgroup of emojibase instead of the name
  (25 %). Names and tags of the held-out concepts, but no pictures of them, are in a loss on text alone: without it a
  word like "crab" would mean nothing.
- **Loss**: CLIP's, between images and captions and between two pictures of one concept, mostly of two styles
  (weight {pair_weight:g}), and between name and description (weight {text_weight:g}).
- **Augmentation**: shift, scale, rotation, flip, colour, grey, inversion, blur, noise; a third of the pictures is
  turned into black-line drawings by a morphological gradient, with `black line` as their style word. Half of the
  patches are left out, but for the last 15 % of the time.
- **Optimizer**: Muon for the matrices inside the transformers, AdamW for the rest.
- **Result**: {result}
- **Hardware**: {hardware}.
- **Date**: {date}. **Seed**: {seed}.
- **Command** (budget in minutes of wall time; a rerun continues from the last checkpoint):

  ```
  python train_scripts/pretrain_tiny_clip.py --work_dir runs/tiny-clip \\
      --output_dir assets/models/tiny-clip {flags}
  ```

## Limits

- It knows emoji on white. Concept names it never saw with a picture are only placed near their tags, so image-image
  scores are more trustworthy than image-text scores.
- Two pictures of one concept in two styles are trained to be similar: image-image scores measure the concept much more
  than the style. Compare with caption scores with and without style words for the latter.
- At most {max_tokens} tokens: pass `truncation=True`.

## Licences of the pictures it was trained on

| source | package (npm) | licence | used for |
|---|---|---|---|
{sources}
Twemoji and Emoji One are used under CC-BY-4.0 (https://creativecommons.org/licenses/by/4.0/): Twemoji graphics by
Twitter, Inc and other contributors; Emoji One graphics by Emoji One. Changes: rendered at 64x64 pixels on white and
used as training data. The weights are published under the Apache License 2.0 of this repository.
"""


def save_model(model: Model, directory: Path, tokenizer_dir: Path) -> None:
    """Writes model, image processor and tokenizer over `directory`, in half precision."""
    with filling(directory) as scratch:
        _save_model(model, scratch, tokenizer_dir)


def _save_model(model: Model, scratch: Path, tokenizer_dir: Path) -> None:
    model.half().save_pretrained(scratch)
    model.float()
    # transformers 5 loads in the type that the config names: without this, a plain `from_pretrained` computes in half
    # precision.
    config_path = scratch / "config.json"
    config = json.loads(config_path.read_text(encoding="utf-8"))
    for part in (config, config["text_config"], config["vision_config"]):
        part["dtype"] = "float32"
    config_path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    ).save_pretrained(scratch)
    for path in sorted(tokenizer_dir.iterdir()):
        shutil.copyfile(path, scratch / path.name)


def write_model_card(
    directory: Path, model: Model, data: Mapping[str, Any], results: Mapping[str, Any], args: argparse.Namespace
) -> None:
    """Writes `README.md` beside the weights."""
    state = load_checkpoint(args.work_dir / "checkpoint.safetensors")[1]
    minutes, step = state["elapsed_s"] / 60, int(state["step"])
    records = data["train"]
    emoji_names = {record["name"] for record in records if record["style"] in emoji.BASE_STYLES}
    figures = ""
    labels = {"text": "captions", "image": "pictures in another style", "pixels": "the same, raw pixels instead"}
    for style, scores in results.items():
        for kind, label in labels.items():
            figures += f"| {style} | {label} | {scores[kind]['R@1']:.3f} | {scores[kind]['R@5']:.3f} |\n"
    uses = [(key, "training, figures") for key in emoji.BASE_STYLES]
    uses += [(key, "training") for key in emoji.LINE_ICONS] + [(key, "figures") for key in emoji.HELD_OUT_STYLES]
    sources = ""
    for key, use in [*uses, ("emojibase", "names, tags and groups")]:
        package = emoji.PACKAGES[key]
        sources += f"| {package.source} | {package.name} {package.version} | {package.licence} | {use} |\n"
    held_out = {record["name"] for record in data["heldout"]}
    vision, text = model.config.vision_config, model.config.text_config
    card = MODEL_CARD.format(
        size_mib=sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()) / 2**20,
        dim=model.config.projection_dim,
        vision_width=vision.hidden_size,
        vision_layers=vision.num_hidden_layers,
        vision=sum(p.numel() for p in model.vision_model.parameters()) / 1e6,
        text_width=text.hidden_size,
        text_layers=text.num_hidden_layers,
        text=sum(p.numel() for p in model.text_model.parameters()) / 1e6,
        max_tokens=MAX_TOKENS,
        vocab_size=text.vocab_size,
        num_concepts=len(held_out),
        chance_1=1 / len(held_out),
        chance_5=5 / len(held_out),
        styles=", ".join(emoji.BASE_STYLES),
        figures=figures,
        num_images=f"{len(records):,}",
        num_emoji=f"{len(emoji_names):,}",
        num_lines=f"{len({record['name'] for record in records} - emoji_names):,}",
        pair_weight=args.pair_weight,
        text_weight=args.text_weight,
        result=f"{step:,} steps of {args.batch_size} concepts (two pictures each) in {minutes:.0f} minutes, "
        f"loss {state['loss']:.2f}.",
        hardware=args.hardware,
        date=args.date,
        seed=args.seed,
        flags=f"--minutes {minutes:.0f}" if args.minutes else f"--minutes 0 --steps {step}",
        sources=sources,
    )
    write_text(directory / "README.md", card)


# ---------------------------------------------------------------------------------------------------------- main


@owning
def main(argv: list[str] | None = None) -> None:
    """Runs the phases in order; what is finished is skipped."""
    args = parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    model_dir = claim_model_dir(args, "pretrain_tiny_clip")
    args.work_dir.mkdir(parents=True, exist_ok=True)
    if "data" in args.phases and not (args.work_dir / "images.safetensors").exists():
        render_data(args.work_dir, args.cache_dir, args.data_dir, args.seed)
    images = load_file(args.work_dir / "images.safetensors")
    data = json.loads((args.work_dir / "records.json").read_text(encoding="utf-8"))
    check_disjoint(data["train"], held_out_concepts(args.data_dir))
    tokenizer = CLIPTokenizer.from_pretrained(args.tokenizer_dir, trust_remote_code=False)
    model = build_model(tokenizer).to(device)
    if device.type == "cpu":
        # The fused attention's backward pass is slow for few tokens on a CPU: plain attention trains 1.3x as fast.
        model.set_attn_implementation("eager")
    if "train" in args.phases:
        train(model, images["train"], Batches(data, tokenizer), args)
    if model_dir is not None:
        model_dir.begin(anew=True)
        checkpoint = args.work_dir / "checkpoint.safetensors"
        if not checkpoint.exists():
            raise FileNotFoundError(f"{checkpoint} is missing; run the phase `train` first")
        tensors, _ = load_checkpoint(checkpoint)
        model.load_state_dict({name: tensors[f"ema.{name}"] for name, _ in model.named_parameters()}, strict=False)
        save_model(model, args.output_dir, args.tokenizer_dir)
        model = CLIPModel.from_pretrained(
            args.output_dir, trust_remote_code=False
        )  # as saved: the weights went through half precision
        results = evaluate(model, tokenizer, images["heldout"], data["heldout"])
        (args.work_dir / "figures.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        print(json.dumps(results, indent=2))
        write_model_card(args.output_dir, model, data, results, args)


if __name__ == "__main__":
    main()
