"""The report of a text-to-image run that a person reads: `report.html`, one file with its pictures in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorainit_diffusers.evaluation.document import (
    Block,
    Bullets,
    Cell,
    Code,
    Heading,
    Picture,
    Table,
    Text,
    to_html,
)
from lorainit_diffusers.evaluation.plots import plot_ranks
from lorainit_diffusers.files import write_text
from lorainit_diffusers.report import STEP_ZERO, RankAllocation, RankedComponent, ranks_in_words
from lorainit_diffusers.training.best import best_line

REPORT_NAME = "report.html"
RANKS_NAME = "ranks.png"
# From here on the table of the layers has those with the highest and the lowest ranks only.
_MAX_LAYERS = 80
_METRIC = "validation_loss"


@dataclass(frozen=True)
class RunFacts:
    """What a run was and where its files are.

    Attributes:
        init: Name of the initialisation.
        base: Folder or name of the base model.
        data: What was trained on, in words.
        lines: Of `metrics.jsonl`.
        init_report: Of the initialisation, as `InitReport.to_json` has it.
        settings: How it was trained, by name.
        seconds: What the parts of the run took, by name.
        memory: The most that was taken, in words; empty where it is not known.
        usage: Python that loads the LoRA and draws with it.
        files: What lies beside the report and is for the reader, name -> what it is.
        command: That started the run; empty where it is not known.
        resumed_at: Step that a resumed run went on from; 0 for a run in one piece.
        best_dir: Folder with the LoRA of the best step, inside the run's; `None` where none was kept.
        checkpoints: Names of the checkpoints that are kept, in order.
        averaged: Whether validation, pictures and file are of a moving average of the weights.
    """

    init: str
    base: str
    data: str
    lines: Sequence[Mapping[str, Any]]
    init_report: Mapping[str, Any]
    settings: Mapping[str, str]
    seconds: Mapping[str, float]
    memory: str
    usage: str
    files: Mapping[str, str]
    command: str = ""
    resumed_at: int = 0
    best_dir: str | None = None
    checkpoints: Sequence[str] = ()
    averaged: bool = False


def best_step(lines: Sequence[Mapping[str, Any]]) -> int | None:
    """The step with the lowest validation loss; `None` without validation data."""
    line = best_line(lines, _METRIC, larger_is_better=False)
    return None if line is None else int(line["step"])


def rank_allocation(init_report: Mapping[str, Any]) -> RankAllocation | None:
    """What decided the ranks, of a report as it was written; `None` for equal ranks and for reports of old runs."""
    found = init_report.get("allocation")
    if found is None:
        return None

    def edge(key: str) -> RankedComponent | None:
        return None if found[key] is None else RankedComponent(**found[key])

    settled = {key: found[key] for key in ("budget", "per_parameter", "min_rank", "max_rank")}
    return RankAllocation(**settled, last_kept=edge("last_kept"), first_refused=edge("first_refused"))


def write_ranks(directory: Path, init_report: Mapping[str, Any]) -> Path | None:
    """Draw `ranks.png` where the layers' ranks were chosen by their scores; `None` where they were not."""
    allocation = rank_allocation(init_report)
    if allocation is None:
        return None
    ranks = {name: int(layer["rank"]) for name, layer in init_report["layers"].items()}
    nominal = None if allocation.per_parameter else allocation.budget / max(1, len(ranks))
    title = f"{init_report['method']}: ranks {ranks_in_words(list(ranks.values()))}"
    return plot_ranks(ranks, directory / RANKS_NAME, title, nominal)


def write_run_report(directory: Path, facts: RunFacts) -> Path:
    """Write `report.html` from what lies in the run's directory (`loss.png`, `samples.png`, `ranks.png`) and `facts`.

    Returns:
        Its path.
    """
    title = f"{facts.init} LoRA on {facts.base}"
    path = directory / REPORT_NAME
    write_text(path, to_html(title, report_blocks(directory, facts)))
    return path


