"""Batch inference on Ray: every row answered once, whatever dies on the way."""

import datetime
import json
import os
import signal
import sys
import threading
import time

import pytest
from conftest import ray_engines

from minivllm import LLM, SamplingParams, batch_job
from minivllm.batch_job import Job, Rows

ENGINE = dict(device="cpu", max_model_len=256, max_num_seqs=32, block_size=16, kv_cache_memory_bytes=1 << 27)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_are_read_from_anywhere(tmp_path):
    rows = [{"id": i, "prompt": "é" * (i % 5)} for i in range(300)]
    found = Rows.open(write_rows(tmp_path / "in.jsonl", rows))
    assert found.count == 300
    for begin, end in ((0, 3), (63, 65), (128, 300), (299, 300)):
        assert found.read(begin, end) == rows[begin:end]
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "in.parquet", row_group_size=70)
    found = Rows.open(tmp_path / "in.parquet")
    for begin, end in ((0, 3), (69, 71), (128, 300), (299, 300)):
        assert found.read(begin, end) == rows[begin:end]
    reads = batch_job._row_group.cache_info().misses
    assert [found.read(i, i + 1) for i in range(140, 210)] == [[row] for row in rows[140:210]]
    assert batch_job._row_group.cache_info().misses <= reads + 1, "a group is not read for each of its rows"
    good = [{"id": i} for i in range(100)]
    (tmp_path / "odd.jsonl").write_text("\n" + "\n \n".join(map(json.dumps, good)) + '\n[1]\n\n{"a": \n')
    found = Rows.open(tmp_path / "odd.jsonl")
    assert found.count == 102 and found.read(60, 70) == good[60:70]
    assert found.read(99, 102) == [good[99], {"malformed": "[1]"}, {"malformed": '{"a":'}]
    deep = "[" * 100_000
    (tmp_path / "deep.jsonl").write_text(deep)
    assert Rows.open(tmp_path / "deep.jsonl").read(0, 1) == [{"malformed": deep}]
    with pytest.raises(ValueError, match="must be a .jsonl or .parquet file"):
        Rows.open(tmp_path / "in.csv")


def test_a_job_goes_on_where_it_was(tmp_path):
    rows = Rows.open(write_rows(tmp_path / "in.jsonl", [{"id": i} for i in range(10)]))

    def make(chunk_size=4):
        return Job.make(rows, tmp_path / "out.jsonl", None, {}, chunk_size, {})

    job = make()
    assert job.missing_chunks() == [0, 1, 2] and [len(job.rows_of(chunk)) for chunk in range(3)] == [4, 4, 2]
    assert make(chunk_size=5).missing_chunks() == [0, 1], "another one may take over what has no answers yet"
    job = make()
    job.write(1, [{"error": None}] * 4)
    assert make().missing_chunks() == [0, 2]
    with pytest.raises(ValueError, match="was begun with another input, model or options; remove out.jsonl.parts, or"):
        make(chunk_size=5)
    from minivllm import ray as batch

    for wrong in (dict(concurrency=0), dict(concurrency=(0, 1)), dict(chunk_size=0)):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be an integer of at least 1"):
            batch.generate(tmp_path / "in.jsonl", tmp_path / "other.jsonl", **wrong)
    assert not (tmp_path / "other.jsonl.parts").exists(), "nothing is begun"
    for chunk in (0, 2):
        job.write(chunk, [{"error": None} for _ in job.rows_of(chunk)])
    job.put_together()
    assert [json.loads(line)["id"] for line in (tmp_path / "out.jsonl").read_text().splitlines()] == list(range(10))
    assert make().is_finished() and not job.folder.exists()
    job.folder.mkdir()  # as it is when that was interrupted
    job.write(0, [])
    pytest.importorskip("ray")
    assert batch.generate(tmp_path / "in.jsonl", tmp_path / "out.jsonl", chunk_size=4) == batch.Summary(10, 0, 0)
    assert not job.folder.exists()


