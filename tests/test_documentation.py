"""The examples in README, docs/ and docstrings of public names run, with small models and data under their names.

README's quick starts run as they stand, against a Hub on this machine. The other examples find what a reader of them
has, a student, a teacher, data, under the names that they use. What the pages name, of the package or of each other,
is there.
"""

import ast
import contextlib
import html.parser
import importlib
import inspect
import re
import runpy
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

import hf_rrd
from tests.loopback_hub import LoopbackHub
from tests.processes import ROOT, run_script

DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {path.relative_to(DOCS).with_suffix("").as_posix(): path for path in sorted(DOCS.rglob("*.md"))}

# Words of a block that is not run, each with the reason.
NOT_RUN: dict[str, str] = {}
# Pages whose blocks another file runs, and sees what comes of them.
RUN_ELSEWHERE = {
    "guides/heads": "tests/test_trainer_heads.py",
    "stories/half_of_minilm": "tests/examples/test_half_of_minilm.py",
}
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
    """All blocks of docs/ and of the docstrings of public names and their methods, by section."""
    pages = {name: page.read_text(encoding="utf-8") for name, page in PAGES.items() if name not in RUN_ELSEWHERE}
    found = [block for name, page in pages.items() for block in blocks_of(page, name)]
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


def test_docs_and_docstrings_have_examples_and_every_exception_is_one_of_them() -> None:
    blocks = [block for each in SECTIONS.values() for block in each]
    assert len([block for block in blocks if ":" in block.section]) >= 25
    assert len([block for block in blocks if ":" not in block.section]) >= 3
    for page, file in RUN_ELSEWHERE.items():
        assert PAGES[page].name in (ROOT / file).read_text(encoding="utf-8")
    assert [words for words in NOT_RUN if not any(words in block.code for block in blocks)] == []


QUICK_STARTS = {block.section.removeprefix("README: "): block.code for block in blocks_of(README, "README")}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackHub]:
    """A Hub with small models and data under the names that README's quick starts load."""
    folder = tmp_path_factory.mktemp("hub")
    run_script("-c", "from tests.test_documentation import save_hub; save_hub()", folder=folder)
    with LoopbackHub() as hub:
        for path in folder.glob("*s/*/*"):
            hub.publish(f"{path.parent.name}/{path.name}", path, kind=path.parent.parent.name)
        yield hub


@pytest.mark.parametrize("heading", QUICK_STARTS)
def test_a_quick_start_of_readme_runs_as_it_stands(heading: str, hub: LoopbackHub, tmp_path: Path) -> None:
    code = QUICK_STARTS[heading]
    (folder,) = re.findall(r"DistillationConfig\(\"([\w-]+)\"", code)
    fresh = hub.environment(tmp_path / "home", token=False)
    printed = run_script("-c", code, folder=tmp_path / "new", environment=fresh, seconds=120)
    assert hub.unhandled == []
    assert re.search(r"student .*teacher", printed.out.replace("\n", " ")) and "accuracy" in printed.out
    assert {"config.json", "model.safetensors"} < {path.name for path in (tmp_path / "new" / folder).iterdir()}
    assert "teacher" not in printed.err, printed.err  # a warning of ours


def test_readme_has_two_quick_starts_and_fits_in_nine_kilobytes() -> None:
    assert list(QUICK_STARTS) == ["A text classifier", "An image classifier"]
    assert len(README.encode()) <= 9000


def test_every_block_is_python_with_its_ends_and_heading() -> None:
    text = "# One\n```python\na = 1\n```\ntext\n## Two\n  ```python\n  # no heading\n  b = 2\n  ```\n```\n# c\n```\n"
    assert blocks_of(text, "x")[0] == Block("x: One", 2, "a = 1")
    assert [(block.section, block.code) for block in blocks_of(text, "x")[1:]] == [("x: Two", "# no heading\nb = 2")]


TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES.values()]


