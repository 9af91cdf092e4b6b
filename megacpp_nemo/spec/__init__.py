"""Stack specs for Megatron-LM's own entry scripts, made when they are asked for by name.

    pretrain_mamba.py ... --spec megacpp_nemo.spec layers=LemR,recurrent.num_heads=44,...

Megatron resolves `--spec` by importing the name from the module. This package answers with the
release's own stack spec in which the layers that the name gives to this package are built here
(`megacpp_nemo.lowering.spec_name` is the grammar, `megacpp_nemo.spec.build` the making).
"""

from __future__ import annotations

from typing import Any

from megacpp_nemo.contract.errors import RuntimeRefusal


def __getattr__(name: str) -> Any:
    """Return the stack spec called `name`, and keep it as an attribute of this package.

    Raises:
        AttributeError: If `name` is not meant as the name of a spec.
        LoweringError: If it is, and cannot be read.
        RuntimeRefusal: If it asks for what is not built, or this Megatron-Core is too old.
    """
    if "=" not in name:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from megacpp_nemo.lowering.spec_name import SpecName

    parsed = SpecName.parse(name)
    try:
        from megacpp_nemo.spec.build import stack_spec
    except ImportError as error:
        # Megatron would log an ImportError and go on without a spec.
        raise RuntimeRefusal(
            "The layers of this package cannot be imported with the installed Megatron-Core",
            given=str(error),
            allowed="Megatron-Core 0.16.1 or later, with triton",
            hint="another release of Megatron-LM, or install triton",
        ) from error
    globals()[name] = spec = stack_spec(parsed)
    return spec
