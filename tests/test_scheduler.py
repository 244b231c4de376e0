"""Scheduler and BlockManager without a model: each rule by itself, and then a fuzz of all of them together."""

import random
from collections import deque

import pytest

from minivllm.engine.batch import StepResult
from minivllm.engine.block_manager import BlockManager
from minivllm.engine.request import Request
from minivllm.engine.scheduler import RIDING_TOKENS, Scheduler
from minivllm.sampling_params import SamplingParams


def make_scheduler(num_blocks=16, block_size=4, max_num_seqs=4, budget=64, eos=(), cache=True):
    return Scheduler(BlockManager(num_blocks, block_size, cache), max_num_seqs, budget, eos)


def make_request(name, tokens, max_tokens=8, **options):
    params = SamplingParams(max_tokens=max_tokens, **options)
    total = len(tokens) + max_tokens
    return Request(name, list(tokens), params, max_num_tokens=total, seed=0, arrival_time=0.0)


def add(scheduler, name, tokens, max_tokens=8, **options):
    request = make_request(name, tokens, max_tokens, **options)
    scheduler.add(request)
    return request


def step(scheduler, token=0):
    """Schedule a step and enter `token` for every row that samples; returns the batch."""
    batch = scheduler.schedule()
    scheduler.update(StepResult([token] * len(batch.sampled_rows)))
    scheduler.check_integrity()
    return batch


def run(scheduler, token=0, limit=200):
    for _ in range(limit):
        if not scheduler.requests:
            return
        step(scheduler, token)
    raise AssertionError("requests starve")


# ---- prefix cache and blocks


def test_a_prefix_is_shared_inside_one_step():
    scheduler = make_scheduler()
    a, b = add(scheduler, "a", range(10)), add(scheduler, "b", [*range(8), 99, 98])
    batch = step(scheduler)
    assert batch.num_computed == [0, 8] and batch.num_scheduled == [10, 2]
    assert a.block_ids[:2] == b.block_ids[:2] and a.block_ids[2] != b.block_ids[2]
    assert [scheduler.block_manager.ref_counts[block] for block in (*a.block_ids, b.block_ids[2])] == [2, 2, 1, 1]
    assert b.num_cached_tokens == 8 and scheduler.stats.num_cached_tokens == 8
    scheduler.abort([a])
    assert [scheduler.block_manager.ref_counts[block] for block in b.block_ids] == [1, 1, 1]
    run(scheduler)
    assert scheduler.block_manager.num_free_blocks == 16


def test_only_what_is_scheduled_is_shared():
    """With a budget of 6, half a block of the first prompt is computed: the other half must not be matched."""
    scheduler = make_scheduler(budget=6)
    add(scheduler, "a", range(12))
    step(scheduler)
    assert len(scheduler.block_manager.cached_prefix(make_request("b", range(12)))) == 1


@pytest.mark.parametrize(("length", "cached"), [(1, 0), (4, 0), (5, 4), (7, 4), (8, 4), (9, 8)])
def test_the_last_token_is_never_matched(length, cached):
    scheduler = make_scheduler()
    add(scheduler, "a", range(12))
    run(scheduler)
    request = add(scheduler, "b", range(length))
    batch = step(scheduler)
    assert (batch.num_computed, batch.num_scheduled, request.num_cached_tokens) == ([cached], [length - cached], cached)


def test_outputs_are_cached_too_but_never_placeholders():
    scheduler = make_scheduler()
    request = add(scheduler, "a", range(6), max_tokens=8)
    scheduler.schedule()
    scheduler.schedule()  # token 6 is in flight, and computed in this step
    assert request.num_published_blocks == 1
    scheduler.update(StepResult([50]))
    scheduler.update(StepResult([51]))
    assert len(scheduler.block_manager.cached_prefix(make_request("b", [*range(6), 50, 51, 0]))) == 1
    step(scheduler, 52)  # computes token 7, the last one of the second block
    assert len(scheduler.block_manager.cached_prefix(make_request("b", [*range(6), 50, 51, 0]))) == 2


def test_a_hash_stands_for_the_whole_prefix():
    scheduler = make_scheduler()
    add(scheduler, "a", [1, 2, 3, 4, 5, 6, 7, 8, 9])
    run(scheduler)
    hits = [scheduler.block_manager.cached_prefix(make_request("b", tokens)) for tokens in
            ([5, 6, 7, 8, 9], [0, 2, 3, 4, 5, 6, 7, 8, 9], [1, 2, 3, 4, 5, 6, 7, 0, 9])]  # fmt: skip
    assert [len(blocks) for blocks in hits] == [0, 0, 1]


