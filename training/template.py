"""How a row becomes text: `Quote by {author}: "{quote}"` -> a prompt that people type and a completion to learn.

Knows nothing about tokens. What is learned begins where the bare prompt ends, so that the adapter writes the rest of
the template from either form of the prompt: with its punctuation (`Quote by NAME:`) or bare (`Quote by NAME`).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from string import Formatter

from training.errors import ConfigError

_OPENING = " \t\n\"'“‘«([{<*_"
_PUNCTUATION = " \t\n:;,.-–—=>|"


@dataclass(frozen=True)
class Template:
    """A template split at the end of its prompt. Make one with `parse`."""

    text: str
    fields: tuple[str, ...]  # in order of appearance, each once
    prompt: str  # a prefix of text; the part a person types
    bare_prompt: str | None  # prompt without its closing punctuation; None where there is none

    @classmethod
    def parse(cls, text: str, prompt: str | None = None) -> "Template":
        """Split `text` after `prompt`, by default before its last field and that field's opening marks.

        Raises ConfigError if there is no field, a field is malformed, or nothing is left to prompt with.
        """
        pieces = _pieces(text)
        fields = tuple(dict.fromkeys(field for _, field in pieces if field is not None))
        if not fields:
            raise ConfigError(
                f"--template {text!r} has no {{field}}; write for example 'Quote by {{author}}: \"{{quote}}\"'"
            )
        if prompt is None:
            prompt = text[: text.rindex("{" + fields[-1] + "}")].rstrip(_OPENING)
        elif not text.startswith(prompt) or prompt == text:
            raise ConfigError(f"--prompt {prompt!r} is not the beginning of --template {text!r}")
        if not prompt.strip():
            raise ConfigError(
                f"--template {text!r} leaves nothing to prompt with: put a word before it, e.g. 'Maxim: {{quote}}'"
            )
        bare = prompt.rstrip(_PUNCTUATION)
        return cls(text, fields, prompt, bare if bare and bare != prompt else None)

    @property
    def prompt_fields(self) -> tuple[str, ...]:
        """The fields that the prompt holds."""
        return tuple(field for _, field in _pieces(self.prompt) if field is not None)

    @property
    def completion_fields(self) -> tuple[str, ...]:
        """The fields that the adapter writes."""
        return tuple(field for _, field in _pieces(self.text[len(self.prompt) :]) if field is not None)

    def forms(self) -> dict[str, str]:
        """Prompt form -> the part of the template that is its prompt: `punctuated`, and `bare` where it differs."""
        forms = {"punctuated": self.prompt}
        return forms if self.bare_prompt is None else forms | {"bare": self.bare_prompt}

    def render(self, row: Mapping[str, str]) -> str:
        """The whole text of a row; it must hold every field."""
        return fill(self.text, row)

    def completion_pattern(self, form: str) -> re.Pattern[str]:
        """What has to follow the prompt of `form`, up to EOS, to be in the exact format.

        A field is one or more characters on one line, without the character that closes it in the template.
        """
        pieces = _pieces(self.text[len(self.forms()[form]) :])
        pattern = ""
        for i, (literal, field) in enumerate(pieces):
            pattern += re.escape(literal)
            if field is not None:
                closing = pieces[i + 1][0][:1] if i + 1 < len(pieces) else ""
                stop = "" if closing.isspace() else re.escape(closing)
                pattern += rf"[^\s{stop}](?:[^\n{stop}]*[^\s{stop}])?"
        return re.compile(pattern)


def fill(template: str, row: Mapping[str, str]) -> str:
    """`template` with its fields replaced by the row's."""
    return "".join(literal + (row[field] if field is not None else "") for literal, field in _pieces(template))


def _pieces(text: str) -> list[tuple[str, str | None]]:
    try:
        parsed = [(literal, field, spec, conversion) for literal, field, spec, conversion in Formatter().parse(text)]
    except ValueError as error:
        raise ConfigError(f"--template {text!r} is malformed: {error}; write {{{{ for a brace") from None
    for _, field, spec, conversion in parsed:
        if field is not None and (not field.isidentifier() or spec or conversion):
            raise ConfigError(f"--template {text!r}: {field!r} is not a plain field name such as {{quote}}")
    return [(literal, field) for literal, field, _, _ in parsed]
