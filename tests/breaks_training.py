"""Breaks of the training loop, the comparison's loop and the options."""

from __future__ import annotations

from breaks import Break

BREAKS: tuple[Break, ...] = (
    Break(
        "accumulated loss is not divided",
        "train_scripts/common_run.py",
        "loss = loss / len(micro_batches) if shares is None else loss * shares[micro]",
        "loss = loss if shares is None else loss * shares[micro]",
        ("tests/scripts/test_loop_reference.py::test_stable_diffusion",),
    ),
    Break(
        "micro-batches of other lengths weigh alike",
        "train_scripts/common_run.py",
        "loss = loss / len(micro_batches) if shares is None else loss * shares[micro]",
        "loss = loss / len(micro_batches)",
        ("tests/scripts/test_loop_reference.py::test_vision_language_model[4]",),
    ),
    Break(
        "the same noise in every micro-step",
        "train_scripts/common_run.py",
        'parts = (args.seed, "step", step, micro, accelerator.process_index)',
        'parts = (args.seed, "step", step, 0, accelerator.process_index)',
        ("tests/scripts/test_loop_independence.py::test_every_micro_step_has_noise_of_its_own",),
    ),
    Break(
        "the same noise in every step",
        "train_scripts/common_run.py",
        'parts = (args.seed, "step", step, micro, accelerator.process_index)',
        'parts = (args.seed, "step", 0, micro, accelerator.process_index)',
        ("tests/scripts/test_loop_independence.py::test_every_micro_step_has_noise_of_its_own",),
    ),
    Break(
        "the same noise in every process",
        "train_scripts/common_run.py",
        'parts = (args.seed, "step", step, micro, accelerator.process_index)',
        'parts = (args.seed, "step", step, micro, 0)',
        ("tests/scripts/test_loop_processes.py::test_text_to_image",),
    ),
    Break(
        "dropout of the adapters is not seeded",
        "train_scripts/common_run.py",
        "        torch.manual_seed(derive_seed(*parts))  # for the dropout of the adapters\n",
        "",
        ("tests/scripts/test_loop_reference.py::test_stable_diffusion",),
    ),
    Break(
        "logged loss is the last micro-step's",
        "train_scripts/common_run.py",
        "        total += loss.detach()\n",
        "        total = loss.detach()\n",
        ("tests/scripts/test_loop_reference.py::test_stable_diffusion",),
    ),
    Break(
        "logged loss is the main process's",
        "train_scripts/common_run.py",
        'mean_loss = float(cast(Tensor, accelerator.reduce(total, "mean")))',
        "mean_loss = float(total)",
        ("tests/scripts/test_loop_processes.py::test_text_to_image",),
    ),
    Break(
        "checkpoint forgets the average",
        "train_scripts/common_run.py",
        "                **self.average.state(),\n",
        "",
        ("tests/scripts/test_train_sd_lora.py::test_every_state_is_resumed",),
    ),
    Break(
        "resumed average begins anew",
        "train_scripts/common_run.py",
        "            self.average.optimization_step = step\n",
        "            pass\n",
        ("tests/scripts/test_train_sd_lora.py::test_every_state_is_resumed",),
    ),
)
