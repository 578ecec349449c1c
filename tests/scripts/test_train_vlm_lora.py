from __future__ import annotations

import io
import itertools
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import train_vlm_lora
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from script_fixtures import losses, read_json, run_main
from torch import Tensor
from transformers import AutoModelForImageTextToText
from vlm_fixtures import ask, edit_json, make_image, write_base, write_lines, write_questions

from lorainit_diffusers.families.vlm import VisionLanguageFamily
from lorainit_diffusers.training.data.images import load_image
from lorainit_diffusers.training.questions.conversations import QuestionRecord, read_questions
from lorainit_diffusers.training.questions.data import read_question_data
from lorainit_diffusers.training.questions.encoded import NEW_TOKENS, EncodedQuestions, settle_answer_length
from lorainit_diffusers.training.questions.options import QuestionTaskOptions, resolve_questions
from lorainit_diffusers.training.questions.task import QuestionAnsweringTask

Run = Callable[..., Path]
LINE = {"image": "images/0.png", "question": "What is this?", "answer": "red apple"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "llava", "llava")


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_questions(tmp_path_factory.mktemp("data") / "questions")


@pytest.fixture
def run(base: Path, questions: Path, tmp_path: Path) -> Run:
    def run(**options: Any) -> Path:
        fast = {
            **{"pretrained_model_name_or_path": base, "train_data_file": questions / "train.jsonl", "rank": 2},
            **{"max_train_steps": 2, "train_batch_size": 3, "init_num_batches": 2, "max_new_tokens": 4},
            **{"output_dir": tmp_path / "out", "seed": 0},
        }
        return run_main(train_vlm_lora, {**fast, **options})

    return run


def arguments(base: Path | str = "base", **options: Any) -> QuestionTaskOptions:
    """The options that a task reads."""
    texts = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    return QuestionTaskOptions(pretrained_model_name_or_path=str(base), train_batch_size=2, **texts)


def make_task(base: Path, questions: Path, **options: Any) -> QuestionAnsweringTask:
    args = arguments(base, train_data_file=questions / "train.jsonl", **options)
    return QuestionAnsweringTask(args, torch.device("cpu"), torch.float32)


def adapter(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "adapter_model.safetensors")


def texts(record: QuestionRecord) -> list[str]:
    """Each message as its role and its parts."""
    return [
        f"{message['role']}: " + "".join(part.get("text", "<image>") for part in message["content"])
        for message in record.messages
    ]


# ----------------------------------------------------------------------------------------------------------- whole runs


def test_a_run_writes_what_a_reader_and_stock_peft_need(
    run: Run, base: Path, questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run(max_train_steps=4, validation_steps=2, learning_rate=1e-2, export_merged=True, num_samples=3)
    printed = capsys.readouterr().out
    for stage in ("base", "step-0", "end"):
        assert f"\n{stage}" in f"\n{printed}"
    assert "exact match: base " in printed
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines if "validation_loss" in line] == [0, 2, 4]
    stages = {line["stage"]: line for line in lines if "stage" in line}
    assert {"exact_match", "token_f1", "exact_match/name", "exact_match/yes/no"} < stages["base"].keys()
    assert stages["base"]["exact_match"] == stages["step-0"]["exact_match"]
    for stage in ("base", "step-0", "end"):
        text = (out / f"predictions_{stage}.jsonl").read_text(encoding="utf-8")
        rows = [json.loads(line) for line in text.split("\n") if line]
        assert [row["answers"] for row in rows] == [["red apple"], ["no"], ["green pear"], ["no"], ["fruit"], ["no"]]
        assert all(row["where"].endswith(f"line {number}") for number, row in enumerate(rows, start=1))
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 4  # the curves and three samples
    assert "src=" in page
    assert "http" not in page
    for text in ("yes/no", "What is this?", "red apple", "step-0: exact match (F1)"):
        assert text in page, text
    assert "image-text-to-text" in (out / "README.md").read_text(encoding="utf-8")
    assert read_json(out / "config.json")["num_validation_samples"] == 6

    family = VisionLanguageFamily.from_pretrained(base)
    batch = family.collate([family.encode(ask("What is this?", "red apple"), [make_image(0)])])
    inputs = {name: values for name, values in batch.items() if name != "labels"}
    with torch.no_grad():
        original = family.model(**inputs).logits
        merged = AutoModelForImageTextToText.from_pretrained(out / "merged").eval()(**inputs).logits
        stock = PeftModel.from_pretrained(family.model, out).eval()(**inputs).logits
    torch.testing.assert_close(merged, stock, rtol=1e-4, atol=1e-3)
    assert float((stock - original).abs().max()) > 1e-2
    again = VisionLanguageFamily.from_pretrained(out / "merged")
    ids, expected = (each.encode(ask("A?", "no"), [make_image(0)])["input_ids"] for each in (again, family))
    assert torch.equal(ids, expected)