def test_without_prefix_caching_nothing_is_shared():
    scheduler = make_scheduler(cache=False)
    add(scheduler, "a", range(12)), add(scheduler, "b", range(12))
    assert step(scheduler).num_computed == [0, 0]


def test_eviction_is_least_recently_used_first_and_ends_before_starts():
    manager = BlockManager(num_blocks=6, block_size=2)

    def use(tokens):
        request = make_request("", tokens)
        assert manager.admit(request, manager.cached_prefix(request), num_spare=0)
        request.num_computed_tokens = len(tokens)
        manager.publish(request)
        manager.free(request)

    def cached():
        return [len(manager.cached_prefix(make_request("", [*tokens, 0]))) for tokens in (a, b)]

    a, b = [1, 1, 2, 2, 3, 3], [4, 4, 5, 5, 6, 6]
    use(a), use(b)
    assert cached() == [3, 3]
    use(a)  # now b is the older one
    use([7, 7])
    assert cached() == [3, 2]
    use([8, 8, 9, 9])
    assert cached() == [3, 0]
    use([10])
    assert cached() == [2, 0]
    use([11])
    assert cached() == [2, 0], "a block with nothing worth keeping goes first"


def test_unused_hits_are_not_counted_as_free_too():
    """All 3 blocks are free, 2 of them are hits: a request that needs 2 more cannot be admitted."""
    manager = BlockManager(num_blocks=3, block_size=2)
    first = make_request("", [1, 1, 2, 2])
    assert manager.admit(first, [], 0)
    first.num_computed_tokens = 4
    manager.publish(first)
    manager.free(first)
    request = make_request("", [1, 1, 2, 2, 3, 3, 4])
    hits = manager.cached_prefix(request)
    assert len(hits) == 2 and not manager.admit(request, hits, 0) and manager.num_free_blocks == 3
    manager.check_integrity([])


def test_reset_prefix_cache():
    scheduler = make_scheduler()
    add(scheduler, "old", range(9), max_tokens=1)
    step(scheduler)
    running = add(scheduler, "running", range(20, 29))
    step(scheduler)
    scheduler.block_manager.reset_prefix_cache()
    scheduler.check_integrity()
    for tokens in (range(9), range(20, 29)):
        assert scheduler.block_manager.cached_prefix(make_request("", tokens)) == []
    run(scheduler)
    assert running.num_output_tokens == 8 and scheduler.block_manager.num_free_blocks == 16


# ---- what a step computes


def test_prompts_are_chunked_and_sample_only_at_their_end():
    scheduler = make_scheduler(budget=4)
    add(scheduler, "a", range(10), max_tokens=2)
    batches = [step(scheduler) for _ in range(4)]
    assert [batch.num_scheduled for batch in batches] == [[4], [4], [2], [1]]
    assert [batch.num_computed for batch in batches] == [[0], [4], [8], [10]]
    assert [batch.sampled_rows for batch in batches] == [[], [], [0], [0]]
    assert [batch.num_decodes for batch in batches] == [0, 0, 0, 1]


def test_running_requests_come_first_and_waiting_ones_get_what_is_left():
    scheduler = make_scheduler(budget=5)
    a, b = add(scheduler, "a", range(4)), add(scheduler, "b", range(10, 19))
    first, second, third = step(scheduler), step(scheduler), step(scheduler)
    assert (first.slots, first.num_scheduled) == ([a.slot, b.slot], [4, 1])
    assert (second.slots, second.num_scheduled, second.num_decodes) == ([a.slot, b.slot], [1, 4], 1)
    assert third.num_tokens == 5


@pytest.mark.parametrize(("max_tokens", "taken"), [(3000, 5000), (2499, 5000), (2498, RIDING_TOKENS - 1)])
def test_prompts_that_hold_nobody_up_ride_along(max_tokens, taken):
    """A request that will end before the one that decodes is computed beside it in smaller steps; others at once."""
    scheduler = make_scheduler(num_blocks=4000, budget=8000)
    long = add(scheduler, "long", range(10), max_tokens=2500)
    assert step(scheduler).num_scheduled == [10]
    short = add(scheduler, "short", range(20, 5020), max_tokens=max_tokens)
    assert step(scheduler).num_scheduled == [1, taken]
    scheduler.abort([long])
    left = 5000 - short.num_computed_tokens
    assert not left or step(scheduler).num_scheduled == [left], "alone, it has the whole budget"


