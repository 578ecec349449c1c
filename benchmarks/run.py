"""What the initialisations cost, in one command: a table and a CSV, with the hardware that they were measured on.

    python benchmarks/run.py                                   # SD-1.5-sized UNet with random weights, half an hour
    python benchmarks/run.py --model tiny-sd                   # the bundled base, a few minutes
    python benchmarks/run.py --parts overhead --num_batches 16 --side 64 --rank 16

Parts: `overhead` runs the same batches through the bare model and through `initialize`, one after the other in one
process, and gives medians of their ratio; `peft` does so with PEFT's own EVA, CorDA and LoRA-GA; `variance`
compares what the directions of both hold of the inputs' variance with the best in float64; `growth` varies batches,
ranks, layers and the width of a single layer, one at a time. Times are CPU seconds of this process, which neighbours on
the machine disturb less than they do a clock.
"""

from __future__ import annotations

import csv
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from threading import Event, Thread
from typing import Any

import peft_runs
import torch
from diffusers import UNet2DConditionModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lorainit_diffusers import initialize
from lorainit_diffusers.families.latent_diffusion import UNET_TARGETS
from lorainit_diffusers.methods import METHODS
from lorainit_diffusers.statistics import GradientMean, InputsAndGradient, SecondMoment
from lorainit_diffusers.training.cli import run_script
from lorainit_diffusers.training.options.parser import ScriptParser

BUNDLED_BASE = Path(__file__).resolve().parent.parent / "assets" / "models" / "tiny-sd"
# UNet2DConditionModel's defaults are Stable Diffusion 1.x except for these.
SD15_CONFIG = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
INITS = ("eva", "cntlora", "corda", "lora_ga", "gradient_step")
PARTS = ("overhead", "peft", "variance", "growth")
COLUMNS = (
    "part",
    "init",
    "setting",
    "bare_s",
    "forward_s",
    "statistics_s",
    "solve_s",
    "whole_s",
    "ratio",
    "value",
    "mb",
)
Row = dict[str, Any]


@dataclass
class Bench:
    """A UNet, its batches and its loss.

    Attributes:
        unet: Frozen, in evaluation mode.
        latents: (num_batches, batch_size, channels, side, side).
        timesteps: (num_batches, batch_size).
        embeddings: (num_batches, batch_size, tokens, width).
        rank: Of all adapters.
    """

    unet: UNet2DConditionModel
    latents: Tensor
    timesteps: Tensor
    embeddings: Tensor
    rank: int

    @property
    def num_batches(self) -> int:
        """How many batches there are."""
        return len(self.latents)

    def loss(self, index: int, unet: nn.Module | None = None) -> Tensor:
        """A loss with the shape of the training loss, of one batch."""
        model = self.unet if unet is None else unet
        output = model(self.latents[index], self.timesteps[index], self.embeddings[index], return_dict=False)[0]
        return output.float().square().mean()

    def weights(self) -> list[nn.Parameter]:
        """The weights that adapters would stand beside."""
        return [
            module.weight
            for name, module in self.unet.named_modules()
            if isinstance(module, nn.Linear) and name.endswith(tuple(UNET_TARGETS))
        ]

    def bare(self, *, backward: bool, num_batches: int | None = None) -> float:
        """Seconds of the passes without any of this library's work; with the gradients of the target weights."""
        start = time.process_time()
        for index in range(num_batches or self.num_batches):
            if not backward:
                with torch.no_grad():
                    self.loss(index)
                continue
            weights = self.weights()
            for weight in weights:
                weight.requires_grad_(True)
            torch.autograd.grad(self.loss(index), weights)
            for weight in weights:
                weight.requires_grad_(False)
        return time.process_time() - start

    def remove_adapters(self) -> None:
        """Give the UNet its own layers back."""
        for name, layer in list(self.unet.named_modules()):
            if isinstance(layer, LoraLayer):
                parent, _, child = name.rpartition(".")
                setattr(self.unet.get_submodule(parent), child, layer.get_base_layer())
        if hasattr(self.unet, "peft_config"):
            del self.unet.peft_config
        self.unet._hf_peft_config_loaded = False


def make_bench(model: str, num_batches: int, batch_size: int, side: int, rank: int, seed: int) -> Bench:
    torch.manual_seed(seed)
    if model == "tiny-sd":
        unet = UNet2DConditionModel.from_pretrained(
            BUNDLED_BASE, subfolder="unet", torch_dtype=torch.float32, trust_remote_code=False
        )
    else:
        unet = UNet2DConditionModel(**SD15_CONFIG)
    shape = (num_batches, batch_size)
    # The shape of a scheduled pass: timesteps stratified over the whole range.
    timesteps = (torch.rand(shape) + torch.randperm(num_batches)[:, None]) / num_batches * 1000
    tokens = 16 if model == "tiny-sd" else 77
    return Bench(
        unet.requires_grad_(False).eval(),
        torch.randn(*shape, unet.config.in_channels, side, side),
        timesteps.long(),
        torch.randn(*shape, tokens, unet.config.cross_attention_dim),
        rank,
    )


