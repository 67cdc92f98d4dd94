"""The bundled small model: it writes stories from its own grammar and answers questions about them.

`PATH` is its folder in Hugging Face format, and `DRAFT_PATH` that of a smaller model that drafts for it. `tell(seed)`
writes a story of the grammar, and `evaluate(llm)` measures how close a model has come to that grammar. Importing this
package imports neither torch nor transformers.
"""

from pathlib import Path

from paged_infer.storyteller.evaluation import evaluate
from paged_infer.storyteller.stories.grammar import Story, tell
from paged_infer.storyteller.stories.world import Question

PATH = Path(__file__).parent / "weights"
DRAFT_PATH = Path(__file__).parent / "draft"

__all__ = ["DRAFT_PATH", "PATH", "Question", "Story", "evaluate", "tell"]