def test_prompts_that_ride_along_get_at_least_as_much_as_the_decodes():
    scheduler = make_scheduler(num_blocks=4000, budget=8000, max_num_seqs=RIDING_TOKENS)
    for i in range(RIDING_TOKENS - 1):
        add(scheduler, str(i), [i], max_tokens=2500)
    step(scheduler)
    add(scheduler, "short", range(5000), max_tokens=3)
    assert step(scheduler).num_tokens == 2 * (RIDING_TOKENS - 1)


def test_nothing_is_admitted_that_the_next_blocks_would_preempt():
    """Four blocks: one for a, three for b, and none for the token of a that comes next."""
    scheduler = make_scheduler(num_blocks=4)
    a, b = add(scheduler, "a", range(4)), add(scheduler, "b", range(10, 22))
    step(scheduler)
    assert (a.slot >= 0, b.slot >= 0) == (True, False)


def test_first_come_first_served():
    """The second request does not fit beside the first; the third would, but waits its turn."""
    scheduler = make_scheduler(num_blocks=4)
    names = {"a": range(9), "b": range(20, 28), "c": [50]}
    requests = [add(scheduler, name, tokens, max_tokens=2) for name, tokens in names.items()]
    step(scheduler)
    assert [request.slot >= 0 for request in requests] == [True, False, False]
    run(scheduler)
    assert sorted(requests, key=lambda request: request.metrics.first_scheduled_time) == requests


def test_max_num_seqs():
    scheduler = make_scheduler(max_num_seqs=2)
    for name in "abc":
        add(scheduler, name, [1, 2, 3])
    assert len(step(scheduler).slots) == 2


def test_the_newest_request_is_preempted_and_comes_back_first():
    scheduler = make_scheduler(num_blocks=4, block_size=2, cache=False)
    a, b = add(scheduler, "a", [1, 2], max_tokens=5), add(scheduler, "b", [3, 4], max_tokens=5)
    step(scheduler, 7), step(scheduler, 7)
    assert a.num_output_tokens == b.num_output_tokens == 2
    step(scheduler, 7)  # both compute their fourth token
    late = add(scheduler, "c", [5])
    batch = step(scheduler, 7)  # a needs a third block: b gives its up
    assert batch.slots == [a.slot] and list(scheduler.waiting) == [b, late]
    assert b.num_computed_tokens == 0 and b.block_ids == [] and b.metrics.num_preemptions == 1
    assert (scheduler.stats.num_preemptions, scheduler.stats.num_recomputed_tokens) == (1, 4)
    run(scheduler, 7)
    assert b.token_ids == [3, 4, 7, 7, 7, 7, 7] and b.metrics.first_scheduled_time < late.metrics.first_scheduled_time


def test_a_preempted_request_waits_for_its_token_in_flight():
    scheduler = make_scheduler(num_blocks=3, block_size=2, cache=False)
    a, b = add(scheduler, "a", [1], max_tokens=5), add(scheduler, "b", [2], max_tokens=5)
    step(scheduler, 7)
    scheduler.schedule()
    scheduler.schedule()  # a takes the third block, b is preempted with a token in flight
    assert b.slot < 0 and b.num_in_flight == 1
    scheduler.abort([a])
    assert scheduler.schedule() is None, "b's next token is not known yet"
    scheduler.update(StepResult([7, 8]))
    batch = scheduler.schedule()
    assert batch.admitted[0].token_ids == [2, 7, 8]
    assert a.finish_reason == "abort"


@pytest.mark.parametrize("in_flight", [1, 2, 3])
def test_no_step_computes_past_max_tokens(in_flight):
    scheduler = make_scheduler()
    request = add(scheduler, "a", range(3), max_tokens=4)
    pending = deque()
    num_computed = 0
    while scheduler.requests:
        batch = scheduler.schedule()
        if batch is not None:
            pending.append(len(batch.sampled_rows))
            num_computed += batch.num_tokens
        if batch is None or len(pending) == in_flight:
            scheduler.update(StepResult([5] * pending.popleft()))
    assert request.num_output_tokens == 4 and num_computed == 3 + 4 - 1


