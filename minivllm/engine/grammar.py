"""Structured outputs: which tokens a grammar allows next, worked out by llguidance (the extra `structured`).

The mask for a token hangs on the one before it, which may be in flight when a step is launched.  So that token is
waited for, and the mask worked out, when the model's part of the step runs already.
"""

from __future__ import annotations

import functools
import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

from minivllm.sampling_params import StructuredOutputsParams

MAX_COMPILED = 64  # grammars kept for requests to come
MAX_CHARACTERS = 1 << 20  # of a grammar as llguidance takes it
MAX_GRAMMAR_CHARACTERS = 1 << 16  # of one in a notation that has to be converted first, rule by rule
COMPILER_STACK = 512 << 20  # bytes of address space: llguidance goes into nested rules by recursion
SECONDS_ALONE = 2e-3  # on a step's masks.  Most take microseconds, less than it takes to wake threads

Result = TypeVar("Result")
_starting = threading.Lock()

# Of JSON schemas: keywords that hold schemas by name, and those that hold values.
MAPS = ("properties", "patternProperties", "dependentSchemas", "$defs", "definitions")
VALUES = ("enum", "const", "default", "examples")


class Grammar:
    """How far one request's output has come in its grammar."""

    def __init__(self, matcher: Any, num_words: int) -> None:
        self.matcher = matcher
        self.num_words = num_words  # of a mask: the vocabulary by 32

    def copy(self) -> Grammar:
        """One of another output, as far as this."""
        return Grammar(self.matcher.deep_copy(), self.num_words)

    @property
    def error(self) -> str | None:
        """Why the grammar cannot go on: it has come to a dead end, or to a limit.  Its masks allow the end then."""
        if not self.matcher.is_error():
            return None
        return str(self.matcher.get_error()).partition("<state>")[0].strip()  # behind which is the whole grammar

    def accept(self, token: int) -> bool:
        """Go on by a token; False if the grammar does not allow it."""
        return bool(self.matcher.try_consume_tokens([token]) == 1 and not self.matcher.is_error())


class TokenMasks:
    """What some of a step's requests may sample.  In another process it is but the places, and a way to the masks."""

    def __init__(self, places: Iterable[int] = ()) -> None:
        self.places = list(places)  # the requests' numbers among those that sample
        self.catch_up: Callable[[], None] | None = None  # lets the grammars go on by the tokens that are in flight
        self.receive: Callable[[], np.ndarray | None] | None = None  # gets the masks from the process of the grammars
        self._grammars: list[Grammar] = []

    def __len__(self) -> int:
        return len(self.places)

    def add(self, place: int, grammar: Grammar) -> None:
        self.places.append(place)
        self._grammars.append(grammar)

    def words(self, out: np.ndarray | None = None) -> np.ndarray | None:
        """[masks, vocab / 32] int32: bit i of word w is set if token 32 w + i may come next.  To be asked for once.
        None: they cannot be had, and nobody will read the step's tokens.

        out: [at least so many masks, vocab / 32] int32: where to write them.
        """
        if self.receive is not None:
            return self.receive()
        from llguidance.numpy import fill_next_token_bitmask, fill_next_token_bitmask_par

        if self.catch_up is not None:
            self.catch_up()
        count = len(self)
        words = np.empty((count, self._grammars[0].num_words), np.int32) if out is None else out[:count]
        deadline = time.perf_counter() + SECONDS_ALONE
        for row, grammar in enumerate(self._grammars):
            if time.perf_counter() > deadline:
                rest = [(self._grammars[i].matcher, i) for i in range(row, count)]
                fill_next_token_bitmask_par(_threads(), rest, words)
                break
            fill_next_token_bitmask(grammar.matcher, words, row)
        return words

    def __reduce__(self) -> Any:
        return TokenMasks, (self.places,)


@functools.cache
def _threads() -> Any:
    from llguidance import LLExecutor

    return LLExecutor()


