"""Breaks of the data: images, their order, buckets, classes and questions."""

from __future__ import annotations

from breaks import Break

BREAKS: tuple[Break, ...] = (
    Break(
        "every epoch has the same order",
        "lorainit_diffusers/training/data/order.py",
        '                    generator = seeded_generator(self.seed, "order", epoch)\n                    order',
        '                    generator = seeded_generator(self.seed, "order", 0)\n                    order',
        ("tests/scripts/test_loop_reference.py::test_stable_diffusion",),
    ),
    Break(
        "images are drawn with replacement",
        "lorainit_diffusers/training/data/order.py",
        "order = torch.randperm(self.num_images, generator=generator).tolist()",
        "order = torch.randint(self.num_images, (self.num_images,), generator=generator).tolist()",
        ("tests/training/data/test_captioned_images.py::test_epochs_are_permutations_and_batches_run_over_their_ends",),
    ),
    Break(
        "an image's crop is the same in every epoch",
        "lorainit_diffusers/training/data/order.py",
        'keys.append((order[position % self.num_images], derive_seed(self.seed, "image", position)))',
        (
            'keys.append((order[position % self.num_images], derive_seed(self.seed, "image", position '
            "% self.num_images)))"
        ),
        ("tests/scripts/test_loop_reference.py::test_comparison",),
    ),
    Break(
        "buckets always come in the same order",
        "lorainit_diffusers/training/data/order.py",
        'order = torch.randperm(len(batches), generator=seeded_generator(self.seed, "batches", epoch))',
        "order = torch.arange(len(batches))",
        (
            "tests/training/data/test_captioned_images.py::test_bucket_batches_hold_one_bucket_and_epochs_hold_every_image",
        ),
    ),
    Break(
        "a short bucket loses its last images",
        "lorainit_diffusers/training/data/order.py",
        "for start in range(0, len(images), self.batch_size)\n            ]\n        order",
        (
            "for start in range(0, len(images) // self.batch_size * self.batch_size or "
            "self.batch_size, self.batch_size)\n"
            "            ]\n"
            "        order"
        ),
        (
            "tests/training/data/test_captioned_images.py::test_bucket_batches_hold_one_bucket_and_epochs_hold_every_image",
        ),
    ),
    Break(
        "crop corner is width before height",
        "lorainit_diffusers/training/data/captioned_images.py",
        "    return image, (top, left)\n",
        "    return image, (left, top)\n",
        (
            "tests/training/data/test_captioned_images.py::test_crop_corners_are_places_in_the_resized_and_possibly_mirrored_image",
        ),
    ),
    Break(
        "mirrored crop keeps its corner",
        "lorainit_diffusers/training/data/captioned_images.py",
        "image, left = ImageOps.mirror(image), covering[0] - (left + width)",
        "image = ImageOps.mirror(image)",
        (
            "tests/training/data/test_captioned_images.py::test_crop_corners_are_places_in_the_resized_and_possibly_mirrored_image",
        ),
    ),
    Break(
        "random crops are centred",
        "lorainit_diffusers/training/data/captioned_images.py",
        "place = None if center_crop else torch.rand",
        "place = None if True else torch.rand",
        ("tests/training/data/test_captioned_images.py::test_crops_and_flips_come_from_the_generator",),
    ),
    Break(
        "a mask is cropped by numbers of its own",
        "lorainit_diffusers/training/data/captioned_images.py",
        "else _mask(record.mask, size, draw)",
        "else _mask(record.mask, size, draw_crop(center_crop, random_flip, generator))",
        ("tests/training/data/test_masks.py::test_masks_and_conditioning_images_are_cropped_as_their_image",),
    ),
    Break(
        "a mask is a training image",
        "lorainit_diffusers/training/data/files.py",
        "return path.stem.lower().endswith(MASK_ENDING)",
        "return False",
        ("tests/training/data/test_masks.py::test_masks_by_name",),
    ),
    Break(
        "a changed mask is not noticed when a run is resumed",
        "lorainit_diffusers/training/resume.py",
        "            sample.append(beside)\n",
        "            pass\n",
        ("tests/training/data/test_masks.py::test_what_lies_beside_belongs_to_the_identity_of_the_data",),
    ),
    Break(
        "transparent pixels lie over black",
        "lorainit_diffusers/training/data/images.py",
        "(255, 255, 255, 255)",
        "(0, 0, 0, 255)",
        ("tests/training/data/test_captioned_images.py::test_palettes_keep_colours_and_transparency_lies_over_white",),
    ),
    Break(
        "photographs lie on their side",
        "lorainit_diffusers/training/data/images.py",
        "            turn = _TURNS.get(_orientation(opened))\n",
        "            turn = None\n",
        ("tests/training/data/test_captioned_images.py::test_all_exif_orientations_are_applied",),
    ),
    Break(
        "nearest bucket by difference instead of ratio",
        "lorainit_diffusers/training/data/buckets.py",
        "aspect = math.log(size[0] / size[1])",
        "aspect = size[0] / size[1] - 1",
        ("tests/training/data/test_captioned_images.py::test_the_nearest_bucket_has_the_nearest_log_aspect",),
    ),
    Break(
        "cached latents are the posterior's mean",
        "lorainit_diffusers/training/data/captioned_images.py",
        'item["latents"] = mean + std * torch.randn(mean.shape, generator=generator)',
        'item["latents"] = mean',
        ("tests/scripts/test_loop_reference.py::test_comparison",),
    ),
    Break(
        "captions go to other images",
        "lorainit_diffusers/training/data/captioned_images.py",
        "rows = torch.tensor([row_of[record.caption] for record in records])",
        "rows = torch.tensor([row_of[record.caption] for record in records]).flip(0)",
        ("tests/scripts/test_loop_reference.py::test_stable_diffusion",),
    ),
    Break(
        "class and instance images are told apart wrongly",
        "lorainit_diffusers/training/data/prior_preservation.py",
        'pair["is_class"] = torch.arange(sum(sizes)) >= sizes[0]',
        'pair["is_class"] = torch.arange(sum(sizes)) < sizes[0]',
        ("tests/scripts/test_loop_reference.py::test_prior_preservation",),
    ),
    Break(
        "class images of several processes are drawn twice",
        "lorainit_diffusers/training/data/prior_preservation.py",
        "index % num_processes == process",
        "index % num_processes >= 0",
        ("tests/training/data/test_prior_preservation.py::test_processes_draw_their_shares_of_one_set",),
    ),
    Break(
        "an answer with one wrong token matches",
        "lorainit_diffusers/training/questions/task.py",
        "num_wrong += int(wrong[answers.samples == number][-_last_answer_tokens(sample) :].any())",
        "num_wrong += int(wrong[answers.samples == number][-_last_answer_tokens(sample) :].all())",
        ("tests/scripts/test_train_vlm_lora.py::test_one_wrong_token_makes_an_answer_wrong",),
    ),
    Break(
        "validation loss of questions weighs batches alike",
        "lorainit_diffusers/training/questions/task.py",
        'loss += float(F.cross_entropy(answers.logits, answers.tokens, reduction="sum"))',
        "loss += float(F.cross_entropy(answers.logits, answers.tokens)) * answers.tokens.numel() ** 0.5",
        ("tests/scripts/test_train_vlm_lora.py::test_evaluation_does_not_depend_on_the_size_of_its_batches",),
    ),
    Break(
        "a copy in another format is another picture",
        "lorainit_diffusers/training/data/grouping.py",
        "    return [known[key] for key in files]\n",
        "    return files\n",
        ("tests/training/test_grouping.py::test_one_picture_in_many_files",),
    ),
    Break(
        "questions that share images are torn apart",
        "lorainit_diffusers/training/data/grouping.py",
        "for number, sample in zip(connected(samples), samples, strict=True):",
        "for number, sample in enumerate(samples):",
        ("tests/training/test_grouping.py::test_groups_that_do_not_fit_are_left_to_the_training",),
    ),
    Break(
        "hidden files are training images",
        "lorainit_diffusers/training/data/files.py",
        'return name.startswith(".") or name.lower() in SYSTEM_NAMES',
        "return name.lower() in SYSTEM_NAMES",
        ("tests/training/data/test_data_files.py::test_hidden_and_system_files_never_count_and_are_said",),
    ),
    Break(
        "a byte order mark belongs to the first column",
        "lorainit_diffusers/training/data/text.py",
        '    text = text.removeprefix("\\ufeff")\n',
        "",
        ("tests/training/data/test_data_rows.py::test_unicode_is_read_in_every_form",),
    ),
)