def test_resumed_run_equals_an_uninterrupted_one(run: Run, tmp_path: Path) -> None:
    options = {"max_train_steps": 4, "validation_steps": 2, "learning_rate": 1e-2, "lora_dropout": 0.1}
    whole = adapter(run(output_dir=tmp_path / "whole", **options))
    run(**{**options, "max_train_steps": 2}, checkpointing_steps=2)
    out = run(**options, checkpointing_steps=2, resume_from_checkpoint="latest")
    for name, values in adapter(out).items():
        torch.testing.assert_close(values, whole[name], rtol=1e-5, atol=1e-6)
    assert losses(out, "validation_loss") == pytest.approx(losses(tmp_path / "whole", "validation_loss"))
    assert "step-0: exact match (F1)" in (out / "report.html").read_text(encoding="utf-8")


def test_plan_and_initialisation_alone(run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert not run(dry_run=True).exists()
    assert "model.model.language_model.layers.0.self_attn.q_proj" in capsys.readouterr().out
    out = run(init_only=True, init="eva", adapt=["vision", "projector"], variable_rank=True)
    names = {name.split(".layers.")[0] for name in adapter(out)}
    assert not any("language_model" in name for name in names)
    assert not (out / "metrics.jsonl").exists() or losses(out) == []
    chosen = adapter(run(init_only=True, lora_layers="lm_head", output_dir=tmp_path / "head"))
    assert {name.rpartition("model.")[2] for name in chosen} == {"lm_head.lora_A.weight", "lm_head.lora_B.weight"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_lr": 1e-3}, "--head_lr 0.001 has no effect: nothing is trained in full here"),
        ({"validation_fraction": 2.0}, "--validation_fraction 2.0: must lie between 0 and 1"),
        ({"max_new_tokens": 0}, "--max_new_tokens 0: must be at least 1"),
        ({"dataset_config_name": "a"}, "--dataset_config_name needs --dataset_name"),
        ({"dataset_name": "a"}, "--dataset_name and --train_data_file exclude each other"),
        ({"validation_fraction": 0.5, "validation_data_file": "a"}, "--validation_data_file exclude each other"),
        ({"pretrained_model_name_or_path": "/none"}, "base model '/none' is not a folder"),
        ({"train_data_file": "/none.jsonl"}, "--train_data_file '/none.jsonl' is not a file"),
        ({"image_dir": "/none"}, "--image_dir '/none' is not a directory"),
        ({"max_length": 5}, r"train.jsonl, line 1: the conversation has \d+ tokens, more than 5"),
    ],
)
def test_options_that_cannot_work(run: Run, options: Mapping[str, Any], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(**options)


def test_the_bundled_questions_are_the_default() -> None:
    args = arguments()
    args = resolve_questions(args)
    assert args.train_data_file.endswith("assets/data/high-contrast-questions/train.jsonl")
    assert args.validation_data_file.endswith("assets/data/high-contrast-questions/validation.jsonl")
    records, validation = read_question_data(args)
    seen = {image for record in records for image in record.images}
    assert not seen & {image for record in validation for image in record.images}
    assert {record.kind for record in validation} == {"name", "kind", "yes/no"}


# -------------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize(
    ("line", "expected", "answers"),
    [
        (LINE, ["user: <image>What is this?", "assistant: red apple"], ("red apple",)),
        ({**LINE, "question": "<image>\nWhat is this?"}, ["user: <image>What is this?", "assistant: red apple"], None),
        ({**LINE, "question": "What is <image> ?"}, ["user: <image>What is  ?", "assistant: red apple"], None),
        (
            {"images": ["images/0.png", "images/1.png"], "question": "<image> <image>\nSame?", "answer": "no"},
            ["user: <image><image>Same?", "assistant: no"],
            None,
        ),
        (
            {"images": ["images/0.png", "images/1.png"], "question": "Is <image> <image> or none red?", "answer": 0},
            ["user: Is <image> <image> or none red?", "assistant: 0"],
            ("0",),
        ),
        ({**LINE, "answer": ["red apple", "apple", 3]}, None, ("red apple", "apple", "3")),
        ({**LINE, "answer": 3}, ["user: <image>What is this?", "assistant: 3"], ("3",)),
        (
            {"images": ["images/0.png", "images/1.png"], "question": "Same?", "answer": "no"},
            ["user: <image><image>Same?", "assistant: no"],
            ("no",),
        ),
        ({"question": "Is grass green?", "answer": "yes"}, ["user: Is grass green?", "assistant: yes"], ("yes",)),
        (
            {
                "image": "images/0.png",
                "messages": [
                    {"role": "system", "content": "Be brief."},
                    {"role": "user", "content": "Look: <image>\nWhat is this?"},
                    {"role": "assistant", "content": "A fruit."},
                    {"role": "user", "content": [{"type": "text", "text": "Which one?"}]},
                    {"role": "assistant", "content": [{"type": "text", "text": "An apple."}]},
                ],
            },
            [
                *("system: Be brief.", "user: Look: <image>What is this?", "assistant: A fruit."),
                *("user: Which one?", "assistant: An apple."),
            ],
            ("An apple.",),
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image", "image": "images/1.png"}, "What?"]},
                    {"role": "assistant", "content": "A pear."},
                ]
            },
            ["user: <image>What?", "assistant: A pear."],
            ("A pear.",),
        ),
        (
            {
                "image": "images/0.png",
                "conversations": [
                    {"from": "human", "value": "<image>\nWhat is this?"},
                    {"from": "gpt", "value": "An apple."},
                ],
            },
            ["user: <image>What is this?", "assistant: An apple."],
            ("An apple.",),
        ),
    ],
)
def test_kinds_of_lines(
    questions: Path, tmp_path: Path, line: Any, expected: list[str] | None, answers: tuple[str, ...] | None
) -> None:
    path = write_lines(tmp_path / "a.jsonl", [line])
    (record,) = read_questions(path, flag="--train_data_file", image_dir=str(questions))
    assert record.where == f"{path}, line 1"
    if expected is not None:
        assert texts(record) == expected
    if answers is not None:
        assert record.answers == answers
    assert len(record.images) == sum(text.count("<image>") for text in texts(record))


