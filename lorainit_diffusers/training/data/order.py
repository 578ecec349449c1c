"""The order of the batches, a function of the seed: ours, since a run must go on at any batch with any processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from lorainit_diffusers.training.seeds import derive_seed, seeded_generator


class DataOrder:
    """Batches of `(index, seed)`: each epoch is a permutation of the images, drawn from (seed, epoch).

    Batch k is a function of (seed, k) alone, so a run resumes at any batch, and processes take turns: of n processes,
    the i-th takes batches i, i + n, i + 2 n, ... Batches run over epoch ends: a small set may have large batches.
    """

    def __init__(self, num_images: int, batch_size: int, seed: int, batches: range) -> None:
        self.num_images, self.batch_size, self.seed, self.batches = num_images, batch_size, seed, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = -1, []
        for batch in self.batches:
            keys: list[tuple[int, int]] = []
            for position in range(batch * self.batch_size, (batch + 1) * self.batch_size):
                if position // self.num_images != epoch:
                    epoch = position // self.num_images
                    generator = seeded_generator(self.seed, "order", epoch)
                    order = torch.randperm(self.num_images, generator=generator).tolist()
                keys.append((order[position % self.num_images], derive_seed(self.seed, "image", position)))
            yield keys


class BucketOrder:
    """Batches of `(index, seed)` whose images share a bucket; otherwise as `DataOrder`.

    An epoch is a random order of the batches of all buckets. Within it every image comes at least once: where a
    bucket's images do not fill its last batch, the first ones of its permutation come again. Batch k is a function of
    (seed, k) alone.
    """

    def __init__(self, bucket_of_image: Sequence[int], batch_size: int, seed: int, batches: range) -> None:
        self.batch_size, self.seed, self.batches = batch_size, seed, batches
        self.members: dict[int, list[int]] = {}
        for index, bucket in enumerate(bucket_of_image):
            self.members.setdefault(bucket, []).append(index)
        self.batches_per_epoch = sum(-(-len(images) // batch_size) for images in self.members.values())

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = -1, []
        for batch in self.batches:
            if batch // self.batches_per_epoch != epoch:
                epoch = batch // self.batches_per_epoch
                order = self._epoch(epoch)
            indices = order[batch % self.batches_per_epoch]
            yield [
                (index, derive_seed(self.seed, "image", batch * self.batch_size + place))
                for place, index in enumerate(indices)
            ]

    def _epoch(self, epoch: int) -> list[list[int]]:
        batches: list[list[int]] = []
        for bucket, images in self.members.items():
            permutation = torch.randperm(len(images), generator=seeded_generator(self.seed, "order", epoch, bucket))
            shuffled = [images[place] for place in permutation.tolist()]
            batches += [
                [shuffled[place % len(images)] for place in range(start, start + self.batch_size)]
                for start in range(0, len(images), self.batch_size)
            ]
        order = torch.randperm(len(batches), generator=seeded_generator(self.seed, "batches", epoch))
        return [batches[place] for place in order.tolist()]
