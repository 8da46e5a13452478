"""The story of one student: the script and the page are the same steps, they run, and print what is so."""

import re
import textwrap
from collections import Counter
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer

from hf_rrd.results.alignment import teacher_retrieval
from tests.examples.scripts import EXAMPLES
from tests.examples.test_benchmarks import save_minilm
from tests.processes import ROOT, run_script
from tests.test_documentation import blocks_of

PAGE = (ROOT / "docs" / "stories" / "half_of_minilm.md").read_text(encoding="utf-8")
SCRIPT = (EXAMPLES / "half_of_minilm.py").read_text(encoding="utf-8")
BLOCKS = [block.code for block in blocks_of(PAGE, "half_of_minilm")]
WORDS = "what is the name of a big old city in the north and who was king there".split()
SMALL = {"teacher_model_name_or_path": "minilm/model", "num_hidden_layers": "2", "min_count": "999", "max_steps": "2"}


# What the page does without: how the script is started, and the headings of its steps.
FRAME = (
    r'\A""""""\n\n|^from hf_rrd.training.arguments .*\n|^def main.*\n.*\n|^ +\(args,\) .*\n|^    # .*\n|^if __.*\n.*\n'
)


def lines_of(code: str) -> Counter[str]:
    return Counter(line.strip() for line in code.splitlines() if line.strip())


def test_the_page_has_the_steps_of_the_script_and_no_others() -> None:
    steps = re.sub(FRAME, "", SCRIPT.replace(SCRIPT.split('"""')[1], "", 1), flags=re.MULTILINE)
    blocks = [block.replace("args = Arguments()\n", "") for block in BLOCKS]
    for part in [part for block in blocks for part in re.split(r"\n\n\n", block)]:
        assert part in steps or textwrap.indent(part, "    ") in steps, part
    assert lines_of("\n".join(blocks)) == lines_of(steps)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MiniLM in small, and tables of sentences."""
    folder = tmp_path_factory.mktemp("story")
    save_minilm(folder / "minilm")
    generator = torch.Generator().manual_seed(0)

    def save(name: str, count: int, *texts: str, **numbers: int) -> None:
        drawn = torch.randint(len(WORDS), (len(texts), count, 6), generator=generator).tolist()
        rows = {
            text: [" ".join(WORDS[i] for i in each) for each in part] for text, part in zip(texts, drawn, strict=True)
        }
        rows |= {name: [place % most for place in range(count)] for name, most in numbers.items()}
        path = folder / "data" / f"{name}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        Dataset.from_dict(rows).to_csv(str(path))

    save("sst2/train", 40, "sentence", label=2)
    for split, count in (("train", 40), ("validation", 20), ("test", 20)):
        save(f"sentences/stsb_{split}", count, "sentence1", "sentence2", score=5)
        for name, classes in (("trec", 6), ("mr", 2)):
            save(f"sentences/{name}_{split}", count, "text", label=classes)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["script", "page"])
def test_half_of_minilm_runs_and_prints_what_the_saved_student_is_worth(kind: str, folder: Path) -> None:
    pytest.importorskip("onnxruntime")
    if kind == "script":
        flags = [word for name, value in SMALL.items() for word in (f"--{name}", value)]
        printed = run_script(EXAMPLES / "half_of_minilm.py", *flags, folder=folder).out
    else:
        given = ", ".join(f"{name}={value if value.isdigit() else repr(value)}" for name, value in SMALL.items())
        code = "\n".join(BLOCKS).replace("args = Arguments()", f"args = Arguments({given})")
        printed = run_script("-c", code, folder=folder).out
    out = folder / "out" / "half_of_minilm"
    student, teacher = (SentenceTransformer(str(each), device="cpu") for each in (out, folder / "minilm" / "model"))
    pairs = Dataset.from_csv(str(folder / "data" / "sentences" / "stsb_test.csv"), cache_dir=str(folder / "cache"))
    texts = [*dict.fromkeys([*pairs["sentence1"], *pairs["sentence2"]])]
    rows = (torch.tensor(each.encode(texts, normalize_embeddings=True)) for each in (student, teacher))
    found = [f"{100 * share:.1f}" for share in teacher_retrieval(*rows).values()]
    (line,) = (line for line in printed.splitlines() if re.match(r"│ student +│", line))
    assert [cell.strip() for cell in line.split("│")][-3:-1] == found
    assert len(student[0].tokenizer) < len(teacher[0].tokenizer)
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "| metric | data | value | without distillation |" in card and "| stsb |" in card
