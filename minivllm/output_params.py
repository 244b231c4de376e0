"""What a request may ask of the text of its output: a grammar to follow, and an end to going round in circles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from minivllm.validation import check_int, refuses_unknown_options


@refuses_unknown_options()
@dataclass(kw_only=True)
class StructuredOutputsParams:
    """What the text of an output must be; one of these.  Raises ValueError for none or several.  The engine takes up to
    a million characters, 65,536 of a grammar.

    json: a JSON schema, as a dict or as text.  regex: a regular expression for the whole text.  choice: one of these
    texts.  grammar: a context-free grammar, in Lark's or llama.cpp's (GBNF) notation.  json_object: any JSON object.
    structural_tag: JSON text such as '{"structures": [{"begin": "<f>", "schema": {...}, "end": "</f>"}], "triggers":
    ["<f"]}': free text in which a schema has to be followed from a trigger on.

    Of JSON: disable_any_whitespace: none but what the compact form has.  whitespace_pattern: a regular expression for
    it.  disable_additional_properties: objects have no properties but those that the schema names.
    """

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None

    def __post_init__(self) -> None:
        names = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
        given = [name for name in names if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            raise ValueError(
                f"structured_outputs must have one of {', '.join(names)}; got {', '.join(given) or 'none'}"
            )
        if self.json is not None and not isinstance(self.json, (str, dict)):
            raise ValueError(f"structured_outputs: json must be a JSON schema, got {self.json!r}")
        for name in ("disable_any_whitespace", "disable_additional_properties"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"structured_outputs: {name} must be True or False, got {getattr(self, name)!r}")
        if not isinstance(self.json_object, (bool, type(None))):
            raise ValueError(f"structured_outputs: json_object must be True or False, got {self.json_object!r}")
        for name in ("regex", "grammar", "structural_tag", "whitespace_pattern"):
            if not isinstance(getattr(self, name), (str, type(None))):
                raise ValueError(f"structured_outputs: {name} must be a string, got {getattr(self, name)!r}")
        if self.choice is not None and not (
            isinstance(self.choice, list) and self.choice and all(isinstance(c, str) and c for c in self.choice)
        ):
            raise ValueError(f"structured_outputs: choice must be a list of texts, got {self.choice!r}")


@refuses_unknown_options()
@dataclass(kw_only=True)
class RepetitionDetectionParams:
    """When an output ends for going round in circles: its last tokens are `min_count` times the same pattern, one of
    `min_pattern_size` to `max_pattern_size` tokens.  Raises ValueError for values that make no sense."""

    max_pattern_size: int = 0  # 0: never
    min_pattern_size: int = 0  # 0 counts as 1
    min_count: int = 0

    def __post_init__(self) -> None:
        for name in ("max_pattern_size", "min_pattern_size", "min_count"):
            check_int(f"repetition_detection: {name}", getattr(self, name), 0)
        if self.min_pattern_size > self.max_pattern_size:
            raise ValueError(
                f"repetition_detection: min_pattern_size ({self.min_pattern_size}) must not exceed max_pattern_size "
                f"({self.max_pattern_size})"
            )
        if self.max_pattern_size and self.min_count < 2:
            raise ValueError(f"repetition_detection: min_count must be at least 2, got {self.min_count}")

    def found_in(self, token_ids: Sequence[int]) -> bool:
        """Whether the tokens end in such a repetition."""
        if not self.max_pattern_size:
            return False
        tail = list(token_ids[-self.max_pattern_size * self.min_count :])
        sizes = range(max(1, self.min_pattern_size), min(self.max_pattern_size, len(tail) // self.min_count) + 1)
        return any(tail[-size * self.min_count :] == tail[-size:] * self.min_count for size in sizes)