def report_blocks(directory: Path, facts: RunFacts) -> list[Block]:
    """Everything that the report says."""
    blocks: list[Block] = [Text(headline(facts), lead=True), *map(Text, _advice(facts))]
    if (directory / "loss.png").is_file():
        blocks += [Heading("Loss over the steps"), Picture(directory / "loss.png", "training and validation loss")]
    blocks += _validation_blocks(facts)
    if (directory / "samples.png").is_file():
        blocks += [
            Heading("Samples"),
            Picture(directory / "samples.png", "samples of the base model, of step 0 and of later steps"),
            Text("A row is the base model or a step, a column a prompt, with the same seed in every row."),
        ]
    blocks += [Heading("Ranks"), *_rank_blocks(directory, facts.init_report)]
    blocks += [Heading("Cost"), *_cost_blocks(facts)]
    blocks += [Heading("Use it"), *_usage_blocks(facts)]
    rows = [[Cell(name), Cell(text)] for name, text in facts.settings.items()]
    blocks += [Heading("How it was made"), Table(["setting", "value"], rows)]
    if facts.command:
        blocks.append(Code(facts.command))
    blocks.append(
        Text("Every option is in config.json, every step in metrics.jsonl, every layer's scores in init_report.json.")
    )
    return blocks


def headline(facts: RunFacts) -> str:
    """What was trained on what, and how far the validation loss went."""
    layers = facts.init_report["layers"]
    ranks = ranks_in_words([int(layer["rank"]) for layer in layers.values()])
    last = max((int(line["step"]) for line in facts.lines), default=0)
    plural = "ranks" if " to " in ranks else "rank"
    start = f"A LoRA of {plural} {ranks} in {len(layers)} layers, started by {facts.init}, trained for {last} steps on "
    start += f"{facts.data}."
    values = _validation(facts)
    best = best_line(facts.lines, _METRIC, larger_is_better=False)
    if best is None:
        return start
    (first_step, first), (last_step, end) = values[0], values[-1]
    before = "after the initial change" if facts.init_report["step_zero"] == "moved" else "before training"
    parts = [f"{first:.4f} {before if first_step == 0 else f'at step {first_step}'}"]
    if best["step"] not in (first_step, last_step):
        parts.append(f"{best[_METRIC]:.4f} at its best (step {best['step']})")
    if last_step != first_step:
        parts.append(f"{end:.4f} at the end (step {last_step})")
    lowest = ", its lowest" if best["step"] == last_step != first_step else ""
    return f"{start} Loss on held-out images: {', then '.join(parts)}{lowest}."


def _validation(facts: RunFacts) -> list[tuple[int, float]]:
    return [(int(line["step"]), float(line[_METRIC])) for line in facts.lines if _METRIC in line]


def _advice(facts: RunFacts) -> list[str]:
    """What follows from the curve, for someone who has to choose a file."""
    values = _validation(facts)
    best = best_step(facts.lines)
    if best is None:
        return [
            "There are no held-out images, so nothing says which step is the best one: look at the samples. "
            "--validation_fraction 0.1 sets a tenth of the images aside."
        ]
    sentences: list[str] = []
    if best == 0:
        sentences.append(
            "No step is better than step 0: nothing was learnt that helps on held-out images. A lower learning rate, "
            "more images or fewer steps may."
        )
    elif best != values[-1][0]:
        kept = f"The LoRA of step {best} is in {facts.best_dir}/." if facts.best_dir else ""
        sentences.append(f"The loss on held-out images rose again after step {best}. {kept}")
    if facts.averaged:
        sentences.append("Validation, samples and the saved file are of the moving average of the weights.")
    return [sentence.strip() for sentence in sentences]


def _validation_blocks(facts: RunFacts) -> list[Block]:
    values = _validation(facts)
    if not values:
        return []
    best = best_step(facts.lines)
    rows = [
        [Cell(str(step)), Cell(f"{value:.4f}", "better" if step == best else ""), Cell("best" if step == best else "")]
        for step, value in values
    ]
    return [Table(["step", "validation loss", ""], rows)]


