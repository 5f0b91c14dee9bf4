"""lm-evaluation-harness: the same tasks over HTTP and with transformers. Arguments: URL, checkpoint. Prints JSON."""

import json
import os
import sys
from importlib.metadata import version

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import lm_eval
from lm_eval.tasks import TaskManager

url, checkpoint = sys.argv[1:]
TASKS = ["chorus_choice", "chorus_rolling", "chorus_generate"]


def scores(model, arguments):
    done = lm_eval.simple_evaluate(
        model=model, model_args=arguments, tasks=TASKS, task_manager=TaskManager(include_path="tasks"),
        bootstrap_iters=0, log_samples=True,
    )  # fmt: skip
    return {
        "results": {task: {k: v for k, v in done["results"][task].items() if "," in k} for task in TASKS},
        "answers": {task: [sample["resps"] for sample in done["samples"][task]] for task in TASKS},
    }


remote = {
    "model": "demo", "base_url": f"{url}/v1/completions", "tokenizer": checkpoint, "tokenizer_backend": "huggingface",
    "num_concurrent": 2, "max_retries": 1, "max_length": 256, "batch_size": 2,
}  # fmt: skip
local = {"pretrained": checkpoint, "device": "cpu", "dtype": "float32", "batch_size": 1}
found = {
    "version": version("lm_eval"),
    "http": scores("local-completions", remote),
    "transformers": scores("hf", local),
}
print("FOUND " + json.dumps(found))
