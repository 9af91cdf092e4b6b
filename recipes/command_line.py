"""NeMo-Run's command line, made to say what is wrong with an argument of our recipes.

Left alone, it has no word on an unknown recipe but "No matching factory", prints the whole
configuration twice for a misspelled override, takes a `model=` it cannot make sense of for the
path of a checkpoint, and drops an option it does not know. `install` wraps the method that reads
the arguments. What NeMo-Run understands stays as it is; what it does not becomes an error that
can be acted on. Nor does Fiddle append the whole configuration to an error of ours.

The reading also gives a data part that is named by `data=` the recipe's row length and batches,
and holds the levers among the callbacks to the rules of a recipe's own.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fiddle._src import reraised_exception
from nemo_run.cli import cli_parser
from nemo_run.cli.api import RunContext

from megacpp_nemo.contract import RECIPE_NAMES, MegaCppError, Parallelism
from megacpp_nemo.contract.rules import check_batch
from megacpp_nemo.contract.training import Batch
from megacpp_nemo.host.strategy import HybridStrategy
from megacpp_nemo.lowering.table import CONFIG, ROWS
from megacpp_nemo.recipes import explain, reading
from megacpp_nemo.recipes.corpora import keep_recipe_arguments
from megacpp_nemo.recipes.levers import check_levers


def install() -> None:
    """Explain wrong arguments from now on; a second call changes nothing."""
    reading.install()
    upstream, decorate = RunContext.parse_fn, reraised_exception.decorate_exception
    if getattr(upstream, "explains", False):
        return

    @functools.wraps(upstream)
    def parse_fn(self: RunContext, fn: Any, args: list[str], **defaults: Any) -> Any:
        name = explain.factory_name(self.factory or "")
        if not name or (name not in RECIPE_NAMES and name in explain.factories(fn)):
            return upstream(self, fn, args, **defaults)
        return read(lambda given: upstream(self, fn, given, **defaults), name, args)

    @functools.wraps(decorate)
    def decorate_exception(exception: Exception, message: str) -> Exception:
        return exception if isinstance(exception, MegaCppError) else decorate(exception, message)

    parse_fn.explains = True  # type: ignore[attr-defined]
    RunContext.parse_fn = parse_fn
    reraised_exception.decorate_exception = decorate_exception


def read(parse: Callable[[list[str]], Any], name: str, args: list[str]) -> Any:
    """Return the recipe that a command line describes.

    Args:
        parse: NeMo-Run's reader: the recipe with a list of overrides applied.
        name: The recipe's name.
        args: The overrides, each `PATH=VALUE`.

    Raises:
        MegaCppError: If there is no such recipe, an override does not fit it, the parallel sizes
            and the batch do not fit each other, or a lever would not act.
    """
    with _quiet():
        try:
            recipe = parse([])
        except ValueError as error:
            if str(error).startswith("No matching factory"):
                raise explain.unknown("recipe", name, RECIPE_NAMES, RECIPE_NAMES) from None
            raise
        explain.check_form(args)
        try:
            result = parse(args)
        except Exception:
            explain.overrides(recipe, args)
            raise
    for arg in args:
        path, _, value = arg.partition("=")
        if path == "model" and isinstance(result.model, Path):
            explain.part(result, path, value)
        if path == "data":
            keep_recipe_arguments(recipe.data, result.data)
    if _is_ours(result):
        check_sizes(result)
        check_levers(result)
    return result


def _is_ours(recipe: Any) -> bool:
    """Whether a recipe is trained as ours are: the rules speak of no other."""
    strategy = getattr(recipe.trainer, "strategy", None)
    return getattr(strategy, "__fn_or_cls__", None) is HybridStrategy


def check_sizes(recipe: Any) -> None:
    """Check parallel sizes and batch as a recipe's; NeMo has assertions for them.

    A recipe with devices that are not a number is not checked.

    Raises:
        RecipeError: If they do not fit each other.
    """
    sizes: dict[str, dict[str, Any]] = {"parallelism": {}, "batch": {}}
    for row in ROWS:
        group, _, field = row.field.rpartition(".")
        # What the model alone holds is no size, and the model may be the path of one.
        held = row.nemo and not row.nemo[0].startswith(CONFIG)
        if group in sizes and held and field not in sizes[group]:
            sizes[group][field] = explain.value_at(recipe, row.nemo[0])
    if isinstance(sizes["parallelism"]["devices_per_node"], int):
        check_batch(Batch(**sizes["batch"]), Parallelism(**sizes["parallelism"]))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep NeMo-Run from logging an error that is about to be raised in other words."""

    def is_news(record: logging.LogRecord) -> bool:
        return record.levelno < logging.ERROR

    logger = logging.getLogger(cli_parser.__name__)
    logger.addFilter(is_news)
    try:
        yield
    finally:
        logger.removeFilter(is_news)
