"""openai-python: prints what its calls gave, as JSON. Arguments: URL, key."""

import json
import sys

import openai

url, key = sys.argv[1:]
client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60)
PROMPT = "Quote by Oscar Wilde:"
GREEDY = {"prompt": PROMPT, "temperature": 0, "max_tokens": 8}
found = {"version": openai.__version__}

found["models"] = [model.id for model in client.models.list()]
found["model"] = client.models.retrieve("wilde").id

for model in ("demo", "wilde", "poet", "wilde:0.5,love:0.5"):
    plain = client.completions.create(model=model, **GREEDY)
    chunks = list(client.completions.create(model=model, stream=True, stream_options={"include_usage": True}, **GREEDY))
    found[model] = {
        "text": plain.choices[0].text,
        "streamed": "".join(chunk.choices[0].text for chunk in chunks if chunk.choices),
        "finish_reason": plain.choices[0].finish_reason,
        "streamed_reason": [c.choices[0].finish_reason for c in chunks if c.choices][-1],
        "usage": plain.usage.model_dump(include={"prompt_tokens", "completion_tokens", "total_tokens"}),
        "streamed_usage": chunks[-1].usage.model_dump(include={"prompt_tokens", "completion_tokens", "total_tokens"}),
        "object": plain.object,
        "id": plain.id,
    }

two = client.completions.create(model="quotes", prompt=[PROMPT, "The"], n=2, seed=5, max_tokens=8, logprobs=3)
found["choices"] = [[choice.index, choice.text, choice.logprobs.model_dump()] for choice in two.choices]

echoed = client.completions.create(model="wilde", prompt=PROMPT, echo=True, logprobs=1, max_tokens=1, temperature=0)
found["echo"] = echoed.choices[0].model_dump()

bias = client.completions.create(model="demo", logit_bias={"50256": 100}, **GREEDY)
found["bias"] = [bias.choices[0].text, bias.choices[0].finish_reason]

messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROMPT}]
chat = client.chat.completions.create(model="wilde", messages=messages, temperature=0, max_tokens=8)
parts = client.chat.completions.create(model="wilde", messages=messages, temperature=0, max_tokens=8, stream=True)
found["chat"] = [chat.choices[0].message.content, chat.choices[0].message.role]
found["chat_streamed"] = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)

found["errors"] = {}
for name, call in {
    "model": lambda: client.completions.create(model="nobody", prompt=PROMPT),
    "field": lambda: client.completions.create(model="demo", prompt=PROMPT, temperature=-1),
    "unknown": lambda: client.completions.create(model="demo", prompt=PROMPT, extra_body={"colour": "red"}),
    "long": lambda: client.completions.create(model="demo", prompt="word " * 300),
    "key": lambda: client.with_options(api_key="wrong").completions.create(model="demo", prompt=PROMPT),
}.items():
    try:
        call()
    except openai.APIStatusError as error:
        found["errors"][name] = [type(error).__name__, error.status_code, error.param, error.message]
print(json.dumps(found))
