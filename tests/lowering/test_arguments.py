"""Argument vectors are read as the release's parser reads them, and dead flags are found."""

from __future__ import annotations

import argparse
import contextlib
import io
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megacpp_nemo.contract.errors import LoweringError
from megacpp_nemo.lowering.arguments import dead_flags, parse
from megacpp_nemo.lowering.releases import RELEASE_NAMES, Flag, Release, from_data, load_release

READERS = {"int": int, "float": float, "bool": bool}


def reference(release: Release) -> argparse.ArgumentParser:
    """argparse itself, with every flag of the release that has a reader of the standard library."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False, exit_on_error=False)
    for flag in release.canonical_flags().values():
        more: dict[str, Any] = {"dest": flag.dest, "default": argparse.SUPPRESS}
        names = flag.spellings
        if flag.action == "boolean_optional":
            more["action"] = argparse.BooleanOptionalAction
            names = tuple(name for name in names if not name.startswith("--no-"))
        elif flag.action != "store":
            more["action"] = flag.action
        else:
            more |= {"nargs": flag.nargs, "choices": flag.choices}
            more["type"] = READERS.get(flag.type or "str", str)
        parser.add_argument(*names, **more)
    return parser


REFERENCES = {name: reference(load_release(name)) for name in RELEASE_NAMES}


def by_argparse(name: str, argv: list[str]) -> dict[str, Any] | None:
    """What argparse sets, by dest; None if it refuses."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return vars(REFERENCES[name].parse_args(argv))
    except (argparse.ArgumentError, SystemExit):
        return None


def plain_type(flag: Flag) -> bool:
    return flag.action != "store" or flag.type in (None, "str", "enum_type_handler", *READERS)


WORDS = st.sampled_from(["x", "a b", "M*E-", "", "1", "-", "-5", "-.5", "x=y", "é", "1e-3"])


def texts(flag: Flag) -> st.SearchStrategy[str]:
    if flag.choices is not None:
        # None among them is a default's: no word says it.
        return st.sampled_from([str(choice) for choice in flag.choices if choice is not None])
    if flag.type == "int":
        return st.integers().map(str)
    if flag.type == "float":
        return st.floats(0, 1e6).map(repr) | st.just("-2.5")
    return WORDS


@st.composite
def vectors(draw: st.DrawFn) -> tuple[str, list[str]]:
    """A release and a valid vector of some of its flags, in any spelling."""
    name = draw(st.sampled_from(RELEASE_NAMES))
    flags = [flag for flag in load_release(name).canonical_flags().values() if plain_type(flag)]
    chosen = draw(st.lists(st.sampled_from(flags), max_size=8, unique_by=lambda flag: flag.dest))
    argv: list[str] = []
    for flag in chosen:
        spelling = draw(st.sampled_from(flag.spellings))
        if flag.action != "store":
            argv.append(spelling)
        elif flag.nargs is None and draw(st.booleans()):
            argv.append(f"{spelling}={draw(texts(flag))}")
        else:
            least, most = {None: (1, 1), "*": (0, 3), "+": (1, 3)}.get(flag.nargs, (3, 3))
            argv += [spelling, *draw(st.lists(texts(flag), min_size=least, max_size=most))]
    return name, argv


@settings(max_examples=150, deadline=None)
@given(vectors())
def test_a_valid_vector_is_read_as_argparse_reads_it(drawn):
    name, argv = drawn
    release = load_release(name)
    arguments = parse(argv, release)
    values = {
        release.flags[flag].dest: list(value) if isinstance(value, tuple) else value
        for flag, value in arguments.items()
    }
    assert values == by_argparse(name, argv)


@settings(max_examples=100, deadline=None)
@given(vectors())
def test_writing_a_vector_and_reading_it_again_changes_nothing(drawn):
    name, argv = drawn
    release = load_release(name)
    arguments = parse(argv, release)
    again = parse(arguments.argv, release)
    assert list(again.items()) == list(arguments.items())
    assert again.argv == arguments.argv


