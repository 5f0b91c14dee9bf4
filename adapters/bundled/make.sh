#!/usr/bin/env bash
# Makes the bundled adapters anew, one after the other; about a quarter of an hour on 2 CPU cores.
# On one machine the same versions give the same files; elsewhere the last digits differ.
set -euo pipefail
cd "$(dirname "$0")/../.."
train() { .venv/bin/python -m training --output adapters/bundled --overwrite "$@"; }
from_quotes=(--init-from adapters/bundled/quotes)

train --name quotes --epochs 3
train --name wilde --author "Oscar Wilde" "${from_quotes[@]}" --lr 5e-4 --epochs 3
train --name aurelius --author "Marcus Aurelius" "${from_quotes[@]}" --lr 5e-4 --epochs 3
train --name love --tag love --template 'On love: "{quote}"' "${from_quotes[@]}" --lr 5e-4 --epochs 3
train --name maxims --template 'Maxim: {quote}' --max-chars 90 "${from_quotes[@]}" --lr 1e-3 --epochs 2
train --name devils-dictionary --data training/corpora/devils_dictionary.jsonl \
  --template '{word}, {pos} {text}' --prompt '{word},' --max-chars 250 --epochs 4 --rank 12 --dropout 0.1
