"""Batch inference on a Ray cluster: a file of prompts in, the same rows with answers out.

Ray Data hands chunks of rows to a pool of actors, each with an engine of its own, and runs a chunk again elsewhere when
an actor or its node is lost.  An actor writes the answers of a chunk to a file (`batch_job.py`): so no row is lost or
answered twice, and a job that is started again goes on with the chunks that have no file yet.  At the end the files are
put together in the order of the rows.

All nodes must see the paths, on a shared file system for instance.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from minivllm.async_llm import AsyncLLM, EngineDeadError
from minivllm.batch_job import ANSWER_FIELDS, MALFORMED, Job, Rows
from minivllm.inputs import checked_model
from minivllm.loading.resolve import is_hub_id, resolve
from minivllm.outputs import RequestOutput
from minivllm.sampling_params import RequestOutputKind, SamplingParams
from minivllm.validation import check_int

CHUNKS_AT_ONCE = 2  # of an actor: the next one fills the batch while the last rows of one come to their end


@dataclass(frozen=True)
class Summary:
    """What a call of `generate` did."""

    num_rows: int  # of the input
    num_answered_rows: int  # by this call; the others had been before
    num_failed_rows: int  # of those, with an `error` in place of an answer


def generate(
    input_path: str | os.PathLike[str],
    output_path: str | os.PathLike[str],
    model: str | None = None,
    *,
    sampling_params: Mapping[str, Any] | None = None,
    concurrency: int | tuple[int, int] = 1,
    chunk_size: int = 64,
    num_cpus: float | None = None,
    num_gpus: float | None = None,
    show_progress: bool = True,
    **engine_arguments: Any,
) -> Summary:
    """Answer every row of a .jsonl or .parquet file; a file of that kind comes out, with the same rows in their order.

    A row has "prompt" (text), "prompt_token_ids" or "messages" (a conversation), and may have "sampling_params", which
    go over those given here, but for what is null.  It comes back with "generated_text", "finish_reason",
    "num_prompt_tokens", "num_generated_tokens" and "error": why it could not be answered, else null.

    sampling_params: options of SamplingParams; what is not given is the model's default.
    concurrency: engines, or the fewest and the most for Ray to choose from.
    chunk_size: rows that are computed again if an actor is lost.
    num_cpus, num_gpus: of each engine; default: tensor_parallel_size GPUs where the cluster has any, else one CPU.
    engine_arguments: those of AsyncLLM.

    Raises ValueError for wrong options, for an input that changed since the answers so far, and RuntimeError if an
    engine cannot be started.
    """
    try:
        import ray
    except ImportError as error:
        raise ImportError(f"{error}; a batch job needs more: pip install 'minivllm[ray]'") from None

    source, target = Path(input_path).absolute(), Path(output_path).absolute()
    rows = Rows.open(source)
    if target.suffix != source.suffix:
        raise ValueError(f"output_path must end in {source.suffix} as the input does, got {target.name!r}")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"output_path: there is no folder {target.parent}")
    check_int("chunk_size", chunk_size, 1)
    pool_size, model = _pool_size(concurrency), checked_model(model)
    given = dict(sampling_params or {})
    _one_answer(SamplingParams(**given))  # mistakes show before anything is started
    job = Job.make(rows, target, model, given, chunk_size, engine_arguments)
    if job.is_finished():
        job.remove_parts()
        return Summary(rows.count, 0, 0)
    try:
        missing, done = job.missing_chunks(), (0, 0)
        if missing:
            if model is not None and not is_hub_id(model):
                resolve(model, need_tokenizer=False, need_weights=False)  # a path to nothing shows before engines start
            if not ray.is_initialized():
                ray.init()
            if num_gpus is None and num_cpus is None:
                num_gpus = float(engine_arguments.get("tensor_parallel_size", 1)) if _has_gpus(ray) else None
            resources = dict(num_cpus=num_cpus or (None if num_gpus else 1), num_gpus=num_gpus)
            pool = ray.data.ActorPoolStrategy(
                **pool_size, max_tasks_in_flight_per_actor=CHUNKS_AT_ONCE, enable_true_multi_threading=True
            )
            done = _answer_chunks(ray, job, missing, (job, model, engine_arguments), pool, resources, show_progress)
        job.put_together()
    finally:
        if not job.has_answers():
            job.remove_parts()
    return Summary(rows.count, *done)


def _answer_chunks(
    ray: Any,
    job: Job,
    missing: list[int],
    engine: tuple[Any, ...],
    pool: Any,
    resources: dict[str, float | None],
    show_progress: bool,
) -> tuple[int, int]:
    """Have these chunks answered by a pool of actors; (rows answered, of those rows failed)."""
    ray.data.DataContext.get_current().enable_progress_bars = False
    chunks = ray.data.from_items([{"chunk": chunk} for chunk in missing], override_num_blocks=len(missing))
    answered = chunks.map_batches(
        _Engine,
        batch_size=1,
        fn_constructor_args=engine,
        compute=pool,
        max_concurrency=CHUNKS_AT_ONCE,
        **resources,
    )
    num_answered = num_failed = 0
    total = job.rows.count
    done = total - sum(len(job.numbers_of(chunk)) for chunk in missing)
    with tqdm(total=total, initial=done, unit="row", desc="Answered", disable=not show_progress) as bar:
        try:
            for row in answered.iter_rows():
                num_answered += row["num_rows"]
                num_failed += row["num_failed"]
                bar.update(row["num_rows"])
        except ray.exceptions.RayError as error:
            cause = str(error).strip().splitlines()[-1]  # the last line of tracebacks within tracebacks
            raise RuntimeError(f"the job has stopped, and goes on where it was when started again: {cause}") from error
    return num_answered, num_failed


def _pool_size(concurrency: int | tuple[int, int]) -> dict[str, int]:
    """The number of engines, or the fewest and the most, as Ray names them."""
    if not isinstance(concurrency, (tuple, list)):
        check_int("concurrency", concurrency, 1)
        return {"size": concurrency}
    for number in concurrency:
        check_int("concurrency", number, 1)
    if len(concurrency) != 2 or concurrency[0] > concurrency[1]:
        raise ValueError(f"concurrency must be a number of engines, or the fewest and the most, got {concurrency!r}")
    return {"min_size": concurrency[0], "max_size": concurrency[1]}


def _one_answer(params: SamplingParams) -> SamplingParams:
    if params.n != 1:
        raise ValueError(f"n must be 1, got {params.n}: a row has one answer")
    return params


def _has_gpus(ray: Any) -> bool:
    return ray.cluster_resources().get("GPU", 0) > 0


class _Engine:
    """What an actor runs: an engine, and the chunks that Ray Data gives it, several at once."""

    def __init__(self, job: Job, model: str | None, engine_arguments: dict[str, Any]) -> None:
        self._job = job
        self._make_llm = lambda: AsyncLLM(model, **engine_arguments)
        self._llm = self._make_llm()
        self._one_by_one = threading.Lock()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[int]]:
        [chunk] = batch["chunk"]
        if not self._job.has(int(chunk)):  # a chunk whose actor was lost may have been written all the same
            rows = self._job.rows_of(int(chunk))
            try:
                answers = self._run(self._answer_all(rows))
            except EngineDeadError:  # of one of these rows, perhaps: that one is not to take the others with it
                with self._one_by_one:
                    answers = [self._answer_alone(row) for row in rows]
            self._job.write(int(chunk), answers)
        answers = self._job.read(int(chunk))
        return {"num_rows": [len(answers)], "num_failed": [sum(row["error"] is not None for row in answers)]}

    def _run(self, answering: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(answering, self._loop).result()

    async def _answer_all(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return await asyncio.gather(*map(self._answer, rows))

    def _answer_alone(self, row: dict[str, Any]) -> dict[str, Any]:
        """The answer, by a new engine if there is none any more; a row that has ended two of them gets no third."""
        reason = None
        for _ in range(2):
            try:
                return self._run(self._answer(row))
            except EngineDeadError as error:
                reason = error
            try:
                self._llm.shutdown()
                self._llm = self._make_llm()
            except Exception:
                os._exit(1)  # an actor elsewhere takes over
        return dict.fromkeys(ANSWER_FIELDS) | {"error": f"no engine outlived this row: {reason}"}

    async def _answer(self, row: dict[str, Any]) -> dict[str, Any]:
        answer: dict[str, Any] = dict.fromkeys(ANSWER_FIELDS)
        try:
            own = row.get("sampling_params") or {}
            own = {name: value for name, value in own.items() if value is not None}  # Parquet fills in what others have
            options = self._llm.inputs.default_options() | self._job.sampling_params | own
            params = _one_answer(SamplingParams(**options, output_kind=RequestOutputKind.FINAL_ONLY))
            prompt = await self._llm.with_tokenizer(self._prompt, row)
            output: RequestOutput
            async for output in self._llm.generate(prompt, params):
                completion = output.outputs[0]
                answer |= {
                    "generated_text": completion.text,
                    "finish_reason": completion.finish_reason,
                    "num_prompt_tokens": len(output.prompt_token_ids),
                    "num_generated_tokens": len(completion.token_ids),
                }
        except EngineDeadError:
            raise
        except Exception as error:  # whatever there is in a row, the others are answered
            answer["error"] = str(error) or type(error).__name__
        return answer

    def _prompt(self, row: dict[str, Any]) -> Any:
        if row.keys() == {MALFORMED}:
            raise ValueError("the row is not a JSON object")
        if row.get("messages") is not None:
            return self._llm.inputs.preprocess_chat(row["messages"])
        if row.get("prompt_token_ids") is not None:
            return {"prompt_token_ids": list(row["prompt_token_ids"])}
        if row.get("prompt") is None:
            raise ValueError("the row has no prompt, prompt_token_ids or messages")
        return row["prompt"]
