from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from sd_fixtures import ROOT
from torch import Tensor
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    ConvNextConfig,
    ConvNextModel,
    Dinov2Config,
    Dinov2Model,
    PreTrainedModel,
    ViTConfig,
    ViTModel,
)

from lorainit_diffusers.evaluation import (
    ImageEncoder,
    ImageTextEncoder,
    encoders,
    load_encoder,
    perceptual_distance,
    require_text_encoder,
)
from lorainit_diffusers.evaluation.encoders import ClipEncoder, VisionEncoder

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
CROPPED = {"do_center_crop": True, "size": {"shortest_edge": 32}, "crop_size": {"height": 28, "width": 28}}
SQUARE = {"size": {"height": 28, "width": 28}}
VIT = {"hidden_size": 16, "num_attention_heads": 2, "image_size": 28, "patch_size": 7}

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "dinov2": lambda: Dinov2Model(Dinov2Config(**VIT, num_hidden_layers=5, mlp_ratio=2)),
    "vit": lambda: ViTModel(ViTConfig(**VIT, num_hidden_layers=2, intermediate_size=32)),
    "convnext": lambda: ConvNextModel(ConvNextConfig(num_stages=3, hidden_sizes=[8, 8, 12], depths=[1, 1, 1])),
}

if hasattr(transformers, "Dinov2WithRegistersModel"):  # from transformers 4.48
    MODELS["registers"] = lambda: transformers.Dinov2WithRegistersModel(
        transformers.Dinov2WithRegistersConfig(**VIT, num_hidden_layers=3, mlp_ratio=2, num_register_tokens=3)
    )


def write_image_processor(folder: Path, kind: str, options: dict[str, object], resample: int) -> None:
    settings = {"image_processor_type": kind, "image_mean": MEAN, "image_std": STD, "resample": resample, **options}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, random_sd: Path) -> dict[str, Path]:
    """Folders of random models, by kind."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("encoders")
    tokenizer = CLIPTokenizer.from_pretrained(random_sd / "tokenizer")
    size = len(tokenizer)
    text = {
        **{"vocab_size": size, "hidden_size": 16, "intermediate_size": 32, "max_position_embeddings": 12},
        **{"num_hidden_layers": 2, "num_attention_heads": 2},
        **{"bos_token_id": size - 2, "eos_token_id": size - 1, "pad_token_id": size - 1},
    }
    vision = {**VIT, "num_hidden_layers": 4, "intermediate_size": 32}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).half().save_pretrained(
        root / "clip"
    )
    tokenizer.save_pretrained(root / "clip")
    write_image_processor(root / "clip", "CLIPImageProcessor", CROPPED, Image.Resampling.BICUBIC)
    for name, build in MODELS.items():
        build().save_pretrained(root / name)
        square = name in ("vit", "convnext")
        kind = "ViTImageProcessor" if square else "BitImageProcessor"
        resample = Image.Resampling.BILINEAR if square else Image.Resampling.BICUBIC
        write_image_processor(root / name, kind, SQUARE if square else CROPPED, resample)
    return {folder.name: folder for folder in root.iterdir()}


@pytest.fixture(scope="module")
def clip(bases: dict[str, Path]) -> ClipEncoder:
    encoder = load_encoder(bases["clip"], batch_size=2)
    assert isinstance(encoder, ClipEncoder)
    return encoder


@pytest.fixture(scope="module")
def dino(bases: dict[str, Path]) -> VisionEncoder:
    encoder = load_encoder(bases["dinov2"], batch_size=2)
    assert isinstance(encoder, VisionEncoder)
    return encoder


@pytest.fixture
def copy(bases: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """A folder of one's own to break."""
    return lambda name: Path(shutil.copytree(bases[name], tmp_path / name))


def images(*sizes: tuple[int, int]) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    coarse = [Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)) for _ in sizes]
    return [image.resize(size, Image.Resampling.BILINEAR) for image, size in zip(coarse, sizes, strict=True)]


PHOTOS = images((40, 50), (64, 33), (20, 20), (28, 28), (100, 64))


