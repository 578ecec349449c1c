"""Statistics joined over the processes of a launch, in a few large sums instead of several small ones each."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lorainit_diffusers.statistics.base import Statistic, SumAcrossProcesses

# Tensors are copied into buffers of at most this many bytes; larger ones are summed where they are.
BUFFER_BYTES = 64 * 2**20


def all_reduce(statistics: Iterable[Statistic], sum_across_processes: SumAcrossProcesses) -> None:
    """Join every statistic with those of the same place on the other processes.

    Args:
        statistics: Filled, in the same order on every process; each once.
        sum_across_processes: Sums a tensor over the processes in place. Called with one-dimensional tensors, about as
            often as they fill buffers of `BUFFER_BYTES`, precision by precision.
    """
    rounds = [statistic.sums() for statistic in statistics]
    while rounds:
        waiting = [(part, tensors) for part in rounds if (tensors := next(part, None)) is not None]
        rounds = [part for part, _ in waiting]
        _sum_together([tensor for _, tensors in waiting for tensor in tensors], sum_across_processes)


def _sum_together(tensors: list[Tensor], sum_across_processes: SumAcrossProcesses) -> None:
    by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        by_kind.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    for alike in by_kind.values():
        group: list[Tensor] = []
        num_bytes = 0
        for tensor in alike:
            if group and num_bytes + tensor.nbytes > BUFFER_BYTES:
                _sum_group(group, sum_across_processes)
                group, num_bytes = [], 0
            group.append(tensor)
            num_bytes += tensor.nbytes
        _sum_group(group, sum_across_processes)


def _sum_group(group: list[Tensor], sum_across_processes: SumAcrossProcesses) -> None:
    if len(group) == 1 and group[0].is_contiguous():
        sum_across_processes(group[0].view(-1))
        return
    buffer = torch.cat([tensor.reshape(-1) for tensor in group])
    sum_across_processes(buffer)
    for tensor, total in zip(group, buffer.split([tensor.numel() for tensor in group]), strict=True):
        tensor.copy_(total.view_as(tensor))
