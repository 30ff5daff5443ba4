"""The examples of docs/extending.md, put where the page says into a copy of the package, train as the page says."""

import ast
import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from megatron_tgdpo.data.layouts import LAYOUTS
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.models.families import family_of
from tests import reference
from tests.launch import PATIENCE, ROOT, checked, environment
from tests.tiny_models import make_model

BETA = 0.3
# Which of two arguments won changes from record to record; lengths differ.
DEBATES = [
    {"topic": "w3 w4 w5", "pro": "w10 w11 w12 w13", "con": "w20 w21", "winner": "pro"},
    {"topic": "w6 w7", "pro": "w30 w31", "con": "w40 w41 w42 w43 w44", "winner": "con"},
    {"topic": "w8 w9 w3 w4", "pro": "w50", "con": "w60 w61 w62", "winner": "con"},
    {"topic": "w5", "pro": "w70 w71 w72", "con": "w80 w81 w82", "winner": "pro"},
]
END = 2  # </s>
_BLOCK = re.compile(r'^```python title="([\w/.]+)(?:: a row of (\w+)(, the first)?)?"\n(.*?)^```$', re.M | re.S)


def put_in_place(page: Path, package: Path) -> list[str]:
    """Writes a page's files and rows into a copy of the package; returns the names of the tables."""
    tables = []
    for name, table, first, code in _BLOCK.findall(page.read_text(encoding="utf-8")):
        file = package / name
        if not table:
            assert not file.exists(), f"{name} is there already"
            file.write_text(code, encoding="utf-8")
            continue
        tables.append(table)
        imports, _, row = code.rpartition("\n\n")
        file.write_text(with_row(file.read_text(encoding="utf-8"), table, row, imports, bool(first)), encoding="utf-8")
    return tables


def with_row(source: str, table: str, row: str, imports: str, first: bool) -> str:
    """A module's source with a row at an end of the table, and with what that imports."""
    (value,) = [
        node.value
        for node in ast.parse(source).body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == table
    ]
    assert value is not None
    lines = source.splitlines(keepends=True)

    def offset(line: int, column: int) -> int:
        return len("".join(lines[: line - 1])) + column

    if first:
        place = offset(value.lineno, value.col_offset) + 1
    else:
        place = offset(value.end_lineno or 0, value.end_col_offset or 0) - 1
    comma = "" if first or source[:place].rstrip().endswith((",", "{", "(")) else ","
    edited = f"{source[:place].rstrip()}{comma}\n{row.rstrip().removesuffix(',')},\n{source[place:]}"
    return edited.replace("\nfrom megatron_tgdpo", f"\n{imports}\nfrom megatron_tgdpo", 1) if imports else edited


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training of one step with all that the page adds: its directory, beside the models ``policy`` and ``reference``
    and its log."""
    root = tmp_path_factory.mktemp("extending")
    package = root / "package"
    shutil.copytree(ROOT / "megatron_tgdpo", package / "megatron_tgdpo", ignore=shutil.ignore_patterns("__pycache__"))
    tables = [
        table for page in ("extending", "adding_a_family") for table in put_in_place(ROOT / f"docs/{page}.md", package)
    ]
    assert sorted(tables) == ["ATTENTION_BACKENDS", "FAMILIES", "LAYOUTS", "LOGGERS", "METHODS"]
    for seed, role in enumerate(("policy", "reference")):
        make_model(root / role, "gemma", tied=True, head_dim=32, layers=2, seed=seed)
    (root / "debates.jsonl").write_text("".join(json.dumps(debate) + "\n" for debate in DEBATES))
    config: dict[str, Any] = {
        "model": {role: str(root / role) for role in ("policy", "reference")},
        "data": {"train": str(root / "debates.jsonl"), "max_length": 32, "workers": 1},
        "loss": {"method": "discopop", "beta": BETA},
        "batch": {"global_pairs": len(DEBATES)},
        "optimizer": {"lr": 1e-4, "clip_grad": 0.0},
        "precision": {"dtype": "fp32"},
        "parallel": {"device": "cpu", "timeout_minutes": 15},
        "train": {"steps": 1, "check_start": False},
        "output_dir": str(root / "run"),
    }
    (root / "config.yaml").write_text(yaml.safe_dump(config))
    done = subprocess.run(
        [sys.executable, "-m", "megatron_tgdpo.train", str(root / "config.yaml")],
        cwd=package,
        env={**environment(), "PYTHONPATH": str(package)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    (root / "log").write_text(checked(done, 1).stderr + done.stdout)
    return root / "run"


def logged(run: Path) -> dict[str, float]:
    (line,) = (run / "metrics.jsonl").read_text().splitlines()
    values: dict[str, float] = json.loads(line)
    return values


def test_loss_family_layout_and_attention_compute_what_plain_pytorch_does(run: Path) -> None:
    """transformers' model, whole logits, one response at a time, and DiscoPOP as its paper has it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run.parent / "policy")
    policy, frozen = (reference.load(run.parent / role) for role in ("policy", "reference"))

    def logratio(debate: dict[str, str], side: str) -> Tensor:
        prompt, response = (tokenizer(debate[key], add_special_tokens=False)["input_ids"] for key in ("topic", side))
        with torch.no_grad():
            fixed = reference.response_logps(frozen, prompt, [*response, END])
        return (reference.response_logps(policy, prompt, [*response, END]) - fixed).sum()

    losses = []
    for debate in DEBATES:
        won, lost = ("pro", "con") if debate["winner"] == "pro" else ("con", "pro")
        margin = BETA * (logratio(debate, won) - logratio(debate, lost))
        share = 1 / (1 + torch.exp(-margin / 0.05))
        losses.append((1 - share) * torch.log1p(torch.exp(-margin)) + share * torch.exp(-margin))
    loss = torch.stack(losses).mean()
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in policy.parameters() if p.grad is not None])
    values = logged(run)
    assert values["train/loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert values["train/grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert not any(name.startswith("guidance/") for name in values)


def test_the_attention_backend_was_used(run: Path) -> None:
    assert "core attention eager" in (run.parent / "log").read_text()


def test_the_logger_received_the_metrics(run: Path) -> None:
    with (run / "metrics.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    values = logged(run)
    assert {name: float(value) for name, value in row.items()} == {
        name: values[name] for name in ("step", "train/loss", "rewards/accuracies")
    }


def test_without_the_page_there_is_none_of_it() -> None:
    with pytest.raises(UserError, match="GemmaForCausalLM"):
        family_of(["GemmaForCausalLM"])
    assert "debate" not in LAYOUTS