def test_other_columns_types_system_prompts_and_files(questions: Path, tmp_path: Path) -> None:
    line = {"picture": "images/0.png", "q": "What?", "a": "fruit", "type": "name"}
    (tmp_path / "a.json").write_text(json.dumps([line, line]), encoding="utf-8")
    columns = {"image": "picture", "question": "q", "answer": "a"}
    options: dict[str, Any] = {"flag": "--train_data_file", "image_dir": str(questions), "columns": columns}
    records = read_questions(tmp_path / "a.json", system_prompt="Be brief.", **options)
    assert texts(records[1]) == ["system: Be brief.", "user: <image>What?", "assistant: fruit"]
    assert records[1].kind == "name"
    assert records[1].question == "What?"
    assert records[1].where.endswith("a.json, entry 2")
    # a line separator of Unicode does not end a line; empty lines and a byte order mark do not count
    text = "\ufeff\n" + json.dumps({**line, "q": "What\u2028is it?"}, ensure_ascii=False) + "\n\n"
    (tmp_path / "b.jsonl").write_text(text, encoding="utf-8")
    (record,) = read_questions(tmp_path / "b.jsonl", **options)
    assert record.where.endswith("line 2")


CHAT_TEXT = {"role": "user", "content": "What?"}
CHAT = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "fruit"}]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"line 2: not JSON .*; write one object a line"),
        (3, "line 2: not an object but int"),
        ({"image": "images/0.png"}, "line 2: has image; give question and answer, or messages, or conversations"),
        ({**LINE, "answer": float("nan")}, "line 2: the answer is nan; give a text or a number"),
        ({**LINE, "answer": {"text": "a"}}, r"line 2: the answer is \{'text': 'a'\}; give a text or a number"),
        ({**LINE, "question": ["What?", ["Which?"]]}, r"line 2: the question is \['Which\?'\]; give a text"),
        ({**LINE, "question": "<image> and <image>?"}, "line 2: 1 images, but 2 image placeholders"),
        ({"question": "What is <image>?", "answer": "a"}, "line 2: 0 images, but 1 image placeholders"),
        ({**LINE, "answer": " "}, "line 2: the answer is empty; fill it in or remove the line"),
        ({**LINE, "answer": None}, "line 2: the answer is empty"),
        ({**LINE, "question": ""}, "line 2: the question is empty"),
        (
            {**LINE, "image": "images/none.png"},
            r"line 2: there is no image '.*none\.png'; put it there, or",
        ),
        ({**LINE, "image": 3}, "line 2: the image is 3; give the name of a file"),
        ({"messages": "hello"}, "line 2: messages is 'hello'; give a list of messages"),
        (
            {"messages": [{"role": "bot", "content": "a"}]},
            "line 2: message 1 has the role 'bot'; roles are",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "audio"}]}]},
            r"has the content \{'type': 'audio'\}",
        ),
        ({"messages": [{"role": "user", "content": None}]}, "line 2: message 1 has the content None"),
        ({"image": "images/0.png", "messages": CHAT[:1]}, "line 2: the last message is not the assistant's"),
        ({"messages": CHAT}, "line 2: 0 images, but 1 image placeholders in the messages; write <image>"),
        (
            {
                "image": "images/0.png",
                "conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "a"}],
            },
            "line 2: 1 images, but 0 image placeholders",
        ),
        (
            {"image": "images/0.png", "messages": [CHAT[0], {"role": "assistant", "content": ""}]},
            "message 2, an answer, is empty",
        ),
    ],
)
def test_lines_that_cannot_be_understood(questions: Path, tmp_path: Path, line: Any, message: str) -> None:
    path = tmp_path / "a.jsonl"
    text = line if isinstance(line, str) else json.dumps(line)
    path.write_text(json.dumps(LINE) + "\n" + text + "\n", encoding="utf-8")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_questions(path, flag="--train_data_file", image_dir=str(questions))


