"""A vision-language model as comparator: is there anything in this frame that should not be?

The paper measures itself against GPT-4o. Any server that speaks the OpenAI chat protocol will do.
The prompt is ours, in the spirit of Elhafsi et al. 2023 (arXiv 2305.11307): list what is seen, ask
of each whether it could make the vehicle misbehave, then decide.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import cv2
import numpy as np
from tqdm import tqdm

from semantic_anomaly.errors import InputError, SemanticAnomalyError
from semantic_anomaly.evaluation import extras, provenance
from semantic_anomaly.evaluation.datasets import FrameTruth
from semantic_anomaly.evaluation.measures import frame_measures, latencies, truth_row
from semantic_anomaly.evaluation.published import Dataset
from semantic_anomaly.evaluation.reports import report_folder, write_json
from semantic_anomaly.evaluation.verdicts import PROMPT, parse_verdict
from semantic_anomaly.io.images import encode_jpeg
from semantic_anomaly.storage import atomic_write_bytes

RESULTS = "results.json"
WRITTEN = frozenset({RESULTS})
KEY_VARIABLE = "OPENAI_API_KEY"


class JudgeError(SemanticAnomalyError):
    """The language model cannot be asked at all."""


@dataclass(frozen=True)
class Judge:
    """A model behind an OpenAI-compatible endpoint; answers are kept, so that a run can go on.

    The key is taken from the environment alone, and is never written.

    Attributes:
        base_url: of the endpoint, such as http://localhost:8000/v1.
        model: its name there.
        answers: folder that keeps answers by digest of image, prompt, model and endpoint.
        parallel: requests at a time, >= 1.
        retries: of a request that met a busy or failing server, with back-off, >= 0.
        timeout_s: of a request, > 0.
        image_px: long side to which images are reduced, >= 64.
        prompt: what is asked.

    Raises:
        InputError: a number out of range.
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

    def ask(self, dataset: Dataset, progress: bool = True) -> list[dict[str, Any]]:
        """Return one row a frame: verdict, seconds, tokens; asked in parallel, in order.

        Raises:
            InputError: an image cannot be read.
            JudgeError: the endpoint cannot be reached, or refuses key, model or request.
            MissingPackageError: the package openai is not installed.
        """
        openai = extras.load("openai", extra="vlm")
        client = openai.OpenAI(
            base_url=self.base_url,
            # Servers of one's own ask for none, and the client does not start without.
            api_key=os.environ.get(KEY_VARIABLE) or "none",
            max_retries=self.retries,
            timeout=self.timeout_s,
        )
        self.answers.mkdir(parents=True, exist_ok=True)
        rows: list[dict[str, Any]] = []
        hide = None if progress else True
        pool = ThreadPoolExecutor(self.parallel)
        try:
            waiting = []
            with tqdm(total=len(dataset), desc="judge", unit="frame", disable=hide) as bar:
                for frame, truth, _ in dataset:
                    image = self._jpeg(frame.image)
                    waiting.append((truth, pool.submit(self._answer, client, openai, image)))
                    # Images of a whole set would not fit into memory.
                    while len(waiting) > 2 * self.parallel:
                        rows.append(_row(waiting[0][0], waiting.pop(0)[1].result()))
                        bar.update()
                for truth, answer in waiting:
                    rows.append(_row(truth, answer.result()))
                    bar.update()
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
        if (kept := _read(file)) is not None:
            return kept
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
            # Not kept: the next run asks again.
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
        answer = _taken(reply, time.monotonic() - begin)
        atomic_write_bytes(file, json.dumps(answer).encode())
        return answer


def judge_dataset(
    dataset: Dataset,
    judge: Judge,
    out: Path,
    *,
    price: tuple[float, float] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Ask of every frame, write results.json that `compare` takes, and return what it holds.

    Frames without a verdict are unknown: they count in no rate, and are counted apart.

    Args:
        dataset: images with ground truth.
        judge: whom to ask.
        out: folder to write; an earlier report of a judge is replaced.
        price: of a million tokens in and out, in one currency; None where it is not known.
        progress: show a progress bar on a terminal.

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
            "judge": {
                "model": judge.model,
                "base_url": judge.base_url,
                "prompt": judge.prompt,
                "image_px": judge.image_px,
            },
            "versions": provenance.versions(),
            "git_commit": provenance.git_commit(),
            "frames": rows,
        }
        write_json(folder / RESULTS, results)
    return results


def _taken(reply: Any, seconds: float) -> dict[str, Any]:
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
        kept = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return kept if isinstance(kept, dict) and "answer" in kept else None


def _row(truth: FrameTruth, answer: dict[str, Any]) -> dict[str, Any]:
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
