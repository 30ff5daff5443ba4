"""A fault of one rank is told to all of them, with its node's name, before anything is loaded."""

import json
import re
from pathlib import Path

from tests.processes import run_forked
from tests.tiny_models import make_llama


def test_every_rank_is_told_which_node_is_bad(tmp_path: Path) -> None:
    policy = make_llama(tmp_path / "policy", layers=1)
    arguments = [str(policy), str(tmp_path)]
    done = run_forked("tests.distributed.worker_preflight", arguments, processes=4)
    told = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(4)]
    assert all(each == told[0] for each in told)
    wanted = {
        "none": r"fine",
        "version": r"preflight: node node1: \S+ is missing there, \S+ elsewhere \(and .* more problems, see the log\)",
        "blind": rf"preflight: node node1: does not see what node node0 writes to {tmp_path}/blind",
        "disk": rf"preflight: node node1: what it writes to {tmp_path}/disk is not seen by node node0",
        "full-0": rf"{tmp_path}/full-0/.canary-\w+/first: cannot be written: No space left on device",
        "full-2": rf"rank 2: {tmp_path}/full-2/.canary-\w+/rank-2: cannot be written: No space left on device",
        "sum": r"preflight: node node1: the all-reduce of tp group \[2, 3\] gave a wrong sum on node1.*",
    }
    assert told[0].keys() == wanted.keys()
    for fault, message in wanted.items():
        assert re.fullmatch(message, told[0][fault]), told[0][fault]
        bad_nodes = tmp_path / fault / "bad_nodes"
        names_a_node = fault in ("version", "blind", "disk", "sum")
        assert bad_nodes.exists() == names_a_node
        if names_a_node:
            assert {line.split("\t")[0] for line in bad_nodes.read_text().splitlines()} == {"node1"}
        assert not list((tmp_path / fault).glob(".canary*"))
    for kind in ("tp", "dp", "ep"):
        assert len(re.findall(rf"preflight: all-reduce {kind}: 2 groups", done.stderr)) == 1 + 4
    assert "all-reduce expt" not in done.stderr  # the same ranks as others
