"""The tasks by name, for `--tasks`. Names alone are in `validate_config`, which must not import what builds them."""

from __future__ import annotations

from lcconvert.convert.code_questions import CODE
from lcconvert.convert.kv import KV
from lcconvert.convert.ruler import RULER

TASKS = {**RULER, **KV, **CODE}
