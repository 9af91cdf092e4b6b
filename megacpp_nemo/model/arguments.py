"""What the scans and the convolution check and read of their arguments.

Shapes (`bind_shapes`, `check_shared`, `check_chunk_size`), devices (`check_same_device`), where a
document begins (`document_index`) and in which precision the arithmetic runs (`compute_dtype`).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from megacpp_nemo.contract.errors import RuntimeRefusal


def bind_shapes(**named: tuple[Tensor | None, str]) -> dict[str, int]:
    """Match tensors against named dimensions and return the size of each name.

    `bind_shapes(x=(x, "batch seq"), w=(w, "seq width"))` requires x to have two dimensions, w
    to have two, and the two sizes called "seq" to agree. A tensor given as None is skipped.

    Raises:
        RuntimeRefusal: A wrong number of dimensions, an empty dimension, or sizes that differ.
    """
    sizes: dict[str, int] = {}
    for name, (tensor, dimensions) in named.items():
        if tensor is None:
            continue
        labels = dimensions.split()
        given = tuple(tensor.shape)
        expected = [sizes.get(label, label) for label in labels]
        fits = len(given) == len(labels) and all(
            size >= 1 and size == sizes.setdefault(label, size)
            for label, size in zip(labels, given, strict=True)
        )
        if not fits:
            raise RuntimeRefusal(
                f"the shape of {name} does not fit the other inputs",
                given=f"{name} {list(given)}",
                allowed=f"[{', '.join(labels)}] = [{', '.join(map(str, expected))}]",
                hint="check the order of the dimensions; every size must be at least 1",
            )
    return sizes


def check_shared(sizes: dict[str, int], many: str, few: str) -> None:
    """Require that each of the `few` (say, groups) serves the same number of the `many` (heads).

    Raises:
        RuntimeRefusal: `sizes[many]` is not a multiple of `sizes[few]`.
    """
    if sizes[many] % sizes[few]:
        raise RuntimeRefusal(
            f"the {many} cannot be divided evenly over the {few}",
            given=f"{sizes[many]} {many}, {sizes[few]} {few}",
            allowed=f"{many} a multiple of {few}",
            hint=f"choose a number of {few} that divides {sizes[many]}",
        )


def check_chunk_size(chunk_size: int) -> None:
    """Require a chunk to hold at least one token.

    Raises:
        RuntimeRefusal: `chunk_size` is below 1.
    """
    if chunk_size < 1:
        raise RuntimeRefusal(
            "a chunk must hold at least one token",
            given=f"chunk_size={chunk_size}",
            allowed="chunk_size >= 1",
            hint="leave chunk_size at its default",
        )


def check_same_device(**named: Tensor | None) -> None:
    """Require tensors to lie on one device: a kernel would read another's memory as its own.

    Raises:
        RuntimeRefusal: They do not.
    """
    devices = {name: str(tensor.device) for name, tensor in named.items() if tensor is not None}
    if len(set(devices.values())) > 1:
        raise RuntimeRefusal(
            "the inputs lie on different devices",
            given=", ".join(f"{name} on {device}" for name, device in devices.items()),
            allowed="one device for all",
            hint="move them with tensor.to(device)",
        )


def document_starts(document_ids: Tensor) -> Tensor:
    """Return `[batch, seq]`, true where a document begins behind another one of its row."""
    return functional.pad(document_ids[:, 1:] != document_ids[:, :-1], (1, 0))


def document_index(document_ids: Tensor) -> Tensor:
    """Number the documents of each row 0, 1, 2, ... in order of appearance.

    Ids [batch, seq] may repeat (0, 0, 1, 0 holds three documents), so operators compare these
    running numbers, never the ids themselves.
    """
    return document_starts(document_ids).cumsum(1)


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Return fp64 if any tensor is fp64, else fp32: recurrences never run in half precision."""
    wide = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32
