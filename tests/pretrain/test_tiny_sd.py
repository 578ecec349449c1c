"""The recipe of the bundled base on synthetic pictures: filters, tokenizer, resuming, and a run from end to end."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import diffusion
import emoji_pictures as emoji
import numpy as np
import pytest
import sample_data
import shared
import tiny_sd as recipe
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from recipe_options import RecipeOptions
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTokenizer

# whole recipes, which change rarely: run by hand with -m slow
pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("red-apple", "dog-face", "guitar", "house")


def write_archive(directory: Path, key: str, files: dict[str, object]) -> str:
    """Writes a package archive as npm would, and returns its integrity."""
    package = emoji.PACKAGES[key]
    path = directory / f"{package.name.lstrip('@').replace('/', '-')}-{package.version}.tgz"
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            data = json.dumps(content).encode()
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return "sha512-" + base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()


@pytest.fixture
def noto(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> emoji.IconSet:
    """A package with one wide icon, in the cache folder `tmp_path`."""
    icons = {
        "prefix": "noto",
        "width": 64,
        "height": 64,
        "icons": {"bus": {"body": "<path/>", "left": 2, "height": 32}},
    }
    integrity = write_archive(tmp_path, "noto", {"icons.json": icons})
    monkeypatch.setitem(emoji.PACKAGES, "noto", emoji.PACKAGES["noto"]._replace(integrity=integrity))
    return emoji.IconSet("noto", tmp_path)


def test_icons_are_centred_in_a_square(noto: emoji.IconSet) -> None:
    assert noto.names() == ["bus"]
    assert 'viewBox="2.0 -16.0 64 64"' in noto.svg("bus")
    with pytest.raises(ValueError, match="'car' is not in @iconify-json/noto"):
        noto.svg("car")


def test_archive_that_is_not_the_pinned_one_is_refused(tmp_path: Path) -> None:
    write_archive(tmp_path, "noto", {"icons.json": {}})
    with pytest.raises(ValueError, match=r"pinned is .* delete the file"):
        emoji.fetch("noto", tmp_path)


def test_missing_npm_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"npm was not found; install it or put .*noto-1\.2\.9\.tgz"):
        emoji.fetch("noto", tmp_path)


@pytest.mark.parametrize(
    ("name", "group", "subgroup", "kept"),
    [
        ("red-apple", "food-drink", "food-fruit", True),
        ("delicate-vase", "objects", "household", True),  # contains the letters of "cat"
        ("grinning-cat", "smileys-emotion", "cat-face", False),
        ("black-cat", "animals-nature", "animal-mammal", False),
        ("triangular-flag", "objects", "household", False),
        ("full-moon", "travel-places", "sky-weather", False),
        ("keycap-5", "symbols", "keycap", False),
        ("woman-singer", "people-body", "person-role", False),
        ("flag-france", "flags", "country-flag", False),
    ],
)
def test_filter(name: str, group: str, subgroup: str, kept: bool) -> None:
    assert emoji.is_concept(name, emoji.Kind(group, subgroup)) is kept


def test_all_cat_faces_are_held_out() -> None:
    assert not any(emoji.is_concept(name, emoji.Kind("smileys-emotion", "face-smiling")) for name in emoji.CAT_FACES)


def test_concepts_exist_in_every_style() -> None:
    styles = {"a": ["pizza", "taco", "grinning-cat"], "b": ["pizza", "grinning-cat"]}
    food, face = emoji.Kind("food-drink", "food-prepared"), emoji.Kind("smileys-emotion", "cat-face")
    assert emoji.concepts(styles, {"pizza": food, "taco": food, "grinning-cat": face}) == ["pizza"]


def test_captions_and_slugs() -> None:
    assert emoji.caption("noto", "red-apple") == "a noto emoji of red apple"
    assert emoji.caption(None, "red-apple") == "an emoji of red apple"
    assert emoji.slug("piñata") == "pinata"
    assert emoji.slug("Mrs. Claus") == "mrs-claus"


def test_choice_of_sample_concepts_is_disjoint_and_follows_the_quotas() -> None:
    face, food = emoji.Kind("smileys-emotion", "face-smiling"), emoji.Kind("food-drink", "food-fruit")
    kinds = {f"face-{i}": face for i in range(9)} | {f"food-{i}": food for i in range(5)}
    train, held_out = sample_data.choose(kinds, {"face": 3, "food-drink": 2})
    assert not set(train) & set(held_out)
    assert [sum(name.startswith("face") for name in names) for names in (train, held_out)] == [3, 3]
    with pytest.raises(ValueError, match="'food-drink', 6 are needed"):
        sample_data.choose(kinds, {"food-drink": 3})


@pytest.mark.parametrize(("name", "splits"), [("blobs", (40, 40)), ("high-contrast", (40, 40)), ("cats", (9,))])
def test_bundled_sets(name: str, splits: tuple[int, ...]) -> None:
    directory = ROOT / "assets" / "data" / name
    seen: set[str] = set()
    for split, count in zip(("train", "heldout"), splits, strict=False):
        lines = (directory / split / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
        files = {record["file_name"] for record in records}
        assert len(records) == len(files) == count
        assert files == {path.name for path in (directory / split).glob("*.png")}
        assert not files & seen
        seen |= files
        for record in records:
            words = Path(record["file_name"]).stem.replace("-", " ")
            assert record["text"] == sample_data.CAPTIONS[name].format(words)
        with Image.open(directory / split / records[0]["file_name"]) as image:
            assert (image.size, image.mode) == ((128, 128), "RGB")
    assert "Licence: " in (directory / "LICENSE.txt").read_text(encoding="utf-8")


@pytest.fixture
def tokenizer_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "run" / "tokenizer"
    recipe.build_tokenizer([emoji.caption("noto", name) for name in NAMES] * 2, directory)
    return directory


def test_tokenizer_files_of_old_and_new_transformers_agree(tokenizer_dir: Path, tmp_path: Path) -> None:
    new = CLIPTokenizer.from_pretrained(tokenizer_dir)
    old_dir = tmp_path / "old"
    old_dir.mkdir()
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (old_dir / name).write_bytes((tokenizer_dir / name).read_bytes())
    old = CLIPTokenizer.from_pretrained(old_dir)
    for text in ("a noto emoji of red apple", "words never seen: xylophone ÷ 7!", ""):
        assert new(text).input_ids == old(text).input_ids
        assert new(text).input_ids[0] == new.bos_token_id
        assert new(text).input_ids[-1] == new.eos_token_id
    assert shared.tokenize(new, ["red apple", ""]).shape == (2, recipe.MAX_TOKENS)
    # Every byte exists inside and at the end of a word, so that nothing is unknown.
    assert new.unk_token_id not in new("zyx qvw").input_ids[1:-1]


def test_an_epoch_shows_every_image_once() -> None:
    batches = [shared.batch_indices(step, 4, 10, seed=0) for step in range(5)]
    indices = torch.cat(batches)
    assert sorted(indices[:10].tolist()) == sorted(indices[10:].tolist()) == list(range(10))
    assert indices[:10].tolist() != indices[10:].tolist()


def test_augmentation_keeps_shape_and_range_and_repeats() -> None:
    images = torch.rand(8, 3, 16, 16)
    is_line = torch.arange(8) >= 4
    first, second = (recipe.augment(images, is_line, torch.Generator().manual_seed(1)) for _ in range(2))
    assert first.shape == images.shape
    assert 0 <= first.min() <= first.max() <= 1
    assert torch.equal(first, second)


def tiny_vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        mid_block_add_attention=False,
        norm_num_groups=4,
        sample_size=recipe.IMAGE_SIZE,
    )


def tiny_unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=recipe.IMAGE_SIZE // 2,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=2,
        norm_num_groups=4,
    )


def test_folded_normalisation_whitens_the_latents_and_keeps_the_reconstruction() -> None:
    vae = tiny_vae()
    with torch.no_grad():
        vae.quant_conv.bias += torch.arange(8.0) - 2
    pixels = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8)
    means, stds = diffusion.encode(vae, pixels, torch.device("cpu"))
    before = vae.decode(means).sample
    recipe.fold_normalisation(vae, means)
    new_means, new_stds = diffusion.encode(vae, pixels, torch.device("cpu"))
    scale = means.std((0, 2, 3)).view(-1, 1, 1)
    torch.testing.assert_close(new_means.mean((0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(new_means.std((0, 2, 3)), torch.ones(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(new_stds, stds / scale, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(vae.decode(new_means).sample, before, atol=1e-4, rtol=1e-3)


def options_of(work_dir: Path) -> RecipeOptions:
    return RecipeOptions(work_dir=work_dir, output_dir=work_dir / "out", no_bf16=True, checkpoint_s=0)


def phase(steps: int) -> shared.Phase:
    return shared.Phase("vae", shared.Budget(minutes=0, steps=steps), lr=0.1, final_lr=0.01)


def _average_on_two_ranks(rank: int, rendezvous: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    used, unused = nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(4))
    used.grad = torch.full((2, 3), float(rank))
    shared.average_gradients([used, unused], world_size=2)
    torch.testing.assert_close(used.grad, torch.full((2, 3), 0.5))
    assert torch.equal(unused.grad, torch.zeros(4))
    torch.distributed.destroy_process_group()


def test_gradients_are_averaged_over_processes(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_average_on_two_ranks, (str(tmp_path / "rendezvous"),), nprocs=2)


def noisy_regression(module: nn.Module, stop_at: int | None = None) -> Callable[[int, torch.Generator], Tensor]:
    def loss_fn(step: int, generator: torch.Generator) -> Tensor:
        if step == stop_at:
            raise KeyboardInterrupt
        x = torch.randn(4, 3, generator=generator)
        return (module(x) - x.sum(1, keepdim=True)).square().mean()

    return loss_fn


def test_a_killed_run_resumes_as_if_it_had_not_been_killed(tmp_path: Path) -> None:
    def run(work_dir: Path, stop_at: int | None = None) -> tuple[dict[str, Tensor], nn.Module]:
        torch.manual_seed(0)
        module = nn.Linear(3, 1)
        loss_fn = noisy_regression(module, stop_at)
        return shared.train(phase(12), module, loss_fn, options_of(work_dir), torch.device("cpu")), module

    for directory in ("whole", "killed"):
        (tmp_path / directory).mkdir()
    ema, module = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", stop_at=7)
    resumed_ema, resumed = run(tmp_path / "killed")
    for name, p in module.named_parameters():
        assert torch.equal(p, resumed.get_parameter(name))
        assert torch.equal(ema[name], resumed_ema[name])
    _, state = recipe.load_checkpoint(tmp_path / "killed" / "vae" / "checkpoint.safetensors")
    assert state["step"] == 12


def test_a_phase_without_a_budget_is_refused(tmp_path: Path) -> None:
    module = nn.Linear(3, 1)
    with pytest.raises(ValueError, match="--vae_minutes and --vae_steps are both 0"):
        shared.train(phase(0), module, noisy_regression(module), options_of(tmp_path), torch.device("cpu"))


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    module = nn.Linear(3, 1)

    def loss_fn(step: int, generator: torch.Generator) -> Tensor:
        return module(torch.ones(1, 3)).sum() * float("nan")

    with pytest.raises(FloatingPointError, match="vae: loss is nan at step 10"):
        shared.train(phase(20), module, loss_fn, options_of(tmp_path), torch.device("cpu"))


def test_recipe_from_end_to_end(tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "build_vae", tiny_vae)
    monkeypatch.setattr(recipe, "build_unet", tiny_unet)
    monkeypatch.setattr(recipe, "GRID_NAMES", NAMES[:2])
    work_dir, output_dir = tokenizer_dir.parent, tmp_path / "models" / "tiny"
    rng = np.random.default_rng(0)
    size = recipe.IMAGE_SIZE
    counts = {"base": len(NAMES), "vae": 2, "lines": 2, "valid": 2}
    images = {key: torch.from_numpy(rng.integers(0, 256, (n, 3, size, size), np.uint8)) for key, n in counts.items()}
    save_file(images, work_dir / "images.safetensors")
    records = [{"style": "noto", "name": name} for name in NAMES]
    (work_dir / "captions.json").write_text(json.dumps({"records": records, "corpus": []}), encoding="utf-8")

    argv = ["--work_dir", str(work_dir), "--output_dir", str(output_dir), "--sample_steps", "2"]
    for phase in ("vae", "unet", "decoder"):
        argv += [f"--{phase}_minutes", "0", f"--{phase}_steps", "3"]
    argv += ["--vae_batch_size", "2", "--unet_batch_size", "2"]
    recipe.main(argv)
    weights = load_file(output_dir / "unet" / "diffusion_pytorch_model.safetensors")
    recipe.main(argv)  # every phase is finished: nothing changes
    for name, tensor in load_file(output_dir / "unet" / "diffusion_pytorch_model.safetensors").items():
        assert torch.equal(tensor, weights[name])

    pipeline = StableDiffusionPipeline.from_pretrained(output_dir)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a noto emoji of red apple", num_inference_steps=2, output_type="np").images[0]
    assert image.shape == (size, size, 3)
    assert np.isfinite(image).all()
    assert weights["conv_in.weight"].dtype == torch.float16
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    card = (output_dir / "README.md").read_text(encoding="utf-8")
    assert "CC-BY-4.0" in card
    assert (output_dir / "samples.png").exists()


def test_pinned_packages_are_what_the_registry_delivers(tmp_path: Path) -> None:
    kinds = emoji.emoji_kinds(tmp_path)
    icons = emoji.IconSet("noto", tmp_path)
    assert kinds["red-apple"] == ("food-drink", "food-fruit")
    assert set(emoji.CAT_FACES) <= set(icons.names())
    pytest.importorskip("resvg_py")
    picture = icons.render("red-apple", 32)
    assert picture.shape == (32, 32, 3)
    assert picture[0, 0].tolist() == [255, 255, 255]