def prepared(image: Image.Image, square: bool) -> Tensor:
    """Written out: resize, crop the middle, to [0, 1], normalise."""
    if square:
        image = image.resize((28, 28), Image.Resampling.BILINEAR)
    else:
        width, height = image.size
        short = min(image.size)
        image = image.resize((int(32 * width / short), int(32 * height / short)), Image.Resampling.BICUBIC)
        left, top = (image.width - 28) // 2, (image.height - 28) // 2
        image = image.crop((left, top, left + 28, top + 28))
    pixels = np.asarray(image, dtype=np.float64) / 255
    return torch.from_numpy((pixels - MEAN) / STD).permute(2, 0, 1).float()


# features are those of the model


@torch.no_grad()
def test_clip_features_are_its_projections(clip: ClipEncoder, bases: dict[str, Path]) -> None:
    model = CLIPModel.from_pretrained(bases["clip"]).float().eval()
    pixels = torch.stack([prepared(image, square=False) for image in PHOTOS])
    expected = model.visual_projection(model.vision_model(pixels).pooler_output)
    assert torch.allclose(clip.encode_images(PHOTOS, normalize=False), expected, atol=1e-5)
    assert expected.norm(dim=1).sub(1).abs().min() > 0.01

    ids = [[188, *ids, 189] for ids in ([64 + 94], [67 + 94, 67 + 94])]  # one token a letter: "a" and "d d"
    expected = torch.cat([model.text_projection(model.text_model(torch.tensor([row])).pooler_output) for row in ids])
    assert torch.allclose(clip.encode_texts(["a", "d d"], normalize=False), expected, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_backbone_features(name: str, bases: dict[str, Path]) -> None:
    square = name in ("vit", "convnext")
    model = type(MODELS[name]()).from_pretrained(bases[name]).eval()
    pixels = torch.stack([prepared(image, square) for image in PHOTOS])
    output = model(pixels)
    if name == "convnext":
        expected = model.layernorm(output.last_hidden_state.mean((2, 3)))
    else:
        expected = output.last_hidden_state[:, 0]  # for ViT not the pooler's output, which DINO did not train
    encoder = load_encoder(bases[name], batch_size=2)
    assert isinstance(encoder, VisionEncoder)
    assert torch.allclose(encoder.encode_images(PHOTOS, normalize=False), expected, atol=1e-5)


@pytest.mark.parametrize("name", ["clip", *MODELS])
def test_features_are_unit_vectors_in_the_order_of_the_images(name: str, bases: dict[str, Path]) -> None:
    encoder = load_encoder(bases[name], batch_size=2)
    features = encoder.encode_images(PHOTOS)
    assert features.dtype == torch.float32
    assert features.device.type == "cpu"
    assert not features.requires_grad
    assert torch.allclose(features.norm(dim=1), torch.ones(5))
    one_by_one = torch.cat([encoder.encode_images([image]) for image in PHOTOS])
    assert torch.allclose(features, one_by_one, atol=1e-5)
    assert torch.cdist(features, features).add(torch.eye(5)).min() > 1e-4
    assert encoder.name == name


def test_texts_are_unit_vectors_and_padding_changes_nothing(clip: ClipEncoder) -> None:
    texts = ["a", "a cat that sleeps", "b c"]
    features = clip.encode_texts(texts)
    assert features.shape == clip.encode_images(PHOTOS[:3]).shape == (3, 12)
    assert torch.allclose(features.norm(dim=1), torch.ones(3))
    assert torch.allclose(features, torch.cat([clip.encode_texts([text]) for text in texts]), atol=1e-6)
    assert torch.cdist(features, features).add(torch.eye(3)).min() > 1e-3
    long = "a b c d e f g h i j"
    assert torch.equal(clip.encode_texts([long]), clip.encode_texts([long + " k l m n o p q r"]))
    assert not torch.equal(clip.encode_texts([long]), clip.encode_texts(["b" + long[1:]]))


def test_transformers_4_returns_tensors(clip: ClipEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    given = torch.tensor([[3.0, 4.0]])
    monkeypatch.setattr(clip.model, "get_image_features", lambda **_: given)
    monkeypatch.setattr(clip.model, "get_text_features", lambda **_: given)
    assert torch.allclose(clip.encode_images(PHOTOS[:1]), given / 5)
    assert torch.allclose(clip.encode_texts(["a"]), given / 5)


@pytest.mark.parametrize("name", ["clip", "dinov2", "vit"])  # not every image processor converts by itself
def test_images_of_other_modes_are_read_as_rgb(name: str, bases: dict[str, Path]) -> None:
    encoder = load_encoder(bases[name])
    grey = PHOTOS[0].convert("L")
    expected = encoder.encode_images([grey.convert("RGB")])
    assert torch.equal(encoder.encode_images([grey]), expected)
    opaque = PHOTOS[0].copy()
    opaque.putalpha(255)
    assert torch.equal(encoder.encode_images([opaque]), encoder.encode_images(PHOTOS[:1]))


# patch features


@pytest.mark.parametrize(("name", "depths", "num_special"), [("dinov2", (1, 2, 3, 5), 1), ("registers", (1, 2, 3), 4)])
@torch.no_grad()
def test_patch_features_are_blocks_at_even_depths_without_special_tokens(
    name: str, depths: tuple[int, ...], num_special: int, bases: dict[str, Path]
) -> None:
    if name not in MODELS:
        pytest.skip("this version of transformers has no DINOv2 with registers")
    pixels = torch.stack([prepared(image, square=False) for image in PHOTOS])
    encoder = load_encoder(bases[name], batch_size=2)
    assert isinstance(encoder, VisionEncoder)
    states = encoder.model(pixel_values=pixels, output_hidden_states=True).hidden_states
    layers = encoder.patch_features(PHOTOS)
    assert [tuple(layer.shape) for layer in layers] == [(5, 16, 16)] * len(depths)
    for layer, depth in zip(layers, depths, strict=True):
        assert torch.allclose(layer, states[depth][:, num_special:], atol=1e-5)


def test_patch_features_of_the_other_kinds(bases: dict[str, Path], clip: ClipEncoder) -> None:
    assert [tuple(layer.shape) for layer in clip.patch_features(PHOTOS)] == [(5, 16, 16)] * 4
    encoder = load_encoder(bases["convnext"])
    assert [tuple(layer.shape) for layer in encoder.patch_features(PHOTOS)] == [(5, 49, 8), (5, 9, 8), (5, 1, 12)]


@pytest.mark.parametrize("name", ["clip", "dinov2", "convnext"])
def test_perceptual_distance_grows_with_the_change(name: str, bases: dict[str, Path]) -> None:
    encoder = load_encoder(bases[name])
    start, end = images((40, 40), (40, 40))
    blends = [Image.blend(start, end, share) for share in (0.0, 0.2, 0.5, 1.0)]
    distances = [float(perceptual_distance(*map(encoder.patch_features, ([start], [blend])))) for blend in blends]
    assert distances[0] == 0
    assert distances == sorted(set(distances))


# loading


def test_model_is_frozen_in_float32_and_evaluates(clip: ClipEncoder) -> None:
    assert not clip.model.training
    assert {parameter.dtype for parameter in clip.model.parameters()} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in clip.model.parameters())


def test_images_never_go_through_torchvision(
    clip: ClipEncoder, bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "Fast" not in type(clip.image_processor).__name__
    assert not {"TorchvisionBackend", "BaseImageProcessorFast"} & {c.__name__ for c in type(clip.image_processor).mro()}
    monkeypatch.setattr(encoders.importlib.util, "find_spec", lambda _: None)
    assert encoders._without_torchvision() == {"use_fast": False}


def test_only_clip_reads_texts(clip: ClipEncoder, dino: VisionEncoder) -> None:
    assert require_text_encoder(clip) is clip
    assert isinstance(dino, ImageEncoder)
    assert not isinstance(dino, ImageTextEncoder)
    with pytest.raises(ValueError, match=r"'dinov2' knows images only .* such as openai/clip-vit-base-patch32"):
        require_text_encoder(dino)


@pytest.mark.parametrize("name", ["./no/such", "/no/such", "a/b/c", "~/no"])
def test_no_such_folder(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"{name}' is not a folder"):
        load_encoder(name)


def test_no_such_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("no connection\nto the hub")

    monkeypatch.setattr(encoders.AutoConfig, "from_pretrained", offline)
    monkeypatch.setattr(encoders, "hub_options", lambda *_, **__: {})
    with pytest.raises(FileNotFoundError, match=r"'owner/name': no connection \(give a folder"):
        load_encoder("owner/name")


@pytest.mark.parametrize(
    "files",
    [["config.json"], ["model.safetensors"], ["preprocessor_config.json"], ["tokenizer.json", "vocab.json"]],
    ids=lambda files: files[0],
)
def test_missing_parts_are_named(files: list[str], copy: Callable[[str], Path]) -> None:
    folder = copy("clip")
    for file in files:
        (folder / file).unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError, match=f"clip' has no {files[0]}"):
        load_encoder(folder)


def test_pickled_weights_are_not_read(copy: Callable[[str], Path]) -> None:
    folder = copy("dinov2")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="convert pickled ones"):
        load_encoder(folder)


