"""The other doors of the scripted teacher's server, as the real `openai` package uses them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from alignkit.data.closed_world import World
from alignkit.teacher.server import Refused, TeacherServer, read_upload


@pytest.fixture
def client(server: TeacherServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(api_key="none", base_url=server.base_url, max_retries=0) as client:
        yield client


def question(number: int) -> str:
    world = World(number)
    passage = world.passage()
    return f"{passage.statement}\n\n{world.ask(passage).text}"


def row(key: str, content: str, model: str = "scripted") -> bytes:
    body = {"model": model, "messages": [{"role": "user", "content": content}]}
    return (
        json.dumps({"custom_id": key, "method": "POST", "url": "/v1/chat/completions", "body": body}).encode() + b"\n"
    )


def begin(client: openai.OpenAI, content: bytes) -> Any:
    file = client.files.create(file=("rows.jsonl", content), purpose="batch")
    assert client.files.content(file.id).read() == content
    return client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h", metadata={"mark": "m1"}
    )


def test_a_plain_prompt_gets_what_the_chat_gets(client: openai.OpenAI) -> None:
    prompt = question(1)
    plain = client.completions.create(model="scripted", prompt=prompt, max_tokens=50)
    chat = client.chat.completions.create(
        model="scripted",
        messages=[{"role": "user", "content": prompt}],
        max_completion_tokens=50,
        response_format={"type": "json_object"},
    )
    assert plain.object == "text_completion"
    assert plain.choices[0].text == chat.choices[0].message.content
    assert plain.usage and chat.usage and plain.usage.total_tokens == chat.usage.total_tokens


def test_a_batch_is_over_when_it_was_looked_at_often_enough(server: TeacherServer, client: openai.OpenAI) -> None:
    server.batches.polls = 2
    batch = begin(client, row("a", question(1)) + row("b", "line\u2028break") + row("c", question(2), model="gpt"))
    assert [client.batches.retrieve(batch.id).status for _ in range(2)] == ["in_progress", "completed"]
    over = client.batches.retrieve(batch.id)
    assert over.request_counts and (over.request_counts.completed, over.request_counts.failed) == (2, 1)
    assert over.output_file_id and over.error_file_id
    output = [json.loads(line) for line in client.files.content(over.output_file_id).read().splitlines()]
    assert [(reply["custom_id"], reply["response"]["status_code"]) for reply in output] == [("b", 200), ("a", 200)]
    (error,) = (json.loads(line) for line in client.files.content(over.error_file_id).read().splitlines())
    assert error["custom_id"] == "c" and error["response"]["body"]["error"]["code"] == "model_not_found"


def test_what_a_batch_does_not_get_done_expires(server: TeacherServer, client: openai.OpenAI) -> None:
    server.batches.expire_after = 1
    over = client.batches.retrieve(begin(client, row("a", "?") + row("b", "?")).id)
    assert over.status == "expired" and over.output_file_id and over.error_file_id
    (late,) = (json.loads(line) for line in client.files.content(over.error_file_id).read().splitlines())
    assert (late["custom_id"], late["error"]["code"]) == ("b", "batch_expired")


def test_batches_are_listed_with_their_metadata_newest_first(client: openai.OpenAI) -> None:
    ids = [begin(client, row("a", "?")).id for _ in range(2)]
    listed = client.batches.list(limit=10).data
    assert [batch.id for batch in listed] == ids[::-1]
    assert listed[0].metadata == {"mark": "m1"}


def test_what_is_not_there_is_refused(client: openai.OpenAI) -> None:
    for get in (client.batches.retrieve, client.files.content):
        with pytest.raises(openai.NotFoundError):
            get("batch-99")
    with pytest.raises(openai.BadRequestError, match="must have been uploaded"):
        client.batches.create(input_file_id="file-9", endpoint="/v1/chat/completions", completion_window="24h")


def test_an_upload_is_read_byte_by_byte() -> None:
    content = b"a\r\n--b\r\n\n"
    body = b'--XX\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
    body += b'--XX\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n' + content + b"\r\n--XX--\r\n"
    assert read_upload("multipart/form-data; boundary=XX", body) == content
    with pytest.raises(Refused):
        read_upload("application/json", b"{}")
