"""Where a server is and what opens it: its base URL, and the key in an environment variable."""

from __future__ import annotations

import os
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any
from urllib.parse import SplitResult, urlsplit

from alignkit.core.config import TeacherConfig
from alignkit.core.errors import UserError

DEFAULT_BASE_URL = "https://api.openai.com/v1"
"""Always passed explicitly: the package would otherwise follow OPENAI_BASE_URL and send key and documents there."""
NO_KEY = "none"
"""What a server that asks for no key is sent: the package insists on one."""


@dataclass(frozen=True)
class Keys:
    """What a server is called in messages, and the settings that they name; by default a teacher's."""

    who: str = "teacher"
    model: str = "teacher.model"
    base_url: str = "teacher.base_url"
    api_key_env: str = "teacher.api_key_env"
    allow_http: str = "teacher.allow_http"
    concurrency: str = "teacher.concurrency"
    timeout_seconds: str = "teacher.timeout_seconds"
    ask_again: str = "teacher.retry_failed=true"


TEACHER = Keys()


def server_url(config: TeacherConfig) -> str:
    """The server's base URL as it stands in store keys, unchecked; `checked_url` says whether it may be used."""
    return (config.base_url or DEFAULT_BASE_URL).rstrip("/")


def server_host(config: TeacherConfig) -> str:
    """Host and port, for messages."""
    return urlsplit(server_url(config)).netloc


def checked_url(config: TeacherConfig, keys: Keys = TEACHER) -> str:
    """The server's base URL. Raises `UserError` where it holds a secret, or would send the key in the clear."""
    url = server_url(config)
    parts = split_url(keys.base_url, url)
    if parts.username or parts.password or parts.query:
        raise UserError(f"{keys.base_url} must hold no user, password or query: the key comes from {keys.api_key_env}")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"{keys.base_url}={url}: not a URL; write it like https://host/v1")
    if parts.scheme == "http" and not is_loopback(parts.hostname) and not config.allow_http:
        raise UserError(
            f"{keys.base_url}={url}: key and documents would cross the network in the clear. Use https, or allow it "
            f"with {keys.allow_http}=true"
        )
    return url


def split_url(setting: str, url: str) -> SplitResult:
    """The parts of a URL. Raises `UserError` that names the setting where it is none; a secret may be what is wrong."""
    try:
        parts = urlsplit(url)
        _ = parts.port  # is looked at only now
    except ValueError:
        raise UserError(f"{setting} is not a URL: no host or port can be read; write it like https://host/v1") from None
    return parts


def read_key(variable: str, setting: str = "teacher.api_key_env") -> str:
    """The key in the environment variable that a setting names; an empty name stands for a server that asks for none.

    Raises `UserError` when there is none, or what is there is no key.
    """
    if not variable:
        return NO_KEY
    if not variable.isidentifier():
        raise UserError(f"{setting} must be the NAME of an environment variable, e.g. OPENAI_API_KEY")
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UserError(
            f"{setting}={variable}: the environment variable {variable} is not set. Export it with your key, "
            f"or name another; {setting}='' is for a server that asks for none."
        )
    if not key.isascii() or not key.isprintable() or set(key) & set(" '\"\\"):
        raise UserError(f"{setting}={variable}: the value of {variable} holds characters that no key has")
    return key


def without_key(value: Any, key: str) -> Any:
    """A text, or parsed JSON, in which the key is blotted out: some servers quote it in what they say."""
    if key == NO_KEY:
        return value
    if isinstance(value, str):
        return value.replace(key, "***")
    if isinstance(value, list):
        return [without_key(item, key) for item in value]
    if isinstance(value, dict):
        return {name: without_key(item, key) for name, item in value.items()}
    return value


def is_loopback(host: str) -> bool:
    """Whether a host is this machine."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