NOISE = st.sampled_from(
    """--bf16 --lr --spec --rotary-base --rampup-batch-size --normalization --lr=3 --bf16=1
    --seq-len --no -- 1 2.5 x -M -1 RMSNorm""".split()  # noqa: SIM905 - easier to read
)


@settings(max_examples=300, deadline=None)
@given(st.lists(NOISE, max_size=6))
def test_what_argparse_refuses_is_refused(argv):
    release = load_release("0.16.1")
    try:
        arguments = parse(argv, release)
    except LoweringError:
        # Also refused: a flag given twice, and a bare `--`.
        flags = [token.partition("=")[0] for token in argv if token.startswith("--")]
        assert by_argparse("0.16.1", argv) is None or len(set(flags) - {"--"}) < len(flags)
    else:
        expected = by_argparse("0.16.1", argv)
        assert expected is not None
        assert len(expected) == len(arguments)


def test_values_have_the_types_of_the_parser():
    arguments = parse(
        ["--lr", "3e-4", "--bf16", "--disable-bias-linear", "--spec", "a.b", "c", "--num-layers=4"],
        load_release("0.16.1"),
    )
    assert dict(arguments) == {
        "--lr": 3e-4,
        "--bf16": True,
        "--disable-bias-linear": False,
        "--spec": ("a.b", "c"),
        "--num-layers": 4,
    }
    assert arguments.argv[:2] == ("--lr", "3e-4")
    assert repr(arguments).startswith("Arguments({'--lr'")


def test_an_alias_becomes_the_canonical_flag():
    arguments = parse(["--persistent-save-interval", "5"], load_release("0.17.1"))
    assert arguments.argv == ("--save-interval", "5")


def test_a_pattern_that_begins_with_a_dash_is_joined():
    argv = ("--hybrid-override-pattern=-M",)
    assert parse(argv, load_release("0.16.1")).argv == argv


def test_a_flag_that_is_switched_off_keeps_its_spelling():
    release = load_release("0.18.2")
    arguments = parse(["--no-rl-partial-rollouts"], release)
    assert dict(arguments) == {"--rl-partial-rollouts": False}
    assert arguments.argv == ("--no-rl-partial-rollouts",)


@pytest.mark.parametrize(
    ("argv", "messages"),
    [
        ("--learning-rat 1", ["--learning-rat is not a flag of 0.16.1"]),
        ("--hybrid-layer-pattern M", ["but of 0.17.1, 0.18.2", "--hybrid-override-pattern"]),
        ("--seq-len 8", ["--seq-len", "not abbreviated", "write --seq-length"]),
        ("--lr", ["--lr needs exactly one value and has none"]),
        ("--lr 1 2", ["'2' belongs to no flag"]),
        ("x --bf16", ["'x' belongs to no flag"]),
        ("--bf16 yes", ["'yes' belongs to no flag"]),
        ("--bf16=yes", ["--bf16 takes no value"]),
        ("--rampup-batch-size 1 2", ["exactly 3 values and has 2"]),
        ("--rotary-base 500000.0", ["'500000.0', not a whole number"]),
        ("--lr fast", ["'fast', not a number"]),
        ("--moe-layer-freq many", ["not a whole number or a list expression"]),
        ("--normalization Norm", ["not one of its choices", "LayerNorm, RMSNorm"]),
        ("--lr 1 --lr 1", ["--lr is given twice"]),
        ("--lr 1 -- 2", ["-- is not a flag"]),
        ("--save-interval 1 --persistent-save-interval 1", ["sets the same as --save-interval"]),
        ("--hybrid-override-pattern -M", ["joined by '='", "-M is not a flag"]),
        ("--lr x --nope --bf16=1", ["'x', not a number", "--nope is not", "takes no value"]),
    ],
)
def test_a_wrong_vector_is_refused_with_everything_that_is_wrong(argv, messages):
    with pytest.raises(LoweringError) as error:
        parse(argv.split(), load_release("0.16.1"))
    for message in messages:
        assert message in str(error.value)


