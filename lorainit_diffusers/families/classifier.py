"""Image classifiers of transformers: LoRA on the projections of the backbone, the output layer trained in full.

A base is anything that `AutoModelForImageClassification` loads from pixels (ViT, DeiT, BEiT, DINOv2, Swin, ConvNeXt,
CLIP, SigLIP ...): a classifier, or a backbone such as `facebook/dinov2-small`, which gets a new output layer.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypedDict, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedModel

from lorainit_diffusers.families.augment import Augmentation, mixup
from lorainit_diffusers.families.base import EvaluationMode, StepRecord
from lorainit_diffusers.families.classifier_layers import head_layers, labels_of, match_labels, projections, some_of
from lorainit_diffusers.families.image_preparation import ImagePreparation
from lorainit_diffusers.families.pretrained import autocast, check_option_names, dtype_option
from lorainit_diffusers.loading.errors import loading_errors
from lorainit_diffusers.loading.files import check_transformers_folder
from lorainit_diffusers.loading.hub import hub_options
from lorainit_diffusers.loading.weights import check_complete, check_finite, load_model
from lorainit_diffusers.ranges import check_step

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "COMPONENT",
    "HEADS",
    "ClassifierFamily",
    "ClassifierOptions",
    "ImagePreparation",
    "check_base",
    "head_layers",
    "match_labels",
    "projections",
]

COMPONENT = "model"
HEADS = ("auto", "new", "keep")
# Spread of a new head's weights. Zeros would leave the backbone without gradients, which some initialisations need.
NEW_HEAD_STD = 0.02
_REMEDY = "give a folder that save_pretrained wrote, with safetensors weights, or a hub name"


class ClassifierOptions(TypedDict, total=False):
    """What the training adds to a base; each may be left out.

    Attributes:
        augmentation: What happens to the images of a training step; nothing by default.
        label_smoothing: Of the cross entropy; 0 by default.
        mixup_alpha: Of mixup; 0, the default, is off.
        head_seed: Of a new output layer's weights; 0 by default.
    """

    augmentation: Augmentation | None
    label_smoothing: float
    mixup_alpha: float
    head_seed: int


@dataclass
class ClassifierFamily(EvaluationMode):
    """A classifier with its training loss. The model is taken as it is; `from_pretrained` freezes what it loads.

    A batch holds `pixel_values`, (batch, 3, height, width), uint8 or floats in [0, 1], as `ImagePreparation.crop` gives
    them, and `labels`, (batch,), indices into `class_names`. The base keeps all its outputs, and a class is the output
    of its name.

    Attributes:
        model: What `AutoModelForImageClassification` loads.
        preparation: How pictures become its inputs.
        class_names: Of the data, each of which is a label of the model.
        augmentation: What happens to the images of a training step, and so of a collection pass.
        label_smoothing: Share of a target that is spread over all outputs (Szegedy et al. 2015, arXiv:1512.00567).
        mixup_alpha: Of mixup's Beta distribution (arXiv:1710.09412); 0 is off.
        has_new_head: Whether the output layer is not the base's own.
        step: What the latest `loss` drew; classifiers have neither timesteps nor padding.
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
            raise ValueError(f"the model has no label for the classes {some_of(missing)}; give it a new head")
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
        preparation: ImagePreparation | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        weight_dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        **options: Unpack[ClassifierOptions],
    ) -> ClassifierFamily:
        """Load a base from a local folder or a hub name, frozen; only safetensors weights are read.

        Args:
            path: Folder as `save_pretrained` writes it, or the name of a hub repository.
            class_names: Of the data, in the order of its labels.
            head: `keep` the base's output layer, whose labels the classes must be (in any case, with spaces, hyphens or
                underscores); make a `new` one; or `auto`, which keeps it where it can.
            preparation: How pictures are prepared; that of the base's image processor by default.
            revision: Hub revision of the base.
            cache_dir: Where downloads are kept; Hugging Face's own place by default.
            weight_dtype: Dtype of the backbone. The output layer stays in float32.
            device: Where it goes.
            **options: See `ClassifierOptions`.

        Raises:
            FileNotFoundError: When there is no such base, or it has no safetensors weights or image processor.
            TypeError: For an option that there is not.
            ValueError: When it is no image classifier and has no class for one, lacks weights, or its labels are not
                the classes that `head="keep"` needs.
        """
        check_option_names(cls, options, ClassifierOptions.__annotations__)
        name = os.fspath(path)
        if head not in HEADS:
            raise ValueError(f"`head` {head!r} is none of {', '.join(HEADS)}")
        _check_class_names(class_names)
        check_base(name)
        if preparation is None:
            preparation = ImagePreparation.from_pretrained(name, revision=revision, cache_dir=cache_dir)
        source: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir}
        source |= hub_options("base model", name, "config.json", **source)
        with loading_errors("base model", name, _REMEDY):
            config: Any = AutoConfig.from_pretrained(name, trust_remote_code=False, **source)
        unknown = [] if head == "new" else _unknown_classes(class_names, config)
        if head == "keep" and unknown:
            labels = list(labels_of(config))
            raise ValueError(
                f"base model {name!r} has no label for the classes {some_of(unknown)} (it has {some_of(labels)}); "
                "rename the classes, or make a new head (`head='new'`)"
            )
        new_labels = class_names if head == "new" or unknown else None
        model = _load_model(name, config, new_labels, {**source, **dtype_option(weight_dtype)})
        _prepare_heads(model, None if new_labels is None else options.get("head_seed", 0))
        check_finite(model, f"the base model {name!r}")
        return cls(
            model.requires_grad_(False).eval().to(device),
            preparation,
            tuple(class_names),
            augmentation=options.get("augmentation") or Augmentation(),
            label_smoothing=options.get("label_smoothing", 0.0),
            mixup_alpha=options.get("mixup_alpha", 0.0),
            has_new_head=new_labels is not None,
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
        return labels_of(self.model.config)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def default_targets(self, component: str) -> list[str]:
        """Full names of the projections of attention; of the pointwise layers in a network without (ConvNeXt).

        Raises:
            ValueError: For another component, or a model that has neither (lists its linear layers).
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
            ValueError: When the batch lacks one of its parts.
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


def _load_model(name: str, config: Any, new_labels: Sequence[str] | None, options: Mapping[str, Any]) -> Any:
    """Load the weights of a base, every one of the backbone accounted for.

    Args:
        name: Folder or hub name.
        config: Of the base.
        new_labels: Labels of a new head, whose weights are then to be drawn; None keeps the base's own.
        options: Of transformers' `from_pretrained`.

    Raises:
        ValueError: When it is no classifier of images, lacks weights of its backbone, or those of a head that is kept.
    """
    labels: dict[str, Any] = {}
    if new_labels is not None:
        labels["id2label"] = dict(enumerate(new_labels))
        labels["label2id"] = {label: output for output, label in enumerate(new_labels)}
    with _class_errors(name, config):
        model, problems = load_model(
            AutoModelForImageClassification, name, what="base model", remedy=_REMEDY, **options, **labels
        )
    _check_inputs(name, model)
    heads = head_layers(model)
    in_heads = {key: {k for k in keys if k.rpartition(".")[0] in heads} for key, keys in problems.items()}
    in_body = {key: keys - in_heads[key] for key, keys in problems.items()}
    check_complete(in_body, model, f"the base model {name!r}")
    if new_labels is None and (in_heads["missing"] or in_heads["mismatched"]):
        raise ValueError(
            f"base model {name!r} names the classes but has no trained head for them; make a new one (`head='new'`)"
        )
    return model


def _prepare_heads(model: nn.Module, seed: int | None) -> None:
    """Put the output layers into float32, and draw new weights for them where there is a seed."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    for layer in head_layers(model):
        linear = cast(nn.Linear, model.get_submodule(layer).float())
        if generator is None:
            continue
        linear.weight.data = NEW_HEAD_STD * torch.randn(linear.weight.shape, generator=generator)
        bias = cast("nn.Parameter | None", linear.bias)
        if bias is not None:
            bias.data.zero_()


def check_base(name: str) -> None:
    """See that a base given as a local folder exists; a hub repository's name is left to the loader.

    Raises:
        FileNotFoundError: When the folder is missing or has no `config.json`.
    """
    check_transformers_folder(name, bare_names=True)


def _unknown_classes(class_names: Sequence[str], config: Any) -> list[str]:
    """The classes that are no labels of a base."""
    outputs = match_labels(class_names, labels_of(config))
    return [name for name, output in zip(class_names, outputs, strict=True) if output is None]


def _check_class_names(class_names: Sequence[str]) -> None:
    if len(class_names) < 2:
        raise ValueError(f"a classifier needs at least two classes, got {list(class_names)}")
    twice = sorted({name for name in class_names if list(class_names).count(name) > 1})
    if twice:
        raise ValueError(f"class names must differ, but {some_of(twice)} come more than once")


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
