"""What reaches the terminal and the run's log file.

NeMo and Megatron print hundreds of lines before the first step. They stay in the run's log
file; the terminal gets their warnings, and what this package says of the run.
"""

from __future__ import annotations

import logging
import sys
import warnings

from tqdm import tqdm

# Said of every machine without CUDA libraries, on every start. What is used instead is in the
# log, in one line of ours.
KNOWN_WARNINGS = (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
)
# Harmless on the CPU runtime, where the two random states are one.
KNOWN_RECORDS = ("CPU RNG state changed within GPU RNG context",)


def _is_news(record: logging.LogRecord) -> bool:
    return record.getMessage() not in KNOWN_RECORDS


def ignore_known_warnings() -> None:
    """Keep the known import-time warnings of Megatron off the terminal."""
    for message in KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message=message)


def quiet_terminal() -> None:
    """Show only warnings of NeMo and Megatron on the terminal; their log files keep all."""
    for handler in logging.getLogger("nemo_logger").handlers:
        if getattr(handler, "stream", None) in (sys.stdout, sys.stderr):
            handler.setLevel(logging.WARNING)
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(_is_news)


class _AboveTheBar(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes whole lines where a progress bar may stand half drawn."""

    def emit(self, record: logging.LogRecord) -> None:
        """Take the bar away, write, and draw it again."""
        tqdm.write(self.format(record), file=self.stream)


def announce() -> logging.Logger:
    """Return this package's logger, showing its messages and writing them to NeMo's log file."""
    logger = logging.getLogger("megacpp_nemo")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    if not logger.handlers:
        terminal = _AboveTheBar(sys.stderr)
        terminal.setFormatter(logging.Formatter("megacpp_nemo: %(message)s"))
        logger.addHandler(terminal)
    for handler in logging.getLogger("nemo_logger").handlers:
        if isinstance(handler, logging.FileHandler) and handler not in logger.handlers:
            logger.addHandler(handler)
    return logger
