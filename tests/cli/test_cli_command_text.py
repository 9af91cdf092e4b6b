"""The text of a command line: one argument a line as it is, or shell text as a shell reads it."""

from __future__ import annotations

import shlex
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacpp_nemo.cli.command_text import read_command
from megacpp_nemo.cli.script import bare, script
from megacpp_nemo.cli.shell_text import shell_lines
from megacpp_nemo.cli.usage import UsageError
from megacpp_nemo.contract import recipe
from megacpp_nemo.lowering.lower import lower

ODD = ("a#b", "# a", "a\\b", "a\\", "it's", '"a', "'", "a b", "a\u2028b", "a\x85b", "a\rb", "\r")
ODD += ("$HOME", "`a`", "a;b", "a|b>c", "~/a", "x.py", "--a b", "-h x", "\t", " ")
TEXT = st.text(st.characters(exclude_characters="\n\x00", codec="utf-8"), min_size=1)
FLAGS = st.from_regex(r"--[a-z][a-z0-9-]{0,8}", fullmatch=True)


@pytest.mark.parametrize("value", [value for value in ODD if value.strip()])
@pytest.mark.parametrize("form", [bare, script])
def test_what_lower_writes_is_read_as_it_was(value, form):
    changes = {"run_dir": value, "corpus": "indexed", "data_path": ("30", f"a{value}")}
    lowering = lower(recipe("nam56r_tiny", changes=changes))
    assert read_command(form(lowering)).arguments == list(lowering.command)


@given(st.lists(st.tuples(FLAGS, st.lists(TEXT.filter(lambda text: text[0] != "-"))), min_size=1))
def test_an_argument_vector_is_read_as_it_is_written(groups):
    words = [word for flag, values in groups for word in (flag, *values)]
    assert read_command("".join(f"{word}\n" for word in words)).arguments == words


@given(st.lists(TEXT | st.just("a\n\nb"), min_size=1))
def test_quoted_words_are_read_back(words):
    assert [word.text for word in shell_lines(shlex.join(words))[0]] == words


TORCHRUN = 'torchrun --nnodes 2 "$M/pretrain_mamba.py" '


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("--a\nx y\n--b\n", ["--a", "x y", "--b"]),
        ("--a=x y\n--b\n", ["--a=x", "y", "--b"]),
        ("--a\n--b=x y\n", ["--a", "--b=x y"]),
        ("--a\r\nx y\r\n", ["--a", "x y"]),
        ("--a 'x y' --b", ["--a", "x y", "--b"]),
        ("--a 1 \\\n  --b", ["--a", "1", "--b"]),
        ("--a 1 \\", ["--a", "1"]),
        ("--a 1\n--b 2\n", ["--a", "1", "--b", "2"]),
        ("--a 1\\\n2", ["--a", "12"]),
        ("--a b#c #d e\n# f\n--g 1", ["--a", "b#c", "--g", "1"]),
        (r'--a "x\"\\\$\y" b\ c', ["--a", r'x"\$\y', "b c"]),
        ("--a ''", ["--a", ""]),
        ("--a 'x'\"y\"z", ["--a", "xyz"]),
        ("--a cost$ 'x$y' M*?[a]", ["--a", "cost$", "x$y", "M*?[a]"]),
        (f"# note\n{TORCHRUN}\\\n--a", ["--a"]),
        (f"{TORCHRUN}--a x.py --b", ["--a", "x.py", "--b"]),
        ("torchrun --nnodes 2 pretrain_mamba.py --bf16", ["--bf16"]),
        ("python -u -m torch.distributed.run --nnodes=1 x.py --a", ["--a"]),
        ("A=$B srun -n 8 /opt/bin/python3.11 x.py --a", ["--a"]),
        ("set -eu\nexport A=$B\nexec ./x.py --a 1\necho done\n", ["--a", "1"]),
        ("--a 1 --save runs/x.py --b", ["--a", "1", "--save", "runs/x.py", "--b"]),
        ("", []),
        ("# nothing\n", []),
    ],
)
def test_text_is_read_by_lines_or_as_a_shell_would(text, arguments):
    assert read_command(text).arguments == arguments


@pytest.mark.parametrize(
    "text",
    [
        r"""--a b#c '#d' "e # f" \# g\\h""",
        r"""a'b'"c"\ d "$" "\a\"\$\`\\" '\' x\
y""",
        "a  b\tc # d",
    ],
)
def test_a_shell_hands_over_the_same_words(text):
    said = subprocess.check_output(["sh", "-c", f'printf "%s\\0" {text}'], text=True)
    assert [word.text for word in shell_lines(text)[0]] == said.split("\0")[:-1]


@pytest.mark.parametrize(
    ("launch", "sizes"),
    [
        ("torchrun --nnodes 2 --nproc-per-node 4", {"--nnodes": "2", "--nproc-per-node": "4"}),
        ("torchrun --nnodes=2 --nproc_per_node=4", {"--nnodes": "2", "--nproc-per-node": "4"}),
        ("torchrun --nproc-per-node gpu --standalone", {"--nproc-per-node": "gpu"}),
        ("torchrun --nnodes $NNODES --node_rank 0", {"--nnodes": "$NNODES"}),
        ("torchrun", {}),
    ],
)
def test_torchruns_sizes_are_read_in_every_spelling(launch, sizes):
    assert read_command(f"{launch} x.py --a").sizes == sizes


@pytest.mark.parametrize(
    ("text", "what", "given"),
    [
        ("--a $HOME/x --b", "A shell would put something else", "$HOME/x"),
        ('--a "$HOME" --b "`pwd`"', "A shell would put something else", '"$HOME" "`pwd`"'),
        ("--a `pwd`", "A shell would put something else", "`pwd`"),
        ("--a $'x'", "A shell would put something else", "$'x'"),
        ("--a ~/x {b,c} {1..3}", "A shell would put something else", "~/x {b,c} {1..3}"),
        ("x.py --a 2>&1 | tee log", "A shell would put something else", "2> & |"),
        ("x.py --a > log", "A shell would put something else", ">"),
        ("x.py --a; echo b", "A shell would put something else", ";"),
        ("x.py --a &", "A shell would put something else", "&"),
        ("x.py ${ARGS[@]}", "A shell would put something else", "${ARGS[@]}"),
        ("--a 'x", "The text of a command line cannot be read", "no closing quotation"),
        ('--a "x', "The text of a command line cannot be read", "no closing quotation"),
        ("x.py --a 1\n  --b 2", "A flag begins a line", "--b"),
        ("x.py --a\ny.py --b", "The text of a command line runs one .py script", "x.py, y.py"),
        ("srun --save x.py --b", "The text of a command line runs one .py", "srun --save x.py"),
        ("torchrun -m a.b --bf16", "The text of a command line runs one .py", "torchrun -m a.b"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(text, what, given):
    with pytest.raises(UsageError) as caught:
        read_command(text)
    assert caught.value.what.startswith(what)
    assert str(caught.value.given).startswith(given)
    assert None not in (caught.value.allowed, caught.value.hint)
