"""text-generation and lorax-client: print what their calls gave, as JSON. Arguments: URL, key."""

import json
import sys
from importlib.metadata import version

import lorax
import lorax.errors as lorax_errors
import text_generation
from text_generation.errors import ValidationError

url, key = sys.argv[1:]
PROMPT = "Quote by Oscar Wilde:"
found = {"versions": {name: version(name) for name in ("text-generation", "lorax-client")}}
headers = {"Authorization": f"Bearer {key}"}


def shown(response):
    details = response.details
    return {
        "text": response.generated_text,
        "reason": getattr(details.finish_reason, "value", details.finish_reason),
        "count": details.generated_tokens,
        "tokens": [[token.id, token.text, token.logprob] for token in details.tokens],
        "prefill": [[token.id, token.text, token.logprob] for token in details.prefill],
        "seed": details.seed,
    }


tgi = text_generation.Client(url, headers=headers, timeout=60)
found["tgi"] = shown(tgi.generate(PROMPT, max_new_tokens=8, decoder_input_details=True))
everything = {"do_sample": True, "seed": 3, "top_p": 0.9, "top_k": 20, "temperature": 0.8, "typical_p": 0.9}
everything |= {"truncate": 4, "frequency_penalty": 0.5, "repetition_penalty": 1.1}
best = tgi.generate(PROMPT, max_new_tokens=8, do_sample=True, best_of=2).details  # the client takes no seed with it
found["tgi best"] = [best.generated_tokens, *(each.generated_tokens for each in best.best_of_sequences)]
found["tgi sampled"] = shown(tgi.generate(PROMPT, max_new_tokens=8, stop_sequences=["zzz"], **everything))
parts = list(tgi.generate_stream(PROMPT, max_new_tokens=8))
found["tgi stream"] = ["".join(p.token.text for p in parts if not p.token.special), parts[-1].generated_text]
top = tgi.generate(PROMPT, max_new_tokens=2, top_n_tokens=3).details.top_tokens
found["tgi top"] = [[token.id for token in tokens] for tokens in top]

client = lorax.Client(url, headers=headers, timeout=60)
for name in (None, "wilde", "poet"):
    found[f"lorax {name}"] = shown(client.generate(PROMPT, adapter_id=name, max_new_tokens=8, details=True))
    parts = list(client.generate_stream(PROMPT, adapter_id=name, max_new_tokens=8))
    found[f"lorax stream {name}"] = [
        "".join(part.token.text for part in parts if not part.token.special),
        parts[-1].generated_text,
    ]

found["errors"] = {}
for name, call in {
    "tgi field": lambda: tgi.generate(PROMPT, max_new_tokens=5000),
    "lorax adapter": lambda: client.generate(PROMPT, adapter_id="nobody"),
    "lorax source": lambda: client.generate(PROMPT, adapter_id="wilde", adapter_source="s3"),
}.items():
    try:
        call()
    except (lorax_errors.ValidationError, lorax_errors.NotFoundError, ValidationError) as error:
        found["errors"][name] = [type(error).__name__, str(error)]
print(json.dumps(found))
