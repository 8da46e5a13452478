"""Small models of sentence-transformers, and texts that a tiny tokenizer knows."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import nn
from transformers import BertConfig, BertModel, BertTokenizer

WORDS = "a an the cat dog bird fox runs sits sings over under near house tree hill big small red old".split()


def tokenizer(folder: Path, **how: Any) -> Any:
    """One of whole words."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = folder / "words.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    return BertTokenizer(str(vocabulary), model_max_length=32, **how)


def texts(count: int, seed: int = 0, longest: int = 9) -> list[str]:
    """Random ones of 1 to `longest` words."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [" ".join(WORDS[i] for i in torch.randint(len(WORDS), (n,), generator=generator)) for n in lengths]


def headless(width: int = 16, seed: int = 0, layers: int = 2, dropout: float = 0.0) -> BertModel:
    """A BERT without a head."""
    torch.manual_seed(seed)
    size = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 2, "intermediate_size": 32}
    without = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return BertModel(BertConfig(vocab_size=5 + len(WORDS), max_position_embeddings=32, **size, **without))


def embedder(folder: Path, pooling: str = "mean", dense: int | None = None, width: int = 24, **how: Any) -> Any:
    """A SentenceTransformer: a tiny BERT, a pooling, a Dense layer where it is asked for, Normalize."""
    headless(width, seed=1).save_pretrained(folder)
    tokenizer(folder).save_pretrained(folder)
    torch.manual_seed(2)
    modules: list[nn.Module] = [Transformer(str(folder)), Pooling(width, pooling)]
    modules += [Dense(width, dense)] if dense is not None else []
    return SentenceTransformer(modules=[*modules, Normalize()], device="cpu", **how)


def tokenized(of: Any, of_texts: list[str], **columns: Any) -> Dataset:
    """Texts as a tokenizer's columns."""
    return Dataset.from_dict({**of(of_texts, truncation=True), **columns})
