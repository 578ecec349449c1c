from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from comparison_fixtures import Cell, write_comparison, write_init_report, write_samples
from PIL import Image

from lorainit_diffusers.comparison import Comparison, write_report
from lorainit_diffusers.comparison.sentences import headline

FILES = ["summary.md", "curves.png", "lr_sweep.png", "ranks.png", "grid.png", "report.html"]
VOID = {"meta", "img", "br", "wbr"}
EVIL = "a <script>alert('x')</script> & \"cat\""
Curves = dict[Cell, dict[int, float | str]]


class Page(HTMLParser):
    """Checks that every tag is closed in its turn, and keeps tags with their attributes and the text."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def curves_of(ends: dict[str, float], seeds: int = 3, rates: tuple[float, ...] = (0.001, 0.002)) -> Curves:
    """A straight fall from 1.0 to the end, which is lowest at the first learning rate."""
    return {
        (init, rate, seed): {
            step: 1.0 + (end + 0.05 * index + 0.001 * seed - 1.0) * min(1.0, step / 40) for step in (0, 20, 40, 80)
        }
        for init, end in ends.items()
        for index, rate in enumerate(rates)
        for seed in range(seeds)
    }


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A directory with everything, and hostile texts."""
    curves = curves_of({"gaussian": 0.5, "orthonormal": 0.5, "cntlora:gauge=balanced": 0.4})
    metrics = {
        (init, rate, seed): {
            step: {"paired_similarity@tiny-clip": 0.4 + 0.001 * step, "kid@tiny-clip": -0.01} for step in (0, 40, 80)
        }
        for init, rate, seed in curves
        if rate == 0.001
    }
    directory = tmp_path_factory.mktemp("comparison")
    write_comparison(directory, curves, metrics=metrics, init_s={"cntlora:gauge=balanced": 2.0}, command=f"run {EVIL}")
    for cell in curves:
        ranks = {f"unet.mid_block.attn{i}.to_q": 8 if cell[0] == "gaussian" else 4 + 8 * i for i in range(2)}
        write_init_report(directory, cell, ranks, None if cell[0] == "gaussian" else 0.5)
        if cell[1] == 0.001:
            write_samples(directory, cell, (0, 40, 80), [EVIL, "a dog"])
    return directory, write_report(directory)


def test_writes_the_six_files(complete: tuple[Path, list[Path]]) -> None:
    directory, paths = complete
    assert [path.name for path in paths] == FILES
    assert all(path.parent == directory and path.stat().st_size > 500 for path in paths)
    for name in FILES[1:5]:
        with Image.open(directory / name) as image:
            assert len(image.convert("RGB").getcolors(1 << 22) or []) > 20


