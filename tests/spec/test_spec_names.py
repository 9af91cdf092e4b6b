"""Names of specs as Megatron asks for them."""

from __future__ import annotations

import subprocess
import sys

import pytest
from megatron.core.transformer.spec_utils import ModuleSpec, import_module

import megacpp_nemo.spec
from megacpp_nemo.contract.errors import LoweringError, RuntimeRefusal
from megacpp_nemo.lowering.spec_name import SPEC_MODULE
from megacpp_nemo.spec import upstream
from tests.spec.release_model import RECURRENT


def resolve(name: str) -> ModuleSpec:
    return import_module((SPEC_MODULE, name))


def test_megatrons_own_import_finds_a_spec_and_the_module_keeps_it():
    name = f"layers=LemR,{RECURRENT}"
    spec = resolve(name)
    assert isinstance(spec, ModuleSpec)
    assert issubclass(spec.module, upstream.stock_stack_spec().module)
    assert vars(megacpp_nemo.spec)[name] is spec
    assert resolve(name) is spec


def test_importing_the_package_imports_no_torch():
    code = f"import {SPEC_MODULE}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", ["__path__x", "__wrapped__", "nothing", "mamba_stack_spec"])
def test_other_names_are_missing_as_in_any_module(name):
    assert not hasattr(megacpp_nemo.spec, name)


@pytest.mark.parametrize("name", ["layers=", "layers=Lx", "layers=Lem,depth", "layers=m,nope=1"])
def test_a_wrong_name_is_said_to_be_wrong_and_not_missing(name):
    with pytest.raises(LoweringError, match="not the name of a spec"):
        resolve(name)


@pytest.mark.parametrize(
    ("name", "said", "off"),
    [
        ("layers=Dem", "need model.sparse_attention.indexer_topk", "indexer_topk=VALUE"),
        ("layers=N", "need model.author_mamba.mimo_rank", "author_mamba.mimo_rank=VALUE"),
        ("layers=E", "experts of this package", "a small 'e'"),
        ("layers=m,features.ngram_hash=true", "n-gram", "features.ngram_hash=false"),
        ("layers=m,features.structure=core", "structure", "features.structure=null"),
        ("layers=m,mtp.num_layers=1", "multi-token", "model.mtp.num_layers=0"),
        ("layers=m,features.reset_state=true", "zero state", "features.reset_state=false"),
        (
            "layers=m,plasticity.fire.steps=100+200",
            "runs no NeMo callbacks",
            "plasticity.fire.steps=[], plasticity.fire.boundaries=[]",
        ),
        ("layers=m,plasticity.dash.boundaries=data", "DASH", "plasticity.dash.boundaries=[]"),
        ("layers=m,plasticity.shrink.interval=5", "shrink", "plasticity.shrink.interval=0"),
        ("layers=e,plasticity.redo.report_interval=5", "ReDo", "plasticity.redo.steps=[]"),
        ("layers=m,plasticity.stp.weight=0.02", "STP", "plasticity.stp.weight=0"),
        ("layers=m,plasticity.stp.measure=true", "STP", "plasticity.stp.measure=false"),
        ("layers=m,plasticity.fire.tolerance=0.1", "no layer of the model reads", "without it"),
        ("layers=m,hidden_size=64", "no layer of the model reads model.hidden_size", "without it"),
        ("layers=m,precision=bf16", "no layer of the model reads precision", "without it"),
        ("layers=m,mamba.conv_width=3", "reads model.mamba.conv_width", "without it"),
        (f"layers=m,{RECURRENT}", "reads model.recurrent.num_heads", "without it"),
        ("layers=M,mamba.conv_width=3", "need model.mamba.chunk_size", "mamba.chunk_size=VALUE"),
        ("layers=R", "need model.recurrent.state_gradient_clip", "recurrent.num_heads=VALUE"),
    ],
)
def test_what_nobody_would_carry_out_is_refused(name, said, off):
    with pytest.raises(RuntimeRefusal) as refusal:
        resolve(name)
    assert said in str(refusal.value)
    assert off in refusal.value.hint


def test_one_refusal_names_everything_and_not_the_shapes_of_what_is_refused():
    with pytest.raises(RuntimeRefusal) as refusal:
        resolve(
            "layers=Em,embedding.ngram.orders=2+3,"
            "features.ngram_hash=true,features.reset_state=true,mtp.num_layers=1,mtp.pattern=AE"
        )
    assert len(refusal.value.what.splitlines()) == 1 + 4
    assert refusal.value.hint.count("=") == 3


def test_a_lever_is_refused_once_however_it_is_turned_on_and_whatever_shapes_it():
    name = (
        "layers=m,plasticity.fire.boundaries=data,plasticity.fire.steps=100+200,"
        "plasticity.fire.target=attention,plasticity.fire.tolerance=0.001"
    )
    with pytest.raises(RuntimeRefusal) as refusal:
        resolve(name)
    assert len(refusal.value.what.splitlines()) == 1 + 1
    assert refusal.value.given == "plasticity.fire.steps=100+200, plasticity.fire.boundaries=data"


def test_what_is_asked_for_and_off_is_no_reason_to_refuse():
    assert resolve("layers=m,features.reset_state=false,features.structure=null")
    assert resolve("layers=m,plasticity.stp.weight=0.0,plasticity.fire.steps=")


def test_a_megatron_without_our_bases_is_refused_and_not_taken_for_a_missing_spec(monkeypatch):
    monkeypatch.setitem(sys.modules, "megacpp_nemo.spec.build", None)
    with pytest.raises(RuntimeRefusal, match="cannot be imported with the installed"):
        resolve("layers=mmmmmm")
