"""Small helpers of the core tests. Oracles are float64 brute force over all rows, never the library's own code."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn


def rows_with_spectrum(
    num_rows: int, deviations: Sequence[float], *, mean: float = 0.0, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """(num_rows, len(deviations)) rows whose covariance has about these standard deviations along random axes."""
    generator = torch.Generator().manual_seed(seed)
    features = len(deviations)
    axes = torch.linalg.qr(torch.randn(features, features, generator=generator, dtype=torch.float64)).Q
    latent = torch.randn(num_rows, features, generator=generator, dtype=torch.float64) * torch.tensor(deviations)
    return (latent @ axes.mT + mean * torch.randn(features, generator=generator, dtype=torch.float64)).to(dtype)


def largest_principal_angle(first: Tensor, second: Tensor) -> float:
    """Largest principal angle, in radians, between two row spaces of equal dimension."""
    first = torch.linalg.qr(first.double().mT).Q
    second = torch.linalg.qr(second.double().mT).Q
    sine = torch.linalg.matrix_norm(second - first @ (first.mT @ second), ord=2)
    return float(torch.asin(sine.clamp(max=1.0)))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of the expected value."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm())


def run_as_processes(num_processes: int, work: Callable[[int, Callable[[Tensor], None]], None]) -> None:
    """Call `work(process, sum_across_processes)` in threads that meet in every sum, as collective calls do."""
    barrier = threading.Barrier(num_processes, timeout=20)
    slots: dict[int, Tensor] = {}
    errors: list[BaseException] = []

    def target(process: int) -> None:
        def sum_across_processes(tensor: Tensor) -> None:
            slots[process] = tensor.clone()
            barrier.wait()
            total = sum(slots[index] for index in range(1, num_processes)) + slots[0]
            barrier.wait()
            tensor.copy_(total)

        try:
            work(process, sum_across_processes)
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=target, args=(process,)) for process in range(num_processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


class TinyAttention(nn.Module):
    """Query, key and value fed by one tensor, as in an attention block; then an MLP."""

    def __init__(self, features: int = 16, hidden: int = 24) -> None:
        super().__init__()
        self.to_q = nn.Linear(features, features)
        self.to_k = nn.Linear(features, features)
        self.to_v = nn.Linear(features, features)
        self.to_out = nn.Linear(features, features)
        self.up = nn.Linear(features, hidden)
        self.down = nn.Linear(hidden, features)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.to_q(x) @ self.to_k(x).mT / x.shape[-1] ** 0.5).softmax(-1)
        x = x + self.dropout(self.to_out(weights @ self.to_v(x)))
        return x + self.down(torch.nn.functional.gelu(self.up(x)))


ATTENTION_LAYERS = ("to_q", "to_k", "to_v", "to_out", "up", "down")


def tiny_attention(seed: int = 0, **kwargs: int) -> TinyAttention:
    """A seeded TinyAttention."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TinyAttention(**kwargs)


def token_batches(count: int = 3, features: int = 16, tokens: int = 20, batch: int = 4, seed: int = 0) -> list[Tensor]:
    """Batches of token inputs with a decaying spectrum and a mean."""
    deviations = [0.8**index for index in range(features)]
    rows = rows_with_spectrum(count * batch * tokens, deviations, mean=0.3, seed=seed)
    return list(rows.reshape(count, batch, tokens, features))


