"""Requests of the official client; run by the Python of vLLM's environment, which has it.

    python client.py ADDRESS REQUESTS.json ANSWERS.json

A request is the arguments of `chat.completions.create`. An answer has a text, or the pieces of a stream, or an error.
"""

import json
import sys
from pathlib import Path
from typing import Any

from openai import APIStatusError, OpenAI


def ask(client: OpenAI, model: str, request: dict[str, Any]) -> dict[str, Any]:
    try:
        answer = client.chat.completions.create(model=model, temperature=0, **request)
        if request.get("stream"):
            chunks = [chunk.choices[0] for chunk in answer if chunk.choices]
            return {
                "pieces": [chunk.delta.content for chunk in chunks if chunk.delta.content],
                "finish_reason": chunks[-1].finish_reason,
            }
    except APIStatusError as error:
        return {"status": error.status_code, "error": error.message}
    choice = answer.choices[0]
    return {
        "text": choice.message.content,
        "finish_reason": choice.finish_reason,
        "prompt_tokens": answer.usage.prompt_tokens,
        "logprobs": [token.logprob for token in choice.logprobs.content] if choice.logprobs else None,
    }


def main() -> None:
    address, requests, answers = sys.argv[1:]
    client = OpenAI(base_url=f"{address}/v1", api_key="unused", max_retries=0)
    model = client.models.list().data[0].id
    done = [ask(client, model, request) for request in json.loads(Path(requests).read_text())]
    Path(answers).write_text(json.dumps(done))


if __name__ == "__main__":
    main()
