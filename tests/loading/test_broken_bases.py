"""A base that is not whole is an error that names the part, the weights or the file, whatever family it is of."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from loading_fixtures import (
    COMPONENTS,
    PIPELINES,
    WRITERS,
    a_key,
    components_with_weights,
    damaged_copy,
    edit,
    load_small_base,
    write_small_base,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorainit_diffusers.families import family_class
from lorainit_diffusers.families.classifier import ClassifierFamily
from lorainit_diffusers.loading.weights import load_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The base of a family, written once."""
    written: dict[str, Path] = {}

    def write(kind: str) -> Path:
        if kind not in written:
            written[kind] = write_small_base(kind, tmp_path_factory.mktemp(kind) / "base")
        return written[kind]

    return write


@pytest.fixture
def copy(base: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    def copied(kind: str) -> Path:
        return Path(shutil.copytree(base(kind), tmp_path / "copy"))

    return copied


def one_line(error: BaseException) -> str:
    assert "\n" not in str(error)
    return str(error)


# ------------------------------------------------------------------------------------------------------------- weights


def drop(state: dict[str, Tensor]) -> str:
    key = a_key(state)
    del state[key]
    return key


def add(state: dict[str, Tensor]) -> str:
    state["left.over.weight"] = torch.zeros(3, 2)
    return "left.over.weight"


def reshape(state: dict[str, Tensor]) -> str:
    key = a_key(state)
    state[key] = torch.zeros(*(size + 1 for size in state[key].shape))
    return key


def poison(value: float) -> Callable[[dict[str, Tensor]], str]:
    def damage(state: dict[str, Tensor]) -> str:
        key = a_key(state)
        state[key][-1, -1] = value
        return key

    return damage


DAMAGES: dict[str, tuple[Callable[[dict[str, Tensor]], str], str]] = {
    "missing": (drop, "lacks 1 weights of its"),
    "unexpected": (add, "has 1 unexpected weights"),
    "shape": (reshape, "of another shape"),
    "nan": (poison(float("nan")), "NaN or infinity in 1 weights"),
    "inf": (poison(float("inf")), "NaN or infinity in 1 weights"),
    "-inf": (poison(float("-inf")), "NaN or infinity in 1 weights"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(("kind", "component"), COMPONENTS, ids=[".".join(c) for c in COMPONENTS])
def test_weights_are_named(kind: str, component: str, damage: str, base: Callable[[str], Path], tmp_path: Path) -> None:
    change, message = DAMAGES[damage]
    folder, key = damaged_copy(base(kind), tmp_path / "copy", components_with_weights(kind)[component], change)
    with pytest.raises(ValueError, match=message) as error:
        load_small_base(kind, folder)
    assert f"{key}'" in one_line(error.value)  # as it is called in the file
    assert f"{component} of the base model" in str(error.value) or not component


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_weights_are_checked_in_any_precision(dtype: torch.dtype, base: Callable[[str], Path], tmp_path: Path) -> None:
    for component, file in components_with_weights("sd").items():
        folder, _ = damaged_copy(base("sd"), tmp_path / component, file, poison(float("nan")))
        with pytest.raises(ValueError, match=f"{component} of the base model .* has NaN"):
            load_small_base("sd", folder, weight_dtype=dtype)


def test_numbers_that_half_precision_does_not_hold(base: Callable[[str], Path], tmp_path: Path) -> None:
    for component in ("text_encoder", "unet"):
        file = components_with_weights("sd")[component]
        folder, _ = damaged_copy(base("sd"), tmp_path / component, file, poison(1e6))
        load_small_base("sd", folder, weight_dtype=torch.bfloat16)
        with pytest.raises(ValueError, match=f"{component} of the base model .* as float16; load it in bfloat16"):
            load_small_base("sd", folder, weight_dtype=torch.float16)


def test_a_new_head_may_be_missing_or_of_another_size_but_not_broken(
    base: Callable[[str], Path], tmp_path: Path
) -> None:
    def drop_head(state: dict[str, Tensor]) -> None:
        for key in [key for key in state if key.startswith("classifier")]:
            del state[key]

    folder, _ = damaged_copy(base("classifier"), tmp_path / "headless", "model.safetensors", drop_head)
    names = ["one", "two", "three", "four", "five"]
    for source in (folder, base("classifier")):
        family = ClassifierFamily.from_pretrained(source, class_names=names)
        assert family.has_new_head
        assert all(bool(p.isfinite().all()) for p in family.model.parameters())


def test_what_models_compute_by_themselves_may_be_saved_or_not(base: Callable[[str], Path], tmp_path: Path) -> None:
    def as_in_2022(state: dict[str, Tensor]) -> None:
        """Stable Diffusion 1.5 has position ids in its text encoder; other checkpoints have copies by EMA."""
        state["text_model.embeddings.position_ids"] = torch.arange(12)[None]
        state["model_ema.decay"] = torch.tensor(0.9999)

    folder, _ = damaged_copy(base("sd"), tmp_path / "copy", "text_encoder/model.safetensors", as_in_2022)
    expected = load_small_base("sd", base("sd")).text_encoder.state_dict()
    found = load_small_base("sd", folder).text_encoder.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_prefixes_of_both_versions_of_transformers_are_read(base: Callable[[str], Path], tmp_path: Path) -> None:
    def with_prefix(state: dict[str, Tensor]) -> None:
        for key in list(state):
            state[f"text_model.{key.removeprefix('text_model.')}"] = state.pop(key)

    folder, _ = damaged_copy(base("sd"), tmp_path / "copy", "text_encoder/model.safetensors", with_prefix)
    expected = load_small_base("sd", base("sd")).text_encoder.state_dict()
    found = load_small_base("sd", folder).text_encoder.state_dict()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_attention_of_old_autoencoders_is_read(base: Callable[[str], Path], tmp_path: Path) -> None:
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def as_in_2022(state: dict[str, Tensor]) -> None:
        for key in [key for key in state if ".attentions." in key]:
            old = key
            for new, former in names.items():
                old = old.replace(f".{new}.", f".{former}.")
            state[old] = state.pop(key)

    folder, _ = damaged_copy(base("sd"), tmp_path / "copy", "vae/diffusion_pytorch_model.safetensors", as_in_2022)
    load_small_base("sd", folder)


def test_a_part_of_a_larger_model_is_read(tmp_path: Path) -> None:
    """A text encoder out of a whole CLIP: the checkpoint says that it is one."""
    from classifier_fixtures import random_classifier
    from transformers import CLIPModel, CLIPTextModel

    CLIPModel(random_classifier("clip").config).save_pretrained(tmp_path)
    _, problems = load_model(CLIPTextModel, str(tmp_path), what="text encoder", remedy="")
    assert not any(problems.values())


def test_tied_weights_are_not_missing(tmp_path: Path) -> None:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=5, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=1)
    T5EncoderModel(config).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    for keys in (["shared.weight"], ["encoder.embed_tokens.weight"], ["shared.weight", "encoder.embed_tokens.weight"]):
        embedding = state["shared.weight"]
        others = {key: tensor for key, tensor in state.items() if key != "shared.weight"}
        save_file(
            {**others, **{key: embedding.clone() for key in keys}}, tmp_path / "model.safetensors", {"format": "pt"}
        )
        _, problems = load_model(T5EncoderModel, str(tmp_path), what="text encoder", remedy="")
        assert not any(problems.values()), (keys, problems)


# --------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(("kind", "component"), COMPONENTS, ids=[".".join(c) for c in COMPONENTS])
def test_weights_that_are_cut_off_pickled_or_gone(kind: str, component: str, copy: Callable[[str], Path]) -> None:
    folder = copy(kind)
    file = folder / components_with_weights(kind)[component]
    content = file.read_bytes()
    for broken in (content[: len(content) // 2], content[:40], b"", b"<html>not found</html>"):
        file.write_bytes(broken)
        with pytest.raises(ValueError, match="is cut off or no safetensors file") as error:
            load_small_base(kind, folder)
        assert str(file) in one_line(error.value)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {file.name}") as missing:
        load_small_base(kind, folder)
    assert component in one_line(missing.value)
    (file.parent / f"{'pytorch_model' if 'diffusion' not in file.name else file.stem}.bin").write_bytes(b"\x80\x04")
    with pytest.raises(FileNotFoundError, match=r"only pickled weights .* convert pickled ones") as pickled:
        load_small_base(kind, folder)
    assert str(file.parent) in one_line(pickled.value)


NOT_OBJECTS = {"cut off": '{"a": 1, ', "a list": "[1, 2]", "a number": "3", "nothing": "", "null": "null"}


@pytest.mark.parametrize("content", NOT_OBJECTS.values(), ids=NOT_OBJECTS)
@pytest.mark.parametrize("kind", WRITERS)
def test_every_json_file_of_a_base_must_hold_an_object(kind: str, content: str, copy: Callable[[str], Path]) -> None:
    folder = copy(kind)
    for file in sorted(folder.rglob("*.json")):
        before = file.read_text(encoding="utf-8")
        file.write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match=r"is not JSON|not a JSON object") as error:
            load_small_base(kind, folder)
        assert str(file) in one_line(error.value)
        file.write_text(before, encoding="utf-8")
    load_small_base(kind, folder)


@pytest.mark.parametrize("kind", WRITERS)
def test_a_missing_configuration_is_named(kind: str, copy: Callable[[str], Path]) -> None:
    folder = copy(kind)
    names = {"config.json", "scheduler_config.json", "model_index.json"}
    files = [file for file in sorted(folder.rglob("*.json")) if file.name in names]
    assert files
    for file in files:
        before = file.read_text(encoding="utf-8")
        file.unlink()
        with pytest.raises(FileNotFoundError, match=f"has no {file.name}") as error:
            load_small_base(kind, folder)
        assert file.parent.name in one_line(error.value)
        file.write_text(before, encoding="utf-8")


@pytest.mark.parametrize("kind", PIPELINES)
def test_a_missing_part_is_named(kind: str, copy: Callable[[str], Path]) -> None:
    folder = copy(kind)
    for part in sorted(path for path in folder.iterdir() if path.is_dir()):
        away = part.rename(folder.parent / "away")
        with pytest.raises(FileNotFoundError, match=rf"cannot load the base model .* its {part.name} ") as error:
            load_small_base(kind, folder)
        one_line(error.value)
        if "tokenizer" in part.name:
            part.mkdir()
            with pytest.raises(FileNotFoundError, match=rf"its {part.name} has no vocabulary"):
                load_small_base(kind, folder)
            part.rmdir()
        away.rename(part)


@pytest.mark.parametrize("kind", PIPELINES)
def test_an_index_that_is_not_whole_is_named(kind: str, copy: Callable[[str], Path]) -> None:
    folder = copy(kind)
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    parts = [name for name in index if not name.startswith("_") and isinstance(index[name], list) and index[name][0]]
    optional = {"text_encoder_3", "tokenizer_3"} if kind == "sd3" else set()

    def write(**changes: object) -> None:
        (folder / "model_index.json").write_text(json.dumps({**index, **changes}), encoding="utf-8")

    for part in parts:
        if part not in optional:
            for nothing in (None, [None, None]):
                write(**{part: nothing})
                with pytest.raises(FileNotFoundError, match=rf"model_index\.json names no {part}"):
                    load_small_base(kind, folder)
        for odd in ("UNet", ["diffusers"], {"a": 1}, ["diffusers", 3], 7):
            write(**{part: odd})
            with pytest.raises(ValueError, match=rf"for its {part}, model_index\.json says"):
                load_small_base(kind, folder)
        write(**{part: ["my_code", "MyClass"]})
        with pytest.raises(ValueError, match=f"{part} of the base model .* needs custom code"):
            load_small_base(kind, folder)
        if "tokenizer" not in part:
            write(**{part: ["diffusers", "NoSuchClass"]})
            with pytest.raises(ValueError, match=r"NoSuchClass"):
                load_small_base(kind, folder)
    for odd in (None, 3, "NoSuchPipeline"):
        write(_class_name=odd)
        with pytest.raises(ValueError, match=f"is a {odd}, not a"):
            load_small_base(kind, folder)
    write(_class_name=["pipeline", "MyPipeline"])
    with pytest.raises(ValueError, match="needs custom code"):
        load_small_base(kind, folder)


@pytest.mark.parametrize("kind", PIPELINES)
def test_configurations_that_do_not_make_a_model(kind: str, copy: Callable[[str], Path]) -> None:
    folder = copy(kind)
    family = family_class(kind)
    for part in (*family.TEXT_ENCODERS, family.DENOISER, "vae"):
        file = folder / part / "config.json"
        before = file.read_text(encoding="utf-8")
        for change in (
            {"num_hidden_layers": "two", "num_layers": "two", "block_out_channels": "many"},
            {"hidden_size": -1, "d_model": -1, "attention_head_dim": -1, "in_channels": -4, "latent_channels": -1},
        ):
            edit(file, lambda config, change=change: config.update({k: v for k, v in change.items() if k in config}))
            with pytest.raises((ValueError, FileNotFoundError), match="base model") as error:
                load_small_base(kind, folder)
            one_line(error.value)
        file.write_text(before, encoding="utf-8")


@pytest.mark.parametrize("kind", [kind for kind in PIPELINES if kind != "dit"])
def test_a_tokenizer_of_another_base(kind: str, copy: Callable[[str], Path]) -> None:
    folder = copy(kind)
    family = family_class(kind)
    for encoder in family.TEXT_ENCODERS:
        tokenizer = encoder.replace("text_encoder", "tokenizer")
        if not (folder / tokenizer / "vocab.json").is_file():
            continue  # one file for all of it
        file = folder / tokenizer / "vocab.json"
        before = file.read_text(encoding="utf-8")
        edit(file, lambda vocabulary: vocabulary.update({f"word{index}": 5000 + index for index in range(3)}))
        with pytest.raises(ValueError, match=f"the {tokenizer} of the base model .* but its {encoder} knows"):
            load_small_base(kind, folder)
        file.write_text(before, encoding="utf-8")


@pytest.mark.parametrize("wanted", WRITERS)
def test_a_base_of_another_family(wanted: str, base: Callable[[str], Path]) -> None:
    for kind in WRITERS:
        if kind != wanted:
            with pytest.raises((ValueError, FileNotFoundError), match="base model") as error:
                load_small_base(wanted, base(kind))
            one_line(error.value)


def test_variants_and_revisions(base: Callable[[str], Path], copy: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"its text_encoder has no model\.fp16\.safetensors .*variant 'fp16'"):
        load_small_base("sd", base("sd"), variant="fp16")
    with pytest.raises(ValueError, match="`revision` 'main' is one of a hub repository"):
        load_small_base("sd", base("sd"), revision="main")
    folder = copy("sd")
    for file in sorted(folder.rglob("*.safetensors")):
        file.rename(file.with_name(f"{file.stem}.fp16.safetensors"))
    load_small_base("sd", folder, variant="fp16")
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors .*name the variant"):
        load_small_base("sd", folder)


def test_shards(copy: Callable[[str], Path]) -> None:
    folder = copy("sd") / "unet"
    state = load_file(folder / "diffusion_pytorch_model.safetensors")
    keys = sorted(state)
    shards = {"diffusion_pytorch_model-00001-of-00002.safetensors": keys[::2]}
    shards["diffusion_pytorch_model-00002-of-00002.safetensors"] = keys[1::2]
    for name, own in shards.items():
        save_file({key: state[key] for key in own}, folder / name, {"format": "pt"})
    weight_map = {key: name for name, own in shards.items() for key in own}
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}), encoding="utf-8")
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    found = load_small_base("sd", folder.parent).unet.state_dict()
    assert all(torch.equal(found[key], state[key]) for key in keys)
    (folder / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="its unet has no diffusion_pytorch_model-00002"):
        load_small_base("sd", folder.parent)
    for broken in ("[]", '{"weight_map": []}', "{", '{"metadata": {}}'):
        index.write_text(broken, encoding="utf-8")
        with pytest.raises(ValueError, match="its unet"):
            load_small_base("sd", folder.parent)