def test_html_is_well_formed_and_loads_nothing(complete: tuple[Path, list[Path]]) -> None:
    html = (complete[0] / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    images = page.all("img")
    assert len(images) == 4
    assert all(image["alt"] for image in images)
    for tag, attributes in page.tags:
        assert tag not in {"script", "link", "iframe", "object"}
        assert not [name for name in attributes if name.startswith("on") or name in ("href", "srcset")], (
            tag,
            attributes,
        )
        if "src" in attributes:
            assert re.match(r"data:image/(png|jpeg);base64,", str(attributes["src"]))
    assert "url(" not in html
    assert "@import" not in html
    content = base64.b64decode(str(images[0]["src"]).partition(",")[2])
    assert Image.open(io.BytesIO(content)).width > 600
    # what a phone and a dark screen need
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")
    assert "prefers-color-scheme: dark" in html
    assert page.tags[0] == ("html", {"lang": "en"})


def test_tables_are_rectangular_and_lie_in_boxes(complete: tuple[Path, list[Path]]) -> None:
    html = (complete[0] / "report.html").read_text(encoding="utf-8")
    tables = re.findall(r"<table>.*?</table>", html, re.DOTALL)
    assert len(tables) == html.count('<div class="box" tabindex="0"><table>') >= 8
    for table in tables:
        widths = {len(re.findall(r"<t[hd][ >]", row)) for row in re.findall(r"<tr>.*?</tr>", table, re.DOTALL)}
        assert len(widths) == 1


def test_texts_are_escaped(complete: tuple[Path, list[Path]]) -> None:
    html = (complete[0] / "report.html").read_text(encoding="utf-8")
    assert "<script" not in html
    assert f"run {EVIL}" in "".join(Page(html).text)
    assert "a|b" not in (complete[0] / "summary.md").read_text(encoding="utf-8")


def test_the_numbers_of_the_report_are_those_of_the_analysis(complete: tuple[Path, list[Path]]) -> None:
    text = (complete[0] / "summary.md").read_text(encoding="utf-8")
    row = next(line for line in text.splitlines() if line.startswith("| cntlora:gauge=balanced | 0.001 | 3 |"))
    cells = [cell.strip().replace("\\", "") for cell in row.strip("|").split("|")]
    difference = "−0.1000 better [−0.1000, −0.1000]"
    # 0.5 on a line from 1.0 to 0.4 over 40 steps is at 33.3; 98 % of gaussian's way 32.7 of its own 39.2
    assert cells[3:] == [
        *("0.4010 ± 0.0010", "0.4010", difference, difference, "33"),
        *("0.83 faster [0.83, 0.83]", "5.3", "0.4260"),
    ]
    page = "".join(Page((complete[0] / "report.html").read_text(encoding="utf-8")).text)
    for cell in (cells[3], "−0.1000 better", "[−0.1000, −0.1000]"):
        assert cell in page


def test_markdown_has_the_same_tables_and_links_the_figures(complete: tuple[Path, list[Path]]) -> None:
    directory, _ = complete
    text = (directory / "summary.md").read_text(encoding="utf-8")
    html = (directory / "report.html").read_text(encoding="utf-8")
    assert text.count("\n| --- |") == html.count("<table>")
    assert re.findall(r"\]\((\S+\.png)\)", text) == ["curves.png", "lr_sweep.png", "grid.png", "ranks.png"]
    for line in text.splitlines():
        if line.startswith("|"):
            assert line.endswith("|")


def test_the_report_says_what_it_rests_on(complete: tuple[Path, list[Path]]) -> None:
    text = (complete[0] / "summary.md").read_text(encoding="utf-8").replace("\\", "")
    for sentence in (
        "**cntlora:gauge=balanced ends better than gaussian, each at its best learning rate (3 seeds); 1 is tied.",
        "The best learning rate of each initialisation lies at the edge of those tried",
        "chance alone gives a verdict other than tied in about 25 % of comparisons",
        "needs 0.83 [0.83, 0.83] of gaussian's own steps",
        "its scores are not comparable to those in the literature",
        "to gaussian's final paired similarity (tiny-clip)",
        "before training (step 0 of gaussian) | 0.4000 | −0.0100",
        "2 cores",
        "torch 2.6.0",
        "2026-11-24",
    ):
        assert sentence in text


def test_the_same_results_give_the_same_files(complete: tuple[Path, list[Path]]) -> None:
    directory, paths = complete
    before = [path.read_bytes() for path in paths]
    assert [path.read_bytes() for path in write_report(directory)] == before


def test_what_is_missing_is_left_out_with_a_sentence(tmp_path: Path) -> None:
    curves = curves_of({"gaussian": 0.5, "cntlora": 0.4})
    write_comparison(tmp_path, curves, timings=False)
    (tmp_path / "grid.png").write_bytes(b"of an earlier report")
    assert [path.name for path in write_report(tmp_path)] == ["summary.md", "curves.png", "lr_sweep.png", "report.html"]
    assert not (tmp_path / "grid.png").exists()
    text = (tmp_path / "summary.md").read_text(encoding="utf-8").replace("\\", "")
    for sentence in ("No run has samples.", "No run has an init_report.json", "No image metrics were measured."):
        assert sentence in text
    assert "seconds to it |" in text
    Page((tmp_path / "report.html").read_text(encoding="utf-8"))


def test_a_task_without_pictures(tmp_path: Path) -> None:
    ends = {"gaussian": 0.5, "cntlora": 0.6}
    curves: Curves = {
        (init, rate, seed): {0: 0.25, 20: 0.3, 40: end - 0.05 * index, 80: end - 0.05 * index + 0.01 * seed}
        for init, end in ends.items()
        for index, rate in enumerate((0.001, 0.002))
        for seed in range(3)
    }
    curves["gaussian", 0.001, 2][80] = "-inf"
    metrics = {cell: {step: {"validation_loss": 1.0 - 0.005 * step} for step in (0, 40, 80)} for cell in curves}
    write_comparison(
        tmp_path,
        curves,
        metrics=metrics,
        primary="exact_match",
        dataset="assets/data/signs/train.jsonl",
        family="vlm",
        generates_images=False,
        examples="questions",
        num_train=64,
        num_validation=20,
    )
    assert [path.name for path in write_report(tmp_path)] == ["summary.md", "curves.png", "lr_sweep.png", "report.html"]
    text = (tmp_path / "summary.md").read_text(encoding="utf-8").replace("\\", "")
    for sentence in (
        "# LoRA initialisations on signs",
        "Exact match, higher is better, at step 80",
        "Positive differences are better.",
        "| initialisation | exact match ↑ | validation loss ↓ |",
        "| before training (step 0 of gaussian) | 0.2500 | 1.0000 |",
        "| cntlora | 0.6100 [0.6000, 0.6200] | 0.6000 [0.6000, 0.6000] |",
        "| difference to gaussian | exact match ↑ | validation loss ↓ |",
        "same 64 questions and is scored on 20 held-out ones",
        "one of them is 0.0500",
        "(64 questions, 20 held out)",
        "1 of 12 runs diverged",
    ):
        assert sentence in text, sentence
    for word in ("image", "sample", "prompt", "encoder", "nan"):
        assert word not in text.lower().replace("resamples", ""), word
    Page((tmp_path / "report.html").read_text(encoding="utf-8"))


def test_equal_accuracies_are_drawn(tmp_path: Path) -> None:
    curves: Curves = {("gaussian", 0.001, seed): {0: 0.1, 10: 0.1, 20: 0.1} for seed in range(3)}  # their mean is above
    write_comparison(
        tmp_path,
        curves,
        primary="accuracy",
        **{"generates_images": False, "examples": "images", "num_train": 8, "num_validation": 10},
    )
    assert (tmp_path / "lr_sweep.png") in write_report(tmp_path)


def test_a_partial_grid_with_diverged_runs(tmp_path: Path) -> None:
    curves = curves_of({"gaussian": 0.5, "cntlora": 0.4, "lora_ga": 0.45})
    del curves["cntlora", 0.002, 2]
    for seed in range(3):
        curves["lora_ga", 0.002, seed] = {0: 1.0, 20: "", 40: "", 80: ""}
    curves["lora_ga", 0.001, 1] = {0: 1.0, 20: "nan", 40: "nan", 80: "nan"}
    rates = {init: [0.001, 0.002] for init in ("gaussian", "cntlora", "lora_ga", "eva")}
    directory = write_comparison(tmp_path, curves, learning_rates=rates, max_train_steps=100)
    write_samples(directory, ("cntlora", 0.001, 0), (0, 80), ["a cat"])
    write_report(directory)
    text = (directory / "summary.md").read_text(encoding="utf-8").replace("\\", "")
    assert "7 of 24 runs are missing (of cntlora and eva)" in text
    assert "Runs end at step 80 of 100." in text
    assert "4 of 17 runs diverged, and count as worst: lora_ga-lr" in text
    assert "| lora_ga | 0.001 | 3 | diverged |" in text
    assert "+∞ worse" in text
    assert "some never, tied [0.91, never]" in text
    assert "nan" not in text
    Page((directory / "report.html").read_text(encoding="utf-8"))


def headline_of(directory: Path, curves: Curves) -> str:
    comparison = Comparison.load(write_comparison(directory, curves))
    return " ".join(headline(comparison, comparison.summary()))


def test_headline_without_a_winner(tmp_path: Path) -> None:
    curves = curves_of({"gaussian": 0.5, "eva": 0.5, "lora_ga": 0.6})
    curves["eva", 0.001, 0] = {0: 1.0, 20: 0.8, 40: 0.7, 80: 0.49}
    curves["eva", 0.001, 1] = {0: 1.0, 20: 0.8, 40: 0.7, 80: 0.51}
    text = headline_of(tmp_path, curves)
    assert (
        "No initialisation is better than gaussian at its best learning rate (3 seeds); 1 ends worse, 1 is tied."
        in text
    )
    assert "None is faster to 98 % of the improvement that gaussian ends with." in text


def test_headline_of_one_seed_claims_nothing(tmp_path: Path) -> None:
    text = headline_of(tmp_path, curves_of({"gaussian": 0.5, "eva": 0.4}, seeds=1))
    assert "One seed gives no interval, so nothing is said of final scores against gaussian." in text
    for claim in ("ends better", "faster", "In the mean", "own steps"):
        assert claim not in text


def test_headline_without_a_baseline(tmp_path: Path) -> None:
    curves = curves_of({"eva": 0.4})
    assert headline_of(tmp_path, curves).startswith("No baseline has finished a run, so nothing can be compared yet.")
    assert len(write_report(tmp_path)) == 4


def test_prompts_and_base_are_found_with_a_runs_samples_too(tmp_path: Path) -> None:
    cell = ("gaussian", 0.001, 0)
    write_comparison(tmp_path, curves_of({"gaussian": 0.5}, seeds=1, rates=(0.001,)))
    write_samples(tmp_path, cell, (0, 80), ["a cat"])
    (tmp_path / "samples").mkdir()
    (tmp_path / "base.png").rename(tmp_path / "samples" / "base.png")
    (tmp_path / "prompts.json").unlink()
    (tmp_path / "samples" / "prompts.json").write_text(json.dumps(["a cat"]), encoding="utf-8")
    write_report(tmp_path)
    with Image.open(tmp_path / "grid.png") as grid:
        # rows of the base and of one initialisation, 128 pixels each: the first is plain green
        assert grid.getpixel((grid.width - 64, grid.height - 134 - 64)) == (0, 255, 0)
        assert grid.getpixel((grid.width - 64, grid.height - 64)) == (200, 0, 80)


def test_results_without_a_finished_run_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        write_report(tmp_path)