@contextmanager
def cpu_clock() -> Iterator[None]:
    """Inside, the library's own report counts CPU seconds of this process, as everything else here does."""

    class _Clock:
        perf_counter = staticmethod(time.process_time)

        def __getattr__(self, name: str) -> Any:
            return getattr(time, name)

    modules = [
        module
        for name, module in list(sys.modules.items())
        if name.startswith("lorainit_diffusers") and getattr(module, "time", None) is time
    ]
    try:
        for module in modules:
            module.time = _Clock()  # type: ignore[attr-defined]
        yield
    finally:
        for module in modules:
            module.time = time  # type: ignore[attr-defined]


@contextmanager
def peak_memory() -> Iterator[list[float]]:
    """The most resident memory above what was there before, in MB; empty where the system does not tell."""
    result: list[float] = []
    status = Path("/proc/self/statm")
    if not status.exists():
        yield result
        return

    def resident() -> float:
        return int(status.read_text().split()[1]) * 4096 / 1e6

    done, before, peak = Event(), resident(), [0.0]

    def watch() -> None:
        while not done.wait(0.02):
            peak[0] = max(peak[0], resident())

    thread = Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield result
    finally:
        done.set()
        thread.join()
        result.append(max(peak[0], resident()) - before)


def run_init(
    bench: Bench, name: str, *, num_batches: int | None = None, rank: int | None = None, **options: Any
) -> Row:
    """One initialisation of all target layers; the adapters are removed again."""
    start = time.process_time()
    targets = options.pop("target_modules", list(UNET_TARGETS))
    with cpu_clock(), peak_memory() as memory:
        report = initialize(
            bench.unet,
            name,
            range(num_batches or bench.num_batches),
            bench.loss,
            rank=rank or bench.rank,
            target_modules=targets,
            seed=0,
            progress=False,
            **options,
        )
    whole = time.process_time() - start
    bench.remove_adapters()
    row: Row = {"init": name, "forward_s": report.forward_s, "statistics_s": report.statistics_s}
    return row | {"solve_s": report.solve_s, "whole_s": whole, "mb": memory[0] if memory else None}


def median_row(rows: Sequence[Row]) -> Row:
    """Column by column; texts are the first's."""
    return {
        key: statistics.median(row[key] for row in rows) if isinstance(value, float) else value
        for key, value in rows[0].items()
    }


def overhead(bench: Bench, inits: Sequence[str], repeats: int) -> Iterator[Row]:
    """Bare passes and initialisations in turn; `ratio` is the whole call over the bare passes beside it."""
    for name in inits:
        backward = "gradients" in METHODS[name].observes
        rows: list[Row] = []
        for _ in range(repeats):
            before = bench.bare(backward=backward)
            row = run_init(bench, name)
            bare = (before + bench.bare(backward=backward)) / 2
            rows.append(row | {"bare_s": bare, "ratio": row["whole_s"] / bare})
        yield {"part": "overhead", "setting": f"rank {bench.rank}"} | median_row(rows)


def against_peft(bench: Bench, repeats: int, limit_s: float) -> Iterator[Row]:
    """PEFT's initialisations and ours on the same batches in turn; `ratio` is PEFT's time over ours."""
    for name, run in peft_runs.RUNS.items():
        ours, theirs, note = [], [], ""
        for _ in range(repeats):
            ours.append(run_init(bench, name)["whole_s"])
            start = time.process_time()
            try:
                note = run(bench, limit_s)
            except ImportError as error:  # PEFT's CorDA needs a package that PEFT does not install
                note = f"not measured: {error}"
                break
            finally:
                bench.remove_adapters()
            theirs.append(time.process_time() - start)
        row: Row = {"part": "peft", "init": name, "setting": note, "bare_s": None, "whole_s": statistics.median(ours)}
        if theirs:
            row |= {"value": statistics.median(theirs), "ratio": statistics.median(theirs) / row["whole_s"]}
        yield row


