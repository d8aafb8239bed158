"""Sampling from a server: a small stand-in for forms, errors and retries, and a real ``transformers serve``."""

import json
import math
import os
import socket
import subprocess
import sys
import threading
import time

import pytest
from http_stand_in import StandIn

from lab_utils.data.documents import Encoding
from lab_utils.data.tokenizer import THINK, load_tokenizer
from lab_utils.errors import RecipeError, RunError
from lab_utils.models.generate import Request, Sampling
from lab_utils.rollouts.server import Server

TOKENIZER = load_tokenizer()
ENCODING = Encoding(TOKENIZER)
EOS = TOKENIZER.eos_id
SAMPLING = Sampling(1.0, 0.9, 0, 3)


@pytest.fixture
def stand_in():
    made = []

    def make(answer):
        made.append(StandIn(answer))
        return made[-1]

    yield make
    for each in made:
        each.close()


def says(text):
    """An answer with token ids, as vLLM gives them."""
    ids = [*TOKENIZER.encode(text), EOS]
    marked = [f"token_id:{i}" for i in ids]
    logprobs = {"tokens": marked, "token_logprobs": [-0.5 - i for i in range(len(ids))]}
    choice = {"text": text, "finish_reason": "stop", "token_ids": ids, "logprobs": logprobs}
    return {"choices": [choice]}, ids


def vllm(method, path, body):
    if path == "/v1/models":
        return 200, {"data": [{"id": "tiny"}]}
    return 200, says(f"answer {body['prompt'][-1]}")[0]


def client(url, folder, **options):
    return Server(f"{url}/v1", ENCODING, folder, **{"backoff": 0.01, "tries": 4, **options})


def started(server, round=0):
    server.begin(round)
    return server


def requests(count, budget=20):
    return [Request([5, 6, 100 + key], key, budget) for key in range(count)]


def test_token_ids_and_logprobs(stand_in, tmp_path):
    there = stand_in(vllm)
    server = started(client(there.url, tmp_path))
    samples = server.sample(requests(5), SAMPLING)
    for key, sample in enumerate(samples):
        _, ids = says(f"answer {100 + key}")
        assert sample.tokens == ids and sample.finished
        assert sample.logprobs == [-0.5 - i for i in range(len(ids))]
    assert server.dialect == "tokens" and server.gives_logprobs and server.model == "tiny"
    bodies = [body for _, path, body, _ in there.asked if path == "/v1/completions"]
    assert sorted(body["prompt"] for body in bodies) == [r.prompt for r in requests(5)]
    assert {(b["model"], b["max_tokens"], b["temperature"], b["top_p"], b["logprobs"]) for b in bodies} == {
        ("tiny", 20, 1.0, 0.9, 0)
    }
    assert len({body["seed"] for body in bodies}) == 5 and all("top_k" not in body for body in bodies)


def test_ids_are_read_from_marked_tokens_and_a_missing_end_is_put_back(stand_in, tmp_path):
    def answer(method, path, body):
        reply, ids = says("four")
        choice = reply["choices"][0]
        if body["prompt"][-1] == 100:
            del choice["token_ids"]
        else:  # as SGLang: the end token is in the log-probabilities only
            choice["token_ids"] = ids[:-1]
        return 200, reply

    server = started(client(stand_in(answer).url, tmp_path, model="m"))
    first, second = server.sample(requests(2), SAMPLING)
    assert first.tokens == second.tokens == says("four")[1]
    assert first.logprobs == second.logprobs and not any(map(math.isnan, first.logprobs))


def test_a_cut_answer_is_not_finished(stand_in, tmp_path):
    def answer(method, path, body):
        return 200, {"choices": [{"text": "abc", "finish_reason": "length", "token_ids": [7, 8, 9]}]}

    server = started(client(stand_in(answer).url, tmp_path, model="m"))
    (sample,) = server.sample(requests(1, budget=3), SAMPLING)
    assert sample.tokens == [7, 8, 9] and not sample.finished
    assert all(map(math.isnan, sample.logprobs)) and not server.gives_logprobs
    with pytest.raises(RunError, match="gave 3 tokens where 2 were asked for"):
        server.sample([Request([5], 77, 2)], SAMPLING)


def test_text_where_token_ids_are_refused(stand_in, tmp_path):
    def answer(method, path, body):
        if not isinstance(body["prompt"], str):
            return 400, {"detail": "prompt must be a string"}
        if "generation_config" in body:
            return 422, {"detail": "Unexpected fields"}
        usage = {"prompt_tokens": 3, "completion_tokens": len(TOKENIZER.encode("fünf")) + 1}
        return 200, {"choices": [{"text": "fünf", "finish_reason": "stop"}], "usage": usage}

    there = stand_in(answer)
    server = started(client(there.url, tmp_path, model="m"))
    prompt = TOKENIZER.encode("2 + 3?")[:3]
    samples = server.sample([Request(prompt, key, 20) for key in range(3)], SAMPLING)
    assert {tuple(s.tokens) for s in samples} == {(*TOKENIZER.encode("fünf"), EOS)}
    assert server.dialect == "text" and server.retokenised == 0
    assert len(there.asked) == 5, "two forms are refused once"
    with pytest.raises(RunError, match="counts 3 tokens in a prompt that has 1"):
        server.sample([Request([5], 9, 20)], SAMPLING)
    with pytest.raises(RunError, match="takes no top_k"):
        started(server, 1).sample([Request(prompt, 10, 20)], Sampling(1.0, 1.0, 5, 0))


