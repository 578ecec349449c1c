"""The model card of a run: `README.md` with the header that model hubs read."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from lorainit_diffusers.evaluation.document import code_fence, escape_cell, templates_of
from lorainit_diffusers.files import write_text


@dataclass(frozen=True)
class CardFacts:
    """What a model card says.

    Attributes:
        title: Of the page.
        base_model: Folder or hub name of the base.
        init: Name of the initialisation.
        step_zero: What it does to the base before the first step (`equal`, `moved`, `offset`).
        tags: For the hub's search.
        rows: How it was trained, by name; the texts are Markdown.
        usage: Python that loads the result.
        notes: Sentences at the end; Markdown.
        library: That loads the result.
        prompt: Of the subject, for the hub's examples; `None` where there is none.
        picture: Markdown that stands above the rows: the samples, or why there are none.
        score_columns: Names of the columns of `scores`.
        scores: Row of the table of scores -> its cells; empty for none.
        outcome: A sentence on how far the training went; empty for none.
    """

    title: str
    base_model: str
    init: str
    step_zero: str
    tags: Sequence[str]
    rows: Mapping[str, str]
    usage: str
    notes: Sequence[str]
    library: str = "diffusers"
    prompt: str | None = None
    picture: str = ""
    score_columns: Sequence[str] = ()
    scores: Mapping[str, Sequence[str]] = field(default_factory=dict[str, Sequence[str]])
    outcome: str = ""


def render_model_card(facts: CardFacts) -> str:
    """The card as Markdown with its YAML header.

    Raises:
        ValueError: When the header is none that a hub reads.
    """
    of_hub: dict[str, Any] = {} if facts.prompt is None else {"instance_prompt": facts.prompt}
    header = ModelCardData(base_model=facts.base_model, library_name=facts.library, tags=list(facts.tags), **of_hub)
    # the page is Markdown, some of whose texts are Markdown already: HTML's escaping would show in code and in paths
    templates = templates_of("lorainit_diffusers.training", autoescape=False)
    content = templates.get_template("model_card.md.jinja").render(
        card_data=header.to_yaml(),
        facts=facts,
        rows={name: escape_cell(text) for name, text in facts.rows.items()},
        fence=code_fence(facts.usage),
    )
    return ModelCard(content).content


def write_model_card(path: str | os.PathLike[str], facts: CardFacts) -> None:
    """Write the card to a path, whose name is `README.md` where a hub is to find it."""
    write_text(path, render_model_card(facts))
