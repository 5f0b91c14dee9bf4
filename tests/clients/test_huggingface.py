"""huggingface_hub's InferenceClient, unchanged, against a real server."""

import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError, TextGenerationError

from tests.api.conftest import ServerProcess
from tests.clients.conftest import KEY
from tests.clients.test_openai import PROMPT, generated


@pytest.fixture(scope="module")
def client(served: ServerProcess) -> InferenceClient:
    return InferenceClient(served.url, token=KEY, timeout=60)


@pytest.mark.parametrize("adapter", [None, "wilde", "poet"])
def test_text_generation(adapter: str | None, client: InferenceClient, served: ServerProcess) -> None:
    expected = generated(served, adapter, 12)
    assert client.text_generation(PROMPT, adapter_id=adapter, max_new_tokens=12) == expected
    streamed = client.text_generation(PROMPT, adapter_id=adapter, max_new_tokens=12, stream=True)
    assert "".join(streamed).removesuffix("<|endoftext|>") == expected, (
        "the client shows the EOS token, as it does TGI's"
    )


def test_details(client: InferenceClient) -> None:
    whole = client.text_generation(
        PROMPT, adapter_id="quotes", max_new_tokens=20, details=True, decoder_input_details=True, do_sample=True,
        seed=4, top_p=0.9, temperature=0.7, return_full_text=True, stop=["\n"],
    )  # fmt: skip
    assert whole.generated_text.startswith(PROMPT)
    assert whole.details.generated_tokens == len(whole.details.tokens)
    assert [token.text for token in whole.details.prefill] == ["Quote", " by", " Oscar", " Wilde", ":"]
    assert whole.details.seed == 4
    parts = list(client.text_generation(PROMPT, adapter_id="quotes", max_new_tokens=20, details=True, stream=True))
    assert parts[-1].details is not None
    assert parts[-1].details.generated_tokens == len(parts)
    assert [part.index for part in parts] == list(range(1, len(parts) + 1))


def test_errors_are_the_clients_own(client: InferenceClient, served: ServerProcess) -> None:
    with pytest.raises((HfHubHTTPError, TextGenerationError), match="nobody"):
        client.text_generation(PROMPT, adapter_id="nobody")
    with pytest.raises((HfHubHTTPError, TextGenerationError), match="max_new_tokens"):
        client.text_generation(PROMPT, max_new_tokens=5000)
    with pytest.raises((HfHubHTTPError, TextGenerationError), match="wrong key"):
        InferenceClient(served.url, token="wrong").text_generation(PROMPT)


def test_the_openai_dialect_through_it(served: ServerProcess) -> None:
    client = InferenceClient(base_url=f"{served.url}/v1", api_key=KEY, timeout=60)
    messages = [{"role": "user", "content": PROMPT}]
    answer = client.chat_completion(messages, model="wilde", max_tokens=12, temperature=0)
    assert answer.choices[0].message.content == generated(served, "wilde", 12)
