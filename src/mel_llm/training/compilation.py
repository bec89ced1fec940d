"""The language model's layers compiled for training, one by one. Ours."""

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


__all__ = ["compile_layers"]
