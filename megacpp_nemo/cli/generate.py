"""`megacpp generate`: how a trained model goes on with a text.

The one command that runs a model. What that needs is imported once all words are read and the
checkpoint is found.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import logging
import math
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megacpp_nemo.cli.lower import to_json
from megacpp_nemo.cli.output import native_path
from megacpp_nemo.cli.usage import Parser, UsageError, whole_number
from megacpp_nemo.contract.errors import RuntimeRefusal

NEEDED = ("torch", "megatron", "nemo")
DRAWS = ("top_k", "top_p", "seed")


def parser(name: str) -> Parser:
    """Return what `megacpp generate` takes."""
    made = Parser(
        name,
        "RUN [--prompt TEXT | --prompt-file FILE] [--max-new-tokens N] [--temperature T] ...",
        "Print a prompt, and what the model of a run says behind it. RUN is the folder of a run,\n"
        "or one of its checkpoints, of any recipe and any parallel layout. The model is built on\n"
        "this process: on CUDA where it is, else on the CPU.\n\n"
        "Each token is the likeliest one, or drawn where there is a temperature. The end of the\n"
        "document ends it.",
        (
            'megacpp generate runs/nam56r_tiny --prompt "namespace at {"',
            "megacpp generate runs/nam56r_tiny --prompt-file main.cpp --temperature 0.8 --top-k 40",
            'megacpp generate runs/nam56r_tiny --step 240 --prompt "int " --format json',
        ),
        ("text", "json"),
        exact_text=True,
    )
    made.add("--prompt", metavar="TEXT", help="what to go on with")
    made.add("--prompt-file", metavar="FILE", help="read it from here; - is standard input")
    made.add(
        "--max-new-tokens",
        metavar="N",
        type=whole_number(1),
        help="64 by default, or as many as the model's context has room for",
    )
    made.add("--temperature", metavar="T", help="what logits are divided by; 0 (default) is greedy")
    made.add("--top-k", metavar="K", type=whole_number(1), help="draw from the K likeliest tokens")
    made.add("--top-p", metavar="P", help="draw from the likeliest, which sum up to P")
    made.add("--seed", metavar="N", type=whole_number(0), help="of the draws; 0 by default")
    made.add("--step", metavar="N", type=whole_number(0), help="which checkpoint; the newest one")
    return made


def run(given: argparse.Namespace) -> str:
    """Return the prompt and what the model says behind it, or all that is known of that.

    Raises:
        MegaCppError: If the words mean no run or no prompt, or the model cannot go on with it.
    """
    place = parser(given.command).one_word(given, "run")
    drawing = _drawing(given)
    prompt = _prompt(given)
    _require_packages()
    from megacpp_nemo.host.checkpoint_folder import find_checkpoint

    folder = find_checkpoint(native_path(place), given.step)
    said = _complete(folder, prompt, given.max_new_tokens, drawing)
    if given.format == "json":
        return to_json({"schema": 1, "checkpoint": str(folder), "prompt": prompt, **vars(said)})
    return f"{prompt}{said.text}\n"


def _complete(
    folder: Path, prompt: str, max_new_tokens: int | None, drawing: dict[str, Any]
) -> Any:
    with quiet():
        from megacpp_nemo.model.completion import complete
        from megacpp_nemo.model.sampling import Sampling

        return complete(folder, prompt, max_new_tokens=max_new_tokens, sampling=Sampling(**drawing))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what NeMo and Megatron print away from the output, all but errors."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _drawing(given: argparse.Namespace) -> dict[str, Any]:
    """Return how tokens are drawn, as `Sampling` takes it."""
    temperature = _number("--temperature", given.temperature, "a number, 0 or more", math.inf)
    nucleus = _number("--top-p", given.top_p, "a number above 0, up to 1", 1.0)
    if nucleus == 0:
        raise _no_number("--top-p", given.top_p, "a number above 0, up to 1")
    drawing = {"top_k": given.top_k, "top_p": nucleus, "seed": given.seed}
    useless = [name for name in DRAWS if drawing[name] is not None and not temperature]
    if useless:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in useless)
        raise UsageError(
            "Without a temperature nothing is drawn: each token is the likeliest one",
            given=f"{options} and no --temperature above 0",
            allowed="a temperature above 0 with it",
            hint="--temperature 0.8",
        )
    return {"temperature": temperature or 0.0, **drawing, "seed": given.seed or 0}


def _number(option: str, text: str | None, allowed: str, most: float) -> float | None:
    """Return the number of an option, from 0 to `most`; None if it is not given."""
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= most or math.isinf(value):
        raise _no_number(option, text, allowed)
    return value


def _no_number(option: str, text: str, allowed: str) -> UsageError:
    return UsageError(
        f"{option} takes {allowed}",
        given=f"{option} {text}",
        allowed=allowed,
        hint=f"{option} 0.9",
    )


def _prompt(given: argparse.Namespace) -> str:
    """Return the prompt, from the words or from a file."""
    if (given.prompt is None) == (given.prompt_file is None):
        parser(given.command).refuse(
            "generate takes one prompt",
            "neither --prompt nor --prompt-file" if given.prompt is None else "both",
            hint='--prompt "int main("',
        )
    text = given.prompt if given.prompt_file is None else _read(given.prompt_file)
    if not text:
        raise UsageError(
            "The prompt is empty",
            given="no characters",
            allowed="one character or more",
            hint='--prompt "int main("',
        )
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(
            "The prompt is not UTF-8 text",
            given=repr(text[:40]),
            allowed="UTF-8 text",
            hint="iconv -t utf-8 on the text",
        ) from None
    return str(text)


def _read(file: str) -> str:
    try:
        if file == "-":
            data = sys.stdin.buffer.read() if hasattr(sys.stdin, "buffer") else b""
        else:
            data = Path(native_path(file)).read_bytes()
    except OSError as error:
        raise UsageError(
            "The file of a prompt cannot be read",
            given=f"{native_path(file)}: {(error.strerror or str(error)).lower()}",
            allowed="a text file, or - for standard input",
            hint="--prompt-file main.cpp",
        ) from None
    return data.decode("utf-8", "surrogateescape")


def _require_packages() -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise RuntimeRefusal(
            "Running a model needs packages that are not installed",
            given=f"no {', '.join(missing)}",
            allowed="an environment that models are trained in",
            hint="the Python that nemo is installed for",
        )
