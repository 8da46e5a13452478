"""How alike the relations in the embeddings of a student and of its teacher are: an `evaluate` metric."""

from typing import Any

import datasets
import evaluate
import torch

from hf_rrd import relational_alignment

_DESCRIPTION = """
Compares two sets of embeddings of the same examples by their relations, which no rotation and no scale can change: by
centred kernel alignment (CKA), by the rank correlation of all pairwise cosine similarities, and by how many of each
example's nearest neighbours are the same. The embeddings of the two sets may differ in width.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: Embeddings of the student, one sequence of floats for each example.
    references: Embeddings of the teacher, of the same examples in the same order; any width.
    neighbors (`int`, default 10): How many nearest neighbours to compare, at most examples - 1.
    debiased (`bool`, default `True`): Whether `cka` is free of the bias that few examples of wide embeddings have.

Returns:
    cka: 1 for the same relations, about 0 for unrelated sets; nan for fewer than 4 examples where debiased.
    rank_correlation: -1 to 1; nan if the similarities of a set are all the same, as with 2 examples.
    neighbor_overlap: the share of neighbours that both sets agree on, 0 to 1.

Examples:
    >>> alignment = evaluate.load("relational_alignment")
    >>> teacher = [[1.0, 0.0, 0.0], [0.9, 0.1, 0.0], [0.0, 1.0, 0.0], [0.1, 0.8, 0.6], [0.3, 0.2, 0.9]]
    >>> student = [[0.0, 2.0], [0.1, 1.8], [3.0, 0.0], [2.0, 0.2], [1.0, 0.7]]
    >>> alignment.compute(predictions=student, references=teacher, neighbors=1)["neighbor_overlap"]
    1.0
"""

_CITATION = """
@inproceedings{kornblith2019similarity,
    title = {Similarity of Neural Network Representations Revisited},
    author = {Kornblith, Simon and Norouzi, Mohammad and Lee, Honglak and Hinton, Geoffrey},
    booktitle = {International Conference on Machine Learning},
    year = {2019}
}
@inproceedings{nguyen2021wide,
    title = {Do Wide and Deep Networks Learn the Same Things? Uncovering How Neural Network Representations Vary with
        Width and Depth},
    author = {Nguyen, Thao and Raghu, Maithra and Kornblith, Simon},
    booktitle = {International Conference on Learning Representations},
    year = {2021}
}
@article{song2012feature,
    title = {Feature Selection via Dependence Maximization},
    author = {Song, Le and Smola, Alex and Gretton, Arthur and Bedo, Justin and Borgwardt, Karsten},
    journal = {Journal of Machine Learning Research},
    volume = {13},
    year = {2012}
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
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": embedding, "references": embedding}),
            reference_urls=["https://arxiv.org/abs/1905.00414", "https://arxiv.org/abs/2010.15327"],
        )

    def _compute(
        self, predictions: Any, references: Any, neighbors: int = 10, debiased: bool = True
    ) -> dict[str, float]:
        return relational_alignment(
            _matrix("predictions", predictions), _matrix("references", references), neighbors, debiased
        )


def _matrix(name: str, embeddings: list[list[float]]) -> torch.Tensor:
    widths = sorted({len(embedding) for embedding in embeddings})
    if len(widths) > 1:
        raise ValueError(f"`{name}` must be embeddings of one width, got widths of {widths[0]} to {widths[-1]}.")
    return torch.tensor(embeddings, dtype=torch.float64)