# ---------------------------------------------------------------------------------------------------------- custom code


@pytest.mark.parametrize("kind", ["classifier", "vlm"])
def test_code_of_a_base_is_never_run_nor_asked_for(
    kind: str, copy: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*_: object) -> str:
        raise AssertionError("asked on the terminal")

    monkeypatch.setattr("builtins.input", asked)
    folder = copy(kind)
    (folder / "code.py").write_text("raise SystemExit('the code of the base was run')\n", encoding="utf-8")
    auto_map = {
        name: f"code.{name}"
        for name in ("AutoConfig", "AutoModelForImageClassification", "AutoModelForImageTextToText", "AutoProcessor")
    }
    # a class that transformers has is taken from there
    edit(folder / "config.json", lambda config: config.update(auto_map=auto_map))
    load_small_base(kind, folder)
    edit(folder / "config.json", lambda config: config.update(model_type="mine"))
    with pytest.raises(ValueError, match="needs custom code of its own, which is never run") as error:
        load_small_base(kind, folder)
    one_line(error.value)


@pytest.mark.parametrize("kind", ["classifier", "vlm"])
def test_a_type_that_transformers_does_not_know(kind: str, copy: Callable[[str], Path]) -> None:
    folder = copy(kind)
    edit(folder / "config.json", lambda config: config.update(model_type="mine"))
    with pytest.raises(ValueError, match="base model") as error:
        load_small_base(kind, folder)
    one_line(error.value)


@pytest.mark.parametrize("kind", ["classifier", "vlm"])
def test_an_image_processor_that_is_missing_or_odd(kind: str, copy: Callable[[str], Path]) -> None:
    folder = copy(kind)
    file = folder / "preprocessor_config.json"
    (folder / "processor_config.json").unlink(missing_ok=True)
    before = json.loads(file.read_text(encoding="utf-8"))
    for odd in ({"size": "large"}, {"size": {"height": -1}}, {"image_processor_type": "NoSuchProcessor"}):
        file.write_text(json.dumps({**before, **odd}), encoding="utf-8")
        with pytest.raises((ValueError, FileNotFoundError), match="base model") as error:
            load_small_base(kind, folder)
        one_line(error.value)
    file.unlink()
    with pytest.raises((ValueError, FileNotFoundError), match="processor of the base model") as error:
        load_small_base(kind, folder)
    one_line(error.value)