def test_a_request_that_can_never_fit_is_refused():
    scheduler = make_scheduler(num_blocks=4)
    scheduler.check_fits(17)  # the last token is never computed
    with pytest.raises(ValueError, match="18 tokens, but the KV cache holds 16"):
        scheduler.check_fits(18)


def test_an_id_in_use_is_refused():
    scheduler = make_scheduler()
    add(scheduler, "a", [1], max_tokens=1)
    with pytest.raises(ValueError, match="'a' is in use"):
        add(scheduler, "a", [2])
    run(scheduler)
    add(scheduler, "a", [2])


# ---- ends


@pytest.mark.parametrize(
    ("options", "sampled", "end"),
    [
        (dict(), [4, 5, 9], ("stop", None, 3)),  # 9 ends the sequence
        (dict(ignore_eos=True, max_tokens=4), [9, 9, 9, 9], ("length", None, 4)),
        (dict(stop_token_ids=[5]), [4, 5], ("stop", 5, 2)),
        (dict(stop_token_ids=[5], ignore_eos=True), [9, 5], ("stop", 5, 2)),
        (dict(min_tokens=3, stop_token_ids=[5]), [9, 5, 4, 5], ("stop", 5, 4)),
        (dict(min_tokens=3), [4, 4, 9], ("stop", None, 3)),
        (dict(max_tokens=1), [4], ("length", None, 1)),
        (dict(max_tokens=2), [4, 9], ("stop", None, 2)),
    ],
)
def test_ends(options, sampled, end):
    scheduler = make_scheduler(eos=[9])
    request = add(scheduler, "a", [1, 2], **options)
    for i, token in enumerate(sampled):
        assert not request.finished, f"ended after {i} tokens"
        step(scheduler, token)
    assert (request.finish_reason, request.stop_reason, request.num_output_tokens) == end
    assert not scheduler.requests and scheduler.block_manager.num_free_blocks == 16


@pytest.mark.parametrize("state", ["waiting", "running", "in flight", "preempted in flight"])
def test_abort(state):
    scheduler = make_scheduler(num_blocks=2, block_size=2, cache=False)
    request = add(scheduler, "a", [1], max_tokens=3)
    if state != "waiting":
        step(scheduler, 5)
    if "in flight" in state:
        scheduler.schedule()
    if state.startswith("preempted"):
        scheduler._preempt_newest()
    scheduler.abort([request])
    assert request.finish_reason == "abort"
    scheduler.check_integrity()
    assert scheduler.block_manager.num_free_blocks == 2 and not scheduler.requests
    again = add(scheduler, "a", [3], max_tokens=1)  # the id is free again
    if "in flight" in state:
        assert scheduler.update(StepResult([6])) == [], "a token of an aborted request must be dropped"
        assert request.output_token_ids == [5]
    run(scheduler, 7)
    scheduler.abort([again])
    assert again.output_token_ids == [7] and again.finish_reason == "length"


def test_many_that_wait_are_aborted_in_one_go():
    class Queue(deque):
        def remove(self, request):
            raise AssertionError("each is searched for among all")

    scheduler = make_scheduler(max_num_seqs=1)
    requests = [add(scheduler, str(i), [1, 2, 3]) for i in range(9)]
    step(scheduler)
    scheduler.waiting = Queue(scheduler.waiting)
    scheduler.abort(requests[:1] + requests[5:])
    assert [request.request_id for request in scheduler.waiting] == ["1", "2", "3", "4"]
    assert {request.finish_reason for request in requests} == {None, "abort"} and not scheduler.running
    run(scheduler)


def test_recover_loses_no_request():
    scheduler = make_scheduler(block_size=2, max_num_seqs=2)
    requests = [add(scheduler, name, [1, 2, 3, ord(name)], max_tokens=4) for name in "abc"]
    step(scheduler, 7)
    scheduler.schedule()
    scheduler.schedule()
    scheduler.recover()  # the two steps in flight never ran
    scheduler.check_integrity()
    assert list(scheduler.waiting) == requests and scheduler.block_manager.num_free_blocks == 16
    assert scheduler.block_manager.cached_prefix(requests[0]) == [], "what the steps wrote is not known"
    assert [request.num_in_flight for request in requests] == [0, 0, 0]
    run(scheduler, 7)
    assert all(request.output_token_ids == [7, 7, 7, 7] for request in requests)