def test_two_flags_that_set_the_same_are_refused():
    argv = ["--yarn-correction-range-round-to-int", "--no-yarn-correction-range-round-to-int"]
    with pytest.raises(LoweringError, match="sets the same as"):
        parse(argv, load_release("0.19.0"))


def test_other_actions_of_a_tree_are_read():
    release = load_release("0.16.1")
    flags = {
        "--maybe": {"nargs": "?", "const": 7, "type": "int"},
        "--seven": {"action": "store_const", "const": 7},
        "--loud": {"action": "count"},
        "--sizes": {"type": "tuple_type"},
    }
    texts = {
        key: getattr(release, key)
        for key in ("name", "package_version", "commit", "entry_script", "pattern_flag")
    }
    data = {**texts, "num_layers_rule": "equals", "flags": flags, "dead": [], "symbols": {}}
    data |= dict.fromkeys(("deprecated_entry_scripts", "deprecated_pattern_flags", "notes"), ())
    data |= {"stage_separator": None, "mtp_separator": None, "stock_spec": ("a", "b")}
    mine = from_data({**data, "carries_spec": True, "replaced": {}})
    argv = ["--maybe", "--seven", "--loud", "--sizes", "(1,2)"]
    assert list(parse(argv, mine).values()) == [7, 7, 1, (1, 2)]
    assert dict(parse(["--maybe", "3"], mine)) == {"--maybe": 3}


PATTERN = {name: load_release(name).pattern_flag for name in RELEASE_NAMES}
OURS = "--spec megacpp_nemo.spec layers=le"
SINCE_17 = RELEASE_NAMES[2:]


def dead(name: str, argv: str) -> set[str]:
    """The dead flags of a vector in which `PATTERN` stands for the release's pattern flag."""
    release = load_release(name)
    argv = argv.replace("PATTERN", PATTERN[name])
    return {flag.flag for flag in dead_flags(parse(argv.split(), release), release)}