def test_reasoning_needs_its_end_in_the_text(stand_in, tmp_path):
    def answer(method, path, body):
        if not isinstance(body["prompt"], str):
            return 422, {}
        return 200, {"choices": [{"text": "hm 4", "finish_reason": "stop"}]}

    server = started(client(stand_in(answer).url, tmp_path, model="m"))
    with pytest.raises(RunError, match="leaves special tokens out"):
        server.sample([Request([5, TOKENIZER.special_id(THINK)], 0, 20)], SAMPLING)


def test_trouble_that_passes_is_tried_again(stand_in, tmp_path):
    failed, lock = {}, threading.Lock()

    def answer(method, path, body):
        key = body["prompt"][-1]
        with lock:
            failed[key] = failed.get(key, 0) + 1
        if failed[key] <= 3:
            return [None, (503, {"detail": "loading"}), (500, b"oops")][(failed[key] + key) % 3]
        return vllm(method, path, body)

    server = started(client(stand_in(answer).url, tmp_path, model="m"))
    samples = server.sample(requests(6), SAMPLING)
    assert [s.tokens for s in samples] == [says(f"answer {100 + k}")[1] for k in range(6)]
    assert set(failed.values()) == {4}


def test_errors_say_what_to_check(stand_in, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    begun = time.monotonic()
    with pytest.raises(RunError, match=r"can't be reached .*refused.*check that the server runs"):
        started(client(f"http://127.0.0.1:{port}", tmp_path / "a")).sample(requests(1), SAMPLING)
    assert time.monotonic() - begun < 5
    with pytest.raises(RunError, match=r"answered 401: .*see the server's log"):
        started(client(stand_in(lambda *_: (401, {"no": "key"})).url, tmp_path / "b", model="m")).sample(
            requests(1), SAMPLING
        )
    with pytest.raises(RunError, match="expected JSON, found b'<html>'"):
        started(client(stand_in(lambda *_: (200, b"<html>")).url, tmp_path / "c", model="m")).sample(
            requests(1), SAMPLING
        )
    with pytest.raises(RunError, match="expected a completion, found"):
        started(client(stand_in(lambda *_: (200, {"x": 1})).url, tmp_path / "d", model="m")).sample(
            requests(1), SAMPLING
        )
    with pytest.raises(RunError, match=r"refuses prompts in every form .*unknown model"):
        started(
            client(stand_in(lambda *_: (404, {"error": "unknown model"})).url, tmp_path / "e", model="m")
        ).sample(requests(1), SAMPLING)
    two = stand_in(lambda *_: (200, {"data": [{"id": "a"}, {"id": "b"}]}))
    with pytest.raises(RunError, match=r"serves 2 models \(a, b\): name one"):
        started(client(two.url, tmp_path / "f")).sample(requests(1), SAMPLING)
    with pytest.raises(RecipeError, match="is no address of a server"):
        Server("localhost:8000", ENCODING, tmp_path)


def test_a_silent_server_is_given_up(stand_in, tmp_path):
    gone = threading.Event()
    there = stand_in(lambda *_: gone.wait(5) and (200, {}))
    server = started(client(there.url, tmp_path, model="m", timeout=0.2, tries=2))
    with pytest.raises(RunError, match="timed out"):
        server.sample(requests(1), SAMPLING)
    gone.set()


def test_requests_at_a_time_are_bounded(stand_in, tmp_path):
    def answer(method, path, body):
        time.sleep(0.03)
        return vllm(method, path, body)

    there = stand_in(answer)
    server = started(client(there.url, tmp_path, model="m", concurrency=3))
    server.sample(requests(12), SAMPLING)
    assert there.most == 3


def test_what_is_logged_is_not_asked_again(stand_in, tmp_path):
    asked, down = [], [False]

    def answer(method, path, body):
        key = body["prompt"][-1]
        if down[0] and key >= 103:
            return 500, {}
        asked.append(key)
        return vllm(method, path, body)

    there = stand_in(answer)
    down[0] = True
    server = started(client(there.url, tmp_path, model="m", tries=1, concurrency=1))
    with pytest.raises(RunError):
        server.sample(requests(6), SAMPLING)
    server.end()
    down[0], before = False, list(asked)
    again = started(client(there.url, tmp_path, model="m"))
    samples = again.sample(requests(6), SAMPLING)
    assert before == [100, 101, 102] and sorted(asked) == [100 + k for k in range(6)]
    assert [s.tokens for s in samples] == [says(f"answer {100 + k}")[1] for k in range(6)]
    assert all(s.finished for s in samples)


def test_no_proxy_and_the_key_of_the_environment(stand_in, tmp_path, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("ASCENT_SERVER_KEY", "sesame")
    there = stand_in(vllm)
    started(client(there.url, tmp_path)).sample(requests(1), SAMPLING)
    assert {headers.get("Authorization") for *_, headers in there.asked} == {"Bearer sesame"}


def test_weights_are_handed_over(stand_in, tmp_path):
    there = stand_in(lambda method, path, body: (200, {"success": "bad" not in json.dumps(body)}))
    for reload in ("/hook", "/collective_rpc", "/update_weights_from_disk"):
        client(there.url, tmp_path / "logs", reload=there.url + reload).hand_over(tmp_path / "w")
    path = str(tmp_path / "w")
    assert [(p, body) for _, p, body, _ in there.asked] == [
        ("/hook", {"path": path}),
        ("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": path}}),
        ("/reset_prefix_cache", None),
        ("/update_weights_from_disk", {"model_path": path}),
    ]
    with pytest.raises(RunError, match="did not take the weights"):
        url = there.url + "/update_weights_from_disk"
        client(there.url, tmp_path / "logs", reload=url).hand_over(tmp_path / "bad")
    there.asked.clear()
    own = client(there.url, tmp_path / "logs", model="old")
    own.hand_over(path)
    assert own.model == path and there.asked[0][2]["model"] == path