@pytest.fixture(scope="module")
def cluster():
    """A Ray cluster of two nodes on this machine."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=1, include_dashboard=False))
    cluster.second = cluster.add_node(num_cpus=1)
    ray.init(cluster.address, log_to_driver=False, logging_level="error")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def test_every_row_once_while_an_actor_and_a_node_die(cluster, embedded, tmp_path):
    from minivllm import ray as batch

    rows = [{"id": i, "prompt": f"Number {i % 50}:"} for i in range(498)]
    rows += [{"id": 498, "messages": [{"role": "user", "content": "Hi"}]}, {"id": 499, "nothing": True}]
    source, target = write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    with source.open("a") as file:
        file.write("\nHello\n\n")

    def call():
        return batch.generate(
            source, target, embedded, sampling_params=dict(temperature=0, max_tokens=4, ignore_eos=True),
            concurrency=(1, 2), chunk_size=20, num_cpus=1, show_progress=False, **ENGINE,
        )  # fmt: skip

    killed = []

    def disturb():
        parts = target.with_name("out.jsonl.parts")
        while len(list(parts.glob("*.jsonl"))) < 4:
            time.sleep(0.05)
        actor = ray_engines()[0][0]
        os.kill(actor, signal.SIGKILL)
        killed.append(actor)
        count = len(list(parts.glob("*.jsonl")))
        while len(list(parts.glob("*.jsonl"))) < count + 4:
            time.sleep(0.05)
        cluster.remove_node(cluster.second, allow_graceful=False)
        killed.append("node")

    threading.Thread(target=disturb, daemon=True).start()
    summary = call()
    assert summary == batch.Summary(501, 501, 2) and len(killed) == 2
    found = [json.loads(line) for line in target.read_text().splitlines()]
    assert [row["id"] for row in found[:500]] == list(range(500))
    assert found[500]["malformed"] == "Hello" and found[500]["error"] == "the row is not a JSON object"
    assert "no prompt" in found[499]["error"] and found[499]["generated_text"] is None
    assert all(row["error"] is None and row["num_generated_tokens"] == 4 for row in found[:499])
    with LLM(embedded, **ENGINE) as llm:
        params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
        expected = llm.generate([row["prompt"] for row in rows[:50]], params, use_tqdm=False)
    assert [row["generated_text"] for row in found[:50]] == [output.outputs[0].text for output in expected]
    start = time.monotonic()
    assert call() == batch.Summary(501, 0, 0) and time.monotonic() - start < 2, "a second start does no work"
    with pytest.raises(ValueError, match="was begun with another input"):
        batch.generate(source, target, embedded, sampling_params=dict(max_tokens=5), chunk_size=20, **ENGINE)


def test_an_engine_that_cannot_start_is_an_error(cluster, embedded, tmp_path):
    from minivllm import ray as batch

    source, target = write_rows(tmp_path / "in.jsonl", [{"prompt": "One"}]), tmp_path / "out.jsonl"
    options = dict(num_cpus=1, show_progress=False, sampling_params=dict(max_tokens=2))
    with pytest.raises(RuntimeError, match="max_model_len") as error:
        batch.generate(source, target, embedded, **options, **ENGINE | dict(max_model_len=10**9))
    assert len(str(error.value).splitlines()) == 1 and not target.with_name("out.jsonl.parts").exists()
    assert batch.generate(source, target, embedded, **options, **ENGINE) == batch.Summary(1, 1, 0)


def test_parquet(cluster, embedded, tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    from minivllm import ray as batch

    when = [datetime.datetime(2026, 11, day) for day in (1, 2, 3)]
    own = [{"min_tokens": 3}, {"max_tokens": 5, "ignore_eos": True}, None]
    columns = {"id": [1, 2, 3], "prompt": ["One", "Two \u00e9", None], "weight": [0.5, None, 2.0], "when": when}
    columns["sampling_params"] = own
    table = pyarrow.table(columns)
    parquet.write_table(table, tmp_path / "in.parquet")
    summary = batch.generate(
        tmp_path / "in.parquet", tmp_path / "out.parquet", embedded, sampling_params=dict(max_tokens=3), num_cpus=1,
        show_progress=False, **ENGINE,
    )  # fmt: skip
    assert summary == batch.Summary(3, 3, 1)
    found = parquet.read_table(tmp_path / "out.parquet")
    assert found.select(list(columns)).equals(table)
    assert found["num_generated_tokens"].to_pylist() == [3, 5, None] and found["generated_text"].null_count == 1


def test_mistakes(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    from minivllm import ray as batch

    monkeypatch.setattr(ray, "is_initialized", lambda: pytest.fail("Ray was started"))

    source = write_rows(tmp_path / "in.jsonl", [{"prompt": "x"}])
    with pytest.raises(ValueError, match="output_path must end in .jsonl"):
        batch.generate(source, tmp_path / "out.parquet")
    with pytest.raises(ValueError, match="temperature must be"):
        batch.generate(source, tmp_path / "out.jsonl", sampling_params=dict(temperature=-1))
    with pytest.raises(ValueError, match="n must be 1, got 2"):
        batch.generate(source, tmp_path / "out.jsonl", sampling_params=dict(n=2, temperature=1))
    with pytest.raises(FileNotFoundError):
        batch.generate(tmp_path / "none.jsonl", tmp_path / "out.jsonl")
    with pytest.raises(FileNotFoundError, match="output_path: there is no folder .*new"):
        batch.generate(source, tmp_path / "new" / "out.jsonl")
    for wrong in ((1,), (3, 1), (1, 2, 3)):
        with pytest.raises(ValueError, match="concurrency must be a number of engines, or the fewest and the most"):
            batch.generate(source, tmp_path / "out.jsonl", concurrency=wrong)
    with pytest.raises(ValueError, match="concurrency must be an integer of at least 1, got 1.5"):
        batch.generate(source, tmp_path / "out.jsonl", concurrency=1.5)
    for model in ("/nowhere", ""):
        with pytest.raises((FileNotFoundError, ValueError), match="no folder '/nowhere'|must not be empty"):
            batch.generate(source, tmp_path / "out.jsonl", model)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"], "nothing is left behind"
    (tmp_path / "out.jsonl").write_text("mine")
    with pytest.raises(ValueError, match="is there already"):
        batch.generate(source, tmp_path / "out.jsonl")


def test_missing_ray_is_named(tmp_path, monkeypatch):
    from minivllm import ray as batch

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'minivllm\[ray\]'"):
        batch.generate(tmp_path / "in.jsonl", tmp_path / "out.jsonl")


def test_a_row_that_ends_engines_is_an_error_and_the_others_are_answered(embedded, tmp_path, monkeypatch):
    pytest.importorskip("ray")
    from minivllm import ray as batch

    original, ended = batch.AsyncLLM.generate, []

    def generate(self, prompt, params):
        if prompt == "poison":
            ended.append(self)
            os.kill(self._process.pid, signal.SIGKILL)
        return original(self, prompt, params)

    monkeypatch.setattr(batch.AsyncLLM, "generate", generate)
    rows = [{"prompt": prompt} for prompt in ("One", "Two", "poison", "Three")]
    rows += [{"prompt": "Four", "sampling_params": "x"}, {"prompt": "Five", "malformed": 5}]
    rows += [{"prompt": "Six", "sampling_params": {"n": 2}}]
    rows = Rows.open(write_rows(tmp_path / "in.jsonl", rows))
    job = Job.make(rows, tmp_path / "out.jsonl", None, dict(max_tokens=3, ignore_eos=True), 7, {})
    engine = batch._Engine(job, embedded, ENGINE)
    assert engine({"chunk": [0]}) == {"num_rows": [7], "num_failed": [3]}
    engine._llm.shutdown()
    answers = job.read(0)
    assert [answer["num_generated_tokens"] for answer in answers] == [3, 3, None, 3, None, 3, None]
    assert "no engine outlived this row" in answers[2]["error"] and len({*map(id, ended)}) == 3
    assert "has no attribute 'items'" in answers[4]["error"] and "n must be 1, got 2" in answers[6]["error"]
