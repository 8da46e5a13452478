"""Finished runs, and what their cards say."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import ModelCard

from hf_rrd import RelationalDistillationTrainer
from hf_rrd.results.card import CARD, FACTS_FILE
from tests.builders import Images, trainer


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((np.argmax(prediction.predictions, -1) == prediction.label_ids).mean())}


def finished(folder: Path, report: bool = True, **settings: Any) -> RelationalDistillationTrainer:
    """A run that was trained, evaluated and compared with its teacher."""
    run = trainer(folder, **({"eval_dataset": Images(40, seed=3), "compute_metrics": accuracy} | settings))
    run.train()
    run.evaluate(metric_key_prefix="test")
    if report:
        run.report()
    return run


def card_of(run: RelationalDistillationTrainer, **given: Any) -> ModelCard:
    run.create_model_card(**given)
    return ModelCard.load(Path(run.args.output_dir, CARD))


def facts_of(run: RelationalDistillationTrainer) -> dict[str, Any]:
    return json.loads(Path(run.args.output_dir, FACTS_FILE).read_text())


def usage_of(card: ModelCard) -> str:
    return re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1]  # type: ignore[index]
