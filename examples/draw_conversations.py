"""Draw scenes, and conversations about them in the format of LLaVA's data.

python examples/draw_conversations.py drawn
"""

import json
import sys
from pathlib import Path

# --- Drawing --------------------------------------------------------------------------------------------------------
from flexkit.visual_search import draw_scene, questions


def draw(folder: Path, train: int = 128, unseen: int = 32) -> None:
    """Pictures, and two files of conversations about them."""
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for seed in range(train + unseen):
        scene = draw_scene(seed)
        scene.image.save(folder / f"{seed}.png")
        turns = []
        for question in list(questions(scene, "attribute"))[:2]:
            turns += [{"from": "human", "value": question.text}, {"from": "gpt", "value": question.answer}]
        turns[0]["value"] = f"<image>\n{turns[0]['value']}"
        records.append({"id": seed, "image": f"{seed}.png", "conversations": turns})
    (folder / "train.json").write_text(json.dumps(records[:train]))
    (folder / "unseen.json").write_text(json.dumps(records[train:]))


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
