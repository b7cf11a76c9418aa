"""How the teacher writes, and what of it is kept."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

#: Words an n-gram has, where near-duplicates and repetition are looked for.
NGRAM = 4
#: Sampling temperature where one answer a prompt is not enough, or the teacher writes running text.
SAMPLING_TEMPERATURE = 0.9
#: Attempts for each row asked for, at most.
ATTEMPTS_PER_ROW = 3
#: Prompts of the user's, at most, that are examples to write more from; with more of them they are answered as given.
HANDFUL = 10


def chosen_sources(examples: bool, description: bool, card: bool) -> tuple[str, ...]:
    """The sources of prompts that are used where nobody names any: the best of those that something is given for.

    Examples and a description are used together. What a card says nobody has checked, so the adapter alone is asked
    beside it.
    """
    given = tuple(name for name, there in (("examples", examples), ("description", description)) if there)
    return given or (("card", "adapter") if card else ("adapter",))


class TeacherSettings(BaseModel):
    """How the teacher writes, and what of it is kept."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    temperature: float | None = Field(
        None,
        ge=0,
        description=f"of the teacher's tokens; 0 is greedy; unset: greedy where there is a prompt for each row, else, "
        f"and for running text, {SAMPLING_TEMPERATURE}",
    )
    top_p: float = Field(1.0, gt=0, le=1, description="sample from the likeliest tokens of this total probability")
    max_new_tokens: int = Field(256, ge=1, description="tokens of an answer at most")
    batch_size: int = Field(32, ge=1, description="rows written at once; does not change what is written")
    engine: Literal["auto", "transformers", "vllm"] = Field(
        "auto", description="what writes; auto: vllm where it is installed, there is a GPU and it serves the adapter"
    )
    text_prefix: int = Field(3, ge=0, description="words of a text row that are given to the teacher as its beginning")
    prefix: str = Field("", description="beginning of every row where no prompts are given")
    suffix: str = Field(
        "", description="end of every prompt where none are given: the old base writes what stands between"
    )
    imitate: bool = Field(
        False,
        description="where prompts are fewer than rows: let the old base write more of them, between the words with "
        "which all given ones begin and end",
    )
    truncated: Literal["text", "keep", "drop"] = Field(
        "text", description="rows cut off at max_new_tokens: kept where they are running text, always, or never"
    )
    max_repetition: float = Field(
        0.5, ge=0, le=1, description=f"drop answers of which more than this share of {NGRAM}-word sequences is repeated"
    )
    max_overlap: float = Field(
        0.8,
        ge=0,
        le=1,
        description=f"drop answers that share more of their {NGRAM}-word sequences with one kept before",
    )
    drop_unsure: float = Field(
        0.0, ge=0, lt=1, description="share of rows dropped for the teacher's low mean log-probability"
    )
    filter: bool = Field(True, description="leave out repetitive, repeated and unsure rows; empty ones never stay")
    min_kept: float = Field(0.1, ge=0, le=1, description="share of the written rows that must pass the filters")

    def computed(self) -> dict[str, Any]:
        """As JSON, for a stage's key: without what does not change what is written."""
        return self.model_dump(mode="json", exclude={"batch_size"})
