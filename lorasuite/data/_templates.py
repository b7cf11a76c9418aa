"""How instruction rows become prompts: templates known by name, and Jinja files, which run in a sandbox."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasuite.bases import beyond_limits
from lorasuite.data._rows import Row
from lorasuite.errors import ConfigError, DataError, LoRASuiteError, Problem, did_you_mean

if TYPE_CHECKING:
    from jinja2 import Environment
    from jinja2 import Template as Compiled

FILE = Path(__file__).parent / "templates.yaml"
#: The template that :meth:`lorasuite.data.Row.prompt_and_completion` applies by itself.
DEFAULT_TEMPLATE = "question"
#: Stands for the answer while a template is asked where it puts one.
_PLACEHOLDER = "\u241f\u241d\u241f"
#: Characters of a rendered row: a template that writes more has lost its way.
MAX_CHARACTERS = 10_000_000


@cache
def known_templates() -> dict[str, str]:
    """The templates of the data file, by name."""
    import yaml

    found: dict[str, str] = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    return found


@cache
def _environment() -> Environment:
    """As transformers sets one up for chat templates, and undefined names are errors."""
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    return ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)


@cache
def _compiled(text: str) -> Compiled:
    return _environment().from_string(text)


@cache
def _names(text: str) -> set[str]:
    """The names that a template reads."""
    from jinja2 import meta

    return meta.find_undeclared_variables(_environment().parse(text))


@dataclass(frozen=True)
class Template:
    """How instruction rows become prompts; :func:`read_template` makes one.

    Attributes:
        name: as it is known, or the file's path.
        text: Jinja over the row's keys, with ``{{ output }}`` where the answer goes.
    """

    name: str
    text: str

    @property
    def label(self) -> str:
        """What it is called in results, which do not depend on where a file lies."""
        return self.name if known_templates().get(self.name) == self.text else Path(self.name).name

    @property
    def default(self) -> bool:
        """Whether rows need not be changed for it."""
        return self.name == DEFAULT_TEMPLATE

    def check(self) -> None:
        """See that it can be used at all.

        Raises:
            ConfigError: if it cannot be parsed, does not end, or never writes the instruction or the output.
        """
        from jinja2 import TemplateError

        words = {"instruction": "a", "input": "b", "output": _PLACEHOLDER}
        if found := beyond_limits(self.text, [words, {**words, "input": ""}]):
            what = f"{found[1]} for an instruction of one word"
            raise ConfigError(Problem(f"template {self.name}", what, "Correct it."))
        try:
            used = _names(self.text)
        except (TemplateError, RecursionError) as error:
            place = f"{self.name}, line {getattr(error, 'lineno', None) or 1}"
            raise ConfigError(Problem(place, f"is no Jinja template ({error})", "Correct it.")) from None
        problems = [
            Problem(self.name, f"never writes the row's {name}", f"Put {{{{ {name} }}}} where it goes.")
            for name in ("instruction", "output")
            if name not in used
        ]
        if problems:
            raise ConfigError(problems)

    def apply(self, row: Row) -> Row:
        """An instruction row as the prompt and completion that it makes of it; other rows as they are.

        Raises:
            DataError: if it names what the row does not have, has no place for its input, or fails.
        """
        if row.kind != "instruction":
            return row
        values = _values(row)
        marked = self._rendered(values)
        before, found, end = marked.partition(_PLACEHOLDER)
        if not found or _PLACEHOLDER in end:
            what = f"writes the output {marked.count(_PLACEHOLDER)} times"
            raise self._error(what, "Write {{ output }} once, where the answer goes.")
        if values["input"] and self._rendered({**values, "input": ""}) == marked:
            raise self._error("has no place for the row's input", "Write {{ input }}, or take the key out of the rows.")
        prompt, output = before.rstrip(" "), row.output.strip()
        if not prompt.strip():
            raise self._error("writes nothing before the output", "Write {{ instruction }} before it.")
        completion = before[len(prompt) :] + output if output else ""
        end = end if end.strip() else ""
        extra = {name: value for name, value in row.extra.items() if name not in _names(self.text)}
        return Row("completion", prompt=prompt, completion=completion, end_of_answer=end, extra=extra)

    def check_ends(self, rows: Sequence[Row]) -> None:
        """See that it ends for every instruction row.

        Raises:
            DataError: if it takes too long for one, or writes too much.
        """
        if known_templates().get(self.name) == self.text:
            return
        given = [(number, _values(row)) for number, row in enumerate(rows, start=1) if row.kind == "instruction"]
        # as rows with an input are rendered without it, too
        given = [(number, {**it, "input": text}) for number, it in given for text in dict.fromkeys([it["input"], ""])]
        if given and (found := beyond_limits(self.text, [{**it, "output": _PLACEHOLDER} for _, it in given])):
            place = f"template {self.name}, row {given[found[0]][0]}"
            raise DataError(Problem(place, found[1], "Mend the template, or leave the row out."))

    def _rendered(self, values: dict[str, Any]) -> str:
        """The template with the placeholder for the output."""
        try:
            pieces, size = [], 0
            for piece in _compiled(self.text).generate({**values, "output": _PLACEHOLDER}):
                pieces.append(piece)
                size += len(piece)
                if size > MAX_CHARACTERS:
                    raise ValueError(f"it wrote more than {MAX_CHARACTERS} characters")
        except Exception as error:  # code of its author, which raises what it likes
            keys = ", ".join([*values, "output"])
            what = f"cannot be rendered ({type(error).__name__}: {error})"
            raise self._error(what, f"A template may use what the row has: {keys}.") from None
        return "".join(pieces)

    def _error(self, what: str, remedy: str) -> DataError:
        return DataError(Problem(f"template {self.name}", what, remedy))


def _values(row: Row) -> dict[str, Any]:
    """The names that a template may use, but for the output."""
    return {**row.extra, "instruction": row.instruction.strip(), "input": row.input.strip()}


def read_template(source: str) -> Template:
    """A template by its name, or of a Jinja file.

    Raises:
        ConfigError: if it is neither, or cannot be used.
    """
    known = known_templates()
    if source in known:
        return Template(source, known[source])
    path = Path(source).expanduser()
    if not path.is_file():
        what = "is neither the name of a template nor a file"
        raise ConfigError(Problem(f"template {source}", what, did_you_mean(source, list(known))))
    try:
        template = Template(source, path.read_text(encoding="utf-8").removesuffix("\n"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(Problem(f"template {source}", f"cannot be read ({error})", "Save it as UTF-8.")) from None
    template.check()
    return template


def templated(rows: Sequence[Row], template: Template) -> list[Row]:
    """Rows with the instruction rows among them rendered; unchanged by the default one, which rows apply themselves.

    Raises:
        DataError: naming every row that the template cannot render, or one that it does not end for.
    """
    if template.default:
        return list(rows)
    template.check_ends(rows)
    found, problems = list[Row](), list[Problem]()
    for number, row in enumerate(rows, start=1):
        try:
            found.append(template.apply(row))
        except LoRASuiteError as error:
            problems += [replace(problem, where=f"{problem.where}, row {number}") for problem in error.problems]
    if problems:
        raise DataError(problems)
    return found