# flag, releases, a vector in which it is dead, one in which it is not
RULES = [
    ("--mamba-num-heads", RELEASE_NAMES, "PATTERN=** X 4", "PATTERN=M* X 4"),
    ("--num-experts", RELEASE_NAMES[1:], "PATTERN=M* X 4", "PATTERN=ME X 4"),
    ("--expert-model-parallel-size", RELEASE_NAMES[1:], "PATTERN=M* X 1", "PATTERN=ME X 1"),
    (
        "--recompute-granularity",
        RELEASE_NAMES[:2],
        "PATTERN=M* X full --recompute-method uniform --recompute-num-layers 1",
        "PATTERN=M* X selective --recompute-modules core_attn",
    ),
    (
        "--recompute-granularity",
        ["0.17.1"],
        "PATTERN=M* X full --recompute-method uniform --recompute-num-layers 1",
        "PATTERN=M*/* X full --recompute-method uniform --recompute-num-layers 1",
    ),
    (
        "--recompute-method",
        RELEASE_NAMES[3:],
        "PATTERN=M* --recompute-granularity selective X uniform",
        "PATTERN=M* --recompute-granularity full X uniform",
    ),
    (
        "--recompute-modules",
        RELEASE_NAMES,
        "PATTERN=M* --recompute-granularity full X core_attn",
        "PATTERN=M* --recompute-granularity selective X core_attn",
    ),
    ("--moe-grouped-gemm", RELEASE_NAMES[1:], "PATTERN=ME X", f"PATTERN=ME X {OURS}"),
    (
        "--moe-aux-loss-coeff",
        RELEASE_NAMES[1:],
        "PATTERN=ME X 0.1 --moe-router-load-balancing-type none",
        "PATTERN=ME X 0.1",
    ),
    (
        "--moe-router-bias-update-rate",
        RELEASE_NAMES[1:],
        "PATTERN=ME X 0.1",
        "PATTERN=ME X 0.1 --moe-router-enable-expert-bias",
    ),
    (
        "--moe-shared-expert-overlap",
        RELEASE_NAMES[1:],
        "PATTERN=ME X",
        "PATTERN=ME X --moe-shared-expert-intermediate-size 8",
    ),
    (
        "--moe-deepep-num-sms",
        RELEASE_NAMES[1:],
        "PATTERN=ME X 8",
        "PATTERN=ME X 8 --moe-token-dispatcher-type flex",
    ),
    ("--linear-num-key-heads", SINCE_17, "PATTERN=M* X 4", "PATTERN=G* X 4"),
    ("--swiglu", RELEASE_NAMES, "PATTERN=M* X", "PATTERN=M- X"),
    ("--ffn-hidden-size", RELEASE_NAMES, "PATTERN=M* X 8", "PATTERN=M- X 8"),
    (
        "--ffn-hidden-size",
        RELEASE_NAMES[1:],
        "PATTERN=ME X 8 --moe-ffn-hidden-size 8",
        "PATTERN=ME X 8",
    ),
    (
        "--num-query-groups",
        RELEASE_NAMES,
        "PATTERN=M* X 2",
        "PATTERN=M* X 2 --group-query-attention",
    ),
    ("--group-query-attention", RELEASE_NAMES, "PATTERN=M- X", "PATTERN=M* X"),
    ("--kv-channels", ["0.19.0", "main-2026-08"], "PATTERN=M+ X 8", "PATTERN=M+* X 8"),
    (
        "--kv-channels",
        RELEASE_NAMES,
        f"PATTERN=M* X 8 {OURS} --multi-latent-attention",
        f"PATTERN=M* X 8 {OURS}",
    ),
    (
        # Without it, heads must divide the hidden size, whatever the layers are.
        "--kv-channels",
        RELEASE_NAMES,
        "PATTERN=M- X 8 --hidden-size 96 --num-attention-heads 6",
        "PATTERN=M- X 8 --hidden-size 96 --num-attention-heads 7",
    ),
    ("--qk-layernorm", RELEASE_NAMES[:3], "PATTERN=M* X", f"PATTERN=M* X {OURS}"),
    ("--qk-layernorm", RELEASE_NAMES[3:], "PATTERN=M- X", "PATTERN=M* X"),
    (
        "--q-lora-rank",
        RELEASE_NAMES,
        "PATTERN=M* X 8 --multi-latent-attention",
        f"PATTERN=M* X 8 --multi-latent-attention {OURS}",
    ),
    ("--kv-lora-rank", ["0.18.2"], "PATTERN=M* X 8", "PATTERN=MD X 8"),
    ("--kv-lora-rank", ["0.19.0", "main-2026-08"], "PATTERN=M* X 8", "PATTERN=M+ X 8"),
    ("--rope-type", RELEASE_NAMES[4:], "PATTERN=M* X rope", "PATTERN=M+ X rope"),
    (
        "--rotary-base",
        RELEASE_NAMES,
        "PATTERN=M* X 9 --position-embedding-type none",
        "PATTERN=M* X 9 --position-embedding-type rope",
    ),
    (
        "--no-rope-fusion",
        RELEASE_NAMES,
        "PATTERN=M- X --position-embedding-type rope",
        f"PATTERN=M* X --position-embedding-type none --multi-latent-attention {OURS}",
    ),
    (
        "--dsa-indexer-topk",
        RELEASE_NAMES[1:3],
        "PATTERN=M* X 8",
        f"PATTERN=M* X 8 --multi-latent-attention {OURS}",
    ),
    ("--dsa-indexer-topk", RELEASE_NAMES[3:], "PATTERN=M* X 8", "PATTERN=MD X 8"),
    (
        "--experimental-attention-variant",
        RELEASE_NAMES[3:],
        "PATTERN=M* X dsa",
        "PATTERN=MD X dsa",
    ),
    ("--mtp-num-layers", RELEASE_NAMES[2:], "PATTERN=M* X 1", "PATTERN=M*/M* X 1"),
    (
        "--mtp-hybrid-override-pattern",
        SINCE_17,
        "PATTERN=M* X M*",
        "PATTERN=M* X M* --mtp-num-layers 1",
    ),
    ("--num-layers", SINCE_17, "PATTERN=M* X 2", "X 2"),
    (
        "--sequence-parallel",
        RELEASE_NAMES,
        "PATTERN=M* X --tensor-model-parallel-size 1",
        "PATTERN=M* X --tensor-model-parallel-size 2",
    ),
    (
        "--overlap-param-gather",
        RELEASE_NAMES,
        "X --use-distributed-optimizer",
        "X --use-distributed-optimizer --overlap-grad-reduce",
    ),
    ("--fp8-recipe", RELEASE_NAMES, "X tensorwise", "X tensorwise --fp8-format hybrid"),
    ("--split", RELEASE_NAMES, "X 1,0,0 --mock-data", "X 1,0,0 --data-path a"),
    (
        "--tokenizer-model",
        RELEASE_NAMES,
        "X a --tokenizer-type NullTokenizer",
        "X a --tokenizer-type HuggingFaceTokenizer",
    ),
    (
        "--cross-entropy-fusion-impl",
        RELEASE_NAMES,
        "X native",
        "X native --cross-entropy-loss-fusion",
    ),
    ("--save-interval", RELEASE_NAMES, "X 5", "X 5 --save a"),
    ("--adam-beta1", RELEASE_NAMES, "X 0.9 --optimizer sgd", "X 0.9 --optimizer adam"),
]


