"""The pictures of a card: what there is to draw, and the files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.utils import logging

from hf_rrd.files import written_whole
from hf_rrd.results.plots import Names, plane_of, plot_embeddings, plot_losses, plot_reliability, plot_similarities
from hf_rrd.results.report import DistillationReport

logger = logging.get_logger(__name__)

FIGURES = "figures"  # the folder of a card's pictures, beside it
LEAST_SHOWN = 0.2  # of the teacher's variance: axes that show less are no picture of its embeddings

PICTURES = {
    "losses": "Loss terms over the steps",
    "similarities": "Similarity matrices of teacher and student",
    "embeddings": "Embeddings of student and teacher on the teacher's axes",
    "reliability": "Reliability diagram",
}
"""The pictures by name, and what they show in words."""


def place_of(picture: str) -> str:
    """Where a picture is, seen from the card."""
    return f"{FIGURES}/{picture}.png"


def draw_pictures(
    folder: str | Path,
    log_history: Sequence[Mapping[str, Any]],
    report: DistillationReport | None,
    names: Names | None,
) -> list[str]:
    """Draw what there is to draw, of `PICTURES`, beside the card in `folder`; returns the names.

    Pictures of an earlier card are removed. Where matplotlib is missing, or a picture cannot be drawn, there are none,
    and a warning says why.
    """
    for name in PICTURES:
        Path(folder, place_of(name)).unlink(missing_ok=True)
    try:
        figures = _figures_of(log_history, report, names)
        for name, figure in figures.items():
            with written_whole(Path(folder, place_of(name))) as temporary:
                figure.savefig(temporary, format="png", dpi=150, facecolor="white", metadata={"Software": None})
    except Exception as error:  # whatever it is: a picture must not cost the card and the push
        logger.warning(f"The card has no pictures. {error}")
        return []
    return list(figures)


def _figures_of(
    log_history: Sequence[Mapping[str, Any]], report: DistillationReport | None, names: Names | None
) -> dict[str, Any]:
    figures = {}
    if any("loss" in entry and "step" in entry for entry in log_history):
        figures["losses"] = plot_losses(log_history)
    if report is None:
        return figures
    tensors, facts = report.tensors, report.facts
    labels = tensors["labels"] if "accuracy" in facts["student"] else None
    if "alignment" in facts:
        sets = tensors["student_embedding"], tensors["teacher_embedding"]
        figures["similarities"] = plot_similarities(*sets, labels, names)
        if plane_of(sets[1])[1].sum() >= LEAST_SHOWN:
            figures["embeddings"] = plot_embeddings(*sets, labels, names)
    if labels is not None:
        others = {"teacher": tensors["teacher_logits"]} if "accuracy" in facts.get("teacher", {}) else {}
        figures["reliability"] = plot_reliability(tensors["student_logits"], labels, others=others)
    return figures
