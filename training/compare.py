"""`python -m training compare A B --prompts FILE`: what adapters write after the same prompts, side by side.

A prompt's samples depend on the prompt, its place in the file and the seed: every voice draws from the same seeds.
"""

import argparse
import json
import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from training.config import DEMO_BASE, DEVICES, flag_of, resolved_path
from training.errors import ConfigError, DataError

BASE = "base"
STOPPED, LIMIT, FULL = "<EOS>", "... (token limit)", "... (context full)"
_LEAST_COLUMN = 30  # a narrower one isn't read but deciphered


@dataclass(frozen=True)
class Answer:
    """What a voice wrote after a prompt, and how it ended: STOPPED, LIMIT or FULL."""

    text: str
    ending: str
    tokens: int


@dataclass(frozen=True)
class Answered:
    """A prompt with each voice's answers: voice -> one of each sample."""

    prompt: str
    answers: dict[str, list[Answer]]


def parser() -> argparse.ArgumentParser:
    """The flags."""
    made = argparse.ArgumentParser(
        prog="python -m training compare",
        description="Have adapters, and the base, answer the same prompts with the same seeds, side by side.",
    )
    made.add_argument("voices", nargs="+", metavar="ADAPTER", help="an adapter's folder, or `base` for the base alone")
    made.add_argument("--prompts", required=True, metavar="FILE", help="one prompt a line; or JSONL with `prompt`")
    made.add_argument("--base", action="store_true", help="have the base answer, too")
    made.add_argument("--model", metavar="DIR|ID", help="the base (default: the first adapter's, as recorded)")
    made.add_argument(
        "--samples",
        type=int,
        default=1,
        metavar="N",
        help="answers of each voice to each prompt (default: %(default)s)",
    )
    made.add_argument("--temperature", type=float, default=0.8, help="of the sampling (default: %(default)s)")
    made.add_argument(
        "--top-p",
        type=float,
        default=0.95,
        help="sample from the most probable tokens that hold this (default: %(default)s)",
    )
    made.add_argument("--greedy", action="store_true", help="take the most probable token each time, don't sample")
    made.add_argument("--max-tokens", type=int, default=64, metavar="N", help="of an answer (default: %(default)s)")
    made.add_argument("--seed", type=int, default=0, help="of the samples (default: %(default)s)")
    made.add_argument("--device", choices=DEVICES, default="auto", help="auto: a GPU if there is one")
    made.add_argument("--output", metavar="FILE", help="write the answers here as well: .md or .json")
    return made


def main(argv: Sequence[str]) -> None:
    """Answer, print, and write what was asked for. Raises TrainingError, OSError."""
    flags = parser().parse_intermixed_args(argv)
    _check(flags)
    prompts = read_prompts(Path(flags.prompts))
    answered = _answer(flags, prompts)
    print(for_terminal(answered, shutil.get_terminal_size().columns))
    if flags.output is not None:
        how = {n: getattr(flags, n) for n in ("greedy", "temperature", "top_p", "max_tokens", "seed", "samples")}
        if flags.output.endswith(".md"):
            text = as_markdown(answered)
        else:
            values = {"format_version": 1, "sampling": how, "prompts": [asdict(one) for one in answered]}
            text = json.dumps(values, indent=1, ensure_ascii=False) + "\n"
        Path(flags.output).write_text(text, encoding="utf-8")
        print(f"\nwrote {flags.output}")


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file: lines of text, or the field `prompt` of JSONL. Raises DataError."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(
            f"--prompts {path}: is not UTF-8 ({error.reason}); convert it first, for example with iconv"
        ) from None
    except OSError as error:
        raise DataError(f"--prompts {path}: can't be read: {error.strerror or error}") from error
    prompts: list[str] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        prompt: Any = line.rstrip()
        if path.suffix in (".jsonl", ".ndjson"):
            try:
                prompt = json.loads(line)["prompt"]
            except (ValueError, KeyError, TypeError):
                prompt = None
            if not (isinstance(prompt, str) and prompt):
                raise DataError(f"--prompts {path}: line {number} is not a JSON object with a text as its `prompt`")
        prompts.append(prompt)
    if not prompts:
        raise DataError(f"--prompts {path}: holds no prompt; write one a line")
    return prompts


