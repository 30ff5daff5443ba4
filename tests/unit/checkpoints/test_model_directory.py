"""One answer to where a model directory keeps its files, for HF and Megatron directories alike."""

from pathlib import Path

import pytest

from megatron_tgdpo.checkpoints.model_directory import hf_directory, hf_files, is_megatron_checkpoint, model_files
from megatron_tgdpo.errors import DamageError, UserError
from megatron_tgdpo.models.hf_config import read_hf_config
from tests.checkpoints import save
from tests.tiny_models import make_llama


def test_a_folder_named_hf_makes_no_megatron_checkpoint(tmp_path: Path) -> None:
    """Config, tokenizer and weights come from one and the same place."""
    hf = make_llama(tmp_path / "model", layers=1)
    make_llama(hf / "hf", layers=2)
    assert not is_megatron_checkpoint(hf)
    assert hf_directory(hf) == hf
    assert read_hf_config(hf).num_hidden_layers == 1
    assert hf_files(hf)["config.json"] == (hf / "config.json").resolve()
    assert model_files(hf) == [hf / "config.json", hf / "model.safetensors"]


@pytest.mark.usefixtures("one_rank")
def test_a_megatron_checkpoint_without_its_hf_files_says_so(tmp_path: Path) -> None:
    hf = make_llama(tmp_path / "model", layers=1)
    save(tmp_path / "saved", {}, hf, {"dtype": "fp32"})
    assert hf_directory(tmp_path / "saved") == tmp_path / "saved" / "hf"
    assert read_hf_config(tmp_path / "saved").num_hidden_layers == 1
    (tmp_path / "saved" / "hf" / "config.json").write_text("{}")
    with pytest.raises(DamageError, match=r"hf/config\.json: its bytes are not those that were written"):
        read_hf_config(tmp_path / "saved")
    # Not taken from beside the tensors, where another model's may lie.
    (tmp_path / "saved" / "hf" / "config.json").rename(tmp_path / "saved" / "config.json")
    with pytest.raises(UserError, match=r"no config\.json there"):
        read_hf_config(tmp_path / "saved")
