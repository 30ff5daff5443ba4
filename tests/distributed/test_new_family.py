"""The family that docs/adding_a_family.md declares works as the page says."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_tgdpo.errors import UserError
from megatron_tgdpo.models.families import family_of
from tests.distributed.worker_logits import LENGTHS, pack_tokens
from tests.launch import ROOT
from tests.processes import run_forked
from tests.tiny_models import make_model


def test_the_page_s_example_computes_what_transformers_does(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="GemmaForCausalLM"):
        family_of(["GemmaForCausalLM"])
    page = (ROOT / "docs" / "adding_a_family.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "gemma.py").write_text(block)
    hf = make_model(tmp_path / "hf", "gemma", tied=True, head_dim=32)
    run_forked("tests.distributed.worker_logits", [str(hf), str(tmp_path / "gemma.py"), str(tmp_path / "out")])
    logits = load_file(tmp_path / "out")["logits"]
    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32, attn_implementation="eager").eval()
    start = 0
    for length in LENGTHS:
        with torch.no_grad():
            wanted = model(pack_tokens()[None, start : start + length]).logits[0]
        assert (logits[start : start + length] - wanted).abs().max() / wanted.abs().max() < 1e-5
        start += length
