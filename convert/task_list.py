"""The tasks by name, for `--tasks`. Names alone are in `validate_config`, which must not import what builds them."""

from __future__ import annotations

from lcconvert.convert.code_questions import CODE
from lcconvert.convert.graph_walks import WALKS
from lcconvert.convert.kv import KV
from lcconvert.convert.one_hop import HOPS
from lcconvert.convert.qa import QA
from lcconvert.convert.repeats import REPEATS
from lcconvert.convert.ruler import RULER

TASKS = {**RULER, **QA, **KV, **WALKS, **REPEATS, **HOPS, **CODE}
