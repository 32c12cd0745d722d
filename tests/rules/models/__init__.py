"""Models as people write them, each with its expert's Megatron-style layout beside it."""

from tests.rules.models.case import Case
from tests.rules.models.frameworks import CASES as FRAMEWORKS
from tests.rules.models.language import CASES as LANGUAGE
from tests.rules.models.other import CASES as OTHER

CASES: dict[str, Case] = {case.name: case for case in (*LANGUAGE, *FRAMEWORKS, *OTHER)}
