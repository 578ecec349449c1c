"""Load a trained adapter with nothing but stock transformers and PEFT, on the original base; see that it changes it."""

import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoProcessor,
)


def load(base: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """The base and inputs that it takes: a red square, and a question where it answers questions."""
    image = Image.new("RGB", (64, 64), (200, 30, 30))
    architecture = json.loads((Path(base) / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    if "ImageClassification" in architecture:
        processor = AutoImageProcessor.from_pretrained(base, use_fast=False, trust_remote_code=False)
        return AutoModelForImageClassification.from_pretrained(base, trust_remote_code=False), processor(
            image, return_tensors="pt"
        )
    processor = AutoProcessor.from_pretrained(base, trust_remote_code=False)
    content = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return AutoModelForImageTextToText.from_pretrained(base, trust_remote_code=False), processor(
        text=text, images=image, return_tensors="pt"
    )


@torch.no_grad()
def main() -> None:
    output_dir = Path(sys.argv[1])
    config = json.loads((output_dir / "config.json").read_text(encoding="utf-8"))
    model, inputs = load(config["arguments"]["pretrained_model_name_or_path"])
    before = model.eval()(**inputs).logits
    adapted = PeftModel.from_pretrained(model, output_dir).eval()
    change = (adapted(**inputs).logits - before).abs().mean().item()
    if not change > 1e-3:
        sys.exit(f"error: the adapter in {output_dir} changes the logits by {change:.2e} on average; expected more")
    with adapted.disable_adapter():
        if not torch.equal(adapted(**inputs).logits, before):
            sys.exit("error: without the adapter the logits are not the base model's")
    print(f"ok: loaded by PEFT into {type(model).__name__}; mean absolute change of the logits {change:.4f}")


if __name__ == "__main__":
    main()
