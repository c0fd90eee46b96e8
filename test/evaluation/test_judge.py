"""The comparator against a real server that speaks the protocol; no model is asked."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from worlds.labelled_drive import make_dataset

from semantic_anomaly.cli import main
from semantic_anomaly.errors import InputError
from semantic_anomaly.evaluation.datasets import LabelledFolder
from semantic_anomaly.evaluation.judge import (
    KEY_VARIABLE,
    Judge,
    JudgeError,
    judge_dataset,
    parse_verdict,
)

pytest.importorskip("openai")
SECRET = "sk-of-nobody"
# No answer, and an answer when three requests have arrived.
HANG, TOGETHER = "hang", "together"


class Server(ThreadingHTTPServer):
    """Answers by the image: magenta is an anomaly.

    Attributes:
        script: what the next requests get instead: a status, a body, HANG or TOGETHER.
        always: what requests get after the script.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: list[Any] = []
        self.always: Any = None
        self.requests: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        self.closing = threading.Event()
        self.three = threading.Barrier(3)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append(asked)
            self.server.keys.add(self.headers["Authorization"])
            self.server.at_once += 1
            self.server.most_at_once = max(self.server.most_at_once, self.server.at_once)
            planned = self.server.script.pop(0) if self.server.script else self.server.always
        if planned == HANG:
            self.server.closing.wait()
        elif planned == TOGETHER:
            self.server.three.wait(30)
        with self.server.lock:
            self.server.at_once -= 1
        status, content = 200, planned
        if isinstance(planned, int):
            status, content = planned, {"error": {"message": "busy", "type": "x", "code": "x"}}
        elif not isinstance(planned, bytes | dict):
            content = spoken(verdict_of(asked))
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        with suppress(OSError):
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


def seen(asked: dict[str, Any]) -> np.ndarray:
    text, picture = asked["messages"][0]["content"]
    assert text["type"] == "text" and picture["type"] == "image_url"
    kind, _, content = picture["image_url"]["url"].partition(",")
    assert kind == "data:image/jpeg;base64"
    return cv2.imdecode(np.frombuffer(base64.b64decode(content), np.uint8), cv2.IMREAD_COLOR)


def verdict_of(asked: dict[str, Any]) -> str:
    blue, green, red = (seen(asked)[..., i].astype(int) for i in range(3))
    odd = bool(((red > 180) & (blue > 180) & (green < 100)).sum() > 20)
    verdict = {"objects": ["road"], "reason": "looked", "anomaly": odd, "confidence": 0.9}
    return f"Here it is:\n```json\n{json.dumps(verdict)}\n```"


def spoken(content: str | None, refusal: str | None = None) -> dict[str, Any]:
    message = {"role": "assistant", "content": content, "refusal": refusal}
    return {
        **{"id": "1", "object": "chat.completion", "created": 1, "model": "m"},
        "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
        "usage": {"prompt_tokens": 1000, "completion_tokens": 50, "total_tokens": 1050},
    }


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv(KEY_VARIABLE, SECRET)
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield server
        server.closing.set()
        server.shutdown()
        thread.join()


def asking(server: Server, folder: Path, **options: Any) -> Judge:
    return Judge(server.url, "m", folder / "answers", **{"retries": 3, **options})


def test_verdicts_become_the_same_results(server: Server, tmp_path: Path) -> None:
    dataset = LabelledFolder(make_dataset(tmp_path / "set", "..oo.i"))
    judge = asking(server, tmp_path, image_px=64)
    results = judge_dataset(dataset, judge, tmp_path / "out", price=(2.0, 10.0))
    assert (results["frame_auroc"], results["tpr"], results["fpr"]) == (1.0, 1.0, 0.0)
    assert (results["frames_counted"], results["frames_unknown"]) == (5, 0)
    assert [row["decision"] for row in results["frames"]][:4] == ["nominal"] * 2 + ["anomaly"] * 2
    assert results["price_a_frame"] == pytest.approx((1000 * 2 + 50 * 10) / 1e6)
    assert results["latency_ms"]["total"]["p50"] > 0
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results
    assert max(seen(server.requests[0]).shape) == 64
    assert server.keys == {f"Bearer {SECRET}"}
    written = [f for f in tmp_path.rglob("*") if f.is_file() and f.suffix == ".json"]
    assert len(written) > 5 and not any(SECRET in f.read_text() for f in written)


