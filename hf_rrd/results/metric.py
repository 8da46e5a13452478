"""The alignment as a metric of `evaluate`. Nothing in the package imports this module: it takes `evaluate` with it."""

from typing import Any

import datasets
import evaluate
import torch

from hf_rrd.results.alignment import relational_alignment

_DESCRIPTION = """
Compares two sets of embeddings of the same examples by their relations, which no rotation and no scale can change: by
centred kernel alignment (CKA), by the rank correlation of all pairwise cosine similarities, and by how many of each
example's nearest neighbours are the same. The embeddings of the two sets may differ in width.
"""

_INPUTS = """
Args:
    predictions: Embeddings of the student, one sequence of floats for each example.
    references: Embeddings of the teacher, of the same examples in the same order; any width.
    neighbors (`int`, default 10): How many nearest neighbours to compare, at most examples - 1.
    debiased (`bool`, default `True`): Whether `cka` is free of the bias that few examples of wide embeddings have.

Returns:
    cka, rank_correlation, neighbor_overlap: As `hf_rrd.relational_alignment` gives them; 1 for the same relations.
"""

_CITATION = """
@inproceedings{kornblith2019similarity,
    title = {Similarity of Neural Network Representations Revisited},
    author = {Kornblith, Simon and Norouzi, Mohammad and Lee, Honglak and Hinton, Geoffrey},
    booktitle = {International Conference on Machine Learning},
    year = {2019}
}
"""


class RelationalAlignment(evaluate.Metric):
    """`hf_rrd.relational_alignment` of all embeddings that were added.

    Its mean over batches would be another number, so all are kept until `compute`.
    """

    def _info(self) -> evaluate.MetricInfo:
        embedding = datasets.Sequence(datasets.Value("float64"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": embedding, "references": embedding}),
            reference_urls=["https://arxiv.org/abs/1905.00414", "https://arxiv.org/abs/2010.15327"],
        )

    def _compute(
        self, predictions: Any, references: Any, neighbors: int = 10, debiased: bool = True
    ) -> dict[str, float]:
        sets = _matrix("predictions", predictions), _matrix("references", references)
        return relational_alignment(*sets, neighbors, debiased)


def _matrix(name: str, embeddings: list[list[float]]) -> torch.Tensor:
    widths = sorted({len(embedding) for embedding in embeddings})
    if len(widths) > 1:
        raise ValueError(f"`{name}` must be embeddings of one width, got widths of {widths[0]} to {widths[-1]}.")
    return torch.tensor(embeddings, dtype=torch.float64)