class GrammarCompiler:
    """Makes grammars for one tokenizer, for any thread."""

    def __init__(self, tokenizer: Any, vocab_size: int, eos_token_ids: Collection[int]) -> None:
        try:
            import llguidance.hf
        except ImportError as error:
            raise ValueError('structured_outputs needs llguidance; pip install "minivllm[structured]"') from error
        ends = sorted(eos_token_ids)
        if not ends:
            raise ValueError("structured_outputs needs a model with an end-of-sequence token")
        self._tokenizer = llguidance.hf.from_tokenizer(tokenizer, n_vocab=vocab_size, eos_token=ends)
        self._num_words = -(-vocab_size // 32)
        self._special_tokens = frozenset(tokenizer.all_special_tokens)
        self._compiled: OrderedDict[str, Grammar] = OrderedDict()  # at their beginning, the last used at the end
        self._lock = threading.Lock()  # not held while one is compiled

    def start(self, params: StructuredOutputsParams) -> Grammar:
        """A grammar at its beginning.  Raises ValueError, with llguidance's reason, for one that is not well-formed."""
        key = repr(params)
        with self._lock:
            grammar = self._compiled.get(key)
        if grammar is None:
            try:
                grammar = _on_large_stack(lambda: self._compile(params))
            except Exception as error:  # the converters of grammars raise their own
                raise ValueError(f"structured_outputs: {error or type(error).__name__}") from error
        with self._lock:
            self._compiled[key] = grammar
            self._compiled.move_to_end(key)
            if len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
        return grammar.copy()

    def _compile(self, params: StructuredOutputsParams) -> Grammar:
        from llguidance import LLMatcher, LLParserLimits

        source = _source(params, self._special_tokens)
        if len(source) > MAX_CHARACTERS:
            raise ValueError(f"{len(source)} characters are too many for a grammar; {MAX_CHARACTERS} are the most")
        limits = LLParserLimits(  # llguidance's own are too small for a choice among 2,000 texts
            max_items_in_row=100_000, step_max_items=500_000, initial_lexer_fuel=10_000_000, step_lexer_fuel=10_000_000
        )
        matcher = LLMatcher(self._tokenizer, source, log_level=0, limits=limits)
        grammar = Grammar(matcher, self._num_words)
        if grammar.error is not None:
            raise ValueError(grammar.error)
        masks, first = TokenMasks(), grammar.copy()
        masks.add(0, first)
        masks.words()
        if first.error is not None:
            raise ValueError(f"the grammar allows no text ({first.error})")
        return grammar


def _on_large_stack(function: Callable[[], Result]) -> Result:
    """What `function` returns, run on a thread with a stack of its own."""
    with ThreadPoolExecutor(1) as pool:
        with _starting:  # what follows holds for all threads that are started meanwhile
            previous = threading.stack_size(COMPILER_STACK)
            try:
                future = pool.submit(function)  # which starts the thread
            finally:
                threading.stack_size(previous)
        return future.result()


def _source(params: StructuredOutputsParams, special_tokens: Collection[str]) -> str:
    """The grammar in llguidance's own form."""
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import any_to_lark

    if params.regex is not None:
        return LLMatcher.grammar_from_regex(params.regex)
    if params.grammar is not None:
        if len(params.grammar) > MAX_GRAMMAR_CHARACTERS:
            raise ValueError(f"grammar has {len(params.grammar)} characters; {MAX_GRAMMAR_CHARACTERS} are the most")
        return LLMatcher.grammar_from_lark(any_to_lark(params.grammar))
    if params.choice is not None:
        return LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(text) for text in params.choice))
    if params.structural_tag is not None:
        return _tags(json.loads(params.structural_tag), params, special_tokens)
    schema = {"type": "object"} if params.json is None else params.json
    return LLMatcher.grammar_from_json_schema(*_schema(schema, params))


def _schema(schema: Any, params: StructuredOutputsParams) -> tuple[Any, Any]:
    """A JSON schema, and llguidance's options for it."""
    if isinstance(schema, str):
        schema = json.loads(schema)
    if params.disable_additional_properties:
        schema = _closed(schema)
    options: dict[str, Any] = {"whitespace_flexible": not params.disable_any_whitespace}
    if params.whitespace_pattern is not None:
        options["whitespace_pattern"] = params.whitespace_pattern
    return schema, options


def _closed(schema: Any) -> Any:
    """The schema, its objects without further properties where it does not say."""
    if isinstance(schema, list):
        return [_closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed: dict[str, Any] = {}
    for key, value in schema.items():
        if key in MAPS and isinstance(value, dict):  # names, not keywords, to schemas
            closed[key] = {name: _closed(part) for name, part in value.items()}
        else:
            closed[key] = value if key in VALUES else _closed(value)
    if isinstance(schema.get("properties"), dict):
        closed.setdefault("additionalProperties", False)
    return closed


def _tags(structure: Any, params: StructuredOutputsParams, special_tokens: Collection[str]) -> str:
    from llguidance import StructTag

    try:
        parts = [(part["begin"], part["schema"], part["end"]) for part in structure["structures"]]
        triggers = list(structure["triggers"])
    except (KeyError, TypeError):
        raise ValueError("structural_tag must have triggers, and structures with begin, schema and end") from None
    tags = []
    for begin, content, end in parts:
        trigger = next((trigger for trigger in triggers if begin.startswith(trigger)), None)
        if not trigger:
            raise ValueError(f"structural_tag: no trigger is the beginning of {begin!r}")
        schema, options = _schema(content, params)
        tags.append(StructTag(trigger=trigger, begin=begin, grammar={**schema, "x-guidance": options}, end=end))
    return StructTag.to_grammar(tags, assume_special=any(tag.trigger in special_tokens for tag in tags))
