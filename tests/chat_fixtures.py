"""What tests of families with a language model as text encoder write to disk: chat tokenizers, tiny language models."""

from __future__ import annotations

from pathlib import Path

from dit_fixtures import write_letter_tokenizer
from transformers import (
    AutoTokenizer,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)

TEXT_WIDTH = 8
# Letters are tokens, so that the marks are short; a system message is written only where there is one.
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'][0] }}>"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<a>"
    "{% if enable_thinking is defined and not enable_thinking %}<t>{% endif %}{% endif %}"
)


def write_chat_tokenizer(folder: Path) -> None:
    """Write the letter tokenizer with a chat template."""
    write_letter_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)


def _text_options(num_layers: int) -> dict[str, int]:
    return {
        "vocab_size": 100,
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 16,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
    }


def write_qwen3(folder: Path, num_layers: int, causal: bool = True) -> None:
    """Write a random Qwen 3, with a head for words or without."""
    config = Qwen3Config(**_text_options(num_layers))
    (Qwen3ForCausalLM if causal else Qwen3Model)(config).save_pretrained(folder)


def write_mistral3(folder: Path, num_layers: int) -> None:
    """Write a random Mistral 3, of which the part that sees is as small as can be."""
    vision = {
        "model_type": "pixtral",
        **{"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2},
        **{"head_dim": 4, "image_size": 16, "patch_size": 8},
    }
    text = {"model_type": "mistral", **_text_options(num_layers)}
    config = Mistral3Config(text_config=text, vision_config=vision, image_token_index=99, spatial_merge_size=1)
    Mistral3ForConditionalGeneration(config).save_pretrained(folder)
