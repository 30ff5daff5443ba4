"""`tgdpo judge`: verdicts of known judges on a local server, bad servers, a model as judge, rates by hand."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tgdpo.generation.journal import Journal
from tgdpo.judge import main
from tgdpo.judging import judges
from tgdpo.judging.statistics import bootstrap, first_place_rate, length_controlled, mean
from tgdpo.judging.verdicts import combine, parse_score, parse_winner

Reply = Callable[[str], "str | int | bytes"]
COUNT = 12
KEY = "sk-very-secret"


class Server(ThreadingHTTPServer):
    """Chat completions by a function of the prompt: a text, a status, or a raw body; keeps what it was asked."""

    daemon_threads = True

    def __init__(self, reply: Reply) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply = reply
        self.asked: list[dict[str, Any]] = []
        self.headers: list[str | None] = []
        self.released = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/v1/chat/completions"
        self.server.asked.append(body)
        self.server.headers.append(self.headers["Authorization"])
        made = self.server.reply(body["messages"][0]["content"])
        status = made if isinstance(made, int) else 200
        if isinstance(made, str):
            made = json.dumps({"choices": [{"message": {"role": "assistant", "content": made}}]}).encode()
        elif isinstance(made, int):
            made = f"the key {KEY} does\nnot please".encode()
        self.send_response(status)
        if status == 307:
            self.send_header("Location", "http://127.0.0.1:9/v1/chat/completions")
        self.send_header("Content-Length", str(len(made)))
        self.end_headers()
        self.wfile.write(made)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Reply], Server]]:
    monkeypatch.setattr(judges, "_WAITS", (0.001, 0.001))
    servers: list[Server] = []

    def start(reply: Reply) -> Server:
        servers.append(Server(reply))
        threading.Thread(target=servers[-1].serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.released.set()
        server.shutdown()
        server.server_close()


def alpaca(path: Path, name: str, text: Callable[[int], str], count: int = COUNT) -> Path:
    records = [{"instruction": f"question {i}", "output": text(i), "generator": name} for i in range(count)]
    path.write_text(json.dumps(records))
    return path


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    ours = alpaca(tmp_path / "ours.json", "ours", lambda i: f"good {i}" if i % 3 else f"bad {i}")
    base = alpaca(tmp_path / "base.json", "base", lambda i: f"fair {i}, at greater length")
    return ["--answers", str(ours), "--against", str(base)]


def run(files: list[str], url: str, out: Path, *options: str) -> int:
    return main([*files, "--judge", url, "--judge-model", "j", "--out", str(out), "--batch", "5", *options])


def results_of(out: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    lines = (out / "judgments.jsonl").read_text().splitlines()
    return json.loads((out / "results.json").read_text()), list(map(json.loads, lines))


def answer(prompt: str, letter: str) -> str:
    return prompt.split(f"=== Answer {letter} ===\n")[1].split("\n=== end")[0]


def by_quality(prompt: str) -> str:
    worth = {"good": 2, "fair": 1, "bad": 0}
    a, b = (worth[answer(prompt, letter).split()[0]] for letter in "AB")
    return f"A is one thing, B another.\n\n**Verdict:** {'A' if a > b else 'B'}"


def test_a_fair_judge(serve: Callable[[Reply], Server], files: list[str], tmp_path: Path,
                      capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setenv(judges.KEY_VARIABLE, KEY)
    server = serve(by_quality)
    assert run(files, server.url, tmp_path / "out") == 0
    results, judgments = results_of(tmp_path / "out")
    assert (results["wins"], results["ties"], results["losses"]) == (8, 0, 4)
    assert results["win_rate"]["value"] == pytest.approx(8 / 12)
    assert results["win_rate"]["low"] < 8 / 12 < results["win_rate"]["high"]
    assert (results["unparsable"], results["order_dependent"], results["first_place_rate"]) == (0, 0, 0.5)
    assert [judgment["question"] for judgment in judgments] == [f"question {i}" for i in range(COUNT)]
    assert judgments[0]["outcome"] == 0
    assert judgments[1]["outcome"] == 1
    assert results["mean_length"] == pytest.approx(np.mean([judgment["lengths"][0] for judgment in judgments]))
    assert server.asked[0]["model"] == "j"
    assert server.asked[0]["temperature"] == 0
    assert len(server.asked) == 2 * COUNT
    assert set(server.headers) == {f"Bearer {KEY}"}
    assert (tmp_path / "out/judge.png").read_bytes().startswith(b"\x89PNG")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"judgments.jsonl", "results.json", "judge.png"}
    said = capsys.readouterr()
    assert "66.7%" in said.out
    for file in ("judgments.jsonl", "results.json"):
        assert KEY not in (tmp_path / "out" / file).read_text() + said.out + said.err
    # A finished command asks nothing again.
    assert run(files, server.url, tmp_path / "out") == 0
    assert len(server.asked) == 2 * COUNT
    assert capsys.readouterr().out == said.out


def test_a_judge_that_likes_the_first_place(serve: Callable[[Reply], Server], files: list[str], tmp_path: Path) -> None:
    assert run(files, serve(lambda _: "[[A]]").url, tmp_path / "out") == 0
    results, judgments = results_of(tmp_path / "out")
    assert (results["wins"], results["ties"], results["losses"]) == (0, COUNT, 0)
    assert (results["order_dependent"], results["first_place_rate"], results["win_rate"]["value"]) == (1, 1, 0.5)
    assert {tuple(judgment["verdicts"]) for judgment in judgments} == {(1.0, 0.0)}


def test_replies_without_a_verdict_are_counted_and_left_out(
    serve: Callable[[Reply], Server], files: list[str], tmp_path: Path
) -> None:
    def reply(prompt: str) -> str:
        return "I cannot say." if "question 0\n" in prompt and "bad" in answer(prompt, "A") else by_quality(prompt)

    assert run(files, serve(reply).url, tmp_path / "out") == 0
    results, judgments = results_of(tmp_path / "out")
    assert results["unparsable"] == 1 / 24
    assert results["left_out"] == 1
    assert judgments[0]["outcome"] is None
    assert results["win_rate"]["value"] == pytest.approx(8 / 11)


def test_scores(serve: Callable[[Reply], Server], files: list[str], tmp_path: Path) -> None:
    server = serve(lambda prompt: "Score: 8" if "good" in prompt else "Score: 11")
    assert run(files[:2], server.url, tmp_path / "out") == 0
    results, judgments = results_of(tmp_path / "out")
    assert results["score"]["value"] == 8
    assert results["unparsable"] == pytest.approx(4 / 12)
    assert [judgment["score"] for judgment in judgments[:2]] == [None, 8]
    assert "against" not in results


@pytest.mark.parametrize(
    ("bad", "message", "tries"),
    [
        (503, "answers with status 503, 3 times", 3),
        (429, "answers with status 429, 3 times", 3),
        (400, "answers with status 400: the key (the key) does not please", 1),
        (307, "answers with status 307", 1),
        (b"{not json", "answers with something other than a chat completion, 3 times", 3),
        (b'{"choices": []}', "answers with something other than a chat completion, 3 times", 3),
        (b'{"choices": [{"message": {"content": 3}}]}', "other than a chat completion, 3 times", 3),
    ],
)
def test_servers_that_fail(
    serve: Callable[[Reply], Server], files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, bad: int | bytes, message: str, tries: int,
) -> None:  # fmt: skip
    monkeypatch.setenv(judges.KEY_VARIABLE, KEY)
    server = serve(lambda _: bad)
    assert run(files[:2], server.url, tmp_path / "out", "--batch", "1") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: http://127.0.0.1")
    assert message in line
    assert KEY not in line
    assert len(server.asked) == tries
    assert not (tmp_path / "out/results.json").exists()


def test_a_failure_that_passes(serve: Callable[[Reply], Server], files: list[str], tmp_path: Path) -> None:
    seen: set[str] = set()

    def reply(prompt: str) -> str | int:
        if prompt not in seen:
            seen.add(prompt)
            return 500
        return by_quality(prompt)

    assert run(files, serve(reply).url, tmp_path / "out") == 0
    assert results_of(tmp_path / "out")[0]["wins"] == 8


def test_a_server_that_is_too_slow(
    serve: Callable[[Reply], Server], files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = serve(lambda _: str(server.released.wait(60)))
    assert run(files[:2], server.url, tmp_path / "out", "--timeout", "0.2") == 1
    assert "gives no answer (timed out)" in capsys.readouterr().err


def test_no_server(files: list[str], serve: Callable[[Reply], Server], tmp_path: Path,
                   capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    server = serve(lambda _: "")
    server.shutdown()
    server.server_close()
    assert run(files, server.url, tmp_path / "out") == 1
    assert "gives no answer ([Errno 111] Connection refused), 3 times" in capsys.readouterr().err


def test_an_interrupted_run_asks_only_for_the_rest(
    serve: Callable[[Reply], Server], files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = Journal.append

    def stop_at_the_fourth(self: Journal, part: Any) -> None:
        if self.done == 3:
            raise KeyboardInterrupt
        append(self, part)

    server = serve(by_quality)
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", stop_at_the_fourth)
        assert run(files, server.url, tmp_path / "out") == 130
    before = len(server.asked)
    assert run(files, server.url, tmp_path / "out") == 0
    assert len(server.asked) - before == 2 * (COUNT - 3)
    assert run(files, server.url, tmp_path / "whole") == 0
    for name in ("judgments.jsonl", "results.json"):
        assert (tmp_path / "out" / name).read_text() == (tmp_path / "whole" / name).read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--judge", "http://judge.example/v1"], "is another machine, which would get all questions and answers"),
        (["--judge", "http://127.0.0.1.example/v1"], "is another machine"),
        (["--judge", "http://judge.example/v1", "--remote"], "would cross the network unencrypted"),
        (["--judge", "http://me:secret@localhost/v1"], "a URL must be like"),
        (["--judge", "http://127.0.0.1:x/v1"], "no URL"),
        (["--judge", "http://127.0.0.1/v1"], "--judge-model is missing"),
        (["--judge", "http://127.0.0.1/v1", "--judge-model", "j", "--nproc", "2"], "--nproc is for a model as judge"),
        (["--judge", "{tmp}/no"], "--judge {tmp}/no: no such directory"),
        (["--judge", "http://127.0.0.1/v1", "--against", "{tmp}/no"], "--against {tmp}/no: no such file"),
    ],
)
def test_wrong_options(files: list[str], tmp_path: Path, options: list[str], message: str,
                       capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setenv(judges.KEY_VARIABLE, KEY)
    words = [word.format(tmp=tmp_path) for word in options]
    assert main([*files, *words, "--out", str(tmp_path / "out")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert message.format(tmp=tmp_path) in line
    assert KEY not in line
    assert "secret" not in line


def test_a_key_that_no_header_can_hold(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                       monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setenv(judges.KEY_VARIABLE, KEY + "\n")
    assert run(files, "http://127.0.0.1:9/v1", tmp_path / "out") == 1
    said = capsys.readouterr().err
    assert judges.KEY_VARIABLE in said
    assert KEY not in said


def test_a_model_as_judge(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.tiny_models import make_llama  # imports torch, which nothing else here needs

    model = make_llama(tmp_path / "model", layers=2)
    command = ["--judge", str(model), "--max-new-tokens", "4", "--out"]
    assert main([*files, *command, str(tmp_path / "pairs")]) == 0
    results, judgments = results_of(tmp_path / "pairs")
    assert results["unparsable"] == 1
    assert results["win_rate"] is None
    assert len(judgments) == COUNT
    assert all(isinstance(reply, str) for judgment in judgments for reply in judgment["replies"])
    assert main([*files[:2], *command, str(tmp_path / "scores")]) == 0
    assert results_of(tmp_path / "scores")[0]["score"] is None
    assert "WARNING: 100.0% of the replies have no verdict that can be read" in capsys.readouterr().out


def write_lines(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_every_layout_of_answers(serve: Callable[[Reply], Server], tmp_path: Path,
                                 capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    server = serve(lambda _: "7")
    talk = [{"role": "user", "content": "Q1"}, {"role": "assistant", "content": {"answer": "T1"}}]
    today = write_lines(tmp_path / "today.jsonl", [{"uid": "u", "model": "m", "messages": talk}])
    assert run(["--answers", today], server.url, tmp_path / "today") == 0
    turns = [{"content": "T1", "token_len": 3}]
    old = write_lines(
        tmp_path / "old.jsonl", [{"question_id": "q", "model_id": "m", "choices": [{"index": 0, "turns": turns}]}]
    )
    asked = write_lines(tmp_path / "asked.jsonl", [{"question_id": "q", "turns": [{"content": "Q1"}]}])
    assert run(["--answers", old, "--questions", asked], server.url, tmp_path / "old") == 0
    assert server.asked[0] == server.asked[1]
    mt_bench = write_lines(
        tmp_path / "mt.jsonl", [{"question_id": 81, "model_id": "m", "choices": [{"index": 0, "turns": ["T1", "T2"]}]}]
    )
    asked = write_lines(tmp_path / "asked.jsonl", [{"question_id": 81, "category": "stem", "turns": ["Q1", "Q2"]}])
    assert run(["--answers", mt_bench, "--questions", asked], server.url, tmp_path / "mt") == 0
    prompt = server.asked[2]["messages"][0]["content"]
    assert prompt.index("Q1") < prompt.index("T1") < prompt.index("Q2") < prompt.index("T2")
    capsys.readouterr()
    assert run(["--answers", mt_bench], server.url, tmp_path / "none") == 1
    assert "mt.jsonl:1: the text of question 81 is not in the answers: name the benchmark's file with --questions" in (
        capsys.readouterr().err
    )


def test_answers_to_other_questions(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alpaca(tmp_path / "base.json", "base", str, COUNT - 1)
    assert run(files, "http://127.0.0.1:9/v1", tmp_path / "out") == 1
    assert "base.json: has no answer to the question of " in capsys.readouterr().err
    (tmp_path / "base.json").write_text('[{"instruction": "question 0", "text": "x"}]')
    assert run(files, "http://127.0.0.1:9/v1", tmp_path / "out") == 1
    assert "no answer to AlpacaEval, Arena-Hard or MT-Bench" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("reply", "winner"),
    [
        ("Verdict: A", 1), ("because.\nVerdict: B.", 0), ("**Verdict: tie**", 0.5), ("[[C]]", 0.5), ("b", 0),
        ("verdict: Assistant B", 0), ("Verdict: the tie", None), ("Verdict: A\nNo, wait.\nVerdict: B", 0),
        ("<think>Verdict: A</think>Verdict: B", 0), ("<think>Verdict: A and so on", None), ("", None),
        ("A good answer", None), ("Verdict: Both", None), ("Final verdict is: [[B]]", 0), ("The winner is A", 1),
    ],
)  # fmt: skip
def test_winners(reply: str, winner: float | None) -> None:
    assert parse_winner(reply) == winner


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("Score: 7", 7), ("**Score:** 7.5", 7.5), ("Rating: [[10]]", 10), ("8/10", 8), ("3", 3), ("Score: 0", None),
        ("Score: 11", None), ("Score: NUMBER", None), ("It has 3 faults.", None), ("Score: 4\nScore: 6", 6),
        ("<think>Score: 4</think>", None), ("Score: 9/10", 9),
    ],
)  # fmt: skip
def test_scores_in_replies(reply: str, score: float | None) -> None:
    assert parse_score(reply) == score


def test_verdicts_in_both_orders() -> None:
    assert [combine(pair) for pair in ([1, 1], [0, 0], [0.5, 0.5])] == [1, 0, 0.5]
    assert [combine(pair) for pair in ([1, 0], [0, 1], [1, 0.5], [0.5, 0])] == [0.5] * 4
    assert combine([1, None]) is None
    assert first_place_rate([[1, 0], [1, None]]) == 1
    assert first_place_rate([[0.5, None]]) is None


@pytest.mark.parametrize(("theta", "phi"), [(0.0, 3.0), (0.0, 0.0), (1.0, 2.0), (-0.7, 4.0)])
def test_the_length_controlled_rate_finds_the_truth(theta: float, phi: float) -> None:
    random = np.random.default_rng(1)
    differences = random.normal(400, 500, 20000)  # mostly longer: the plain rate is flattered
    truth = 1 / (1 + np.exp(-theta))
    scores = theta + phi * np.tanh(differences / differences.std(ddof=1))
    outcomes = (random.random(20000) < 1 / (1 + np.exp(-scores))).astype(float)
    found = length_controlled(outcomes, differences)
    assert found == pytest.approx(truth, abs=0.03)
    assert (outcomes.mean() > truth + 0.05) == (phi > 0)


def test_a_judge_that_likes_nothing_but_length_gives_one_half() -> None:
    differences = np.array([*range(1, 300), *range(-100, 0)], float)
    outcomes = (differences > 0).astype(float)
    assert outcomes.mean() > 0.7
    assert length_controlled(outcomes, differences) == pytest.approx(0.5, abs=0.02)
    swapped = length_controlled(1 - outcomes, -differences)
    assert swapped == pytest.approx(1 - length_controlled(outcomes, differences), abs=1e-6)


def test_lengths_that_say_nothing() -> None:
    outcomes = np.array([1.0, 1.0, 0.0, 0.5])
    assert length_controlled(outcomes, np.zeros(4)) == pytest.approx(outcomes.mean(), abs=0.01)
    assert length_controlled(outcomes, np.full(4, 7.0)) is None
    assert length_controlled(np.ones(50), np.arange(50.0)) > 0.7


def test_the_bootstrap_interval() -> None:
    values = np.array([0.0, 1.0] * 200)
    estimate = bootstrap(mean, values)
    # Half a 95% interval of a mean of 400 fair coins: 1.96 * 0.5 / 20.
    assert estimate.low == pytest.approx(0.5 - 0.049, abs=0.01)
    assert estimate.high == pytest.approx(0.5 + 0.049, abs=0.01)
    assert bootstrap(mean, values) == estimate
    assert bootstrap(mean, np.array([1.0])).low is None
