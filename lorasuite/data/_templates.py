"""How instruction rows become prompts: templates known by name, and Jinja files, which run in a sandbox."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasuite.bases import Rendering, rendered, row_environment
from lorasuite.data._rows import Row
from lorasuite.errors import ConfigError, DataError, Problem, did_you_mean

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
    return row_environment()


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

        for one in rendered(self.text, _asked(Row("instruction", instruction="a", input="b")), self._rendered):
            if one.kind == "beyond":
                what = f"{one.said} for an instruction of one word"
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
        return row if row.kind != "instruction" else self._made(row, map(self._rendered, _asked(row)))

    def apply_all(self, rows: Sequence[Row]) -> list[Row]:
        """:meth:`apply` for each row; what is no known template is rendered within limits.

        Raises:
            DataError: naming every row that it cannot render; or one that it takes too long or writes too much for.
        """
        asked = (values for row in rows if row.kind == "instruction" for values in _asked(row))
        known = known_templates().get(self.name) == self.text
        renderings = map(self._rendered, asked) if known else rendered(self.text, asked, self._rendered)
        found, problems = list[Row](), list[Problem]()
        for number, row in enumerate(rows, start=1):
            if row.kind != "instruction":
                found.append(row)
                continue
            told = list(islice(renderings, 1 + bool(row.input.strip())))
            place = f"template {self.name}, row {number}"
            if told[-1].kind == "beyond":
                raise DataError(Problem(place, told[-1].said, "Mend the template, or leave the row out."))
            try:
                found.append(self._made(row, told))
            except DataError as error:
                problems += [replace(problem, where=place) for problem in error.problems]
        if problems:
            raise DataError(problems)
        return found

    def _rendered(self, values: Mapping[str, Any]) -> Rendering:
        """The template with these values, in this process."""
        try:
            pieces, size = [], 0
            for piece in _compiled(self.text).generate(values):
                pieces.append(piece)
                size += len(piece)
                if size > MAX_CHARACTERS:
                    raise ValueError(f"it wrote more than {MAX_CHARACTERS} characters")
        except Exception as error:  # code of its author, which raises what it likes
            return Rendering("refused", f"{type(error).__name__}: {error}")
        return Rendering("text", "".join(pieces))

    def _made(self, row: Row, renderings: Iterable[Rendering]) -> Row:
        """The prompt and completion of an instruction row.

        Args:
            renderings: of what :func:`_asked` gives of it.

        Raises:
            DataError: as :meth:`apply`.
        """
        texts = list[str]()
        for one in renderings:
            if one.kind != "text":
                keys = ", ".join(_asked(row)[0])
                raise self._error(f"cannot be rendered ({one.said})", f"A template may use what the row has: {keys}.")
            texts.append(one.said)
        marked, *bare = texts
        before, found, end = marked.partition(_PLACEHOLDER)
        if not found or _PLACEHOLDER in end:
            what = f"writes the output {marked.count(_PLACEHOLDER)} times"
            raise self._error(what, "Write {{ output }} once, where the answer goes.")
        if marked in bare:
            raise self._error("has no place for the row's input", "Write {{ input }}, or take the key out of the rows.")
        prompt, output = before.rstrip(" "), row.output.strip()
        if not prompt.strip():
            raise self._error("writes nothing before the output", "Write {{ instruction }} before it.")
        completion = before[len(prompt) :] + output if output else ""
        end = end if end.strip() else ""
        extra = {name: value for name, value in row.extra.items() if name not in _names(self.text)}
        return Row("completion", prompt=prompt, completion=completion, end_of_answer=end, extra=extra)

    def _error(self, what: str, remedy: str) -> DataError:
        return DataError(Problem(f"template {self.name}", what, remedy))


def _asked(row: Row) -> list[dict[str, Any]]:
    """The names that a template is given of an instruction row, with the placeholder for the output: with its input,
    and where it has one without it, too, which tells whether there is a place for it."""
    given = {**row.extra, "instruction": row.instruction.strip(), "input": row.input.strip(), "output": _PLACEHOLDER}
    return [{**given, "input": text} for text in dict.fromkeys([given["input"], ""])]


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
        DataError: as :meth:`Template.apply_all`.
    """
    return list(rows) if template.default else template.apply_all(rows)
