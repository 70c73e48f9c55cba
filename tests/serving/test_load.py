"""A real server with two API servers under 32 streaming clients, ended amid their streams.

One server lives through the whole story; each test checks one thing of the record.
"""

from __future__ import annotations

import json
import re
import signal
import time
from dataclasses import dataclass

import pytest

from benchmarks.real.counters import last_pie_line
from tests.helpers.model import REPOSITORY
from tests.serving.conftest import Pair
from tests.serving.process import (
    START_LINE,
    Ending,
    Server,
    Usage,
    frames_of_ours,
    tracebacks_in_service,
    usage,
)
from tests.serving.settings import MAX_MODEL_LEN, POOL_BLOCKS, RING_SLOTS
from tests.serving.traffic import (
    CLIENTS,
    COLOURS,
    Answer,
    Traffic,
    alone,
    differing,
    interrupted,
    load,
)

END_SECONDS = 40.0
"""Stock vLLM ends within 7 s of SIGTERM on a busy machine of two cores (0.32, 2026-11-22)."""

WORKER = "VLLM::Worker"
LINE_SECONDS = 10.5
"""A little more than the time between two lines of totals."""

GIVEN_BACK = 8 << 20
"""The pool's second chunk has 11 rows, 15.5 MiB."""

DASHBOARD = REPOSITORY / "pie_vllm" / "grafana" / "dashboard.json"
ALONE = 2
MIB = 1 << 20
pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(1500)]


@dataclass(frozen=True)
class Story:
    """What one server did, from its start to its end.

    Attributes:
        traffic: two loads of all clients.
        alone: greedy answers to some of the prompts while nothing else ran.
        usage: of the engine's processes after the first and after the second load.
        idle: what the worker used in the end when nothing had run for some seconds.
        metrics: of the server after the loads.
        ending: after SIGTERM while all clients streamed.
        last: what the clients had of those streams.
        counters: of the last line in the log.
        log: all of it.
        saw_arena: the check for left device memory had something to look for.
    """

    traffic: tuple[Traffic, Traffic]
    alone: list[Answer]
    usage: tuple[dict[str, Usage], dict[str, Usage]]
    idle: Usage
    metrics: dict[str, float]
    ending: Ending
    last: list[Answer]
    counters: dict[str, float]
    log: str
    saw_arena: bool

    @property
    def answers(self) -> list[Answer]:
        """All answers of both loads."""
        return [answer for traffic in self.traffic for answer in traffic.answers]


def after_idling(server: Server, before: Usage) -> Usage:
    """What the worker uses when its memory has fallen, or after half a minute."""
    end = time.monotonic() + 30
    while True:
        now = usage(server.child(WORKER))
        if before.private_bytes - now.private_bytes > GIVEN_BACK or time.monotonic() > end:
            return now
        time.sleep(0.2)


@pytest.fixture(scope="module")
def story(pair: Pair) -> Story:
    """Let the server live, and write down what happened."""
    server = pair.loaded
    first = load(server.url, range(0, 1))
    warm = server.engine_usage()
    second = load(server.url, range(1, 2))
    later = server.engine_usage()
    complete = [a.client for a in second.answers if a.kind == "greedy" and a.complete]
    references = [alone(server.url, client) for client in complete[:ALONE]]
    metrics = server.metrics()
    read = time.monotonic()
    idle = after_idling(server, later[WORKER])
    # The next step then logs a line of totals, in which all is that the metrics counted.
    time.sleep(max(0.0, read + LINE_SECONDS - time.monotonic()))
    alone(server.url, complete[0])
    last = interrupted(server.url, lambda: server.signal(signal.SIGTERM), END_SECONDS)
    ending = server.await_end(END_SECONDS)
    return Story(
        (first, second),
        references,
        (warm, later),
        idle,
        metrics,
        ending,
        last,
        last_pie_line(server.log),
        server.text(),
        server.maps_an_arena,
    )


def test_the_server_says_its_sizes_once(story: Story) -> None:
    """One line at start: residents, pooled blocks, ring, host bytes, longest context, driver."""
    lines = [found for line in story.log.splitlines() if (found := START_LINE.search(line))]
    assert len(lines) == 1
    line = lines[0]
    assert int(line["pooled"]) == int(line["rows"]) == POOL_BLOCKS
    assert int(line["resident"]) < POOL_BLOCKS, "most blocks are to be pooled"
    assert int(line["slots"]) == RING_SLOTS
    assert float(line["ring_mib"]) > 0
    assert float(line["host_gib"]) > 0
    assert int(line["longest"]) == MAX_MODEL_LEN
    assert line["driver"] == "host"