@pytest.mark.parametrize("spelling", ["absolute", "../{}", "sub/../../{}", "..\\{}", "part of a message"])
def test_an_image_outside_of_the_folder_is_refused_unless_allowed(
    questions: Path, tmp_path: Path, spelling: str
) -> None:
    (tmp_path / "data" / "sub").mkdir(parents=True)
    picture = Path(shutil.copy(questions / "images" / "0.png", tmp_path / "other.png"))
    name = spelling.format(picture.name) if "{" in spelling else str(picture)
    line: dict[str, Any] = {**LINE, "image": name}
    if spelling == "part of a message":
        parts = [{"type": "image", "path": name}, {"type": "text", "text": "What?"}]
        line = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "a"}]}
    path = write_lines(tmp_path / "data" / "train.jsonl", [line])
    options: dict[str, Any] = {"train_data_file": path, "validation_data_file": path}
    with pytest.raises(
        ValueError,
        match=r"line 1: the image .*other\.png' lies outside of '.*data'; .*--allow_images_outside",
    ):
        read_question_data(arguments(**options))
    for more in ({"allow_images_outside": True}, {"image_dir": tmp_path} if spelling == "absolute" else {}):
        if more:
            records, _ = read_question_data(arguments(**options, **more))
            assert records[0].images[0].path.samefile(picture)


def test_a_folder_of_images_that_is_a_link_is_inside(questions: Path, tmp_path: Path) -> None:
    """As to a disk that several users share; an absolute name may say either."""
    (tmp_path / "images").symlink_to(questions / "images")
    names = ["images/0.png", str(tmp_path / "images" / "0.png"), str((tmp_path / "images").resolve() / "0.png")]
    write_lines(tmp_path / "a.jsonl", [{**LINE, "image": name} for name in names[:2]])
    assert len(read_questions(tmp_path / "a.jsonl", flag="--train_data_file")) == 2
    write_lines(tmp_path / "b.jsonl", [{**LINE, "image": names[2]}])
    given: dict[str, Any] = {"flag": "--train_data_file", "image_dir": str(tmp_path / "images")}
    assert len(read_questions(tmp_path / "b.jsonl", **given)) == 1


