"""The files of a batch job: rows in, answers by chunk, and the rows with their answers out.

A file appears with all of its content or not at all, under a name that only depends on what is in it: whoever writes
the answers of a chunk a second time changes nothing, and what is missing can be seen.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ANSWER_FIELDS = ("generated_text", "finish_reason", "num_prompt_tokens", "num_generated_tokens", "error")
MALFORMED = "malformed"  # the one field of a row whose line is no JSON object: that line


@dataclass(frozen=True)
class Rows:
    """The rows of a file, any of which can be read without those before it.  Blank lines are none."""

    path: Path
    count: int
    starts: tuple[int, ...]  # of a .jsonl file: where every STRIDE-th row begins, in bytes

    STRIDE = 64

    @classmethod
    def open(cls, path: Path) -> Rows:
        """Raises ValueError for another kind of file, FileNotFoundError for none."""
        if path.suffix == ".parquet":
            import pyarrow.parquet

            return cls(path, pyarrow.parquet.read_metadata(path).num_rows, ())
        if path.suffix != ".jsonl":
            raise ValueError(f"input_path must be a .jsonl or .parquet file, got {path.name!r}")
        starts, count, place = [], 0, 0
        with path.open("rb") as file:
            for line in file:
                if line.strip():
                    if count % cls.STRIDE == 0:
                        starts.append(place)
                    count += 1
                place += len(line)
        return cls(path, count, tuple(starts))

    def read(self, begin: int, end: int) -> list[dict[str, Any]]:
        """Rows [begin, end)."""
        if self.path.suffix == ".parquet":
            return _read_parquet(self.path, begin, end)
        first = begin // self.STRIDE
        with self.path.open("rb") as file:
            file.seek(self.starts[first])
            lines = itertools.islice(filter(bytes.strip, file), begin - first * self.STRIDE, end - first * self.STRIDE)
            return [_parse(line) for line in lines]


def _parse(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    return row if isinstance(row, dict) else {MALFORMED: line.decode("utf-8", "replace").strip()}


def _read_parquet(path: Path, begin: int, end: int) -> list[dict[str, Any]]:
    import pyarrow.parquet

    found, first, changed = [], 0, path.stat().st_mtime_ns
    metadata = pyarrow.parquet.read_metadata(path)
    for group in range(metadata.num_row_groups):
        last = first + metadata.row_group(group).num_rows
        if first < end and last > begin:
            table = _row_group(path, changed, group)
            found += table.slice(max(0, begin - first), min(end, last) - max(begin, first)).to_pylist()
        first = last
    return found


@functools.lru_cache(maxsize=2)  # chunks next to each other are of the same one
def _row_group(path: Path, changed: int, group: int) -> Any:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        return file.read_row_group(group)


@dataclass(frozen=True)
class Job:
    """A file of rows, the files of the chunks that are answered, and the file that they become."""

    rows: Rows
    target: Path
    sampling_params: dict[str, Any]
    chunk_size: int
    identity: str

    @classmethod
    def make(
        cls,
        rows: Rows,
        target: Path,
        model: str | None,
        sampling_params: dict[str, Any],
        chunk_size: int,
        engine_arguments: dict[str, Any],
    ) -> Job:
        """Start a job, or go on with one.  Raises ValueError if the answers so far are those of another one."""
        stat = rows.path.stat()
        what = [str(rows.path), stat.st_size, stat.st_mtime_ns, model, sampling_params, chunk_size, engine_arguments]
        identity = hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()
        job = cls(rows, target, sampling_params, chunk_size, identity)
        if not target.exists() and not job.folder.exists():
            job.finished_mark.unlink(missing_ok=True)
        known = [job.finished_mark]
        if job.has_answers():  # or nothing was answered, and any other job may have the folder
            known.append(job.folder / "job")
        for path in known:
            if path.exists() and path.read_text() != identity:
                raise ValueError(
                    f"{target} was begun with another input, model or options; remove "
                    f"{' and '.join(path.name for path in (target, job.folder) if path.exists())}, or choose another "
                    "output_path"
                )
        if not job.is_finished():
            if target.exists():
                raise ValueError(f"{target} is there already; remove it, or choose another output_path")
            job.folder.mkdir(exist_ok=True)
            write_at_once(job.folder / "job", lambda path: path.write_text(identity))
        return job

    @property
    def folder(self) -> Path:
        return self.target.with_name(self.target.name + ".parts")

    @property
    def finished_mark(self) -> Path:
        return self.target.with_name(f".{self.target.name}.job")

    def is_finished(self) -> bool:
        return self.target.exists() and self.finished_mark.exists()

    @property
    def num_chunks(self) -> int:
        return -(-self.rows.count // self.chunk_size)

    def missing_chunks(self) -> list[int]:
        return [chunk for chunk in range(self.num_chunks) if not self.has(chunk)]

    def numbers_of(self, chunk: int) -> range:
        """Of the rows in a chunk."""
        return range(chunk * self.chunk_size, min((chunk + 1) * self.chunk_size, self.rows.count))

    def rows_of(self, chunk: int) -> list[dict[str, Any]]:
        numbers = self.numbers_of(chunk)
        return self.rows.read(numbers.start, numbers.stop)

    def has(self, chunk: int) -> bool:
        return self._part(chunk).exists()

    def has_answers(self) -> bool:
        """Whether any chunk is answered."""
        return any(self.folder.glob("*.jsonl"))

    def read(self, chunk: int) -> list[dict[str, Any]]:
        """The answers of a chunk."""
        return [json.loads(line) for line in self._part(chunk).read_bytes().splitlines()]

    def write(self, chunk: int, answers: list[dict[str, Any]]) -> None:
        """All of them or nothing."""
        lines = "".join(json.dumps(answer) + "\n" for answer in answers)
        write_at_once(self._part(chunk), lambda path: path.write_text(lines, encoding="utf-8"))

    def put_together(self) -> None:
        """Make the output of the answers of all chunks, and remove those."""
        write = self._write_parquet if self.target.suffix == ".parquet" else self._write_jsonl
        write_at_once(self.finished_mark, lambda path: path.write_text(self.identity))
        write_at_once(self.target, write)
        self.remove_parts()

    def remove_parts(self) -> None:
        """Remove the answers of chunks, if they are still there."""
        if self.folder.exists():
            for path in self.folder.iterdir():
                path.unlink()
            self.folder.rmdir()

    def _write_jsonl(self, path: Path) -> None:
        with path.open("w", encoding="utf-8") as file:
            for chunk in range(self.num_chunks):
                file.writelines(json.dumps(row) + "\n" for row in self._answered_rows(chunk))

    def _write_parquet(self, path: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        answers = pyarrow.schema(
            [("generated_text", pyarrow.string()), ("finish_reason", pyarrow.string()),
             ("num_prompt_tokens", pyarrow.int64()), ("num_generated_tokens", pyarrow.int64()),
             ("error", pyarrow.string())]
        )  # fmt: skip
        own = pyarrow.parquet.read_schema(self.rows.path).remove_metadata()
        schema = pyarrow.schema([*(field for field in own if field.name not in ANSWER_FIELDS), *answers])
        with pyarrow.parquet.ParquetWriter(path, schema) as writer:
            for chunk in range(self.num_chunks):
                writer.write_table(pyarrow.Table.from_pylist(self._answered_rows(chunk), schema))

    def _answered_rows(self, chunk: int) -> list[dict[str, Any]]:
        return [row | answer for row, answer in zip(self.rows_of(chunk), self.read(chunk), strict=True)]

    def _part(self, chunk: int) -> Path:
        return self.folder / f"{chunk:08d}.jsonl"


def write_at_once(path: Path, write: Callable[[Path], Any]) -> None:
    """Let a file appear with all of its content."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    write(scratch)
    with scratch.open("rb") as file:
        os.fsync(file.fileno())  # or the name could be there before the content, should the host go down
    scratch.replace(path)