def test_every_answer_that_was_not_aborted_is_complete(story: Story) -> None:
    """Each choice of each request has the number of tokens asked for, n > 1 included."""
    kinds = {answer.kind for answer in story.answers}
    assert kinds == {"greedy", "sampled", "aborted"}
    assert [a for a in story.answers if a.error is not None] == []
    assert [a for a in story.answers if a.kind != "aborted" and not a.complete] == []


def test_greedy_answers_do_not_depend_on_the_load(story: Story) -> None:
    """Token for token: under load, aborted, preempted, from cached prefixes, or alone."""
    assert len(story.alone) == ALONE
    assert differing([*story.answers, *story.alone]) == []


def test_a_prompt_too_long_is_a_bad_request(story: Story) -> None:
    """Longer than the longest context: a clean 400 that names the limit, amid the load."""
    for traffic in story.traffic:
        status, message = traffic.too_long
        assert status == 400
        assert str(MAX_MODEL_LEN) in message


def test_structured_output_holds_to_its_schema(story: Story) -> None:
    """A grammar's masks reach the right rows while blocks move and others are preempted."""
    for traffic in story.traffic:
        sky = json.loads(traffic.structured)
        assert sky["colour"] in COLOURS
        assert isinstance(sky["bright"], bool)


def test_the_load_went_through_the_pool(story: Story) -> None:
    """Blocks were stored, and loaded step by step; otherwise nothing here was tested."""
    counters = story.counters
    assert counters["pooled_peak"] > POOL_BLOCKS / 2
    assert counters["bytes_stored"] > 0
    assert counters["bytes_loaded"] > counters["bytes_stored"]


def test_metrics_count_and_return_to_zero(story: Story) -> None:
    """Preemptions are counted; with nothing in flight no request and no block is in use."""
    assert story.metrics["vllm:num_preemptions_total"] > 0
    assert story.metrics["vllm:num_requests_running"] == 0
    assert story.metrics["vllm:num_requests_waiting"] == 0
    assert story.metrics["vllm:kv_cache_usage_perc"] == 0


def test_pie_metrics_add_up_over_two_api_servers(story: Story) -> None:
    """Counters reach one API server each time, and their sum is what the engine moved."""
    metrics, counters = story.metrics, story.counters
    assert metrics["vllm:pie_pooled_blocks"] == POOL_BLOCKS
    assert metrics["vllm:pie_pooled_blocks_used"] == 0
    for metric, counter in (("loaded", "bytes_loaded"), ("stored", "bytes_stored")):
        # The last line of the log may count the streams that SIGTERM ended, too.
        assert 0 < metrics[f"vllm:pie_{metric}_bytes_total"] <= counters[counter]
    assert metrics["vllm:pie_loaded_bytes_total"] > counters["bytes_loaded"] / 4


def test_the_dashboard_names_metrics_that_the_server_exports(story: Story) -> None:
    """No panel stays empty because of a name; vLLM has those of speculation where it speculates."""
    text = DASHBOARD.read_text()
    names = set(re.findall(r"vllm:\w+", text))
    assert len(names) > 10
    missing = names - story.metrics.keys()
    assert missing == {name for name in names if name.startswith("vllm:spec_decode_")}
    assert [panel["title"] for panel in json.loads(text)["panels"]]


def test_a_second_load_takes_no_more(story: Story) -> None:
    """Threads, descriptors and private memory of the engine's processes stay as they were."""
    warm, later = story.usage
    for title, before in warm.items():
        after = later[title]
        assert after.threads <= before.threads, title
        assert after.descriptors <= before.descriptors + 2, title
        assert after.private_bytes <= before.private_bytes + 48 * MIB, title


def test_an_idle_server_gives_the_pool_back(story: Story) -> None:
    """No step runs then: the worker's own thread does it, and the last load takes it again."""
    _, later = story.usage
    assert later[WORKER].private_bytes - story.idle.private_bytes > GIVEN_BACK
    assert story.log.count("Pie: idle for 2 s, so 1 of 2 chunks of the CPU pool go back") >= 1


def test_sigterm_amid_streams_ends_cleanly(story: Story) -> None:
    """Status 0 as stock, no client left waiting, no process, shared memory or arena left."""
    assert len(story.last) == CLIENTS
    assert any(not answer.complete for answer in story.last), "all had ended before the signal"
    assert story.ending.status == 0
    assert story.ending.left == ()
    assert story.saw_arena


def test_the_log_has_no_error_of_ours(story: Story) -> None:
    """No traceback while it served, and none through pie_vllm while it ended."""
    assert tracebacks_in_service(story.log) == []
    assert frames_of_ours(story.log) == []
