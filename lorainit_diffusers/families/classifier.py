"""Image classifiers of transformers: LoRA on the projections of the backbone, the output layer trained in full.

A base is anything that `AutoModelForImageClassification` loads from pixels (ViT, DeiT, BEiT, DINOv2, Swin, ConvNeXt,
CLIP, SigLIP ...): a classifier, or a backbone such as `facebook/dinov2-small`, which gets a new output layer.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel

from lorainit_diffusers.families.augment import Augmentation, mixup
from lorainit_diffusers.families.base import EvaluationMode, StepRecord
from lorainit_diffusers.families.pretrained import autocast, dtype_option
from lorainit_diffusers.loading.errors import BrokenModelError, loading_errors
from lorainit_diffusers.loading.files import check_transformers_folder
from lorainit_diffusers.loading.hub import hub_options
from lorainit_diffusers.loading.weights import check_complete, check_finite, load_model
from lorainit_diffusers.ranges import check_step

COMPONENT = "model"
HEADS = ("auto", "new", "keep")
# What the projections of attention are called, split and fused; those of its output share their names with others.
_ATTENTION_INPUTS = frozenset({"q_proj", "k_proj", "v_proj", "query", "key", "value", "qkv", "qkv_proj", "in_proj"})
_ATTENTION_OUTPUTS = frozenset({"o_proj", "out_proj", "dense", "proj"})
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
# The layers that mix channels in convolutional networks of the ConvNeXt kind.
_POINTWISE = frozenset({"pwconv1", "pwconv2"})
# Where models keep the layers that make the logits: `classifier`, `classifier.1`, `cls_classifier`, `head`, `fc`.
_HEAD = re.compile(r"\w*classifier\w*|\w*head|fc")
# Spread of a new head's weights. Zeros would leave the backbone without gradients, which some initialisations need.
NEW_HEAD_STD = 0.02


# -------------------------------------------------------------------------------------------------------- the pictures


@dataclass(frozen=True)
class ImagePreparation:
    """How a picture becomes what the base sees: its image processor's recipe, in two halves.

    `crop` is done once; augmentation comes between it and `normalize`, which is part of the training step.

    Attributes:
        resolution: side of the square that the base sees, in pixels.
        shorter_side: to which a picture is resized before its centre is cut out.
        mean, std: of the channels, as the processor scales them.
        scale: what a pixel of 1.0 is multiplied by before that.
        reverse_channels: whether the base wants blue first.
        resample: Pillow's resampling filter.
        processor: the image processor, for saving.
    """

    resolution: int
    shorter_side: int
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    scale: float = 1.0
    reverse_channels: bool = False
    resample: int = int(Image.Resampling.BILINEAR)
    processor: Any = field(default=None, repr=False, compare=False)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        resolution: int | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> ImagePreparation:
        """Read a base's image processor.

        Args:
            path: folder or hub name of the base.
            resolution: side of the square, instead of the processor's; the margin is cut in the same proportion.
            revision: hub revision.
            cache_dir: where downloads are kept; Hugging Face's own place by default.

        Raises:
            FileNotFoundError: when there is no such base, or it has no image processor.
            ValueError: when its pictures are not square or have no size.
        """
        name = os.fspath(path)
        check_transformers_folder(name, bare_names=True, weights=False)
        # The processors on Pillow and numpy: torchvision is not needed. transformers 5 has renamed the option.
        renamed = importlib.util.find_spec("transformers.image_processing_backends") is not None
        options: dict[str, Any] = {"backend": "pil"} if renamed else {"use_fast": False}
        source: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir}
        source |= hub_options("base model", name, "config.json", **source)
        what = "image processor of the base model"
        with loading_errors(what, name, "save the image processor into the folder"):
            processor: Any = AutoImageProcessor.from_pretrained(name, trust_remote_code=False, **source, **options)
        with loading_errors(what, name, "correct its preprocessor_config.json, or copy it again"):
            return cls._of_processor(name, processor, resolution)

    @classmethod
    def _of_processor(cls, name: str, processor: Any, resolution: int | None) -> ImagePreparation:
        """The recipe of an image processor."""
        settings: dict[str, Any] = processor.to_dict()
        size = _as_sides(settings.get("size"))
        crop = _as_sides(settings.get("crop_size")) if settings.get("do_center_crop") else {}
        whole, cut = _side(name, size), _side(name, crop) if crop else None
        if cut is None:
            cut = whole
            if settings.get("crop_pct") and whole < 384:  # ConvNeXt's way to say that a margin is cut off
                whole = int(whole / settings["crop_pct"])
        if resolution is not None:
            whole, cut = max(resolution, round(whole * resolution / cut)), resolution
        scale = 255.0 * float(settings.get("rescale_factor", 1 / 255)) if settings.get("do_rescale", True) else 255.0
        normalizes, resample = settings.get("do_normalize", False), settings.get("resample")
        return cls(
            resolution=cut,
            shorter_side=max(whole, cut),
            mean=tuple(settings["image_mean"]) if normalizes else (0.0, 0.0, 0.0),
            std=tuple(settings["image_std"]) if normalizes else (1.0, 1.0, 1.0),
            scale=scale,
            reverse_channels=bool(settings.get("do_flip_channel_order", False)),
            resample=int(Image.Resampling.BILINEAR if resample is None else resample),
            processor=processor,
        )

    def crop(self, image: Image.Image) -> Tensor:
        """The centre of a picture: (3, resolution, resolution) uint8."""
        image = image.convert("RGB")
        factor = self.shorter_side / min(image.size)
        size = tuple(max(self.shorter_side, round(side * factor)) for side in image.size)
        if size != image.size:
            image = image.resize((size[0], size[1]), Image.Resampling(self.resample))
        left, top = (image.width - self.resolution) // 2, (image.height - self.resolution) // 2
        image = image.crop((left, top, left + self.resolution, top + self.resolution))
        return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1).contiguous()

    def normalize(self, images: Tensor) -> Tensor:
        """What the base takes, of (batch, 3, height, width) in [0, 1]."""
        mean, std = (images.new_tensor(values).view(1, -1, 1, 1) for values in (self.mean, self.std))
        images = (images * self.scale - mean) / std
        return images.flip(1) if self.reverse_channels else images

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the image processor, at this resolution."""
        processor, side = self.processor, {"height": self.resolution, "width": self.resolution}
        settings: dict[str, Any] = processor.to_dict()
        if settings.get("do_center_crop"):
            processor.crop_size = side
            processor.size = {"shortest_edge": self.shorter_side}
        elif "shortest_edge" in (settings.get("size") or {}):
            processor.size = {"shortest_edge": self.resolution}
        else:
            processor.size = side
        processor.save_pretrained(os.fspath(directory))