def variance(bench: Bench, limit_s: float) -> Iterator[Row]:
    """EVA's directions, ours and PEFT's: the least share of the best variance in float64 that any layer's hold."""
    moments: dict[str, SecondMoment] = {}
    handles = []
    for name, module in bench.unet.named_modules():
        if isinstance(module, nn.Linear) and name.endswith(tuple(UNET_TARGETS)):
            moments[name] = SecondMoment(module.in_features)

            def hook(_module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                moments[name].update(args[0].reshape(-1, args[0].shape[-1]))

            handles.append(module.register_forward_pre_hook(hook))
    bench.bare(backward=False)
    for handle in handles:
        handle.remove()
    directions = {"ours": _our_directions(bench), "peft": peft_runs.eva_directions(bench, limit_s)}
    for whose, found in directions.items():
        shares: list[float] = []
        for name, moment in moments.items():
            covariance = moment.covariance().double()
            best = torch.linalg.eigvalsh(covariance)[-bench.rank :].sum()
            rows = found.get(name)
            if rows is None or len(rows) == 0:
                shares.append(0.0)
                continue
            basis = torch.linalg.qr(rows.double().mT).Q
            shares.append(float((basis * (covariance @ basis)).sum() / best))
        setting = f"{whose}: least of {len(shares)} layers; mean {statistics.mean(shares):.5f}"
        yield {"part": "variance", "init": "eva", "setting": setting, "value": min(shares)}


def _our_directions(bench: Bench) -> dict[str, Tensor]:
    initialize(
        bench.unet,
        "eva",
        range(bench.num_batches),
        bench.loss,
        rank=bench.rank,
        target_modules=list(UNET_TARGETS),
        seed=0,
        progress=False,
    )
    found = {
        name: layer.lora_A["default"].weight.detach().clone()
        for name, layer in bench.unet.named_modules()
        if isinstance(layer, LoraLayer)
    }
    bench.remove_adapters()
    return found


def growth(bench: Bench, inits: Sequence[str]) -> Iterator[Row]:
    """One thing larger at a time: batches, ranks, layers; and the width of a single layer of random weights."""
    halves = sorted({max(1, bench.num_batches // 4), max(1, bench.num_batches // 2), bench.num_batches})
    for name in inits:
        for count in halves:
            yield {"part": "growth", "setting": f"{count} batches"} | run_init(bench, name, num_batches=count)
        for rank in (4, 16, 64):
            yield {"part": "growth", "setting": f"rank {rank}"} | run_init(bench, name, rank=rank)
        for targets in (["to_q"], ["to_q", "to_k", "to_v"], list(UNET_TARGETS)):
            row = run_init(bench, name, target_modules=targets)
            yield {"part": "growth", "setting": f"layers {' '.join(targets)}"} | row
        for width in (320, 640, 1280, 2048):
            yield {"part": "growth", "setting": f"one layer, width {width}", "init": name} | one_layer(name, width)


def one_layer(name: str, width: int, rank: int = 16) -> Row:
    """Statistics and solve of one square layer with random weights, inputs with a decaying spectrum and a mean."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(width, width, generator=generator) / width**0.5
    rows = torch.randn(2 * width, width, generator=generator) * torch.arange(1, width + 1) ** -0.5 + 0.1
    gradient = GradientMean((width, width))
    gradient.update((torch.randn(width, 64, generator=generator) * torch.arange(1, 65) ** -1.0) @ rows[:64])
    start = time.process_time()
    inputs = SecondMoment(width)
    for part in rows.split(512):
        inputs.update(part)
    middle = time.process_time()
    method = METHODS[name]()
    observed = {"inputs": inputs, "gradients": gradient}.get(method.observes, InputsAndGradient(inputs, gradient))
    method.solve(weight, observed, rank, scaling=1.0, generator=generator).factors(rank)
    return {"statistics_s": middle - start, "solve_s": time.process_time() - middle}


def hardware() -> str:
    """Processor or GPU, threads, versions and the day."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].partition(":")[2].strip() if lines else name
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' * (threads > 1)}, torch {torch.__version__}, {date.today().isoformat()}"


def write(rows: Sequence[Row], title: str, directory: Path) -> None:
    """`benchmark.csv` and `benchmark.md`; after every row, so that a run cut short has written what it has."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "benchmark.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*COLUMNS, "measured_on"])
        writer.writerows([*(row.get(key) for key in COLUMNS), title] for row in rows)
    lines = [title, "", "| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(cell(row.get(key)) for key in COLUMNS) + " |" for row in rows]
    (directory / "benchmark.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def cell(value: object) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def main(argv: list[str] | None = None) -> list[Row]:
    parser = ScriptParser(__doc__)
    parser.add_argument("--model", choices=("tiny-sd", "sd15"), default="sd15")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--init", nargs="+", choices=INITS, default=list(INITS))
    parser.add_argument("--num_batches", type=int, default=4)
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--side", type=int, default=None, help="of the latents; default 32, for tiny-sd 8")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3, help="of which the median counts")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peft_seconds", type=float, default=300.0, help="after which PEFT's EVA is stopped")
    parser.add_argument("--output_dir", default="benchmark")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    side = args.side or (8 if args.model == "tiny-sd" else 32)
    bench = make_bench(args.model, args.num_batches, args.batch_size, side, args.rank, args.seed)
    bench.bare(backward=False, num_batches=1)  # warm up
    title = f"{args.model}, {args.num_batches} x {args.batch_size} at {side}x{side}, rank {args.rank}; {hardware()}"
    print(title)
    measured: dict[str, Callable[[], Iterator[Row]]] = {
        "overhead": lambda: overhead(bench, args.init, args.repeats),
        "peft": lambda: against_peft(bench, args.repeats, args.peft_seconds),
        "variance": lambda: variance(bench, args.peft_seconds),
        "growth": lambda: growth(bench, args.init),
    }
    rows: list[Row] = []
    for part in args.parts:
        for row in measured[part]():
            rows.append(row)
            print("| " + " | ".join(cell(row.get(key)) for key in COLUMNS) + " |", flush=True)
            write(rows, title, Path(args.output_dir))
    return rows


if __name__ == "__main__":
    run_script(main)
