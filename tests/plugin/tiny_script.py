"""A script that knows nothing of this library: a loop, a checkpoint where it is asked for, PEFT's own saving."""

import argparse
from pathlib import Path

from loops import Loop, make_model

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rank", type=int, default=2)
    parser.add_argument("--base", type=int, default=3)
    parser.add_argument("--save_at", type=int)
    parser.add_argument("--resume_from")
    parser.add_argument("--no_accumulate", action="store_true")
    parser.add_argument("--fail", action="store_true")
    args = parser.parse_args()
    output_dir = Path(args.output_dir)
    loop = Loop(
        steps=args.steps,
        model=make_model(args.base, r=args.rank, lora_alpha=args.rank),
        use_accumulate=not args.no_accumulate,
        resume_from=args.resume_from,
        save_at={} if args.save_at is None else {args.save_at: str(output_dir / f"checkpoint-{args.save_at}")},
    ).run()
    if args.fail:
        raise RuntimeError("the script's own")
    if loop.accelerator.is_main_process:
        loop.accelerator.unwrap_model(loop.model).save_pretrained(output_dir)
        (output_dir / "losses.txt").write_text(" ".join(str(value) for value in loop.losses), encoding="utf-8")
    loop.accelerator.end_training()
