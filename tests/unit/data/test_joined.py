"""Several datasets as one, and the grouping of an entry's files."""

from pathlib import Path

import numpy as np
import pytest

from megatron_tgdpo.data.dataset import open_or_preprocess
from megatron_tgdpo.data.joined import join, open_sources
from megatron_tgdpo.data.options import PreprocessOptions
from megatron_tgdpo.data.preprocess import preprocess
from megatron_tgdpo.data.sources import Source
from megatron_tgdpo.errors import UserError
from tests.unit.data.conftest import plain_record


@pytest.fixture
def files(write_jsonl) -> list[str]:
    return [
        write_jsonl([plain_record(10 * n + k, length=1 + k) for k in range(3 + n)], f"shard-{n}.jsonl")
        for n in range(3)
    ]


def test_joined_datasets_are_the_dataset_of_all_files(tmp_path: Path, hf_directory: str, files: list[str]) -> None:
    options = PreprocessOptions(hf_directory)
    apart = join([open_or_preprocess(file, options, str(tmp_path / "apart")) for file in files])
    together = open_or_preprocess(files, options, str(tmp_path / "together"))
    assert len(apart) == len(together) == 12
    assert np.array_equal(apart.lengths, together.lengths)
    for index in range(12):
        one, other = apart[index], together[index]
        assert (one.index, apart.source(index)) == (index, together.source(index))
        for side in ("prompt", "chosen", "rejected"):
            assert np.array_equal(getattr(one, side), getattr(other, side))
    assert apart.manifest["max_token_id"] == together.manifest["max_token_id"]
    for index in (-1, 12):
        with pytest.raises(IndexError):
            apart[index]
    apart.verify()
    damaged = Path(apart.files[3])
    damaged.write_bytes(damaged.read_bytes()[:-4] + b"\2\0\0\0")
    with pytest.raises(UserError, match="is damaged"):
        apart.verify()


def test_raw_files_of_one_weight_make_one_dataset(tmp_path: Path, hf_directory: str, files: list[str]) -> None:
    options, cache = PreprocessOptions(hf_directory), str(tmp_path / "cache")
    prefix = str(tmp_path / "prepared")
    preprocess([files[2]], prefix, options, progress=False)

    def opened(*sources: Source) -> list[tuple[int, float]]:
        return [(len(dataset), weight) for dataset, weight in open_sources(sources, options, cache)]

    assert opened(Source(files[0]), Source(files[1])) == [(7, 1.0)]
    assert opened(Source(files[0]), Source(files[1], weight=2.0)) == [(3, 1.0), (4, 2.0)]
    assert opened(Source(files[0]), Source(prefix), Source(files[1])) == [(3, 1.0), (5, 1.0), (4, 1.0)]
    assert opened(Source(prefix), Source(prefix)) == [(5, 1.0), (5, 1.0)]
    assert opened(Source(f"{tmp_path}/shard-*.jsonl")) == [(12, 1.0)]
