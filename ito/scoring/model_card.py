"""`model/README.md`: the card of a run's model, as Hugging Face reads it, from the run's record.

Its front matter holds nothing that others wrote; in the text below, that is escaped.
"""

import json
from pathlib import Path

from ito.config import of_emoji
from ito.files import read_json, read_text, undamaged, write_text
from ito.model.exported import ABOUT
from ito.objectives import OBJECTIVES
from ito.run import RunFolder
from ito.scoring.pages import render
from ito.scoring.scores import headlines, sections
from ito.summary import sentence


def write_card(run: Path, folder: Path | None = None) -> None:
    """Write the card of the model that is in `folder`, by default the run's own."""
    files = RunFolder(run)
    config = files.read_config()
    records = files.log().read("eval") if files.metrics.exists() else []
    folder = folder or files.model
    with undamaged(folder / ABOUT) as path:
        step = int(json.loads(read_text(path))["step"])
    facts, machine = (read_json(x) if x.exists() else {} for x in (files.data, files.environment))
    with undamaged(files.metrics):
        scores = records[-1] if records else {}
        told, scored = headlines(scores), scores.get("step", step)
        tables = sections({"score": scores})
    with undamaged(files.data):
        data = sentence(facts) if facts else "not recorded"
    page = render(
        "model_card.md",
        config=config,
        batch_size=min(config.batch_size, facts.get("train_items") or config.batch_size),
        objective=config.objective if config.objective in OBJECTIVES else "an objective of its own",
        emoji=of_emoji(config.train_data),
        told=told,
        step=step,
        scored=scored,
        sections=tables,
        data=data,
        dtype=machine.get("dtype", "unknown"),
        torch=machine.get("torch", "unknown"),
    )
    write_text(folder / files.card.name, page)
