"""A stand-in with the shape of diffusers' text-to-image LoRA script: no hooks, checkpoints hold the whole UNet."""

import argparse
import json
import sys
from pathlib import Path

import diffusers
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image


def main(argv):
    parser = argparse.ArgumentParser()
    for name in ("base", "data", "output_dir", "resume_from"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--mixed_precision", default="no")
    args = parser.parse_args(argv)
    accelerator = Accelerator(cpu=True, mixed_precision=args.mixed_precision)
    weight_dtype = torch.bfloat16 if args.mixed_precision == "bf16" else torch.float32
    set_seed(0)

    base = diffusers.StableDiffusionPipeline.from_pretrained(args.base)
    tokenizer, text_encoder, vae, unet = base.tokenizer, base.text_encoder, base.vae, base.unet
    noise_scheduler = diffusers.DDPMScheduler.from_config(base.scheduler.config)
    for model in (text_encoder, vae, unet):
        model.requires_grad_(False)
        model.to(dtype=weight_dtype)
    targets = ["to_k", "to_q", "to_v", "to_out.0"]
    unet.add_adapter(LoraConfig(r=2, lora_alpha=2, init_lora_weights="gaussian", target_modules=targets))
    lora_layers = filter(lambda p: p.requires_grad, unet.parameters())
    optimizer = torch.optim.AdamW(lora_layers, lr=1e-2)

    def example(line):
        image = Image.open(Path(args.data, line["file_name"])).convert("RGB").resize((32, 32))
        pixels = np.asarray(image, dtype=np.float32) / 127.5 - 1
        ids = tokenizer(line["text"], padding="max_length", max_length=tokenizer.model_max_length, truncation=True)
        return {"pixel_values": torch.from_numpy(pixels).permute(2, 0, 1), "input_ids": torch.tensor(ids.input_ids)}

    lines = Path(args.data, "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    examples = [example(json.loads(line)) for line in lines]
    train_dataloader = torch.utils.data.DataLoader(examples, batch_size=2, shuffle=True)
    lr_scheduler = diffusers.optimization.get_scheduler("constant", optimizer)

    # Prepare everything with our `accelerator`.
    unet, optimizer, train_dataloader, lr_scheduler = accelerator.prepare(
        unet, optimizer, train_dataloader, lr_scheduler
    )

    global_step = 0
    if args.resume_from:
        accelerator.load_state(args.resume_from)
        global_step = int(args.resume_from.rpartition("-")[2])
    while global_step < args.steps:
        unet.train()
        for batch in train_dataloader:
            with accelerator.accumulate(unet):
                pixel_values = batch["pixel_values"].to(weight_dtype)
                latents = vae.encode(pixel_values).latent_dist.sample() * vae.config.scaling_factor
                noise = torch.randn_like(latents)
                timesteps = torch.randint(0, noise_scheduler.config.num_train_timesteps, (len(latents),))
                noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
                prediction = unet(noisy_latents, timesteps, text_encoder(batch["input_ids"])[0]).sample
                accelerator.backward(torch.nn.functional.mse_loss(prediction.float(), noise.float()))
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
            global_step += 1
        accelerator.save_state(f"{args.output_dir}/checkpoint-{global_step}")

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        diffusers.StableDiffusionPipeline.save_lora_weights(
            args.output_dir,
            unet_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(accelerator.unwrap_model(unet))),
        )
        # Final inference
    return accelerator.unwrap_model(unet), text_encoder


if __name__ == "__main__":
    main(sys.argv[1:])
