from __future__ import annotations

import copy
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
)
from vlm_fixtures import (
    KINDS,
    NUM_IMAGE_TOKENS,
    ask,
    edit_json,
    is_transformers_5,
    make_image,
    write_base,
    write_llava,
)

from lorainit_diffusers import adapters, export
from lorainit_diffusers.collect import PassOptions, collect
from lorainit_diffusers.families.base import ModelFamily
from lorainit_diffusers.families.vlm import IGNORED, VisionLanguageFamily, load_processor
from lorainit_diffusers.initialize import initialize
from lorainit_diffusers.methods import METHODS
from lorainit_diffusers.statistics import SecondMoment
from lorainit_diffusers.training_step import TrainingStep

QUESTIONS = (
    ("What is this?", "red apple"),
    ("What kind of thing is this?", "green pear"),
    ("Is this fruit?", "red pear"),
)
# Methods that have a score for every direction, by which ranks are allocated.
SCORED = [name for name, method in METHODS.items() if method().observes != "nothing"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {kind: write_base(folder / kind, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def families(bases: Mapping[str, Path]) -> dict[str, VisionLanguageFamily]:
    """For tests that change nothing in their modules."""
    return {kind: VisionLanguageFamily.from_pretrained(base) for kind, base in bases.items()}


@pytest.fixture(params=KINDS)
def family(request: pytest.FixtureRequest, families: Mapping[str, VisionLanguageFamily]) -> VisionLanguageFamily:
    return families[request.param]


@pytest.fixture
def llava(families: Mapping[str, VisionLanguageFamily]) -> VisionLanguageFamily:
    return families["llava"]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def samples(family: VisionLanguageFamily) -> list[dict[str, Tensor]]:
    """Three questions of different lengths."""
    return [
        family.encode(ask(question, answer), [make_image(seed)]) for seed, (question, answer) in enumerate(QUESTIONS)
    ]


def padded(family: VisionLanguageFamily, batch: Mapping[str, Tensor], count: int, side: str) -> dict[str, Tensor]:
    """The batch with `count` more padding tokens at one side, whatever they hold."""
    found = dict(batch)
    for name, values in batch.items():
        if values.shape == batch["input_ids"].shape:
            fill = {"labels": IGNORED, "input_ids": 7}.get(name, 0)
            padding = values.new_full((len(values), count), fill)
            found[name] = torch.cat([values, padding] if side == "right" else [padding, values], dim=1)
    return found


def copied(family: VisionLanguageFamily, **changes: Any) -> VisionLanguageFamily:
    """A family around a copy of the model."""
    return replace(family, model=copy.deepcopy(family.model), **changes)


def answer_text(family: VisionLanguageFamily, features: Mapping[str, Tensor]) -> str:
    labels = features["labels"][0]
    return family.tokenizer.decode(labels[labels != IGNORED])


# --------------------------------------------------------------------------------------------------------------- layers


def test_is_a_model_family(llava: VisionLanguageFamily) -> None:
    assert isinstance(llava, ModelFamily)
    assert dict(llava.adapted) == {"model": llava.model}
    assert dict(llava.heads) == {}
    with pytest.raises(ValueError, match="one component, 'model', not 'unet'"):
        llava.default_targets("unet")


@pytest.mark.parametrize(
    ("part", "endings"),
    [
        ("language", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("vision", {"q_proj", "k_proj", "v_proj", "out_proj"}),
        ("projector", {"linear_1", "linear_2"}),
    ],
)
def test_layers_of_a_part_alone(llava: VisionLanguageFamily, part: str, endings: set[str]) -> None:
    targets = replace(llava, adapt=(part,)).default_targets("model")
    assert {name.rpartition(".")[2] for name in targets} == endings
    inside = {"language": "language_model", "vision": "vision_tower", "projector": "multi_modal_projector"}[part]
    found = adapters.target_layers(llava.model, targets)
    assert sorted(found) == sorted(targets)  # no layer of the same name elsewhere
    assert all(f".{inside}." in f".{name}" for name in found)


def test_layers_beyond_the_features_that_are_used_get_no_adapter(llava: VisionLanguageFamily) -> None:
    blocks = {name.split(".layers.")[1][0] for name in replace(llava, adapt=("vision",)).default_targets("model")}
    assert blocks == {"0", "1"}  # of three: the features are those of the last layer but one
    for chosen, expected in ((-1, 3), (1, 1), ([0, 2], 2)):
        changed = copied(llava, adapt=("vision",))
        changed.model.config.vision_feature_layer = chosen
        assert len(changed.default_targets("model")) == 4 * expected


def test_fused_attention_and_a_projector_inside_the_tower(families: Mapping[str, VisionLanguageFamily]) -> None:
    qwen = families["qwen2_vl"]
    vision = replace(qwen, adapt=("vision",)).default_targets("model")
    assert {name.rpartition(".")[2] for name in vision} == {"qkv", "proj"}
    projector = replace(qwen, adapt=("projector",)).default_targets("model")
    assert [name.rpartition("merger.")[2] for name in projector] == ["mlp.0", "mlp.2"]
    assert replace(families["idefics3"], adapt=("projector",)).default_targets("model") == [
        "model.connector.modality_projection.proj"
    ]


def test_layers_that_are_not_linear(llava: VisionLanguageFamily) -> None:
    model: Any = copy.deepcopy(llava.model)
    model.model.language_model = GPT2Model(GPT2Config(n_embd=24, n_layer=1, n_head=2, vocab_size=50))
    with pytest.raises(ValueError, match=r"h\.0\.attn\.c_attn' is a Conv1D, as in GPT-2; only linear layers"):
        replace(llava, model=model).default_targets("model")
    model.model.language_model = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="no language layers that are known as such; name some in target_modules"):
        replace(llava, model=model).default_targets("model")


def test_a_language_model_under_another_name(llava: VisionLanguageFamily) -> None:
    class Renamed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vision_tower = nn.ModuleDict({"self_attn": nn.ModuleDict({"q_proj": nn.Linear(2, 2)})})
            self.layers = nn.ModuleDict({"self_attn": nn.ModuleDict({"q_proj": nn.Linear(2, 2)})})

        def get_decoder(self) -> nn.Module:
            return self.layers

    model: Any = copy.deepcopy(llava.model)
    model.model = Renamed()
    model.get_decoder = model.model.get_decoder
    assert replace(llava, model=model).default_targets("model") == ["model.layers.self_attn.q_proj"]


def test_options_are_checked(llava: VisionLanguageFamily) -> None:
    with pytest.raises(ValueError, match="adapt head: give one or more of language, vision, projector"):
        replace(llava, adapt=("head",))
    with pytest.raises(ValueError, match="statistics_tokens is empty: give one or more of answer, image, prompt"):
        replace(llava, statistics_tokens=())
    model: Any = copy.deepcopy(llava.model)
    model.config.is_encoder_decoder = True
    with pytest.raises(ValueError, match="is an encoder-decoder, whose answers are no part of its input"):
        replace(llava, model=model)


# -------------------------------------------------------------------------------------------------------------- loading


def test_loading(tmp_path: Path, bases: Mapping[str, Path]) -> None:
    with pytest.raises(FileNotFoundError, match="is not a folder; give a folder that save_pretrained wrote"):
        VisionLanguageFamily.from_pretrained(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        VisionLanguageFamily.from_pretrained(tmp_path / "empty")
    sizes: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes)).save_pretrained(tmp_path / "text")
    with pytest.raises(ValueError, match="is a 'llama', which is no vision-language model that transformers"):
        VisionLanguageFamily.from_pretrained(tmp_path / "text")
    family = VisionLanguageFamily.from_pretrained(bases["llava"], weight_dtype=torch.bfloat16)
    assert family.weight_dtype == torch.bfloat16
    assert not family.model.training
    assert not any(parameter.requires_grad for parameter in family.model.parameters())


def test_a_processor_without_the_package_that_it_needs(
    bases: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise ImportError("Package `num2words` is required")

    monkeypatch.setattr(AutoProcessor, "from_pretrained", fail)
    with pytest.raises(ValueError, match=r"the processor of .* needs a package .* \(Package `num2words`"):
        load_processor(str(bases["llava"]))


def test_processors_of_videos_need_no_torchvision(
    families: Mapping[str, VisionLanguageFamily], bases: Mapping[str, Path], tmp_path: Path
) -> None:
    family = families["qwen2_vl"]
    assert type(family.processor).__name__ == "Qwen2VLProcessor"
    family.save_processor(tmp_path)
    for path in bases["qwen2_vl"].iterdir():
        if path.name in ("config.json", "model.safetensors"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    again = VisionLanguageFamily.from_pretrained(tmp_path)
    for name, values in family.encode(ask("What is this?", "fruit"), [make_image(0)]).items():
        assert torch.equal(values, again.encode(ask("What is this?", "fruit"), [make_image(0)])[name])


@pytest.mark.skipif(not is_transformers_5(), reason="transformers 4 needs torchvision to import this processor at all")
def test_smolvlm_is_idefics3(
    families: Mapping[str, VisionLanguageFamily], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("transformers.models.smolvlm.processing_smolvlm")
    monkeypatch.setattr(module, "num2words", str)  # a package for the times of videos, which may be missing
    family = VisionLanguageFamily.from_pretrained(write_base(tmp_path, "smolvlm"))
    other = families["idefics3"]
    batch, expected = (each.collate(samples(each)) for each in (family, other))
    assert all(torch.equal(values, expected[name]) for name, values in batch.items())
    with torch.no_grad():
        torch.testing.assert_close(family.loss(batch, seeded()), other.loss(expected, seeded()))
    assert family.default_targets("model") == other.default_targets("model")
    prompts = [family.encode_prompt(ask("What is this?"), [make_image(0)])]
    assert family.generate(prompts, 4) == other.generate(prompts, 4)


# -------------------------------------------------------------------------------------------------------- conversations


def test_answers_alone_are_trained_on(family: VisionLanguageFamily) -> None:
    features = family.encode(ask("What is this?", "red apple"), [make_image(0)])
    end = family.tokenizer.eos_token
    assert answer_text(family, features).strip() == f"red apple{end}"
    labels = features["labels"][0]
    first = int((labels != IGNORED).nonzero()[0])
    prompt = family.encode_prompt(ask("What is this?"), [make_image(0)])
    assert "labels" not in prompt
    assert torch.equal(prompt["input_ids"][0], features["input_ids"][0, :first])  # generation starts where answers do
    images = torch.isin(features["input_ids"], family.conversations.image_tokens)
    assert int(images.sum()) == NUM_IMAGE_TOKENS


@pytest.mark.parametrize("kind", ["llava", "idefics3", "qwen2_vl"])
def test_several_turns_with_images_in_each(families: Mapping[str, VisionLanguageFamily], kind: str) -> None:
    family = families[kind]
    messages = [*ask("What is this?", "red apple"), *ask("What kind of thing is this?", "fruit", num_images=2)]
    features = family.encode(messages, [make_image(0), make_image(1), make_image(2)])
    end = family.tokenizer.eos_token
    assert [text.strip() for text in answer_text(family, features).split(end)] == ["red apple", "fruit", ""]
    single = family.encode(messages[:2], [make_image(0)])
    length = int((single["labels"][0] != IGNORED).nonzero()[-1]) + 1
    assert torch.equal(features["labels"][0, :length], single["labels"][0, :length])


def test_a_system_prompt_comes_first(llava: VisionLanguageFamily) -> None:
    messages = [{"role": "system", "content": "Be brief."}, *ask("What is this?", "fruit")]
    text = llava.tokenizer.decode(llava.encode(messages, [make_image(0)])["input_ids"][0])
    assert text.startswith("Be brief. USER: <image>")


SPELLED = ("</s>", "<s>", "<image>", "<pad>", "<end_of_utterance>", "<|im_end|>", "<|image_pad|>", "<eos>", "<bos>")


@pytest.mark.parametrize("token", SPELLED)
def test_special_tokens_in_texts_are_text(family: VisionLanguageFamily, token: str) -> None:
    """In questions, answers and system prompts: nothing ends, no image is added, and the whole answer is trained on."""

    def conversation(word: str) -> list[dict[str, Any]]:
        found = ask(f"What is {word}{word}?", f"{word} red{word} apple {word}")
        if not family.has_chat_template:
            return found
        return [{"role": "system", "content": [{"type": "text", "text": f"Be {word} brief."}]}, *found]

    features, plain = (family.encode(conversation(word), [make_image(0)]) for word in (token, "fruit"))
    special = family.tokenizer.all_special_ids
    specials = [[i for i in sample["input_ids"][0].tolist() if i in special] for sample in (features, plain)]
    assert specials[0] == specials[1]
    assert specials[0].count(int(family.conversations.image_tokens[0])) == NUM_IMAGE_TOKENS
    assert answer_text(family, features).strip() == f"{token} red{token} apple {token}{family.tokenizer.eos_token}"
    text = family.tokenizer.decode(features["input_ids"][0])
    assert f"What is {token}{token}?" in text
    assert "\ue000" not in text
    prompt = family.encode_prompt(conversation(token)[:-1], [make_image(0)])["input_ids"][0]
    assert torch.equal(prompt, features["input_ids"][0, : len(prompt)])
    assert len({values.shape[1] for name, values in features.items() if name in ("input_ids", "labels")}) == 1
    with torch.no_grad():
        assert bool(torch.isfinite(family.loss(family.collate([features, plain]), seeded())))


def test_special_tokens_of_several_parts_and_private_characters(llava: VisionLanguageFamily) -> None:
    messages = ask("What?", "red apple")
    messages[0]["content"] += [{"type": "text", "text": " A </"}, {"type": "text", "text": "s> \ue000 and \ue001"}]
    features = llava.encode(messages, [make_image(0)])
    assert llava.tokenizer.decode(features["input_ids"][0]).count("What? A </s> \ue000 and \ue001") == 1
    assert int((features["input_ids"] == llava.tokenizer.eos_token_id).sum()) == 1


def test_an_end_that_is_an_ordinary_token_is_refused_in_texts(tmp_path: Path) -> None:
    write_llava(tmp_path)
    line_break = VisionLanguageFamily.from_pretrained(tmp_path).tokenizer.convert_tokens_to_ids("\u010a")
    edit_json(tmp_path / "generation_config.json", eos_token_id=[1, line_break])
    family = VisionLanguageFamily.from_pretrained(tmp_path)
    assert answer_text(family, family.encode(ask("What?", "red apple"), [make_image(0)])).strip() == "red apple</s>"
    family.encode(ask("What\nis it?", "red apple"), [make_image(0)])  # a question may have it
    with pytest.raises(ValueError, match="message 2 has the token '\u010a' in its text, which ends a generation"):
        family.encode(ask("What?", "red\napple"), [make_image(0)])
    with pytest.raises(ValueError, match="message 2 has the token"):
        family.check_texts(ask("What?", "red\napple"), 1)


def test_the_last_answer_gets_an_end_where_the_template_writes_none(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{{ m['role'].upper() }}: {% for p in m['content'] %}"
        "{% if p['type'] == 'image' %}<image>\n{% else %}{{ p['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
    )
    family = VisionLanguageFamily.from_pretrained(write_base(tmp_path, "llava", chat_template=template))
    features = family.encode([*ask("What is this?", "fruit"), *ask("A pear?", "no", num_images=0)], [make_image(0)])
    assert answer_text(family, features).replace(" ", "") == "fruitno</s>"
    assert family.tokenizer.decode(features["input_ids"][0]).endswith("no</s>")


def test_a_template_that_does_not_continue_what_it_began(tmp_path: Path) -> None:
    template = "{{ messages | length }}{% for m in messages %}<image>{% endfor %}"
    family = VisionLanguageFamily.from_pretrained(write_base(tmp_path, "llava", chat_template=template))
    with pytest.raises(ValueError, match="does not write message 2 as the continuation of those before it"):
        family.encode(ask("What is this?", "fruit"), [make_image(0)])


def test_a_processor_without_a_template(tmp_path: Path) -> None:
    family = VisionLanguageFamily.from_pretrained(write_base(tmp_path, "llava", chat_template=None))
    features = family.encode(ask("What is this?", "red apple"), [make_image(0)])
    assert answer_text(family, features) == "red apple</s>"
    text = family.tokenizer.decode(features["input_ids"][0])
    assert text == "<image>" * NUM_IMAGE_TOKENS + "What is this?\nred apple</s>"
    prompt = family.encode_prompt(ask("What is this?"), [make_image(0)])["input_ids"]
    assert torch.equal(prompt, features["input_ids"][:, : prompt.shape[1]])
    with pytest.raises(ValueError, match="has no chat template, so it takes one question and one answer"):
        family.encode([*ask("What is this?", "fruit"), *ask("A pear?", "no", num_images=0)], [make_image(0)])


@pytest.mark.parametrize(
    ("messages", "num_images", "message"),
    [
        ([], 0, "the conversation has no messages"),
        (
            [{"role": "bot", "content": "hello"}],
            0,
            "message 1 has the role 'bot'; roles are system, user",
        ),
        ([{"role": "user", "content": 3}], 0, "message 1 has the content 3; give a text or a list of parts"),
        ([{"role": "user", "content": [{"type": "video"}]}], 0, r"message 1 has the part \{'type': 'video'\}"),
        (ask("What?", "fruit", num_images=2), 1, "2 image parts for 1 images; give one for each"),
        (ask("What?"), 1, "the conversation has no answer"),
        (ask("What?", " "), 1, "message 2 is an empty answer"),
        ([{"role": "assistant", "content": [{"type": "image"}]}], 1, "message 1, an answer, has an image"),
    ],
)
def test_conversations_that_cannot_be_encoded(
    llava: VisionLanguageFamily, messages: list[dict[str, Any]], num_images: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        llava.encode(messages, [make_image(seed) for seed in range(num_images)])


def test_nothing_is_cut(llava: VisionLanguageFamily) -> None:
    messages, images = ask("What is this?", "fruit"), [make_image(0)]
    length = llava.encode(messages, images)["input_ids"].shape[1]
    assert llava.encode(messages, images, max_length=length)["input_ids"].shape[1] == length
    with pytest.raises(ValueError, match=f"has {length} tokens, more than {length - 1}, and is never cut"):
        llava.encode(messages, images, max_length=length - 1)
    with pytest.raises(ValueError, match="more than 256, and is never cut"):
        llava.encode(ask("What is this? " * 100, "fruit"), images)
    with pytest.raises(ValueError, match="the last message is the assistant's"):
        llava.encode_prompt(messages, images)


# ------------------------------------------------------------------------------------------------- loss and generation


def test_loss_is_the_models_own(family: VisionLanguageFamily) -> None:
    batch = family.collate(samples(family))
    with torch.no_grad():
        expected = family.model(**batch).loss
        torch.testing.assert_close(family.loss(batch, seeded()), expected, rtol=1e-5, atol=1e-5)
    answers = family.answer_logits(batch)
    assert answers.tokens.tolist() == batch["labels"][batch["labels"] != IGNORED].tolist()
    assert answers.samples.unique().tolist() == [0, 1, 2]


def test_training_sees_what_a_collection_pass_sees(family: VisionLanguageFamily) -> None:
    batch = family.collate(samples(family))
    own = copied(family)
    own.model.train()
    with torch.no_grad():
        torch.testing.assert_close(own.loss(batch, seeded()), family.loss(batch, seeded(1)))


def test_padding_does_not_change_the_loss(family: VisionLanguageFamily) -> None:
    features = samples(family)
    counts = torch.tensor([float((sample["labels"] != IGNORED).sum()) for sample in features])
    with torch.no_grad():
        alone = torch.stack([family.loss(family.collate([sample]), seeded()) for sample in features])
        expected = (alone * counts).sum() / counts.sum()
        for side in ("right", "left"):
            batch = family.collate(features, side)
            for found in (batch, padded(family, batch, 3, side)):
                torch.testing.assert_close(family.loss(found, seeded()), expected, rtol=1e-5, atol=1e-5)


def test_generation_is_the_models_own(family: VisionLanguageFamily, bases: Mapping[str, Path]) -> None:
    prompts = [family.encode_prompt(ask(question), [make_image(seed)]) for seed, (question, _) in enumerate(QUESTIONS)]
    together = family.generate(prompts, 5)
    for prompt, text in zip(prompts, together, strict=True):
        assert family.generate([prompt], 5) == [text]
    own = family.model.generate(**prompts[0], max_new_tokens=5, do_sample=False)
    decoded = family.tokenizer.decode(own[0, prompts[0]["input_ids"].shape[1] :], skip_special_tokens=True)
    assert together[0] == decoded.strip()


def test_generation_says_what_the_logits_say(family: VisionLanguageFamily) -> None:
    prompt = family.encode_prompt(ask("What is this?"), [make_image(0)])
    ids = prompt["input_ids"]
    with torch.no_grad():
        new = family.model.generate(**prompt, max_new_tokens=4, do_sample=False)[:, ids.shape[1] :]
    batch = {name: values for name, values in prompt.items() if name not in ("input_ids", "attention_mask")}
    if "token_type_ids" in family.encode(ask("What is this?", "fruit"), [make_image(0)]):  # the answer's are 1
        batch["token_type_ids"] = torch.cat([torch.zeros_like(ids), torch.ones_like(new)], dim=1)
    if "mm_token_type_ids" in prompt:
        batch["mm_token_type_ids"] = F.pad(prompt["mm_token_type_ids"], (0, new.shape[1]))
    batch["input_ids"] = torch.cat([ids, new], dim=1)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["labels"] = torch.cat([torch.full_like(ids, IGNORED), new], dim=1)
    with torch.no_grad():
        answers = family.answer_logits(batch)
    assert answers.logits.argmax(dim=1).tolist() == new[0].tolist()


def test_a_batch_without_answers(llava: VisionLanguageFamily) -> None:
    batch = llava.collate(samples(llava))
    with pytest.raises(ValueError, match="the batch has no answer tokens: all labels are -100"):
        llava.loss({**batch, "labels": torch.full_like(batch["labels"], IGNORED)}, seeded())


@pytest.mark.parametrize("kind", ["llava", "idefics3", "qwen2_vl"])
def test_samples_with_and_without_images_and_with_several(
    families: Mapping[str, VisionLanguageFamily], kind: str
) -> None:
    family = families[kind]
    features = [
        family.encode(ask("What is this?", "fruit", num_images=count), [make_image(seed) for seed in range(count)])
        for count in (1, 0, 2)
    ]
    counts = torch.tensor([float((sample["labels"] != IGNORED).sum()) for sample in features])
    with torch.no_grad():
        alone = torch.stack([family.loss(family.collate([sample]), seeded()) for sample in features])
        for side in ("right", "left"):
            together = family.loss(family.collate(features, side), seeded())
            torch.testing.assert_close(together, (alone * counts).sum() / counts.sum(), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="padding_side 'top' is unknown"):
        family.collate(features, "top")


def test_images_that_are_split_into_tiles(tmp_path: Path) -> None:
    family = VisionLanguageFamily.from_pretrained(write_base(tmp_path, "idefics3", split_images=True))
    shapes = [(32, 32), (32, 16)]
    features = [
        family.encode(ask("What is this?", "fruit"), [make_image(seed).resize(shape)])
        for seed, shape in enumerate(shapes)
    ]
    assert [sample["pixel_values"].shape[1] for sample in features] == [5, 3]  # tiles and a small whole
    batch = family.collate(features)
    assert batch["pixel_values"].shape[:2] == (2, 5)
    with torch.no_grad():
        alone = [family.loss(family.collate([sample]), seeded()) for sample in features]
        torch.testing.assert_close(family.loss(batch, seeded()), sum(alone) / 2, rtol=1e-5, atol=1e-5)


def test_half_precision(bases: Mapping[str, Path]) -> None:
    family = VisionLanguageFamily.from_pretrained(bases["llava"], weight_dtype=torch.bfloat16)
    batch = family.collate(samples(family))
    initialize(family, "cntlora", [batch], rank=2, progress=False)
    loss = family.loss(batch, seeded())
    assert loss.dtype == torch.float32
    loss.backward()
    parameters = adapters.trainable_parameters(family.model)
    assert all(p.dtype == torch.float32 and p.grad is not None and bool(p.grad.any()) for p in parameters)


# ----------------------------------------------------------------------------------------------------------- statistics


def moments(family: VisionLanguageFamily, batches: Sequence[Mapping[str, Tensor]]) -> dict[str, SecondMoment]:
    """Second moments of what goes into the layers of all parts."""
    layers = adapters.target_layers(family.model, family.default_targets("model"))
    collection = collect(
        {"model": family.model},
        layers,
        batches,
        TrainingStep(
            lambda batch: family.loss(batch, seeded()), token_mask=lambda name: family.step.token_mask("model", name)
        ),
        lambda name, layer: SecondMoment(layer.in_features),
        PassOptions("inputs", progress=False),
    )
    return {name: statistic for name, statistic in collection.statistics.items() if isinstance(statistic, SecondMoment)}


def test_padding_does_not_change_the_statistics(family: VisionLanguageFamily) -> None:
    own = copied(family, adapt=("language", "vision", "projector"), statistics_tokens=("answer", "image"))
    features = samples(own)
    alone = moments(own, [own.collate([sample]) for sample in features])
    assert alone
    for side in ("right", "left"):
        batch = own.collate(features, side)
        for found in (batch, padded(own, batch, 5, side)):
            together = moments(own, [found])
            for name, statistic in alone.items():
                assert together[name].num_rows == statistic.num_rows, name
                expected = statistic.second_moment()
                scale = float(expected.abs().max())
                torch.testing.assert_close(together[name].second_moment(), expected, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("method", ["cntlora", "eva", "lora_ga"])
def test_padding_does_not_change_the_initialisation(family: VisionLanguageFamily, method: str) -> None:
    features = samples(family)
    batches = {
        "alone": [family.collate([sample]) for sample in features],
        "right": [padded(family, family.collate(features), 4, "right")],
        "left": [padded(family, family.collate(features, "left"), 4, "left")],
    }
    factors: dict[str, dict[str, Tensor]] = {}
    for name, own_batches in batches.items():
        own = copied(family)
        initialize(own, method, own_batches, rank=3, progress=False)
        factors[name] = {}
        for layer, weights in adapters.adapter_weights(own.model).items():
            lora_A, lora_B = weights.factors
            # whatever the signs of singular vectors are
            factors[name] |= {f"{layer} A": lora_A.mT @ lora_A, f"{layer} B": lora_B @ lora_B.mT}
    for side in ("right", "left"):
        for layer, expected in factors["alone"].items():
            scale = float(expected.abs().max())
            torch.testing.assert_close(factors[side][layer], expected, rtol=1e-2, atol=2e-3 * scale + 1e-8, msg=layer)


@pytest.mark.parametrize(
    "tokens", [("answer",), ("image",), ("prompt",), ("answer", "image"), ("answer", "image", "prompt")]
)
def test_rows_that_count(family: VisionLanguageFamily, tokens: tuple[str, ...]) -> None:
    own = copied(family, statistics_tokens=tokens, adapt=("language", "vision"))
    features = samples(own)
    batch = own.collate(features)
    num_answer = sum(int((sample["labels"] != IGNORED).sum()) + 1 for sample in features)  # and what predicts the first
    num_image = NUM_IMAGE_TOKENS * len(features)
    total = int(batch["attention_mask"].sum())
    rows = {"answer": num_answer, "image": num_image, "prompt": total - num_answer - num_image}
    report = initialize(own, "eva", [batch], rank=2, progress=False)
    counts = {name: layer.num_rows for name, layer in report.layers.items()}
    language = {count for name, count in counts.items() if "language_model" in name or "text_model" in name}
    assert language == {sum(rows[name] for name in tokens)}
    vision = {count for name, count in counts.items() if "vis" in name}
    assert len(vision) == 1
    assert vision.pop() % len(features) == 0  # every patch of every image
    everything = copied(family, statistics_tokens=tokens)
    report = initialize(everything, "eva", [batch], rank=2, mask_padding=False, progress=False)
    assert {layer.num_rows for layer in report.layers.values()} == {batch["input_ids"].numel()}


def test_only_layers_that_see_tokens_are_masked(llava: VisionLanguageFamily) -> None:
    own = copied(llava)
    attention: Any = nn.ModuleDict({name: nn.Linear(24, 24) for name in ("q_proj", "k_proj", "v_proj", "o_proj")})
    own.model.model.language_model.layers[0].cross_attn = attention  # as Mllama has it
    own = replace(own)
    with torch.no_grad():
        own.loss(own.collate(samples(own)), seeded())
    prefix = "model.language_model.layers.0"
    for layer in (f"{prefix}.self_attn.k_proj", f"{prefix}.mlp.up_proj", f"{prefix}.cross_attn.q_proj"):
        assert own.step.token_mask("model", layer) is not None, layer
    vision = next(name for name in replace(own, adapt=("vision",)).default_targets("model") if name.endswith("q_proj"))
    for layer in (f"{prefix}.cross_attn.k_proj", f"{prefix}.cross_attn.v_proj", vision, "lm_head"):
        assert own.step.token_mask("model", layer) is None, layer


# --------------------------------------------------------------------------------------------------------------- export


def logits(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    inputs = {name: values for name, values in batch.items() if name != "labels"}
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize(
    ("method", "variable_rank"), [*((name, False) for name in METHODS), *((name, True) for name in SCORED)]
)
def test_saved_adapters_load_with_stock_peft_on_the_original_base(
    llava: VisionLanguageFamily, bases: Mapping[str, Path], tmp_path: Path, method: str, variable_rank: bool
) -> None:
    assert_round_trip(copied(llava, adapt=("language", "projector")), bases["llava"], tmp_path, method, variable_rank)


@pytest.mark.parametrize("kind", ["idefics3", "qwen2_vl", "paligemma"])
def test_other_kinds_load_with_stock_peft_too(
    families: Mapping[str, VisionLanguageFamily], bases: Mapping[str, Path], tmp_path: Path, kind: str
) -> None:
    own = copied(families[kind], adapt=("language", "vision", "projector"))
    assert_round_trip(own, bases[kind], tmp_path, "cntlora", True)


def assert_round_trip(own: VisionLanguageFamily, base: Path, folder: Path, method: str, variable_rank: bool) -> None:
    batch = own.collate(samples(own))
    before = logits(own.model, batch)
    options: dict[str, Any] = {}
    if variable_rank:  # a budget that equal ranks do not use up
        options = {"variable_rank": True, "rank_budget": 4 * len(own.default_targets("model")) - 3}
    report = initialize(own, method, [batch], rank=4, progress=False, **options)
    if variable_rank:
        assert len({layer.rank for layer in report.layers.values()}) > 1
    optimizer = torch.optim.Adam(adapters.trainable_parameters(own.model), lr=3e-3)
    for _ in range(2):
        own.loss(batch, seeded()).backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = logits(own.model, batch)
    assert float((expected - before).abs().max()) > 1e-2
    export.save_peft_lora(own.model, folder, base_model=str(base))
    stock = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base).float().eval(), folder)
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(logits(stock, batch), expected, rtol=0, atol=1e-4 * scale)


def test_merged_models_load_without_peft(llava: VisionLanguageFamily, tmp_path: Path) -> None:
    own = copied(llava)
    batch = own.collate(samples(own))
    initialize(own, "orthonormal", [batch], rank=3, progress=False)
    own.loss(batch, seeded()).backward()
    torch.optim.Adam(adapters.trainable_parameters(own.model), lr=3e-3).step()
    export.save_merged(own.model, tmp_path)
    own.save_processor(tmp_path)
    assert (tmp_path / "generation_config.json").is_file()
    merged = VisionLanguageFamily.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(merged.model, batch), logits(own.model, batch), rtol=1e-4, atol=1e-4)
    features = merged.encode(ask(*QUESTIONS[0]), [make_image(0)])
    assert torch.equal(features["pixel_values"], own.encode(ask(*QUESTIONS[0]), [make_image(0)])["pixel_values"])


def test_an_end_that_the_tokenizer_does_not_know(tmp_path: Path) -> None:
    write_llava(tmp_path)
    edit_json(tmp_path / "generation_config.json", eos_token_id=[1, 3])
    assert VisionLanguageFamily.from_pretrained(tmp_path).conversations.end_tokens == {1, 3}
