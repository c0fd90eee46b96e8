"""What a vision-language model is asked, and what its answer says."""

from __future__ import annotations

import json
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Verdict:
    """What the model said of a frame.

    Attributes:
        anomaly: None when the answer is no verdict: refused, cut off, or not the JSON asked for.
        confidence: in [0, 1], of the verdict.
        reason: its sentence, or why there is no verdict.
    """

    anomaly: bool | None
    confidence: float
    reason: str

    @property
    def score(self) -> float:
        """Return a score in [0, 1], above 0.5 for an anomaly."""
        signed = self.confidence if self.anomaly else -self.confidence
        # A verdict without confidence is a verdict all the same.
        return 0.5 + 0.5 * signed + (1e-6 if self.anomaly else -1e-6)


def parse_verdict(answer: str | None) -> Verdict:
    """Return the verdict of an answer; anything but the JSON asked for is none, never nominal.

    Args:
        answer: text of the model, None where it gave none.
    """
    if not answer:
        return Verdict(None, 0.0, "no answer")
    found = None
    decoder = json.JSONDecoder()
    for start in (i for i, letter in enumerate(answer) if letter == "{"):
        try:
            found, _ = decoder.raw_decode(answer, start)
        except (ValueError, RecursionError):
            continue
        if isinstance(found, dict) and "anomaly" in found:
            break
    if not isinstance(found, dict) or not isinstance(found.get("anomaly"), bool):
        return Verdict(None, 0.0, "the answer is not the JSON asked for")
    confidence = found.get("confidence")
    # NaN fails the comparison.
    if not isinstance(confidence, int | float) or not 0 <= confidence <= 1:
        return Verdict(None, 0.0, f"confidence: expected 0 to 1, found {confidence!r:.40}")
    return Verdict(found["anomaly"], float(confidence), str(found.get("reason", "")))