def test_blocks_before_the_window_are_freed():
    """A request of 60 tokens under a window of 9 never holds more than the blocks the window touches."""
    scheduler = make_scheduler(num_blocks=16, block_size=4, budget=64)
    scheduler.window = 9
    request = add(scheduler, "a", [1, 2, 3], max_tokens=57)
    most = 0
    while scheduler.requests:
        step(scheduler, 5)
        most = max(most, 16 - scheduler.block_manager.num_free_blocks)
        scheduler.check_integrity()
    assert len(request.output_token_ids) == 57 and most == 3
    assert scheduler.block_manager.num_free_blocks == 16


# ---- fuzz

NUM_WORKLOADS = 30_000
VOCAB = 3


def hash_prefix(parent, token):
    return hash((parent, token))


def next_token(prefix_hash):
    return (prefix_hash >> 20) % VOCAB


def alone(request, eos):
    """(output, finish reason) that the fake model gives the request when nothing else is in the world."""
    prefix = 0
    for token in request.token_ids[: request.num_prompt_tokens]:
        prefix = hash_prefix(prefix, token)
    params, output = request.params, []
    while True:
        output.append(next_token(prefix))
        prefix = hash_prefix(prefix, output[-1])
        ends = [] if params.ignore_eos else eos
        if len(output) >= params.min_tokens and output[-1] in (*ends, *params.stop_token_ids):
            return output, "stop"
        if len(output) == params.max_tokens:
            return output, "length"


