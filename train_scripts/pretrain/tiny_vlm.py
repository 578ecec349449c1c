r"""Pretrains the bundled tiny vision-language model: emoji and questions -> LlavaForConditionalGeneration.

The tower is that of the bundled tiny CLIP; projector, decoder and tokenizer are new, and everything is trained, on
emoji in three styles. A picture comes with three questions in random order: its name, its kind, and whether it is this
or that. A LoRA then adapts the model to a style that it has never seen.

Two processes on a 2-core CPU need about half an hour (one process: leave out torchrun). Training ends after its
wall-time or step budget, writes checkpoints, and continues from the last one when the same command is run again:

    torchrun --nproc_per_node 2 train_scripts/pretrain/tiny_vlm.py --work_dir runs/tiny-vlm \
        --output_dir assets/models/tiny-vlm
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from recipe_options import TinyVlmOptions

from lorainit_diffusers.training.cli import run_script
from lorainit_diffusers.training.options.parser import parse_options


def parse_args(argv: Sequence[str] | None = None) -> TinyVlmOptions:
    """The options of the command line."""
    return parse_options(TinyVlmOptions, argv, __doc__)


if __name__ == "__main__":
    run_script(parse_args)  # a mistake in the options is answered before the imports below, which take seconds

import emoji_pictures as emoji
import numpy as np
import torch
import torch.nn.functional as F
from cards import card_fields, num_parameters, write_card
from shared import (
    IMAGE_SIZE,
    Budget,
    Model,
    Phase,
    batch_indices,
    claim_model_dir,
    load_styles,
    load_trained,
    rank_and_count,
    rename_weights,
    save_half,
    start_process,
    train,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from lorainit_diffusers.families.augment import Augmentation
from lorainit_diffusers.training.output_dir import owning

SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
IMAGE_TOKEN = "<image>"
# As LLaVA 1.5 writes conversations.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %} ASSISTANT: {% else %}USER: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}</s>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)
AUGMENTATION = Augmentation(
    crop_scale=(0.6, 1.2),
    crop_ratio=0.85,
    rotation=10,
    flip=0.3,
    brightness=0.2,
    contrast=0.2,
    saturation=0.4,
    grayscale=0.1,
    permute_channels=0.1,
    erase=0.1,
)


def make_tokenizer(names: Sequence[str], subgroups: Mapping[str, str], vocab_size: int) -> Model:
    """Byte-level BPE of the questions and answers, with an image token."""
    rng = np.random.default_rng(0)
    corpus = [text for name in names for question in emoji.ask(name, subgroups, rng) for text in question[1:]]
    corpus += ["USER: ASSISTANT:\n"] * 10 + [f" {emoji.words(name)}" for name in names]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*SPECIAL_TOKENS.values(), IMAGE_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        extra_special_tokens={"image_token": IMAGE_TOKEN},
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        **SPECIAL_TOKENS,
    )


def build_model(tokenizer: Model, clip_dir: Path) -> Model:
    """LlavaForConditionalGeneration with the vision tower of a CLIP and a new, small decoder."""
    clip: Model = CLIPModel.from_pretrained(clip_dir, dtype=torch.float32, trust_remote_code=False)
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=clip.config.vision_config,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        vision_feature_layer=-1,  # all four layers
        image_seq_length=(IMAGE_SIZE // clip.config.vision_config.patch_size) ** 2,
    )
    model: Model = LlavaForConditionalGeneration(config)
    tower = {name.removeprefix("vision_model."): p for name, p in clip.vision_model.state_dict().items()}
    own = model.model.vision_tower.state_dict()
    model.model.vision_tower.load_state_dict({name: tower[name.removeprefix("vision_model.")] for name in own})
    for name, parameter in model.named_parameters():
        if "post_layernorm" in name:  # of the summary token, which the decoder does not see
            parameter.requires_grad_(False)
    return model


class Conversations:
    """Token ids of pictures with questions.

    The pieces are encoded apart: they end where the pre-tokenizer would split the whole text, or at special tokens.
    """

    def __init__(self, tokenizer: Model, num_image_tokens: int) -> None:
        self.tokenizer, self.num_image_tokens = tokenizer, num_image_tokens
        self.encode = lru_cache(maxsize=None)(lambda text: tokenizer(text, add_special_tokens=False)["input_ids"])

    def tokens(self, turns: Sequence[emoji.Question]) -> tuple[list[int], list[int]]:
        """Token ids of a conversation about one picture, and the same with -100 outside of the answers."""
        ids: list[int] = []
        targets: list[int] = []
        for index, turn in enumerate(turns):
            start = "USER: " + IMAGE_TOKEN * self.num_image_tokens + "\n" if index == 0 else "USER: "
            prompt = self.encode(start + turn.question + " ASSISTANT:")
            answer = self.encode(f" {turn.answer}</s>")
            ids += [*prompt, *answer]
            targets += [*[-100] * len(prompt), *answer]
        return ids, targets

    def batch(self, conversations: Sequence[Sequence[emoji.Question]]) -> tuple[Tensor, Tensor]:
        """Token ids and targets, (batch, tokens), padded on the right, where causal attention does not see it."""
        rows = [self.tokens(turns) for turns in conversations]
        length = max(len(ids) for ids, _ in rows)
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([[*ids, *[pad] * (length - len(ids))] for ids, _ in rows])
        targets = torch.tensor([[*own, *[-100] * (length - len(own))] for _, own in rows])
        return ids, targets


def answer_logits(model: Model, pixels: Tensor, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Logits at the positions that predict an answer token, and these tokens: (n, vocabulary) and (n,)."""
    hidden = model.model(input_ids=ids, pixel_values=pixels * 2 - 1).last_hidden_state[:, :-1]
    wanted = targets[:, 1:] >= 0
    return model.lm_head(hidden[wanted]).float(), targets[:, 1:][wanted]


