"""A stand-in with the shape of diffusers' DreamBooth LoRA script: hooks that write LoRA files into checkpoints."""

import argparse
import sys
from pathlib import Path

import diffusers
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.utils import convert_state_dict_to_diffusers, convert_unet_state_dict_to_peft
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from PIL import Image


def main(argv):
    parser = argparse.ArgumentParser()
    for name in ("base", "data", "output_dir", "resume_from"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--train_text_encoder", action="store_true")
    args = parser.parse_args(argv)
    accelerator = Accelerator(cpu=True)
    set_seed(0)

    base = diffusers.StableDiffusionPipeline.from_pretrained(args.base)
    tokenizer, text_encoder, vae, unet = base.tokenizer, base.text_encoder, base.vae, base.unet
    noise_scheduler = diffusers.DDPMScheduler.from_config(base.scheduler.config)
    for model in (text_encoder, vae, unet):
        model.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=2, lora_alpha=2, init_lora_weights="gaussian", target_modules=["to_k", "to_v"]))
    trained = [unet]
    if args.train_text_encoder:
        text_encoder.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "v_proj"]))
        trained.append(text_encoder)

    def lora_layers(model):
        return convert_state_dict_to_diffusers(get_peft_model_state_dict(accelerator.unwrap_model(model)))

    def save_lora(folder):
        diffusers.StableDiffusionPipeline.save_lora_weights(
            folder,
            unet_lora_layers=lora_layers(unet),
            text_encoder_lora_layers=lora_layers(text_encoder) if args.train_text_encoder else None,
        )

    def save_model_hook(models, weights, output_dir):
        save_lora(output_dir)
        while weights:
            weights.pop()

    def load_model_hook(models, input_dir):
        while models:
            models.pop()
        saved, _ = diffusers.StableDiffusionPipeline.lora_state_dict(input_dir)
        saved = {key.removeprefix("unet."): value for key, value in saved.items() if key.startswith("unet.")}
        set_peft_model_state_dict(accelerator.unwrap_model(unet), convert_unet_state_dict_to_peft(saved))

    accelerator.register_save_state_pre_hook(save_model_hook)
    accelerator.register_load_state_pre_hook(load_model_hook)
    optimizer = torch.optim.AdamW([p for model in trained for p in model.parameters() if p.requires_grad], lr=1e-2)

    def example(path):
        pixels = np.asarray(Image.open(path).convert("RGB").resize((32, 32)), dtype=np.float32) / 127.5 - 1
        ids = tokenizer("a sks cat", padding="max_length", max_length=tokenizer.model_max_length, truncation=True)
        return {"pixel_values": torch.from_numpy(pixels).permute(2, 0, 1), "input_ids": torch.tensor(ids.input_ids)}

    examples = [example(path) for path in sorted(Path(args.data).glob("*.png"))]
    train_dataloader = torch.utils.data.DataLoader(examples, batch_size=2, shuffle=True)

    # Prepare everything with our `accelerator`.
    *trained, optimizer, train_dataloader = accelerator.prepare(*trained, optimizer, train_dataloader)

    global_step = 0
    if args.resume_from:
        accelerator.load_state(args.resume_from)
        global_step = int(args.resume_from.rpartition("-")[2])
    while global_step < args.steps:
        for model in trained:
            model.train()
        for batch in train_dataloader:
            latents = vae.encode(batch["pixel_values"]).latent_dist.sample() * vae.config.scaling_factor
            noise = torch.randn_like(latents)
            timesteps = torch.randint(0, noise_scheduler.config.num_train_timesteps, (len(latents),))
            prediction = unet(
                noise_scheduler.add_noise(latents, noise, timesteps), timesteps, text_encoder(batch["input_ids"])[0]
            ).sample
            accelerator.backward(torch.nn.functional.mse_loss(prediction, noise))
            optimizer.step()
            optimizer.zero_grad()
            global_step += 1
        accelerator.save_state(f"{args.output_dir}/checkpoint-{global_step}")

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        save_lora(args.output_dir)
        # Final inference
    return accelerator.unwrap_model(unet), text_encoder


if __name__ == "__main__":
    main(sys.argv[1:])
