"""The alignment as a metric of `evaluate`. Nothing in the package imports this module: it takes `evaluate` with it."""

from typing import Any

import datasets
import evaluate
import torch

from hf_rrd.results.alignment import relational_alignment

_CITATION = """@inproceedings{kornblith2019similarity, year = {2019}, booktitle = {ICML},
    title = {Similarity of Neural Network Representations Revisited},
    author = {Kornblith, Simon and Norouzi, Mohammad and Lee, Honglak and Hinton, Geoffrey}}"""


class RelationalAlignment(evaluate.Metric):
    """`hf_rrd.relational_alignment` of all embeddings that were added: the mean over batches would be another number.

    `predictions` are the student's embeddings, one sequence of floats for each example, `references` the teacher's, of
    the same examples in the same order; their width may differ.
    """

    def _info(self) -> evaluate.MetricInfo:
        embedding = datasets.Sequence(datasets.Value("float64"))
        return evaluate.MetricInfo(
            description=RelationalAlignment.__doc__,
            citation=_CITATION,
            inputs_description=relational_alignment.__doc__,
            features=datasets.Features({"predictions": embedding, "references": embedding}),
            reference_urls=["https://arxiv.org/abs/1905.00414", "https://arxiv.org/abs/2010.15327"],
        )

    def _compute(self, predictions: Any, references: Any, **options: Any) -> dict[str, float]:
        student, teacher = (torch.tensor(rows, dtype=torch.float64) for rows in (predictions, references))
        return relational_alignment(student, teacher, **options)
