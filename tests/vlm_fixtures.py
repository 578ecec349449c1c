"""What tests of vision-language models write to disk: random bases of several kinds, with processors of their own."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GemmaConfig,
    GemmaTokenizerFast,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    SiglipImageProcessor,
)

WORDS = "What is this? What kind of thing is this? Is this a red apple? green pear yes no fruit "
NUM_IMAGE_TOKENS = 4  # of each base below for one image of 16 pixels a side
KINDS = ("llava", "idefics3", "qwen2_vl", "paligemma")

LLAVA_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'][0]['text'] }} "
    "{% elif message['role'] == 'assistant' %} ASSISTANT: {% else %}USER: {% endif %}"
    "{% if message['role'] != 'system' %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}</s>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)
IDEFICS_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}:"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ ' ' + part['text'] }}{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(special_tokens: Sequence[str], **options: Any) -> PreTrainedTokenizerFast:
    """Byte-level BPE of some words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320 + len(special_tokens),
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)


def text_sizes(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Sizes of a random decoder with grouped-query heads."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_range": 0.4,  # answers that differ from one another, and from image to image
    }


VISION_SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "image_size": 16}


def write_llava(folder: Path, *, chat_template: str | None = LLAVA_TEMPLATE, **options: Any) -> None:
    """Llama decoder, CLIP tower of three layers of which the last is not used."""
    tokenizer = make_tokenizer(
        ["<s>", "</s>", "<pad>", "<image>"],
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        additional_special_tokens=["<image>"],
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION_SIZES, patch_size=8, num_hidden_layers=3, initializer_range=0.4),
        text_config=LlamaConfig(**text_sizes(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        image_seq_length=NUM_IMAGE_TOKENS,
        **options,
    )
    save(LlavaForConditionalGeneration(config), folder)
    image_processor = CLIPImageProcessor(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template,
    ).save_pretrained(folder)
    image_processor.save_pretrained(folder)


def write_idefics3(folder: Path, *, split_images: bool = False) -> None:
    """What SmolVLM-256M-Instruct is, in small: an image may be split into tiles of 16 pixels and a small whole."""
    tiles = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
    special = ["<|im_start|>", "<end_of_utterance>", "<pad>", "<image>", "<fake_token_around_image>", "<global-img>"]
    tokenizer = make_tokenizer(
        [*special, *tiles],
        bos_token="<|im_start|>",
        eos_token="<end_of_utterance>",
        pad_token="<pad>",
        additional_special_tokens=[*special[3:], *tiles],
    )
    vision = {**VISION_SIZES, "patch_size": 4, "num_hidden_layers": 2, "initializer_range": 0.4}
    text = {**text_sizes(tokenizer), "model_type": "llama"}
    config = Idefics3Config(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    save(Idefics3ForConditionalGeneration(config), folder)
    image_processor = Idefics3ImageProcessor(
        size={"longest_edge": 32 if split_images else 16},
        max_image_size={"longest_edge": 16},
        do_image_splitting=split_images,
    )
    processor = Idefics3Processor(
        image_processor, tokenizer, image_seq_len=NUM_IMAGE_TOKENS, chat_template=IDEFICS_TEMPLATE
    )
    processor.save_pretrained(folder)
    image_processor.save_pretrained(folder)


def write_smolvlm(folder: Path) -> None:
    """What SmolVLM2 is: Idefics 3 under another name, with a processor that reads videos, too."""
    write_idefics3(folder)
    vision = json.loads((folder / "config.json").read_text(encoding="utf-8"))["vision_config"]
    vision["model_type"] = "smolvlm_vision"
    architectures = ["SmolVLMForConditionalGeneration"]
    edit_json(folder / "config.json", model_type="smolvlm", architectures=architectures, vision_config=vision)
    for name in ("tokenizer_config.json", "preprocessor_config.json", "processor_config.json"):
        edit_json(folder / name, processor_class="SmolVLMProcessor")
    edit_json(folder / "preprocessor_config.json", image_processor_type="SmolVLMImageProcessor")


def write_qwen2_vl(folder: Path) -> None:
    """Fused query, key and value in the tower, positions in three dimensions, and a processor that reads videos."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
    special += ["<|image_pad|>", "<|video_pad|>"]
    tokenizer = make_tokenizer(
        special, eos_token="<|im_end|>", pad_token="<|endoftext|>", additional_special_tokens=special[1:]
    )
    ids = tokenizer.convert_tokens_to_ids
    text = {**text_sizes(tokenizer), "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 1]}}
    config = Qwen2VLConfig(
        text_config=text,
        vision_config={
            **{"depth": 2, "embed_dim": 16, "hidden_size": 24, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4},
            **{"spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3, "initializer_range": 0.4},
        },
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=False,
    )
    save(Qwen2VLForConditionalGeneration(config), folder)
    sizes = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2, "min_pixels": 256, "max_pixels": 256}
    Qwen2VLImageProcessor(**sizes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    edit_json(folder / "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer", processor_class="Qwen2VLProcessor")
    # the image processor without a suffix: the class of a machine with torchvision falls back by itself
    edit_json(
        folder / "preprocessor_config.json",
        image_processor_type="Qwen2VLImageProcessor",
        processor_class="Qwen2VLProcessor",
    )
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": QWEN_TEMPLATE}), encoding="utf-8")


def write_paligemma(folder: Path) -> None:
    """A prefix that sees all of itself, an answer that does not, and a processor without a chat template."""
    tokenizer = make_tokenizer(
        ["<pad>", "<eos>", "<bos>", "<image>"],
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
    )
    if not is_transformers_5():  # whose processor takes no other class
        tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
        tokenizer = GemmaTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), add_bos_token=False)
    image_processor = SiglipImageProcessor(size={"height": 16, "width": 16})
    image_processor.image_seq_length = NUM_IMAGE_TOKENS
    processor = PaliGemmaProcessor(image_processor, tokenizer)
    text = {**text_sizes(tokenizer), "head_dim": 8}
    config = PaliGemmaConfig(
        vision_config={**VISION_SIZES, "patch_size": 8, "num_hidden_layers": 2, "projection_dim": 24},
        text_config=GemmaConfig(**text).to_dict(),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        projection_dim=24,
        hidden_size=24,
    )
    save(PaliGemmaForConditionalGeneration(config), folder)
    processor.save_pretrained(folder)
    image_processor.save_pretrained(folder)


WRITERS: dict[str, Callable[..., None]] = {
    "llava": write_llava,
    "idefics3": write_idefics3,
    "smolvlm": write_smolvlm,
    "qwen2_vl": write_qwen2_vl,
    "paligemma": write_paligemma,
}


def write_base(folder: Path, kind: str, **options: Any) -> Path:
    """A random base of this kind; the same in every call."""
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    WRITERS[kind](folder, **options)
    return folder


def save(model: Any, folder: Path) -> None:
    """Write a model whose bias terms and norms are random, too."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.generation_config.eos_token_id = model.config.get_text_config().eos_token_id
    model.save_pretrained(folder)


def edit_json(path: Path, **values: Any) -> None:
    """Set values of a JSON object."""
    document = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**document, **values}), encoding="utf-8")


