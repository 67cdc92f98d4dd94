"""What worked steps and examples gain: ``python -m paged_infer.bench.sums``.

Asks the two dense storytellers for held-out sums, answered directly and in steps, with and without examples, and prints
the table of storyteller/README.md, which ``figures/storyteller_sums.json`` stores. The numbers do not depend on the
machine's load.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from paged_infer import LLM
from paged_infer.evaluation.statistics import proportion
from paged_infer.storyteller.stories.sums import Form
from paged_infer.storyteller.sums_evaluation import evaluate_sums
from paged_infer.terminal import run_command

FORMS = {"storyteller": (Form.DIRECT, Form.WORKED), "storyteller-steps": tuple(Form)}
NUM_EXAMPLES = (0, 1, 4)
NUM_FIRST = 25  # sums that a test asks again


def main(
    figures: Annotated[Path, typer.Option(help="Folder for the numbers.")] = Path("figures"),
    num_sums: Annotated[int, typer.Option(help="Held-out sums in each row.", min=NUM_FIRST)] = 500,
) -> None:
    """How many held-out sums the storytellers answer correctly, with 95 % confidence intervals."""
    rows = []
    for model, forms in FORMS.items():
        llm = LLM(model)
        for form in forms:
            rows += [measure(llm, form, num_examples, num_sums) for num_examples in NUM_EXAMPLES]
            print(table(rows)[-1], flush=True)
    figures.mkdir(parents=True, exist_ok=True)
    (figures / "storyteller_sums.json").write_text(json.dumps({"num_sums": num_sums, "rows": rows}, indent=1) + "\n")


def measure(llm: LLM, form: Form, num_examples: int, num_sums: int) -> dict[str, Any]:
    """One row of the numbers; ``first_right`` counts only the first ``NUM_FIRST`` sums."""
    score = evaluate_sums(llm, form, num_examples, num_sums)
    accuracy, *interval = proportion(score.right)
    return {
        "model": llm.name,
        "form": form.value,
        "examples": num_examples,
        "accuracy": accuracy,
        "interval": [round(end, 4) for end in interval],
        "in_steps": score.num_in_steps / num_sums,
        "first_right": sum(score.right[:NUM_FIRST]),
    }


def table(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each model and form. A cell has the share of right answers, its interval, and the share in steps."""
    cells: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        low, high = row["interval"]
        cell = f"{100 * row['accuracy']:.1f} % ({100 * low:.0f} to {100 * high:.0f})"
        if 0.0 < row["in_steps"] < 1.0:
            cell += f", {100 * row['in_steps']:.0f} % in steps"
        cells.setdefault((row["model"], row["form"]), []).append(cell)
    return [f"| `{model}`, {form} | {' | '.join(found)} |" for (model, form), found in cells.items()]


if __name__ == "__main__":
    run_command(main)
