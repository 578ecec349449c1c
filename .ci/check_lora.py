"""Load a trained LoRA with nothing but stock diffusers, on the original base, and see that it changes the output."""

import json
import sys
from pathlib import Path

import torch
from diffusers import DiffusionPipeline


def main() -> None:
    output_dir = Path(sys.argv[1])
    config = json.loads((output_dir / "config.json").read_text(encoding="utf-8"))
    base = config["arguments"]["pretrained_model_name_or_path"]
    pipeline = DiffusionPipeline.from_pretrained(
        base, torch_dtype=torch.float32, use_safetensors=True, trust_remote_code=False
    )
    pipeline.set_progress_bar_config(disable=True)

    def draw() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        images = pipeline(
            "an emoji of a red apple", num_inference_steps=10, generator=generator, output_type="pt"
        ).images
        return torch.as_tensor(images)

    before = draw()
    pipeline.load_lora_weights(output_dir, weight_name="pytorch_lora_weights.safetensors")
    with_lora = draw()
    pipeline.unload_lora_weights()
    after = draw()

    change = (with_lora - before).abs().mean().item()
    if not torch.isfinite(with_lora).all() or change < 1e-4:
        sys.exit(
            f"error: the LoRA in {output_dir} changes the image by {change:.2e} on average; expected more than 1e-4"
        )
    if not torch.equal(before, after):
        sys.exit("error: unloading the LoRA does not give back the base model's image")
    print(f"ok: loaded by {type(pipeline).__name__}; mean absolute change of the image {change:.4f}; unloads cleanly")


if __name__ == "__main__":
    main()