def phase_of(options: TinyVlmOptions) -> Phase:
    """The training."""
    return Phase("vlm", Budget(options.vlm_minutes, options.vlm_steps), options.lr, options.lr / 50)


def train_vlm(
    model: Model,
    conversations: Conversations,
    images: Tensor,
    names: Sequence[str],
    subgroups: Mapping[str, str],
    options: TinyVlmOptions,
    device: torch.device,
) -> dict[str, Tensor]:
    """Trains all of the model; returns the averaged weights by name."""
    rank, world_size = rank_and_count()

    def loss_fn(step: int, generator: torch.Generator) -> Tensor:
        chosen = batch_indices(step, options.batch_size * world_size, len(images), options.seed)[rank::world_size]
        draws = torch.Generator().manual_seed(generator.initial_seed())  # augmentation draws on the CPU
        rng = np.random.default_rng(generator.initial_seed())
        pixels = AUGMENTATION(images[chosen].float() / 255, draws)
        turns = [emoji.ask(names[index], subgroups, rng) for index in map(int, chosen)]
        shuffled = [[own[position] for position in rng.permutation(len(own))] for own in turns]
        ids, targets = conversations.batch(shuffled)
        logits, tokens = answer_logits(model, pixels.to(device), ids.to(device), targets.to(device))
        return F.cross_entropy(logits, tokens)

    return train(phase_of(options), model, loss_fn, options, device)


@torch.no_grad()
def accuracy(
    model: Model, conversations: Conversations, images: Tensor, names: Sequence[str], subgroups: Mapping[str, str]
) -> dict[str, float]:
    """Share of the answers that greedy decoding gets right to the last token, by type, one question at a time."""
    right: dict[str, list[bool]] = defaultdict(list)
    rng = np.random.default_rng(0)
    asked = [emoji.ask(name, subgroups, rng) for name in names]
    for kind in range(len(asked[0])):
        for chunk in torch.arange(len(names)).split(64):
            ids, targets = conversations.batch([[asked[index][kind]] for index in chunk.tolist()])
            # greedy decoding gives an answer exactly if each of its tokens is the likeliest after the ones before
            logits = model(input_ids=ids, pixel_values=images[chunk].float() / 127.5 - 1).logits[:, :-1]
            hits = (logits.argmax(2) == targets[:, 1:]) | (targets[:, 1:] < 0)
            right[asked[0][kind].type] += hits.all(1).tolist()
    return {kind: sum(values) / len(values) for kind, values in right.items()}


