"""Breaks of what is written: exports, kohya's names, checkpoints."""

from __future__ import annotations

from breaks import Break

BREAKS: tuple[Break, ...] = (
    Break(
        "export without the scaling",
        "lorainit_diffusers/export/factors.py",
        "weights.factors.lora_A, weights.factors.lora_B * weights.scaling",
        "weights.factors.lora_A, weights.factors.lora_B * 1.0",
        ("tests/test_adapters.py::test_rslora_scales_by_the_root_of_the_rank_and_exports",),
    ),
    Break(
        "export keeps weak directions first",
        "lorainit_diffusers/export/factors.py",
        "lora_A, lora_B = root[:, None] * svd.right[:rank], svd.left[:, :rank] * root",
        "lora_A, lora_B = root[:, None] * svd.right[-len(root):], svd.left[:, -len(root):] * root",
        ("tests/test_adapters.py::test_compression_is_the_best_approximation_and_says_what_it_discards",),
    ),
    Break(
        "energy that compression discards is counted as kept",
        "lorainit_diffusers/export/factors.py",
        "float(energy.sum()), float(energy[export_rank:].sum())",
        "float(energy.sum()), float(energy[:export_rank].sum())",
        ("tests/test_adapters.py::test_compression_is_the_best_approximation_and_says_what_it_discards",),
    ),
    Break(
        "alpha of another rank in the file",
        "lorainit_diffusers/export/factors.py",
        '"alpha_pattern": pattern,',
        '"alpha_pattern": {},',
        ("tests/test_adapters.py::test_the_metadata_is_minimal_and_has_alpha_equal_to_rank",),
    ),
    Break(
        "file names a layer by an ending that others share",
        "lorainit_diffusers/export/diffusers_file.py",
        "f\"{'' if text_encoder else '^'}{names[name]}\"",
        'f"{names[name]}"',
        ("tests/test_adapters.py::test_layers_whose_names_end_alike_are_told_apart",),
    ),
    Break(
        "output layer is left out of PEFT's folder",
        "lorainit_diffusers/export/peft_folder.py",
        '    tensors |= {f"{PEFT_PREFIX}{key}": value for key, value in whole.items()}\n',
        "",
        ("tests/test_peft_export.py::test_peft_loads_adapter_and_head_on_the_original_base",),
    ),
    Break(
        "merged weights without the LoRA",
        "lorainit_diffusers/export/merged_model.py",
        '        state[f"{name}.weight"] = _merged_weight(state[f"{name}.weight"], adapter)\n',
        '        state[f"{name}.weight"] = state[f"{name}.weight"]\n',
        ("tests/test_peft_export.py::test_the_merged_model_is_the_adapted_one",),
    ),
    Break(
        "rsLoRA file is read as LoRA",
        "lorainit_diffusers/export/load.py",
        'return alpha / (rank**0.5 if config.get("use_rslora") else rank)',
        "return alpha / rank",
        ("tests/test_peft_export.py::test_the_scale_of_a_folder_that_peft_wrote_is_its_configurations",),
    ),
    Break(
        "kohya: up blocks are counted from the wrong end",
        "lorainit_diffusers/kohya.py",
        "layers = layers_per_block if down else layers_per_block[::-1]",
        "layers = layers_per_block",
        ("tests/test_kohya_keys.py::test_the_block_counts_come_from_the_unets_configuration",),
    ),
    Break(
        "kohya: downsamplers are not counted",
        "lorainit_diffusers/kohya.py",
        "sum(count + 1 for count in layers[: int(block)])",
        "sum(count for count in layers[: int(block)])",
        ("tests/test_kohya_keys.py::test_the_block_counts_come_from_the_unets_configuration",),
    ),
    Break(
        "the newest checkpoints are deleted",
        "lorainit_diffusers/checkpoints.py",
        "surplus = known[: max(0, len(known) - keep)]",
        "surplus = known[keep:]",
        ("tests/test_checkpoints.py::test_prune_keeps_the_newest_by_number",),
    ),
    Break(
        "checkpoint-10 is older than checkpoint-9",
        "lorainit_diffusers/checkpoints.py",
        "    return [path for _, path in sorted(found)]\n",
        "    return sorted(path for _, path in found)\n",
        ("tests/test_checkpoints.py::test_prune_keeps_the_newest_by_number",),
    ),
    Break(
        "schedule is not resumed",
        "lorainit_diffusers/checkpoints.py",
        "            lr_scheduler.load_state_dict(self.scheduler_state)\n",
        "            pass\n",
        ("tests/test_checkpoints.py::test_restored_run_continues_bit_for_bit",),
    ),
    Break(
        "optimiser's nested state is lost",
        "lorainit_diffusers/checkpoints.py",
        'inner, others[name] = _split(cast("dict[str, Any]", value), f"{prefix}{name}/")',
        "inner, others[name] = {}, {}",
        ("tests/test_checkpoints.py::test_nested_optimizer_state_is_restored_exactly",),
    ),
    Break(
        "checkpoint takes its name before it is whole",
        "lorainit_diffusers/checkpoints.py",
        'temporary = directory.with_name(f".{directory.name}{_UNFINISHED}")',
        "temporary = directory",
        ("tests/test_checkpoints.py::test_replacing_and_pruning_leave_no_moment_without_a_whole_checkpoint",),
    ),
    Break(
        "checkpoint hooks forget the offset",
        "lorainit_diffusers/checkpoint_hooks.py",
        "load_adapter_state_dict(unwrapped, state, adapter_name)",
        "load_adapter_state_dict(unwrapped, {k: v for k, v in state.items() if 'offset' not in k}, adapter_name)",
        ("tests/test_checkpoint_hooks.py::test_twin_follows_the_checkpoint",),
    ),
    Break(
        "the offset is added",
        "lorainit_diffusers/offset.py",
        "return linear(own, self.weight, self.bias) - linear(initial, self.initial())",
        "return linear(own, self.weight, self.bias) + linear(initial, self.initial())",
        ("tests/test_adapters.py::test_step_zero_is_the_base_model_and_only_lora_trains",),
    ),
    Break(
        "merging forgets the offset",
        "lorainit_diffusers/offset.py",
        (
            '        return delta - (product.mT if getattr(layer, "fan_in_fan_out", False) else '
            "product).to(delta.dtype)\n"
        ),
        "        return delta\n",
        ("tests/test_offset.py::test_fusing_puts_the_change_into_the_weights_and_takes_it_out",),
    ),
    Break(
        "PEFT's file holds the offset with the wrong sign",
        "lorainit_diffusers/offset.py",
        "torch.cat([weight, self.sign * self.initial()], dim=self.rank_dim)",
        "torch.cat([weight, self.initial()], dim=self.rank_dim)",
        ("tests/test_offset.py::test_what_diffusers_saves_is_right_on_the_original_base",),
    ),
    Break(
        "the offset is rounded with the model",
        "lorainit_diffusers/offset.py",
        "            return tensor.to(device=moved.device, dtype=torch.float32) if rounds else moved\n",
        "            return moved\n",
        ("tests/test_offset.py::test_casting_the_model_before_saving_loses_nothing",),
    ),
    Break(
        "the offset is dropped out, too",
        "lorainit_diffusers/offset.py",
        "linear(input, self.initial())], dim=-1)",
        "linear(self.dropout(input), self.initial())], dim=-1)",
        ("tests/scripts/test_loop_reference.py::test_offset",),
    ),
    Break(
        "a resumed run has no offset",
        "lorainit_diffusers/adapters.py",
        'offset=LoraFactors(entry["offset_A"], entry["offset_B"]) if "offset_A" in entry else None',
        "offset=None",
        ("tests/test_adapters.py::test_adapter_state_round_trip_is_bit_exact",),
    ),
    Break(
        "a checkpoint of NaN replaces the last good one",
        "lorainit_diffusers/checkpoints.py",
        '    check_finite(tensors, f"the checkpoint of step {step}")\n',
        "",
        ("tests/test_finite.py::test_a_checkpoint_that_is_not_finite_leaves_the_last_good_one",),
    ),
    Break(
        "files are for their owner only",
        "lorainit_diffusers/files.py",
        "        os.chmod(scratch, rights)\n",
        "        os.chmod(scratch, 0o600)\n",
        ("tests/test_files.py::test_every_file_has_the_mode_of_the_umask",),
    ),
)
