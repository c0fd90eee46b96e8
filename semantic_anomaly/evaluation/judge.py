"""A vision-language model as baseline: it is asked whether a frame shows an anomaly.

The paper compares with GPT-4o. Any server with the OpenAI chat protocol can be used. The prompt
follows Elhafsi et al. 2023 (arXiv 2305.11307): list the objects, ask for each whether it could make
the vehicle misbehave, then decide.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import cv2
import numpy as np
from tqdm import tqdm

from semantic_anomaly.errors import InputError, SemanticAnomalyError
from semantic_anomaly.evaluation import extras, provenance
from semantic_anomaly.evaluation.checkpoint import report_folder, write_json
from semantic_anomaly.evaluation.datasets import FrameTruth
from semantic_anomaly.evaluation.layouts import Dataset
from semantic_anomaly.evaluation.metrics import frame_measures, latencies, truth_row
from semantic_anomaly.io.images import encode_jpeg
from semantic_anomaly.storage import atomic_write_bytes

RESULTS = "results.json"
WRITTEN = frozenset({RESULTS})
KEY_VARIABLE = "OPENAI_API_KEY"
PROMPT = """\
You watch the front camera of an automated vehicle. Its perception was tested on ordinary drives and
is safe there. Your task is to notice a semantic anomaly: something whose presence or arrangement
could make the vehicle misjudge the scene, such as an object that does not belong on or beside a
road, or familiar things in an unfamiliar relation (a traffic sign that is only a picture of one,
traffic lights that are cargo, a person where nobody should stand).

1. List the objects that matter for driving, and where each of them is or what it is attached to.
2. For each of them, consider whether it is what it seems to be, and in an ordinary place.
3. Decide. Weather, light, ordinary traffic and parked vehicles are not anomalies.

