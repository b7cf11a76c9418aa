"""What llama.cpp answers with a LoRA and without: run by its path, in a process of its own.

It is given a JSON file that says what to load and ask, and writes another. Nothing of lorasuite is imported.
"""

from __future__ import annotations

import ctypes
import json
import signal
import sys
from pathlib import Path
from typing import Any

#: Of ``prctl``: the signal that a process gets when the one that started it is gone.
PR_SET_PDEATHSIG = 1


def main(asked: Path, answers: Path) -> None:
    """Write which token llama.cpp finds most likely at each place of given answers, and its log-probability.

    Args:
        asked: a file with ``gguf``, ``lora``, ``threads``, ``socket`` (a path) and ``questions``: of each the prompt
            and the answer in tokens, and what the LoRA is multiplied by.
        answers: the file to write: for each question ``[token, log-probability]`` for each token of the answer.
    """
    import xllamacpp

    given = json.loads(asked.read_text(encoding="utf-8"))
    params = xllamacpp.CommonParams()
    params.model.path = given["gguf"]
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(given["lora"], 1.0)]
    params.n_ctx = max(len(prompt) + len(answer) for prompt, answer, _ in given["questions"]) + 8
    params.n_parallel = 1
    params.warmup = False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = given["threads"]
    params.verbosity = 1  # errors
    params.hostnames = [given["socket"]]  # it listens there and at no port
    try:
        server = xllamacpp.Server(params)
    except RuntimeError:  # which says no more; llama.cpp's own lines do
        sys.exit("it does not load them")
    found = [
        [_next(server, [*prompt, *answer[:place]], scale, cached=place > 0) for place in range(len(answer))]
        for prompt, answer, scale in given["questions"]
    ]
    answers.write_text(json.dumps(found), encoding="utf-8")


def _next(server: Any, tokens: list[int], scale: float, cached: bool) -> tuple[int, float]:
    """The most likely token after these, and its log-probability.

    ``cached``: keys and values of the tokens before the last are those of the request before. llama.cpp takes them from
    requests with another scale as well, where they are others.
    """
    said = server.handle_completions(
        {
            "prompt": tokens,
            "max_tokens": 1,
            "temperature": 0.0,
            "top_k": 1,
            "n_probs": 1,
            "cache_prompt": cached,
            "lora": [{"id": 0, "scale": scale}],
        }
    )
    try:
        found = said["choices"][0]["logprobs"]["content"][0]
    except (KeyError, IndexError, TypeError):
        sys.exit(f"llama.cpp gave no answer: {json.dumps(said)[:500]}")
    return found["id"], found["logprob"]


if __name__ == "__main__":
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