def _as_sides(size: Any) -> dict[str, int]:
    """A processor's size by side; old ones give a number."""
    return {"height": size, "width": size} if isinstance(size, int) else dict(size or {})


def _side(name: str, size: Mapping[str, int]) -> int:
    """The side of a square, or the shorter one that pictures are resized to."""
    sides = {value for key in ("height", "width", "shortest_edge") if (value := size.get(key))}
    if len(sides) != 1:
        raise BrokenModelError(
            f"the image processor of base model {name!r} gives images a size of {dict(size)}; only squares are "
            "supported: set height and width to the same number in its preprocessor_config.json"
        )
    return int(sides.pop())


# --------------------------------------------------------------------------------------------------------- the family


@dataclass
class ClassifierFamily(EvaluationMode):
    """A classifier with its training loss. The model is taken as it is; `from_pretrained` freezes what it loads.

    A batch holds `pixel_values`, (batch, 3, height, width), uint8 or floats in [0, 1], as `ImagePreparation.crop` gives
    them, and `labels`, (batch,), indices into `class_names`. The base keeps all its outputs, and a class is the output
    of its name.

    Attributes:
        model: what `AutoModelForImageClassification` loads.
        preparation: how pictures become its inputs.
        class_names: of the data, each of which is a label of the model.
        augmentation: what happens to the images of a training step, and so of a collection pass.
        label_smoothing: share of a target that is spread over all outputs (Szegedy et al. 2015, arXiv:1512.00567).
        mixup_alpha: of mixup's Beta distribution (arXiv:1710.09412); 0 is off.
        has_new_head: whether the output layer is not the base's own.
        step: what the latest `loss` drew; classifiers have neither timesteps nor padding.
    """

    model: PreTrainedModel
    preparation: ImagePreparation
    class_names: tuple[str, ...]
    _: KW_ONLY
    augmentation: Augmentation = field(default_factory=Augmentation)
    label_smoothing: float = 0.0
    mixup_alpha: float = 0.0
    has_new_head: bool = False
    step: StepRecord = field(default_factory=StepRecord)

    def __post_init__(self) -> None:
        check_step(self)
        outputs = match_labels(self.class_names, self.labels)
        if None in outputs:
            missing = [name for name, output in zip(self.class_names, outputs, strict=True) if output is None]
            raise ValueError(f"the model has no label for the classes {_some(missing)}; give it a new head")
        self.outputs = torch.tensor(outputs)
        self._head_names = head_layers(self.model)
        heads = {id(p) for name in self._head_names for p in self.model.get_submodule(name).parameters()}
        backbone = [p for p in self.model.parameters() if id(p) not in heads]
        self.weight_dtype = backbone[0].dtype
        # Position embeddings for other resolutions are interpolated by some models always, by others when asked to.
        config: Any = getattr(self.model.config, "vision_config", self.model.config)
        usual = getattr(config, "image_size", None)
        takes = inspect.signature(type(self.model).forward).parameters
        interpolate = usual not in (None, self.preparation.resolution) and "interpolate_pos_encoding" in takes
        self._options: dict[str, Any] = {"interpolate_pos_encoding": True} if interpolate else {}

    # ---- loading

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        class_names: Sequence[str],
        head: Literal["auto", "new", "keep"] = "auto",
        head_seed: int = 0,
        preparation: ImagePreparation | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        weight_dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        augmentation: Augmentation | None = None,
        label_smoothing: float = 0.0,
        mixup_alpha: float = 0.0,
    ) -> ClassifierFamily:
        """Load a base from a local folder or a hub name, frozen; only safetensors weights are read.

        Args:
            path: folder as `save_pretrained` writes it, or the name of a hub repository.
            class_names: of the data, in the order of its labels.
            head: `keep` the base's output layer, whose labels the classes must be (in any case, with spaces, hyphens or
                underscores); make a `new` one; or `auto`, which keeps it where it can.
            head_seed: of a new output layer's weights.
            preparation: how pictures are prepared; that of the base's image processor by default.
            revision: hub revision of the base.
            cache_dir: where downloads are kept; Hugging Face's own place by default.
            weight_dtype: dtype of the backbone. The output layer stays in float32.
            device: where it goes.
            augmentation: what happens to the images of a training step; nothing by default.
            label_smoothing: of the cross entropy.
            mixup_alpha: of mixup; 0 is off.

        Raises:
            FileNotFoundError: when there is no such base, or it has no safetensors weights or image processor.
            ValueError: when it is no image classifier and has no class for one, lacks weights, or its labels are not
                the classes that `head="keep"` needs.
        """
        name = os.fspath(path)
        if head not in HEADS:
            raise ValueError(f"head {head!r} is none of {', '.join(HEADS)}")
        _check_class_names(class_names)
        check_base(name)
        if preparation is None:
            preparation = ImagePreparation.from_pretrained(name, revision=revision, cache_dir=cache_dir)
        source: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir}
        source |= hub_options("base model", name, "config.json", **source)
        remedy = "give a folder that save_pretrained wrote, with safetensors weights, or a hub name"
        with loading_errors("base model", name, remedy):
            config: Any = AutoConfig.from_pretrained(name, trust_remote_code=False, **source)
        keep = head != "new" and None not in match_labels(class_names, _labels(config))
        if head == "keep" and not keep:
            labels = _labels(config)
            unknown = [c for c, o in zip(class_names, match_labels(class_names, labels), strict=True) if o is None]
            raise ValueError(
                f"base model {name!r} has no label for the classes {_some(unknown)} (it has {_some(list(labels))}); "
                "rename the classes, or make a new head (head='new', --head new)"
            )
        if not keep:
            source["id2label"] = dict(enumerate(class_names))
            source["label2id"] = {class_name: output for output, class_name in enumerate(class_names)}
        kind = AutoModelForImageClassification
        with _class_errors(name, config):
            model, problems = load_model(
                kind, name, what="base model", remedy=remedy, **source, **dtype_option(weight_dtype)
            )
        _check_inputs(name, model)
        heads = head_layers(model)
        in_heads = {key: {k for k in keys if k.rpartition(".")[0] in heads} for key, keys in problems.items()}
        in_body = {key: keys - in_heads[key] for key, keys in problems.items()}
        check_complete(in_body, model, f"the base model {name!r}")
        if keep and (in_heads["missing"] or in_heads["mismatched"]):
            raise ValueError(
                f"base model {name!r} names the classes but has no trained head for them; make a new one "
                "(head='new', --head new)"
            )
        generator = torch.Generator().manual_seed(head_seed)
        for layer in heads:
            linear: nn.Linear = model.get_submodule(layer).float()
            if not keep:
                linear.weight.data = NEW_HEAD_STD * torch.randn(linear.weight.shape, generator=generator)
                if linear.bias is not None:  # pyright: ignore[reportUnnecessaryComparison]
                    linear.bias.data.zero_()
        check_finite(model, f"the base model {name!r}")
        return cls(
            model.requires_grad_(False).eval().to(device),
            preparation,
            tuple(class_names),
            augmentation=augmentation or Augmentation(),
            label_smoothing=label_smoothing,
            mixup_alpha=mixup_alpha,
            has_new_head=not keep,
        )

    # ---- the model family

    @property
    def adapted(self) -> Mapping[str, nn.Module]:
        """The whole model, under the name `model`."""
        return {COMPONENT: self.model}

    @property
    def heads(self) -> Mapping[str, nn.Module]:
        """The output layers, under `model.` and their names."""
        return {f"{COMPONENT}.{name}": self.model.get_submodule(name) for name in self._head_names}

    @property
    def labels(self) -> dict[str, int]:
        """The model's labels and their outputs."""
        return _labels(self.model.config)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def default_targets(self, component: str) -> list[str]:
        """Full names of the projections of attention; of the pointwise layers in a network without (ConvNeXt).

        Raises:
            ValueError: for another component, or a model that has neither (lists its linear layers).
        """
        if component != COMPONENT:
            raise ValueError(f"a classifier has no component {component!r}; it has {COMPONENT!r}")
        return projections(self.model)

    def loss(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
        """Cross entropy of augmented images, in an evaluation of the images as they are: a scalar, float32.

        Args:
            batch: `pixel_values` and `labels`.
            generator: CPU generator of the augmentation and of mixup, in this order.

        Raises:
            ValueError: when the batch lacks one of its parts.
        """
        if "pixel_values" not in batch or "labels" not in batch:
            raise ValueError(f"a batch needs pixel_values and labels, got {', '.join(batch) or 'nothing'}")
        images = self._unit_interval(batch["pixel_values"])
        targets = self.outputs[batch["labels"].cpu()].to(self.device)
        if self.evaluates:
            return F.cross_entropy(self._forward(images), targets)
        images = self.augmentation(images, generator)
        if not self.mixup_alpha:
            return F.cross_entropy(self._forward(images), targets, label_smoothing=self.label_smoothing)
        one_hot = F.one_hot(targets, len(self.labels)).float()
        images, one_hot = mixup(images, one_hot, self.mixup_alpha, generator)
        return F.cross_entropy(self._forward(images), one_hot, label_smoothing=self.label_smoothing)

    def loss_weight(self, batch: Mapping[str, Tensor]) -> float:
        """The images of the batch, which the loss is the mean over."""
        return float(len(batch["labels"]))

    @contextmanager
    def stratified_timesteps(self, num_samples: int, generator: torch.Generator) -> Generator[None, None, None]:
        """Nothing: classifiers have no timesteps."""
        yield

    def logits(self, pixel_values: Tensor) -> Tensor:
        """What the model says of images without augmentation: (batch, outputs) float32.

        Puts the model into no mode: the caller does. `outputs` are the columns of the classes.

        Args:
            pixel_values: (batch, 3, height, width), uint8 or floats in [0, 1].
        """
        return self._forward(self._unit_interval(pixel_values))

    def _unit_interval(self, pixel_values: Tensor) -> Tensor:
        images = pixel_values.to(self.device)
        return images.float() / 255 if images.dtype == torch.uint8 else images.float()

    def _forward(self, images: Tensor) -> Tensor:
        inputs = self.preparation.normalize(images).to(self.weight_dtype)
        with autocast(self.device, self.weight_dtype):
            return self.model(pixel_values=inputs, **self._options).logits.float()


# ---------------------------------------------------------------------------------------------------------- the layers


def projections(model: nn.Module) -> list[str]:
    """Names of the layers that get an adapter when nothing is said: attention's linear layers, or pointwise ones.

    Layers inside `nn.MultiheadAttention` are none of them: it never calls them as modules.

    Raises:
        ValueError: when there are none (lists the linear layers).
    """
    fused = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention))
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not (fused and name.startswith(fused))
    ]
    attention: list[str] = []
    for name in linear:
        parent, _, own = name.rpartition(".")
        if _ATTENTION.search(parent) and own in _ATTENTION_INPUTS | _ATTENTION_OUTPUTS:
            attention.append(name)
    found = attention or [name for name in linear if name.rpartition(".")[2] in _POINTWISE]
    if not found:
        endings = sorted({name.rpartition(".")[2] for name in linear if name not in head_layers(model)})
        raise ValueError(
            f"{type(model).__name__} has no attention and no pointwise layers; name the layers (--lora_layers): its "
            f"linear layers end in {', '.join(endings[:12]) or 'nothing, and only these can have a LoRA'}"
        )
    return found


