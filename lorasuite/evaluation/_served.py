"""What is found of one program that serves adapters; without anything heavy, for the gate reads it."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

#: The problem of an adapter that has no effect.
SAME = "it loads, and answers as the base does"


class Served(BaseModel):
    """Whether one program serves the adapter."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ok: bool
    problems: list[str] = Field([], description="why it refuses the adapter, or computes something else with it")
    notes: list[str] = Field([], description="what has to be set to serve it, or how near the logits were")
    ran: bool = Field(False, description="it was run and compared; otherwise only its rules were read")
    not_run: str | None = Field(None, description="why it was not run, where that was asked for")
