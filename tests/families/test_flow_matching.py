"""What holds for every family of `FlowMatchingFamily`, on each kind of its bases."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from flow_fixtures import (
    CAPTIONS,
    KINDS,
    Inputs,
    assert_stock_loader_reproduces,
    draw,
    kind_class,
    load,
    load_stock,
    make_batch,
    pixel_difference,
    seeded,
    train_one_step,
    write_base,
)
from flow_references import (
    LOGIT_MEAN,
    LOGIT_STD,
    MODE_SCALE,
    density,
    no_caption,
    noise_levels,
    reference_errors,
    reference_loss,
    text_tokens,
)
from torch import Tensor, nn

from lorainit_diffusers.export import save_diffusers_lora
from lorainit_diffusers.families import TEXT_TO_IMAGE_FAMILIES, ModelFamily, family_class
from lorainit_diffusers.families.flow_matching import WEIGHTING_SCHEMES, FlowMatchingFamily
from lorainit_diffusers.families.pipelines import family_of
from lorainit_diffusers.initialize import initialize


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {kind: write_base(folder / kind, kind) for kind in KINDS}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def base(kind: str, bases: dict[str, Path]) -> Path:
    return bases[kind]


@pytest.fixture(scope="module")
def loaded(bases: dict[str, Path]) -> dict[str, FlowMatchingFamily]:
    """One of each, for tests that change nothing in its modules: loading takes longer than they do."""
    return {kind: load(bases[kind], kind) for kind in KINDS}


@pytest.fixture
def make(kind: str, loaded: dict[str, FlowMatchingFamily]) -> Callable[..., FlowMatchingFamily]:
    """Options -> a family around the modules that all these tests share."""
    return partial(replace, loaded[kind])


# ---- the loss


@pytest.mark.parametrize("scheme", WEIGHTING_SCHEMES)
def test_loss_is_the_one_of_diffusers_examples(kind: str, make: Callable[..., FlowMatchingFamily], scheme: str) -> None:
    family = make(weighting_scheme=scheme, logit_mean=LOGIT_MEAN, logit_std=LOGIT_STD, mode_scale=MODE_SCALE)
    batch = make_batch(family)
    with torch.no_grad():
        loss = family.loss(batch, seeded(3))
        expected = reference_loss(family, kind, batch, 3)
    torch.testing.assert_close(loss, expected.mean(), rtol=1e-5, atol=1e-6)


def test_usual_weighting_schemes(bases: dict[str, Path]) -> None:
    usual = {kind: load(bases[kind], kind).weighting_scheme for kind in KINDS}
    assert usual == {kind: "logit_normal" if kind == "sd3" else "none" for kind in KINDS}


@pytest.mark.parametrize("is_class", [[False, True, True], [False, False, False], [True, True, True]])
def test_prior_preservation_weighs_the_class_images(
    kind: str, make: Callable[..., FlowMatchingFamily], is_class: list[bool]
) -> None:
    family = make(weighting_scheme="none", prior_loss_weight=0.3)
    mask = torch.tensor(is_class)
    batch = {**make_batch(family), "is_class": mask}
    with torch.no_grad():
        loss = family.loss(batch, seeded(3))
        losses = reference_loss(family, kind, batch, 3)
    expected = losses[~mask].sum() / max(1, int((~mask).sum())) + 0.3 * losses[mask].sum() / max(1, int(mask.sum()))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


def test_masked_loss_is_the_mean_weighted_by_the_mask(kind: str, make: Callable[..., FlowMatchingFamily]) -> None:
    family = make(weighting_scheme="none")
    batch = make_batch(family)
    mask = torch.rand(3, 1, 32, 32, generator=seeded(9))
    with torch.no_grad():
        errors = reference_errors(family, kind, batch, 3)
        height, width = errors.shape[-2:]
        places = mask.reshape(3, 1, height, 32 // height, width, 32 // width).mean(dim=(3, 5))
        weights = (places if errors.ndim == 4 else places[:, :, None]).expand_as(errors)
        expected = (errors * weights).flatten(1).sum(dim=1) / weights.flatten(1).sum(dim=1)
        loss = family.loss({**batch, "loss_mask": mask}, seeded(3))
        torch.testing.assert_close(loss, expected.mean(), rtol=1e-5, atol=1e-6)
        # all of an image is what no mask is, and none of it is no loss
        plain, every = (
            family.loss(each, seeded(3)) for each in (batch, {**batch, "loss_mask": torch.ones(3, 1, 8, 8)})
        )
        torch.testing.assert_close(every, plain, rtol=1e-6, atol=0)
        mask[1:] = 0
        torch.testing.assert_close(family.loss({**batch, "loss_mask": mask}, seeded(3)), expected[0] / 3)
        for wrong, message in (
            (torch.ones(2, 1, 32, 32), r"loss_mask has the shape \(2, 1, 32, 32\); for 3 samples it must be \(3, 1, "),
            (torch.ones(3, 32, 32), "loss_mask has the shape"),
            (2 * torch.ones(3, 1, 32, 32), r"loss_mask has numbers from 2 to 2; they must lie in \[0, 1\]"),
        ):
            with pytest.raises(ValueError, match=message):
                family.loss({**batch, "loss_mask": wrong}, seeded())


def test_an_image_beside_the_noise(kind: str, make: Callable[..., FlowMatchingFamily]) -> None:
    family = make(weighting_scheme="none")
    batch = make_batch(family)
    seen = torch.rand(3, 3, 16, 32, generator=seeded(8)) * 2 - 1  # of another size
    if not family.CONDITIONED:
        for name in ("conditioning_images", "conditioning_latents"):
            with pytest.raises(ValueError, match=f"sees no image beside the noise; leave {name} out"):
                family.loss({**batch, name: seen}, seeded())
        return
    latents = family.encode_images(seen)[0]
    with torch.no_grad():
        expected = reference_loss(family, kind, {**batch, "conditioning_latents": latents}, 3).mean()
        plain = family.loss(batch, seeded(3))
        for given in ({"conditioning_images": seen}, {"conditioning_latents": latents}):
            torch.testing.assert_close(family.loss({**batch, **given}, seeded(3)), expected, rtol=1e-5, atol=1e-6)
    assert not torch.isclose(expected, plain, rtol=3e-5)


def test_all_randomness_comes_from_the_generator(kind: str, make: Callable[..., FlowMatchingFamily]) -> None:
    family = make(caption_dropout=0.5)
    assert isinstance(family, ModelFamily)
    batch = make_batch(family)
    global_state = torch.get_rng_state()
    with torch.no_grad():
        first, again, other = (family.loss(batch, seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), global_state)


# ---- levels of noise


@pytest.mark.parametrize("scheme", WEIGHTING_SCHEMES)
def test_stratified_timesteps_take_one_quantile_each(
    kind: str, make: Callable[..., FlowMatchingFamily], scheme: str
) -> None:
    family = make(weighting_scheme=scheme, logit_mean=LOGIT_MEAN, logit_std=LOGIT_STD, mode_scale=MODE_SCALE)
    count = 40
    latents = torch.zeros(count, 4, 4, 4)
    drawn: list[Tensor] = []
    with family.stratified_timesteps(count, seeded(1)):
        for _ in range(2):  # the second round starts anew
            drawn.append(family._add_noise(latents, latents, family._uniform.draw(count, seeded())).timesteps)
    assert not torch.equal(drawn[0], drawn[1])
    for timesteps in drawn:
        assert not torch.equal(timesteps, timesteps.sort().values)
        table = noise_levels(kind, latents).double()
        distance = (table - timesteps.double()[:, None] / 1000).abs()
        assert distance.min(dim=1).values.max() < 1e-6
        place = (distance.argmin(dim=1) / 1000).sort().values
        edges = [density(scheme, min(max(bin / count, 1e-12), 1 - 1e-12)) for bin in range(count + 1)]
        edges = torch.tensor(sorted(edges), dtype=torch.float64)
        # within a bin, but for the table's steps
        assert bool((place >= edges[:-1] - 1.1e-3).all())
        assert bool((place <= edges[1:] + 1e-4).all())


def test_table_is_not_touched_by_sampling(kind: str, make: Callable[..., FlowMatchingFamily]) -> None:
    family = make()
    before = family.noise_scheduler.sigmas.clone()
    family.sample(["a cat"], [0], resolution=32, num_inference_steps=2)
    assert torch.equal(family.noise_scheduler.sigmas, before)
    assert len(before) == 1000


# ---- captions


def conditioning(
    family: FlowMatchingFamily, kind: str, batch: dict[str, Tensor], seed: int = 0
) -> tuple[Tensor, list[Tensor]]:
    """The loss, and the text tokens of each sample that the transformer gets for it."""
    recorded = Inputs(family.denoiser)
    with torch.no_grad():
        loss = family.loss(batch, seeded(seed))
    return loss, text_tokens(kind, recorded.stop()[0])


def encoded(family: FlowMatchingFamily, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"pixel_values": batch["pixel_values"], **family.embed_captions(CAPTIONS, batch_size=2)}


def test_encoded_captions_give_the_same_loss(kind: str, make: Callable[..., FlowMatchingFamily]) -> None:
    family = make()
    batch = make_batch(family)
    columns = encoded(family, batch)
    assert set(columns) == {"pixel_values", *family.EMBEDS}
    losses = [conditioning(family, kind, either) for either in (batch, columns)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=1e-6)


def test_caption_dropout_trains_on_the_pipelines_no_caption(
    kind: str, base: Path, make: Callable[..., FlowMatchingFamily]
) -> None:
    family, stock = make(), load_stock(base, kind)
    empty = no_caption(family, stock, kind)
    batch = make_batch(family)
    kept = conditioning(family, kind, batch)[1]
    for rate in (0.5, 1.0):
        family.caption_dropout = rate
        seen: list[list[bool]] = []
        for columns in (batch, encoded(family, batch)):
            tokens = conditioning(family, kind, columns, seed=2)[1]
            dropped = [row.shape == empty.shape and torch.allclose(row, empty, atol=1e-5) for row in tokens]
            for row, was_dropped, with_caption in zip(tokens, dropped, kept, strict=True):
                torch.testing.assert_close(row, empty if was_dropped else with_caption)
            seen.append(dropped)
        assert seen[0] == seen[1]
        assert all(seen[0]) if rate == 1.0 else len(set(seen[0])) == 2


def test_released_text_encoders(kind: str, base: Path) -> None:
    family = load(base, kind, caption_dropout=0.5)
    batch = make_batch(family)
    columns = encoded(family, batch)
    prompts = ["a cat", "the house", "a cat"]
    options: dict[str, Any] = {"resolution": 32, "num_inference_steps": 2, "guidance_scale": 3.0}
    with torch.no_grad():
        loss = family.loss(columns, seeded())
    images = family.sample(prompts, [0, 1, 2], **options)
    encoders = [weakref.ref(encoder) for encoder in family.text_encoders.values()]
    family.release_text_encoders(prompts)
    gc.collect()
    assert [encoder() for encoder in encoders] == [None] * len(encoders)
    assert family.text_encoders == {}
    assert all(getattr(family, component) is None for component in family.TEXT_ENCODERS)
    again = family.sample(prompts, [0, 1, 2], **options)
    assert [pixel_difference(*pair) for pair in zip(again, images, strict=True)] == [0, 0, 0]
    with torch.no_grad():
        assert torch.equal(family.loss(columns, seeded()), loss)
    with pytest.raises(ValueError, match="prompt 'a dog' was not encoded"):
        family.sample(["a cat", "a dog"], [0, 1], **options)


def test_batch_without_captions_or_images_is_refused(kind: str, make: Callable[..., FlowMatchingFamily]) -> None:
    family = make()
    batch = make_batch(family)
    for missing in (family.caption_columns[-1], "pixel_values"):
        with pytest.raises(ValueError, match=r"a batch needs input_ids.* or prompt_embeds.*and pixel_values or"):
            family.loss({name: values for name, values in batch.items() if name != missing}, seeded())


# ---- precision, devices, gradients


def test_bfloat16_weights_keep_a_float32_loss_and_vae(kind: str, base: Path) -> None:
    family = load(base, kind, weight_dtype=torch.bfloat16)
    assert {p.dtype for p in family.vae.parameters()} == {torch.float32}
    kept = tuple(getattr(family.denoiser, "_keep_in_fp32_modules", None) or ())
    cast = {p.dtype for name, p in family.denoiser.named_parameters() if not any(part in name for part in kept)}
    assert cast == {family.weight_dtype} == {torch.bfloat16}
    batch = make_batch(family)
    with torch.no_grad():
        loss, reference = family.loss(batch, seeded()), load(base, kind).loss(batch, seeded())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, reference, rtol=0.1, atol=0.01)  # Flux's random output is large
    columns = family.embed_captions(["a"])
    assert columns["prompt_embeds"].dtype == torch.bfloat16
    assert family.sample(["a cat"], [0], resolution=32, num_inference_steps=2)[0].size == (32, 32)


def test_offloaded_modules_are_moved_for_their_use_only(kind: str, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family, plain = load(base, kind, offload=True), load(base, kind)
    moves: list[tuple[str, str]] = []
    move = nn.Module.to

    def record(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        moves.extend((name, str(args[0])) for name, part in family.modules.items() if part is module)
        return move(module, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "to", record)
    batch = make_batch(family)
    with torch.no_grad():
        assert torch.equal(family.loss(batch, seeded()), plain.loss(batch, seeded()))
    monkeypatch.undo()
    # to the denoiser's device and back, which are the same here
    assert sorted(name for name, _ in moves) == sorted(["vae", *family.text_encoders] * 2)
    image, expected = (each.sample(["a cat"], [0], resolution=32, num_inference_steps=2)[0] for each in (family, plain))
    assert pixel_difference(image, expected) == 0


@pytest.mark.parametrize("train_text_encoder", [False, True])
def test_only_clip_encoders_get_gradients_and_on_request(kind: str, base: Path, train_text_encoder: bool) -> None:
    trainable = {"sd3": ["text_encoder", "text_encoder_2"], "flux": ["text_encoder"]}.get(
        kind.removesuffix("-kontext"), []
    )
    if train_text_encoder and not trainable:
        with pytest.raises(ValueError, match=f"{kind_class(kind).NAME} has no text encoder that can be trained"):
            load(base, kind, train_text_encoder=True)
        return
    family = load(base, kind, train_text_encoder=train_text_encoder)
    assert list(family.adapted) == ["transformer", *(trainable if train_text_encoder else [])]
    assert list(family.trainable_text_encoders) == trainable
    assert not any(p.requires_grad for module in family.modules.values() for p in module.parameters())
    # those that are not trained are run without a graph; where some are, T5 stays frozen beside them
    for module in (family.adapted if train_text_encoder else family.modules).values():
        module.requires_grad_(True)
    family.loss(make_batch(family), seeded()).backward()
    for name, module in family.modules.items():
        has_gradient = any(p.grad is not None and bool(p.grad.any()) for p in module.parameters())
        assert has_gradient == (name in family.adapted)
    if train_text_encoder:
        with pytest.raises(ValueError, match="captions cannot be encoded once"):
            family.embed_captions(["a cat"])


# ---- refusals


PIPELINES = {kind.__name__: name for name in TEXT_TO_IMAGE_FAMILIES for kind in family_class(name).PIPELINES}


@pytest.mark.parametrize("found", PIPELINES)
def test_base_of_another_family_names_the_family_for_it(kind: str, found: str, tmp_path: Path) -> None:
    index = {"_class_name": found, "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    family = kind_class(kind)
    known = [pipeline.__name__ for pipeline in family.PIPELINES]
    wanted = " or ".join(known)
    if found in known:  # of this family; that its parts are missing is the next thing to say
        with pytest.raises(FileNotFoundError, match=r"its model_index\.json names no "):
            family.check_base(str(tmp_path))
        return
    remedy = rf"use `family_class\('{PIPELINES[found]}'\)` for it"
    with pytest.raises(ValueError, match=rf"is a {found}, not a {wanted}; {remedy}"):
        family.check_base(str(tmp_path))


def test_a_pipeline_has_one_family() -> None:
    kinds = [kind for name in TEXT_TO_IMAGE_FAMILIES for kind in family_class(name).PIPELINES]
    assert len(kinds) == len(set(kinds))
    assert family_of("AudioPipeline") is None


def test_unknown_pipelines_and_folders(kind: str, tmp_path: Path) -> None:
    family = kind_class(kind)
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        family.check_base(str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"no model_index\.json"):
        family.check_base(str(tmp_path))
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "AudioPipeline"}))
    with pytest.raises(ValueError, match=r"is a AudioPipeline, not a .*; this family takes a"):
        family.check_base(str(tmp_path))


def test_scheduler_of_another_kind(kind: str, base: Path, tmp_path: Path) -> None:
    index = json.loads((base / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "DDIMScheduler"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    for refuse in (kind_class(kind).check_base, kind_class(kind).from_pretrained):
        with pytest.raises(ValueError, match=r"samples with DDIMScheduler: .* flow matching"):
            refuse(str(tmp_path))


def test_vae_that_does_not_fit(kind: str, base: Path, tmp_path: Path) -> None:
    config = json.loads((base / "vae" / "config.json").read_text())
    channels = "z_dim" if "z_dim" in config else "latent_channels"
    wider = {name: 2 * config[name] for name in ("latents_mean", "latents_std") if config.get(name)}
    vae = kind_class(kind).VAE_CLASS.from_config({**config, **wider, channels: 2 * config[channels]})
    vae.save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match="takes 4 channels but the VAE makes 8"):
        load(base, kind, vae_path=tmp_path / "vae")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("weighting_scheme", "min_snr", "weighting_scheme 'min_snr' is not one of none, logit_normal, mode"),
        ("logit_std", 0.0, "logit_std must be positive, got 0.0"),
        ("max_sequence_length", 0, "max_sequence_length must be at least 1, got 0"),
        ("caption_dropout", 1.5, "caption_dropout must lie in [[]0, 1], got 1.5"),
        ("prior_loss_weight", -1.0, "prior_loss_weight must not be negative, got -1.0"),
    ],
)
def test_options_out_of_range(
    kind: str, make: Callable[..., FlowMatchingFamily], option: str, value: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(**{option: value})


def test_components_without_adapters(kind: str, make: Callable[..., FlowMatchingFamily]) -> None:
    with pytest.raises(ValueError, match="has no component 'vae'; it has transformer"):
        make().default_targets("vae")


# ---- initialised, trained, saved, loaded


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("cntlora", {"variable_rank": True}),
        ("eva", {"variable_rank": True}),
        ("lora_ga", {}),
        ("gradient_step", {"variable_rank": True}),
        ("gaussian", {"use_rslora": True, "alpha": 3.0}),
    ],
)
def test_trained_lora_loads_on_the_original_base(
    kind: str, base: Path, method: str, options: dict[str, Any], tmp_path: Path
) -> None:
    family = load(base, kind)
    batches = [make_batch(family), make_batch(family, ["a hat", "the sun"])]
    report = initialize(family, method, batches, rank=4, progress=False, **options)
    ranks = {layer.rank for layer in report.layers.values()}
    assert (len(ranks) > 1) == ("variable_rank" in options)
    train_one_step(family)
    assert_stock_loader_reproduces(family, base, kind, tmp_path)


def test_twenty_steps_draw_the_same_images_in_the_stock_pipeline(kind: str, base: Path, tmp_path: Path) -> None:
    """With ranks of their own for the layers, and the offset that CNTLoRA starts from."""
    family = load(base, kind)
    batch = make_batch(family)
    report = initialize(family, "cntlora", [batch], rank=4, variable_rank=True, progress=False)
    assert len({layer.rank for layer in report.layers.values()}) > 1
    parameters = [p for module in family.adapted.values() for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=5e-3)
    for step in range(20):
        optimizer.zero_grad()
        family.loss(batch, seeded(step)).backward()
        optimizer.step()
    path = save_diffusers_lora(family.adapted, tmp_path)
    stock = load_stock(base, kind)
    before = draw(stock, family, kind)
    stock.load_lora_weights(str(path.parent), weight_name=path.name)
    ours, theirs = draw(family.pipeline(), family, kind), draw(stock, family, kind)
    assert np.abs(ours - theirs).max() < 1e-4
    assert np.abs(ours - before).max() > 1e-2


def test_offset_start_is_the_base_model(kind: str, base: Path) -> None:
    family = load(base, kind)
    batch = make_batch(family)
    with torch.no_grad():
        before = family.loss(batch, seeded())
        initialize(family, "cntlora", [batch], rank=4, progress=False)
        torch.testing.assert_close(family.loss(batch, seeded()), before, rtol=1e-5, atol=1e-6)


def test_flux_packs_as_its_pipeline_does() -> None:
    """The oracle's patches, which are written out above, are those of the stock pipeline."""
    latents = torch.randn(2, 4, 8, 6, generator=seeded())
    packed = FluxPipeline._pack_latents(latents, 2, 4, 8, 6)
    ours = latents.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).reshape(2, -1, 16)
    assert torch.equal(packed, ours)