@pytest.mark.parametrize(
    ("flag", "names", "unread", "read"),
    [pytest.param(*rule, id=f"{rule[0]}-{rule[1][0]}") for rule in RULES],
)
def test_a_flag_is_dead_where_nothing_reads_it(flag, names, unread, read):
    for name in names:
        assert flag in dead(name, unread.replace("X", flag)), name
        assert flag not in dead(name, read.replace("X", flag)), name


@pytest.mark.parametrize(
    ("flag", "value", "names"),
    [
        ("--fim-rate", "0.5", RELEASE_NAMES[1:]),
        ("--mtp-num-layers", "1", RELEASE_NAMES[:2]),
        ("--mtp-loss-scaling-factor", "1", RELEASE_NAMES[:2]),
        ("--use-rope-scaling", "", RELEASE_NAMES),
        ("--moe-layer-freq", "1", RELEASE_NAMES),
    ],
)
def test_some_flags_no_hybrid_model_reads(flag, value, names):
    for name in names:
        assert flag in dead(name, f"PATTERN=ME* {flag} {value}")


def test_naming_the_stock_spec_is_not_a_spec_of_ones_own():
    for name in RELEASE_NAMES:
        spec = " ".join(load_release(name).stock_spec)
        assert "--q-lora-rank" in dead(name, f"PATTERN=M* --q-lora-rank 8 --spec {spec}")


def test_a_layer_in_a_prediction_depth_reads_its_flags():
    assert "--num-experts" not in dead("0.19.0", "PATTERN=M*/E --num-experts 4")


def test_without_a_pattern_nothing_is_known_about_layers():
    assert dead("0.16.1", "--num-experts 4 --ffn-hidden-size 8 --kv-channels 8") == set()


def test_a_deprecated_pattern_flag_counts():
    assert dead("0.19.0", "--hybrid-override-pattern M* --num-experts 4") == {"--num-experts"}


def test_a_dead_flag_says_why():
    release = load_release("0.16.1")
    (found,) = dead_flags(parse(["--sequence-parallel"], release), release)
    assert "tensor parallel size 1" in found.why
