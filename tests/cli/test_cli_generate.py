"""`megacpp generate`: a tiny trained run goes on with a text."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Result
from tests.support.processes import in_process, in_processes
from tests.support.training import configure, small_recipe, train

PROMPT = "int float_3(auto a1) { return"
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp2_uneven": {"pipeline_model_parallel_size": 2, "pattern": "AEMEA|EMEAEMR"},
    "ep2": {"expert_model_parallel_size": 2},
}
RECIPES: dict[str, dict[str, Any]] = {
    "nam52": {"name": "nam52_tiny"},
    "sparse_attention": {"sparse_attention": True, "sparse_attention.indexer_topk": 4},
    "prediction_depth": {"model.mtp.num_layers": 1},
    "author_mamba": {"mamba": "author"},
    "input_side": {
        "ngram_hash": True,
        "model.embedding.ngram.table_size": 100,
        "structure": "core",
    },
    "bf16": {"precision": "bf16"},
}


def ended(words: tuple[str, ...], folder: Path) -> Result:
    """Run the command in this process, its output into files; return how it ended."""
    from megacpp_nemo.cli import main

    with open(folder / "out", "w") as out, open(folder / "err", "w") as err:
        # Both what Python prints, and what the libraries below it do.
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        sys.stdout, sys.stderr = out, err
        code = main(["generate", *words])
    return Result(code, (folder / "out").read_text(), (folder / "err").read_text())


@pytest.fixture
def generate(checkpoint: Path, tmp_path: Path) -> Callable[..., Result]:
    """Return `generate(*words) -> Result`, in a process of its own."""
    import megacpp_nemo.model.completion  # noqa: F401 - forked runs share the import

    def run(*words: str) -> Result:
        return in_process(ended, words, tmp_path)

    return run


@pytest.fixture
def copied(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint, to be damaged."""
    return Path(shutil.copytree(checkpoint, tmp_path / "run" / "checkpoints" / "step=2"))


def by_full_forward(checkpoint: Path, prompt: str, count: int) -> tuple[list[int], list[float]]:
    """Return greedy tokens and their log-probabilities, running the whole row each time."""
    import torch

    from megacpp_nemo.model.restored import restored

    with restored(checkpoint) as trained:
        row = torch.tensor([trained.tokenizer.text_to_ids(prompt)])
        said, logs = [], []
        for _ in range(count):
            positions = torch.arange(row.size(1)).expand_as(row)
            last = trained.model(row, positions, None)[0, -1].log_softmax(-1)
            said.append(int(last.argmax()))
            logs.append(float(last[said[-1]]))
            row = torch.cat((row, torch.tensor([[said[-1]]])), 1)
    return said, logs


def test_a_run_goes_on_with_a_prompt(generate: Any, checkpoint: Path) -> None:
    run = str(checkpoint.parent.parent)
    text = generate(run, "--prompt", PROMPT, "--max-new-tokens", "8")
    assert (text.code, text.err) == (0, "")
    found = json.loads(
        generate(run, "--prompt", PROMPT, "--max-new-tokens", "8", "--format", "json").out
    )
    assert text.out == f"{PROMPT}{found['text']}\n"
    tokens, logs = in_process(by_full_forward, checkpoint, PROMPT, 8)
    assert found["tokens"] == tokens
    assert found["log_probabilities"] == pytest.approx(logs, abs=1e-4)
    assert found["checkpoint"] == str(checkpoint)
    assert (found["ended"], len(found["tokens"])) == (False, 8)
    assert found["seconds"] > 0 < found["load_seconds"]


def test_a_run_is_told_by_its_folder_its_checkpoint_or_its_step(
    generate: Any, checkpoint: Path
) -> None:
    run = checkpoint.parent.parent
    ways = ([run], [run / "checkpoints"], [checkpoint], [checkpoint / "weights"])
    said = [generate(*map(str, way), "--prompt", "int", "--max-new-tokens", "3") for way in ways]
    said.append(generate(str(run), "--step", "2", "--prompt", "int", "--max-new-tokens", "3"))
    assert len({result.out for result in said}) == 1
    assert {result.code for result in said} == {0}


def test_draws_are_repeated_by_their_seed(generate: Any, checkpoint: Path) -> None:
    def drawn(seed: str) -> str:
        words = ("--temperature", "1", "--top-k", "40", "--top-p", "0.95", "--seed", seed)
        return str(generate(str(checkpoint), "--prompt", PROMPT, *words).out)

    first = drawn("1")
    assert first == drawn("1")
    assert first != drawn("2")


