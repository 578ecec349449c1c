"""A base in one file, and hub names without a network."""

from __future__ import annotations

import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path

import huggingface_hub
import pytest
import torch
from loading_fixtures import load_small_base, write_small_base
from safetensors.torch import load_file, save_file

from lorainit_diffusers.evaluation.encoders import load_encoder
from lorainit_diffusers.families import family_class
from lorainit_diffusers.loading import hub
from lorainit_diffusers.training.data.named_datasets import load_splits


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_base("sd", tmp_path_factory.mktemp("sd") / "base")


# diffusers' names and those of the original checkpoints, for the small base's UNet and autoencoder
RESNET = {
    **{"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0"},
    **{"conv2": "out_layers.3", "conv_shortcut": "skip_connection"},
}
UNET = {
    **{
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
    },
    **{"conv_norm_out": "out.0", "conv_out": "out.2", "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op"},
    **{"down_blocks.0.resnets.0": "input_blocks.1.0", "down_blocks.0.attentions.0": "input_blocks.1.1"},
    **{"down_blocks.1.resnets.0": "input_blocks.3.0", "mid_block.resnets.0": "middle_block.0"},
    **{"mid_block.attentions.0": "middle_block.1", "mid_block.resnets.1": "middle_block.2"},
    **{"up_blocks.0.resnets.0": "output_blocks.0.0", "up_blocks.0.resnets.1": "output_blocks.1.0"},
    **{"up_blocks.0.upsamplers.0.conv": "output_blocks.1.1.conv", "up_blocks.1.resnets.0": "output_blocks.2.0"},
    **{"up_blocks.1.attentions.0": "output_blocks.2.1", "up_blocks.1.resnets.1": "output_blocks.3.0"},
    **{"up_blocks.1.attentions.1": "output_blocks.3.1"},
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def original_unet_name(key: str) -> str:
    ours = next(name for name in sorted(UNET, key=len, reverse=True) if key.startswith(f"{name}."))
    rest = key.removeprefix(f"{ours}.")
    if ".resnets." in f".{ours}.":
        part = rest.rpartition(".")[0]
        rest = rest.replace(part, RESNET[part])
    return f"model.diffusion_model.{UNET[ours]}.{rest}"


def original_vae_name(key: str) -> str:
    key = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    key = re.sub(r"up_blocks\.(\d)", lambda match: f"up.{2 - int(match[1])}", key).replace("down_blocks.", "down.")
    key = key.replace("downsamplers.0", "downsample").replace("upsamplers.0", "upsample")
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}", key)
    key = key.replace(".resnets.", ".block.")
    if "mid_block.attentions.0." in key:
        before, _, rest = key.partition("mid_block.attentions.0.")
        part, _, kind = rest.rpartition(".")
        key = f"{before}mid.attn_1.{VAE_ATTENTION[part]}.{kind}"
    return f"first_stage_model.{key}"


def write_single_file(base: Path, file: Path, change: Callable[[dict[str, torch.Tensor]], None] | None = None) -> Path:
    """All weights of a base in one file, under the names of the original checkpoints."""
    parts = {name: load_file(base / name / "diffusion_pytorch_model.safetensors") for name in ("unet", "vae")}
    state = {original_unet_name(key): tensor for key, tensor in parts["unet"].items()}
    for key, tensor in parts["vae"].items():
        is_projection = "attentions" in key and tensor.ndim == 2
        state[original_vae_name(key)] = tensor[:, :, None, None].contiguous() if is_projection else tensor
    for key, tensor in load_file(base / "text_encoder" / "model.safetensors").items():
        state[f"cond_stage_model.transformer.text_model.{key.removeprefix('text_model.')}"] = tensor
    if change is not None:
        change(state)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, file)
    return file


def with_configurations(base: Path, folder: Path) -> Path:
    """What a clone of a repository without its large files has: configurations and tokenizers."""
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


# -------------------------------------------------------------------------------------------------------- single files


def test_a_file_beside_its_configurations_is_the_base(base: Path, tmp_path: Path) -> None:
    file = write_single_file(base, with_configurations(base, tmp_path / "clone") / "model.safetensors")
    expected, found = load_small_base("sd", base), load_small_base("sd", file)
    for name in ("unet", "vae", "text_encoder"):
        theirs = getattr(expected, name).state_dict()
        ours = getattr(found, name).state_dict()
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(theirs[key], ours[key]) for key in theirs), name
    assert found.tokenizer("a b").input_ids == expected.tokenizer("a b").input_ids
    assert dict(found.noise_scheduler.config) == dict(expected.noise_scheduler.config)
    half = load_small_base("sd", file, weight_dtype=torch.bfloat16)
    assert {half.unet.dtype, half.text_encoder.dtype} == {torch.bfloat16}
    assert half.vae.dtype == torch.float32


@pytest.mark.parametrize("key", ["model.diffusion_model.out.2.weight", "first_stage_model.decoder.conv_out.weight"])
def test_weights_of_a_single_file_are_accounted_for(base: Path, tmp_path: Path, key: str) -> None:
    def drop(state: dict[str, torch.Tensor]) -> None:
        del state[key]

    def poison(state: dict[str, torch.Tensor]) -> None:
        state[key].view(-1)[0] = float("nan")

    for name, change, message in (("drop", drop, r"lacks|cannot be loaded"), ("poison", poison, "has NaN or infinity")):
        file = write_single_file(base, with_configurations(base, tmp_path / name) / "model.safetensors", change)
        with pytest.raises(ValueError, match=message) as error:
            load_small_base("sd", file)
        assert "\n" not in str(error.value)