class FakeRunner:
    """Runs batches as the runner does.  K and V of a token are the hash of the prefix that ends with it, and so is the
    token it predicts: each row checks that all it attends to is its own prefix."""

    def __init__(self, scheduler):
        self.block_size = scheduler.block_manager.block_size
        self.max_num_batched_tokens = scheduler.max_num_batched_tokens
        self.window = scheduler.window or 1 << 30
        self.cache = [None] * (scheduler.block_manager.num_blocks * self.block_size)
        self.tables = [[0] * 64 for _ in range(scheduler.max_num_seqs)]
        self.prefixes = [[] for _ in range(scheduler.max_num_seqs)]  # hash of each prefix of the slot's tokens
        self.num_admitted = [0] * scheduler.max_num_seqs
        self.last_token = [None] * scheduler.max_num_seqs

    def execute(self, batch):
        """Returns the tokens of the sampled rows."""
        assert 0 < batch.num_tokens <= self.max_num_batched_tokens and len(set(batch.slots)) == len(batch.slots)
        for request in batch.admitted:
            prefix, prefixes = 0, []
            for token in request.token_ids:
                prefix = hash_prefix(prefix, token)
                prefixes.append(prefix)
            self.prefixes[request.slot], self.num_admitted[request.slot] = prefixes, len(prefixes)
            self.last_token[request.slot] = None
        for slot, column, blocks in batch.new_blocks:
            self.tables[slot][column : column + len(blocks)] = blocks
        rows = []
        for i, (slot, begin, count) in enumerate(
            zip(batch.slots, batch.num_computed, batch.num_scheduled, strict=True)
        ):
            prefixes, table, size = self.prefixes[slot], self.tables[slot], self.block_size
            if i < batch.num_decodes:
                assert count == 1 and begin == len(prefixes), "a decode computes the token that was sampled last"
                prefixes.append(hash_prefix(prefixes[-1], self.last_token[slot]))
            else:
                assert count > 0 and begin + count <= self.num_admitted[slot], "the runner does not know these tokens"
            places = [table[p // size] * size + p % size for p in range(begin + count)]
            for p in range(begin, begin + count):
                self.cache[places[p]] = prefixes[p]
            rows.append((prefixes, places))
        for begin, (prefixes, places) in zip(batch.num_computed, rows, strict=True):  # all have written
            seen = range(max(0, begin - self.window + 1), len(places))
            assert all(self.cache[places[p]] == prefixes[p] for p in seen), "K and V of another request"
        assert batch.sampled_rows == [i for i, (prefixes, places) in enumerate(rows) if len(places) == len(prefixes)]
        tokens = []
        for i in batch.sampled_rows:
            tokens.append(next_token(rows[i][0][-1]))
            self.last_token[batch.slots[i]] = tokens[-1]
        return tokens


def random_workload(draw):
    """A scheduler, and requests that fit its KV cache."""
    eos = draw.sample(range(VOCAB), draw.randrange(2))
    block_size = draw.choice([1, 2, 2, 4, 4, 16])
    common = [draw.randrange(VOCAB) for _ in range(block_size + 8)]
    requests = []
    for i in range(draw.randint(1, 7)):
        prompt = common[: draw.randrange(len(common))] + [draw.randrange(VOCAB) for _ in range(draw.randint(1, 4))]
        max_tokens = draw.randint(1, 12)
        options = dict(ignore_eos=draw.random() < 0.5, min_tokens=draw.randint(0, max_tokens))
        if draw.random() < 0.2:
            options["stop_token_ids"] = [draw.randrange(VOCAB)]
        requests.append(make_request(str(i), prompt, max_tokens, **options))
    longest = max(request.max_num_tokens for request in requests)
    num_blocks = -(-(longest - 1) // block_size) + draw.choice([0, 0, 1, 2, 5])
    max_num_seqs = draw.randint(1, 4)
    scheduler = make_scheduler(
        num_blocks, block_size, max_num_seqs, max_num_seqs + draw.choice([0, 1, 3, 30]), eos, draw.random() < 0.8
    )
    scheduler.window = draw.choice([None, None, 1, 2, 3, 7])
    return scheduler, requests


def run_workload(seed):
    """One random workload from its first request to an empty engine.  Returns its stats."""
    draw = random.Random(seed)
    scheduler, requests = random_workload(draw)
    runner = FakeRunner(scheduler)
    max_in_flight = draw.choice([1, 2, 2, 3])
    calm = draw.random() < 0.5  # no aborts, no failures, no resets
    arriving, pending = deque(requests), deque()
    num_failures = 0
    # Each step of a calm engine brings on a request by a token at least, or makes up for a preemption.
    limit = 20 + 3 * sum(request.max_num_tokens for request in requests)
    while arriving or scheduler.requests or pending:
        limit -= 1
        assert limit > 0, "no progress"
        while arriving and (draw.random() < 0.5 or not scheduler.requests):
            scheduler.check_fits(arriving[0].max_num_tokens)
            scheduler.add(arriving.popleft())
        chance = 1.0 if calm else draw.random()
        if chance < 0.03:
            there = [request for request in requests if request not in arriving]
            scheduler.abort(draw.sample(there, min(len(there), draw.randint(1, 2))))
        elif chance < 0.05:
            scheduler.block_manager.reset_prefix_cache()
        batch = scheduler.schedule()
        assert all(request.num_computed_tokens < request.max_num_tokens for request in scheduler.running)
        if 0.05 < chance < 0.08 and num_failures < 3:  # the step fails before it has written anything
            num_failures += 1
            limit += sum(request.num_tokens for request in requests)
            pending.clear()
            scheduler.recover()
            scheduler.check_integrity()
            continue
        assert batch or pending or not scheduler.requests, "nothing runs and nothing is awaited"
        if batch is not None:
            pending.append(runner.execute(batch))
        if pending and (batch is None or len(pending) == max_in_flight):
            scheduler.update(StepResult(pending.popleft()))
        scheduler.check_integrity()
    for request in requests:
        output, reason = alone(request, scheduler.eos_token_ids)
        if request.finish_reason == "abort":
            assert request.output_token_ids == output[: request.num_output_tokens]
        else:
            assert (request.output_token_ids, request.finish_reason) == (output, reason)
    assert scheduler.block_manager.num_free_blocks == scheduler.block_manager.num_blocks
    starts = [request.metrics.first_scheduled_time for request in requests]
    starts = [start for start in starts if start is not None]
    assert starts == sorted(starts), "not first come, first served"
    return scheduler.stats


@pytest.mark.parametrize("part", range(4))
def test_fuzz(part):
    """Outputs as if alone, no block leaked, misused or shared by mistake, and always progress."""
    num_preemptions = num_cached_tokens = num_workloads = 0
    for seed in range(part, NUM_WORKLOADS, 4):
        try:
            stats = run_workload(seed)
        except BaseException as error:
            error.add_note(f"workload {seed}")
            raise
        num_workloads += 1
        num_preemptions += stats.num_preemptions
        num_cached_tokens += stats.num_cached_tokens
    assert num_workloads == NUM_WORKLOADS // 4
    assert num_preemptions > num_workloads // 4 and num_cached_tokens > num_workloads // 4, "the workloads are too easy"
