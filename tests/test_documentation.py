"""The examples in README, docs/ and docstrings of public names run, with small models and data under their names."""

import contextlib
import importlib
import inspect
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import hf_rrd
from tests.processes import ROOT, run_script

# Words of a block that is not run, each with the reason.
NOT_RUN: dict[str, str] = {}
# Words of a block that needs a package of an extra, and the package.
NEEDS = {"export_onnx": "onnxruntime", "plot_": "matplotlib", "SentenceTransformer(": "sentence_transformers"}


@dataclass
class Block:
    """A block of Python in the documentation."""

    section: str
    line: int
    code: str


def blocks_of(text: str, name: str) -> list[Block]:
    """The blocks of a text, each with the heading that it stands under."""
    section, found, lines, start = name, [], [], 0
    for number, line in enumerate(text.splitlines(), 1):
        if start == 0 and line.startswith("#"):
            section = f"{name}: {line.lstrip('# ')}"
        elif line.strip() == "```python":
            start, lines = number, []
        elif line.strip() == "```" and start:
            found.append(Block(section, start, inspect.cleandoc("\n" + "\n".join(lines))))
            start = 0
        elif start:
            lines.append(line)
    assert start == 0, f"the block of {name} at line {start} has no end"
    return found


def sections() -> dict[str, list[Block]]:
    """All blocks of README, of docs/ and of the docstrings of public names and their methods, by section."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    found = [block for page in pages for block in blocks_of(page.read_text(encoding="utf-8"), page.stem)]
    for name in hf_rrd.__all__:
        public = getattr(hf_rrd, name)
        members = vars(public).items() if inspect.isclass(public) and public.__module__.startswith("hf_rrd") else []
        for where, documented in [(name, public), *((f"{name}.{key}", member) for key, member in members)]:
            if where == name or not where.split(".")[1].startswith("_"):
                found += blocks_of(inspect.getdoc(documented) or "", where) if callable(documented) else []
    by_section: dict[str, list[Block]] = {}
    for block in found:
        by_section.setdefault(block.section, []).append(block)
    return by_section


SECTIONS = sections()


def reason_not_to_run(block: Block) -> str:
    return next((reason for words, reason in NOT_RUN.items() if words in block.code), "")


@pytest.mark.parametrize("section", SECTIONS)
def test_the_examples_of_a_section_run_one_after_another(section: str, tmp_path: Path) -> None:
    for words, package in NEEDS.items():
        if any(words in block.code for block in SECTIONS[section]):
            pytest.importorskip(package)
    (tmp_path / "examples").symlink_to(ROOT / "examples")  # they run in the folder of a clone
    code = "import sys; from tests.test_documentation import run; run(sys.argv[1])"
    run_script("-c", code, section, folder=tmp_path)


def test_readme_and_docstrings_have_examples_and_every_exception_is_one_of_them() -> None:
    blocks = [block for each in SECTIONS.values() for block in each]
    assert len([block for block in blocks if block.section.startswith("README")]) >= 5
    assert len([block for block in blocks if not block.section.startswith("README")]) >= 3
    assert [words for words in NOT_RUN if not any(words in block.code for block in blocks)] == []


def test_every_block_is_python_with_its_ends_and_heading() -> None:
    text = "# One\n```python\na = 1\n```\ntext\n## Two\n  ```python\n  # no heading\n  b = 2\n  ```\n```\n# c\n```\n"
    assert blocks_of(text, "x")[0] == Block("x: One", 2, "a = 1")
    assert [(block.section, block.code) for block in blocks_of(text, "x")[1:]] == [("x: Two", "# no heading\nb = 2")]


@pytest.mark.parametrize("file", ["README.md", "CONTRIBUTING.md"])
def test_every_name_of_the_package_in_a_text_is_there(file: str) -> None:
    names = set(re.findall(r"\bhf_rrd((?:\.\w+)+)", (ROOT / file).read_text(encoding="utf-8")))
    missing = []
    for name in names:
        found: Any = hf_rrd
        for part in name.strip(".").split("."):
            if inspect.ismodule(found) and not hasattr(found, part):
                with contextlib.suppress(ImportError):
                    importlib.import_module(f"{found.__name__}.{part}")
            found = getattr(found, part, None)
        if found is None:
            missing.append(f"hf_rrd{name}")
    assert missing == []


# ---- In the process that runs a section ----


def run(section: str) -> None:
    """Execute the blocks of a section in one namespace, in this process and folder."""
    blocks = SECTIONS[section]
    text = "\n".join(block.code for block in blocks)
    save_models(set(re.findall(r"[\"']([A-Za-z][\w-]*/[\w.-]+)[\"']", text)))
    names = names_at_hand(text)
    for block in blocks:
        if not reason_not_to_run(block):
            print(f"{block.section}, line {block.line}", file=sys.stderr)  # what a failure shows
            exec(compile("\n" * block.line + block.code, block.section, "exec"), names)


def save_models(names: set[str]) -> None:
    """Put small models into the cache of the Hub, under the names that the examples load."""
    from huggingface_hub import constants

    from tests.builders import tiny_bert, tiny_vit

    for name in names:
        folder = Path(constants.HF_HUB_CACHE, f"models--{name.replace('/', '--')}")
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("0" * 40)
        snapshot = folder / "snapshots" / ("0" * 40)
        if name.startswith("sentence-transformers/"):
            save_embedder(snapshot)
        elif re.search("vit|deit|dino|image", name):
            tiny_vit(width=16 if "tiny" in name or "small" in name else 24).save_pretrained(snapshot)
            image_processor().save_pretrained(snapshot)
        else:
            tiny_bert(width=16 if "tiny" in name or "small" in name else 24).save_pretrained(snapshot)
            tokenizer().save_pretrained(snapshot)


def save_embedder(folder: Path) -> None:
    """Put a small model of sentence-transformers into a folder."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Normalize, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    from tests.builders import tiny_bert

    tiny_bert(width=24).bert.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    SentenceTransformer(modules=[Transformer(str(folder)), Pooling(24, "cls"), Normalize()]).save(str(folder))


