"""An adapter in llama.cpp: converted by llama.cpp's own converter, and run on the base's GGUF file as a server would.

llama.cpp runs in a process of its own, through its Python binding ``xllamacpp`` (the extra ``llamacpp``): a failed
assertion of it, or the memory it takes, ends that process and not the migration.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasuite.bases import digest_json, file_digest
from lorasuite.data import Row, end_tokens
from lorasuite.errors import AdapterError, ConfigError, Problem
from lorasuite.evaluation._harness import adapted
from lorasuite.evaluation._served import SAME, Served
from lorasuite.evaluation._serving import NO_EFFECT, SERVED_ROWS, check, compared_texts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: llama.cpp's converter, in a checkout of it.
CONVERTER = "convert_lora_to_gguf.py"
#: The same, where its scripts are installed.
INSTALLED = "llama-convert-lora-to-gguf"
#: Names the directory of a checkout.
LLAMA_CPP = "LLAMA_CPP"
#: Python binding of llama.cpp.
BINDING = "xllamacpp"
#: What is run in the process of its own.
_RUN = Path(__file__).with_name("_llama_cpp_run.py")
_HOW = (
    f"Get it with `git clone https://github.com/ggml-org/llama.cpp` and `pip install gguf`, and give the directory: "
    f"--llama-cpp DIR, or {LLAMA_CPP} in the environment."
)
#: Lines of what a failed program said that are shown.
SHOWN = 5
#: What a GGUF file begins with.
MAGIC = b"GGUF"
#: The smallest share of the tokens of PEFT's answers that llama.cpp has to find most likely as well. Less than all: the
#: base's GGUF file may be quantized, and the cache of keys and values is in 16 bits.
EQUAL_TOKENS = 0.75
#: The same, of tokens at which the adapter changes what is most likely.
EQUAL_CHANGED = 0.5
#: Tokens of each answer that are compared.
LLAMA_CPP_TOKENS = 16


def find_converter(given: Path | None = None) -> list[str]:
    """The command that runs llama.cpp's converter.

    Args:
        given: a checkout of llama.cpp, or the script itself; if None ``$LLAMA_CPP``, or what is on the path.

    Raises:
        ConfigError: it is not there.
    """
    named = given if given is not None else Path(os.environ[LLAMA_CPP]) if os.environ.get(LLAMA_CPP) else None
    if named is not None:
        script = named / CONVERTER if named.is_dir() else named
        if not script.is_file():
            raise ConfigError(Problem(str(named), f"holds no {CONVERTER}", _HOW))
        return [sys.executable, str(script)]
    if (script_on_path := shutil.which(CONVERTER)) is not None:
        return [sys.executable, script_on_path]
    if (installed := shutil.which(INSTALLED)) is not None:
        return [installed]
    raise ConfigError(Problem("llama.cpp", f"its {CONVERTER} is not found", _HOW))


def convert(adapter: Path, base: Path, output: Path, *, llama_cpp: Path | None = None, outtype: str = "f16") -> None:
    """Write an adapter as a GGUF LoRA.

    Args:
        adapter: a PEFT directory.
        base: the directory of its base, of which only configs and tokenizer are read.
        output: the file, in a directory of its own or in one that is there.
        llama_cpp: as of :func:`find_converter`.
        outtype: precision of the factors in the file: f32, f16, bf16 or q8_0.

    Raises:
        ConfigError: the converter is not there.
        AdapterError: llama.cpp cannot hold the adapter, or its converter fails.
        CheckpointError: adapter or base cannot be read.
    """
    refused = check(adapter, base)["llama.cpp"].problems
    if refused:
        remedy = "Merge the adapter into its base (PEFT's merge_and_unload), and convert that."
        raise AdapterError([Problem(str(adapter), f"llama.cpp does not take it: {what}", remedy) for what in refused])
    command = find_converter(llama_cpp)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as scratch:
        made = Path(scratch) / output.name
        given = ["--base", str(base), "--outtype", outtype, "--outfile", str(made), str(adapter)]
        done = subprocess.run([*command, *given], capture_output=True, text=True, check=False)
        if done.returncode != 0 or not _is_gguf(made):
            what = f"{CONVERTER} ended with {done.returncode} and wrote no GGUF file: {_last_lines(done)}"
            remedy = (
                "Its own requirements must be installed (pip install gguf), and it must know the base: try a newer one."
            )
            raise AdapterError(Problem(str(adapter), what, remedy))
        made.rename(output)


def check_gguf(path: Path) -> None:
    """
    Raises:
        ConfigError: it is no GGUF file.
    """
    if not _is_gguf(path):
        what = "is no GGUF file" if path.exists() else "is not there"
        raise ConfigError(Problem(f"serving_gguf: {path}", what, "Give the GGUF file of the new base that is served."))


def llama_cpp_missing() -> str | None:
    """What is not there of llama.cpp to run an adapter in it; None if everything is."""
    lacks = []
    if find_spec(BINDING) is None:
        lacks.append(f"its Python binding {BINDING} is not installed (pip install 'lorasuite[llamacpp]')")
    try:
        find_converter()
    except ConfigError:
        lacks.append(f"its {CONVERTER} is not found ({LLAMA_CPP} in the environment, or the path)")
    return " and ".join(lacks) or None


def llama_cpp_versions() -> dict[str, str]:
    """The version of the binding, and a digest of the converter and what lies beside it that it imports.

    Raises:
        ConfigError: the converter is not there.
    """
    script = Path(find_converter()[-1]).resolve()
    files = [script, *script.parent.glob("convert_*.py"), *script.parent.glob("conversion/*.py")]
    digest = digest_json({str(file.relative_to(script.parent)): file_digest(file) for file in sorted({*files})})
    return {"binding": importlib.metadata.version(BINDING), "converter": digest}


#: Of each answer, of each of its tokens: the most likely token at its place, and that one's log-probability.
_Likely = list[list[tuple[int, float]]]


def compare_gguf(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    adapter: Path,
    gguf: Path,
    rows: Sequence[Row] = (),
    *,
    base: Path,
    device: str = "cpu",
) -> Served:
    """Convert an adapter, and see whether llama.cpp gives PEFT's greedy answers with it.

    llama.cpp is given each answer up to each of its tokens, and has to find that token most likely: where it does at
    all of them, its own greedy answer is the same. One token that differs would make another answer of all that follow,
    which a quantized base does without harm. Both are given tokens: how the GGUF file tokenizes text is not compared.

    Args:
        model: the base, which is given back as it came.
        tokenizer: the base's.
        adapter: a PEFT directory.
        gguf: the base as llama.cpp loads it.
        rows: held-out rows, as of :func:`lorasuite.evaluation.compare_merged`.
        base: the directory of the base.
        device: of the model.

    Raises:
        ConfigError: the converter is not there.
        DataError: if no answer fits.
    """
    texts = compared_texts(rows, tokenizer, model)
    if rows:
        asked = [(ids[: len(ids) - read + 1], read - 1) for ids, read in texts]
    else:  # the second half of a sentence
        asked = [(ids[: len(ids) // 2], len(ids) - len(ids) // 2) for ids, _ in texts]
    prompts = [prompt for prompt, _ in asked]
    limits = [min(count, LLAMA_CPP_TOKENS) for _, count in asked]
    ends = end_tokens(model, tokenizer, [row.target(tokenizer)[2] for row in rows[:SERVED_ROWS]])
    try:
        with tempfile.TemporaryDirectory() as scratch:
            lora = Path(scratch) / "adapter.gguf"
            convert(adapter, base, lora)
            with adapted(model, None, device) as plain:
                of_base = _greedy(plain, prompts, limits, ends, device)
            with adapted(model, adapter, device) as tuned:
                answers = _greedy(tuned, prompts, limits, ends, device)
            with adapted(model, None, device) as plain:
                bare = _most_likely(plain, prompts, answers, device)
            found, without, file = _in_llama_cpp(
                Path(scratch), gguf, lora, prompts, [(answers, 1.0), (answers, 0.0), (of_base, 0.0)]
            )
    except AdapterError as error:
        return Served(ok=False, ran=True, problems=[str(error)])
    pairs = [pair for one, row in zip(of_base, file, strict=True) for pair in zip(one, row, strict=True)]
    same = sum(token == other for token, (other, _) in pairs)
    served = _judged(answers, bare, found, without)
    told = f"without the adapter {same} of {len(pairs)} tokens of the bare base's answers are"
    return served.model_copy(update={"notes": [*served.notes, told]})


def _judged(answers: list[list[int]], bare: list[list[int]], found: _Likely, without: _Likely) -> Served:
    """
    Args:
        answers: of PEFT with the adapter.
        bare: what the bare base finds most likely at their tokens.
        found: what llama.cpp does with the adapter.
        without: what it does without.
    """
    tokens = [place for row in zip(answers, bare, found, without, strict=True) for place in zip(*row, strict=True)]
    equal = sum(token == one for token, _, (one, _), _ in tokens)
    unmoved = all(one[0] == other[0] and abs(one[1] - other[1]) <= NO_EFFECT for _, _, one, other in tokens)
    # tokens that show whether the adapter is applied
    shown = [(token, one[0], other[0]) for token, plain, one, other in tokens if token != plain]
    kept = sum(token == one for token, one, _ in shown)
    stays = kept < len(shown) and all(one == other for _, one, other in shown)
    problems = [SAME] if unmoved or stays else []
    if equal < EQUAL_TOKENS * len(tokens):
        least = f"{100 * EQUAL_TOKENS:.0f} % have to be"
        problems.append(f"{equal} of {len(tokens)} tokens of PEFT's answers are the most likely ones, and {least}")
    elif kept < EQUAL_CHANGED * len(shown):
        problems.append(
            f"{kept} of {len(shown)} tokens that the adapter changes are those of PEFT, and half have to be"
        )
    whole = sum(all(t == o for t, (o, _) in zip(a, f, strict=True)) for a, f in zip(answers, found, strict=True))
    told = f"{equal} of {len(tokens)} tokens of PEFT's answers are the most likely ones"
    notes = [f"{told}, {whole} of {len(answers)} answers equal"]
    return Served(ok=not problems, ran=True, problems=problems, notes=notes)


def _greedy(
    model: Any, prompts: list[list[int]], limits: list[int], ends: Sequence[int], device: str
) -> list[list[int]]:
    """A model's most likely answers with their end tokens, without penalties that its own settings may name."""
    import torch
    from transformers import GenerationConfig

    found = []
    for prompt, count in zip(prompts, limits, strict=True):
        plan = GenerationConfig(
            max_new_tokens=count,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            eos_token_id=list(ends),
            pad_token_id=ends[0],
        )
        ids = torch.tensor([prompt], device=device)
        with torch.inference_mode():
            out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=plan)
        found.append(out[0, len(prompt) :].tolist())
    return found


