#!/usr/bin/env bash
# Makes the bundled adapters anew, one after the other; about half an hour on 2 CPU cores.
# On one machine the same versions give the same files; elsewhere the last digits differ.
set -euo pipefail
cd "$(dirname "$0")/../.."
train() { .venv/bin/python -m training --output adapters/bundled --overwrite "$@"; }

train --name quotes
train --name wilde --author "Oscar Wilde" --epochs 10 --rank 4
train --name aurelius --author "Marcus Aurelius" --epochs 8 --rank 16 --targets c_attn,attn.c_proj
train --name love --tag love --template 'On love: "{quote}"' --epochs 8 --rank 8 --targets c_attn,c_fc
train --name maxims --template 'Maxim: {quote}' --max-chars 90 --epochs 2 --rank 8
train --name devils-dictionary --data training/corpora/devils_dictionary.jsonl \
  --template '{word}, {pos} {text}' --prompt '{word},' --max-chars 250 --epochs 5 --rank 12
