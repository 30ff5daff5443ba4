"""Judges: a model, or a server that speaks OpenAI's chat completions."""

import argparse
import http.client
import ipaddress
import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from megatron_tgdpo.errors import UserError, one_line

KEY_VARIABLE = "TGDPO_JUDGE_API_KEY"
_WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds before each further try
_MOST_BYTES = 16 << 20  # of a reply
_PASSING = (408, 409, 425, 429)  # statuses below 500 that a later try may not meet


class Judge(Protocol):
    """Replies to prompts."""

    def reply(self, prompts: Sequence[tuple[str, str]]) -> list[str]:
        """A reply to each (place, text).

        Raises:
            UserError: There is none.
        """
        ...


def is_url(judge: str) -> bool:
    """Whether a judge is a server's, not a model's."""
    return judge.startswith(("http://", "https://"))


def check_url(url: str, remote: bool) -> None:
    """Refuses what is no plain address, without ``remote`` all hosts but this one, and a key that no header can hold.

    Raises:
        UserError: It is not to be asked.
    """
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise UserError(f"--judge {url}: no URL: {error}") from error
    if not host or parts.username is not None or parts.query or parts.fragment:
        raise UserError("--judge: a URL must be like http://127.0.0.1:8000/v1, without user, query or fragment")
    key = os.environ.get(KEY_VARIABLE, "")
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"{KEY_VARIABLE}: has characters that no key has, such as a line break")
    if _is_loopback(host):
        return
    if not remote:
        raise UserError(f"--judge {url}: is another machine, which would get all questions and answers: add --remote")
    if parts.scheme != "https" and key:
        raise UserError(f"--judge {url}: {KEY_VARIABLE} would cross the network unencrypted: use https, or unset it")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Another host would get answers and key."""

    def redirect_request(self, *_: Any) -> None:
        return None


class _PassingError(Exception):
    """A failure that may pass."""


class Endpoint:
    """A server's chat completions, at temperature 0. A batch is asked at once, a connection a prompt.

    Args:
        url: Up to ``/v1``.
        model: As the server calls it.
        max_new_tokens: Limit of a reply.
        timeout: Seconds for one reply, from asking to its last byte.
    """

    def __init__(self, url: str, model: str, *, max_new_tokens: int, timeout: float) -> None:
        self._url = url.rstrip("/") + "/chat/completions"
        self._model = model
        self._max_new_tokens = max_new_tokens
        self._timeout = timeout
        own = _is_loopback(urlsplit(url).hostname or "")
        self._opener = urllib.request.build_opener(_NoRedirect, *([urllib.request.ProxyHandler({})] if own else []))

    def reply(self, prompts: Sequence[tuple[str, str]]) -> list[str]:
        """See :class:`Judge`."""
        replies: list[str] = [""] * len(prompts)
        errors: list[BaseException] = []
        stopped = threading.Event()

        def work(index: int) -> None:
            try:
                replies[index] = self._ask(prompts[index][1], stopped)
            except BaseException as error:
                errors.append(error)
                stopped.set()  # the others' further tries would only delay the error

        # Daemons, so that Ctrl-C does not wait for a slow server.
        threads = [threading.Thread(target=work, args=(index,), daemon=True) for index in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return replies

    def _ask(self, prompt: str, stopped: threading.Event) -> str:
        problem = "was not asked"
        for wait in (0.0, *_WAITS):
            if stopped.wait(wait):
                break
            try:
                return self._try(prompt)
            except _PassingError as error:
                problem = str(error)
        raise UserError(
            f"{self._url}: {problem}, {1 + len(_WAITS)} times: mend the server, then start the same command again"
        )

    def _try(self, prompt: str) -> str:
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": self._max_new_tokens,
        }
        headers = {"Content-Type": "application/json"}
        key = os.environ.get(KEY_VARIABLE)
        if key:
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self._url, json.dumps(body).encode(), headers)
        end = time.monotonic() + self._timeout
        try:
            with self._opener.open(request, timeout=self._timeout) as response:
                content = _read(response, end)
        except urllib.error.HTTPError as error:
            with error:
                if error.code >= 500 or error.code in _PASSING:
                    raise _PassingError(f"answers with status {error.code}") from error
                said = " ".join(error.read(_MOST_BYTES).decode(errors="replace").split())
                said = (said.replace(key, "(the key)") if key else said)[:300]
            raise UserError(f"{self._url}: answers with status {error.code}: {said or error.reason}") from error
        except (OSError, http.client.HTTPException) as error:  # refused, reset, too slow, cut off
            raise _PassingError(f"gives no answer ({one_line(getattr(error, 'reason', error))})") from error
        try:
            text = json.loads(content)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
            raise _PassingError("answers with something other than a chat completion") from error
        if text is None:  # the model spent all its tokens on thinking
            return ""
        if not isinstance(text, str):
            raise _PassingError("answers with something other than a chat completion")
        return text


def _read(response: Any, end: float) -> bytes:
    """The whole body; a server that sends a byte now and then is too slow as well."""
    content = b""
    while chunk := response.read1(1 << 16):
        content += chunk
        if time.monotonic() > end:
            raise TimeoutError("timed out")
        if len(content) > _MOST_BYTES:
            raise OSError(f"more than {_MOST_BYTES >> 20} MiB")
    return content


class ModelJudge:
    """A model, greedy; see `tgdpo.generation.backends.make_generator`."""

    def __init__(self, sampler: Any, tokenizer: Any) -> None:
        self._sampler = sampler
        self._tokenizer = tokenizer

    def reply(self, prompts: Sequence[tuple[str, str]]) -> list[str]:
        """See :class:`Judge`."""
        from megatron_tgdpo.data.encode import encode_prompt
        from megatron_tgdpo.data.fields import Message
        from tgdpo.generation.sampling import Request

        requests = [
            Request(encode_prompt((Message("user", text),), self._tokenizer, place), 0, 0.0, place)
            for place, text in prompts
        ]
        return [answer.text for answer in self._sampler.sample(requests)]


def judge_settings(given: argparse.Namespace) -> dict[str, Any]:
    """What the replies depend on, for the journal."""
    if is_url(given.judge):
        return {"judge": [given.judge, given.judge_model], "max_new_tokens": given.max_new_tokens}
    from megatron_tgdpo.data.tokenizers import load_tokenizer
    from tgdpo.generation.models import default_device, dtype_of, fingerprint, tokenizer_directory

    device = default_device()
    tokenizer = load_tokenizer(str(tokenizer_directory(given.judge_directory)), given.chat_template)
    return {
        "judge": fingerprint(given.judge_directory),
        "tokenizer": [tokenizer.fingerprint, tokenizer.template_fingerprint],
        "max_new_tokens": given.max_new_tokens,
        "batch": given.batch,
        "precision": [str(dtype_of(given.dtype, device)).removeprefix("torch."), device.type],
    }


@contextmanager
def judge_directory(given: argparse.Namespace) -> Iterator[Path | None]:
    """The HF directory of the command line's judge, None for a server; a checkpoint is exported for the time."""
    if is_url(given.judge):
        yield None
        return
    from tgdpo.generation.models import hf_directory

    with hf_directory(given.judge_directory, given.scratch) as directory:
        yield directory


def make_judge(given: argparse.Namespace, directory: Path | None) -> Judge:
    """The judge of a command line.

    Args:
        given: Its options.
        directory: What :func:`judge_directory` gives.

    Raises:
        UserError: The model cannot be loaded.
    """
    if directory is None:
        return Endpoint(given.judge, given.judge_model, max_new_tokens=given.max_new_tokens, timeout=given.timeout)
    from megatron_tgdpo.data.tokenizers import load_tokenizer
    from tgdpo.generation.backends import make_generator
    from tgdpo.generation.models import default_device, dtype_of, tokenizer_directory

    device = default_device()
    tokenizer = load_tokenizer(str(tokenizer_directory(given.judge_directory)), given.chat_template)
    sampler = make_generator(
        "transformers",
        directory,
        tokenizer,
        top_p=1.0,
        max_new_tokens=given.max_new_tokens,
        dtype=dtype_of(given.dtype, device),
        device=device,
    )
    return ModelJudge(sampler, tokenizer)
