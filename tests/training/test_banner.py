"""What a run begins with: right numbers, one line each, and every token that a caption loses."""

from __future__ import annotations

from lorainit_diffusers.families.text_to_image import TokenCounts
from lorainit_diffusers.training import banner
from lorainit_diffusers.training.data.notes import DataNotes


def test_labels_stand_in_a_column_and_are_not_repeated() -> None:
    lines = [
        ("images", "4 training\nof two lines"),
        ("left out", "a"),
        ("left out", "b"),
        ("warning", "c"),
        ("warning", "d"),
    ]
    assert banner.format_banner(lines).split("\n") == [
        "images    4 training of two lines",
        "left out  a",
        "          b",
        "warning   c",
        "warning   d",
    ]


def test_counts_and_captions() -> None:
    assert banner.count_line({"training": 1200, "held out": 0}, "from x") == ("images", "1,200 training; from x")
    assert banner.caption_line(["a", "b", "a"])[1] == "3, 2 different, such as 'a'"
    assert banner.caption_line(["a", "a"])[1] == "2, all the same, such as 'a'"
    assert banner.caption_line(["a" * 99, "b"])[1] == f"2, all different, such as '{'a' * 77}...'"


def test_classes_are_listed_or_summed_up() -> None:
    few = banner.class_lines({"training": ["cat", "dog", "cat"], "validation": ["dog"]}, ("cat", "dog"))
    assert [text for _, text in few] == ["2 in training: cat 2, dog 1", "2 in validation: cat 0, dog 1"]
    names = [f"c{index}" for index in range(9)]
    ((_, many),) = banner.class_lines({"training": [*names, *names, "c3"]}, names)
    assert many == "9 in training: 2 (c0) to 3 (c3) images each"
    ((_, equal),) = banner.class_lines({"training": names}, names)
    assert equal == "9 in training: 1 images each"


def test_sizes_say_how_many_images_are_enlarged() -> None:
    sizes = [(64, 64), (30, 100), (64, 63), (200, 100)]
    lines = banner.size_lines(sizes, [(64, 64)] * 4)
    assert lines == [
        ("image sizes", "100 x 30 to 100 x 200 (width x height)"),
        ("resolution", "64 x 64; 2 of 4 images are smaller and get enlarged"),
    ]
    assert banner.size_lines([(8, 9)]) == [("image sizes", "9 x 8 (width x height)")]
    assert banner.size_lines(sizes[:2], [(64, 64), (32, 96)])[1][1].startswith("2 sizes by their aspect; 1 of 2")


def test_tokens_that_are_cut_are_counted_for_each_encoder() -> None:
    lengths = {"text_encoder": TokenCounts([5, 80, 77, 90], 77), "text_encoder_2": TokenCounts([5, 80, 77, 90], 512)}
    ((label, text),) = banner.cut_lines(["a.png", "b.png", "c.png", "d.png"], lengths)
    assert label == "left out"
    assert text == (
        "tokens beyond the 77 that text_encoder takes: 16 of 2 captions, which are cut (first b.png, 80 tokens; "
        "longest 90)"
    )
    assert banner.cut_lines(["a.png"], {"text_encoder": TokenCounts([77], 77)}) == []


def test_steps_and_epochs() -> None:
    assert banner.schedule_line(banner.Schedule(200, 8, 1, 1, 40)) == ("training", "200 steps of 8: 40 epochs")
    text = banner.schedule_line(banner.Schedule(100, 4, 2, 3, 1000, first_step=20))[1]
    assert text == "100 steps of 24 (4 a batch x 2 accumulated x 3 processes): 2.4 epochs, from step 20 on"


def test_what_is_trained_from_what() -> None:
    facts = banner.RunFacts("base", "eva", {"scale": "paper", "rho": 2.0}, "0.001", "rank 8", "out", "4 batches of 2")
    assert banner.run_lines(facts) == [
        ("learning rate", "0.001"),
        ("adapter", "rank 8"),
        ("base", "base"),
        ("init", "eva (scale paper, rho 2), from 4 batches of 2"),
        ("output", "out"),
    ]


def test_notes_are_counted_once_and_printable() -> None:
    notes = DataNotes()
    notes.leave_out("files that are no images", [])
    assert notes.lines() == []
    notes.leave_out("files that are no images", ["a", "b", "a"])
    notes.leave_out("files that are no images", ["b", *"cdef", "\udcff"])
    notes.warn("odd")
    notes.warn("odd")
    assert notes.lines() == [("left out", "files that are no images: 7 (a, b, c, d, e and 2 more)"), ("warning", "odd")]
    assert notes.left_out["files that are no images"][-1] == "?"
