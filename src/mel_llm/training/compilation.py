"""The language model's layers compiled for training, one by one. Ours."""

import contextlib

import torch
from torch import nn

from .freezing import find_layers


def compile_layers(model: nn.Module) -> None:
    """Has every layer of the language model compiled by `torch.compile` at its first use, in place: names of parameters,
    hooks and what is saved stay as they are.

    The layers alone, and not the model as they stand in it: they are where the elementwise operations are that compiling
    puts together, they are alike, so that one compilation serves all, and what is around them depends on the data.
    Lengths are dynamic, so that batches of another form compile nothing anew.
    """
    for layer in find_layers(model)[1]:
        layer.compile(dynamic=True)
        layer.is_compiled_for_training = True


def without_compiled_layers(model: nn.Module) -> contextlib.AbstractContextManager:
    """While this is entered, layers that [`compile_layers`] compiled run as they are written, and so does everything else that is
    compiled (torch has no finer switch). Nothing changes for a model that has none.

    Generation needs it: with a cache that grows, each of its first lengths is compiled anew, which takes longer than the
    generation itself.
    """
    if any(getattr(module, "is_compiled_for_training", False) for module in model.modules()):
        return torch.compiler.set_stance("force_eager")
    return contextlib.nullcontext()


__all__ = ["compile_layers", "without_compiled_layers"]