WORDS = ["a", "good", "bad", "film"]


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: place for place, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    words = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")


def image_processor() -> Any:
    from transformers import ViTImageProcessor

    return ViTImageProcessor(size={"height": 16, "width": 16})


def random_crop(image: Any, generator: Any) -> Any:
    import torch

    return image.crop((0, 0, 20, int(torch.randint(10, 20, (), generator=generator))))


def names_at_hand(text: str) -> dict[str, Any]:
    """What a reader of these examples has: models, data, processors and settings, of texts or of images."""
    import datasets
    import evaluate
    import torch
    import torch.nn.functional as F
    import transformers
    from PIL import Image

    from tests.builders import Images, tiny_bert, tiny_vit

    of_texts = "token" in text or "text" in text
    tiny = tiny_bert if of_texts else tiny_vit
    student, teacher = tiny(), tiny(width=24, layers=4, seed=1)
    labels = [number % 4 for number in range(24)]
    if of_texts:
        rows = {"text": [" ".join(WORDS[label:] + WORDS) for label in labels], "label": labels}
        dataset = datasets.Dataset.from_dict(rows)
        inputs = dict(tokenizer()(rows["text"][:3], return_tensors="pt", padding=True))
    else:
        pixels = Images(24).pixels
        dataset = datasets.Dataset.from_dict({"pixel_values": pixels.tolist(), "labels": labels})
        inputs = {"pixel_values": pixels[:3]}
    pictures = {"image": [Image.new("RGB", (20, 20), (10 * label, 0, 0)) for label in labels], "label": labels}
    with_pictures = datasets.Dataset.from_dict(pictures)
    args = hf_rrd.RelationalDistillationConfig(
        output_dir="out", max_steps=2, per_device_train_batch_size=8, report_to=[], save_strategy="no"
    )
    trainer = hf_rrd.RelationalDistillationTrainer(
        student if not of_texts else tiny_vit(),
        args,
        train_dataset=Images(24),
        teacher=teacher if not of_texts else tiny_vit(width=24, seed=1),
    )
    student.save_pretrained("student")  # as a finished run leaves it
    type(trainer).push_to_hub = lambda *_, **__: None  # there is no Hub here
    hf_rrd.results.measure.MOST = 3  # forwards that are timed
    return {
        **{name: getattr(hf_rrd, name) for name in hf_rrd.__all__},
        **{name: getattr(transformers, name) for name in re.findall(r"\bAuto\w+", text)},
        **{"torch": torch, "F": F, "transformers": transformers, "datasets": datasets, "evaluate": evaluate},
        **{"student": student, "teacher": teacher, "args": args, "trainer": trainer, "inputs": inputs},
        "batch": inputs | {"labels": torch.tensor(labels[:3])},
        **dict.fromkeys(("dataset", "validation", "train_dataset", "eval_dataset", "test_dataset"), dataset),
        "data": datasets.DatasetDict(train=dataset, test=dataset),
        **{"student_tokenizer": tokenizer(), "teacher_tokenizer": tokenizer(), "tokenizer": tokenizer()},
        **{"query": WORDS[0], "documents": WORDS},
        **{"processor": image_processor(), "train": with_pictures if "image" in text else dataset},
        "random_crop": random_crop,
        **{"student_embeddings": torch.randn(30, 16), "teacher_embeddings": torch.randn(30, 24)},
        **{"student_embedding": torch.randn(8, 192, requires_grad=True), "teacher_embedding": torch.randn(8, 384)},
    }