def test_weights_of_the_hub_must_be_safetensors(bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, object] = {}

    def record(*_: object, **options: object) -> None:
        asked.update(options)
        raise OSError("no file named model.safetensors")

    monkeypatch.setattr(encoders.AutoModel, "from_pretrained", record)
    with pytest.raises(FileNotFoundError, match=r"no file named model\.safetensors"):
        load_encoder(bases["dinov2"], revision="v2")
    assert asked["use_safetensors"] is True
    assert asked["revision"] == "v2"


def test_missing_weights_are_not_made_up(copy: Callable[[str], Path]) -> None:
    folder = copy("dinov2")
    weights = load_file(folder / "model.safetensors")
    del weights["layernorm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights of its Dinov2Model, such as 'layernorm\.weight'"):
        load_encoder(folder)


def test_end_token_of_model_and_tokenizer_must_agree(copy: Callable[[str], Path]) -> None:
    folder = copy("clip")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["text_config"]["eos_token_id"] = 5
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match="end token 5, but its tokenizer ends texts with 189"):
        load_encoder(folder)


def test_other_models_are_refused(copy: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy("dinov2")
    (folder / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}', encoding="utf-8")
    with pytest.raises(ValueError, match="dinov2' is not a model of transformers"):
        load_encoder(folder)
    (folder / "config.json").write_text('{"model_type": "unknown"}', encoding="utf-8")
    with pytest.raises(ValueError, match="dinov2' is not a model of transformers"):
        load_encoder(folder)
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=9)
    BertModel(config).save_pretrained(tmp_path / "bert")
    write_image_processor(tmp_path / "bert", "ViTImageProcessor", SQUARE, Image.Resampling.BILINEAR)
    with pytest.raises(ValueError, match="bert' is of type 'bert', which does not take images alone"):
        load_encoder(tmp_path / "bert")


def test_empty_inputs(clip: ClipEncoder, dino: VisionEncoder) -> None:
    for call in (clip.encode_images, clip.patch_features, dino.encode_images, dino.patch_features):
        with pytest.raises(ValueError, match=f"{call.__self__.name}' was given no images"):
            call([])
    for texts in ([], "a cat"):
        with pytest.raises(ValueError, match="'clip' takes a non-empty list of texts"):
            clip.encode_texts(texts)


def test_bundled_clip() -> None:
    folder = ROOT / "assets" / "models" / "tiny-clip"
    if not (folder / "config.json").is_file():
        pytest.skip("a checkout without the bundled CLIP")
    encoder = require_text_encoder(load_encoder(folder))
    red, blue = (Image.new("RGB", (64, 64), colour) for colour in ("red", "blue"))
    assert encoder.encode_images([red, blue]).shape == encoder.encode_texts(["a cat", "a dog"]).shape