def head_layers(model: nn.Module) -> list[str]:
    """Names of the linear layers that make the logits: one, or as many as distilled models have.

    Raises:
        ValueError: when there is none.
    """
    num_labels = len(_labels(cast(Any, model).config))
    named = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module.out_features == num_labels
        and any(_HEAD.fullmatch(part) for part in name.split("."))
        and not _ATTENTION.search(name)
    ]
    # Pooling layers may be called a head, too; the output layer is the outermost.
    top = min((name.count(".") for name in named), default=0)
    heads = [name for name in named if name.count(".") == top]
    if not heads:
        raise ValueError(
            f"{type(model).__name__} has no linear output layer for its {num_labels} labels under a name such as "
            "classifier or head; give a base that ends in one"
        )
    return heads


def match_labels(class_names: Sequence[str], labels: Mapping[str, int]) -> list[int | None]:
    """The output of every class, by its name: the same text, or the same but for case, spaces, hyphens, underscores."""

    def loose(text: str) -> str:
        return re.sub(r"[\s_-]+", " ", text).strip().casefold()

    by_loose: dict[str, list[int]] = {}
    for label, output in labels.items():
        by_loose.setdefault(loose(label), []).append(output)
    matched: list[int | None] = []
    for name in class_names:
        similar = by_loose.get(loose(name), [])
        matched.append(labels[name] if name in labels else similar[0] if len(similar) == 1 else None)
    return matched


