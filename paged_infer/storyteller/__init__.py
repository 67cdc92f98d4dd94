"""The bundled small models: they write stories from their own grammar and answer questions about them.

`PATH` is the storyteller's folder in Hugging Face format, `MOE_PATH` that of the same storyteller as a mixture of
experts, `DRAFT_PATH` that of a smaller model that drafts for both, and `STEPS_PATH` that of a storyteller that thinks
before it answers, and writes sums in steps. `tell(seed)` writes a story of the grammar, and `evaluate(llm)` measures
how close a model has come to that grammar, `sample_stories(llm, n)` how often it writes one of its stories. Importing
this package imports neither torch nor transformers.
"""

from pathlib import Path

from paged_infer.model.loading.hub import BUNDLED
from paged_infer.storyteller.evaluation import evaluate, sample_stories
from paged_infer.storyteller.stories.grammar import Story, tell
from paged_infer.storyteller.stories.world import Question

PATH = BUNDLED["storyteller"]
MOE_PATH = BUNDLED["storyteller-moe"]
STEPS_PATH = BUNDLED["storyteller-steps"]
DRAFT_PATH = Path(__file__).parent / "draft"

__all__ = ["DRAFT_PATH", "MOE_PATH", "PATH", "STEPS_PATH", "Question", "Story", "evaluate", "sample_stories", "tell"]
