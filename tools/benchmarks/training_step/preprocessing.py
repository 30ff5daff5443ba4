"""Speed and memory of ``tgdpo.preprocess`` with a fast tokenizer."""

import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from megatron_tgdpo.errors import UserError
from tgdpo.child_processes import run_captured
from tools.benchmarks.training_step.measure import ROOT
from tools.benchmarks.training_step.preference_pairs import Source

# The tool in a process of its own; the last line is the seconds after imports and the largest resident set.
_CHILD = """
import json, sys, time
import megatron_tgdpo.data.preprocess
from tgdpo.preprocess import main
begun = time.perf_counter()
status = main(sys.argv[1:])
seconds = time.perf_counter() - begun
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]
print(json.dumps([seconds, int(peak) * 1024]))
sys.exit(status)
"""
_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


@dataclass(frozen=True)
class Pass:
    """One run over a file.

    Attributes:
        tokens: Of the dataset that was written; a prompt counts once.
        seconds: Without imports.
        peak_bytes: Largest resident set of the process, without its workers where there are several.
    """

    tokens: int
    seconds: float
    peak_bytes: int


def fast_tokenizer(source: Source, directory: Path) -> Path:
    """The source's tokenizer as a fast one of Hugging Face; a SentencePiece model is converted by transformers."""
    if source.tokenizer.is_dir():
        return source.tokenizer
    slow, fast = directory / "sentencepiece", directory / "fast"
    slow.mkdir()
    shutil.copyfile(source.tokenizer, slow / "tokenizer.model")
    (slow / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    (slow / "config.json").write_text(json.dumps({"model_type": "llama"}))
    tokenizer = AutoTokenizer.from_pretrained(slow, local_files_only=True, trust_remote_code=False)
    if not tokenizer.is_fast:
        raise UserError(f"{source.tokenizer}: transformers made no fast tokenizer of it")
    tokenizer.chat_template = _TEMPLATE
    tokenizer.save_pretrained(fast)
    return fast


def write_records(path: Path, records: list[dict[str, Any]], copies: int) -> None:
    """The records, over and over, a line each."""
    lines = "".join(json.dumps(record) + "\n" for record in records)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(copies):
            file.write(lines)


def preprocess_once(records: Path, tokenizer: Path, out: Path, workers: int) -> Pass:
    """Runs the tool over a file.

    Raises:
        RuntimeError: It failed.
    """
    arguments = ["--input", str(records), "--tokenizer", str(tokenizer), "--output", str(out), "--overwrite"]
    done = run_captured(
        [sys.executable, "-W", "ignore", "-c", _CHILD, *arguments, "--workers", str(workers)],
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"},
        cwd=ROOT,
    )
    if done.returncode:
        raise RuntimeError(f"tgdpo.preprocess failed:\n{done.stderr[-4000:]}")
    seconds, peak = json.loads(done.stdout.splitlines()[-1])
    lengths = json.loads(Path(f"{out}.manifest.json").read_text(encoding="utf-8"))["lengths"]
    return Pass(sum(lengths[part]["total"] for part in ("prompt", "chosen", "rejected")), seconds, peak)
