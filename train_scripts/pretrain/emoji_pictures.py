"""Emoji in several drawing styles under the same concept names: the pictures the bundled tiny models are made of.

The pictures are SVG icon sets of the npm registry, one archive per style, pinned by version and integrity hash. They
are fetched with `npm pack` (nothing of a package is executed), rendered with resvg-py on white, and captioned
`a {style} emoji of {name}`, so that the same concept exists in every style.

Shared by the recipes and `sample_data.py`; not a script.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import subprocess
import tarfile
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from recipe_options import DEFAULT_CACHE
from safetensors.torch import save_file
from tqdm.auto import tqdm


class Package(NamedTuple):
    """An archive of the npm registry, pinned."""

    name: str
    version: str
    integrity: str
    licence: str
    source: str


PACKAGES = {
    "noto": Package(
        "@iconify-json/noto",
        "1.2.9",
        "sha512-DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
        "Apache-2.0",
        "Noto Emoji, Google Inc, https://github.com/googlefonts/noto-emoji",
    ),
    "twemoji": Package(
        "@iconify-json/twemoji",
        "1.2.5",
        "sha512-uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
        "CC-BY-4.0",
        "Twemoji, Twitter, Inc and other contributors, https://github.com/jdecked/twemoji",
    ),
    "fluent": Package(
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "sha512-RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
        "MIT",
        "Fluent Emoji (flat), Microsoft Corporation, https://github.com/microsoft/fluentui-emoji",
    ),
    "emojione": Package(
        "@iconify-json/emojione",
        "1.2.3",
        "sha512-T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8zb9CMMg==",
        "CC-BY-4.0",
        "Emoji One (EmojiTwo), https://github.com/EmojiTwo/emojitwo",
    ),
    "high-contrast": Package(
        "@iconify-json/fluent-emoji-high-contrast",
        "1.2.6",
        "sha512-esqhZPpkrF7sNX3NsLoh8KW64okEr/bzko7WNnFP+qTJGAqDPDYjp0925yxuivXy3HtVQB8xhIKu3+Nq1byX5w==",
        "MIT",
        "Fluent Emoji (high contrast), Microsoft Corporation, https://github.com/microsoft/fluentui-emoji",
    ),
    "blobs": Package(
        "@iconify-json/noto-v1",
        "1.2.5",
        "sha512-/DsVMius69Q0fRS53z7QK1TROSuar606jiIx+laXtdsYGMXpf6LtHBx6CGfoo3UHHb/XpBsw+1L1x3eyPqMuVA==",
        "Apache-2.0",
        "Noto Emoji version 1 (blobs), Google Inc, https://github.com/googlefonts/noto-emoji",
    ),
    "emojibase": Package(
        "emojibase-data",
        "17.0.0",
        "sha512-Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==",
        "MIT",
        "Emojibase, Miles Johnson, https://github.com/milesj/emojibase",
    ),
    "lucide": Package(
        "@iconify-json/lucide",
        "1.2.137",
        "sha512-uKz1+tFbv1RFX/mJQNksdnyKJijNfRGSNnxfiyKtr+dLNfA3ERph+IgpXClKGOlV/5GsZwLv2jgJXQ/bjF/JAg==",
        "ISC",
        "Lucide, Lucide Contributors, https://github.com/lucide-icons/lucide",
    ),
    "tabler": Package(
        "@iconify-json/tabler",
        "1.2.41",
        "sha512-GHg+H/cnr0anaCoV383JONiOMxZQOdojWYNLgL3x0fRE07YW7c+AHiYmIhXet//oq26T830qitdP7l43ojiCXw==",
        "MIT",
        "Tabler Icons, Paweł Kuna, https://github.com/tabler/tabler-icons",
    ),
    "phosphor": Package(
        "@iconify-json/ph",
        "1.2.2",
        "sha512-PgkEZNtqa8hBGjHXQa4pMwZa93hmfu8FUSjs/nv4oUU6yLsgv+gh9nu28Kqi8Fz9CCVu4hj1MZs9/60J57IzFw==",
        "MIT",
        "Phosphor Icons, Phosphor Icons contributors, https://github.com/phosphor-icons/core",
    ),
}

BASE_STYLES = ("noto", "twemoji", "emojione", "fluent")  # what the bundled base is trained on
HELD_OUT_STYLES = ("blobs", "high-contrast")  # never shown to its U-Net or text encoder
CLASSIFIER_STYLES = ("noto", "twemoji", "fluent")  # of the bundled classifier and vision-language model
LINE_ICONS = ("lucide", "tabler", "phosphor")  # teach the autoencoder thin lines, nothing else

# Groups of emojibase whose emoji are things. People, hands, symbols and flags are left out: each would need many
# near-identical pictures (professions, skin tones) or text in the picture. Of the rest, these subgroups are left out:
# scenes, paper, signs and series of nearly the same picture (phases of the moon, mailboxes, loudspeakers). A small
# model draws few concepts well or many badly: what counts is how often it sees each picture.
GROUPS = ("smileys-emotion", "animals-nature", "food-drink", "travel-places", "activities", "objects")
EXCLUDED_SUBGROUPS = (
    *("emotion", "sky-weather", "time", "place-map", "place-geographic", "place-religious", "place-other", "event"),
    *("award-medal", "sound", "music", "phone", "book-paper", "money", "mail", "writing", "office", "lock"),
)
CAT_FACES = (
    "grinning-cat",
    "grinning-cat-with-smiling-eyes",
    "cat-with-tears-of-joy",
    "smiling-cat-with-heart-eyes",
    "cat-with-wry-smile",
    "kissing-cat",
    "weary-cat",
    "crying-cat",
    "pouting-cat",
)
_EXCLUDED = re.compile(r"(^|-)(cat|skin-tone|keycap|flag|family|letter|oclock|thirty)(-|$)|-(tone)$")


def fetch(key: str, cache_dir: Path = DEFAULT_CACHE) -> Path:
    """Returns the archive of the package `key`, from the cache or from the npm registry.

    Args:
        key: A key of `PACKAGES`.
        cache_dir: Folder that keeps the archives.

    Raises:
        FileNotFoundError: npm is not installed, or the registry did not deliver the archive.
        ValueError: The archive is not the pinned one.
    """
    package = PACKAGES[key]
    archive = Path(cache_dir) / f"{package.name.lstrip('@').replace('/', '-')}-{package.version}.tgz"
    if not archive.exists():
        archive.parent.mkdir(parents=True, exist_ok=True)
        spec = f"{package.name}@{package.version}"
        command = ["npm", "pack", "--silent", spec, "--pack-destination", str(archive.parent)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"npm was not found; install it or put {archive.name} into {cache_dir}") from error
        except subprocess.CalledProcessError as error:
            raise FileNotFoundError(f"`npm pack {spec}` failed: {error.stderr.strip()}") from error
    algorithm, _, expected = package.integrity.partition("-")
    found = base64.b64encode(hashlib.new(algorithm, archive.read_bytes()).digest()).decode()
    if found != expected:
        raise ValueError(f"{archive}: {algorithm} is {found}, pinned is {expected}; delete the file and fetch it again")
    return archive


def read_json(key: str, member: str, cache_dir: Path = DEFAULT_CACHE) -> Any:
    """Returns one JSON file of a package, without unpacking the archive."""
    with tarfile.open(fetch(key, cache_dir)) as archive:
        file = archive.extractfile(f"package/{member}")
        if file is None:
            raise FileNotFoundError(f"{PACKAGES[key].name} {PACKAGES[key].version} has no file {member}")
        return json.load(file)


class Kind(NamedTuple):
    """Where emojibase files an emoji."""

    group: str
    subgroup: str


class IconSet:
    """The icons of one package, by concept name."""

    def __init__(self, key: str, cache_dir: Path = DEFAULT_CACHE):
        self.key = key
        self.data: dict[str, Any] = read_json(key, "icons.json", cache_dir)

    def names(self) -> list[str]:
        """Names of the icons, aliases left out (an alias is a second name of the same picture)."""
        return sorted(self.data["icons"])

    def svg(self, name: str) -> str:
        """An icon as a document with a square view box, the icon centred in it.

        Raises:
            ValueError: The set has no such icon.
        """
        if name not in self.data["icons"]:
            raise ValueError(f"icon {name!r} is not in {PACKAGES[self.key].name}; `names()` lists what is")
        icon = self.data["icons"][name]
        left, top = (icon.get(side, self.data.get(side, 0)) for side in ("left", "top"))
        width, height = (icon.get(side, self.data.get(side, 16)) for side in ("width", "height"))
        size = max(width, height)
        box = f"{left - (size - width) / 2} {top - (size - height) / 2} {size} {size}"
        xlink = 'xmlns:xlink="http://www.w3.org/1999/xlink"'
        return f'<svg xmlns="http://www.w3.org/2000/svg" {xlink} viewBox="{box}">{icon["body"]}</svg>'

    def render(self, name: str, size: int) -> np.ndarray:
        """An icon on white, `(size, size, 3)` uint8."""
        # an optional dependency (extra `pretrain`): only whoever rebuilds the data needs it
        png = import_module("resvg_py").svg_to_bytes(
            svg_string=self.svg(name), width=size, height=size, background="#ffffff"
        )
        return np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGB"))


def slug(label: str) -> str:
    """The icon name of an emojibase label: `"Mrs. Claus"` becomes `"mrs-claus"`."""
    ascii_label = unicodedata.normalize("NFKD", label).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", ascii_label.lower()).strip("-")


def is_concept(name: str, kind: Kind) -> bool:
    """Whether an emoji is of the kind the base is trained on: a thing, a face or an animal, and not a cat."""
    return kind.group in GROUPS and kind.subgroup not in EXCLUDED_SUBGROUPS and _EXCLUDED.search(name) is None


def concepts(styles: Mapping[str, Iterable[str]], kinds: Mapping[str, Kind]) -> list[str]:
    """Names of the concepts to train on, sorted: those that every style has, so that style and concept are independent.

    Args:
        styles: Icon names by style.
        kinds: Kind of emoji by icon name, as `emoji_kinds` gives it.
    """
    available = [set(names) for names in styles.values()]
    return sorted(
        name for name, kind in kinds.items() if is_concept(name, kind) and all(name in names for names in available)
    )


def emoji_kinds(cache_dir: Path = DEFAULT_CACHE) -> dict[str, Kind]:
    """Kind of every emoji of emojibase, by icon name."""
    names = read_json("emojibase", "meta/groups.json", cache_dir)
    return {
        slug(entry["label"]): Kind(names["groups"][str(entry["group"])], names["subgroups"][str(entry["subgroup"])])
        for entry in read_json("emojibase", "en/data.json", cache_dir)
        if "group" in entry
    }


def caption(style: str | None, name: str) -> str:
    """`"a noto emoji of red apple"`; without a style `"an emoji of red apple"`."""
    words = name.replace("-", " ")
    return f"an emoji of {words}" if style is None else f"a {style} emoji of {words}"


def class_names(kinds: Mapping[str, Kind], names: Iterable[str], min_concepts: int = 12) -> list[str]:
    """The subgroups of emojibase that have at least `min_concepts` of these concepts, sorted."""
    counts = Counter(kinds[name].subgroup for name in names)
    return sorted(subgroup for subgroup, count in counts.items() if count >= min_concepts)


def words(name: str) -> str:
    """`"red-apple"` as it is written in a sentence."""
    return name.replace("-", " ")


def confusable(name: str, subgroups: Mapping[str, str], rng: np.random.Generator) -> str:
    """Another concept, of the same subgroup where there is one: what a wrong answer about a picture would be."""
    others = [other for other, group in subgroups.items() if group == subgroups[name] and other != name]
    others = others or [other for other in subgroups if other != name]
    return others[rng.integers(len(others))]


class Question(NamedTuple):
    """A question about the picture of a concept, and its answer."""

    type: str
    question: str
    answer: str


def ask(name: str, subgroups: Mapping[str, str], rng: np.random.Generator) -> list[Question]:
    """One question of each type: the name, the kind, and whether it is this one or one that is like it.

    Args:
        name: Concept of the picture.
        subgroups: Subgroup of emojibase of every concept that may be asked for.
        rng: Chooses between yes and no, and what is asked for.
    """
    is_it = bool(rng.random() < 0.5)
    asked = name if is_it else confusable(name, subgroups, rng)
    return [
        Question("name", "What is this?", words(name)),
        Question("kind", "What kind of thing is this?", words(subgroups[name])),
        Question("yes/no", f"Is this {words(asked)}?", "yes" if is_it else "no"),
    ]


def render_styles(path: Path, cache_dir: Path, size: int) -> None:
    """Renders the concepts that the styles of the classifier share, in these and in the styles that it never sees.

    Writes one safetensors file: uint8 images `(count, 3, size, size)` by style, in the order of the concepts' names;
    `path` with the suffix `.json` has the names of each style and the subgroup of each name.
    """
    styles = (*CLASSIFIER_STYLES, *(style for style in BASE_STYLES if style not in CLASSIFIER_STYLES), *HELD_OUT_STYLES)
    icon_sets = {style: IconSet(style, cache_dir) for style in styles}
    kinds = emoji_kinds(cache_dir)
    names = concepts({style: icon_sets[style].names() for style in CLASSIFIER_STYLES}, kinds)
    own = {style: [name for name in names if name in icons.data["icons"]] for style, icons in icon_sets.items()}
    images = {
        style: np.stack([icon_sets[style].render(name, size) for name in tqdm(own[style], desc=f"render {style}")])
        for style in styles
    }
    subgroups = {name: kinds[name].subgroup for name in names}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps({"names": own, "subgroups": subgroups}), encoding="utf-8")
    tensors = {style: torch.from_numpy(stack).permute(0, 3, 1, 2).contiguous() for style, stack in images.items()}
    save_file(tensors, path)  # last: its presence says that the data is complete


def render_training_set(work_dir: Path, cache_dir: Path, size: int, num_line_icons: int, seed: int) -> None:
    """Renders all pictures once: `images.safetensors` (uint8) and `captions.json`.

    `base` is what U-Net and text encoder see; `vae` (further emoji) and `lines` (line icons) are for the autoencoder
    only; `valid` are pictures in the held-out styles, which nothing is trained on.
    """
    icon_sets = {style: IconSet(style, cache_dir) for style in BASE_STYLES}
    kinds = emoji_kinds(cache_dir)
    names = concepts({style: icons.names() for style, icons in icon_sets.items()}, kinds)
    records = [{"style": style, "name": name} for style in icon_sets for name in names]
    progress = tqdm(records, desc="render base")
    base = [icon_sets[record["style"]].render(record["name"], size) for record in progress]

    used = {(record["style"], record["name"]) for record in records}
    others = [
        (style, name)
        for style, icons in icon_sets.items()
        for name, kind in kinds.items()
        if name in icons.data["icons"] and (style, name) not in used
        if kind.group != "flags" and "cat" not in name.split("-")
    ]
    vae = [icon_sets[style].render(name, size) for style, name in tqdm(others, desc="render other emoji")]
    rng = np.random.default_rng(seed)
    lines = []
    for key in LINE_ICONS:
        icons = IconSet(key, cache_dir)
        chosen = rng.choice(icons.names(), min(num_line_icons, len(icons.names())), replace=False)
        lines += [icons.render(str(name), size) for name in tqdm(chosen, desc=f"render {key}")]
    valid = []
    for style in HELD_OUT_STYLES:
        icons = IconSet(style, cache_dir)
        chosen = rng.choice([name for name in names if name in icons.data["icons"]], 100, replace=False)
        valid += [icons.render(str(name), size) for name in chosen]

    stacks = {"base": base, "vae": vae, "lines": lines, "valid": valid}
    entries = read_json("emojibase", "en/data.json", cache_dir)
    corpus = [" ".join([entry["label"], *entry.get("tags", [])]) for entry in entries]
    (work_dir / "captions.json").write_text(json.dumps({"records": records, "corpus": corpus}), encoding="utf-8")
    tensors = {
        key: torch.from_numpy(np.stack(value)).permute(0, 3, 1, 2).contiguous()
        for key, value in stacks.items()
        if value  # a recipe that trains no autoencoder asks for no line icons
    }
    save_file(tensors, work_dir / "images.safetensors")  # last: its presence says that the data is complete
