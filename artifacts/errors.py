"""Errors of the artifact store."""

from __future__ import annotations


class ArtifactError(Exception):
    """Base class of every error the store raises on purpose."""

    def __str__(self) -> str:  # a KeyError would print its argument's repr
        return str(self.args[0]) if self.args else ""


class ArtifactMissing(ArtifactError, KeyError):
    """No object, tensor or file of that name."""


class ArtifactDamaged(ArtifactError, OSError):
    """An object whose bytes are not the ones that were stored."""
