#!/usr/bin/env bash
# Guess:   Dataset.to_csv writes a column of lists as text that can be read back, JSON or at least a Python literal; Dataset.from_csv gives the text, and
#          ast.literal_eval the list.
# So:      the cell is numpy's display of an array: no commas. Adjacent strings are one string in Python, so literal_eval of ['a' 'b'] is ['ab'], without an
#          error: two answers come back as one. Lists of messages, and of numbers, do not parse at all; lists over 1000 long are cut by "..." and floats
#          to 8 digits, in the file already. A column of single dicts is a Python literal and comes back whole. to_json keeps the row (floats to 10 decimals).
# Version: datasets 5.2.0, pandas 3.1.1, numpy 2.4.6
# Why:     candidate answers, tags or stored log-probabilities in a table passed on as CSV: a prompt with K answers turns into one with a single glued answer,
#          and stored per-token scores are lost, while the row count and the columns are right.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/pip install -q datasets==5.2.0 pandas==3.1.1 numpy==2.4.6 pyarrow==26.0.1
HF_HOME="$work/cache" HF_HUB_OFFLINE=1 env/bin/python - <<'PY'
import ast
import json

import datasets
import numpy
import pandas
from datasets import Dataset

datasets.disable_progress_bars()
print("datasets", datasets.__version__, "pandas", pandas.__version__, "numpy", numpy.__version__)
row = {
    "answers": ["Yes.", "No."], "turn": {"role": "user", "content": "Rain?"},
    "messages": [{"role": "user", "content": "Rain?"}, {"role": "assistant", "content": "Yes."}],
    "logps": [-0.123456789, -2.5], "long": [f"answer {i}" for i in range(1001)]}
table = Dataset.from_list([row])
table.to_csv("table.csv")
table.to_json("table.jsonl")
back = Dataset.from_csv("table.csv", cache_dir="csv")[0]
whole = Dataset.from_json("table.jsonl", cache_dir="json")[0] == row
seen = {}
for name in row:
    try:
        value = ast.literal_eval(back[name])
        seen[name] = "the same" if value == row[name] else "another list" if isinstance(value, list) else "something else"
    except (SyntaxError, ValueError):
        seen[name] = "does not parse"
    try:
        json.loads(back[name])
        seen[name] += ", JSON"
    except json.JSONDecodeError:
        seen[name] += ", not JSON"
    text = back[name].replace("\n", "\\n")
    print(f"{name:8} ({seen[name]}): {text if len(text) < 100 else text[:30] + ' [..] ' + text[-30:]}")
glued = ast.literal_eval(back["answers"])
print("two answers come back as", glued, "| of 1001 the file has", back["long"].count("answer "), "| by to_json the row is", "the same" if whole else "changed")
held = whole and glued == ["Yes.No."] and back["long"].count("answer ") < 10 and "-0.12345679 " in back["logps"] and seen == {
    "answers": "another list, not JSON", "turn": "the same, not JSON", "messages": "does not parse, not JSON",
    "logps": "does not parse, not JSON", "long": "does not parse, not JSON"}
raise SystemExit(not held)
PY

# Output seen:
#   datasets 5.2.0 pandas 3.1.1 numpy 2.4.6
#   answers  (another list, not JSON): ['Yes.' 'No.']
#   turn     (the same, not JSON): {'role': 'user', 'content': 'Rain?'}
#   messages (does not parse, not JSON): [{'role': 'user', 'content': 'Rain?'}\n {'role': 'assistant', 'content': 'Yes.'}]
#   logps    (does not parse, not JSON): [-0.12345679 -2.5       ]
#   long     (does not parse, not JSON): ['answer 0' 'answer 1' 'answer 2' ... 'answer 998' 'answer 999'\n 'answer 1000']
#   two answers come back as ['Yes.No.'] | of 1001 the file has 6 | by to_json the row is the same
