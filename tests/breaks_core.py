"""Breaks of the core: statistics, decompositions, ranks, hooks, collection, methods."""

from __future__ import annotations

from breaks import Break

BREAKS: tuple[Break, ...] = (
    Break(
        "scatter gains the square of what two groups gain",
        "lorainit_diffusers/statistics/second_moment.py",
        "torch.mul(step.to(rows.device), weight**0.5, out=centred[-1])",
        "torch.mul(step.to(rows.device), weight, out=centred[-1])",
        ("tests/test_statistics.py::test_any_split_equals_the_batch_result",),
    ),
    Break(
        "running mean weighs every batch alike",
        "lorainit_diffusers/statistics/base.py",
        "self._mean.add_(step, alpha=num_rows / total)",
        "self._mean.add_(step, alpha=0.5)",
        ("tests/test_statistics.py::test_any_split_equals_the_batch_result",),
    ),
    Break(
        "half-precision rows are squared in half precision",
        "lorainit_diffusers/statistics/second_moment.py",
        (
            "            rows = rows.detach().float()\n"
            "            batch_mean, step, weight = self._fold(rows)\n"
            "            # The rank-one"
        ),
        (
            "            rows = rows.detach()\n"
            "            batch_mean, step, weight = self._fold(rows)\n"
            "            # The rank-one"
        ),
        ("tests/test_statistics.py::test_any_split_equals_the_batch_result",),
    ),
    Break(
        "processes sum their scatters about different means",
        "lorainit_diffusers/statistics/second_moment.py",
        "        scatter.addr_(offset, offset * num_rows)\n",
        "",
        ("tests/test_statistics.py::test_all_reduce_equals_the_batch_result_on_every_process",),
    ),
    Break(
        "second moment without the mean",
        "lorainit_diffusers/statistics/second_moment.py",
        "return self.covariance() + torch.outer(self.mean(), self.mean())",
        "return self.covariance()",
        ("tests/test_statistics.py::test_any_split_equals_the_batch_result",),
    ),
    Break(
        "eigenpairs of before are kept after more rows",
        "lorainit_diffusers/statistics/second_moment.py",
        (
            "        self._forget()\n"
            "        with full_float32(rows.device):\n"
            "            rows = rows.detach().float()\n"
            "            batch_mean, step, weight = self._fold(rows)\n"
            "            # The rank-one"
        ),
        (
            "        with full_float32(rows.device):\n"
            "            rows = rows.detach().float()\n"
            "            batch_mean, step, weight = self._fold(rows)\n"
            "            # The rank-one"
        ),
        ("tests/test_statistics.py::test_eigh_is_refreshed_by_an_update",),
    ),
    Break(
        "few rows lose their mean",
        "lorainit_diffusers/statistics/second_moment.py",
        "return rows if centered else torch.cat([mean.to(rows)[None], rows])",
        "return rows",
        ("tests/test_statistics.py::test_few_rows_are_the_moment_that_their_scatter_is",),
    ),
    Break(
        "rows kept before the scatter are forgotten when it begins",
        "lorainit_diffusers/statistics/second_moment.py",
        "                    self._add(earlier.to(rows.device))\n",
        "                    pass\n",
        ("tests/test_statistics.py::test_rows_become_a_scatter_when_they_are_no_longer_few",),
    ),
    Break(
        "sketch forgets the shift of the mean between batches",
        "lorainit_diffusers/statistics/sketch.py",
        "            sketch += torch.outer(step * weight, step @ omega)\n",
        "",
        ("tests/test_statistics.py::test_the_sketch_too_does_not_depend_on_the_split",),
    ),
    Break(
        "sketch spreads nothing over what it did not resolve",
        "lorainit_diffusers/statistics/sketch.py",
        "rest = (self.trace(centered=centered) - float(values.sum())) / max(self._features - self.num_columns, 1)",
        "rest = 0.0",
        ("tests/test_statistics.py::test_the_eigenbasis_of_a_sketch_keeps_the_trace_and_spreads_the_rest",),
    ),
    Break(
        "mean gradient counts batches instead of their weights",
        "lorainit_diffusers/statistics/gradient.py",
        "return self._sum / self._total_weight",
        "return self._sum / self._num_batches",
        ("tests/test_statistics.py::test_weighted_gradients_in_any_split_and_from_disk",),
    ),
    Break(
        "TF32 stays on in the products of statistics",
        "lorainit_diffusers/statistics/base.py",
        '        torch.set_float32_matmul_precision("highest")\n',
        "",
        ("tests/test_statistics.py::test_lowered_matmul_precision_is_lifted_and_restored",),
    ),
    Break(
        "singular values are left squared",
        "lorainit_diffusers/linalg.py",
        "values, left = squared[:rank].sqrt(), left[:, :rank]",
        "values, left = squared[:rank], left[:, :rank]",
        ("tests/test_linalg.py::test_top_svd_agrees_with_numpy",),
    ),
    Break(
        "singular vectors with the wrong sign",
        "lorainit_diffusers/linalg.py",
        "(right * signs).mT)",
        "right.mT)",
        ("tests/test_linalg.py::test_top_svd_agrees_with_numpy",),
    ),
    Break(
        "randomised decomposition draws from the global generator",
        "lorainit_diffusers/linalg.py",
        "return torch.randn(size, num_columns, generator=generator).to(device=device, dtype=low)",
        "return torch.randn(size, num_columns).to(device=device, dtype=low)",
        ("tests/test_linalg.py::test_a_random_start_neither_reads_nor_moves_the_global_generator",),
    ),
    Break(
        "rounding leaves negative eigenvalues",
        "lorainit_diffusers/linalg.py",
        "return Eigen(values.flip(0).clamp_min(0), vectors.flip(1))",
        "return Eigen(values.flip(0), vectors.flip(1))",
        ("tests/test_linalg.py::test_eigh_of_a_singular_matrix_has_no_negative_value",),
    ),
    Break(
        "randomised decomposition stops before it has converged",
        "lorainit_diffusers/linalg.py",
        "if excess <= 1 or (stuck",
        "if excess <= 1e7 or (stuck",
        ("tests/test_linalg.py::test_leading_eigenpairs_of_any_spectrum",),
    ),
    Break(
        "eigenbasis lifts without the reflection",
        "lorainit_diffusers/eigenbasis.py",
        "        rows[:, :k] += thin @ self._rotation.mT\n",
        "",
        ("tests/test_eigenbasis.py::test_the_basis_is_orthonormal_and_diagonalises_the_matrix",),
    ),
    Break(
        "parameter budget ignores what a component costs",
        "lorainit_diffusers/ranks.py",
        "(-float(score) / costs[name], order[name], index, name)",
        "(-float(score), order[name], index, name)",
        ("tests/test_ranks.py::test_a_parameter_budget_competes_by_score_per_parameter",),
    ),
    Break(
        "one component too many for the budget",
        "lorainit_diffusers/ranks.py",
        "        if costs[name] <= left:\n",
        "        if left > 0:\n",
        ("tests/test_ranks.py::test_a_parameter_budget_is_kept_and_used",),
    ),
    Break(
        "ranks beyond the scores that there are",
        "lorainit_diffusers/ranks.py",
        "min(max_rank, *layers[name], len(scores[name]))",
        "min(max_rank, *layers[name])",
        ("tests/test_ranks.py::test_no_layer_gets_more_ranks_than_it_has_scores",),
    ),
    Break(
        "narrow layers are sketched before wide ones",
        "lorainit_diffusers/budget.py",
        "self.first_sketched_width = max(widths)",
        "self.first_sketched_width = min(widths)",
        ("tests/test_budget.py::test_the_widest_layers_are_sketched_and_no_more_than_needed",),
    ),
    Break(
        "hook of a packed layer stays after an exception",
        "lorainit_diffusers/hooks.py",
        (
            "                handle = layer.register_forward_hook(partial(watch.packed_called, name, leaf), "
            "with_kwargs=True)\n"
            "                stack.callback(handle.remove)\n"
        ),
        (
            "                handle = layer.register_forward_hook(partial(watch.packed_called, name, leaf), "
            "with_kwargs=True)\n"
            "                stack.push(lambda kind, *rest, handle=handle: None if kind else handle.remove())\n"
        ),
        ("tests/test_quantized.py::test_no_hook_of_a_packed_layer_stays_after_an_exception",),
    ),
    Break(
        "hooks of inputs stay",
        "lorainit_diffusers/hooks.py",
        (
            "            handle = layer.register_forward_pre_hook(make_hook(name), with_kwargs=True)\n"
            "            stack.callback(handle.remove)\n"
        ),
        "            layer.register_forward_pre_hook(make_hook(name), with_kwargs=True)\n",
        ("tests/test_hooks.py::test_the_callback_gets_the_very_tensor_by_position_and_by_keyword",),
    ),
    Break(
        "weights keep requiring gradients",
        "lorainit_diffusers/hooks.py",
        "            stack.callback(_restore, weight, weight.requires_grad, weight.grad)\n",
        "",
        ("tests/test_hooks.py::test_gradient_observer_restores_grad_and_requires_grad",),
    ),
    Break(
        "inputs given by keyword are not seen",
        "lorainit_diffusers/hooks.py",
        '("input", "hidden_states", "x")',
        '("input",)',
        ("tests/test_hooks.py::test_a_layer_with_other_keywords_is_observed_too",),
    ),
    Break(
        "a packed layer called twice counts once",
        "lorainit_diffusers/hooks.py",
        "sums[name] = sums[name].add_(gradient) if name in sums else gradient",
        "sums[name] = gradient",
        ("tests/test_quantized.py::test_a_packed_layer_called_twice_gives_one_gradient_the_sum_and_no_hook_stays",),
    ),
    Break(
        "training mode is not given back",
        "lorainit_diffusers/hooks.py",
        "                module.training = mode\n",
        "                module.training = module.training\n",
        ("tests/test_hooks.py::test_model_state_is_preserved",),
    ),
    Break(
        "a collection pass moves the global random state",
        "lorainit_diffusers/hooks.py",
        "    with torch.random.fork_rng(devices=devices):\n",
        "    with torch.enable_grad():\n",
        ("tests/test_hooks.py::test_model_state_is_preserved",),
    ),
    Break(
        "tensors changed in place count as the same input",
        "lorainit_diffusers/collect.py",
        "version = 0 if tensor.is_inference() else tensor._version",
        "version = 0",
        ("tests/test_collect.py::test_a_tensor_modified_in_place_is_another_input",),
    ),
    Break(
        "a freed tensor's successor counts as the same input",
        "lorainit_diffusers/collect.py",
        "entry is not None and entry[0]() is tensor and entry[1:4] == signature",
        "entry is not None and entry[1:4] == signature",
        ("tests/test_collect.py::test_a_new_tensor_in_freed_memory_is_another_input",),
    ),
    Break(
        "float16 gradients keep their scale",
        "lorainit_diffusers/collect.py",
        "gradient.float() / scale if scale != 1.0 else gradient",
        "gradient",
        ("tests/test_collect.py::test_gradients_of_float16_weights_do_not_underflow",),
    ),
    Break(
        "padding counts in statistics",
        "lorainit_diffusers/collect.py",
        "token_mask(name) if token_mask else None",
        "None",
        ("tests/test_collect.py::test_padding_changes_no_statistic",),
    ),
    Break(
        "non-finite activations pass",
        "lorainit_diffusers/collect.py",
        '        _check_finite(self._inputs, "input activations", batch_name, self._step.describe_step)\n',
        "",
        ("tests/test_collect.py::test_non_finite_activations_name_layer_batch_and_timesteps",),
    ),
    Break(
        "dropout is on while inputs are collected",
        "lorainit_diffusers/collect.py",
        "            module.eval()\n",
        "",
        ("tests/test_collect.py::test_dropout_is_off_and_gradients_are_off_for_inputs",),
    ),
    Break(
        "timesteps of a collection pass are independent draws",
        "lorainit_diffusers/initialize.py",
        "with step.stratified(strata):",
        "with torch.no_grad():",
        ("tests/test_initialize.py::test_a_family_brings_its_loss_targets_masks_and_stratified_timesteps",),
    ),
    Break(
        "layers with fewer rows than rank are solved all the same",
        "lorainit_diffusers/solving.py",
        "statistic.num_rows < fewest_rows(self.method, rank):",
        "statistic.num_rows < 0:",
        ("tests/test_initialize.py::test_a_layer_with_fewer_rows_than_rank_falls_back_and_says_so",),
    ),
    Break(
        "rsLoRA with the alpha of LoRA",
        "lorainit_diffusers/initialize.py",
        "alpha=plan.scalings[full_name] * kept ** target.rank_power(full_name)",
        "alpha=plan.scalings[full_name] * kept",
        ("tests/test_initialize.py::test_rslora_divides_by_the_root_of_the_rank_in_the_model_and_in_the_report",),
    ),
    Break(
        "every layer draws the same random numbers",
        "lorainit_diffusers/solving.py",
        "generator = torch.Generator().manual_seed(derive_seed(self.seed, full_name))",
        "generator = torch.Generator().manual_seed(derive_seed(self.seed))",
        ("tests/test_initialize.py::test_random_methods_differ_by_seed_and_by_layer",),
    ),
    Break(
        "reference and data change places",
        "lorainit_diffusers/collect.py",
        "name: InputsAndReference(cast(Any, inputs), cast(Any, reference.statistics[name]))",
        "name: InputsAndReference(cast(Any, reference.statistics[name]), cast(Any, inputs))",
        ("tests/test_initialize.py::test_reference_batches_are_what_the_inputs_are_aligned_with",),
    ),
    Break(
        "inputs are collected through the adapters that are there",
        "lorainit_diffusers/initialize.py",
        "    with adapters.adapters_disabled(target.modules):\n        collection = ",
        "    with torch.no_grad():\n        collection = ",
        ("tests/test_initialize.py::test_what_an_adapter_has_learned_does_not_enter_the_statistics",),
    ),
    Break(
        "no offset for what is not zero",
        "lorainit_diffusers/solving.py",
        'offset = factors if self.method.step_zero == "offset" and bool(factors.lora_B.any()) else None',
        "offset = None",
        ("tests/test_initialize.py::test_variable_ranks_spend_the_budget_and_keep_the_scaling",),
    ),
    Break(
        "PiSSA without the scaling",
        "lorainit_diffusers/methods/pissa.py",
        "root = (svd.values[:rank] / scaling).sqrt()",
        "root = svd.values[:rank].sqrt()",
        ("tests/methods/test_weight_methods.py::test_pissa_is_the_best_rank_r_approximation_split_evenly",),
    ),
    Break(
        "MiLoRA takes the largest directions",
        "lorainit_diffusers/methods/milora.py",
        "SVD(left[:, -rank:], values[-rank:], right[-rank:])",
        "SVD(left[:, :rank], values[:rank], right[:rank])",
        ("tests/methods/test_weight_methods.py::test_milora_is_the_bottom_of_the_spectrum",),
    ),
    Break(
        "OLoRA's factors change places",
        "lorainit_diffusers/methods/olora.py",
        "r[:rank].float().contiguous(), q[:, :rank].float()",
        "-r[:rank].float().contiguous(), q[:, :rank].float()",
        ("tests/methods/test_weight_methods.py::test_olora_is_the_qr_factorisation",),
    ),
    Break(
        "orthonormal rows that are not uniform",
        "lorainit_diffusers/methods/orthonormal.py",
        "(basis * triangular.diagonal().sign()).mT",
        "basis.mT",
        ("tests/methods/test_weight_methods.py::test_orthonormal_has_orthonormal_rows_in_uniform_directions",),
    ),
    Break(
        "EVA takes the uncentred moment",
        "lorainit_diffusers/methods/eva.py",
        "inputs.leading(max_rank, centered=self.centered)",
        "inputs.leading(max_rank, centered=False)",
        ("tests/methods/test_eva.py::test_directions_are_those_of_the_svd_of_all_rows",),
    ),
    Break(
        "EVA whitens by the variance instead of its root",
        "lorainit_diffusers/methods/eva.py",
        "lora_A / ratios[:rank, None].clamp_min(floor).sqrt()",
        "lora_A / ratios[:rank, None].clamp_min(floor)",
        ("tests/methods/test_eva.py::test_whitening_divides_by_what_it_says_whatever_the_number_of_rows",),
    ),
    Break(
        "CNTLoRA pushes with the wrong sign",
        "lorainit_diffusers/methods/cntlora.py",
        "delta = projected * (-values / ridged)",
        "delta = projected * (values / ridged)",
        ("tests/methods/test_cntlora.py::test_decorrelation_without_a_ridge_takes_out_the_principal_outputs",),
    ),
    Break(
        "CNTLoRA pushes with the wrong sign, without an eigenbasis",
        "lorainit_diffusers/methods/cntlora.py",
        "rows = -ridged.shrink(transposed_times(weight, leading.vectors)).mT",
        "rows = ridged.shrink(transposed_times(weight, leading.vectors)).mT",
        ("tests/methods/test_cntlora.py::test_the_change_is_the_closed_form",),
    ),
    Break(
        "CNTLoRA without its ridge",
        "lorainit_diffusers/methods/cntlora.py",
        "(values + self.ridge * mean_eigenvalue)",
        "values",
        ("tests/methods/test_cntlora.py::test_alignment_gives_the_data_the_output_moment_of_isotropic_inputs",),
    ),
    Break(
        "CNTLoRA truncates weights instead of activations",
        "lorainit_diffusers/methods/cntlora.py",
        'metric = root if self.truncation == "activation" else torch.ones_like(root)',
        "metric = torch.ones_like(root)",
        ("tests/methods/test_cntlora.py::test_decorrelation_without_a_ridge_takes_out_the_principal_outputs",),
    ),
    Break(
        "CNTLoRA ignores the scaling",
        "lorainit_diffusers/methods/cntlora.py",
        (
            '            lora_B = lora_B * ((self.gamma if self.base == "active" else 1.0) / scaling)\n'
            "            factor = self._factor(lora_A, lora_B, (lora_A"
        ),
        (
            '            lora_B = lora_B * (self.gamma if self.base == "active" else 1.0)\n'
            "            factor = self._factor(lora_A, lora_B, (lora_A"
        ),
        ("tests/methods/test_cntlora.py::test_scaling_times_the_product_is_the_truncated_change",),
    ),
    Break(
        "CNTLoRA ignores the scaling of wide layers",
        "lorainit_diffusers/methods/cntlora.py",
        (
            '            lora_B = lora_B * ((self.gamma if self.base == "active" else 1.0) / scaling)\n'
            "            factor = self._factor(lora_A, lora_B, power"
        ),
        (
            '            lora_B = lora_B * (self.gamma if self.base == "active" else 1.0)\n'
            "            factor = self._factor(lora_A, lora_B, power"
        ),
        ("tests/methods/test_wide_layers.py::test_cntlora_is_its_closed_form",),
    ),
    Break(
        "CNTLoRA's down_only keeps B",
        "lorainit_diffusers/methods/cntlora.py",
        (
            "lora_A, lora_B = basis.lift(lora_A) * factor, lora_B / factor\n"
            '            if self.base == "down_only":\n'
            "                lora_B = torch.zeros_like(lora_B)\n"
        ),
        "lora_A, lora_B = basis.lift(lora_A) * factor, lora_B / factor\n",
        ("tests/methods/test_cntlora.py::test_down_only_keeps_the_directions_of_a_and_no_b",),
    ),
    Break(
        "measured transport without the identity",
        "lorainit_diffusers/methods/cntlora.py",
        "(_transport(half @ half.mT, scale) - identity)",
        "_transport(half @ half.mT, scale)",
        (
            "tests/methods/test_cntlora.py::test_measured_alignment_is_the_closed_form_and_gives_the_data_the_output_moment_of_the_reference",
        ),
    ),
    Break(
        "LoRA-GA gives A and B the same directions",
        "lorainit_diffusers/methods/lora_ga.py",
        "for_A, for_B = torch.arange(rank), torch.arange(rank, 2 * rank)",
        "for_A, for_B = torch.arange(rank), torch.arange(rank)",
        ("tests/methods/test_lora_ga.py::test_directions_and_scales_are_the_papers",),
    ),
    Break(
        "gradient_step climbs",
        "lorainit_diffusers/methods/gradient_step.py",
        "-times(gradient, basis.mT)",
        "times(gradient, basis.mT)",
        ("tests/methods/test_gradient_step.py::test_a_step_descends_by_the_asked_fraction_of_the_outputs",),
    ),
    Break(
        "gradient_step's length counts in weights",
        "lorainit_diffusers/methods/gradient_step.py",
        "base_norm = max(inputs.output_power(weight), 0.0) ** 0.5",
        "base_norm = float(weight.norm())",
        ("tests/methods/test_gradient_step.py::test_a_step_descends_by_the_asked_fraction_of_the_outputs",),
    ),
    Break(
        "CorDA does not undo its weighting",
        "lorainit_diffusers/methods/corda.py",
        "transposed_times(weight, left).mT / values[:, None]",
        "transposed_times(weight, left).mT",
        ("tests/methods/test_wide_layers.py::test_corda_is_its_formula",),
    ),
    Break(
        "Kaiming's bound belongs to another fan",
        "lorainit_diffusers/methods/base.py",
        "return trace / (3 * in_features)",
        "return trace / in_features",
        ("tests/methods/test_cntlora.py::test_matched_scale_gives_the_hidden_power_of_kaiming",),
    ),
)