def test_a_prompt_comes_from_a_file(generate: Any, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt").write_text("ünt\n\tfloat")
    words = (str(checkpoint), "--prompt-file", str(tmp_path / "prompt"), "--max-new-tokens", "2")
    assert generate(*words).out.startswith("ünt\n\tfloat")


def an_ended_document(checkpoint: Path) -> Any:
    """Complete the empty document with a model that ends it after a word."""
    from megacpp_nemo.model import completion
    from megacpp_nemo.model.generation import Generated

    def say(model: Any, prompt_ids: Any, **settings: Any) -> Generated:
        return Generated(
            tokens=[[*prompt_ids, 300, settings["end_id"]]], log_probabilities=[[0.0] * 3]
        )

    completion.generate = say
    return completion.complete(checkpoint, "<|endoftext|>")


def test_the_end_of_the_document_is_told_and_not_printed(checkpoint: Path) -> None:
    said = in_process(an_ended_document, checkpoint)
    end = said.prompt_tokens[0]
    assert said.tokens == [end, 300, end]
    assert said.ended
    assert said.text.startswith("<|endoftext|>")
    assert not said.text.endswith("<|endoftext|>")


def test_without_a_number_the_context_is_not_overrun(generate: Any, checkpoint: Path) -> None:
    words = (str(checkpoint), "--prompt", "int " * 10, "--format", "json")
    found = json.loads(generate(*words).out)
    assert len(found["prompt_tokens"]) + len(found["tokens"]) == 32


def check_whole(generate: Any, run: Path) -> None:
    """Assert that a run's model goes on with a prompt as its full forward pass does."""
    words = ("--prompt", PROMPT, "--max-new-tokens", "4", "--format", "json")
    said = generate(str(run), *words)
    assert said.code == 0, said.err
    found = json.loads(said.out)
    tokens, logs = in_process(by_full_forward, run / "checkpoints" / "step=2", PROMPT, 4)
    assert found["tokens"] == tokens
    assert found["log_probabilities"] == pytest.approx(logs, abs=1e-4)


@pytest.mark.two_process
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_of_two_processes_is_whole_here(
    layout: str, generate: Any, sources: Path, tmp_path: Path
) -> None:
    def run() -> None:
        intent = small_recipe(devices_per_node=2, **LAYOUTS[layout])
        train(configure(intent, sources, tmp_path / layout, steps=2))

    in_processes(run, ranks=2)
    check_whole(generate, tmp_path / layout)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_of_any_recipe_goes_on(
    recipe: str, generate: Any, sources: Path, tmp_path: Path
) -> None:
    def run() -> None:
        intent = small_recipe(**RECIPES[recipe])
        train(configure(intent, sources, tmp_path / "run", steps=2))

    in_process(run)
    check_whole(generate, tmp_path / "run")


WRONG_WORDS = [
    ((), "takes one run"),
    (("a", "b", "--prompt", "x"), "takes one run"),
    (("RUN",), "takes one prompt"),
    (("RUN", "--prompt", "x", "--prompt-file", "y"), "takes one prompt"),
    (("RUN", "--prompt", ""), "The prompt is empty"),
    (("RUN", "--prompt", b"\xff\xfe".decode("utf-8", "surrogateescape")), "not UTF-8"),
    (("RUN", "--prompt-file", "no/such/file"), "cannot be read"),
    (("RUN", "--prompt", "x", "--temperature", "hot"), "--temperature takes a number"),
    (("RUN", "--prompt", "x", "--temperature", "-1"), "--temperature takes a number"),
    (("RUN", "--prompt", "x", "--temperature", "inf"), "--temperature takes a number"),
    (("RUN", "--prompt", "x", "--top-p", "0", "--temperature", "1"), "--top-p takes a number"),
    (("RUN", "--prompt", "x", "--top-p", "2", "--temperature", "1"), "--top-p takes a number"),
    (("RUN", "--prompt", "x", "--top-k", "0"), "--top-k takes a whole number"),
    (("RUN", "--prompt", "x", "--top-k", "4"), "--top-k and no --temperature"),
    (("RUN", "--prompt", "x", "--seed", "4", "--temperature", "0"), "--seed and no --temperature"),
    (("RUN", "--prompt", "x", "--max-new-tokens", "0"), "--max-new-tokens takes"),
    (("RUN", "--prompt", "x", "--step", "new"), "--step takes"),
]


@pytest.mark.parametrize(("words", "message"), WRONG_WORDS)
def test_wrong_words_are_told_before_anything_is_loaded(
    megacpp: Any, words: tuple[str, ...], message: str
) -> None:
    result = megacpp("generate", *words)
    assert (result.code, result.out) == (2, "")
    assert message in result.err
    assert all(part in result.err for part in ("given:", "allowed:", "try:"))


def test_a_place_without_a_checkpoint_is_refused(megacpp: Any, tmp_path: Path) -> None:
    result = megacpp("generate", str(tmp_path / "none"), "--prompt", "x")
    assert (result.code, "no such run" in result.err) == (3, True)
    (tmp_path / "run" / "checkpoints" / "step=7" / "weights").mkdir(parents=True)
    result = megacpp("generate", str(tmp_path / "run"), "--prompt", "x")
    assert (result.code, "no complete checkpoint" in result.err) == (3, True)
    (tmp_path / "run" / "checkpoints" / "step=7" / "weights" / "metadata.json").touch()
    result = megacpp("generate", str(tmp_path), "--prompt", "x")
    assert (result.code, "holds runs" in result.err) == (3, True)
    assert result.err.rstrip().endswith(str(tmp_path / "run"))


def test_an_unfinished_checkpoint_is_not_taken(megacpp: Any, copied: Path) -> None:
    copied.with_name("step=2-unfinished").touch()
    result = megacpp("generate", str(copied.parent.parent), "--prompt", "x")
    assert (result.code, "no complete checkpoint" in result.err) == (3, True)


def test_a_step_that_was_not_kept_is_refused(megacpp: Any, checkpoint: Path) -> None:
    result = megacpp("generate", str(checkpoint.parent), "--step", "5", "--prompt", "x")
    assert result.code == 3
    assert "no checkpoint of step 5" in result.err
    assert "allowed: step 2" in result.err


@pytest.mark.parametrize(
    ("prompt", "words", "message"),
    [
        ("int float " * 40, (), "leaves no room"),
        ("int", ("--max-new-tokens", "32"), "do not fit"),
        ("int<|endoftext|>float", (), "more than one document"),
    ],
)
def test_a_prompt_that_does_not_fit_is_refused(
    generate: Any, checkpoint: Path, prompt: str, words: tuple[str, ...], message: str
) -> None:
    result = generate(str(checkpoint), "--prompt", prompt, *words)
    assert (result.code, result.out) == (3, "")
    assert message in result.err
    assert all(part in result.err for part in ("given:", "allowed:", "try:"))


def another_model(copied: Path) -> None:
    context = copied / "context" / "io.json"
    context.write_text(context.read_text().replace("HybridConfig", "HybridModel"))


def another_recipe(copied: Path) -> None:
    context = copied / "context" / "io.json"
    assert "AEMEAEMEAEMR" in context.read_text()
    context.write_text(context.read_text().replace("AEMEAEMEAEMR", "AEMEAEMEAEMM"))


def no_context(copied: Path) -> None:
    (copied / "context" / "io.json").unlink()


def no_tokenizer(copied: Path) -> None:
    shutil.rmtree(copied / "context" / "tokenizer")


def broken_tokenizer(copied: Path) -> None:
    (copied / "context" / "tokenizer" / "tokenizer.json").write_text("{")


def missing_weights(copied: Path) -> None:
    next((copied / "weights").glob("*.distcp")).unlink()


def broken_weights(copied: Path) -> None:
    (copied / "weights" / ".metadata").write_bytes(b"nothing")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (another_model, "not of a model that is built here"),
        (another_recipe, "those of another model than its configuration"),
        (no_context, "not of a model that is built here"),
        (no_tokenizer, "no copy of its tokenizer"),
        (broken_tokenizer, "The tokenizer cannot be loaded"),
        (missing_weights, "weights of this checkpoint cannot be read"),
        (broken_weights, "weights of this checkpoint cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_refused(
    generate: Any, copied: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(copied)
    result = generate(str(copied), "--prompt", "int")
    assert (result.code, result.out) == (3, "")
    assert message in result.err
    assert "Traceback" not in result.err
