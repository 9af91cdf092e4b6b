"""Words the command does not take, recipes it cannot have, and help."""

from __future__ import annotations

import pytest

from megacpp_nemo.cli.usage import COMMANDS

NAMES = [command.name for command in COMMANDS]


@pytest.mark.parametrize("word", ["--help", "-h", "help"])
def test_help_lists_every_command(megacpp, word):
    result = megacpp(word)
    assert result.code == 0
    assert all(f"  {name} " in result.out for name in NAMES)


def test_no_arguments_print_help_and_are_wrong_usage(megacpp):
    result = megacpp()
    assert result.code == 2
    assert result.out == megacpp("--help").out


@pytest.mark.parametrize("name", NAMES)
def test_every_command_has_help_with_examples(megacpp, name):
    result = megacpp(name, "--release", "x", "--help")
    assert result.code == 0
    assert result.out.startswith(f"usage: megacpp {name} ")
    assert f"examples:\n  megacpp {name}" in result.out


def test_the_version_is_the_packages(megacpp):
    from megacpp_nemo import __version__

    assert megacpp("--version") == (0, f"megacpp {__version__}\n", "")


@pytest.mark.parametrize(
    ("words", "what", "hint"),
    [
        ("lowr nam56r", "No command is called 'lowr'", "lower"),
        ("-x", "There is no option -x before a command", "megacpp --help"),
        ("lower", "lower needs a recipe", "megacpp lower nam56r"),
        ("lower nam56r depth", "A change to a recipe is field=value", "depth=VALUE; "),
        ("lower nam56r =3", "A change to a recipe is field=value", "depth=VALUE; "),
        ("lower nam56r --formt json", "lower has no option --formt", "--format"),
        ("lower nam56r --format jso", "lower knows no --format 'jso'", "--format json"),
        ("lower nam56r --format", "--format needs a value", "megacpp lower --help"),
        ("lower nam56r --color sometimes", "lower knows no --color 'sometimes'", "--color auto"),
        ("lower nam56r --data-workers x", "--data-workers takes a whole number, 0", "--data-w"),
        ("lower nam56r --data-workers -1", "--data-workers takes a whole number, 0", "--data-w"),
        ("lift --release 0.16.1 --num-nodes 0 -- x", "--num-nodes takes a whole number, 1", "--n"),
        ("lower nam56r --env 1A=2", "A variable of the launch is NAME=VALUE", "--env "),
        ("seams nam56r --cuda-graphs attn", "seams has no option --cuda-graphs", "megacpp "),
        ("lift -- --lr 3", "lift needs --release", "megacpp lift --help"),
        ("lift --release 0.16.1", "lift takes a command line from", "--file FILE"),
        ("lift --release 0.16.1 --file /none", "The file of a command line cannot", "--file "),
        ("audit nam56r --from 0.16.1", "audit needs --to", "megacpp audit --help"),
        ("diff nam56r", "diff needs two recipes", "megacpp diff --help"),
        ("releases shw", "releases cannot 'shw'", "show"),
        ("releases show", "releases takes one release to show", "megacpp releases --help"),
        ("table none-such", "No setting has this", "megacpp table"),
        ("matrix x", "matrix takes no words", "megacpp matrix --help"),
        ("lower nam56r mode=author_dp --mode nemo_native", "The mode is given twice", "mode="),
        ("lower nam56r mode=author_dp mode=author_dp", "The mode is given twice", "mode="),
        ("lower nam56r:mode=author_dp mode=nemo_native", "The mode is given twice", "mode="),
        ("lower nam56r --release 0.16.1 --release 0.19.0", "--release is given twice", "--rel"),
        ("lower nam56r --format argv --format=json", "--format is given twice", "--format json"),
        ("lower nam56r --env A=1 --env A=1", "The variable A is given twice", "--env A=1 alone"),
        ("lower nam56r --cuda-graphs ,", "--cuda-graphs lists parts, each once", "--cuda-graphs a"),
        ("lower nam56r --cuda-graphs mamba,mamba", "--cuda-graphs lists parts", "--cuda-graphs m"),
        ("lower nam56r --cuda-graphs=", "--cuda-graphs lists parts", "--cuda-graphs attn"),
        ("lower nam56r --out=", "--out needs the name of a file", "--out FILE"),
        ("releases add x --out -", "releases add writes a file", "--out mine.json"),
        ("releases add x --out a/", "releases add writes a file", "--out mine.json"),
        *(
            (f"{words} -- --lr 1", f"{words.split()[0]} takes no words behind '--'", "megacpp ")
            for words in (
                *("lower nam56r", "seams nam56r", "audit nam56r --from 0.16.1 --to 0.19.0"),
                *("diff nam52 nam56r", "table", "matrix", "releases", "plasticity nam56r"),
            )
        ),
    ],
)
def test_wrong_usage_ends_with_2_and_a_hint(megacpp, words, what, hint):
    result = megacpp(*words.split())
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith(f"megacpp: {what}")
    assert f"\n  try:     {hint}" in result.err
    assert "\n  given:   " in result.err
    assert "\n  allowed: " in result.err