def _labels(config: Any) -> dict[str, int]:
    """Label -> output, in the order of the outputs."""
    pairs = sorted((int(output), str(label)) for output, label in cast("dict[Any, Any]", config.id2label).items())
    labels: dict[str, int] = {}
    for output, label in pairs:
        # a label that two outputs share (ImageNet's "crane") would hide one of them
        labels[label if label not in labels else f"{label} ({output})"] = output
    return labels


# ---------------------------------------------------------------------------------------------------------- the checks


def check_base(name: str) -> None:
    """See that a base given as a local folder exists; a hub repository's name is left to the loader.

    Raises:
        FileNotFoundError: when the folder is missing or has no `config.json`.
    """
    check_transformers_folder(name, bare_names=True)


def _check_class_names(class_names: Sequence[str]) -> None:
    if len(class_names) < 2:
        raise ValueError(f"a classifier needs at least two classes, got {list(class_names)}")
    twice = sorted({name for name in class_names if list(class_names).count(name) > 1})
    if twice:
        raise ValueError(f"class names must differ, but {_some(twice)} come more than once")


def _check_inputs(name: str, model: Any) -> None:
    """See that the model takes pictures of three channels, as they are."""
    if model.main_input_name != "pixel_values" or "spatial_shapes" in inspect.signature(type(model).forward).parameters:
        raise ValueError(
            f"base model {name!r} is a {type(model).__name__}, which does not take whole images; give one that does, "
            "such as ViT, DINOv2, Swin, ConvNeXt, CLIP or SigLIP"
        )
    channels = getattr(getattr(model.config, "vision_config", model.config), "num_channels", 3)
    if channels != 3:
        raise ValueError(f"base model {name!r} takes images of {channels} channels; give one that takes colour images")


@contextmanager
def _class_errors(name: str, config: Any) -> Generator[None, None, None]:
    """Say what can be done about a model type without an image classifier."""
    try:
        yield
    except ValueError as error:
        if "AutoModelForImageClassification" not in str(error):
            raise
        raise ValueError(
            f"base model {name!r} is of type {config.model_type!r}, for which transformers has no image classifier; "
            "give a ViT, DeiT, BEiT, DINOv2, Swin, ConvNeXt, CLIP or SigLIP (whole, not its vision part alone)"
        ) from error


def _some(names: Sequence[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
