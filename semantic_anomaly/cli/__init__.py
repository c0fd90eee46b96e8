"""The command `semantic-anomaly`: one module for each subcommand, imported when it is used."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import NamedTuple

from semantic_anomaly import __version__
from semantic_anomaly.errors import InputError, SemanticAnomalyError
from semantic_anomaly.storage import forbid_writing_by_all

DONE, FAILED, BAD_INPUT, INCOMPLETE = 0, 1, 2, 3
INTERRUPTED, TERMINATED = 130, 143
_EXIT_CODES = (
    "exit codes: 0 complete; 3 finished with losses, which are named, or requirements not met; "
    "2 bad input or usage; 1 any other failure"
)


class _Verb(NamedTuple):
    summary: str
    example: str


VERBS = {
    "build-index": _Verb(
        "build the index of nominal embeddings from nominal drives",
        "drives/monday 'drives/tuesday[0:600]' --out index",
    ),
    "merge-index": _Verb(
        "merge indexes of one camera, built from different drives, into one",
        "index_monday index_tuesday --out index",
    ),
    "calibrate": _Verb(
        "calibrate an index with its own nominal drives, or with others",
        "index --target-false-alarm-rate 0.01",
    ),
    "evaluate": _Verb(
        "evaluate the detector on labelled images; write results.json and a report",
        "labelled --index index --out report",
    ),
    "score-maps": _Verb(
        "evaluate the anomaly maps of any method", "report/maps labelled --out scored"
    ),
    "compare": _Verb("compare the results of evaluations", "report_a report_b"),
    "accept": _Verb(
        "check the results of an index against requirements, for continuous integration",
        "report replayed --requirements acceptance.yaml --junit acceptance.xml",
    ),
    "judge": _Verb(
        "ask a vision-language model about every frame, for comparison",
        "labelled --base-url http://localhost:8000/v1 --model m --out judged",
    ),
    "replay": _Verb(
        "run a bag, video or folder through the detector; write scores, curve and overlays",
        "drive_bag --index index --out replayed --topic /camera/image_raw",
    ),
    "sensitivity": _Verb(
        "paste things over held-out nominal frames; report which of them are found, and where",
        "index drives/sunday --out seen --compare index_800",
    ),
    "inspect-index": _Verb("check an index folder and print what it contains", "index --recall"),
    "backbone": _Verb(
        "load a backbone; print its hidden states, speed on this machine and recommended stages",
        "efficientnet_lite2",
    ),
    "explain": _Verb(
        "list the nominal entries nearest to a part of an image",
        "index missed.png --box 310 190 370 240 --out why.jpg",
    ),
    "add-nominal": _Verb(
        "add nominal frames to an index, to remove false alarms",
        "index drives/friday --frames 12,15-20 --note 'new bridge'",
    ),
    "retract": _Verb(
        "retract entries of an index, to find anomalies that it missed",
        "index --entries 12,15-20 --note 'a cow was in the drive'",
    ),
    "undo-edit": _Verb("undo an addition or a retraction", "index 2"),
    "synth": _Verb(
        "write drives on a synthetic street, with or without anomalies",
        "work/test --drives 2 --frames 80 --anomalies cow",
    ),
    "demo": _Verb("run everything, with the real node, on a synthetic street", "--out demo_output"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    It is one of `_EXIT_CODES`, 130: interrupted, or 143: terminated.

    Args:
        argv: arguments without the program's name; None: those of this process.
    """
    forbid_writing_by_all()
    arguments = sys.argv[1:] if argv is None else list(argv)
    # Signals may arrive at any moment, also before the command begins.
    try:
        with _termination_as_exception(), _messages_on_stderr():
            return _run(arguments)
    except _TerminationError:
        print("semantic-anomaly: terminated", file=sys.stderr)
        return TERMINATED
    except KeyboardInterrupt:
        print("semantic-anomaly: interrupted", file=sys.stderr)
        return INTERRUPTED


def _run(arguments: Sequence[str]) -> int:
    try:
        parsed = _parsed(arguments)
        code = int(module_of(parsed.verb).run(parsed))
        sys.stdout.flush()
        return code
    except SemanticAnomalyError as error:
        if "--debug" in arguments:
            traceback.print_exc()
        sentence = " ".join(str(error).split())
        print(f"semantic-anomaly: error: {sentence}", file=sys.stderr)
        return BAD_INPUT if isinstance(error, InputError) else FAILED
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else BAD_INPUT
    except BrokenPipeError:
        # The reader has closed the pipe (`| head`), and the interpreter would flush once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


def module_of(verb: str) -> ModuleType:
    """Return the module of a subcommand, imported when it is used: it has heavy imports."""
    return importlib.import_module(f"{__name__}.{verb.replace('-', '_')}")


def _parsed(arguments: Sequence[str]) -> argparse.Namespace:
    parser = _parser(arguments)
    parsed, rest = parser.parse_known_args(arguments)
    # Sources that may be left out are taken by argparse only where no option precedes them.
    if getattr(parsed, "sources", None) == [] and not any(item.startswith("-") for item in rest):
        parsed.sources = rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return parsed


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="semantic-anomaly",
        description="Semantic anomaly detection for cameras.",
        epilog=f"'semantic-anomaly COMMAND --help' describes a command. {_EXIT_CODES}.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    help_debug = "show where in the code an error arose"
    parser.add_argument("--debug", action="store_true", help=help_debug)
    verbs = parser.add_subparsers(dest="verb", metavar="COMMAND", required=True)
    asked = next((argument for argument in arguments if argument in VERBS), None)
    for name, verb in VERBS.items():
        sub = verbs.add_parser(
            name,
            help=verb.summary,
            description=verb.summary[0].upper() + verb.summary[1:] + ".",
            epilog=f"example: semantic-anomaly {name} {verb.example}; {_EXIT_CODES}",
            allow_abbrev=False,
        )
        sub.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=help_debug)
        if name == asked:
            module_of(name).add_arguments(sub)
    return parser


class _TerminationError(KeyboardInterrupt):
    """SIGTERM arrived: what is half-written is removed, as after Ctrl-C."""


@contextmanager
def _termination_as_exception() -> Iterator[None]:
    def terminate(*_: object) -> None:
        raise _TerminationError

    # Only the main thread may set handlers, and an embedding program may have one of its own.
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class _BesideProgressBars(logging.Handler):
    """Prints messages on stderr without tearing a progress bar apart."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        prefix = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        tqdm.write(prefix + record.getMessage(), file=sys.stderr)


@contextmanager
def _messages_on_stderr() -> Iterator[None]:
    log = logging.getLogger("semantic_anomaly")
    handler, level = _BesideProgressBars(), log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