def make_image(seed: int, size: int = 16) -> Image.Image:
    """A noisy square."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def ask(question: str, answer: str | None = None, num_images: int = 1) -> list[dict[str, Any]]:
    """One question about images, with its answer if there is one."""
    content = [{"type": "image"}] * num_images + [{"type": "text", "text": question}]
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    return messages if answer is None else [*messages, {"role": "assistant", "content": answer}]


def write_questions(folder: Path, count: int = 6, num_validation: int = 3) -> Path:
    """`train.jsonl` and `validation.jsonl` of questions about images, two an image; returns the folder."""
    (folder / "images").mkdir(parents=True)
    for split, number, first in (("train", count, 0), ("validation", num_validation, count)):
        lines: list[dict[str, Any]] = []
        for index in range(first, first + number):
            make_image(index).save(folder / "images" / f"{index}.png")
            name = ("red apple", "green pear", "fruit")[index % 3]
            image = f"images/{index}.png"
            lines.append({"image": image, "question": "What is this?", "answer": name, "type": "name"})
            lines.append({"image": image, "question": "Is this a red apple?", "answer": "no", "type": "yes/no"})
        write_lines(folder / f"{split}.jsonl", lines)
    return folder


def write_lines(path: Path, lines: Sequence[Any]) -> Path:
    """A JSONL file."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def is_transformers_5() -> bool:
    """Whether transformers is version 5 or later."""
    return int(transformers.__version__.split(".")[0]) >= 5
