"""What the metrics share: `evaluate.Metric` made to work offline, in memory, and with others in `evaluate.combine`."""

import inspect
from collections.abc import Iterable


try:
    import evaluate
except ImportError as error:
    raise ImportError(
        "mel_llm.evaluation needs the package evaluate: `pip install evaluate jiwer`, or this package's extra `train`."
    ) from error

# `evaluate.combine` hands every metric the keyword arguments of all. Each metric here takes its own and passes over
# those of the others; what none of them knows is an error, since a misspelt argument must not be ignored.
_COMPUTE_ARGUMENTS = {"normalizer", "details", "audio_seconds", "processing_seconds", "choices", "match"}


class SpeechMetric(evaluate.Metric):
    """A metric whose inputs are checked as they arrive and, in one process, stay in memory.

    `evaluate.Metric` writes them into files under the user's cache, which must then be writable, and through which
    programs that run at the same time get in each other's way.

    Args:
        keep_in_memory (`bool`, *optional*): By default true with one process. evaluate's own way of distributing one
            metric over several (`num_process`) needs files.
        num_process (`int`, defaults to 1), kwargs: As in `evaluate.Metric`.

    Raises:
        TypeError: An argument that there is not; `evaluate.Metric` would pass over it.
    """

    # Arguments of `compute` that are not inputs
    compute_arguments: tuple[str, ...] = ()

    # By name only: the first argument of `evaluate.Metric` is `config_name`, and `WordErrorRate("none")` would set that
    def __init__(self, *, keep_in_memory: bool | None = None, num_process: int = 1, **kwargs):
        unknown = sorted(kwargs.keys() - inspect.signature(evaluate.Metric.__init__).parameters.keys())
        if unknown:
            raise TypeError(f"{type(self).__name__}() got unexpected arguments: {', '.join(unknown)}.")
        if keep_in_memory is None:
            keep_in_memory = num_process == 1
        self.keep_in_memory = keep_in_memory  # `_build_data_dir` asks before the parent class sets it
        super().__init__(keep_in_memory=keep_in_memory, num_process=num_process, **kwargs)

    def _build_data_dir(self) -> str:
        # The parent class makes the folder even if nothing will be written there
        return "" if self.keep_in_memory else super()._build_data_dir()

    def _check_column(self, name: str, values) -> list:
        """The values of one input as a list, or an error that says which of them is wrong. Texts, unless a metric has other
        inputs."""
        values = as_list(name, values)
        for index, value in enumerate(values):
            if not isinstance(value, str):
                raise TypeError(f"`{name}[{index}]` must be a string, got {type(value).__name__}.")
        return values

    def compute(self, *, predictions=None, references=None, **kwargs) -> dict | None:
        """The metric over what is passed here and everything added since the last call.

        Raises:
            TypeError: An argument that no metric of this package has, or an input of the wrong type.
            ValueError: There is nothing to compute the metric of, or inputs that do not fit together.
        """
        inputs = self._feature_names()
        unknown = sorted(kwargs.keys() - _COMPUTE_ARGUMENTS - set(inputs))
        if unknown:
            raise TypeError(f"{type(self).__name__}.compute() got unexpected arguments: {', '.join(unknown)}.")
        own = {name: value for name, value in kwargs.items() if name in inputs or name in self.compute_arguments}
        given = {"predictions": predictions, "references": references, **own}
        if self.keep_in_memory and self.writer is None and all(given.get(name) is None for name in inputs):
            raise ValueError(f"{type(self).__name__} has nothing to compute: pass or add {' and '.join(inputs)}.")
        return super().compute(predictions=predictions, references=references, **own)

    def add_batch(self, *, predictions=None, references=None, **kwargs) -> None:
        """Adds several examples.

        Raises:
            TypeError: An input of the wrong type; the message names its index.
            ValueError: An input is missing, unknown, or not as long as the others.
        """
        inputs = self._feature_names()
        unknown = sorted(kwargs.keys() - set(inputs))
        if unknown:
            raise ValueError(f"{type(self).__name__} takes {' and '.join(inputs)}, not {', '.join(unknown)}.")
        given = {"predictions": predictions, "references": references, **kwargs}
        missing = [name for name in inputs if given.get(name) is None]
        if missing:
            raise ValueError(f"{type(self).__name__} needs {' and '.join(inputs)}; missing: {', '.join(missing)}.")
        columns = {name: self._check_column(name, given[name]) for name in inputs}
        if len({len(column) for column in columns.values()}) > 1:
            lengths = ", ".join(f"{len(column)} {name}" for name, column in columns.items())
            raise ValueError(f"{type(self).__name__} needs as many of one as of the other, got {lengths}.")
        super().add_batch(**columns)

    def add(self, *, prediction=None, reference=None, **kwargs) -> None:
        """Adds one example."""
        # `evaluate.combine` passes the plural names here too
        given = {"predictions": prediction, "references": reference, **kwargs}
        inputs = self._feature_names()
        self.add_batch(**{name: [value] for name, value in given.items() if name in inputs or name in kwargs})


def as_list(name: str, values: Iterable) -> list:
    """A list, tuple, array, tensor or column as a list of Python values."""
    if hasattr(values, "tolist"):  # numpy and torch; their scalars become numbers
        values = values.tolist()
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise TypeError(f"`{name}` must be a list, got {type(values).__name__}.")
    return list(values)


__all__ = ["SpeechMetric"]
