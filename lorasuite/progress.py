"""How long work says how far it is: plain callables, so that the library needs to know no display."""

from collections.abc import Callable

#: ``progress(done, total)``.
Progress = Callable[[int, int], None]
#: ``progress(step, total_steps, loss)``, after each optimiser step and before a checkpoint of it is written.
TrainingProgress = Callable[[int, int, float], None]
#: ``progress(adapter, done, total)``: requests of this adapter answered so far.
EvaluationProgress = Callable[[str, int, int], None]
