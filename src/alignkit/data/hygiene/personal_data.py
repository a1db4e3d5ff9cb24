"""Personal data and secrets that can be told by their form: numbers with a checksum, addresses, keys.

English and Chinese. Names of persons, postal addresses and dates of birth have no such form and are not found, so this
is no proof that a text is free of personal data.
"""

from __future__ import annotations

import ipaddress
import re
import unicodedata
from collections.abc import Callable

from stdnum import iban, luhn
from stdnum.cn import ric
from stdnum.us import ssn

_FLAGS = re.ASCII | re.IGNORECASE
_RESERVED = re.compile(r"(^|\.)(example(\.(com|net|org))?|test|invalid|localhost)$", _FLAGS)
"""Domains that belong to nobody (RFC 2606)."""
_CARD = re.compile(
    r"4\d{12}(\d{3}){0,2}|(5[1-5]|2[2-7])\d{14}|3[47]\d{13}|3[0689]\d{12}|(6011|65\d\d|35\d\d)\d{12}|62\d{14,17}"
)
"""How the card numbers of Visa, Mastercard, American Express, Diners, Discover, JCB and UnionPay begin, and end."""
_VERSION = re.compile(r"(version|release|section|\bver|\bv|版本?|第)[\s.:]*$", re.IGNORECASE)
_NOT_DIGITS = re.compile(r"\D")


def personal_data(text: str) -> list[str]:
    """The kinds of personal data and secrets in a text, in the order of the table below."""
    plain = text if text.isascii() else unicodedata.normalize("NFKC", text)
    return [kind for kind, (pattern, test) in _KINDS.items() if any(map(test, pattern.finditer(plain)))]


def _is_email(match: re.Match[str]) -> bool:
    return not _RESERVED.search(match["domain"])


def _is_phone(match: re.Match[str]) -> bool:
    """Not with 555, the numbers of fiction, nor a round one like 15000000000, which is a quantity."""
    digits = _NOT_DIGITS.sub("", match[0])
    fiction = match["american"] is not None and "555" in (digits[-10:-7], digits[-7:-4])
    return 8 <= len(digits) <= 15 and not fiction and not digits.endswith("00000")


def _is_card(match: re.Match[str]) -> bool:
    digits = _NOT_DIGITS.sub("", match[0])
    return _CARD.fullmatch(digits) is not None and bool(luhn.is_valid(digits))


def _is_iban(match: re.Match[str]) -> bool:
    """Whether it begins with an IBAN: words in capitals may follow."""
    compact = match[0].replace(" ", "")
    return any(iban.is_valid(compact[:length]) for length in range(15, min(len(compact), 34) + 1))


def _is_public_address(match: re.Match[str]) -> bool:
    """Addresses of private networks and of documentation lead to nobody, and version numbers are no addresses."""
    if _VERSION.search(match.string[max(0, match.start() - 12) : match.start()]):
        return False
    try:
        return ipaddress.ip_address(match[0]).is_global
    except ValueError:
        return False


def _always(match: re.Match[str]) -> bool:
    return True


_KINDS: dict[str, tuple[re.Pattern[str], Callable[[re.Match[str]], bool]]] = {
    "e-mail address": (
        re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@(?P<domain>(?:[a-z0-9-]{1,63}\.){1,8}[a-z]{2,24})(?![\w@-])", _FLAGS),
        _is_email,
    ),
    "phone number": (
        re.compile(
            r"(?<![\w+.-])(?:"
            r"\+\d{1,3}(?:[ .-]?\(?\d{1,5}\)?){2,6}"
            r"|(?P<american>(?:1[ .-])?(?:\([2-9]\d\d\) ?|[2-9]\d\d[ .-])[2-9]\d\d[ .-]\d{4})"
            r"|(?:86[ -]?)?1[3-9]\d(?P<gap>[ -]?)\d{4}(?P=gap)\d{4}"
            r"|\(?0\d{2,3}\)?-\d{7,8}"
            r")(?![\w-]|[.,]\d)",
            _FLAGS,
        ),
        _is_phone,
    ),
    "card number": (re.compile(r"(?<![\w.-])\d(?:[ -]?\d){12,18}(?![\w-]|[.,]\d)", _FLAGS), _is_card),
    "bank account number": (
        re.compile(r"(?<!\w)[A-Z]{2}\d\d(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?!\w)", re.ASCII),
        _is_iban,
    ),
    "IP address": (
        re.compile(r"(?<![\w.:])(?:\d{1,3}(?:\.\d{1,3}){3}|[23][0-9a-f]{3}:[0-9a-f:]{2,34})(?![\w:]|\.\d)", _FLAGS),
        _is_public_address,
    ),
    "Chinese identity number": (
        re.compile(r"(?<!\w)\d{17}[\dX](?!\w)", _FLAGS),
        lambda match: bool(ric.is_valid(match[0])),
    ),
    "US social security number": (
        re.compile(r"(?<![\w-])\d{3}-\d\d-\d{4}(?![\w-])", re.ASCII),
        lambda match: bool(ssn.is_valid(match[0])),
    ),
    "secret key": (
        re.compile(
            r"(?<![A-Za-z0-9])(?:sk-[A-Za-z0-9_-]{20,}|hf_[A-Za-z0-9]{30,}|gh[oprsu]_[A-Za-z0-9]{30,}"
            r"|github_pat_\w{40,}|glpat-[\w-]{20,}|(?:AKIA|ASIA)[A-Z0-9]{16}|AIza[\w-]{35}|xox[abprs]-[\w-]{20,}"
            r"|[rs]k_live_[A-Za-z0-9]{20,}|LTAI[A-Za-z0-9]{16,20}|eyJ[\w-]{10,999}\.eyJ[\w-]{10,9999}\.[\w-]{20,})(?![A-Za-z0-9])"
            r"|-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----",
            re.ASCII,
        ),
        _always,
    ),
}