def for_terminal(answered: Sequence[Answered], width: int) -> str:
    """Voices in columns where each has room, otherwise one below the other."""
    blocks: list[str] = []
    for one in answered:
        voices = list(one.answers)
        column = (width - 3 * (len(voices) - 1)) // len(voices)
        lines = [one.prompt]
        if column < _LEAST_COLUMN:
            label = max(map(len, voices))
            for voice, answers in one.answers.items():
                for answer in answers:
                    lines.append(_wrapped(answer, f"  {voice:{label}} | ", max(20, width), f"  {'':{label}} | "))
        else:
            lines.append(" | ".join(f"{voice[:column]:{column}}" for voice in voices).rstrip())
            lines.append("-+-".join("-" * column for _ in voices))
            for sample in zip(*one.answers.values(), strict=True):
                cells = [_wrapped(answer, "", column).split("\n") for answer in sample]
                for row in range(max(map(len, cells))):
                    line = " | ".join(f"{cell[row] if row < len(cell) else '':{column}}" for cell in cells)
                    lines.append(line.rstrip())
                lines.append("-+-".join("-" * column for _ in voices))
            del lines[-1]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def as_markdown(answered: Sequence[Answered]) -> str:
    """A table for each prompt, a column for each voice."""
    lines: list[str] = []
    for one in answered:
        lines += [f"## {_cell(one.prompt)}", ""]
        lines += [f"| {' | '.join(map(_cell, one.answers))} |", "|" + "---|" * len(one.answers)]
        for sample in zip(*one.answers.values(), strict=True):
            lines.append("| " + " | ".join(f"{_cell(a.text)} {_cell(a.ending)}" for a in sample) + " |")
        lines.append("")
    return "\n".join(lines)


def _check(flags: argparse.Namespace) -> None:
    for name, least in (("samples", 1), ("max_tokens", 1), ("seed", 0)):
        if getattr(flags, name) < least:
            raise ConfigError(f"{flag_of(name)} is {getattr(flags, name)}: give at least {least}")
    if not 0 < flags.temperature <= 100:
        raise ConfigError(f"--temperature is {flags.temperature}: give a number above 0, or --greedy")
    if not 0 < flags.top_p <= 1:
        raise ConfigError(f"--top-p is {flags.top_p}: give a number above 0, at most 1")
    if flags.greedy and flags.samples > 1:
        raise ConfigError("--greedy gives one answer, whatever the seed: leave --samples out")
    if flags.output is not None and not flags.output.endswith((".md", ".json")):
        raise ConfigError(f"--output {flags.output}: name it .md or .json")
    if flags.output is not None and not Path(flags.output).absolute().parent.is_dir():
        raise ConfigError(f"--output {flags.output}: there is no such folder")


def _answer(flags: argparse.Namespace, prompts: Sequence[str]) -> list[Answered]:
    import torch  # imported late, as what follows: flags are checked before it takes its seconds

    from training import made
    from training.base import open_base
    from training.distributed import join
    from training.sampling import Sample, SamplingSettings, greedy, sample
    from training.train import name_in_model

    adapters = made.find([voice for voice in flags.voices if voice != BASE])
    with_base = flags.base or BASE in flags.voices
    if len(adapters) + with_base < 2:
        raise ConfigError("give two adapters or more, or one and --base")
    base = open_base(resolved_path(flags.model or (adapters[0].model if adapters else str(DEMO_BASE))))
    for adapter in adapters:
        adapter.digest(base)
    encoded = [base.encode(prompt) for prompt in prompts]
    for prompt, ids in zip(prompts, encoded, strict=True):
        if not 0 < len(ids) < base.context:
            raise DataError(f"--prompts: {prompt[:60]!r} has {len(ids)} tokens; the base takes 1 to {base.context - 1}")
    model: Any = made.attach(base.load(), adapters)
    model.to(join(flags.device).device)
    settings = SamplingSettings(flags.temperature, flags.top_p, flags.max_tokens)

    @torch.no_grad()
    def answers(number: int) -> list[Answer]:
        ids = encoded[number]
        if flags.greedy:
            tokens, _ = greedy(model, ids, base.eos, flags.max_tokens)
            stopped = tokens[-1:] == [base.eos]
            samples = [Sample(tokens[:-1] if stopped else tokens, stopped)]
        else:
            samples = sample(model, [ids] * flags.samples, base.eos, settings, flags.seed + number)
        endings = [
            STOPPED if s.stopped else LIMIT if len(s.token_ids) == flags.max_tokens else FULL for s in samples
        ]  # fmt: skip
        texts = [base.tokenizer.decode(s.token_ids) for s in samples]
        return [Answer(t, e, len(s.token_ids)) for t, e, s in zip(texts, endings, samples, strict=True)]

    answered: list[Answered] = []
    for number, prompt in enumerate(prompts):
        of_voices: dict[str, list[Answer]] = {}
        if with_base:
            with model.disable_adapter():
                of_voices[BASE] = answers(number)
        for place, adapter in enumerate(adapters):
            model.set_adapter(name_in_model(place))
            of_voices[str(adapter.folder) if adapter.name == BASE else adapter.name] = answers(number)
        answered.append(Answered(prompt, of_voices))
    return answered


def _wrapped(answer: Answer, first: str, width: int, then: str = "") -> str:
    text = f"{_one_line(answer.text)} {answer.ending}"
    return textwrap.fill(text, width, initial_indent=first, subsequent_indent=then, drop_whitespace=True)


def _cell(text: str) -> str:
    """Text for a Markdown table's cell."""
    return _one_line(text).replace("|", "\\|").replace("<", "&lt;").strip()


def _one_line(text: str) -> str:
    """Line breaks as `\\n`; what a terminal would obey is left out."""
    return "".join(c for c in text.replace("\n", "\\n").replace("\t", " ") if c.isprintable())
