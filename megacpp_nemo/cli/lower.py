"""`megacpp lower` and `megacpp seams`: a recipe on a release of Megatron-LM."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from megacpp_nemo.cli.given import read_recipe
from megacpp_nemo.cli.usage import Parser, UsageError, add_recipe_options, add_release, whole_number
from megacpp_nemo.lowering.lower import Lowering, lower
from megacpp_nemo.lowering.policy import GRAPHS, VARIABLE, LaunchOptions
from megacpp_nemo.lowering.releases import DEFAULT_RELEASE

TAKES = "RECIPE [FIELD=VALUE ...] [--release R] [--mode M] [--format F] ..."
SEAM_KEYS = ("schema", "recipe", "release", "layers", "prediction", "seams")


def parser(name: str) -> Parser:
    """Return what `megacpp lower`, or `megacpp seams`, takes."""
    made = _seams_parser() if name == "seams" else _lower_parser()
    add_recipe_options(made)
    add_release(made, DEFAULT_RELEASE)
    if name == "lower":
        _add_launch(made)
    return made


def _lower_parser() -> Parser:
    return Parser(
        "lower",
        TAKES,
        "Print the command that trains a recipe with Megatron-LM, and what it leaves to others.\n\n"
        "A FIELD is a recipe's field by its path, or by an ending that no other field shares.",
        (
            "megacpp lower nam56r",
            "megacpp lower nam52 ngram_hash=false --release 0.19.0 --seams native-only",
            "megacpp lower nam56r_tiny corpus=indexed data_path=corpus/train \\",
            "    tokenizer_dir=corpus/tokenizer --format shell --out run.sh",
        ),
        ("text", "json", "md", "shell", "argv"),
    )


def _seams_parser() -> Parser:
    return Parser(
        "seams",
        TAKES,
        "Print everything in a recipe that Megatron-LM does not own on a release: who does, why,\n"
        "and what would have to hold for it to go.",
        ("megacpp seams nam56r", "megacpp seams nam56r --release 0.19.0 --format md"),
        ("text", "json", "md"),
    )


def _add_launch(made: Parser) -> None:
    made.add("--seams", metavar="S", default="spec", help="spec (default) or native-only")
    made.add("--cuda-graphs", metavar="PARTS", help=f"of {','.join(GRAPHS)}")
    made.add("--cache-dir", metavar="DIR", help="folder for compile caches and data indices")
    made.add("--data-workers", metavar="N", type=whole_number(0), help="data loader processes")
    made.add("--blackwell", action="store_true", help="the GPUs are Blackwell or later")
    made.add(
        "--env",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="a variable of the launch; may be given several times",
    )


def run(given: argparse.Namespace) -> str:
    """Return the lowering in the format asked for.

    Raises:
        MegaCppError: If the words mean no recipe, or the release cannot have it.
    """
    if not given.words:
        parser(given.command).refuse(
            f"{given.command} needs a recipe",
            "none",
            hint=f"megacpp {given.command} nam56r",
        )
    recipe = read_recipe(given.words[0], given.words[1:], given.mode)
    if given.command == "seams":
        return _seams(lower(recipe, release=release_of(given.release)), given)
    lowering = lower(
        recipe, release=release_of(given.release), seams=given.seams, launch=_launch(given)
    )
    return _lowering(lowering, given)


def release_of(text: str) -> str:
    """Return a release's name or path as the system's own calls take it."""
    from megacpp_nemo.cli.output import native_path

    return native_path(text)


def to_json(data: Any) -> str:
    """Return data as JSON, keys sorted: the same bytes everywhere."""
    return json.dumps(data, indent=2, sort_keys=True) + "\n"


def _lowering(lowering: Lowering, given: argparse.Namespace) -> str:
    """Return a lowering; what a format needs is imported only for it."""
    if given.format == "json":
        return to_json(lowering.to_dict())
    if given.format in ("shell", "argv"):
        from megacpp_nemo.cli.script import bare, script

        return script(lowering) if given.format == "shell" else bare(lowering)
    if given.format == "md":
        from megacpp_nemo.cli.markdown import lowering_markdown

        return lowering_markdown(lowering)
    from megacpp_nemo.cli.lowering_report import lowering_text

    return lowering_text(lowering, given.screen)


def _seams(lowering: Lowering, given: argparse.Namespace) -> str:
    if given.format == "json":
        whole = lowering.to_dict()
        return to_json({key: whole[key] for key in SEAM_KEYS})
    if given.format == "md":
        from megacpp_nemo.cli.markdown import seams_markdown

        return seams_markdown(lowering)
    from megacpp_nemo.cli.lowering_report import seams_text

    return seams_text(lowering, given.screen)


def _launch(given: argparse.Namespace) -> LaunchOptions:
    return LaunchOptions(
        cuda_graphs=() if given.cuda_graphs is None else _parts(given.cuda_graphs),
        blackwell=given.blackwell,
        cache_dir=given.cache_dir,
        data_workers=given.data_workers,
        environment=variables_of(given.env),
    )


def _parts(text: str) -> tuple[str, ...]:
    """Return the parts that `--cuda-graphs` lists."""
    parts = text.split(",")
    once = [part for part in dict.fromkeys(parts) if part]
    if once != parts:
        raise UsageError(
            "--cuda-graphs lists parts, each once",
            given=f"--cuda-graphs {text!r}",
            allowed=", ".join(GRAPHS) + ", with commas between",
            hint=f"--cuda-graphs {','.join(once) or 'attn'}",
        )
    return tuple(parts)


def variables_of(words: Sequence[str]) -> dict[str, str]:
    """Return the variables that `--env` words set."""
    environment: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not VARIABLE.fullmatch(name) or set(value) & set("\n\0"):
            raise UsageError(
                "A variable of the launch is NAME=VALUE",
                given=f"--env {word!r}",
                allowed="a name of letters, digits and _, then '=' and its value, one line",
                hint="--env NCCL_DEBUG=INFO",
            )
        if name in environment:
            raise UsageError(
                f"The variable {name} is given twice",
                given=f"--env {name}={environment[name]}, --env {word}",
                allowed="each variable once",
                hint=f"--env {word} alone",
            )
        environment[name] = value
    return environment