def _most_likely(model: Any, prompts: list[list[int]], answers: list[list[int]], device: str) -> list[list[int]]:
    """What a model finds most likely at each token of given answers."""
    import torch

    found = []
    for prompt, answer in zip(prompts, answers, strict=True):
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([[*prompt, *answer]], device=device), use_cache=False).logits
        found.append(logits[0, len(prompt) - 1 : -1].argmax(-1).tolist())
    return found


def _in_llama_cpp(
    scratch: Path, gguf: Path, lora: Path, prompts: list[list[int]], asked: Sequence[tuple[list[list[int]], float]]
) -> list[_Likely]:
    """What llama.cpp finds most likely at each token of answers.

    Args:
        scratch: a directory for this alone.
        asked: answers to each prompt, and what the LoRA is multiplied by.

    Raises:
        AdapterError: it does not load the files, or ends.
    """
    import torch

    plan, answers = scratch / "asked.json", scratch / "answers.json"
    questions = [(*one, scale) for given, scale in asked for one in zip(prompts, given, strict=True)]
    content = {
        "gguf": str(gguf),
        "lora": str(lora),
        "socket": str(scratch / "it.sock"),
        "threads": torch.get_num_threads(),
        "questions": questions,
    }
    plan.write_text(json.dumps(content), encoding="utf-8")
    command = [sys.executable, "-P", str(_RUN), str(plan), str(answers)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode != 0 or not answers.is_file():
        what = f"llama.cpp ended with {done.returncode}: {_last_lines(done)}"
        raise AdapterError(Problem(str(gguf), what, "Is it a GGUF file of the new base, and is there memory for it?"))
    said = [[(token, logprob) for token, logprob in row] for row in json.loads(answers.read_text(encoding="utf-8"))]
    return [said[n : n + len(prompts)] for n in range(0, len(said), len(prompts))]


def _is_gguf(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def _last_lines(done: subprocess.CompletedProcess[str]) -> str:
    said = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    return " / ".join(line[:300] for line in said[-SHOWN:])