@pytest.mark.parametrize("file", TEXTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_name_of_the_package_in_a_text_is_there(file: Path) -> None:
    names = set(re.findall(r"\bhf_rrd((?:\.\w+)+)", file.read_text(encoding="utf-8")))
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


def anchors_of(text: str) -> set[str]:
    """What a link may have behind its `#`: the headings of a page, as GitHub and MyST write them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower().replace("`", "")).replace(" ", "-") for heading in headings}


def broken_links(file: Path) -> list[str]:
    """The links of a Markdown file to files that are not there, or to headings that they do not have."""
    broken = []
    for link in re.findall(
        r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", file.read_text(encoding="utf-8"), flags=re.DOTALL)
    ):
        target, _, anchor = link.partition("#")
        path = file.parent / target if target else file
        if "://" in target or target.startswith("mailto:"):
            continue
        if not path.exists() or (anchor and anchor not in anchors_of(path.read_text(encoding="utf-8"))):
            broken.append(link)
    return broken


@pytest.mark.parametrize("file", TEXTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_link_of_a_text_leads_somewhere(file: Path) -> None:
    assert broken_links(file) == []


def test_a_link_to_a_file_or_a_heading_that_is_not_there_is_broken(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# What `it` is\n[a](page.md#what-it-is) [b](page.md#what) [c](other.md) [d](https://x.y/z)\n")
    assert broken_links(page) == ["page.md#what", "other.md"]


def messages_of_the_package() -> list[str]:
    """The constant texts of its sources, an f-string's places as `…`."""
    found = []
    for path in (ROOT / "hf_rrd").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [str(each.value) if isinstance(each, ast.Constant) else "…" for each in node.values]
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_the_messages_of_the_page_on_errors_are_the_packages_own() -> None:
    page = PAGES["troubleshooting"].read_text(encoding="utf-8")
    quoted = re.findall(r"^### `` (.+) ``$", page, re.MULTILINE)
    messages = messages_of_the_package()
    parts = {quote: [part.strip() for part in quote.split("…") if len(part.strip()) > 2] for quote in quoted}
    lost = [quote for quote, each in parts.items() if not any(all(part in text for part in each) for text in messages)]
    assert len(quoted) >= 20
    assert lost == []


def test_the_guide_to_the_settings_says_when_to_turn_each() -> None:
    named = set(re.findall(r"{confval}`(\w+)`", PAGES["guides/settings"].read_text(encoding="utf-8")))
    ours = hf_rrd.RelationalDistillationConfig.__annotations__
    assert named == {name for name in ours if not name.startswith("_")}


@pytest.mark.parametrize("name", ["overview.svg", "relation.svg"])
def test_a_picture_is_what_its_script_draws(name: str) -> None:
    draw = runpy.run_path(str(DOCS / "pictures" / "draw.py"))["PICTURES"]
    assert set(draw) == {path.name for path in (DOCS / "pictures").glob("*.svg")}
    assert (DOCS / "pictures" / name).read_text(encoding="utf-8") == draw[name]()


def test_the_divergence_of_the_picture_is_that_of_the_loss() -> None:
    import torch

    from hf_rrd.losses.relational import relational_terms

    def rows(*degrees: float) -> torch.Tensor:
        angles = torch.tensor(degrees, dtype=torch.float64).deg2rad()
        return torch.stack([angles.cos(), angles.sin()], dim=-1)

    bank = rows(15, 42, 65, 100, 150, 215, 270, 320)
    _, divergence = relational_terms(rows(88), rows(55), bank, 0.1, 0.02)
    assert f">{float(divergence):.2f}<" in (DOCS / "pictures" / "relation.svg").read_text(encoding="utf-8")


class Page(html.parser.HTMLParser):
    """The links and the anchors of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.anchors: set[str] = {""}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.links.add(value)
            elif name == "id" and value:
                self.anchors.add(value)


@pytest.mark.slow
def test_the_documentation_is_built_without_a_warning_and_its_links_lead_somewhere(tmp_path: Path) -> None:
    pytest.importorskip("sphinx")
    from sphinx.cmd.build import main

    out = tmp_path / "html"
    assert main(["-W", "-n", "-q", "-d", str(tmp_path / "doctrees"), str(DOCS), str(out)]) == 0
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in out.rglob("*.html")}
    assert {path.relative_to(out).with_suffix("").as_posix() for path in pages} >= set(PAGES)
    broken = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:  # `data:` and what is elsewhere
                assert parts.scheme in ("data", "https", "http", "mailto"), link
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            known = pages[target].anchors if target in pages else {""}
            if not target.exists() or (parts.fragment not in known and target.suffix == ".html"):
                broken.append(f"{path.relative_to(out)}: {link}")
    assert broken == []
    # Whoever reads them needs no network: no script, no style and no font is loaded from elsewhere.
    loaded = re.compile(r"<(?:script|link|img)[^>]+(?:src|href)=\"(?:https?:)?//")
    assert [str(path) for path in pages if loaded.search(path.read_text(encoding="utf-8"))] == []


# ---- In the process that runs a section ----


def run(section: str) -> None:
    """Execute the blocks of a section in one namespace, in this process and folder."""
    blocks = SECTIONS[section]
    text = "\n".join(block.code for block in blocks)
    save_models(set(re.findall(r"[\"']([A-Za-z][\w-]*/[\w.-]+)[\"']", text)))
    save_files(text)
    names = names_at_hand(text)
    for block in blocks:
        if not reason_not_to_run(block):
            print(f"{block.section}, line {block.line}", file=sys.stderr)  # what a failure shows
            exec(compile("\n" * block.line + block.code, block.section, "exec"), names)


def save_files(text: str) -> None:
    """Write small data sets under the names of files and folders that the examples load as somebody's own."""
    from PIL import Image

    for name in re.findall(r'"(\w+\.csv)"', text):
        rows = (
            ["text", *["a good film"] * 3]
            if name == "others.csv"
            else ["text,label", "a good film,LABEL_0", *[f"film {number},LABEL_{number}" for number in range(4)]]
        )
        Path(name).write_text("\n".join(rows))
    for folder in re.findall(r'"imagefolder", data_dir="(\w+)"', text):
        for kind in ("cat", "dog"):
            Path(folder, "train", kind).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(Path(folder, "train", kind, "1.png"))


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


def save_hub() -> None:
    """Put what README's quick starts load into this folder, as `models/owner/name` and `datasets/owner/name`."""
    import datasets
    import torch
    from PIL import Image

    from tests.builders import tiny_bert, tiny_vit

    def named(model: Any, *names: str) -> Any:
        model.config.id2label = dict(enumerate(names))
        model.config.label2id = {name: number for number, name in enumerate(names)}
        return model

    def data(name: str, column: str, config: str, **columns: list[Any]) -> None:
        folder = Path("datasets", name)
        (folder / config).mkdir(parents=True)
        moods = datasets.ClassLabel(names=columns.pop("names"))
        for split in ("train", "validation", "test"):
            rows = datasets.Dataset.from_dict(columns).cast_column(column, moods)
            rows.to_parquet(folder / config / f"{split}-00000-of-00001.parquet")
        files = "".join(
            f"  - split: {split}\n    path: {config}/{split}-*\n" for split in ("train", "validation", "test")
        )
        (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: {config}\n  data_files:\n{files}---\n")

    def taught(model: Any, **inputs: Any) -> Any:
        """The model, once it knows the labels of these inputs."""
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(40):
            loss = model(**inputs).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert loss < 0.1
        return model

    moods, leaves = ["negative", "neutral", "positive"], ["angular_leaf_spot", "bean_rust", "healthy"]
    labels = [number % 3 for number in range(36)]
    texts = [f"{WORDS[label]} film" for label in labels]
    pictures = [Image.new("RGB", (20, 20), (100 * label, 0, 200 - 100 * label)) for label in labels]
    data("cardiffnlp/tweet_eval", "label", "sentiment", text=texts, label=labels, names=moods)
    data("AI-Lab-Makerere/beans", "labels", "default", image=pictures, labels=labels, names=leaves)

    big, small = "models/cardiffnlp/twitter-roberta-base-sentiment-latest", "models/google/bert_uncased_L-4_H-256_A-4"
    tokens = tokenizer(WORDS[::-1])(texts, return_tensors="pt")
    teacher = named(tiny_bert(width=24, seed=1, classes=3), *moods)
    taught(teacher, **tokens, labels=torch.tensor(labels)).save_pretrained(big)
    tokenizer(WORDS[::-1]).save_pretrained(big)
    tiny_bert().bert.save_pretrained(small)
    tokenizer().save_pretrained(small)

    big, small = "models/nateraw/vit-base-beans", "models/WinKawaks/vit-tiny-patch16-224"
    pixels = image_processor()(pictures, return_tensors="pt")
    teacher = named(tiny_vit(width=24, seed=1, classes=3), *leaves)
    taught(teacher, **pixels, labels=torch.tensor(labels)).save_pretrained(big)
    tiny_vit(classes=5).save_pretrained(small)
    for folder in (big, small):
        image_processor().save_pretrained(folder)


def tokenizer(words_of_it: list[str] = WORDS) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: place for place, word in enumerate(["[PAD]", "[UNK]", *words_of_it])}
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
        "teacher_processor": image_processor(),
        "random_crop": random_crop,
        **{"student_embeddings": torch.randn(30, 16), "teacher_embeddings": torch.randn(30, 24)},
        **{"student_embedding": torch.randn(8, 192, requires_grad=True), "teacher_embedding": torch.randn(8, 384)},
    }
