"""What the tiny CLIP is trained on: pictures and descriptions without what is held out, batches of pairs."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import emoji_pictures as emoji
import numpy as np
import torch
from safetensors.torch import save_file
from shared import IMAGE_SIZE, Model, tokenize
from torch import Tensor
from tqdm.auto import tqdm

NUM_DESCRIPTIONS = 4
DRAWING = "black line"  # the style word of `sample_data.py` for black-line drawings
_WEIGHT = re.compile(r"-(bold|duotone|fill|filled|light|thin)$")


def held_out_concepts(data_dir: Path) -> set[str]:
    """Concepts that scores are computed on: those in `heldout` of the bundled sets of the held-out styles.

    Raises:
        FileNotFoundError: A set is missing.
    """
    names: set[str] = set()
    for style in emoji.HELD_OUT_STYLES:
        path = data_dir / style / "heldout" / "metadata.jsonl"
        if not path.exists():
            raise FileNotFoundError(
                f"{path} lists held-out concepts and is missing; run train_scripts/pretrain/sample_data.py first"
            )
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