def test_answers_are_cached_to_resume_a_run(server: Server, tmp_path: Path) -> None:
    dataset = LabelledFolder(make_dataset(tmp_path / "set", "..oo.."))
    judge = asking(server, tmp_path, parallel=1, retries=0)
    server.script = [None, None, None, 401]
    with pytest.raises(JudgeError, match=f"status 401.*{KEY_VARIABLE}"):
        judge_dataset(dataset, judge, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    kept = len(list(judge.answers.iterdir()))
    assert 3 <= kept < 6
    server.requests.clear()
    first = judge_dataset(dataset, judge, tmp_path / "out")
    assert len(server.requests) == 6 - kept
    assert judge_dataset(dataset, judge, tmp_path / "out") == first
    assert len(server.requests) == 6 - kept
    # Answers to another prompt are cached apart.
    other = asking(server, tmp_path, prompt="Anything odd?")
    judge_dataset(dataset, other, tmp_path / "out")
    assert len(server.requests) == 12 - kept
    assert server.requests[-1]["messages"][0]["content"][0]["text"] == "Anything odd?"


def test_busy_servers_are_asked_again(server: Server, tmp_path: Path) -> None:
    dataset = LabelledFolder(make_dataset(tmp_path / "set", ".o"))
    server.script = [429, 500]
    results = judge_dataset(dataset, asking(server, tmp_path, parallel=1), tmp_path / "out")
    assert results["frames_unknown"] == 0 and len(server.requests) == 4


@pytest.mark.parametrize(
    ("planned", "reason"),
    [
        (429, "RateLimitError"),
        (503, "InternalServerError"),
        (spoken(None, "I cannot help with that"), "refused"),
        (spoken("The road is free."), "not the expected JSON"),
        ({"id": "1", "choices": []}, "no answer"),
        (b"<html>no JSON", ""),
    ],
)
def test_without_a_verdict_a_frame_is_unknown(
    server: Server, tmp_path: Path, planned: Any, reason: str
) -> None:
    dataset = LabelledFolder(make_dataset(tmp_path / "set", ".o."))
    server.script = [planned]
    judge = asking(server, tmp_path, parallel=1, retries=0)
    results = judge_dataset(dataset, judge, tmp_path / "out")
    first = results["frames"][0]
    assert first["decision"] == "unknown" and first["score"] is None
    assert reason in first["reason"]
    assert results["frames_unknown"] == 1
    # One nominal frame is left for the rate.
    assert (results["fpr"], results["tpr"]) == (0.0, 1.0)
    # A busy server is asked again; an answer without a verdict is cached.
    again = judge_dataset(dataset, judge, tmp_path / "out")
    busy = isinstance(planned, int | bytes)
    assert again["frames_unknown"] == (0 if busy else 1)


def test_a_frame_without_an_answer_in_time_is_unknown_and_asked_again(
    server: Server, tmp_path: Path
) -> None:
    dataset = LabelledFolder(make_dataset(tmp_path / "set", "."))
    server.script = [HANG]
    (row,) = asking(server, tmp_path, retries=0, timeout_s=0.2).ask(dataset)
    assert (row["decision"], row["reason"]) == ("unknown", "APITimeoutError")
    (row,) = asking(server, tmp_path).ask(dataset)
    assert row["decision"] == "nominal"


def test_requests_are_made_in_parallel_with_a_limit(server: Server, tmp_path: Path) -> None:
    dataset = LabelledFolder(make_dataset(tmp_path / "set", "." * 11 + "o"))
    server.always = TOGETHER
    results = judge_dataset(dataset, asking(server, tmp_path, parallel=3), tmp_path / "out")
    assert server.most_at_once == 3 and results["frames_unknown"] == 0
    assert [row["name"] for row in results["frames"]] == [t.file for t in dataset.truths]


def test_an_endpoint_that_is_not_there_is_named(tmp_path: Path) -> None:
    dataset = LabelledFolder(make_dataset(tmp_path / "set", ".o"))
    judge = Judge("http://127.0.0.1:9/v1", "m", tmp_path / "answers", retries=0)
    with pytest.raises(JudgeError, match=r"127\.0\.0\.1:9/v1' cannot be reached"):
        judge_dataset(dataset, judge, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_verdict_at_all_is_a_failure(server: Server, tmp_path: Path) -> None:
    dataset = LabelledFolder(make_dataset(tmp_path / "set", ".o"))
    server.always = spoken("no idea")
    with pytest.raises(JudgeError, match="no verdict in 2 frames"):
        judge_dataset(dataset, asking(server, tmp_path), tmp_path / "out")


@pytest.mark.parametrize(
    "url", ["localhost:8000", "ftp://host/v1", "http://key@host/v1", "https:///v1"]
)
def test_urls_that_cannot_be_or_hold_a_key_are_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(InputError, match="--base-url") as caught:
        Judge(url, "m", tmp_path)
    assert "key@" not in str(caught.value)
    with pytest.raises(InputError, match="timeout_s"):
        Judge("http://host/v1", "m", tmp_path, timeout_s=float("nan"))


@pytest.mark.parametrize(
    ("answer", "anomaly", "score"),
    [
        ('{"anomaly": true, "confidence": 0.5}', True, 0.75),
        ('so {x} then {"anomaly": false, "confidence": 1.0} end', False, 0.0),
        ('{"anomaly": true, "confidence": 0}', True, 0.5),
    ],
)
def test_verdicts_are_parsed(answer: str, anomaly: bool, score: float) -> None:
    verdict = parse_verdict(answer)
    assert verdict.anomaly is anomaly
    assert verdict.score == pytest.approx(score, abs=1e-5)
    assert (verdict.score > 0.5) is anomaly


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ('{"anomaly": "no", "confidence": 1}', "not the expected JSON"),
        ('{"anomaly": false, "confidence": 7}', "expected 0 to 1, found 7"),
        ('{"anomaly": false, "confi', "not the expected JSON"),
        ("", "no answer"),
    ],
)
def test_other_answers_are_unknown(answer: str, reason: str) -> None:
    verdict = parse_verdict(answer)
    assert verdict.anomaly is None and reason in verdict.reason


def test_the_command_and_the_comparison(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_dataset(tmp_path / "set", "..oo")
    argv = ["judge", str(root), "--base-url", server.url, "--model", "m", "--price", "1,2"]
    assert main([*argv, "--out", str(tmp_path / "judged")]) == 0
    text = capsys.readouterr().out
    assert "set, m: 4 frames" in text and "price a frame  0.001100" in text
    assert (tmp_path / "judged.answers").is_dir()
    assert main(["compare", str(tmp_path / "judged"), str(tmp_path / "judged")]) == 0
    assert "ms a frame" in capsys.readouterr().out
    (tmp_path / "prompt").write_text("Anything odd?")
    server.script = [spoken("no idea")]
    options = ["--prompt", str(tmp_path / "prompt"), "--parallel", "1"]
    assert main([*argv, "--out", str(tmp_path / "partial"), *options]) == 3
    assert "warning: no verdict for 00000.png\n" in capsys.readouterr().out
    assert main([*argv, "--out", str(tmp_path / "o"), "--price", "1"]) == 2
    assert "expected IN,OUT" in capsys.readouterr().err
    assert main([*argv, "--out", str(tmp_path / "o"), "--prompt", str(tmp_path / "x")]) == 2