def squared_loss(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """A training loss of the module: mean square of its output minus a fixed function of its input."""

    def loss(batch: Tensor) -> Tensor:
        return (module(batch) - batch.flip(-1)).square().mean()

    return loss


def draw_weight(out_features: int, in_features: int, seed: int = 0) -> Tensor:
    """A float32 weight with a decaying, gapped spectrum (as trained weights have), of the scale of nn.Linear's."""
    generator = torch.Generator().manual_seed(seed)
    size = min(out_features, in_features)
    left = torch.linalg.qr(torch.randn(out_features, size, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(in_features, size, generator=generator, dtype=torch.float64)).Q
    values = 0.9 ** torch.arange(size, dtype=torch.float64)
    return (left * values @ right.mT).float()


def second_moment_of(rows: Tensor) -> Tensor:
    """X'X/n in float64."""
    return rows.double().mT @ rows.double() / len(rows)


def ridged(rows: Tensor, ridge: float) -> Tensor:
    """X'X/n plus `ridge` times its mean eigenvalue, in float64."""
    moment = second_moment_of(rows)
    return moment + ridge * moment.diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)


def symmetric_power(matrix: Tensor, exponent: float) -> Tensor:
    """A real power of a symmetric positive definite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values**exponent @ vectors.mT


def feed(statistic: Any, observed: Any) -> None:
    """Update a method's statistic: with rows, with a list of gradients, or with a pair of both."""
    if isinstance(observed, tuple):
        feed(statistic.inputs, observed[0])
        feed(statistic.gradient, observed[1])
        return
    for part in observed.tensor_split(3) if isinstance(observed, Tensor) else observed:
        statistic.update(part)


def best_rank(matrix: Tensor, rank: int) -> Tensor:
    """The best approximation of that rank in the Frobenius norm, by a full float64 SVD."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    return left[:, :rank] * values[:rank] @ right[:rank]


def product(factors: tuple[Tensor, Tensor], scaling: float = 1.0) -> Tensor:
    """scaling * B A in float64, from (A, B)."""
    return scaling * factors[1].double() @ factors[0].double()


# Which random-base module gets adapters on which layers, by component.
TARGETS = {
    "unet": ["to_q", "to_k", "to_v", "to_out.0"],
    "text_encoder": ["q_proj", "k_proj", "v_proj", "out_proj"],
}
ADAPTED_STATES = ("raw", "add_adapter", "get_peft_model")


def adapted(module: nn.Module, state: str, targets: Sequence[str], **config: Any) -> nn.Module:
    """The module in one of the three states in which a user may hand it over, frozen as scripts do it."""
    module.requires_grad_(False)
    if state == "raw":
        return module
    lora_config = LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": list(targets), **config})
    if state == "add_adapter":
        module.add_adapter(lora_config)
        return module
    return get_peft_model(module, lora_config)


def small_unet() -> UNet2DConditionModel:
    """A UNet with self- and cross-attention in its first down block and in its middle: 16 projections."""
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=8,
    )


@dataclass
class RandomSD:
    """Text encoder and UNet of a random pipeline, a training loss through both, and batches for it."""

    unet: nn.Module
    text_encoder: nn.Module

    def copy(self) -> RandomSD:
        return RandomSD(copy.deepcopy(self.unet), copy.deepcopy(self.text_encoder))

    def batches(self, count: int = 3, seed: int = 0) -> list[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        return [
            {
                "latents": torch.randn(2, 4, 8, 8, generator=generator),
                "target": torch.randn(2, 4, 8, 8, generator=generator),
                "timesteps": torch.randint(0, 1000, (2,), generator=generator),
                "input_ids": torch.randint(0, 180, (2, 12), generator=generator),
            }
            for _ in range(count)
        ]

    def predict(self, batch: dict[str, Tensor]) -> Tensor:
        prompt_embeds = self.text_encoder(batch["input_ids"])[0]
        return self.unet(batch["latents"], batch["timesteps"], encoder_hidden_states=prompt_embeds).sample

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        return (self.predict(batch) - batch["target"]).square().mean()

    @torch.no_grad()
    def output(self) -> Tensor:
        """The prediction for a fixed batch, in evaluation mode."""
        self.unet.eval()
        self.text_encoder.eval()
        return self.predict(self.batches(1, seed=99)[0])

    def train(self, parameters: Sequence[nn.Parameter], steps: int = 3, learning_rate: float = 0.02) -> None:
        optimizer = torch.optim.Adam(parameters, lr=learning_rate)
        for batch in self.batches(steps, seed=5):
            optimizer.zero_grad()
            self.loss(batch).backward()
            optimizer.step()


def base_weights(module: nn.Module) -> dict[str, Tensor]:
    """Copies of the base model's tensors, under the names that they have without adapters."""
    return {
        name.removeprefix("base_model.model.").replace(".base_layer.", "."): value.clone()
        for name, value in module.state_dict().items()
        if ".lora_" not in name
    }