@pytest.mark.parametrize(
    ("words", "what", "hint"),
    [
        ("lower nam57r", "No recipe is called 'nam57r'", "nam56r"),
        ("lower nam56r dept=3", "No recipe field is called 'dept'", "depth"),
        ("lower nam56r num_heads=3", "Several recipe fields are called", "model.attention.num"),
        ("lower nam56r hidden_size=abc", "ModelShape.hidden_size cannot be", "hidden_size=3584"),
        ("lower nam56r a_ranks=1,x", "SparseAttentionShape.a_ranks cannot", "a_ranks=1,2,3,5,"),
        ("lower nam56r data_path=[1]", "Files.data_path cannot be", "data_path=[]"),
        ("lower nam56r lr=nan", "OptimizerSchedule.lr cannot be nan", "lr=0.0003"),
        ("lower nam56r depth=3 depth=4", "depth is changed twice", "only depth=4"),
        ("lower nam56r:depth=3 depth=4", "depth is changed twice", "only depth=4"),
        ("lower nam56r precision=fp7", "Unknown precision", "precision='fp8'"),
        ("lower nam56r --mode author", "Unknown parallelism mode", "--mode author_dp"),
        ("lower nam56r --release 0.19", "No Megatron-LM release is known", "0.19.0"),
        ("lower nam56r --seams native", "Unknown way to treat seams", "--seams native-only"),
        ("lower nam56r --seams native-only", "5 seams are left", "--seams spec"),
        ("lower nam56r --cuda-graphs atn", "No part to capture is called", "--cuda-graphs attn"),
        ("lower nam56r mode=", "Unknown parallelism mode", "--mode nemo_native"),
        ("lower nam56r --mode=", "Unknown parallelism mode", "--mode nemo_native"),
        ("lower nam56r --cache-dir=", "--cache-dir cannot be ''", "--cache-dir /"),
        (
            "lower nam52 pattern=G sparse_attention=false mtp.num_layers=0 --release 0.19.0 "
            "--cuda-graphs attn",
            "The model has no layers with attn to capture",
            "no --cuda-graphs",
        ),
        ("lower nam56r --release no.json", "The file of a Megatron-LM release", "another path"),
        ("diff nam56r nam53", "No recipe is called 'nam53'", "nam52"),
        ("releases show 0.20", "No Megatron-LM release is known", "0."),
        ("releases add /", "This is not a Megatron-LM source tree", "clone "),
        ("lift --release 0.16.1 -- --lr x", "Megatron-LM 0.16.1 does not take", "--lr X"),
    ],
)
def test_a_refusal_ends_with_3_and_a_hint(megacpp, words, what, hint):
    result = megacpp(*words.split())
    assert (result.code, result.out) == (3, "")
    assert result.err.startswith(f"megacpp: {what}")
    assert f"\n  try:     {hint}" in result.err


def test_one_seam_is_left_and_several_are(megacpp):
    words = ("lower", "nam52", "--release", "0.19.0", "--seams", "native-only")
    assert megacpp(*words).err.startswith("megacpp: 1 seam is left on Megatron 0.19.0:\n    ngram")
    assert "megacpp: 2 seams are left" in megacpp(*words, "structure=core").err


def test_nothing_behind_two_dashes_is_nothing(megacpp):
    assert megacpp("table", "rotary", "--") == megacpp("table", "rotary")


def test_a_variable_is_one_line(megacpp):
    result = megacpp("lower", "nam56r", "--env", "A=a\nb")
    assert result.code == 2
    assert "given:   --env 'A=a\\nb'" in result.err


@pytest.mark.parametrize("text", ["a\x1b[31mb", "a\x9bb", "a\u202eb", "a\rb", "a\x07b"])
def test_an_error_shows_control_characters(megacpp, text):
    for words in (("diff", text), ("lower", text), ("lower", "nam56r", "--env", text)):
        err = megacpp(*words).err
        assert text not in err
        assert err.isascii()


def test_an_error_is_painted_when_asked_for(megacpp):
    assert "\x1b[" in megacpp("lower", "nam57r", "--color", "always").err
    assert "\x1b[" not in megacpp("lower", "nam57r").err
    assert "\x1b[" not in megacpp("lower", "nam57r", "--color=never").err


def test_an_interrupt_ends_quietly(megacpp, monkeypatch):
    def interrupted(*args, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr("megacpp_nemo.cli.lower.lower", interrupted)
    assert megacpp("lower", "nam56r") == (130, "", "")