def _rank_blocks(directory: Path, init_report: Mapping[str, Any]) -> list[Block]:
    layers: Mapping[str, Mapping[str, Any]] = init_report["layers"]
    allocation = rank_allocation(init_report)
    ranks = [int(layer["rank"]) for layer in layers.values()]
    blocks: list[Block] = []
    if allocation is None:
        equal = len(set(ranks)) < 2
        blocks.append(Text(f"{'Every layer has rank' if equal else 'The layers have ranks'} {ranks_in_words(ranks)}."))
    else:
        budget = f"{allocation.budget:,}{' parameters' if allocation.per_parameter else ''}"
        sentence = allocation.sentence()
        blocks.append(
            Text(
                f"Ranks {ranks_in_words(ranks)}, given by score: {budget} together, at least {allocation.min_rank} "
                f"and at most {allocation.max_rank} in a layer. {sentence[:1].upper()}{sentence[1:]}."
            )
        )
        if (directory / RANKS_NAME).is_file():
            blocks.append(Picture(directory / RANKS_NAME, "rank of every layer, a row for each block"))
    start = STEP_ZERO[init_report["step_zero"]]
    blocks.append(Text(f"{start[:1].upper()}{start[1:]}."))
    scored = any(layer["scores"] is not None for layer in layers.values())
    if allocation is None and not scored:
        return blocks
    header = ["layer", "rank", *(["score of its last component", "score of the next one", "captured"] * scored)]
    blocks.append(Table(header, _layer_rows(layers, scored), folded="Layer by layer"))
    if len(layers) > _MAX_LAYERS:
        shown = f"These are the layers with the highest and the lowest ranks of {len(layers)}"
        blocks.append(Text(f"{shown}; init_report.json has all."))
    if scored:
        blocks.append(
            Text(
                "A score is the share of its layer's total that a component has (of the variance of the inputs, say, "
                "or of the gradient); captured is what the kept ones add up to."
            )
        )
    return blocks


def _layer_rows(layers: Mapping[str, Mapping[str, Any]], scored: bool) -> list[list[Cell]]:
    names = list(layers)
    if len(names) > _MAX_LAYERS:
        names.sort(key=lambda name: -int(layers[name]["rank"]))
        names = [*names[: _MAX_LAYERS // 2], *names[-(_MAX_LAYERS // 2) :]]
    rows: list[list[Cell]] = []
    for name in names:
        layer, rank = layers[name], int(layers[name]["rank"])
        scores: Sequence[float] = layer["scores"] or ()
        cells = [Cell(name), Cell(str(rank), detail=layer["fallback"] or "")]
        if scored:
            last = f"{scores[rank - 1]:.3g}" if 0 < rank <= len(scores) else "–"
            following = f"{scores[rank]:.3g}" if rank < len(scores) else "–"
            captured = "–" if layer["captured"] is None else f"{layer['captured']:.2f}"
            cells += [Cell(last), Cell(following), Cell(captured)]
        rows.append(cells)
    return rows


def _cost_blocks(facts: RunFacts) -> list[Block]:
    rows = [[Cell(name), Cell(f"{seconds:.1f} s")] for name, seconds in facts.seconds.items()]
    rows += [[Cell("most memory"), Cell(facts.memory)]] * bool(facts.memory)
    blocks: list[Block] = [Table(["part", "cost"], rows)]
    if facts.resumed_at:
        blocks.append(
            Text(
                f"The run was resumed at step {facts.resumed_at}: training and initialisation are of the whole run, "
                "validation, samples and the total of its last part."
            )
        )
    return blocks


def _usage_blocks(facts: RunFacts) -> list[Block]:
    blocks: list[Block] = [Code(facts.usage, "python")]
    files = [f"{name}: {what}" for name, what in facts.files.items()]
    if facts.best_dir is not None:
        files.append(f"{facts.best_dir}/: the LoRA of step {best_step(facts.lines)}, the best one, for diffusers")
    if files:
        blocks.append(Bullets(files))
    if facts.command and facts.checkpoints:
        blocks += [
            Text(f"To go on from {facts.checkpoints[-1]} (with a larger --max_train_steps, beyond the end):"),
            Code(f"{facts.command} --resume_from_checkpoint latest"),
        ]
    return blocks
