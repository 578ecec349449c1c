"""The patch of docs/plugin.md as data: at most five lines for diffusers' own LoRA training scripts.

The anchors stand, once each, in `examples/text_to_image/train_text_to_image_lora.py` and in
`examples/dreambooth/train_dreambooth_lora.py`: checked against those of diffusers 0.30 and 0.31.
"""

from __future__ import annotations

FAMILY = "lorainit_diffusers.families.sd.StableDiffusionFamily(tokenizer, text_encoder, vae, unet, noise_scheduler)"

# anchor line -> lines added after it, at its indentation
FIVE_LINES: dict[str, tuple[str, ...]] = {
    "import diffusers": ("import lorainit_diffusers.families.sd",),
    "# Prepare everything with our `accelerator`.": (
        f"family = {FAMILY}",
        'lorainit_diffusers.initialize(family, "cntlora", train_dataloader, num_batches=32)',
        "lorainit_diffusers.register_checkpoint_hooks(accelerator, family.adapted)",
    ),
    "# Final inference": ("lorainit_diffusers.save_diffusers_lora(family.adapted, args.output_dir)",),
}
# With --train_text_encoder the family adapts the text encoder too: inside the parentheses of the family's line.
TRAIN_TEXT_ENCODER = ("noise_scheduler)", "noise_scheduler, train_text_encoder=args.train_text_encoder)")


def apply(script: str, lines: dict[str, tuple[str, ...]]) -> str:
    """The script with every line added after its anchor.

    Raises:
        ValueError: an anchor does not stand exactly once in the script.
    """
    patched = script.splitlines()
    for anchor, added in lines.items():
        places = [index for index, line in enumerate(patched) if line.strip() == anchor]
        if len(places) != 1:
            raise ValueError(f"anchor {anchor!r} stands {len(places)} times in the script, must be once")
        indent = patched[places[0]].partition(anchor)[0]
        patched[places[0] + 1 : places[0] + 1] = [indent + line for line in added]
    return "\n".join(patched) + "\n"
