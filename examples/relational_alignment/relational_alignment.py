"""The package's `evaluate` metric as a module for `evaluate.load`: of this folder, or of a Space made of it."""

import evaluate  # noqa: F401 - it reads here, an import a line, what has to be installed

import hf_rrd.results.metric


class RelationalAlignment(hf_rrd.results.metric.RelationalAlignment):
    """How alike the relations in the embeddings of a student and of its teacher are."""
