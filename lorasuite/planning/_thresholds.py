"""Counts of rows that decide what a migration does with its data, each with its reason.

:data:`lorasuite.data.MIN_OWN_HOLDOUT_ROWS`, from which on the user's rows alone are held out, lies with the split.
"""

from __future__ import annotations

#: Training rows of the light fine-tune where nobody says how many (arXiv 2505.13515 fine-tunes on 100).
LFT_SAMPLES = 100
#: Training rows below which the teacher's rows helped on every task measured (docs/transfer.md): below it the user is
#: told of them.
FEW_OWN_ROWS = 100
#: Rows the teacher writes only to be read and chosen by; with as many training rows, these serve for it themselves.
SELECTION_ROWS = 320
#: Rows the teacher writes to train on where nobody says how many: with few labels no other start did better
#: (docs/transfer.md).
DEFAULT_SYNTHETIC_ROWS = 300
#: The same where more different prompts are given: so many of them at most, in as many passes as read about as many
#: rows. Of equally many rows that were read, those of more prompts taught more (docs/evidence.md).
MOST_SYNTHETIC_ROWS = 900
#: Training rows from which on the loss of a held-out fifth, two rows or more, can tell starts and learning rates apart.
MIN_SWEEP_ROWS = 10