def test_files_that_cannot_be_understood(questions: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"--train_data_file '.*a.jsonl' has no lines in it"):
        read_questions(tmp_path / "a.jsonl", flag="--train_data_file")
    (tmp_path / "a.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="is no list of conversations"):
        read_questions(tmp_path / "a.json", flag="--train_data_file")
    (tmp_path / "a.json").write_text('{"a": 1}\n{"a": 2}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"is not JSON .*; give JSONL with the suffix \.jsonl"):
        read_questions(tmp_path / "a.json", flag="--train_data_file")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    write_lines(
        tmp_path / "b.jsonl", [{**LINE, "image": "broken.png"}, {**LINE, "image": str(questions / "images/0.png")}]
    )
    with pytest.raises(ValueError, match=r"cannot read the image '.*broken\.png'"):
        read_question_data(arguments(train_data_file=tmp_path / "b.jsonl", allow_images_outside=True))


def test_an_answer_of_several_parts_is_one_text(questions: Path, tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "red"}, {"type": "text", "text": " apple"}]
    path = write_lines(tmp_path / "a.jsonl", [{"messages": [CHAT_TEXT, {"role": "assistant", "content": parts}]}])
    (record,) = read_questions(path, flag="--train_data_file")
    assert record.messages[-1]["content"] == [{"type": "text", "text": "red apple"}]
    assert record.answers == ("red apple",)


def test_a_part_of_the_images_is_held_out_with_all_of_their_questions(questions: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (questions / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    options = {"train_data_file": write_lines(tmp_path / "all.jsonl", rows), "image_dir": questions}
    args = arguments(**options)
    args = resolve_questions(args)
    records, validation = read_question_data(args)
    assert (len(records), len(validation)) == (10, 2)
    assert not {record.images for record in records} & {record.images for record in validation}
    args = arguments(**options, validation_fraction=0.5, max_train_samples=5, max_validation_samples=3)
    records, validation = read_question_data(args)
    assert (len(records), len(validation)) == (5, 3)
    write_lines(tmp_path / "one.jsonl", rows[:2])
    with pytest.raises(ValueError, match="no question can be held out: all are about one image"):
        read_question_data(arguments(train_data_file=tmp_path / "one.jsonl", image_dir=questions))


COLOURS = ("red", "green", "blue", "white", "black", "gray", "yellow", "purple", "orange", "brown")


def held_out(folder: Path, rows: Sequence[Mapping[str, Any]], **options: Any) -> tuple[int, int, int]:
    """The number of records on either side, after a check that they share no picture; and of the pictures held out."""
    args = arguments(train_data_file=write_lines(folder / "all.jsonl", rows), **options)
    args = resolve_questions(args)
    train, validation = read_question_data(args)

    def pixels(records: Sequence[QuestionRecord]) -> set[bytes]:
        return {load_image(image).tobytes() for record in records for image in record.images}

    assert not pixels(train) & pixels(validation)
    return len(train), len(validation), len(pixels(validation))


@pytest.fixture
def colours(tmp_path: Path) -> Path:
    for name in COLOURS:
        Image.new("RGB", (8, 8), name).save(tmp_path / f"{name}.png")
    return tmp_path


def about(*images: str, question: str = "Which colour?") -> dict[str, Any]:
    return {"images": list(images), "question": question, "answer": "red"}


def test_a_picture_under_several_names_is_held_out_under_all_of_them(colours: Path) -> None:
    rows = [about(f"{name}.png") for name in COLOURS]
    (colours / "sub").mkdir()
    for name in COLOURS:
        os.link(colours / f"{name}.png", colours / f"hard {name}.png")
        (colours / f"soft {name}.png").symlink_to(f"{name}.png")
        Image.open(colours / f"{name}.png").save(colours / f"{name}.bmp")
        spellings = (f"hard {name}.png", f"soft {name}.png", f"{name}.bmp", f"sub/../{name}.png", f"./{name}.png")
        rows += [about(spelling) for spelling in (*spellings, str(colours / f"{name}.png"))]
    assert held_out(colours, rows, validation_fraction=0.2) == (56, 14, 2)


def test_several_images_a_question(colours: Path, capsys: pytest.CaptureFixture[str]) -> None:
    singles = [about(f"{name}.png") for name in COLOURS]
    pairs = [about(f"{a}.png", f"{b}.png") for a, b in itertools.pairwise(COLOURS)]
    # what shares images is held out whole, or trained on whole
    train, validation, number = held_out(colours, [*singles, *pairs[:3]], validation_fraction=0.2)
    assert (train + validation, number) == (13, 2)
    assert "left out" not in capsys.readouterr().out
    train, validation, _ = held_out(colours, [*singles, *pairs], validation_fraction=0.2)
    missing = 19 - train - validation
    assert 0 < missing <= 2
    assert f"left out {missing} of 19 questions (such as {colours / 'all.jsonl'}, line " in capsys.readouterr().out
    with pytest.raises(ValueError, match="they share their images in such a way that each would be trained on, too"):
        held_out(colours, [about("red.png", f"{name}.png") for name in COLOURS[1:]])


def test_questions_without_images_stay_together_by_their_wording(colours: Path) -> None:
    rows = [{"question": f"Question {index % 5}?", "answer": str(index)} for index in range(15)]
    args = arguments(train_data_file=write_lines(colours / "text.jsonl", rows), validation_fraction=0.4)
    train, validation = read_question_data(args)
    assert (len(train), len(validation)) == (9, 6)
    assert not {record.question for record in train} & {record.question for record in validation}


def test_a_validation_file_about_images_that_are_trained_on(colours: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.open(colours / "red.png").save(colours / "other.bmp")
    write_lines(colours / "train.jsonl", [about(f"{name}.png") for name in COLOURS[:8]])
    path = write_lines(colours / "validation.jsonl", [about("orange.png"), about("brown.png")])
    args = arguments(train_data_file=colours / "train.jsonl", validation_data_file=path)
    read_question_data(args)
    assert capsys.readouterr().out == ""
    write_lines(path, [about("orange.png"), about("brown.png", "other.bmp"), about("./red.png")])
    train, validation = read_question_data(args)
    assert (len(train), len(validation)) == (8, 3)  # the user's own parts are kept
    expected = f"warning: 2 of 3 validation questions are about images that are trained on (such as {path}, line 2)"
    assert expected in capsys.readouterr().out


def test_rows_of_a_dataset_about_one_picture(tmp_path: Path) -> None:
    hub = pytest.importorskip("datasets")

    def encoded(seed: int, kind: str) -> dict[str, Any]:
        buffer = io.BytesIO()
        make_image(seed).save(buffer, kind)
        return {"bytes": buffer.getvalue(), "path": None}

    columns: dict[str, list[Any]] = {
        "image": [encoded(index // 3, "BMP" if index % 3 else "PNG") for index in range(30)],
        "question": [f"Question {index % 3}?" for index in range(30)],
        "answer": ["a"] * 30,
    }
    rows = hub.Dataset.from_dict(columns).cast_column("image", hub.Image())
    (tmp_path / "one").mkdir()
    rows.to_parquet(str(tmp_path / "one" / "train-00000-of-00001.parquet"))
    train, validation = read_question_data(
        arguments(dataset_name=str(tmp_path / "one"), cache_dir=str(tmp_path / "c"), validation_fraction=0.2)
    )
    assert (len(train), len(validation)) == (24, 6)
    seen, new = ({load_image(r.images[0]).tobytes() for r in part} for part in (train, validation))
    assert not seen & new


def test_datasets_of_the_hub(tmp_path: Path) -> None:
    hub = pytest.importorskip("datasets")

    def encoded(seed: int) -> dict[str, Any]:
        buffer = io.BytesIO()
        make_image(seed).save(buffer, "PNG")
        return {"bytes": buffer.getvalue(), "path": None}

    columns: dict[str, list[Any]] = {
        "image": [encoded(0), encoded(1)],
        "question": ["What?", "Which?"],
        "answer": ["a b", "c"],
        "number": [1, 2],
    }
    rows = hub.Dataset.from_dict(columns).cast_column("image", hub.Image())
    (tmp_path / "one").mkdir()
    rows.to_parquet(str(tmp_path / "one" / "train-00000-of-00001.parquet"))
    args = arguments(dataset_name=str(tmp_path / "one"), cache_dir=str(tmp_path / "cache"))
    args = resolve_questions(args)
    records, validation = read_question_data(args)
    assert [len(records), len(validation)] == [1, 1]
    assert texts(records[0])[0] in ("user: <image>What?", "user: <image>Which?")
    assert records[0].where.startswith(f"{tmp_path / 'one'}/train[")

    chat = [[{"role": "user", "content": "<image> and <image>"}, {"role": "assistant", "content": "yes"}]]
    rows = hub.Dataset.from_dict({"images": [[encoded(0), encoded(1)]], "messages": chat})
    rows = rows.cast_column("images", hub.Sequence(hub.Image()))
    for split in ("train", "validation"):
        (tmp_path / "two").mkdir(exist_ok=True)
        rows.to_parquet(str(tmp_path / "two" / f"{split}-00000-of-00001.parquet"))
    records, validation = read_question_data(
        arguments(dataset_name=str(tmp_path / "two"), cache_dir=str(tmp_path / "c"))
    )
    assert texts(records[0]) == ["user: <image> and <image>", "assistant: yes"]
    loaded = [load_image(image) for image in validation[0].images]
    assert [image.tobytes() for image in loaded] == [make_image(0).tobytes(), make_image(1).tobytes()]
    args = arguments(dataset_name=str(tmp_path / "one"), cache_dir=str(tmp_path / "cache"), image_column="number")
    with pytest.raises(ValueError, match=r"the column 'number' holds no images but .*; set --image_column"):
        read_question_data(args)
    args = replace(args, image_column="picture")
    with pytest.raises(ValueError, match=r"has no column 'picture' .*; set --image_column"):
        read_question_data(args)
    with pytest.raises(ValueError, match="cannot be loaded"):
        read_question_data(arguments(dataset_name=str(tmp_path / "none")))


# ----------------------------------------------------------------------------------------------------------------- task


def test_batches_are_functions_of_seed_and_number(base: Path, questions: Path) -> None:
    task = make_task(base, questions)
    first = list(task.batches(3, 2, range(4)))
    again = list(task.batches(3, 2, range(1, 4, 2)))
    for expected, found in zip(first[1::2], again, strict=True):
        assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert not torch.equal(next(task.batches(4, 2, range(1)))["pixel_values"], first[0]["pixel_values"])
    assert task.primary_metric in task.validate()
    assert (task.num_train, task.num_validation) == (12, 6)


def test_pixels_are_kept_once_an_image(base: Path, questions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = make_task(base, questions)
    kept = [task.train.sample(index) for index in range(4)]
    assert kept[0]["pixel_values"] is kept[1]["pixel_values"]  # two questions about one image
    assert kept[0]["pixel_values"] is not kept[2]["pixel_values"]
    assert task.train.sample(0) is kept[0]
    uncached = EncodedQuestions(task.base, task.train.records, None, num_bytes=0)
    uncached.fill("nothing fits")
    assert uncached.sample(0) is not uncached.sample(0)
    assert all(torch.equal(values, kept[0][name]) for name, values in uncached.sample(0).items())


def test_an_exact_match_is_what_greedy_decoding_gives(base: Path, questions: Path, run: Run) -> None:
    """Learned by heart, the answers are generated; before, teacher-forced and generated answers agree, too."""
    out = run(
        **{"validation_data_file": questions / "train.jsonl", "max_train_steps": 80, "learning_rate": 2e-2},
        **{"train_batch_size": 12, "rank": 8, "max_new_tokens": 8, "adapt": ["language", "vision", "projector"]},
        **{"validation_steps": 80, "init": "orthonormal", "lr_scheduler": "cosine"},
    )
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    forced = [line["exact_match"] for line in lines if "validation_loss" in line]
    generated = [line["exact_match"] for line in lines if "stage" in line]
    assert forced[0] == generated[0] == generated[1]
    assert forced[-1] == pytest.approx(generated[-1])
    assert generated[-1] > 0.8


@pytest.mark.parametrize("place", [0, -1])
def test_one_wrong_token_makes_an_answer_wrong(
    base: Path, questions: Path, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    """A model that is sure of every token, but for one of the first question's answer: its first, or its end."""
    task = make_task(base, questions, eval_batch_size=2)
    own, done = task.base.answer_logits, []

    def sure(batch: Any) -> Any:
        answers = own(batch)
        logits = torch.nn.functional.one_hot(answers.tokens, answers.logits.shape[1]).float()
        wrong = (answers.samples == 0).nonzero().flatten()[place]
        if not done:
            logits[wrong] = logits[wrong].roll(1)
        done.append(int((answers.samples == 0).sum()))
        return answers._replace(logits=logits)

    monkeypatch.setattr(task.base, "answer_logits", sure)
    assert task.validate()["exact_match"] == pytest.approx(1 - 1 / task.num_validation)
    assert done[0] > 1
    assert len(done) > 1


def test_evaluation_does_not_depend_on_the_size_of_its_batches(base: Path, questions: Path) -> None:
    scores = [make_task(base, questions, eval_batch_size=size, max_new_tokens=4) for size in (1, 6)]
    one, six = (task.validate() for task in scores)
    assert one["exact_match"] == six["exact_match"]
    assert one["validation_loss"] == pytest.approx(six["validation_loss"], rel=1e-5)
    assert scores[0].evaluate() == scores[1].evaluate()
    assert scores[0]._results == scores[1]._results


# ----------------------------------------------------------------------------------------------- answers and their ends


def write_answers(folder: Path, answers: Sequence[str | list[str]], name: str = "train.jsonl") -> Path:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for index in range(len(answers)):
        make_image(index).save(folder / "images" / f"{name}{index}.png")
    rows = [
        {"image": f"images/{name}{index}.png", "question": "What?", "answer": answer}
        for index, answer in enumerate(answers)
    ]
    return write_lines(folder / name, rows)


@pytest.mark.parametrize(
    ("train", "validation", "given", "limit", "warned"),
    [
        (["red"], ["no"], None, 32, 0),
        (["red apple " * 60], ["no"], None, 120, 0),
        (["red"], ["red apple " * 60, "no"], None, 120, 0),
        (["red"], ["fruit " * 900, "no"], None, 512, 1),
        (["red"], ["red apple " * 60, "no", "green pear " * 60], 20, 20, 2),
        (["red"], [["red apple " * 60, "red"], "no"], 20, 20, 0),  # one right answer that fits is enough
    ],
)
def test_generated_answers_are_as_long_as_the_data_need(
    base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    train: list[str],
    validation: list[Any],
    given: int | None,
    limit: int,
    warned: int,
) -> None:
    def records(answers: Sequence[str | list[str]], name: str) -> list[QuestionRecord]:
        return read_questions(write_answers(tmp_path, answers, name), flag="f")

    family = VisionLanguageFamily.from_pretrained(base)
    trained, asked = records(train, "train.jsonl"), records(validation, "validation.jsonl")
    found = settle_answer_length(given, family.num_answer_tokens, trained, asked)
    if given is None and limit not in NEW_TOKENS:
        # what the answers are encoded as needs no more, and little less
        encoded = [
            int((family.encode(r.messages, [load_image(r.images[0])])["labels"] != -100).sum())
            for r in (*trained, *asked)
        ]
        assert max(encoded) <= found <= max(encoded) + 3
    else:
        assert found == limit
    printed = capsys.readouterr().out
    assert ("--max_new_tokens" in printed) == bool(warned)
    if warned:
        assert f"the right answers to {warned} of {len(validation)} validation questions are longer than" in printed


def test_long_answers_that_are_learnt_match(base: Path, tmp_path: Path, run: Run) -> None:
    """They are longer than 32 tokens, and generated in whole by default."""
    answer = "What kind of thing is this? " * 5
    path = write_answers(tmp_path / "long", [answer, answer])
    out = run(
        **{"train_data_file": path, "validation_data_file": path, "max_new_tokens": None, "rank": 8},
        **{"max_train_steps": 40, "validation_steps": 40, "learning_rate": 1e-2, "init": "orthonormal"},
    )
    assert read_json(out / "config.json")["arguments"]["max_new_tokens"] > 32
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["exact_match"] for line in lines if "validation_loss" in line][-1] == 1.0
    assert [line["exact_match"] for line in lines if line.get("stage") == "end"] == [1.0]


def test_all_that_are_too_long_are_counted(base: Path, tmp_path: Path) -> None:
    path = write_answers(tmp_path, ["red", "fruit " * 60, "no", "fruit " * 90])
    with pytest.raises(ValueError, match=r"line 2: the conversation has \d+ tokens, more than 50") as caught:
        make_task(base, tmp_path, validation_data_file=path, max_length=50)
    assert "2 of 4 conversations are too long; the longest has" in str(caught.value)


def test_texts_beyond_the_memory_are_checked_too(base: Path, tmp_path: Path) -> None:
    family = VisionLanguageFamily.from_pretrained(base)
    family.conversations.plain_text._end_ids.add(family.tokenizer.convert_tokens_to_ids("\u010a"))
    records = read_questions(write_answers(tmp_path, ["red", "red\napple"]), flag="f")
    encoded = EncodedQuestions(family, records, None, num_bytes=0)
    with pytest.raises(ValueError, match=r"train\.jsonl, line 2: message 2 has the token"):
        encoded.fill("nothing fits")


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ([], 1.0),
        ([(0, 0)], 1.0),
        ([(0, 0), (1, 0)], 1.0),
        ([(0, -1)], 0.5),
        ([(1, -2)], 0.5),
        ([(0, -1), (1, -1)], 0.0),
    ],
)
def test_one_pass_scores_the_last_answer_of_a_conversation(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: list[tuple[int, int]], expected: float
) -> None:
    """As the generated answers do: what comes before is given, right or wrong."""
    make_image(0).save(tmp_path / "a.png")
    chats = [
        [
            *({"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": first}),
            *({"role": "user", "content": "Which?"}, {"role": "assistant", "content": last}),
        ]
        for first, last in (("fruit green apple", "pear"), ("no", "red apple fruit"))
    ]
    write_lines(tmp_path / "train.jsonl", [{"image": "a.png", "messages": chat} for chat in chats])
    task = make_task(base, tmp_path, validation_data_file=tmp_path / "train.jsonl", eval_batch_size=2)
    order = next(iter(task._chunks(prompt=False)))
    answer_logits = task.base.answer_logits

    def logits_of(batch: Mapping[str, Tensor]) -> Any:
        """Sure of every token but those that shall be wrong: (question, place among its tokens)."""
        found = answer_logits(batch)
        logits = torch.nn.functional.one_hot(found.tokens, found.logits.shape[1]).float()
        for question, place in wrong:
            row = int((found.samples == order.index(question)).nonzero().flatten()[place])
            logits[row] = logits[row].roll(1)
        return found._replace(logits=logits)

    monkeypatch.setattr(task.base, "answer_logits", logits_of)
    assert task.validate()["exact_match"] == expected


def test_generation_is_greedy_and_ends_where_training_does(tmp_path: Path) -> None:
    """The base's own settings neither penalise a token nor leave out the end that the tokenizer knows."""
    folder = write_base(tmp_path, "llava")
    plain = VisionLanguageFamily.from_pretrained(folder)
    prompt = plain.encode_prompt(ask("What is this?"), [make_image(1)])
    with torch.no_grad():
        tokens = plain.model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert len(set(tokens.tolist())) < len(tokens)  # some come again
    expected = plain.tokenizer.decode(tokens).strip()
    for setting in ({"repetition_penalty": 5.0}, {"no_repeat_ngram_size": 1}):
        edit_json(
            folder / "generation_config.json", **{"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, **setting}
        )
        assert VisionLanguageFamily.from_pretrained(folder).generate([prompt], 12) == [expected], setting

    edit_json(folder / "generation_config.json", eos_token_id=[3])
    other = VisionLanguageFamily.from_pretrained(folder)
    other.tokenizer.eos_token = other.tokenizer.convert_ids_to_tokens(int(tokens[4]))
    other = VisionLanguageFamily(other.model, other.processor)
    # an end that is an ordinary token is part of the text
    assert other.generate([prompt], 12) == [plain.tokenizer.decode(tokens[:5]).strip()]
