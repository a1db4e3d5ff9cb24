"""Is a server there at all? Asked once before any work, since retries take a dead one for a slow one for a while."""

from __future__ import annotations

import json
import logging
from urllib.parse import urlsplit

from alignkit.core.config import TeacherConfig
from alignkit.core.errors import UserError, first_line
from alignkit.teacher.address import TEACHER, Keys, checked_url, is_loopback, read_key, without_key
from alignkit.teacher.openai_client import check_config

LOG = logging.getLogger("alignkit")

LONGEST_SECONDS = 20.0
_NOT_READY = (502, 503, 504)
"""What gateways say of a server that is not there, and servers while they load."""
_REFUSED = (401, 403)
_LISTED = 10
"""Models that a warning names."""


def check_reachable(config: TeacherConfig, keys: Keys = TEACHER) -> None:
    """Ask a server once for the list of its models (GET <base_url>/models).

    Raises `UserError` where nobody answers, it is not ready, or the key is refused. Any other answer will do, since not
    every server has such a list; where there is one without the model, a warning says so, since some servers take any
    name.
    """
    from openai import APIStatusError, APITimeoutError, DefaultHttpxClient, OpenAI, OpenAIError

    check_config(config, keys)
    url, key = checked_url(config, keys), read_key(config.api_key_env, keys.api_key_env)
    seconds = min(LONGEST_SECONDS, config.timeout_seconds)
    trusts_proxy = not is_loopback(urlsplit(url).hostname or "")
    http = DefaultHttpxClient(follow_redirects=False, timeout=seconds, trust_env=trusts_proxy)
    try:
        with OpenAI(api_key=key, base_url=url, max_retries=0, http_client=http) as client:
            body, status = client.get("/models", cast_to=bytes), 200
    except APIStatusError as error:
        body, status = b"", error.status_code
    except OpenAIError as error:
        cause = without_key(first_line(error.__cause__ if isinstance(error.__cause__, Exception) else error), key)
        what = f"nothing within {seconds:g} s" if isinstance(error, APITimeoutError) else cause
        raise UserError(
            f"{keys.base_url}={url}: no server answers there ({what}). Start it or correct {keys.base_url}; the same "
            "command goes on from here."
        ) from error
    if status in _NOT_READY:
        raise UserError(
            f"{keys.base_url}={url}: the server is not ready (status {status}). Wait until it is; the same command "
            "goes on from here."
        )
    if status in _REFUSED:
        raise UserError(
            f"{keys.base_url}={url}: the key was refused (status {status}). {keys.api_key_env} takes the NAME of an "
            "environment variable with the right one."
        )
    if (names := _names(body)) and config.model not in names:
        LOG.warning(
            "%s: the server does not list %r among its models: %s%s",
            keys.model, config.model, ", ".join(names[:_LISTED]), ", ..." * (len(names) > _LISTED),
        )  # fmt: skip


def _names(body: bytes) -> list[str]:
    """The models that a server lists; none where it lists nothing that can be read."""
    try:
        return [entry["id"] for entry in json.loads(body)["data"] if isinstance(entry["id"], str)]
    except (ValueError, KeyError, TypeError):
        return []
