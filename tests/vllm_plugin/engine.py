"""Answers of vLLM's offline engine; run by the Python of its environment.

    python engine.py JOB.json ANSWERS.json

A job is the arguments of `LLM` and batches of chats. Answers are token ids and logprobs.
"""

import json
import sys
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams


def answer(engine: LLM, batch: dict[str, Any]) -> dict[str, Any]:
    """Token ids of prompts and answers, with the logprob of each token; what a prompt reused of the prefix cache."""
    sampling = SamplingParams(**{"temperature": 0, "logprobs": 0, **batch.get("sampling", {})})
    outputs = engine.chat(batch["chats"], sampling, use_tqdm=False)
    return {
        "prompts": [output.prompt_token_ids for output in outputs],
        "cached": [output.num_cached_tokens for output in outputs],
        "answers": [output.outputs[0].token_ids for output in outputs],
        "logprobs": [
            [of_token[token].logprob for token, of_token in zip(output.token_ids, output.logprobs, strict=True)]
            for output in (output.outputs[0] for output in outputs)
        ],
    }


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    engine = LLM(**job["engine"], disable_log_stats=False)
    answers = [answer(engine, batch) for batch in job["batches"]]
    metrics = {metric.name: metric.value for metric in engine.get_metrics() if hasattr(metric, "value")}
    Path(sys.argv[2]).write_text(json.dumps({"batches": answers, "metrics": metrics}))


if __name__ == "__main__":
    main()
