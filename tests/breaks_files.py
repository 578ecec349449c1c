"""Breaks of what is written: exports, kohya's names, checkpoints."""

from __future__ import annotations

from breaks import Break

BREAKS: tuple[Break, ...] = (
    Break(
        "export without the scaling",
        "lorainit_diffusers/export.py",
        "weights.factors.lora_A, weights.factors.lora_B * weights.scaling",
        "weights.factors.lora_A, weights.factors.lora_B * 1.0",
        ("tests/test_adapters.py::test_the_saved_file_loads_in_the_stock_pipeline",),
    ),
    Break(
        "export keeps weak directions first",
        "lorainit_diffusers/export.py",
        "lora_A, lora_B = root[:, None] * svd.right[:rank], svd.left[:, :rank] * root",
        "lora_A, lora_B = root[:, None] * svd.right[-len(root):], svd.left[:, -len(root):] * root",
        ("tests/test_adapters.py::test_compression_is_the_best_approximation_and_says_what_it_discards",),
    ),
    Break(
        "energy that compression discards is counted as kept",
        "lorainit_diffusers/export.py",
        "float(energy.sum()), float(energy[export_rank:].sum())",
        "float(energy.sum()), float(energy[:export_rank].sum())",
        ("tests/test_adapters.py::test_compression_is_the_best_approximation_and_says_what_it_discards",),
    ),
    Break(
        "alpha of another rank in the file",
        "lorainit_diffusers/export.py",
        '"alpha_pattern": pattern,',
        '"alpha_pattern": {},',
        ("tests/test_adapters.py::test_the_metadata_is_minimal_and_has_alpha_equal_to_rank",),
    ),
    Break(
        "file names a layer by an ending that others share",
        "lorainit_diffusers/export.py",
        "f\"{'' if text_encoder else '^'}{names[name]}\"",
        'f"{names[name]}"',
        ("tests/test_adapters.py::test_layers_whose_names_end_alike_are_told_apart",),
    ),
    Break(
        "output layer is left out of PEFT's folder",
        "lorainit_diffusers/export.py",
        '    tensors |= {f"{PEFT_PREFIX}{key}": value for key, value in whole.items()}\n',
        "",
        ("tests/test_peft_export.py::test_peft_loads_adapter_and_head_on_the_original_base",),
    ),
    Break(
        "merged weights without the LoRA",
        "lorainit_diffusers/export.py",
        '        state[f"{name}.weight"] = _merged_weight(state[f"{name}.weight"], adapter)\n',
        '        state[f"{name}.weight"] = state[f"{name}.weight"]\n',
        ("tests/test_peft_export.py::test_the_merged_model_is_the_adapted_one",),
    ),
    Break(
        "rsLoRA file is read as LoRA",
        "lorainit_diffusers/export.py",
        'return alpha / (rank**0.5 if config.get("use_rslora") else rank)',
        "return alpha / rank",
        ("tests/test_peft_export.py::test_the_scale_of_a_folder_that_peft_wrote_is_its_configurations",),
    ),
)
