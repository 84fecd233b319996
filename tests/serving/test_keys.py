"""API keys: who gets in, and what tenants can learn of each other, which is nothing."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvjax.serving.keys import Keys
from tests.serving.live_server import Client, serving

ALICE, BOB, OPERATOR = "alice-" + "a" * 20, "bob-" + "b" * 20, "root-" + "r" * 20
PROMPT = {"prompt": "a secret that only one of them has sent", "max_tokens": 2, "temperature": 0}


@pytest.fixture(scope="module")
def keyed(tiny_path: Path, tmp_path_factory) -> Iterator[Client]:
    file = tmp_path_factory.mktemp("keys") / "keys.txt"
    file.write_text(f"alice {ALICE}\nbob {BOB}  # a comment\n\nops {OPERATOR} operator\n")
    with serving(tiny_path, api_key_file=file) as client:
        yield client


def key(value: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {value}"}


def test_without_a_right_key_there_is_401(keyed):
    for headers in ({}, key("wrong"), key(ALICE[:-1]), {"Authorization": f"Basic {ALICE}"}):
        status, answer = keyed.post("/v1/completions", PROMPT, **headers)
        assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
    assert keyed.get("/v1/models")[0] == 401
    assert keyed.get("/v1/models", **key(ALICE))[0] == 200
    for open_to_all in ("/health", "/ready", "/version"):
        assert keyed.get(open_to_all)[0] == 200


def test_what_is_common_to_all_tenants_is_for_operators(keyed):
    for method, path in (("GET", "/metrics"), ("GET", "/v1/kv/stats"), ("POST", "/v1/kv/reset")):
        assert keyed.request(method, path, headers=key(ALICE)).status == 403
        assert keyed.request(method, path, headers=key(OPERATOR)).status == 200


def test_one_tenants_cache_is_invisible_to_another(keyed):
    def cached(who: str, **body: str) -> int:
        status, answer = keyed.post("/v1/completions", {**PROMPT, **body}, **key(who))
        assert status == 200
        return answer["usage"]["prompt_tokens_details"]["cached_tokens"]

    whole = len(PROMPT["prompt"]) - 1
    assert [cached(ALICE), cached(ALICE)] == [0, whole]
    assert [cached(BOB), cached(BOB)] == [0, whole]
    assert cached(BOB, cache_salt="mine") == 0
    alices = keyed.service.keys.tenant(ALICE).salt
    assert cached(BOB, cache_salt=alices) == 0, "a salt is within the tenant's own"
    computed = keyed.engine.runner.real_tokens
    assert cached(OPERATOR) == 0
    assert keyed.engine.runner.real_tokens - computed >= whole + 1, "it was really computed"


def test_one_tenants_chunks_and_reports_are_invisible_to_another(keyed):
    chunk = {"text": "A page that only one of them has put."}
    status, put = keyed.post("/v1/kv/chunks", chunk, **key(ALICE))
    assert status == 200
    path, named = f"/v1/kv/chunks/{put['id']}", {**PROMPT, "chunks": [{"id": put["id"]}]}
    status, answer = keyed.post("/v1/completions", named, **key(ALICE))
    assert status == 200
    reuse = f"/v1/kv/requests/{answer['id']}/reuse"
    assert keyed.get(reuse, **key(ALICE))[0] == 200
    for other in (key(BOB), key(OPERATOR)):
        assert keyed.get("/v1/kv/chunks", **other)[1]["data"] == []
        assert keyed.get(path, **other)[0] == 404
        for action in ("pin", "unpin"):
            assert keyed.post(f"{path}/{action}", {}, **other)[0] == 404
        assert keyed.request("DELETE", path, headers=other).status == 404
        assert keyed.post("/v1/completions", named, **other)[0] == 404
        assert keyed.get(reuse, **other)[0] == 404
        listed = keyed.get("/v1/kv/requests", **other)[1]["requests"]
        assert answer["id"] not in {one["id"] for one in listed}
    computed = keyed.engine.runner.real_tokens
    keyed.post("/v1/kv/chunks", chunk, **key(ALICE))
    assert keyed.engine.runner.real_tokens == computed, "it is hers, and there"
    status, bobs = keyed.post("/v1/kv/chunks", chunk, **key(BOB))
    assert (status, bobs["id"]) == (200, put["id"]), "the id is of the text"
    assert keyed.engine.runner.real_tokens - computed == put["tokens"], "it was really computed"
    assert keyed.request("DELETE", path, headers=key(BOB)).status == 200
    assert keyed.get(path, **key(ALICE))[1]["stored"] is True


def test_a_strategy_that_was_not_measured_is_refused_with_what_to_do(keyed):
    body = {**PROMPT, "chunks": ["abc"], "reuse": "epic:k=2"}
    for path in ("/v1/completions", "/v1/kv/chunks"):
        own = body if path == "/v1/completions" else {"text": "abc", "reuse": "epic:k=2"}
        status, answer = keyed.post(path, own, **key(ALICE))
        assert (status, answer["error"]["param"]) == (400, "reuse")
        assert "kvjax reuse check" in answer["error"]["message"]


@pytest.mark.parametrize(
    ("text", "says"),
    [("", "no key"), ("alice short", "16"), ("alice", "NAME KEY"), (f"a {ALICE} x", "NAME")],
)  # fmt: skip
def test_a_file_of_keys_that_cannot_be_is_refused_with_the_line(text, says):
    with pytest.raises(ValueError, match=says):
        Keys(text.splitlines(), "keys.txt")


def test_salts_do_not_tell_the_key_and_differ():
    keys = Keys([f"a {ALICE}", f"b {BOB}"])
    a, b = keys.tenant(ALICE), keys.tenant(BOB)
    assert a is not None
    assert b is not None
    assert a.salt != b.salt
    assert ALICE not in str(a)
    assert a.cache_salt("x") != a.cache_salt(None)