def test_without_configurations_the_message_has_the_command(base: Path, tmp_path: Path) -> None:
    file = write_single_file(base, tmp_path / "alone.safetensors")
    with pytest.raises(ValueError, match="cannot reach the hub for its configurations") as error:
        load_small_base("sd", file)
    command = f"""python -c "from diffusers import StableDiffusionPipeline as P; P.from_single_file({str(file)!r})"""
    assert command in str(error.value)
    assert f".save_pretrained({str(tmp_path / 'alone')!r})" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "flux", "pixart", "dit", "lumina2", "classifier", "vlm"])
def test_files_that_are_no_base(kind: str, base: Path, tmp_path: Path) -> None:
    def refused(path: Path | str, message: str) -> None:
        with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
            load_small_base(kind, path)
        assert "\n" not in str(error.value)

    (tmp_path / "model.ckpt").write_bytes(b"\x80\x04")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "cut.safetensors").write_bytes(b"\x80\x04")
    refused(tmp_path / "nowhere.safetensors", "no such file|single file of weights|is not a folder")
    refused(tmp_path / "model.ckpt", "only safetensors weights are read|single file of weights")
    refused(tmp_path / "model.gguf", "is no safetensors file|single file of weights")
    refused(tmp_path / "cut.safetensors", "is cut off|single file of weights")
    if kind not in ("classifier", "vlm"):
        refused(base / "unet" / "diffusion_pytorch_model.safetensors", "is one part of a base; give the whole folder")
        with pytest.raises((ValueError, FileNotFoundError), match="model"):
            family_class(kind).check_base(str(tmp_path / "model.ckpt"))


def test_a_single_file_as_the_vae(base: Path, tmp_path: Path) -> None:
    file = tmp_path / "vae.safetensors"
    shutil.copyfile(base / "vae" / "diffusion_pytorch_model.safetensors", file)
    expected, found = load_small_base("sd", base).vae, load_small_base("sd", base, vae_path=file).vae
    assert all(torch.equal(found.state_dict()[key], tensor) for key, tensor in expected.state_dict().items())
    with pytest.raises(ValueError, match="is a whole base; give its folder"):
        load_small_base("sd", base, vae_path=base)
    with pytest.raises(ValueError, match="is a UNet2DConditionModel, not a AutoencoderKL"):
        load_small_base("sd", base, vae_path=base / "unet")
    (tmp_path / "vae.ckpt").write_bytes(b"")
    with pytest.raises(ValueError, match="only safetensors weights are read"):
        load_small_base("sd", base, vae_path=tmp_path / "vae.ckpt")


# ----------------------------------------------------------------------------------------------------------------- hub


@pytest.fixture
def silent_server() -> Generator[str, None, None]:
    """The address of a server that takes connections and never answers."""
    listener = socket.create_server(("127.0.0.1", 0))
    taken: list[socket.socket] = []

    def accept() -> None:
        while True:
            try:
                taken.append(listener.accept()[0])
            except OSError:
                return

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    listener.close()
    for connection in taken:
        connection.close()


def online(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(hub.constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(hub, "_latest", None)
    monkeypatch.setattr(hub, "TIMEOUT_S", 0.5)


REACHING: dict[str, Callable[[], object]] = {
    **{
        kind: lambda kind=kind: load_small_base(kind, "owner/name")
        for kind in ("sd", "sdxl", "sd3", "flux", "pixart", "dit", "lumina2", "classifier", "vlm")
    },
    "encoder": lambda: load_encoder("owner/name"),
    "dataset": lambda: load_splits("owner/name", None, None),
}


@pytest.mark.parametrize("what", REACHING)
@pytest.mark.parametrize("network", ["switched off", "refused", "silent", "no such name"])
def test_a_hub_name_without_a_network(
    what: str, network: str, silent_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoints = {"refused": "http://127.0.0.1:9", "silent": silent_server, "no such name": "http://hub.invalid"}
    if what == "dataset":
        pytest.importorskip("datasets")
    if network == "switched off":
        monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    else:
        online(monkeypatch, endpoints[network])
    start = time.monotonic()
    with pytest.raises((ValueError, FileNotFoundError), match=r"cannot reach the hub .*'owner/name'"):
        REACHING[what]()
    assert time.monotonic() - start < 8


def test_what_was_downloaded_is_used_without_a_network(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "cache" / "models--owner--name"
    shutil.copytree(base, repository / "snapshots" / ("ab" * 20))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("ab" * 20, encoding="utf-8")
    online(monkeypatch, "http://127.0.0.1:9")
    start = time.monotonic()
    family = load_small_base("sd", "owner/name", cache_dir=tmp_path / "cache")
    assert time.monotonic() - start < 8
    expected = load_small_base("sd", base)
    assert torch.equal(family.unet.conv_in.weight, expected.unet.conv_in.weight)
    with pytest.raises(FileNotFoundError, match="cannot reach the hub"):
        load_small_base("sd", "owner/name", cache_dir=tmp_path / "cache", revision="other")


def test_a_hub_that_answers_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    online(monkeypatch, "http://example.invalid")

    class Session:
        calls = 0

        def head(self, url: str, timeout: float) -> None:
            Session.calls += 1
            assert url == "http://example.invalid"
            assert timeout == 0.5

    monkeypatch.setattr(huggingface_hub.utils, "get_session", Session)
    assert hub.why_unreachable() is None
    assert hub.hub_options("base model", "owner/name", "config.json") == {}
    assert Session.calls == 1  # one question for a base of many files


def test_local_folders_ask_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "why_unreachable", lambda: pytest.fail("asked"))
    assert hub.hub_options("base model", str(tmp_path), "config.json") == {}