Answer with one JSON object and nothing else, "confidence" from 0.0 to 1.0:
{"objects": ["..."], "reason": "one sentence", "anomaly": true or false, "confidence": 0.5}"""


class JudgeError(SemanticAnomalyError):
    """The language model cannot be used."""


@dataclass(frozen=True)
class Verdict:
    """The answer of the model for a frame.

    Attributes:
        anomaly: None without a verdict: refused, cut off, or not the expected JSON.
        confidence: confidence of the verdict in [0, 1].
        reason: sentence of the model, or why there is no verdict.
    """

    anomaly: bool | None
    confidence: float
    reason: str

    @property
    def score(self) -> float:
        """Return a score in [0, 1], above 0.5 for an anomaly."""
        signed = self.confidence if self.anomaly else -self.confidence
        # A verdict with confidence 0 must still lie on its side of the threshold.
        return 0.5 + 0.5 * signed + (1e-6 if self.anomaly else -1e-6)


def parse_verdict(answer: str | None) -> Verdict:
    """Return the verdict of an answer; anything but the expected JSON is unknown, never nominal."""
    if not answer:
        return Verdict(None, 0.0, "no answer")
    content = None
    decoder = json.JSONDecoder()
    for start in (i for i, letter in enumerate(answer) if letter == "{"):
        try:
            content, _ = decoder.raw_decode(answer, start)
        except (ValueError, RecursionError):
            continue
        if isinstance(content, dict) and "anomaly" in content:
            break
    if not isinstance(content, dict) or not isinstance(content.get("anomaly"), bool):
        return Verdict(None, 0.0, "the answer is not the expected JSON")
    confidence = content.get("confidence")
    # NaN fails the comparison.
    if not isinstance(confidence, int | float) or not 0 <= confidence <= 1:
        return Verdict(None, 0.0, f"confidence: expected 0 to 1, found {confidence!r:.40}")
    return Verdict(content["anomaly"], float(confidence), str(content.get("reason", "")))


@dataclass(frozen=True)
class Judge:
    """A model behind an OpenAI-compatible endpoint; answers are cached, so a run can be resumed.

    The API key is read from the environment and never written.

    Attributes:
        base_url: URL of the endpoint, such as http://localhost:8000/v1.
        model: name of the model there.
        answers: folder that caches answers by digest of image, prompt, model and endpoint.
        parallel: number of parallel requests, >= 1.
        retries: retries of a request to a busy or failing server, with back-off, >= 0.
        timeout_s: timeout of a request in s, > 0.
        image_px: maximum long side of the images in px, >= 64.
        prompt: text sent with every image.

    Raises:
        InputError: a URL with a key in it, or a number out of range.
    """

    base_url: str
    model: str
    answers: Path
    parallel: int = 4
    retries: int = 4
    timeout_s: float = 60.0
    image_px: int = 1024
    prompt: str = PROMPT

    def __post_init__(self) -> None:
        parts = urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
            raise InputError(
                "judge: --base-url: expected http:// or https:// and a host, without a key in it; "
                f"the key is taken from {KEY_VARIABLE}"
            )
        least = {"parallel": 1, "retries": 0, "timeout_s": 1e-3, "image_px": 64}
        for name, bound in least.items():
            if not getattr(self, name) >= bound:
                raise InputError(f"judge: {name}: expected at least {bound:g}, found "
                                 f"{getattr(self, name):g}")  # fmt: skip

    def ask(self, dataset: Dataset, progress: bool = False) -> list[dict[str, Any]]:
        """Return one row a frame, in order: verdict, seconds, tokens.

        Raises:
            InputError: an image cannot be read.
            JudgeError: the endpoint cannot be reached, or refuses key, model or request.
            MissingPackageError: the package openai is not installed.
        """
        openai = extras.load("openai", extra="vlm")
        client = openai.OpenAI(
            base_url=self.base_url,
            # Local servers need no key, but the client does not start without one.
            api_key=os.environ.get(KEY_VARIABLE) or "none",
            max_retries=self.retries,
            timeout=self.timeout_s,
        )
        self.answers.mkdir(parents=True, exist_ok=True)
        rows: list[dict[str, Any]] = []
        pool = ThreadPoolExecutor(self.parallel)
        pending: deque[tuple[FrameTruth, Future[dict[str, Any]]]] = deque()
        disable = None if progress else True
        try:
            for frame, truth, _ in tqdm(dataset, "judge", unit="frame", disable=disable):
                # The images of a whole dataset do not fit into memory.
                if len(pending) == 2 * self.parallel:
                    rows.append(_row(*pending.popleft()))
                image = self._jpeg(frame.image)
                pending.append((truth, pool.submit(self._answer, client, openai, image)))
            rows.extend(_row(*asked) for asked in pending)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            client.close()
        return rows

    def _jpeg(self, image: np.ndarray) -> bytes:
        height, width = image.shape[:2]
        scale = self.image_px / max(height, width)
        if scale < 1:
            size = (max(1, round(width * scale)), max(1, round(height * scale)))
            image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        return encode_jpeg(image, 92)

    def _answer(self, client: Any, openai: Any, image: bytes) -> dict[str, Any]:
        parts = (image, self.prompt.encode(), self.model.encode(), self.base_url.encode())
        digest = hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts))
        file = self.answers / f"{digest.hexdigest()}.json"
        if (cached := _read(file)) is not None:
            return cached
        url = "data:image/jpeg;base64," + base64.b64encode(image).decode("ascii")
        content = [
            {"type": "text", "text": self.prompt},
            {"type": "image_url", "image_url": {"url": url}},
        ]
        begin = time.monotonic()
        try:
            reply = client.chat.completions.create(
                model=self.model,
                messages=[{"role": "user", "content": content}],
                temperature=0,
            )
        except (openai.RateLimitError, openai.InternalServerError, openai.APITimeoutError) as error:
            # Not cached: the next run asks again.
            return {"answer": None, "failure": type(error).__name__, "seconds": None}
        except openai.APIStatusError as error:
            raise JudgeError(
                f"'{self.base_url}' refuses the request for model '{self.model}' with status "
                f"{error.status_code}; the key is taken from {KEY_VARIABLE}"
            ) from error
        except openai.APIConnectionError as error:
            raise JudgeError(f"'{self.base_url}' cannot be reached: {error}") from error
        except (openai.OpenAIError, ValueError) as error:
            return {"answer": None, "failure": type(error).__name__, "seconds": None}
        answer = _answer_of(reply, time.monotonic() - begin)
        atomic_write_bytes(file, json.dumps(answer).encode())
        return answer


def judge_dataset(
    dataset: Dataset,
    judge: Judge,
    out: Path,
    *,
    price: tuple[float, float] | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Ask about every frame, write results.json for `compare`, and return its content.

    Frames without a verdict are unknown: they are counted apart and in no rate.

    Args:
        out: folder to write; an earlier report of a judge is replaced.
        price: price of a million input and output tokens; None: not known.

    Raises:
        InputError, JudgeError, MissingPackageError: as `Judge.ask`.
    """
    with report_folder(out, RESULTS, WRITTEN) as folder:
        rows = judge.ask(dataset, progress)
        counted = [row for row in rows if not row["ignored"]]
        known = [row for row in counted if row["decision"] != "unknown"]
        if not known:
            failures = sorted({row["reason"] for row in counted})
            raise JudgeError(f"model '{judge.model}': no verdict in {len(rows)} frames: {failures}")
        seconds = [row["seconds"] for row in rows if row["seconds"] is not None]
        tokens = [sum(row[name] or 0 for row in rows) for name in ("tokens_in", "tokens_out")]
        cost = None
        if price is not None:
            cost = sum(n * p for n, p in zip(tokens, price, strict=True)) / 1e6 / len(rows)
        results = {
            "dataset": dataset.name,
            "protocol": "language model",
            **frame_measures(known, 0.5),
            "threshold": 0.5,
            "frames_counted": len(counted),
            "frames_anomalous": sum(row["anomaly"] for row in counted),
            "frames_unknown": len(counted) - len(known),
            "latency_ms": latencies({"total": 1e3 * s} for s in seconds),
            "price_a_frame": cost,
            "judge": {n: getattr(judge, n) for n in ("model", "base_url", "prompt", "image_px")},
            "versions": provenance.versions(),
            "git_commit": provenance.git_commit(),
            "frames": rows,
        }
        write_json(folder / RESULTS, results)
    return results


def _answer_of(reply: Any, seconds: float) -> dict[str, Any]:
    choice = reply.choices[0] if getattr(reply, "choices", None) else None
    message = getattr(choice, "message", None)
    refusal = getattr(message, "refusal", None)
    usage = getattr(reply, "usage", None)
    return {
        "answer": None if refusal else getattr(message, "content", None),
        "failure": "refused" if refusal else None,
        "seconds": seconds,
        "tokens_in": getattr(usage, "prompt_tokens", None),
        "tokens_out": getattr(usage, "completion_tokens", None),
    }


def _read(file: Path) -> dict[str, Any] | None:
    try:
        cached = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return cached if isinstance(cached, dict) and "answer" in cached else None


def _row(truth: FrameTruth, pending: Future[dict[str, Any]]) -> dict[str, Any]:
    answer = pending.result()
    verdict = parse_verdict(answer["answer"])
    decisions = {None: "unknown", True: "anomaly", False: "nominal"}
    return {
        **truth_row(truth),
        "score": None if verdict.anomaly is None else verdict.score,
        "decision": decisions[verdict.anomaly],
        "reason": answer["failure"] or verdict.reason,
        "seconds": answer["seconds"],
        "tokens_in": answer.get("tokens_in"),
        "tokens_out": answer.get("tokens_out"),
    }