def test_ask(stand_in, tmp_path):
    there = stand_in(lambda m, p, body: (200, says(f"n {len(body['prompt'])}")[0]))
    server = client(there.url, tmp_path, model="m", ask_tokens=9)
    prompts = [[{"role": "user", "content": "word " * n}] for n in (1, 5, 2)]
    lengths = [int(reply.split()[1]) for reply in server.ask(prompts)]
    assert lengths[0] < lengths[2] < lengths[1] and server.ask([]) == []
    assert {body["max_tokens"] for _, _, body, _ in there.asked} == {9}


# -- transformers serve --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def serving(tmp_path_factory):
    """A running ``transformers serve`` and two checkpoints of a small Qwen with the shipped tokenizer."""
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        pytest.skip("transformers serve needs fastapi, uvicorn and openai: install the dev group")
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folders = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        config = Qwen3Config(
            vocab_size=TOKENIZER.vocab_size,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            eos_token_id=EOS,
            bos_token_id=TOKENIZER.bos_id,
        )
        folder = tmp_path_factory.mktemp(f"weights-{seed}")
        Qwen3ForCausalLM(config).save_pretrained(folder)
        TOKENIZER.save(folder)
        folders.append(folder)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    log = open(tmp_path_factory.mktemp("serve") / "log", "w+")  # noqa: SIM115
    command = ["serve", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    program = "from transformers.cli.transformers import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", program, *command], env=environment, stdout=log, stderr=subprocess.STDOUT
    )
    url = f"http://127.0.0.1:{port}"
    for _ in range(300):
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            break
        except OSError:
            if process.poll() is not None:
                log.seek(0)
                pytest.fail(log.read()[-3000:])
            time.sleep(0.2)
    yield url, folders
    process.terminate()
    process.wait(20)
    log.close()


def test_transformers_serve(serving, tmp_path):
    """A real server: text prompts are found out, sampling is not greedy, new weights are taken by name."""
    import torch
    from transformers import AutoModelForCausalLM

    url, (old, new) = serving
    server = started(client(url, tmp_path, model=str(old), timeout=60, concurrency=2))
    prompt = TOKENIZER.encode("2 plus 3 is")
    samples = server.sample([Request(prompt, key, 6) for key in range(6)], SAMPLING)
    assert server.dialect == "generation_config" and not server.gives_logprobs
    assert all(1 <= len(s.tokens) <= 6 for s in samples)
    assert len({tuple(s.tokens) for s in samples}) > 3, "answers are sampled, not the most probable one each"
    server.end()
    again = started(client("http://127.0.0.1:9", tmp_path, model="gone")).sample(
        [Request(prompt, key, 6) for key in range(6)], SAMPLING
    )
    assert [(s.tokens, s.finished) for s in again] == [(s.tokens, s.finished) for s in samples]

    # At a temperature near zero the text is that of the weights that were handed over.
    def greedy(folder):
        model = AutoModelForCausalLM.from_pretrained(folder)
        ids = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)[0, len(prompt) :]
        return TOKENIZER.decode(ids.tolist(), skip_special=True)

    cold = Sampling(1e-4, 1.0, 0, 0)
    for round, folder in ((1, old), (2, new)):
        server.hand_over(folder)
        (sample,) = started(server, round).sample([Request(prompt, 0, 6)], cold)
        text = TOKENIZER.decode(sample.tokens, skip_special=True)
        assert greedy(folder).startswith(text) and text
    assert greedy(old) != greedy(new)
    with pytest.raises(RunError, match="nowhere"):
        client(url, tmp_path, model="x", tries=1).hand_over(tmp_path / "nowhere")