def save_processor(directory: Path, tokenizer: Model, patch_size: int) -> None:
    """Writes the processor, for transformers 4 and 5."""
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    image_processor = CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE}, crop_size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    processor: Model = LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE_TOKEN,
        chat_template=CHAT_TEMPLATE,
    )
    processor.save_pretrained(directory)
    image_processor.save_pretrained(directory)  # the file that transformers 4 reads
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    # transformers 5 writes a class and a list that 4 does not know
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "extra_special_tokens": {"image_token": IMAGE_TOKEN}}
    config.pop("image_token", None)
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    # 4 finds the image processor in a file of its own, and trips over it in the processor's; and it reads no .jinja
    path = directory / "processor_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("image_processor", None)
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    template = json.dumps({"chat_template": CHAT_TEMPLATE}, indent=2)
    (directory / "chat_template.json").write_text(template + "\n", encoding="utf-8")


def write_model_card(
    model: Model,
    names: Mapping[str, Sequence[str]],
    figures: Mapping[str, Mapping[str, float]],
    options: TinyVlmOptions,
) -> None:
    """Writes `README.md` beside the weights."""
    text = model.config.text_config
    write_card(
        options.output_dir,
        "tiny_vlm.md.jinja",
        parameters=num_parameters(model),
        width=text.hidden_size,
        layers=text.num_hidden_layers,
        vocab_size=text.vocab_size,
        kinds=list(next(iter(figures.values()))),
        figures=[
            {
                "style": style,
                "seen": style in emoji.CLASSIFIER_STYLES,
                "count": len(names[style]),
                "accuracies": list(values.values()),
            }
            for style, values in figures.items()
        ],
        **card_fields(options, phase_of(options), names),
    )


@owning
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the phases in order; what is finished is skipped."""
    options = parse_args(argv)
    device, _, _ = start_process(options.seed)
    model_dir = claim_model_dir(options, "tiny_vlm")
    options.work_dir.mkdir(parents=True, exist_ok=True)
    images, names, subgroups = load_styles(options)
    tokenizer = make_tokenizer(sorted(subgroups), subgroups, options.vocab_size)
    model = build_model(tokenizer, options.clip_dir).to(device)
    conversations = Conversations(tokenizer, model.config.image_seq_length)
    if device.type == "cpu":
        # The fused attention's backward pass is slow for few tokens on a CPU: plain attention trains faster.
        model.set_attn_implementation("eager")
    if "vlm" in options.phases:
        concepts = [name for style in emoji.CLASSIFIER_STYLES for name in names[style]]
        stacked = torch.cat([images[style] for style in emoji.CLASSIFIER_STYLES])
        train_vlm(model, conversations, stacked, concepts, subgroups, options, device)
    if model_dir is not None:
        model_dir.begin(anew=True)
        load_trained(options, "vlm", model)
        patch_size = model.config.vision_config.patch_size

        def save_rest(path: Path) -> None:
            save_processor(path, tokenizer, patch_size)
            weights, prefix = path / "model.safetensors", "vision_tower.vision_model."
            rename_weights(weights, r"^vision_tower\.(?!vision_model\.)", prefix)

        save_half(model.cpu(), options.output_dir, save_rest)
        # as saved: the weights went through half precision
        saved: Model = LlavaForConditionalGeneration.from_pretrained(options.output_dir, trust_remote_code=False)
        figures = {
            style: accuracy(saved.eval(), conversations, images[style], own, subgroups) for style, own in names.items()
        }
        print(json.dumps(figures, indent=2))
        write_model_card(saved, names, figures, options)


if __name__ == "__main__":
    run_script(main)
